"""Metrics as JSON lines, one object per step; a tracker gets them too."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tlcr.errors import CheckpointError
from tlcr.files import atomic_write, sync_to_disk, unwritable
from tlcr.text.files import parse_json
from tlcr.training.distributed import is_main_process, on_main_process

logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends one line per call to ``path``: {"step": 12, "time": seconds since 1970, "loss": 0.5, ...}.

    A number that is not finite becomes null, which every JSON reader knows, and is reported in the log once for each
    key. With an accelerator whose tracker is running (``open_accelerator``), it gets the same numbers.
    Only the main process writes; the others may call everything.
    """

    def __init__(self, path: str | Path, accelerator: Accelerator | None = None) -> None:
        self.path = Path(path)
        self._accelerator = accelerator
        self._reported: set[str] = set()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one row. Raises CheckpointError where the disk is full or the file cannot be written."""
        if self._accelerator is not None and self._accelerator.trackers:
            self._accelerator.log(dict(values), step=step)
        if not is_main_process():
            return
        row = {"step": step, "time": round(time.time(), 3)} | {key: self._finite(key, v) for key, v in values.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            raise unwritable(self.path, error) from error

    def sync(self) -> None:
        """Has the rows so far on the disk, before a checkpoint that counts on them: a machine that stops loses none."""

        def sync() -> None:
            if self.path.exists():
                try:
                    sync_to_disk(self.path)
                except OSError as error:
                    raise unwritable(self.path, error) from error

        on_main_process(sync)

    def rewind(self, step: int) -> None:
        """Drops the rows after ``step``, and a last line cut short: a resumed run writes them again. Atomic."""

        def rewrite() -> None:
            if self.path.exists():
                rows = [row for row in read_metrics(self.path) if row["step"] <= step]
                with atomic_write(self.path) as aside:
                    aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

        on_main_process(rewrite)

    def _finite(self, key: str, value: float) -> float | int | None:
        number = value if isinstance(value, int) else float(value)
        if math.isfinite(number):
            return number
        if key not in self._reported:
            self._reported.add(key)
            logger.warning("The metric %s is %s; it is written as null in %s", key, number, self.path)
        return None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, oldest first. A last line that a killed process or a machine cut short is left out.

    Args:
        path: the file.

    Returns:
        Its rows.

    Raises:
        CheckpointError: another line is no row.
    """
    path = Path(path)
    try:
        text = path.read_bytes().rstrip(b"\0").decode()  # a machine that stops may leave zeros at its end
        return [_row(line, number) for number, line in enumerate(text.split("\n")[:-1], start=1)]
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged: {error}; its figures are for readers alone, so put that line right, or delete it"
        ) from error


def _row(line: str, number: int) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"line {number} cannot be read ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(f"line {number} is no object with a step")
    return row
