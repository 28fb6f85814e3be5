"""What two processes check of checkpoints of sharded models, together. Started by test_checkpoint_sharded."""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.launched import Checks
from tests.training.sharded import full, give_gradients, lm, whole
from tlcr.errors import CheckpointError
from tlcr.training import shards
from tlcr.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from tlcr.training.distributed import barrier, is_main_process, process_index
from tlcr.training.loop import TrainingLoop
from tlcr.training.optim import build_optimizer, build_scheduler, parameter_groups
from tlcr.training.sharding import local, shard
from tlcr.training.trees import copies

checks = Checks()
DTYPES = (torch.float32, torch.bfloat16)
IDENTITY = {"identity": {"seed": 1, "processes": None}}


class Network(nn.Module):
    """A model with tied weights, a float32 head of one row, of which the second process has none, and a buffer."""

    def __init__(self, dtype: torch.dtype, **changes: object) -> None:
        super().__init__()
        self.policy = lm(dtype, tie_word_embeddings=True, **changes)
        self.head = nn.Linear(32, 1)
        self.register_buffer("scale", torch.tensor([1.0, 2.0]))


class Training:
    """A network, sharded or whole, with an optimiser and a schedule; its gradients depend on the step alone."""

    def __init__(self, dtype: torch.dtype, *, sharded: bool, seed: int = 1, **changes: object) -> None:
        self.model = Network(dtype, **changes)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += seed / 7
        if sharded:
            shard(self.model, full())
        self.optimizer = build_optimizer(parameter_groups(self.model, learning_rate=1e-2, weight_decay=0.1))
        self.scheduler = build_scheduler(self.optimizer, schedule="cosine", total_steps=50, warmup_steps=3)
        self.number = 0

    def step(self) -> dict[str, float]:
        give_gradients(self.model, self.number)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.number += 1
        return {"number": float(self.number)}

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()
            self.scheduler.step()

    @property
    def parts(self) -> dict:
        return {
            "models": {"network": self.model},
            "optimizers": {"adamw": self.optimizer},
            "schedulers": {"cosine": self.scheduler},
        }

    def save(self, folder: Path, **changes: object) -> Path:
        rest: dict = {"state": IDENTITY | {"number": self.number}, "tensors": {}, "config": {}, "keep": 2, **changes}
        return save_checkpoint(folder, self.number, **self.parts, **rest)

    def load(self, path: Path) -> None:
        """Also from a run of another number of processes."""
        loaded = load_checkpoint(path, **self.parts, identity={"seed": 1, "processes": 7})
        self.number = loaded.state["number"]
        assert loaded.step == self.number

    def everything(self) -> dict[str, Tensor]:
        """Weights and states, whole, by name."""
        named = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        states = {
            f"{kind}.{name}": value
            for name, parameter in self.model.named_parameters()
            for kind, value in self.optimizer.state[parameter].items()
        }
        return {name: whole(value).clone() for name, value in {**named, **states, "scale": self.model.scale}.items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


def trained(dtype: torch.dtype, *, sharded: bool, steps: int) -> Training:
    training = Training(dtype, sharded=sharded)
    training.steps(steps)
    return training


def write_for_others(folder: Path, *, sharded: bool) -> None:
    """Checkpoints after 3 steps, and what the fourth makes of them, for another number of processes."""
    for dtype in DTYPES:
        training = trained(dtype, sharded=sharded, steps=3)
        training.save(folder / str(dtype))
        before = training.everything()
        training.steps(1)
        after = training.everything()
        if is_main_process():
            save_file(before, folder / f"{dtype}-before.safetensors")
            save_file(after, folder / f"{dtype}-after.safetensors")
    barrier()


def read_from_others(folder: Path, *, sharded: bool) -> None:
    for dtype in DTYPES:
        training = Training(dtype, sharded=sharded, seed=2)
        training.load(folder / str(dtype) / "step-000003")
        assert_same(training.everything(), load_file(folder / f"{dtype}-before.safetensors"))
        training.steps(1)
        assert_same(training.everything(), load_file(folder / f"{dtype}-after.safetensors"))


@contextmanager
def files_limited_on(process: int, size: int) -> Iterator[None]:
    """A real failure of the operating system, on one process only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if process_index() == process:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names_in(folder: Path) -> list[str]:
    barrier()
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    barrier()
    return names


# ---- files


@checks
def every_process_writes_its_part_and_no_file_is_a_pickle(folder: Path) -> None:
    for dtype in DTYPES:
        training = trained(dtype, sharded=True, steps=2)
        assert any(isinstance(x, DTensor) for x in training.optimizer.state_dict()["state"][0].values())
        path = training.save(folder / f"files-{dtype}")
        assert names_in(path) == [
            "checkpoint.json",
            "config.yaml",
            "optimizer-adamw.json",
            "optimizer-adamw.safetensors",
            "rng-00000.json",
            "rng-00000.safetensors",
            "rng-00001.json",
            "rng-00001.safetensors",
            "scheduler-cosine.json",
            "scheduler-cosine.safetensors",
            "shards/shard-00001-model-00001-of-00001.safetensors",
            "shards/shard-00002-model-00001-of-00001.safetensors",
            "tensors.json",
            "tensors.safetensors",
        ]
        manifest = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        assert (manifest["format"], manifest["layout"], manifest["processes"]) == (2, "sharded", 2)
        sizes = {name: (path / name).stat().st_size for name in manifest["files"]}
        assert manifest["files"] == sizes and len(sizes) == 13
        pieces = [load_file(path / name) for name in sorted(sizes) if name.startswith("shards/")]
        bytes_of = [sum(x.numel() * x.element_size() for x in piece.values()) for piece in pieces]
        assert 0.4 < bytes_of[0] / sum(bytes_of) < 0.6
        names = [set(piece) for piece in pieces]
        assert not any("lm_head" in name for name in names[0] | names[1])  # tied weights once
        assert torch.cat([piece["weights.network.head.weight"] for piece in pieces]).shape == (1, 32)
        assert {name.partition(".")[0] for name in names[0]} == (
            {"weights", "exp_avg", "exp_avg_sq"} | ({"remainder"} if dtype == torch.bfloat16 else set())
        )


@checks
def large_parts_are_several_files(folder: Path) -> None:
    training = trained(torch.bfloat16, sharded=True, steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BYTES_OF_A_FILE", 60_000)
        path = training.save(folder / "several")
    files = [name for name in names_in(path) if name.startswith("shards/")]
    assert len(files) > 4 and max((path / name).stat().st_size for name in files) < 100_000
    other = Training(torch.bfloat16, sharded=True, seed=2)
    other.load(path)
    assert_same(other.everything(), training.everything())


# ---- resuming


@checks
def as_many_processes_continue_bit_for_bit(folder: Path) -> None:
    for dtype in DTYPES:
        first = trained(dtype, sharded=True, steps=3)
        torch.manual_seed(process_index())
        path = first.save(folder / f"same-{dtype}")
        drawn = torch.rand(5)
        first.steps(3)
        torch.manual_seed(9)
        second = Training(dtype, sharded=True, seed=2)
        second.load(path)
        assert torch.equal(torch.rand(5), drawn)
        second.steps(3)
        assert_same(first.everything(), second.everything())
        assert second.scheduler.get_last_lr() == first.scheduler.get_last_lr()
        for parameter in second.model.parameters():
            for name, value in second.optimizer.state[parameter].items():
                assert isinstance(value, DTensor) == (name != "step"), name


@checks
def weights_that_are_gathered_are_saved_as_shards(folder: Path) -> None:
    """After a forward pass without a backward pass the root's parameters are whole, and other objects."""
    training = trained(torch.float32, sharded=True, steps=1)
    training.model.unshard()
    assert not any(isinstance(p, DTensor) for p in training.model.policy.model.embed_tokens.parameters())
    path = training.save(folder / "gathered")
    other = Training(torch.float32, sharded=True, seed=2)
    other.load(path)
    assert_same(other.everything(), training.everything())


@checks
def whole_models_read_shards_and_sharded_ones_whole_files(folder: Path) -> None:
    write_for_others(folder / "sharded", sharded=True)
    write_for_others(folder / "whole", sharded=False)
    read_from_others(folder / "sharded", sharded=False)
    read_from_others(folder / "whole", sharded=True)


@checks
def two_processes_read_what_one_wrote(folder: Path) -> None:
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tlcr.training.checkpoint")
    logger.addHandler(handler)
    read_from_others(folder / "of-one", sharded=True)
    logger.removeHandler(handler)
    assert len(log) == len(DTYPES)
    assert "was written by 1 processes and is read by 2: the run continues" in log[0]
    assert "does not repeat" in log[0] and "processes from 1 on begin with random states of their own" in log[0]


@checks
def for_one_process(folder: Path) -> None:
    write_for_others(folder / "of-two", sharded=True)


@checks
def what_does_not_fit_is_refused_on_every_process(folder: Path) -> None:
    path = trained(torch.float32, sharded=True, steps=1).save(folder / "unfit")
    whole_path = trained(torch.float32, sharded=False, steps=1).save(folder / "unfit-whole")
    for changes in ({"vocab_size": 67}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}):
        for of in (path, whole_path):
            other = Training(torch.float32, sharded=True, **changes)
            with pytest.raises(CheckpointError, match="cannot be read into this run") as caught:
                load_checkpoint(of, **other.parts)
            assert "\n" not in str(caught.value)
    stranger = trained(torch.float32, sharded=True, steps=1)
    with pytest.raises(CheckpointError, match="belong to none of the models network"):
        save_checkpoint(
            folder / "unfit",
            9,
            **(stranger.parts | {"models": {"network": stranger.model.policy}}),
            state={},
            tensors={},
            config={},
            keep=9,
        )


