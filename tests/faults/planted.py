"""Faults planted in tlcr itself, which the harness has to find: each leaves out what keeps a run from a loss."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from markupsafe import Markup

from tlcr import files
from tlcr.chat import endpoint
from tlcr.report import page
from tlcr.training import checkpoint, metrics


def rename_left_out() -> None:
    """Files are written in their place, and not aside."""

    def write_in_place(aside: Path, path: Path) -> None:
        if aside.is_dir():
            take_place(aside, path)
            return
        data = aside.read_bytes()
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            os.fsync(file.fileno())
            file.write(data[len(data) // 2 :])
        aside.unlink()

    take_place = files.take_place
    files.take_place = write_in_place


def flush_left_out() -> None:
    """Rows of metrics are kept until there are three."""
    waiting: list[str] = []

    def write(self: metrics.MetricsLog, step: int, values: Mapping[str, float]) -> None:
        waiting.append(json.dumps({"step": step, **values}) + "\n")
        if len(waiting) == 3:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(waiting)
            waiting.clear()

    metrics.MetricsLog.write = write  # type: ignore[method-assign]


def sync_left_out() -> None:
    """Files are renamed before the disk has them."""
    files.sync_to_disk = checkpoint.sync_to_disk = lambda path: None


def key_in_a_log() -> None:
    """What a server says is kept as it is."""
    endpoint.without_secrets = lambda text, *secrets: text  # type: ignore[attr-defined]


def field_not_escaped() -> None:
    """The report writes one text as it is: the processor's name."""
    machine = page._machine
    page._machine = lambda entry: Markup(machine(entry))


PLANTED: dict[str, Callable[[], None]] = {
    "rename": rename_left_out,
    "flush": flush_left_out,
    "sync": sync_left_out,
    "key": key_in_a_log,
    "escape": field_not_escaped,
}
