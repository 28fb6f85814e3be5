"""The analysis of a discriminator as people read it: the part of a report, or a page of its own.

Everything comes from analysis.json; `discriminator_analysis` says what its figures mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table

from tlcr.evaluation.bootstrap import RESAMPLES
from tlcr.report import figures

KIND_WORDS = {
    ("rejected", "substitution"): ("Substituted, the old token", "negative"),
    ("rejected", "deletion"): ("Deleted", "negative"),
    ("rejected", "kept"): ("Kept, in the rejected answer", "neutral"),
    ("rejected", "end moved"): ("The end, where it moved away from", "negative"),
    ("rejected", "end kept"): ("The end, in the rejected answer", "neutral"),
    ("revised", "substitution"): ("Substituted, the new token", "positive"),
    ("revised", "insertion"): ("Inserted", "positive"),
    ("revised", "kept"): ("Kept, in the revised answer", "neutral"),
    ("revised", "end moved"): ("The end, where it moved to", "positive"),
    ("revised", "end kept"): ("The end, in the revised answer", "neutral"),
}
FIFTH_WORDS = ("first", "2nd", "3rd", "4th", "last")


def section(analysis: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the template shows; None where there is no analysis."""
    if analysis is None:
        return None
    kinds = [
        {**row, "words": KIND_WORDS[row["side"], row["kind"]][0], "label": KIND_WORDS[row["side"], row["kind"]][1]}
        for row in analysis["kinds"]
    ]
    relative, absolute, spill = analysis["relative_positions"], analysis["absolute_positions"], analysis["spill"]
    comparisons = [
        {**found, "title": name, "sides": name.split(" over ")} for name, found in analysis["comparisons"].items()
    ]
    return {
        **analysis,
        "draws": RESAMPLES,
        "kinds": kinds,
        "places": [
            ("Fifth of the answer", [{**row, "words": FIFTH_WORDS[row["first"]]} for row in relative]),
            ("Tokens before it", [{**row, "words": _range(row)} for row in absolute]),
        ],
        "spill": [{**row, "words": _distance(row)} for row in spill],
        "comparisons": comparisons,
        "position_plot": _position_plot(relative, absolute),
        "spill_plot": _spill_plot(spill),
        "comparison_plot": _comparison_plot(comparisons),
    }


def _range(row: Mapping[str, Any]) -> str:
    return f"{row['first']}\u2013{row['last']}"


def _distance(row: Mapping[str, Any]) -> str:
    """A bin of distances in words, such as "+5 to +8" or "4 or more before"."""
    first, last = row["first"], row["last"]
    if first is None:
        return f"{-last}+ before"
    if last is None:
        return f"{first}+ after"
    words = str(abs(first)) if first == last else f"{first}\u2013{last}"
    return f"{words} {'before' if first < 0 else 'after'}"


def _point(estimate: Mapping[str, Any] | None) -> figures.Point | None:
    return None if estimate is None else (estimate["value"], estimate["interval"])


def _position_plot(relative: Sequence[Mapping[str, Any]], absolute: Sequence[Mapping[str, Any]]) -> Markup:
    places = [
        (axis, names, {label: [_point(row[label]["accuracy"]) for row in rows] for label in ("negative", "positive")})
        for axis, names, rows in (
            ("fifth of the answer", FIFTH_WORDS, relative),
            ("tokens before it", [_range(row) for row in absolute], absolute),
        )
    ]
    return figures.panels(figures.position_panels(places, "Accuracy on edited tokens by their place in the answer"))


def _spill_plot(spill: Sequence[Mapping[str, Any]]) -> Markup | None:
    if not spill:
        return None
    points = {name: [_point(row[name]) for row in spill] for name in ("rejected", "revised", "difference")}
    names = [_distance(row) for row in spill]
    label = "Mean reward of kept tokens by their distance from an edit"
    wide, narrow = (figures.spill_plot(names, points, label, narrow=narrow) for narrow in (False, True))
    return figures.wide_and_narrow(wide, narrow)


def _comparison_plot(comparisons: Sequence[Mapping[str, Any]]) -> Markup | None:
    if not comparisons:
        return None
    compared = [
        (c["sides"][0], c["sides"][1], c["low"], c["high"], c["better_histogram"], c["worse_histogram"])
        for c in comparisons
    ]
    label = "Answers by the mean reward of their tokens, better and worse ones"
    return figures.panels(figures.comparison_panels(compared, label))


def print_analysis(analysis: Mapping[str, Any], console: Console | None = None) -> None:
    """The rows by kind of edit, for the terminal."""
    console = console or Console()
    title = f"{analysis['pairs']} pairs, {analysis['tokens']} tokens; 95% intervals over pairs"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("token", overflow="fold")
    for heading in ("tokens", "accuracy", "mean reward"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in analysis["kinds"]:
        words, _ = KIND_WORDS[row["side"], row["kind"]]
        own = row["cell"]
        table.add_row(words, str(own["tokens"]), _in_words(own["accuracy"]), _in_words(own["mean_reward"]))
    console.print(table)


def _in_words(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return ""
    interval = estimate["interval"]
    return f"{estimate['value']:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
