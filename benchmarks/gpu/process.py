"""Runs one step as a process with a time limit: what it printed, how it ended, how long it took."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple


class Status(str, Enum):
    PASSED = "passed"
    FAILED = "failed"
    CUT_OFF = "cut off"
    NOT_HERE = "not here"
    NOT_REACHED = "not reached"


class Ended(NamedTuple):
    status: Status
    seconds: float
    output: str
    """All that it printed, its errors too; also where it was cut off."""


def run(
    command: Sequence[str], *, limit: float, log: Path, cwd: Path, environment: Mapping[str, str] | None = None
) -> Ended:
    """Run `command` until it ends or `limit` seconds have passed, and end what it started with it.

    Args:
        command: the program with its arguments.
        limit: in seconds.
        log: the file that gets its output as it comes.
        cwd: the folder that it runs in.
        environment: variables beside those of this process.

    Returns:
        PASSED where it ended with 0, FAILED where it ended otherwise, CUT_OFF at the limit.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # what it starts is in a group of its own, which can be ended whole
        )
        try:
            status = Status.PASSED if process.wait(timeout=limit) == 0 else Status.FAILED
        except subprocess.TimeoutExpired:
            status = Status.CUT_OFF
        finally:
            _end(process)
    return Ended(status, time.monotonic() - begun, log.read_text(encoding="utf-8", errors="replace"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all that it started, which may have outlived it."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