# ---- what goes wrong while saving


@checks
def a_full_disk_is_the_same_sentence_on_every_process(folder: Path) -> None:
    place = folder / "full"
    training = trained(torch.bfloat16, sharded=True, steps=1)
    before = training.save(place)
    training.steps(1)
    for process, size in ((0, 0), (1, 0), (0, 3000), (1, 50_000), (1, 100_000)):
        with files_limited_on(process, size), pytest.raises(CheckpointError) as caught:
            training.save(place)
        wanted = f"cannot write {place / 'step-000002'}: File too large; what was there before is untouched: free some"
        assert str(caught.value).startswith(wanted), caught.value
        barrier()
        assert list(place.iterdir()) == [before]
        barrier()
    Training(torch.bfloat16, sharded=True).load(before)
    training.save(place)


# ---- in the background


@checks
def a_copy_of_a_shard_is_a_shard_in_memory_of_its_own(_: Path) -> None:
    tensors = trained(torch.bfloat16, sharded=True, steps=1)
    flat = shards.tensors_of(tensors.parts["models"], [tensors.optimizer])
    for name, copy in copies(flat).items():
        assert type(copy) is type(flat[name]) and torch.equal(local(copy), local(flat[name])), name
        assert not isinstance(copy, DTensor) or copy.placements == flat[name].placements
        assert not local(copy).numel() or local(copy).data_ptr() != local(flat[name]).data_ptr()


