"""The result files of the benchmarks as typed rows: read, checked, grouped by what was measured."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1
KINDS = ("ops", "ppo_step")
PASSES = ("forward", "backward", "both")
MAIN_CLOCKS = ("processor", "device")
"""The clocks whose times are shown; other programs and the host disturb them least. Else a file's first clock."""
LEAST_SIZES = 3
"""The least number of sizes along an axis for a statement about growth."""
AXES = {"B": "rows", "T": "tokens of a row", "N": "scored tokens", "V": "vocabulary", "H": "hidden width"}
"""The axes of a shape, in the order in which they are shown."""


class Timing(NamedTuple):
    """Seconds over the rounds of one clock."""

    median: float
    lower: float
    upper: float


class Work(NamedTuple):
    """What is computed, whatever the size and whoever computes it."""

    op: str
    case: str
    direction: str
    """One of PASSES."""
    dtype: str

    @property
    def label(self) -> str:
        """The work in words; float32 is not named."""
        dtype = "" if self.dtype == "float32" else self.dtype
        return ", ".join(part for part in (self.op, self.case, self.direction, dtype) if part)


@dataclass(frozen=True)
class Row:
    """One implementation at one size."""

    work: Work
    shape: Mapping[str, int]
    implementation: str
    reason: str
    """Why it did not run; empty where it did."""
    seconds: Mapping[str, Timing]
    peak_bytes: int | None
    bytes_moved: int | None
    bytes_formula: str
    bandwidth_share: float | None
    flops: int | None
    """Operations of the matrix products that every implementation needs; None if there are none."""

    @property
    def measured(self) -> bool:
        return bool(self.seconds)

    @property
    def ours(self) -> bool:
        return self.implementation.split()[0] == "tlcr"

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.shape.values())

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Row:
        axes = {axis: row["shape"][axis] for axis in sorted(row["shape"], key=_place)}
        timings = {
            clock: Timing(found["median"], found["lower"], found["upper"])
            for clock, found in (row["seconds"] or {}).items()
        }
        if bool(timings) != (row["status"] == "measured"):
            raise ValueError(f"a row of {row['op']} by {row['implementation']} is {row['status']!r} with {timings}")
        return cls(
            Work(row["op"], row["case"], row["pass"], row["dtype"]),
            axes,
            row["implementation"],
            row["reason"],
            timings,
            row["peak_bytes"],
            row["bytes_moved"],
            row["bytes_formula"],
            row["bandwidth_share"],
            row.get("flops"),
        )


@dataclass(frozen=True)
class ResultFile:
    """One run of a benchmark: where, with what, and what came out."""

    name: str
    kind: str
    command: str
    """As it was recorded."""
    machine: Mapping[str, Any]
    versions: Mapping[str, str | None]
    build: Mapping[str, Any]
    commit: str
    date: str
    clocks: Mapping[str, str]
    """Maps the name of a clock to what it measures."""
    copy_bandwidth: Sequence[tuple[int, float]]
    """Bytes of a copy and the bytes that were moved in a second, by size."""
    rows: Sequence[Row] = field(default=(), repr=False)
    """The rows of an "ops" file."""
    sides: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    """The sides of a "ppo_step" file."""

    @property
    def on_gpu(self) -> bool:
        return bool(self.machine["device"] == "cuda")

    @property
    def clock(self) -> str:
        """The one that figures are shown in."""
        return next((clock for clock in MAIN_CLOCKS if clock in self.clocks), next(iter(self.clocks)))

    @property
    def command_today(self) -> str:
        """The recorded command line as this checkout runs it: before benchmarks/ was a package it held scripts."""
        return re.sub(r"^python benchmarks/(\w+)\.py(?!\S)", r"python -m benchmarks.\1", self.command)

    @property
    def where(self) -> str:
        """The device in a few words, for headings."""
        return f"{'GPU' if self.on_gpu else 'CPU'}: {self.machine['name']}"


def read_results(folder: Path) -> list[ResultFile]:
    """Every result file of a folder, CPU before GPU, by what they hold and not by their names.

    Raises SystemExit, with the file's name, for one that is no result file of this schema.
    """
    files = [_read(path) for path in sorted(folder.glob("*.json"))]
    return sorted(files, key=lambda file: (file.kind, file.on_gpu, file.name))


