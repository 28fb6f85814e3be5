"""Checkpoints of sharded models: tests/training/sharded_checkpoints.py makes the checks of two processes, which are
started once; here one process reads what they wrote, and processes are killed while they write."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.launched import ROOT, Outcomes, launch
from tests.training.sharded_checkpoints import Training, checks, read_from_others, write_for_others
from tlcr.errors import CheckpointError
from tlcr.training.checkpoint import latest_checkpoint, load_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded-checkpoints")
    (folder / "of-one").mkdir()
    write_for_others(folder / "of-one", sharded=False)
    return folder


@pytest.fixture(scope="module")
def two_processes(folder: Path) -> Outcomes:
    return launch("tests.training.sharded_checkpoints", folder, processes=2)


@pytest.fixture
def of_two(two_processes: Outcomes, folder: Path, tmp_path: Path) -> Path:
    """Checkpoints that two processes wrote, to read or to damage."""
    two_processes.assert_passed("for_one_process")
    return Path(shutil.copytree(folder / "of-two", tmp_path / "of-two"))


@pytest.mark.slow
@pytest.mark.parametrize("name", checks.names)
def test_two_processes(two_processes: Outcomes, name: str) -> None:
    two_processes.assert_passed(name)


@pytest.mark.slow
def test_one_process_continues_what_two_began(of_two: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_from_others(of_two, sharded=False)
    assert "was written by 2 processes and is read by 1: the run continues" in caplog.text
    assert "begin with random states of their own" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda file: file.unlink(), "shards/shard-00002-model-00001-of-00001.safetensors is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "shards/shard-00002-.* has .* bytes of"),
    ],
)
def test_a_checkpoint_without_a_shard_is_passed_over(
    of_two: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], says: str
) -> None:
    newer = of_two / "torch.float32" / "step-000003"
    older = Path(shutil.copytree(newer, newer.with_name("step-000002")))
    damage(newer / "shards" / "shard-00002-model-00001-of-00001.safetensors")
    assert latest_checkpoint(newer.parent) == older
    assert caplog.records and caplog.records[0].levelname == "WARNING"
    with pytest.raises(CheckpointError, match=f"is incomplete: {says}.*; delete it to resume from an earlier one"):
        load_checkpoint(newer, **Training(torch.float32, sharded=False).parts)


@pytest.mark.slow
def test_damage_within_a_shard_is_one_line_that_names_the_file(of_two: Path) -> None:
    path = of_two / "torch.bfloat16" / "step-000003"
    file = path / "shards" / "shard-00001-model-00001-of-00001.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=rf"shards/{file.name} cannot be read into this run") as caught:
        load_checkpoint(path, **Training(torch.bfloat16, sharded=False).parts)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_states_of_another_dtype_are_refused(of_two: Path) -> None:
    with pytest.raises(CheckpointError, match=r"half a master for a parameter .* that was bfloat16"):
        load_checkpoint(of_two / "torch.bfloat16" / "step-000003", **Training(torch.float16, sharded=False).parts)


# ---- killed while saving

KILLED = """
import itertools, os, resource, signal, sys
import torch
import torch._dynamo  # which tensors of shards would import in every fork
from pathlib import Path
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from tlcr.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

torch.set_num_threads(1)
folder = Path(sys.argv[1])
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}

def save(step):
    # The group is of this process, which was forked: threads of a group do not live on in a fork.
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    model = nn.Linear(300, 300)
    nn.init.constant_(model.weight, step)
    for name, tensor in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(distribute_tensor(tensor.detach(), mesh, [Shard(0)])))
    save_checkpoint(folder, step, models={"model": model}, optimizers={}, schedulers={}, state={"step": step},
                    tensors={"copy": torch.full((50_000,), float(step))}, config={}, keep=1)

def in_a_fork(before, step):
    child = os.fork()
    if child == 0:
        before()
        save(step)
        os._exit(0)
    return os.waitpid(child, 0)[1]

def die_before_change(number):
    changes = itertools.count()
    def hook(event, arguments):
        opens = event == "open" and str(arguments[0]).startswith(str(folder))
        if (opens or event in CHANGES) and next(changes) == number:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def die_within_a_file(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

def is_saved(before):
    # In a process that may be killed, by a signal; in any case there is a checkpoint afterwards, and it is whole.
    step = load() + 1
    status = in_a_fork(before, step)
    assert os.WIFSIGNALED(status) or status == 0, status
    after = load()
    assert after in (step - 1, step) and (after == step or os.WIFSIGNALED(status)), (after, step, status)
    return after == step, os.WIFSIGNALED(status)

def load():
    latest = latest_checkpoint(folder)
    assert latest is not None, "the previous checkpoint is gone"
    model = nn.Linear(300, 300)
    loaded = load_checkpoint(latest, models={"model": model}, optimizers={}, schedulers={})
    assert loaded.step == loaded.state["step"]
    assert len(list((latest / "shards").iterdir())) == 1
    assert (model.weight == loaded.step).all() and (loaded.tensors["copy"] == loaded.step).all()
    return loaded.step

assert in_a_fork(lambda: None, 1) == 0
before_changes = []
while not before_changes or before_changes[-1][1]:
    number = len(before_changes)
    before_changes.append(is_saved(lambda: die_before_change(number)))
within_files = [is_saved(lambda: die_within_a_file(size)) for size in (1, 500, 100_000, 300_000)]
print([saved for saved, killed in before_changes if killed], within_files)
"""


@pytest.mark.slow
def test_killed_at_any_point_of_a_save_the_previous_checkpoint_still_loads(tmp_path: Path) -> None:
    """Before each change of the disk, one after the other, and amid the writing of a file, small or large."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    saved, within_files = ast.literal_eval(f"[{done.stdout.replace('] [', '], [')}]")
    # A save is complete at one of its changes, and stays so: what comes behind deletes the older checkpoint.
    assert saved == sorted(saved) and saved.count(False) > 15 and saved.count(True) > 3
    assert within_files == [(False, True)] * 4


KILLED_ALONE = """
import os, signal, sys
from pathlib import Path
import torch
from tests.training.sharded_checkpoints import Training
from tlcr.training.distributed import process_index

folder = Path(sys.argv[1])
training = Training(torch.bfloat16, sharded=True)
training.steps(1)
training.save(folder)
training.steps(1)

def hook(event, arguments):
    if event == "open" and "/shards/" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)

if process_index() == 1:
    sys.addaudithook(hook)
training.save(folder)
"""


@pytest.mark.slow
def test_one_of_two_killed_while_saving_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED_ALONE, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(tmp_path / "checkpoints")],
        env={**os.environ, **ours},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0 and f"Signal {int(signal.SIGKILL)}" in done.stderr, done.stderr
    latest = latest_checkpoint(tmp_path / "checkpoints")
    assert latest is not None and latest.name == "step-000001"
    Training(torch.bfloat16, sharded=False).load(latest)
