"""The tables of the benchmarks page: every number is computed from the rows of result files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from benchmarks.report.rows import AXES, Contest, ResultFile, Row, Series, Work, by_work, contests, headlines, series_of

BEYOND_NOISE = 1.1
"""A step grows faster than linearly where even its lower quartile, over the upper one at the smaller size, is this many
times the sizes' ratio. Ours: shared machines move single figures by as much."""
ROUNDING = 1e-6
"""Tolerance for the rounding error of a fitted exponent."""
CONFIDENCE = 0.95
SPACE = "\u00a0"
"""The space between a number and its unit, at which no line breaks."""
PHASES = ("rollout", "score", "reward", "update")


# ---- figures as text


def significant(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits and never an exponent."""
    value = float(f"{value:.{digits}g}")
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def _scaled(value: float, digits: int, units: Sequence[tuple[float, str]]) -> str:
    """In the largest unit of which `value` is at least one, as rounded."""
    for scale, unit in units[:-1]:
        if float(f"{value / scale:.{digits}g}") >= 1:
            return f"{significant(value / scale, digits)}{SPACE}{unit}"
    scale, unit = units[-1]
    return f"{significant(value / scale, digits)}{SPACE}{unit}"


def duration(seconds: float, digits: int = 3) -> str:
    return _scaled(seconds, digits, [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")])


def between(lower: float, upper: float) -> str:
    """Two durations, with the unit once where it is the same."""
    first, last = duration(lower), duration(upper)
    if first.partition(SPACE)[2] == last.partition(SPACE)[2]:
        first = first.partition(SPACE)[0]
    return SPACE.join((first, "to", last))


def binary(count: float | None, digits: int = 3) -> str:
    if count is None:
        return "–"  # noqa: RUF001
    return _scaled(count, digits, [(2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1, "B")])


def bandwidth(bytes_per_second: float) -> str:
    return f"{significant(bytes_per_second / 1e9)}{SPACE}GB/s"


def ratio(value: float) -> str:
    return f"{significant(value, 2 if value < 9.95 else 3)}×"  # noqa: RUF001


def percent(share: float | None) -> str:
    """Of shares below a hundredth one digit, else whole ones."""
    if share is None:
        return "–"  # noqa: RUF001
    return f"{significant(100 * share, 1)}%" if share < 0.01 else f"{100 * share:.0f}%"


def shape_text(shape: Mapping[str, int]) -> str:
    return SPACE.join(f"{axis}={size}" for axis, size in shape.items())


# ---- speed


class Speed(NamedTuple):
    """tlcr beside its rivals at the headline size of one work."""

    contest: Contest
    ours: Row
    rivals: Sequence[Row]
    """The fastest first."""
    ratio: float | None
    """The fastest rival's time over tlcr's."""
    ratios: tuple[float, float] | None
    """The smallest and the largest of these over all sizes, each with that size's fastest rival."""
    sizes: int
    """With a rival."""


def speeds(file: ResultFile) -> list[Speed]:
    found = contests(file.rows)
    by_size: dict[Work, list[float]] = {}
    for contest in found:
        if (value := lead(contest, file.clock)) is not None:
            by_size.setdefault(contest.work, []).append(value)
    made = []
    for contest in headlines(found):
        assert contest.ours is not None
        rivals = sorted(contest.rivals, key=lambda row: row.seconds[file.clock].median)
        ratios = by_size.get(contest.work, [])
        span = (min(ratios), max(ratios)) if ratios else None
        made.append(Speed(contest, contest.ours, rivals, lead(contest, file.clock), span, len(ratios)))
    return made


def lead(contest: Contest, clock: str) -> float | None:
    """The fastest rival's time over tlcr's: above 1, tlcr is the faster one."""
    ours, rival = contest.ours, contest.fastest_rival(clock)
    return None if ours is None or rival is None else rival.seconds[clock].median / ours.seconds[clock].median


def slower(file: ResultFile) -> list[tuple[Contest, Row, float]]:
    """Where a rival is faster than tlcr: the contest, that rival and how many times it is."""
    found = []
    for contest in contests(file.rows):
        value, rival = lead(contest, file.clock), contest.fastest_rival(file.clock)
        if value is not None and rival is not None and value < 1:
            found.append((contest, rival, 1 / value))
    return sorted(found, key=lambda item: -item[2])


def contested(file: ResultFile) -> int:
    """In how many contests tlcr met a rival."""
    return sum(lead(contest, file.clock) is not None for contest in contests(file.rows))


class Pivot(NamedTuple):
    """All sizes of one op: a line for each contest, a column for each implementation."""

    op: str
    implementations: Sequence[str]
    lines: Sequence[tuple[Contest, Sequence[Row | None]]]


def pivots(file: ResultFile) -> list[Pivot]:
    found = contests(file.rows)
    made = []
    for op in dict.fromkeys(contest.work.op for contest in found):
        own = [contest for contest in found if contest.work.op == op]
        names = dict.fromkeys(row.implementation for contest in own for row in contest.rows if row.measured)
        columns = sorted(names, key=lambda name: name.split()[0] != "tlcr")
        lines = []
        for contest in own:
            rows = {row.implementation: row for row in contest.rows if row.measured}
            lines.append((contest, [rows.get(name) for name in columns]))
        made.append(Pivot(op, columns, [line for line in lines if any(line[1])]))
    return [pivot for pivot in made if pivot.lines]


def not_run(file: ResultFile) -> list[tuple[str, str, str]]:
    """Implementation, why it did not run, and where: once for each reason, not for each size."""
    places: dict[tuple[str, str], dict[str, None]] = {}
    for row in file.rows:
        if not row.measured:
            places.setdefault((row.implementation, row.reason), {})[row.work.op] = None
    return [(name, reason, ", ".join(ops)) for (name, reason), ops in places.items()]


def clock_rows(file: ResultFile) -> list[Row]:
    """tlcr's row at the smallest and at the largest size of every work: where the clocks differ most and least."""
    found: list[Row] = []
    for _, sizes in by_work(contests(file.rows)):
        own = [row for contest in sizes if (row := contest.ours) is not None]
        found += own if len(own) < 3 else (own[0], own[-1])
    return found


# ---- memory


class Memory(NamedTuple):
    """Peak memory above the inputs at the headline size of one work."""

    contest: Contest
    ours: Row
    rivals: Sequence[Row]
    """Growing."""


def memories(file: ResultFile) -> list[Memory]:
    made = []
    for contest in headlines(contests(file.rows)):
        if contest.ours is not None and contest.ours.peak_bytes is not None:
            rivals = [row for row in contest.rivals if row.peak_bytes is not None]
            made.append(Memory(contest, contest.ours, sorted(rivals, key=lambda row: row.peak_bytes or 0)))
    return made


# ---- bandwidth


class Bandwidth(NamedTuple):
    """How much of the copy bandwidth one work reaches."""

    work: Work
    formula: str
    ours: Row
    """At the size that moves the most bytes."""
    bytes_per_second: float
    flops_per_second: float | None
    best: Row
    """The size with the largest share."""
    rival: Row | None
    """The fastest rival at the first of these sizes."""


def bandwidths(file: ResultFile) -> list[Bandwidth]:
    found = []
    for work, sizes in by_work(contests(file.rows)):
        own = [row for contest in sizes if (row := contest.ours) is not None and row.bandwidth_share is not None]
        if not own:
            continue
        largest = max(own, key=lambda row: row.bytes_moved or 0)
        best = max(own, key=lambda row: row.bandwidth_share or 0.0)
        contest = next(contest for contest in sizes if contest.ours is largest)
        rival = contest.fastest_rival(file.clock)
        flops = None if largest.flops is None else largest.flops / largest.seconds[file.clock].median
        speed = achieved(largest, file.clock)
        found.append(Bandwidth(work, largest.bytes_formula, largest, speed, flops, best, rival))
    return found


def achieved(row: Row, clock: str) -> float:
    """Bytes that have to be moved, per second."""
    assert row.bytes_moved is not None
    return row.bytes_moved / row.seconds[clock].median


# ---- growth


class Step(NamedTuple):
    """From one size of an axis to the next one measured."""

    smaller: Row
    larger: Row
    sizes: tuple[int, int]
    exponent: float
    """log of the times' ratio over log of the sizes' ratio."""
    faster: bool
    """Beyond linear and beyond the noise, see BEYOND_NOISE."""
    leaves_cache: bool
    """The smaller one's bytes fit into the last-level cache and the larger one's do not."""

    @property
    def doubling(self) -> float:
        """By what a doubling of the size multiplies the time."""
        return float(2.0**self.exponent)


class Growth(NamedTuple):
    """Time against size along one axis: seconds = a * size**exponent."""

    series: Series
    exponent: float
    interval: tuple[float, float]
    """Of CONFIDENCE."""
    steps: Sequence[Step]

    @property
    def last(self) -> Step:
        return self.steps[-1]

    @property
    def steepest(self) -> Step:
        return max(self.steps, key=lambda step: step.exponent)

    @property
    def faster_than_linear(self) -> bool:
        return any(step.faster for step in self.steps) or self.interval[0] > 1 + ROUNDING


def growths(file: ResultFile) -> list[Growth]:
    """Of every implementation, work and axis."""
    cache = file.machine["last_level_cache_bytes"]
    return [growth(series, file.clock, cache) for series in series_of(file.rows)]


def growth(series: Series, clock: str, cache: int | None) -> Growth:
    log_sizes, log_times = np.log(series.sizes), np.log(series.seconds(clock))
    fit = stats.linregress(log_sizes, log_times)
    half = float(fit.stderr * stats.t.ppf(0.5 + CONFIDENCE / 2, len(log_sizes) - 2))
    exponent = float(fit.slope)
    steps = [_step(a, b, series.axis, clock, cache) for a, b in pairwise(series.rows)]
    return Growth(series, exponent, (exponent - half, exponent + half), steps)


def _step(smaller: Row, larger: Row, axis: str, clock: str, cache: int | None) -> Step:
    sizes = smaller.shape[axis], larger.shape[axis]
    before, after = smaller.seconds[clock], larger.seconds[clock]
    fits = None if cache is None else [(row.bytes_moved or 0) <= cache for row in (smaller, larger)]
    return Step(
        smaller,
        larger,
        sizes,
        math.log(after.median / before.median) / math.log(sizes[1] / sizes[0]),
        after.lower / before.upper > BEYOND_NOISE * sizes[1] / sizes[0],
        fits == [True, False],
    )


def is_ours(file: ResultFile, series: Series) -> bool:
    """Whether it is what tlcr runs there, and not a rival, or a reference beside a kernel."""
    own = (contest.ours for contest in contests(file.rows) if contest.work == series.work)
    return series.implementation in {row.implementation for row in own if row is not None}


def axis_ranges(found: Sequence[Growth]) -> list[tuple[str, str, float, float, int]]:
    """Of each axis: name, meaning, the least and the most that a doubling multiplies the time by, number of series."""
    ranges = []
    for axis, meaning in AXES.items():
        doublings = [growth.last.doubling for growth in found if growth.series.axis == axis]
        if doublings:
            ranges.append((axis, meaning, min(doublings), max(doublings), len(doublings)))
    return ranges


# ---- the PPO step


class Side(NamedTuple):
    """One trainer's round."""

    name: str
    seconds: Mapping[str, float]
    total_range: tuple[float, float]
    rounds: int
    tokens_per_second: float
    peak_bytes: int | None
    speed: float | None
    """Its tokens per second over TRL's."""
    memory: float | None
    """Its peak memory over TRL's."""

    def share(self, phase: str) -> float:
        return self.seconds[phase] / self.seconds["total"]

    @property
    def longest_phase(self) -> str:
        return max(PHASES, key=self.share)


def sides(file: ResultFile) -> list[Side]:
    trl = next((side for side in file.sides if side["side"].startswith("TRL")), None)
    made = []
    for side in file.sides:
        speed = side["tokens_per_second"] / trl["tokens_per_second"] if trl and side is not trl else None
        known = trl and side is not trl and side["peak_bytes"] is not None and trl["peak_bytes"]
        made.append(
            Side(
                side["side"],
                side["seconds"],
                (side["total_range"][0], side["total_range"][1]),
                side["rounds"],
                side["tokens_per_second"],
                side["peak_bytes"],
                speed,
                side["peak_bytes"] / trl["peak_bytes"] if trl and known else None,
            )
        )
    return made


def task_title(task: Mapping[str, Any]) -> str:
    """The model and its precision."""
    return f"{task['model'] or 'embedded size'}, {task['dtype']}"


def task_text(task: Mapping[str, Any]) -> str:
    """The work in a line."""
    threads = f", {task['threads']} thread{'s' if task['threads'] != 1 else ''}" if "threads" in task else ""
    return (
        f"{task['batch']} answers of {task['prompt_tokens']} + {task['response_tokens']} tokens, "
        f"{task['epochs']} epochs, minibatch {task['minibatch']}, micro-batch {task['micro_batch']}{threads}"
    )
