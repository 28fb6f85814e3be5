"""What a trainer's process has done so far, a line at a time: a process that is cut off has still told where its time
went.

Each line is a JSON object with "at", seconds of the system's clock, and "event":

    imported    the process has started and imported its libraries
    made        "what" was made, in "seconds"
    phase       "phase" of round "round" took "seconds"
    round       round "round" ended: "seconds" of each phase and of "total", "peak_bytes" so far
    end         all rounds are done; "versions" of the packages that count
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Journal:
    """The file that a trainer's process appends to; each line is in it when the call returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._round = 0

    def note(self, event: str, **facts: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": time.time(), "event": event, **facts}) + "\n")

    @contextmanager
    def making(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        _synchronize()
        self.note("made", what=what, seconds=time.perf_counter() - began)

    def phase(self, name: str, seconds: float) -> None:
        self.note("phase", phase=name, round=self._round, seconds=seconds)

    def round(self, seconds: Mapping[str, float]) -> None:
        self.note("round", round=self._round, seconds=dict(seconds), peak_bytes=_peak_bytes())
        self._round += 1


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that are complete; none where the process has not begun its journal."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def counted_rounds(events: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Seconds of each phase and of the whole, "total", of the rounds after the first, which warms up."""
    return [event["seconds"] for event in events if event["event"] == "round" and event["round"] > 0]


def _peak_bytes() -> int:
    """The GPU's memory that tensors took at most, or the process's memory where there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