def _read(path: Path) -> ResultFile:
    remedy = f"measure it again with the benchmark that writes it, or take it out of {path.parent.name}/"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path} is no JSON ({error}); {remedy}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or found.get("kind") not in KINDS:
        said = {key: found.get(key) for key in ("schema", "kind")} if isinstance(found, dict) else type(found).__name__
        raise SystemExit(f"{path} says {said}, wanted schema {SCHEMA} and a kind of {', '.join(KINDS)}; {remedy}")
    if found.get("interpreted"):
        raise SystemExit(f"{path} was measured under Triton's interpreter, which says nothing of speed; {remedy}")
    ops = found["kind"] == "ops"
    try:
        return ResultFile(
            path.name,
            found["kind"],
            found["command"],
            found["machine"],
            found["versions"],
            found["build"],
            found["commit"],
            found["date"],
            found.get("clocks", {}),
            sorted((point["bytes"], point["bytes_per_second"]) for point in found.get("copy_bandwidth") or ()),
            [Row.from_json(row) for row in found["rows"]] if ops else (),
            () if ops else found["rows"],
        )
    except (KeyError, ValueError) as error:
        raise SystemExit(f"{path}: {type(error).__name__}: {error}; {remedy}") from error


def _place(axis: str) -> int:
    return list(AXES).index(axis)


# ---- groups of rows


class Contest(NamedTuple):
    """All implementations of one work at one size."""

    work: Work
    shape: Mapping[str, int]
    rows: Sequence[Row]

    @property
    def ours(self) -> Row | None:
        """What tlcr runs there: its kernel where there is one, else its reference in plain torch."""
        own = [row for row in self.rows if row.ours and row.measured]
        return next((row for row in own if row.implementation != "tlcr reference"), own[0] if own else None)

    @property
    def rivals(self) -> list[Row]:
        return [row for row in self.rows if not row.ours and row.measured]

    def fastest_rival(self, clock: str) -> Row | None:
        return min(self.rivals, key=lambda row: row.seconds[clock].median, default=None)


def contests(rows: Iterable[Row]) -> list[Contest]:
    """One for each work and size, in the order of the file, sizes growing."""
    together: dict[Work, dict[tuple[int, ...], list[Row]]] = {}
    for row in rows:
        together.setdefault(row.work, {}).setdefault(row.size, []).append(row)
    return [
        Contest(work, found[0].shape, found)
        for work, sizes in together.items()
        for _, found in sorted(sizes.items(), key=lambda item: (math.prod(item[0]), item[0]))
    ]


def headlines(found: Sequence[Contest]) -> list[Contest]:
    """Of every work the largest size that the most rivals ran at: where some were left out, the others prove less.

    "both" only where forward and backward are not there one by one.
    """
    made = []
    for work, sizes in by_work(found):
        held = [contest for contest in sizes if contest.ours is not None]
        parts = {contest.work for contest in found if contest.work._replace(direction="both") == work} - {work}
        if held and not (work.direction == "both" and len(parts) == 2):
            most = max(len(contest.rivals) for contest in held)
            made.append([contest for contest in held if len(contest.rivals) == most][-1])
    return made


def by_work(found: Sequence[Contest]) -> Iterator[tuple[Work, list[Contest]]]:
    """The sizes of each work, growing; the last one is the largest."""
    for work, sizes in groupby(found, key=lambda contest: contest.work):
        yield work, list(sizes)


class Series(NamedTuple):
    """One implementation of one work along one axis, all others fixed."""

    work: Work
    implementation: str
    axis: str
    fixed: Mapping[str, int]
    rows: Sequence[Row]
    """At least LEAST_SIZES, growing along the axis."""

    @property
    def sizes(self) -> list[int]:
        return [row.shape[self.axis] for row in self.rows]

    def seconds(self, clock: str) -> list[float]:
        return [row.seconds[clock].median for row in self.rows]


def series_of(rows: Iterable[Row]) -> list[Series]:
    """Of every work, implementation and axis the longest series; of those of one length the largest."""
    found: dict[tuple[Work, str, str], dict[tuple[tuple[str, int], ...], list[Row]]] = {}
    for row in rows:
        if row.measured:
            for axis in row.shape:
                fixed = tuple((name, size) for name, size in row.shape.items() if name != axis)
                found.setdefault((row.work, row.implementation, axis), {}).setdefault(fixed, []).append(row)
    series = []
    for (work, implementation, axis), groups in found.items():
        fixed = max(groups, key=lambda key: (len(groups[key]), math.prod(size for _, size in key)))
        if len(groups[fixed]) >= LEAST_SIZES:
            grown = sorted(groups[fixed], key=lambda row: row.shape[axis])
            series.append(Series(work, implementation, axis, dict(fixed), grown))
    return series
