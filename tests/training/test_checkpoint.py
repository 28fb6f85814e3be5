"""Checkpoints: everything comes back bit for bit; whatever goes wrong, the previous one is still there."""

from __future__ import annotations

import ast
import errno
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.test_files import files_limited_to
from tlcr.config.schema import RunConfig
from tlcr.errors import CheckpointError
from tlcr.training import checkpoint, checksums, metrics
from tlcr.training import loop as loop_module
from tlcr.training.checkpoint import (
    as_plain,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    start_or_resume,
    versions,
)
from tlcr.training.loop import TrainingLoop
from tlcr.training.metrics import MetricsLog
from tlcr.training.optim import build_optimizer, build_scheduler

NOTHING: dict = {"models": {}, "optimizers": {}, "schedulers": {}}


class Training:
    """A model with tied weights and a bfloat16 part, its optimiser and its schedule, some steps into training."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.ModuleDict(
            {"embed": nn.Embedding(11, 6), "out": nn.Linear(6, 11, bias=False), "low": nn.Linear(6, 6).bfloat16()}
        )
        self.model["out"].weight = self.model["embed"].weight
        groups = [{"params": list(self.model.parameters()), "lr": 0.01, "weight_decay": 0.1}]
        self.optimizer = build_optimizer(groups)
        self.scheduler = build_scheduler(self.optimizer, schedule="cosine", total_steps=50, warmup_steps=3)

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            ids = torch.randint(11, (8,)) + random.randint(0, 0) + np.random.randint(1)
            hidden = self.model["low"](self.model["embed"](ids).bfloat16()).float()
            loss = nn.functional.cross_entropy(self.model["out"](hidden), ids)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            losses.append(loss.item() + random.random() + np.random.rand())
        return losses

    @property
    def parts(self) -> dict:
        return {
            "models": {"model": self.model},
            "optimizers": {"adamw": self.optimizer},
            "schedulers": {"cosine": self.scheduler},
        }

    def save(self, folder: Path, step: int, keep: int = 2, **changes: object) -> Path:
        rest: dict = {"state": {"step": step}, "tensors": {}, "config": {"a": 1}, "keep": keep, **changes}
        return save_checkpoint(folder, step, **self.parts, **rest)


def test_a_run_continues_bit_for_bit(tmp_path):
    """Weights, moments, masters, learning rates and the random states of python, numpy and torch."""
    first = Training(seed=1)
    first.steps(5)
    path = first.save(tmp_path, 5)
    uninterrupted = first.steps(10)

    second = Training(seed=2)
    random.seed(99)
    np.random.seed(99)
    loaded = load_checkpoint(path, **second.parts)
    assert loaded.step == 5
    assert second.steps(10) == uninterrupted
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert second.model["out"].weight is second.model["embed"].weight
    assert second.scheduler.get_last_lr() == first.scheduler.get_last_lr()

    third = Training(seed=2)
    load_checkpoint(path, **(third.parts | {"optimizers": {}}))
    assert third.steps(10) != uninterrupted  # the comparison notices a missing optimiser


def test_state_tensors_and_config_come_back_exactly(tmp_path):
    state = {"third": 1 / 3, "tiny": 5e-324, "nan": float("nan"), "int": 2**60, "none": None, "list": [1, [2.5, "ä"]]}
    generator = torch.Generator().manual_seed(7)
    tensors = {
        "generator": generator.get_state(),
        "view": torch.arange(12.0).reshape(3, 4)[:, 1],
        "empty": torch.ones(0),
    }
    path = save_checkpoint(tmp_path, 3, **NOTHING, state=state, tensors=tensors, config=RunConfig(), keep=1)
    loaded = load_checkpoint(path, **NOTHING)
    assert repr(loaded.state) == repr(state)
    assert loaded.tensors.keys() == tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensors[name]) for name in tensors)
    assert loaded.config == as_plain(RunConfig())
    assert loaded.config["kl"]["coef"] == 0.1


def test_the_random_state_of_the_device_comes_back(tmp_path: Path, device: torch.device) -> None:
    training = Training(seed=1)
    saved = training.save(tmp_path, 1)
    drawn = torch.rand(5, device=device)
    assert not torch.equal(torch.rand(5, device=device), drawn)
    load_checkpoint(saved, **training.parts)
    assert torch.equal(torch.rand(5, device=device), drawn)


def test_a_run_on_the_cpu_leaves_a_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda: pytest.fail("a GPU was asked"))
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda state: pytest.fail("a GPU was asked"))
    training = Training(seed=1)
    load_checkpoint(training.save(tmp_path, 1), **training.parts)


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    training = Training(seed=1)
    training.steps(1)
    files = sorted(path.name for path in training.save(tmp_path, 1).iterdir())
    assert {Path(name).suffix for name in files} == {".json", ".safetensors", ".yaml"}
    assert files == [
        "checkpoint.json",
        "config.yaml",
        "model-model.safetensors",
        "optimizer-adamw.json",
        "optimizer-adamw.safetensors",
        "rng-00000.json",
        "rng-00000.safetensors",
        "scheduler-cosine.json",
        "scheduler-cosine.safetensors",
        "tensors.json",
        "tensors.safetensors",
    ]


def test_older_checkpoints_go_once_the_new_one_is_complete(tmp_path, monkeypatch):
    training = Training(seed=1)
    for step in (1, 2, 3):
        training.save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "take_place", fail_with(errno.ENOSPC))
        with pytest.raises(CheckpointError):
            training.save(tmp_path, 4, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_a_new_checkpoint_outlives_damaged_ones_of_later_steps(tmp_path):
    """A run that passed over them goes on from before, and its next checkpoint is the only one that can be read."""
    training = Training(seed=1)
    for step in (100, 200):
        (training.save(tmp_path, step, keep=9) / "model-model.safetensors").unlink()
    saved = training.save(tmp_path, 25, keep=1)
    assert latest_checkpoint(tmp_path) == saved
    training.save(tmp_path, 50, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000050", "step-000100", "step-000200"]


def test_the_newest_step_is_the_latest_whatever_the_names_sort_like(tmp_path):
    training = Training(seed=1)
    for step in (999_999, 1_000_000):
        training.save(tmp_path, step)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-1000000"
    assert latest_checkpoint(tmp_path / "absent") is None


def test_incomplete_checkpoints_are_passed_over(tmp_path, caplog):
    training = Training(seed=1)
    good = training.save(tmp_path, 1, keep=9)
    (training.save(tmp_path, 2, keep=9) / "model-model.safetensors").unlink()
    cut = training.save(tmp_path, 3, keep=9) / "tensors.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    (training.save(tmp_path, 4, keep=9) / "checkpoint.json").unlink()
    (tmp_path / "step-000005").mkdir()
    assert latest_checkpoint(tmp_path) == good
    assert "model-model.safetensors is missing" in caplog.text
    assert "tensors.safetensors has" in caplog.text


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("model-model.safetensors", lambda data: b"\xff" * len(data), r"model-model.safetensors cannot be read"),
        ("optimizer-adamw.json", lambda data: b"{" * len(data), r"optimizer-adamw.json cannot be read"),
        ("rng-00000.safetensors", lambda data: b"\x00" * len(data), r"rng-00000.safetensors cannot be read"),
        ("config.yaml", lambda data: b"\t" * len(data), r"config.yaml cannot be read"),
        ("checkpoint.json", lambda data: data[: len(data) // 2], r"checkpoint.json cannot be read"),
        ("tensors.json", None, r"incomplete: tensors.json is missing; delete it to resume from an earlier one"),
        ("checkpoint.json", None, r"checkpoint.json is missing: is .* a checkpoint of tlcr\?"),
    ],
)
def test_damage_is_one_line_that_names_the_file(tmp_path, file, damage, says):
    training = Training(seed=1)
    training.steps(1)
    path = training.save(tmp_path, 1)
    if damage is None:
        (path / file).unlink()
    else:
        (path / file).write_bytes(damage((path / file).read_bytes()))
    with pytest.raises(CheckpointError, match=says) as caught:
        load_checkpoint(path, **training.parts)
    assert "\n" not in str(caught.value)


def rewrite(path: Path, **changes: object) -> None:
    """Changes entries of a manifest as tlcr would have written them; None takes an entry out."""
    manifest = json.loads((path / "checkpoint.json").read_text()) | changes
    del manifest["checksum"]
    manifest = {name: value for name, value in manifest.items() if value is not None}
    (path / "checkpoint.json").write_text(json.dumps(manifest | {"checksum": checksums.of_record(manifest)}))


def test_a_bit_that_changed_on_the_disk_is_noticed_in_every_file(tmp_path: Path) -> None:
    """The middle bit of each file, which keeps its size, and mostly what safetensors and JSON check."""
    training = Training(seed=1)
    training.steps(1)
    path = training.save(tmp_path, 1, state={"seen": 12345})
    for file in path.iterdir():
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
        with pytest.raises(CheckpointError, match=rf"{file.name} cannot be read into this run"):
            load_checkpoint(path, **training.parts)
        file.write_bytes(data)
    load_checkpoint(path, **training.parts)
    text = (path / "checkpoint.json").read_text()
    (path / "checkpoint.json").write_text(text.replace("12345", "12344"))
    with pytest.raises(CheckpointError, match=r"checkpoint.json cannot be read .*: its checksum is another"):
        load_checkpoint(path, **training.parts)


@pytest.mark.parametrize("name", ["format", "step", "processes", "versions", "files", "state"])
@pytest.mark.parametrize("value", [None, "x"])
def test_a_manifest_without_what_every_one_has_is_passed_over(
    name: str, value: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(seed=1)
    good = training.save(tmp_path, 1, keep=9)
    rewrite(training.save(tmp_path, 2, keep=9), **{name: value})
    assert latest_checkpoint(tmp_path) == good
    assert f"it has no {name}, or one that is no " in caplog.text


def test_a_state_with_numbers_as_keys_is_not_taken_for_damaged(tmp_path: Path) -> None:
    training = Training(seed=1)
    path = training.save(tmp_path, 1, state={"seen": {10: 1, 9: 2}, "pair": (1, 2)})
    assert load_checkpoint(path, **training.parts).state == {"seen": {"10": 1, "9": 2}, "pair": [1, 2]}


def test_checkpoints_of_versions_without_checksums_are_read(tmp_path: Path) -> None:
    training = Training(seed=1)
    path = training.save(tmp_path, 3)
    manifest = json.loads((path / "checkpoint.json").read_text())
    del manifest["checksum"], manifest["checksums"]
    (path / "checkpoint.json").write_text(json.dumps(manifest))
    assert load_checkpoint(path, **training.parts).step == 3


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = Training(seed=1).save(tmp_path, 1)
    other = nn.ModuleDict({"embed": nn.Embedding(12, 6)})
    with pytest.raises(CheckpointError, match="belongs to another model or config"):
        load_checkpoint(path, models={"model": other}, optimizers={}, schedulers={})


def test_another_number_of_processes_is_refused(tmp_path):
    path = Training(seed=1).save(tmp_path, 1)
    rewrite(path, processes=2)
    with pytest.raises(CheckpointError, match="written by 2 processes and is read by 1: start as many"):
        load_checkpoint(path, **NOTHING)


def test_a_checkpoint_without_the_identity_asked_for_is_refused(tmp_path):
    path = Training(seed=1).save(tmp_path, 1, state={"identity": {"settings": {"a": 1}, "seed": 2}})
    load_checkpoint(path, **NOTHING, identity={"settings": {"a": 1}, "seed": 2})
    with pytest.raises(
        CheckpointError, match=r"run with other seed \(seed was 2 and is 3\): restore them, name another"
    ):
        load_checkpoint(path, **NOTHING, identity={"settings": {"a": 1}, "seed": 3})
    foreign = Training(seed=1).save(tmp_path, 2)
    # earlier versions did not record what a run stands on
    load_checkpoint(path, **NOTHING, identity={"settings": {"a": 1}, "seed": 2, "origin": {"policy": "p"}})
    with pytest.raises(CheckpointError, match=r"checkpoint.json cannot be read into this run \(KeyError: 'identity'\)"):
        load_checkpoint(foreign, **NOTHING, identity={"settings": {"a": 1}, "seed": 2})


def test_builds_of_one_version_are_told_apart(monkeypatch):
    """The local label, cpu or cu130, which the metadata of an installed torch may lack."""
    monkeypatch.setattr("torch.__version__", "2.13.0+cu130")
    assert versions()["torch"] == "2.13.0+cu130"


def test_other_versions_are_reported(tmp_path, caplog):
    path = Training(seed=1).save(tmp_path, 1)
    load_checkpoint(path, **NOTHING)
    assert caplog.text == ""
    rewrite(path, versions=versions() | {"torch": "1.0"})
    load_checkpoint(path, **NOTHING)
    assert f"torch 1.0 -> {torch.__version__}" in caplog.text


def test_starting_over_an_unfinished_run_must_be_said(tmp_path):
    assert start_or_resume(tmp_path, resume=False) is None
    assert start_or_resume(tmp_path, resume=True) is None
    path = Training(seed=1).save(tmp_path, 1)
    assert start_or_resume(tmp_path, resume=True) == path
    with pytest.raises(CheckpointError, match="pass --resume to continue it"):
        start_or_resume(tmp_path, resume=False)


def test_state_that_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="cannot store a Linear"):
        Training(seed=1).save(tmp_path, 1, tensors={"oops": nn.Linear(1, 1)})
    assert list(tmp_path.iterdir()) == []


# ---- a full disk


def fail_with(number: int):
    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("limit", [0, 300, 1500, 3000])
def test_no_room_left_keeps_the_previous_checkpoint_and_leaves_nothing(tmp_path, limit):
    training = Training(seed=1)
    before = training.save(tmp_path, 1)
    training.steps(3)
    with (
        files_limited_to(limit),
        pytest.raises(CheckpointError, match=r"cannot write .*step-000002: .*free some space") as caught,
    ):
        training.save(tmp_path, 2)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [before]
    load_checkpoint(before, **Training(seed=2).parts)
    training.save(tmp_path, 2)  # and once there is room, it goes on


def test_a_full_disk_found_at_the_sync_is_the_same_error(tmp_path, monkeypatch):
    training = Training(seed=1)
    before = training.save(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))
    with pytest.raises(CheckpointError, match=r"No space left on device; .*free some space"):
        training.save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [before]


# ---- killed while saving

KILLED = """
import itertools, os, resource, signal, sys
import torch
from pathlib import Path
from torch import nn
from tlcr.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

