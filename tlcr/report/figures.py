"""The report's plots, as SVG text that takes the page's own colours, so that one page serves light and dark."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tlcr.report.results import POWER, scaled

ARM_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C")
"""Okabe and Ito's palette, told apart by colour-blind readers and on light and dark grounds alike."""
ARM_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", ":", "-.")
"""The second, third and fourth seven of many arms."""
STEPS = 8
"""Points drawn for each of a frontier's."""
INK = "#123456"
"""Stands for the page's text colour until the SVG is finished."""

SCHEMES = (
    "svg{color:#1f2328;background:#ffffff}"
    "@media(prefers-color-scheme:dark){svg{color:#e6edf3;background:#0d1117}}"
    "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif!important}"
)
"""Light and dark, for an image that no page lends its colours."""

NARROW, WIDE = 4.6, 9.2
"""Widths in inches: a panel, or a plot on a phone, whose letters are then as large as the page's; and a wide plot."""

RELIABILITY_NAMES = {"before": "as trained", "after": "calibrated"}

Curve = Sequence[tuple[float, float]]


def arm_colour(index: int) -> str:
    """The colour of the index-th arm everywhere in a report."""
    return ARM_COLOURS[index % len(ARM_COLOURS)]


def arm_marker(index: int) -> str:
    """A marker that no other arm of the same colour has, among the first 49."""
    return ARM_MARKERS[(index + index // len(ARM_COLOURS)) % len(ARM_MARKERS)]


def _arm_line(index: int) -> str:
    return LINE_STYLES[index // len(ARM_COLOURS) % len(LINE_STYLES)]


@contextmanager
def style() -> Iterator[None]:
    """Within, figures have the look of the report, with INK where the text's colour goes."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": INK,
        "grid.alpha": 0.15,
        "axes.grid": True,
        "legend.frameon": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    with matplotlib.rc_context(settings):
        yield


def svg_text(figure: Figure, label: str) -> str:
    """The figure as an SVG element with a text for those who cannot see it."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"{label} {figure.get_figwidth()}"}):  # no two plots share a name
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    # The XML head has no place inside a page, and a fixed width would not fit a phone.
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    head, rest = text.split(">", 1)
    head = " ".join(part for part in head.split() if not part.startswith(("width=", "height=")))
    escaped = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return f'{head} role="img" aria-label="{escaped}">{rest}'


def panels(plots: Sequence[str]) -> Markup:
    """Plots side by side, as many in a row as there is room for."""
    return Markup('<div class="panels">{}</div>').format(Markup("").join(Markup(plot) for plot in plots))


def wide_and_narrow(wide: str, narrow: str) -> Markup:
    """One plot in two widths, of which the page shows the one that fits."""
    drawn = Markup('<div class="wide">{}</div><div class="narrow">{}</div>')
    return drawn.format(Markup(wide), Markup(narrow))


def svg_file(figure: Figure, label: str) -> str:
    """The figure as a file of its own, shown as an image."""
    return as_file(svg_text(figure, label))


def as_file(svg: str) -> str:
    """What `svg_text` gave as a file: with its size, and with colours for light and dark grounds."""
    head, rest = svg.split(">", 1)
    # From points to CSS pixels: letters of 11 points are then as large as the page's own.
    width, height = (float(points) * 96 / 72 for points in head.split('viewBox="0 0 ')[1].split('"')[0].split())
    return f'{head} width="{width:.0f}" height="{height:.0f}"><style>{SCHEMES}</style>{rest}'


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """Mean of several seeds' curves at the x that all of them have."""
    by_x = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*(set(points) for points in by_x))) if by_x else []
    return [(x, math.fsum(points[x] for points in by_x) / len(by_x)) for x in shared]


def _draw_arm(
    axes: Axes, index: int, name: str, seeds: Sequence[Curve], mean: Curve, *, marker: bool, every: int = 1
) -> None:
    """every: how many points of a curve there are for one marker."""
    colour, shape, line = arm_colour(index), arm_marker(index) if marker else None, _arm_line(index)
    if len(seeds) > 1:
        for curve in seeds:
            axes.plot(*zip(*curve, strict=True), color=colour, linewidth=0.8, alpha=0.4)
    if mean:
        style: dict[str, Any] = {"linewidth": 2.2, "linestyle": line, "markersize": 4.5, "marker": shape}
        style["markevery"] = every
        axes.plot(*zip(*mean, strict=True), label=name, color=colour, **style)


def curve_panels(titled: Sequence[tuple[str, Mapping[str, Sequence[Curve]]]], arm_order: Sequence[str]) -> list[str]:
    """A plot for each (title, arm to its seeds' curves), against updates."""
    drawn = []
    with style():
        for title, by_arm in titled:
            figure = Figure(figsize=(NARROW, 2.7), layout="constrained")
            axes = figure.add_subplot()
            for name, seeds in by_arm.items():
                _draw_arm(axes, arm_order.index(name), name, seeds, mean_curve(seeds), marker=False)
            axes.set_title(title, loc="left")
            axes.set_xlabel("PPO update")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            drawn.append(svg_text(figure, f"{title}, against PPO updates: {', '.join(by_arm)}"))
    return drawn


def frontier_plot(
    by_arm: Mapping[str, Sequence[Curve]],
    means: Mapping[str, Curve],
    arm_order: Sequence[str],
    levels: Sequence[float],
    per: str,
    label: str,
    *,
    measure: str = "gold",
    narrow: bool = False,
) -> str:
    """Gold, under the name of ``measure``, against KL, both per token or per answer: each arm's path away from the
    reference, between points as the tables read it, with the matched levels as dashed lines. KL on a square-root scale,
    on which an arm that ran far away leaves room for the others."""
    with style():
        figure = Figure(figsize=(NARROW if narrow else WIDE, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for level in levels:
            axes.axvline(level, color=INK, alpha=0.35, linewidth=0.9, linestyle=(0, (4, 4)))
        for name, seeds in by_arm.items():
            ways = [_between(way) for way in (*seeds, means[name])]
            _draw_arm(axes, arm_order.index(name), name, ways[:-1], ways[-1], marker=True, every=STEPS)
        axes.set_xscale("function", functions=(lambda x: scaled(x, 0.5), lambda x: scaled(x, 2)))
        far = "" if narrow else ", on a square-root scale: how far the policy has moved"
        axes.set_xlabel(f"KL to the reference, nats per {per}{far}")
        axes.set_ylabel(f"{measure} per {per}")
        if len(by_arm) > len(ARM_COLOURS) and not narrow:
            figure.legend(loc="outside right upper", fontsize=9)
        else:
            figure.legend(loc="outside upper left", ncols=2 if narrow else 4)
        return svg_text(figure, label)


def _between(curve: Curve) -> Curve:
    """The curve with the points between its points, STEPS for each: straight in POWER of the KL."""
    if not curve:
        return []
    kl, gold = (np.array(axis) for axis in zip(*curve, strict=True))
    steps = np.linspace(0, len(curve) - 1, STEPS * (len(curve) - 1) + 1)
    places, heights = (np.interp(steps, range(len(curve)), axis) for axis in (scaled(kl, POWER), gold))
    return list(zip(scaled(places, 1 / POWER).tolist(), heights.tolist(), strict=True))


def paired_panels(
    by_arm: Mapping[str, tuple[Curve, Curve]], arm_order: Sequence[str], against: str, label: str
) -> list[str]:
    """For each arm a plot of two curves on scales of their own: the first solid, its scale at the left; the second
    dotted, its scale at the right.

    Args:
        by_arm: the two curves of each arm.
        arm_order: all arms of the report, which decides the colours.
        against: what is on the x axis.
        label: what the plot shows, for those who cannot see it; the arm's name comes behind it.

    Returns:
        The plots as SVG.
    """
    drawn = []
    with style():
        for name, (left, right) in by_arm.items():
            figure = Figure(figsize=(NARROW, 2.5), layout="constrained")
            axes = figure.add_subplot()
            colour, marker = arm_colour(arm_order.index(name)), arm_marker(arm_order.index(name))
            axes.plot(*zip(*left, strict=True), color=colour, marker=marker, markersize=4)
            own = axes.twinx()
            own.plot(*zip(*right, strict=True), color=INK, linestyle=":", alpha=0.7)
            own.grid(False)
            for side in (axes, own):
                side.locator_params(axis="y", nbins=4)
            axes.set_title(name, loc="left")
            axes.set_xlabel(against)
            drawn.append(svg_text(figure, f"{label}: {name}"))
    return drawn


def reliability_plot(reliability: Mapping[str, Sequence[Mapping[str, Any]]], label: str) -> str:
    """Mean target against mean confidence, and how many tokens each bin holds."""
    with style():
        figure = Figure(figsize=(NARROW, 4.6), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        above.plot([0, 1], [0, 1], color=INK, alpha=0.4, linestyle=(0, (4, 4)), linewidth=1)
        for index, (key, bins) in enumerate(reliability.items()):
            points = [(b["confidence"], b["target"]) for b in bins if b["tokens"]]
            if not points:
                continue
            colour, marker = arm_colour(index), ARM_MARKERS[index]
            above.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                label=RELIABILITY_NAMES.get(key, key),
                markersize=4.5,
            )
            width = (bins[0]["upper"] - bins[0]["lower"]) / len(reliability)
            starts = [b["lower"] + index * width for b in bins]
            below.bar(starts, [b["tokens"] for b in bins], width, align="edge", color=colour)
        above.set(xlim=(0, 1), ylim=(0, 1), ylabel="mean target")
        above.legend(loc="best")  # of the default, the same, matplotlib warns on a slow machine
        below.set(xlabel="confidence, (reward + 1) / 2", ylabel="tokens", yscale="symlog")
        return svg_text(figure, label)


def histogram_plot(counts: Sequence[int], label: str) -> str:
    """Pairs by the share of their tokens that the reviser changed, in equal bins of [0, 1]."""
    with style():
        figure = Figure(figsize=(NARROW, 2.6), layout="constrained")
        axes = figure.add_subplot()
        width = 1 / len(counts)
        axes.bar([i * width for i in range(len(counts))], counts, width * 0.92, align="edge", color=arm_colour(0))
        axes.set(xlabel="share of a pair's tokens that were edited", ylabel="pairs", xlim=(0, 1))
        return svg_text(figure, label)


# ---- what a discriminator gets right

NEGATIVE_COLOUR, POSITIVE_COLOUR, KEPT_COLOUR = ARM_COLOURS[1], ARM_COLOURS[0], ARM_COLOURS[6]
"""Orange below 0 and blue above, as the report colours tokens."""

Point = tuple[float, "tuple[float, float] | None"]
"""A figure and its interval."""


def _draw_points(axes: Axes, points: Sequence[Point | None], name: str, colour: str, marker: str, shift: float) -> None:
    """Figures with their intervals at 0, 1, 2 and so on, a gap where there is none."""
    drawn = [(place + shift, *point) for place, point in enumerate(points) if point is not None]
    places, values = [place for place, _, _ in drawn], [value for _, value, _ in drawn]
    axes.plot(places, values, color=colour, marker=marker, markersize=4.5, linewidth=1.2, label=name)
    for place, value, interval in drawn:
        low, high = interval or (value, value)
        axes.plot([place, place], [low, high], color=colour, linewidth=1.2)


def _name_places(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis="x", labelsize=10)


def position_panels(
    places: Sequence[tuple[str, Sequence[str], Mapping[str, Sequence[Point | None]]]], label: str
) -> list[str]:
    """Accuracy on negative and positive tokens by place: (what the places are, their names, points by label)."""
    drawn = []
    with style():
        for axis, names, points in places:
            figure = Figure(figsize=(NARROW, 3.2), layout="constrained")
            axes = figure.add_subplot()
            _draw_points(axes, points["negative"], "negative: taken away", NEGATIVE_COLOUR, "s", -0.06)
            _draw_points(axes, points["positive"], "positive: put in", POSITIVE_COLOUR, "o", 0.06)
            _name_places(axes, names)
            axes.axhline(0.5, color=INK, alpha=0.4, linestyle=(0, (4, 4)), linewidth=1)
            axes.set(xlabel=axis, ylabel="accuracy", ylim=(-0.02, 1.02))
            axes.legend(loc="lower left", fontsize=10)
            drawn.append(svg_text(figure, f"{label}: {axis}"))
    return drawn


def spill_plot(
    names: Sequence[str], points: Mapping[str, Sequence[Point | None]], label: str, *, narrow: bool = False
) -> str:
    """Mean reward of kept tokens in the rejected and the revised answer, by their distance from an edit."""
    with style():
        figure = Figure(figsize=(NARROW, 4.0) if narrow else (WIDE, 3.0), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(0, color=INK, alpha=0.4, linestyle=(0, (4, 4)), linewidth=1)
        _draw_points(axes, points["rejected"], "in the rejected answer", NEGATIVE_COLOUR, "s", -0.08)
        _draw_points(axes, points["revised"], "in the revised answer", POSITIVE_COLOUR, "o", 0.08)
        _draw_points(axes, points["difference"], "difference", KEPT_COLOUR, "D", 0.0)
        _name_places(axes, names)
        if narrow:
            axes.tick_params(axis="x", rotation=60)
        axes.set_xlabel("kept tokens from the edit")
        axes.set_ylabel("mean reward")
        axes.legend(loc="best", fontsize=10)
        return svg_text(figure, label)


def comparison_panels(
    compared: Sequence[tuple[str, str, float, float, Sequence[int], Sequence[int]]], label: str
) -> list[str]:
    """Histograms of mean token reward: one for each (better, worse, low, high, counts of better, counts of worse)."""
    drawn = []
    with style():
        for better, worse, low, high, of_better, of_worse in compared:
            figure = Figure(figsize=(NARROW, 2.8), layout="constrained")
            axes = figure.add_subplot()
            edges = [low + (high - low) * i / len(of_better) for i in range(len(of_better) + 1)]
            for counts, name, colour in ((of_worse, worse, NEGATIVE_COLOUR), (of_better, better, POSITIVE_COLOUR)):
                axes.stairs(counts, edges, fill=True, color=colour, alpha=0.35)
                axes.stairs(counts, edges, color=colour, label=name, linewidth=1.4)
            axes.set(xlabel="mean reward of an answer's tokens", ylabel="answers")
            axes.legend(loc="best", fontsize=10)
            drawn.append(svg_text(figure, f"{label}: {better}, {worse}"))
    return drawn
