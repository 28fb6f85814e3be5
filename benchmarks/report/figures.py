"""The plots of the benchmarks page: SVG files that set their own background and text colours for light and dark pages.

An image cannot use the colours of its page. So each file holds both colour schemes, and the reader's preference selects
one of them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.report.rows import AXES, PASSES, ResultFile, Series, Work, contests, series_of
from benchmarks.report.tables import (
    PHASES,
    SPACE,
    Memory,
    Side,
    Speed,
    achieved,
    binary,
    duration,
    shape_text,
    significant,
)
from tlcr.report.figures import ARM_COLOURS, ARM_MARKERS, INK, style, svg_file

WIDTH = 9.6
"""Width of every figure in inches, equal so that letters have the same size on the whole page."""
LETTERS = 110
"""Number of letters in a line of the legend."""
DIGEST = "data-digest"
"""The attribute that holds the digest of the data of a plot."""
COLUMNS = 2
"""Number of columns of the panels that show time against size."""
NOTHING_TAKEN = 2**10
"""Bytes at which the axis of memory begins. Smaller values are drawn there."""


def finish(figure: Figure, label: str, data: object) -> str:
    """The SVG file, with both schemes and the digest of the data it shows."""
    return svg_file(figure, label).replace("<svg ", f'<svg {DIGEST}="{digest(data)}" ', 1)


def digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


class Palette:
    """A colour and a marker for each name, the same in all plots of one result file."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(dict.fromkeys(names))

    def __getitem__(self, name: str) -> tuple[str, str]:
        index, turns = self.names.index(name), self.names.index(name) // len(ARM_COLOURS)
        # Past the last colour they begin again, with other markers.
        return ARM_COLOURS[index % len(ARM_COLOURS)], ARM_MARKERS[(index + 3 * turns) % len(ARM_MARKERS)]

    def line(self, name: str, **options: Any) -> Line2D:
        colour, marker = self[name]
        return Line2D([], [], color=colour, marker=marker, markersize=6, label=name, **options)


def implementations(file: ResultFile) -> Palette:
    """tlcr's first, which so has the first colour."""
    names = dict.fromkeys(row.implementation for row in file.rows if row.measured)
    return Palette(sorted(names, key=lambda name: name.split()[0] != "tlcr"))


def _row_labels(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, pad=8)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)


def _legend_above(figure: Figure, handles: Sequence[Artist]) -> None:
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), LETTERS // (longest + 6)))
    figure.legend(handles=list(handles), loc="outside upper left", ncols=columns, handletextpad=0.3)


def _labels(axes: Axes, which: str, formatter: Callable[[float], str]) -> None:
    """Figures with their units at the powers of ten, and where these are few between them too."""
    axis, (low, high) = (axes.xaxis, axes.get_xlim()) if which == "x" else (axes.yaxis, axes.get_ylim())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: formatter(value)))
    axis.set_minor_locator(NullLocator())


