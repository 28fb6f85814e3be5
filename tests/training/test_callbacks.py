"""Callbacks: what they override, and how they end a loop."""

from __future__ import annotations

from pathlib import Path

from tlcr.training.callbacks import Callback, asks_to_stop


def test_a_callback_overrides_what_it_needs():
    class Watcher(Callback):
        def on_step(self, step, metrics):
            return metrics["loss"] < 1

    watcher = Watcher()
    assert watcher.on_evaluate(1, {}) is None
    watcher.on_save(1, Path("x"))
    watcher.on_end(1, {})
    assert asks_to_stop([None, watcher.on_step(1, {"loss": 0.5})])
    assert not asks_to_stop([None, False, watcher.on_step(1, {"loss": 2.0})])
