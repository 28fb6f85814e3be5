"""Callbacks: what a training loop reports to them, and how they can end it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol


class Callback(Protocol):
    """A base class: override the methods that you need. Every process calls its callbacks at the same points.

    If ``on_step`` or ``on_evaluate`` returns True on any process, training ends after this step: the model is saved, as
    at the regular end. PPO evaluates before the first step too, after which there is nothing to end: what
    ``on_evaluate`` returns then decides nothing. ``step`` counts the optimiser steps (PPO: the updates) done.
    """

    def on_step(self, step: int, metrics: Mapping[str, float]) -> bool | None:
        """After each step, with everything that metrics.jsonl gets."""
        return None

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> bool | None:
        """After each evaluation, with its figures alone."""
        return None

    def on_save(self, step: int, path: Path) -> None:
        """After a checkpoint is complete at ``path``."""
        return None

    def on_end(self, step: int, metrics: Mapping[str, float]) -> None:
        """After the last step, with its metrics. Not called where an error or Ctrl-C ended the loop."""
        return None


def asks_to_stop(answers: Iterable[bool | None]) -> bool:
    """Whether one of the callbacks returned True."""
    return any(answer is True for answer in answers)
