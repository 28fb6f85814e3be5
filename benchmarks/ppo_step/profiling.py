"""Where the time of a round goes: torch's profile of it, summed by the parts of a round and by operations.

A part is a range that the code has marked for the profiler; tlcr marks those of `tlcr.training.profiling`, and
`with_trl` marks TRL's. Time on a GPU counts for the part in which the host launched the kernel, whichever thread did:
the backward pass launches from a thread of its own, and a kernel runs later than its launch.
"""

from __future__ import annotations

import bisect
import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PREFIX = "tlcr: "
"""Begins the names of the ranges that are parts of a round, in tlcr and here."""
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
OUTSIDE = "(between the parts)"
LARGEST = 8
"""Operations that are listed for each part."""


@dataclass
class Part:
    """One part of a round, over all its calls; seconds and launches include those of the parts within it."""

    name: str
    calls: int = 0
    host: float = 0.0
    device: float = 0.0
    launches: int = 0
    operations: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds by name of what ran outside the parts within it: on the device where there is one, else on the host."""


class Profile:
    """Profiles what happens from `start` to `end`, and writes what it found to a folder.

    trace.json.gz: for https://ui.perfetto.dev; parts.json and parts.txt: the summary.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)

    def start(self) -> None:
        self._profile.start()

    def end(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / "trace.json"
        self._profile.export_chrome_trace(str(trace))
        text = trace.read_bytes()
        parts = parts_of(json.loads(text)["traceEvents"])
        (self._folder / "parts.json").write_text(json.dumps([vars(part) for part in parts], indent=1) + "\n")
        (self._folder / "parts.txt").write_text(table(parts))
        with gzip.open(self._folder / "trace.json.gz", "wb", compresslevel=1) as packed:
            packed.write(text)
        trace.unlink()


def parts_of(events: Iterable[Mapping[str, Any]]) -> list[Part]:
    """The parts of a round, from the events of a trace in Chrome's format (times in microseconds).

    Args:
        events: "traceEvents" of what torch's profiler exports.

    Returns:
        Each part once, in the order in which they began; last, if anything ran there, what lies between them.
    """
    ranges, launched, kernels, on_host = [], {}, [], []
    for event in events:
        kind = event.get("cat")
        if kind == "user_annotation" and event["name"].startswith(PREFIX):
            ranges.append((event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(PREFIX)))
        elif kind in LAUNCHES:
            launched[event["args"].get("correlation")] = event["ts"]
        elif kind in ON_DEVICE:
            kernels.append(event)
        elif kind == "cpu_op":
            on_host.append(event)
    parts: dict[str, Part] = {}
    for start, end, name in sorted(ranges, key=lambda item: (item[0], -item[1])):
        part = parts.setdefault(name, Part(name))
        part.calls += 1
        part.host += (end - start) / 1e6
    where = _Places(ranges)
    for kernel in kernels:
        # Without its launch (in a graph that was launched before the profile) a kernel counts when it ran.
        inside = where(launched.get(kernel["args"].get("correlation"), kernel["ts"]))
        for name in inside:
            part = parts.setdefault(name, Part(name))
            part.device += kernel["dur"] / 1e6
            part.launches += 1
        parts[inside[-1]].operations[kernel["name"]] += kernel["dur"] / 1e6
    if not kernels:
        for name, time, seconds in _own_seconds(on_host):
            innermost = where(time)[-1]
            parts.setdefault(innermost, Part(innermost)).operations[name] += seconds
    outside = parts.pop(OUTSIDE, None)
    return [*parts.values(), *([] if outside is None else [outside])]


class _Places:
    """The parts that a moment lies in, the innermost last."""

    def __init__(self, ranges: Sequence[tuple[float, float, str]]) -> None:
        edges = sorted(
            [(start, 1, -end, name) for start, end, name in ranges] + [(end, 0, 0, n) for _, end, n in ranges]
        )
        self._times: list[float] = []
        self._names: list[tuple[str, ...]] = []
        open_: list[str] = []
        for time, begins, _, name in edges:
            if begins:
                open_.append(name)
            else:
                open_.reverse()
                open_.remove(name)  # the innermost of that name
                open_.reverse()
            self._times.append(time)
            self._names.append(tuple(open_))

    def __call__(self, time: float) -> tuple[str, ...]:
        found = bisect.bisect_right(self._times, time) - 1
        return (self._names[found] if found >= 0 else ()) or (OUTSIDE,)


def _own_seconds(events: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, float, float]]:
    """Name, start and seconds of each operation without those of the operations that it called."""
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        threads[event["tid"]].append(event)
    for calls in threads.values():
        stack: list[tuple[Mapping[str, Any], list[float]]] = []
        for event in sorted(calls, key=lambda event: (event["ts"], -event["dur"])):
            while stack and stack[-1][0]["ts"] + stack[-1][0]["dur"] <= event["ts"]:
                yield _closed(*stack.pop())
            if stack:
                stack[-1][1].append(event["dur"])
            stack.append((event, []))
        for left in stack:
            yield _closed(*left)


def _closed(event: Mapping[str, Any], inner: Sequence[float]) -> tuple[str, float, float]:
    return event["name"], event["ts"], (event["dur"] - sum(inner)) / 1e6


def table(parts: Sequence[Part]) -> str:
    """The parts as a table, and the largest operations of each."""
    lines = [f"{'part':32s} {'calls':>6s} {'host s':>9s} {'device s':>9s} {'launches':>9s}"]
    lines += [
        f"{part.name:32s} {part.calls:6d} {part.host:9.4f} {part.device:9.4f} {part.launches:9d}" for part in parts
    ]
    for part in parts:
        largest = sorted(part.operations.items(), key=lambda item: -item[1])[:LARGEST]
        if largest:
            lines += ["", part.name]
            lines += [f"  {seconds:9.4f} s  {name[:100]}" for name, seconds in largest]
    return "\n".join(lines) + "\n"
