"""How much room checkpoints take, and whether a disk has it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tlcr.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn


def in_words(count: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


PROBE = 64 * 2**20
"""Bytes that are written to learn how fast a disk is: some hundred milliseconds on a slow one."""


def write_seconds(folder: Path, count: int = PROBE) -> float:
    """Writes bytes into a nameless file on the disk of a folder, and has them synced, as a checkpoint is.

    Args:
        folder: it exists; nothing is left in it.
        count: bytes to write.

    Returns:
        Seconds that it took. Raises OSError where the folder cannot be written to or the disk is full.
    """
    block = os.urandom(2**20)  # a file system may write zeros in no time
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(count // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - began


def checkpoint_bytes(models: Mapping[str, nn.Module], trained: Iterable[Tensor]) -> int:
    """The bytes of a checkpoint's tensors over all processes: weights, and states of AdamW, also before its first step.

    Args:
        models: what is saved.
        trained: the parameters of the optimisers.

    Returns:
        The bytes; those of a shard's whole parameter count.
    """
    from tlcr.training.optim import state_bytes
    from tlcr.training.shards import weights_of

    saved = [tensor for model in models.values() for tensor in weights_of(model).values()]
    return sum(t.numel() * t.element_size() for t in saved) + sum(state_bytes(parameter) for parameter in trained)


def checkpoints_at_a_time(*, total_steps: int, save_every: int, keep: int) -> int:
    """The largest number of checkpoints on disk: those that are kept, and the one that is being written.

    Args:
        total_steps: of the training.
        save_every: steps between checkpoints; 0: none, but when the training is stopped.
        keep: checkpoints to keep.

    Returns:
        The number.
    """
    return min(total_steps // save_every if save_every else 0, keep) + 1


def require_room(folder: Path, *, one: int, number: int, where: str) -> str:
    """Looks whether checkpoints fit on the disk of ``folder``.

    Args:
        folder: where they will be; what is there of earlier ones will be deleted, and counts as free.
        one: bytes of a checkpoint.
        number: how many there are at a time.
        where: the training, for the message.

    Returns:
        A sentence for the log.

    Raises:
        CheckpointError: they do not fit.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    earlier = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    free = shutil.disk_usage(there).free + earlier
    fact = (
        f"{where}: a checkpoint takes {in_words(one)}, and up to {number} at a time {in_words(one * number)}, of "
        f"{in_words(free)} that are free for them"
    )
    if one * number > free:
        fewer = "keep fewer checkpoints, " if number > 1 else ""
        raise CheckpointError(f"{fact}: {fewer}free some space, or name an output_dir on a larger disk")
    return fact