torch.set_num_threads(1)
folder = Path(sys.argv[1])
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}

def save(step):
    model = nn.Linear(300, 300)
    nn.init.constant_(model.weight, step)
    save_checkpoint(folder, step, models={"model": model}, optimizers={}, schedulers={}, state={"step": step},
                    tensors={"copy": torch.full((50_000,), float(step))}, config={}, keep=1)

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
    child = os.fork()
    if child == 0:
        before()
        save(step)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
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
    assert (model.weight == loaded.step).all() and (loaded.tensors["copy"] == loaded.step).all()
    return loaded.step

save(1)
before_changes = []
while not before_changes or before_changes[-1][1]:
    number = len(before_changes)
    before_changes.append(is_saved(lambda: die_before_change(number)))
within_files = [is_saved(lambda: die_within_a_file(size)) for size in (1, 500, 100_000, 300_000)]
print([saved for saved, killed in before_changes if killed], within_files)
"""


@pytest.mark.slow
def test_killed_at_any_point_of_a_save_the_previous_checkpoint_still_loads(tmp_path):
    """Before each change of the disk, one after the other, and amid the writing of a file, small or large."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    saved, within_files = ast.literal_eval(f"[{done.stdout.replace('] [', '], [')}]")
    # A save is complete at one of its changes, and stays so: what comes behind deletes the older checkpoint.
    assert saved == sorted(saved) and saved.count(False) > 15 and saved.count(True) > 3
    assert within_files == [(False, True)] * 4


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/hostname", "a/../../b"])
def test_a_manifest_that_leaves_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "step-000001").mkdir()
    manifest = {"format": 1, "step": 1, "processes": 1, "versions": {}, "files": {name: 1}, "state": {}}
    (tmp_path / "step-000001" / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=re.escape(f"it names '{name}', which is not in its folder")):
        load_checkpoint(tmp_path / "step-000001", models={}, optimizers={}, schedulers={})


def test_the_rows_of_metrics_are_on_the_disk_before_a_checkpoint_is(tmp_path: Path, monkeypatch) -> None:
    """A checkpoint that outlives a power cut must not stand beside a log that lacks its steps."""
    done = []
    monkeypatch.setattr(checkpoint, "sync_to_disk", lambda path: done.append(path.name))
    monkeypatch.setattr(metrics, "sync_to_disk", lambda path: done.append(path.name))
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, {"loss": 1.0})
    loop = SimpleNamespace(
        _background=SimpleNamespace(wait=lambda: None),
        _take_completed=lambda path: None,
        log=log,
        _contents=lambda: None,
    )
    monkeypatch.setattr(loop_module, "write_checkpoint", lambda folder, what, keep: done.append("checkpoint"))
    TrainingLoop.save_to(loop, tmp_path, keep=1)
    assert done == ["metrics.jsonl", "checkpoint"]
