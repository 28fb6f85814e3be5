"""Shows the progress of a stage and the time left: a bar in a terminal, else a line from time to time."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tlcr.training.callbacks import Callback
from tlcr.training.distributed import is_main_process

SHOWN = 4
LINE_EVERY_S = 15.0


class Progress(Callback):
    """``with Progress("sft", total=500, done=120) as progress``, then ``progress.on_step(step, metrics)`` each step.

    label: the stage. total, done: steps of the whole run, and those that an earlier run has done. keys: the metrics to
    show; without, the first few. Writes to stderr, from the main process only; TLCR_PROGRESS=0 silences it.
    """

    def __init__(
        self, label: str, total: int, done: int = 0, *, keys: tuple[str, ...] = (), console: Console | None = None
    ) -> None:
        self._label, self._total, self._first, self._keys = label, total, done, keys
        self._console = console or Console(stderr=True)
        self._silent = not is_main_process() or os.environ.get("TLCR_PROGRESS") == "0"
        self._bar: Bar | None = None
        if not self._silent and self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}", markup=False),
                console=self._console,
                transient=False,
            )
            self._task = self._bar.add_task(label, total=total, completed=done, metrics="")
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            with suppress(OSError):  # of a terminal that is closed: what ends the training is to be said, and not this
                self._bar.stop()

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._silent:
            return
        shown = self._shown(metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=shown)
            return
        now = time.monotonic()
        if step == self._total or now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            elapsed = now - self._start
            left = elapsed / max(step - self._first, 1) * (self._total - step)
            line = f"{self._label}: {step}/{self._total}, {_clock(elapsed)} elapsed, {_clock(left)} left  {shown}"
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)

    def _shown(self, metrics: Mapping[str, float]) -> str:
        keys = [key for key in self._keys if key in metrics] or list(metrics)[:SHOWN]
        return "  ".join(f"{key} {metrics[key]:.4g}" for key in keys)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
