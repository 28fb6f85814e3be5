"""How one of several processes ends: the first that failed says why, those that lost it say nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import distributed as dist

from tlcr.cli import together
from tlcr.errors import AnotherProcessFailed, DataError

MESSAGE = "tlcr: error: no such file\n"


class Ended(Exception):
    """Instead of the end of this process."""


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was asked of the board that the processes share; a test that fills it plays the other process."""
    asked: list[str] = []

    def is_first(what: str) -> bool:
        asked.append(what)
        return asked.count(what) == 1

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr(together, "is_first", is_first)
    monkeypatch.setattr(together, "was_asked", lambda what: what in asked)
    monkeypatch.setattr(together, "SECONDS_TO_SPEAK", 0.0)
    monkeypatch.setattr(os, "_exit", end)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield asked
    for number, handler in handlers.items():
        signal.signal(number, handler)


def end_by(error: BaseException) -> None:
    with pytest.raises(Ended, match="2"):
        together.fail(2, error, MESSAGE)


def test_the_first_process_says_why_and_tells_the_launcher(
    said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    end_by(DataError("no such file"))
    assert capsys.readouterr().err == MESSAGE
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert told["message"] == told["extraInfo"]["py_callstack"] == MESSAGE.strip()
    assert int(told["extraInfo"]["timestamp"]) > 0


LOST = [
    AnotherProcessFailed("another process failed; its own message says why"),
    dist.DistBackendError("NCCL communicator was aborted"),
    RuntimeError("[gloo/transport/tcp/pair.cc:540] Connection closed by peer [127.0.0.1]:4242"),
]


@pytest.mark.parametrize("error", [DataError("no such file"), KeyboardInterrupt(), ValueError("x"), *LOST])
def test_the_others_say_nothing(error: BaseException, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said.append(together.THE_END)
    end_by(error)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", LOST)
def test_a_process_that_was_killed_cannot_speak_so_another_does(
    error: BaseException, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    end_by(error)
    assert capsys.readouterr().err == (
        "tlcr: error: another of the 3 processes ended without a word: it was killed, or its machine ran out of "
        "memory; what was saved is kept: start all again with --resume\n"
    )


def test_the_launchers_signal_does_not_cut_the_message_short(said: list[str]) -> None:
    end_by(DataError("no such file"))
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_the_launchers_signal_is_like_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(together, "join_processes", lambda: None)
    try:
        together.begin()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_command_that_did_its_work_ends_without_waiting_for_threads() -> None:
    """Threads of torch outlive the processes' group, and may crash while python ends; here one would never end."""
    script = (
        "import atexit, threading; from tlcr.cli import together; atexit.register(print, 'put away')\n"
        "threading.Thread(target=threading.Event().wait).start(); print('said', end=' '); together.end(3)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said put away\n", "")