def loop(training: Training, folder: Path, **changes: object) -> TrainingLoop:
    options: dict = {
        "total_steps": 7,
        "evaluate_every": 0,
        "save_every": 2,
        "keep_checkpoints": 9,
        "evaluate": None,
        "callbacks": (),
        "save_in_background": True,
        **changes,
    }
    return TrainingLoop(
        folder,
        accelerator=Accelerator(cpu=True),
        models={"network": training.model},
        optimizer=training.optimizer,
        scheduler=training.scheduler,
        identity={"seed": 1},
        config={},
        own_state=lambda: {"number": training.number},
        **options,
    )


def run(folder: Path, *, resume: bool = False, step: Callable | None = None, **changes: object) -> Training:
    training = Training(torch.bfloat16, sharded=True)
    training_loop = loop(training, folder, **changes)
    state = training_loop.start(resume=resume)
    if state is not None:
        training.number = state["number"]
    training_loop.run((lambda: step(training)) if step else training.step, label="sharded")
    return training


@checks
def a_run_that_saves_in_the_background_resumes_from_any_checkpoint(folder: Path) -> None:
    """It writes what it would write in the foreground, though training changes the tensors meanwhile."""
    ends = []
    for background in (False, True):
        place = folder / f"background-{background}"
        ends.append(run(place, save_in_background=background).everything())
        assert [path.name for path in sorted((place / "checkpoints").iterdir())] == [
            f"step-00000{step}" for step in (2, 4, 6)
        ]
    assert_same(*ends)
    barrier()
    for step in (2, 4, 6):
        kept = [folder / f"background-{b}" / "checkpoints" / f"step-00000{step}" / "shards" for b in (False, True)]
        for file in kept[0].iterdir():
            assert_same(load_file(kept[1] / file.name), load_file(file))
    place = folder / "background-True"
    assert_same(run(place, resume=True, total_steps=7).everything(), ends[0])


@checks
def a_write_that_failed_is_raised_at_a_later_step_on_every_process(folder: Path) -> None:
    place = folder / "background-failed"
    reached = []

    def step(training: Training) -> dict[str, float]:
        reached.append(training.number)
        return training.step()

    with files_limited_on(1, 50_000), pytest.raises(CheckpointError, match=r"step-000002: File too large.*free some"):
        run(place, step=step, total_steps=1000)
    assert 2 < len(reached) < 1000
    barrier()
    assert list((place / "checkpoints").iterdir()) == []


@checks
def an_error_of_one_process_leaves_the_checkpoint_that_was_begun(folder: Path) -> None:
    """The threads of all complete it, though the training of one does not go on."""
    place = folder / "background-error"

    def step(training: Training) -> dict[str, float]:
        if training.number == 4:
            raise ZeroDivisionError
        return training.step()

    with pytest.raises(ZeroDivisionError):
        run(place, step=step)
    latest = latest_checkpoint(place / "checkpoints")
    assert latest is not None and latest.name == "step-000004"
    ahead = run(place, resume=True)
    assert_same(ahead.everything(), run(folder / "background-straight").everything())


if __name__ == "__main__":
    checks.run(Path(sys.argv[1]))
