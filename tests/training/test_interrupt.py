"""Ctrl-C and SIGTERM: remembered once, obeyed at once the second time."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from tlcr.training.interrupt import StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_remembered_and_the_second_acts(number):
    before = signal.getsignal(number)
    acted = []
    signal.signal(number, lambda *_: acted.append(number))
    try:
        with StopSignals() as signals:
            assert not signals.received()
            os.kill(os.getpid(), number)
            assert signals.received()
            assert acted == []
            os.kill(os.getpid(), number)
            assert acted == [number]
        with StopSignals():
            pass
        os.kill(os.getpid(), number)
        assert acted == [number, number]  # afterwards everything is as it was
    finally:
        signal.signal(number, before)


def test_a_closed_terminal_that_is_ignored_stays_ignored():
    """As under ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.received()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_message_says_how_to_go_on():
    error = StopSignals.stopped(7, Path("run/sft/checkpoints/step-000007"))
    assert isinstance(error, KeyboardInterrupt)
    assert str(error) == (
        "stopped after step 7; the state is saved in run/sft/checkpoints/step-000007: "
        "run the same command with --resume"
    )


def test_outside_the_main_thread_signals_keep_their_effect():
    handlers = []

    def work() -> None:
        with StopSignals() as signals:
            handlers.append((signal.getsignal(signal.SIGINT), signals.received()))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [(before, False)]
