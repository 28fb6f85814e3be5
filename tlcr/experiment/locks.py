"""Who works in a folder: one process, or those of one launcher."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from tlcr.config.stages import HOLDER, LOCK
from tlcr.errors import ConfigError
from tlcr.files import unwritable
from tlcr.training.distributed import on_main_process


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Keeps every other run of all stages out of a folder: two would train there and mix their files.

    A run that is killed leaves no lock. Raises ConfigError, with who it is, where another run is at work.
    """
    with sole_work(folder, f"output_dir {str(folder)!r}"):
        yield


@contextmanager
def sole_work(folder: Path, called: str) -> Iterator[None]:
    """Keeps every other process out of the folder of a run or of a stage, but for those of the same launcher.

    Args:
        folder: where the work is done; it is made.
        called: what errors call the folder.

    Raises:
        ConfigError: another process works there; its message says which.
        CheckpointError: the folder cannot be written.
    """
    lock, holder = FileLock(folder / LOCK, timeout=0), folder / HOLDER

    def take() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            holder.write_text(_this_process(), encoding="utf-8")
        except Timeout as error:
            raise ConfigError(
                f"another run is at work in {called}{_who(holder)}; wait for it, end it, or name another output_dir"
            ) from error
        except (OSError, NotImplementedError) as error:
            raise unwritable(folder / LOCK, error) from error

    on_main_process(take)
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                holder.unlink(missing_ok=True)
        lock.release()


def _this_process() -> str:
    since = datetime.now().isoformat(sep=" ", timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}"


def _who(holder: Path) -> str:
    try:
        return f" ({holder.read_text(encoding='utf-8')})"
    except (OSError, ValueError):  # it has just begun, or just ended
        return ""
