"""Commands of tlcr in forked children, which can be killed: what one said, and how it ended.

A child is forked from a process that has imported tlcr once, because an interpreter that starts takes longer than the
stages that are attacked. That process must not have trained anything: torch's autograd does not survive a fork.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tlcr.cli import main as command

command.build_parser = functools.cache(command.build_parser)  # type: ignore[attr-defined]
command.build_parser()

LONGEST = 600.0
"""Seconds after which a child counts as hanging."""


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: its exit code, or minus the number of the signal that ended it."""

    code: int
    said: str
    seconds: float

    @property
    def last_line(self) -> str:
        lines = self.said.strip().splitlines()
        return lines[-1] if lines else ""

    @property
    def done(self) -> bool:
        return self.code == 0

    @property
    def sentence(self) -> str | None:
        """The one line of an error or of an interruption; None where it ended otherwise, with a traceback say."""
        if "Traceback" in self.said:
            return None
        if self.code == 2 and self.last_line.startswith("tlcr: error: "):
            return self.last_line.removeprefix("tlcr: error: ")
        if self.code == 130 and self.last_line.startswith("tlcr: interrupted"):
            return self.last_line
        return None


class Child:
    """``main(arguments)`` in a forked process, in ``folder``. prepare: called in it before, to plant a fault."""

    def __init__(self, arguments: Sequence[str], folder: Path, prepare: Callable[[], object] = lambda: None) -> None:
        self._log = folder / f"said-{time.monotonic_ns()}.txt"
        self._began = time.monotonic()
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # python 3.12 warns of threads, which wait for nothing
            self.pid = os.fork()
        if self.pid == 0:
            self._be(arguments, folder, prepare)

    def _be(self, arguments: Sequence[str], folder: Path, prepare: Callable[[], object]) -> None:
        code = 70
        try:
            os.setsid()  # with the workers that it starts
            handle = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(handle, number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            logging.getLogger().handlers.clear()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.chdir(folder)
            prepare()
            code = command.main(list(arguments))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:  # noqa: BLE001 - whatever it is, it is said and ends this process
            with contextlib.suppress(BaseException):
                traceback.print_exc()
            code = 1
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def send(self, number: signal.Signals) -> None:
        """A signal to it, and SIGKILL to the workers that it started too."""
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)

    def ended(self) -> Ended:
        """Waits for its end; one that hangs is killed, and says so."""
        hangs = ""
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if not hangs and time.monotonic() - self._began > LONGEST:
                hangs = f"\nTraceback: it hung for {LONGEST:.0f} s"
                self.send(signal.SIGKILL)
            time.sleep(0.005)
        said = self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""
        self._log.unlink(missing_ok=True)
        return Ended(os.waitstatus_to_exitcode(status), said + hangs, time.monotonic() - self._began)


def finish(arguments: Sequence[str], folder: Path, prepare: Callable[[], object] = lambda: None) -> Ended:
    """A command, to its end."""
    return Child(arguments, folder, prepare).ended()


def serve_in_a_process(serve: Callable[[Callable[[str], None]], None]) -> tuple[int, str]:
    """Forks a process that serves for ever; returns its id and the address that it gives to the function's argument."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            serve(lambda address: os.write(write, address.encode() + b"\n"))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        return pid, pipe.readline().strip()
