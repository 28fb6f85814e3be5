"""How a command begins and ends in each of several processes that a launcher started: what it says, it says once."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

from torch import distributed as dist

from tlcr.errors import AnotherProcessFailed
from tlcr.training.distributed import is_first, join_processes, was_asked
from tlcr.training.launcher import launched_processes, launched_rank

__all__ = ["begin", "crash", "end", "fail"]

THE_END = "how the command ended"
SECONDS_TO_SPEAK = 5.0
"""How long a process that lost another one waits for that one's own message."""


def begin() -> None:
    """Joins the processes. From here on SIGTERM, by which a launcher ends all, is like Ctrl-C, and so the files that
    are being written are put right."""
    signal.signal(signal.SIGTERM, _interrupt)
    join_processes()


def end(code: int) -> NoReturn:
    """Ends this process after a command that did its work.

    Args:
        code: the exit code.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: DistributedDataParallel never lets go of the group, so gloo's threads are still there while python
    # ends. One that then releases a tensor needs python's lock, and the process dies with "terminate called without an
    # active exception".
    os._exit(code)


def fail(code: int, error: BaseException, message: str) -> NoReturn:
    """Ends this process. Of all that fail, the first one says why; those that fail because of it say nothing.

    Args:
        code: the exit code.
        error: what ended the command here.
        message: what the user is to read, complete lines.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the launcher sends one as soon as another process has ended
        signal.signal(number, signal.SIG_IGN)
    if _comes_from_another(error) and not _has_spoken():
        message = (
            f"tlcr: error: another of the {launched_processes()} processes ended without a word: it was killed, or its "
            "machine ran out of memory; what was saved is kept: start all again with --resume\n"
        )
    if is_first(THE_END):
        sys.stderr.write(message)
        _tell_launcher(message)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: the group of processes waits for the others when python ends, and they may wait for this one.
    os._exit(code)


def crash(error: Exception, how_to_go_on: str) -> NoReturn:
    """Ends this process after an exception that tlcr did not raise on purpose: its traceback, then one line."""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    line = f"tlcr: error: process {launched_rank()} of {launched_processes()} failed ({what}); {how_to_go_on}\n"
    fail(1, error, "".join(traceback.format_exception(error)) + line)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _comes_from_another(error: BaseException) -> bool:
    """Whether an error tells only that another process failed or ended."""
    lost = isinstance(error, RuntimeError) and ("gloo" in str(error) or "Connection closed by peer" in str(error))
    return lost or isinstance(error, (AnotherProcessFailed, dist.DistError))


def _has_spoken() -> bool:
    """Whether another process says how the command ended; waits for it."""
    until = time.monotonic() + SECONDS_TO_SPEAK
    while not (spoken := was_asked(THE_END)) and time.monotonic() < until:
        time.sleep(0.1)
    return spoken


def _tell_launcher(message: str) -> None:
    """Writes the file from which torch's launcher takes what it says of the process that failed first."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        line = message.strip().splitlines()[-1]
        said = {"py_callstack": line, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": said}}), "utf-8")
