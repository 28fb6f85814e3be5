"""Files that are written whole or not at all: written aside, synced to disk, renamed.

Everything that tlcr writes for its user goes through `atomic_write`. A command that is killed, a full disk or a power
cut leave the old version or the new one.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tlcr.errors import CheckpointError

__all__ = [
    "atomic_write",
    "clean_up",
    "finite",
    "move_into",
    "remove",
    "sync_folder",
    "sync_to_disk",
    "take_place",
    "unwritable",
    "write_json",
    "write_json_lines",
]

logger = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a path beside ``path`` at which to write a file or a folder; at the end it replaces ``path``.

    The data is synced to disk before the rename, so ``path`` is always the old version or the new one. If the block
    fails, what it wrote is deleted and the old version stays.

    Args:
        path: what to write or replace.

    Yields:
        The path to write at.

    Raises:
        CheckpointError: the disk is full or the place cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(aside)
        yield aside
        sync_to_disk(aside)
        take_place(aside, path)
    except BaseException as error:
        with suppress(OSError):  # a disk that is gone or read-only lets nothing be deleted
            remove(aside)
        if isinstance(error, (OSError, SafetensorError)):
            raise unwritable(path, error) from error
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically. Floats keep every bit; NaN and infinity become null.

    Args:
        path: the file.
        value: what JSON can hold.

    Raises:
        CheckpointError: it cannot be written.
    """
    with atomic_write(path) as aside:
        aside.write_text(json.dumps(finite(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_json_lines(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes each record as a line of JSON, all of them or none; non-ASCII text is not escaped.

    Args:
        path: the file.
        records: what JSON can hold.

    Raises:
        CheckpointError: it cannot be written.
    """
    with atomic_write(path) as aside, aside.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def finite(value: Any) -> Any:
    """``value`` with None in place of every float that is not finite: not every JSON reader accepts NaN.

    Args:
        value: numbers, texts, and mappings and lists of them.

    Returns:
        The same, tuples as lists.
    """
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync_to_disk(path: Path) -> None:
    """Syncs a file, or a folder with everything in it, to disk.

    Args:
        path: the file or folder.

    Raises:
        OSError: the disk refuses.
    """
    if path.is_dir():
        for child in path.iterdir():
            sync_to_disk(child)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def take_place(aside: Path, path: Path) -> None:
    """Renames what was written aside over ``path``; a folder that a folder replaces is deleted after.

    Args:
        aside: a file or a folder, on the same disk.
        path: its place.

    Raises:
        OSError: it cannot be renamed, as a file over a folder or a link to one; what was there is there again.
    """
    if path.is_dir() and not aside.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.is_dir():  # a folder cannot be renamed over another
        old = path.with_name(f".old-{path.name}")
        remove(old)
        os.replace(path, old)
        try:
            os.replace(aside, path)
        except OSError:
            os.replace(old, path)
            raise
        sync_folder(path.parent)
        clean_up(old)
    else:
        os.replace(aside, path)
        sync_folder(path.parent)


def move_into(folder: Path, parts: Path, *, last: str) -> None:
    """Moves what was written aside into a folder that stays, part by part; ``parts`` is deleted after.

    Args:
        folder: the folder; what it has of the same names is replaced.
        parts: a folder on the same disk.
        last: the name of the part that says that the others are there.

    Raises:
        OSError: a part cannot be moved.
    """
    for part in sorted(parts.iterdir(), key=lambda part: (part.name == last, part.name)):
        take_place(part, folder / part.name)
    parts.rmdir()
    sync_folder(folder)


def clean_up(path: Path) -> None:
    """Deletes what nothing needs any more. That it cannot be deleted, as on a network file system where somebody has it
    open, costs room and nothing else: it is said in the log.

    Args:
        path: a file or a folder.
    """
    try:
        remove(path)
    except OSError as error:
        logger.warning("%s cannot be deleted (%s); nothing needs it: delete it when you can", path, error.strerror)


def sync_folder(folder: Path) -> None:
    """Syncs a folder's list of names to disk, without its files.

    Args:
        folder: the folder.

    Raises:
        OSError: the disk refuses.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Deletes a file, or a folder with everything in it; nothing where there is none.

    Args:
        path: the file or folder.

    Raises:
        OSError: it cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def unwritable(path: Path, error: Exception) -> CheckpointError:
    """The error to raise where writing ``path`` failed: the cause and the remedy.

    Args:
        path: what was to be written.
        error: what the operating system or safetensors said.

    Returns:
        The error, which is not raised here.
    """
    number = getattr(error, "errno", None)
    reason = os.strerror(number) if number is not None else " ".join(str(error).split())
    full = number in DISK_FULL or any(os.strerror(n) in str(error) for n in DISK_FULL)
    remedy = (
        "free some space or name another output_dir, then resume"
        if full
        else "name an output_dir that can be written, then resume"
    )
    return CheckpointError(f"cannot write {path}: {reason}; what was there before is untouched: {remedy}")
