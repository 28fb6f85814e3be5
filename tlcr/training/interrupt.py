"""Handles Ctrl-C, SIGTERM and a closed terminal between steps, never within one, so that a complete step is saved."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType

from tlcr.training.distributed import any_process

_stops = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def leave_the_terminal_to_the_parent() -> None:
    """For a process whose parent ends it by SIGTERM: it ignores Ctrl-C and the end of the terminal from now on.

    A terminal sends these to all its processes. Then the parent's SIGTERM would be the second signal, which ends this
    process before its state is saved.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
        _stops.discard(number)


class StopSignals:
    """``with StopSignals() as signals``: the first Ctrl-C, SIGTERM or end of the terminal is recorded, the second has
    its usual effect.

    The end of the terminal (SIGHUP) that is ignored, as under ``nohup``, stays so. The loop calls
    ``signals.received()`` between steps, saves, and raises ``signals.stopped(...)``. Outside the main thread, where
    python allows no handlers, signals keep their usual effect.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _stops:
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

    def received(self) -> bool:
        """Whether any process was told to stop. Every process must call it."""
        return any_process(self._received)

    @staticmethod
    def stopped(step: int, checkpoint: Path) -> KeyboardInterrupt:
        """The exception to raise once the state is saved."""
        return KeyboardInterrupt(
            f"stopped after step {step}; the state is saved in {checkpoint}: run the same command with --resume"
        )