def _bytes(axes: Axes, formatter: Callable[[float], str]) -> None:
    """Along x, at every second or fifth power of two."""
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(base=2**5 if high > 2**12 * low else 2**2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formatter(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def _power(count: float) -> str:
    """A power of two of bytes, without decimals."""
    value, unit = binary(count).split(SPACE)
    return f"{float(value.replace(',', '')):g}{SPACE}{unit}"


# ---- speed and memory: a line for each work, a dot for each implementation


def speed_plot(file: ResultFile, speeds: Sequence[Speed], palette: Palette) -> str:
    """How many times tlcr's time each rival takes, at the headline size of every work."""
    clock = file.clock
    lines = [
        (
            speed.contest.work.label,
            {row.implementation: row.seconds[clock].median / speed.ours.seconds[clock].median for row in speed.rivals},
        )
        for speed in speeds
        if speed.rivals
    ]
    with style():
        figure, axes = _dots(lines, palette)
        axes.axvline(1, color=ARM_COLOURS[0], linewidth=2, zorder=1)
        axes.set_xscale("log")
        _labels(axes, "x", lambda value: f"{value:g}×")  # noqa: RUF001
        axes.set_xlabel("time over tlcr's (right of the line tlcr is faster)")
        named = {name for _, dots in lines for name in dots}
        handles = [palette.line(name, linestyle="") for name in palette.names if name in named]
        _legend_above(figure, [Line2D([], [], color=ARM_COLOURS[0], linewidth=2, label="tlcr"), *handles])
        return finish(figure, "Time of every rival over tlcr's, for each op", lines)


def memory_plot(memories: Sequence[Memory], palette: Palette) -> str:
    """Peak memory above the inputs of all implementations, at the headline size of every work."""
    lines = [
        (
            memory.contest.work.label,
            {
                row.implementation: max(row.peak_bytes or 0, NOTHING_TAKEN)
                for row in (*memory.rivals[::-1], memory.ours)
            },
        )
        for memory in memories
    ]
    with style():
        figure, axes = _dots(lines, palette)
        axes.set_xscale("log", base=2)
        axes.set_xlim(left=NOTHING_TAKEN)
        _bytes(axes, lambda value: ("≤ " if value <= NOTHING_TAKEN else "") + _power(value))
        axes.set_xlabel("peak memory above the inputs")
        named = {name for _, dots in lines for name in dots}
        _legend_above(figure, [palette.line(name, linestyle="") for name in palette.names if name in named])
        return finish(figure, "Peak memory above the inputs, for each op", lines)


def _dots(lines: Sequence[tuple[str, Mapping[str, float]]], palette: Palette) -> tuple[Figure, Axes]:
    """A line of text for each work, with a dot for each implementation."""
    figure = Figure(figsize=(WIDTH, 1.2 + 0.27 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, dots) in enumerate(lines):
        for name, value in dots.items():
            colour, marker = palette[name]
            axes.plot(value, place, marker, color=colour, markersize=7, clip_on=False, zorder=3)
    _row_labels(axes, [label for label, _ in lines])
    return figure, axes


# ---- bandwidth


def bandwidth_plot(file: ResultFile) -> str:
    """Bytes per second that tlcr's ops reach against the bytes they move, under the copy bandwidth."""
    own = [row for contest in contests(file.rows) if (row := contest.ours) is not None and row.bytes_moved]
    own = [row for row in own if row.bandwidth_share is not None]
    passes = [direction for direction in PASSES if any(row.work.direction == direction for row in own)]
    if len(passes) > 1 and "both" in passes:
        passes.remove("both")
    palette = Palette([row.work.op for row in own])
    data = [file.copy_bandwidth, [(row.work.label, row.bytes_moved, achieved(row, file.clock)) for row in own]]
    cache = file.machine["last_level_cache_bytes"]
    with style():
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        panels = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
        for direction, axes in zip(passes, panels, strict=True):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.plot(*zip(*file.copy_bandwidth, strict=True), color=INK, linewidth=2)
            if cache:
                axes.axvline(cache, color=INK, alpha=0.4, linewidth=1, linestyle=(0, (4, 4)))
            for row in own:
                if row.work.direction == direction:
                    colour, marker = palette[row.work.op]
                    axes.plot(row.bytes_moved, achieved(row, file.clock), marker, color=colour, markersize=5, alpha=0.8)
            axes.set_title(direction, loc="left")
            _bytes(axes, _power)
            _labels(axes, "y", lambda value: f"{significant(value / 1e9, 1)} GB/s")
            axes.set_xlabel("bytes that have to be moved")
        handles = [palette.line(name, linestyle="") for name in palette.names]
        handles.append(Line2D([], [], color=INK, linewidth=2, label="a copy of as many bytes"))
        if cache:
            handles.append(Line2D([], [], color=INK, alpha=0.4, linestyle=(0, (4, 4)), label="last-level cache"))
        _legend_above(figure, handles)
        return finish(figure, "Bandwidth that tlcr's ops reach, against that of a copy", data)


# ---- time against size


def scaling_panels(file: ResultFile, op: str) -> dict[tuple[Work, str], list[Series]]:
    """The series of one op by work and axis; both passes together only where they are not there one by one."""
    panels: dict[tuple[Work, str], list[Series]] = {}
    for series in series_of(file.rows):
        if series.work.op == op:
            panels.setdefault((series.work, series.axis), []).append(series)
    return {
        (work, axis): found
        for (work, axis), found in panels.items()
        if work.direction != "both"
        or not all((work._replace(direction=one), axis) in panels for one in ("forward", "backward"))
    }


def scaling_plot(file: ResultFile, op: str, palette: Palette) -> str:
    """Time of one op along every axis that has enough sizes: a panel for each case, pass and axis."""
    panels = scaling_panels(file, op)
    data = [
        [series.work.label, series.implementation, series.axis, series.sizes, series.seconds(file.clock)]
        for found in panels.values()
        for series in found
    ]
    with style():
        rows = math.ceil(len(panels) / COLUMNS)
        figure = Figure(figsize=(WIDTH, 0.8 + 3.0 * rows), layout="constrained")
        for place, ((work, axis), found) in enumerate(panels.items()):
            axes = figure.add_subplot(rows, COLUMNS, place + 1)
            _scaling_panel(axes, found, file.clock, palette)
            fixed = f" at {shape_text(found[0].fixed)}" if found[0].fixed else ""
            axes.set_xlabel(f"{axis}, {AXES[axis]}{fixed}", fontsize=10)
            axes.set_title(work.label.removeprefix(f"{op}, "), loc="left", fontsize=10.5)
        named = {series.implementation for found in panels.values() for series in found}
        handles = [palette.line(name) for name in palette.names if name in named]
        handles.append(Line2D([], [], color=INK, alpha=0.45, linestyle=(0, (2, 2)), label="linear"))
        _legend_above(figure, handles)
        return finish(figure, f"Time of {op} against size, beside its rivals", data)


def _scaling_panel(axes: Axes, series: Sequence[Series], clock: str, palette: Palette) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for found in series:
        colour, marker = palette[found.implementation]
        first = colour == ARM_COLOURS[0]
        sizes, seconds = found.sizes, found.seconds(clock)
        axes.plot(sizes, seconds, color=colour, marker=marker, markersize=5, linewidth=2.4 if first else 1.4)
        # Through the largest size: below it, what does not grow with the size stands out above the line.
        line = [seconds[-1] * size / sizes[-1] for size in (sizes[0], sizes[-1])]
        axes.plot([sizes[0], sizes[-1]], line, color=INK, alpha=0.45, linewidth=1, linestyle=(0, (2, 2)))
    ticks = sorted({size for found in series for size in found.sizes})
    axes.set_xticks(ticks, [str(size) if size < 10_000 else f"{size / 1000:.3g}k" for size in ticks], fontsize=9.5)
    axes.xaxis.set_minor_locator(NullLocator())
    _labels(axes, "y", lambda value: duration(value, 1))


# ---- the PPO step


def ppo_plot(tasks: Sequence[tuple[str, Sequence[Side]]]) -> str:
    """Seconds of a round's phases, a bar for each side; a panel for each task."""
    data = [(title, [(side.name, dict(side.seconds), side.peak_bytes) for side in found]) for title, found in tasks]
    bars = sum(len(found) for _, found in tasks)
    with style():
        figure = Figure(figsize=(WIDTH, 0.7 + 0.75 * len(tasks) + 0.42 * bars), layout="constrained")
        heights = [len(found) for _, found in tasks]
        panels = figure.subplots(len(tasks), 1, squeeze=False, height_ratios=heights)[:, 0]
        for (title, found), axes in zip(tasks, panels, strict=True):
            longest = max(side.seconds["total"] for side in found)
            for place, side in enumerate(found):
                begin = 0.0
                for index, phase in enumerate(PHASES):
                    axes.barh(place, side.seconds[phase], 0.62, left=begin, color=ARM_COLOURS[index])
                    begin += side.seconds[phase]
                text = f"{significant(side.tokens_per_second)} tokens/s"
                text += f", {binary(side.peak_bytes)}" if side.peak_bytes is not None else ""
                axes.text(max(begin, side.seconds["total"]) + 0.012 * longest, place, text, va="center", fontsize=10)
            _row_labels(axes, [side.name for side in found])
            axes.grid(False, axis="y")
            axes.set_axisbelow(True)
            axes.set_xlim(0, 1.36 * longest)
            axes.set_title(title, loc="left", fontsize=10.5)
        panels[-1].set_xlabel("seconds of a round")
        handles = [Patch(color=ARM_COLOURS[index], label=phase) for index, phase in enumerate(PHASES)]
        _legend_above(figure, handles)
        return finish(figure, "Seconds of the phases of a PPO round, tlcr beside TRL", data)
