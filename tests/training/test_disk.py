"""The room that checkpoints take: what is foretold is what is written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tlcr.errors import CheckpointError
from tlcr.training.checkpoint import save_checkpoint
from tlcr.training.disk import checkpoint_bytes, checkpoints_at_a_time, require_room
from tlcr.training.optim import build_optimizer, parameter_groups


def tensor_bytes(file: Path) -> int:
    with safe_open(str(file), framework="pt") as source:
        tensors = [source.get_tensor(name) for name in list(source.keys())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.ndim > 0)  # the step has none


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bytes_are_those_of_the_files_before_the_first_step_and_after(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(11, 6), "out": nn.Linear(6, 11), "frozen": nn.Linear(5, 5)}).to(dtype)
    model["out"].weight = model["embed"].weight  # written once
    model["norm"] = nn.BatchNorm1d(7)  # in float32, with buffers
    model["frozen"].requires_grad_(False)
    optimizer = build_optimizer(parameter_groups(model, learning_rate=1e-2, weight_decay=0.1))
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = checkpoint_bytes({"model": model}, trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    path = save_checkpoint(
        tmp_path,
        1,
        models={"model": model},
        optimizers={"adamw": optimizer},
        schedulers={},
        state={},
        tensors={},
        config={},
        keep=1,
    )
    buffers_without_shape = model["norm"].num_batches_tracked.element_size()
    written = sum(tensor_bytes(path / f"{name}.safetensors") for name in ("model-model", "optimizer-adamw"))
    assert before == checkpoint_bytes({"model": model}, trained) == written + buffers_without_shape


@pytest.mark.parametrize(
    ("total_steps", "save_every", "keep", "number"),
    [(100, 10, 2, 3), (100, 60, 2, 2), (100, 0, 2, 1), (5, 10, 2, 1), (100, 10, 20, 11)],
)
def test_those_that_are_kept_and_the_one_being_written(
    total_steps: int, save_every: int, keep: int, number: int
) -> None:
    assert checkpoints_at_a_time(total_steps=total_steps, save_every=save_every, keep=keep) == number


def test_what_is_there_of_earlier_checkpoints_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "ppo" / "checkpoints"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**30 if path == tmp_path else None))
    assert require_room(folder, one=2**29, number=2, where="ppo") == (
        "ppo: a checkpoint takes 512 MiB, and up to 2 at a time 1.0 GiB, of 1.0 GiB that are free for them"
    )
    with pytest.raises(
        CheckpointError, match=r"takes 513 MiB.* 1\.0 GiB, of 1\.0 GiB .*: keep fewer checkpoints, free"
    ):
        require_room(folder, one=513 * 2**20, number=2, where="ppo")
    with pytest.raises(CheckpointError, match="for them: free some space, or name an output_dir on a larger disk"):
        require_room(folder, one=2**31, number=1, where="ppo")
    (folder / "step-000001").mkdir(parents=True)
    (folder / "step-000001" / "model.safetensors").write_bytes(b"0" * 2**22)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**30 - 2**22))
    require_room(folder, one=2**29, number=2, where="ppo")
