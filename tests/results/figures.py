"""Figures of the documents that name where they come from, held against the files.

Under a paragraph or an item of a list, a comment may name figures of it, each with a file of docs/results and a path
in it::

    <!-- from
    0.400 (0.341 to 0.459) = reward_comparison/results.md [continuous, 0.1, *] gold per token
    0.585 ± 0.051 = discriminator_study/results.json [cell=as-configured].measures.gold_content
    0.018 (0.013 to 0.023) = length/results.json gaps[length=16, lam=0.7, other=sum-at-end].at_kl
    -->

In JSON a path is a row of keys; brackets choose from a list the only entry that has these values. It ends at a number,
or at a mean over seeds: an object with "mean" or "difference", and "interval". In Markdown the brackets hold the first
cells of a table's row (* for any) and the column's name follows. A line `<!-- rows = FILE -->` says that each row of
the table under it is a row of that file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "docs" / "results"
MINUS = "\u2212"
NUMBER = rf"[{MINUS}-]?[\d,]*\.?\d+"
STATED = re.compile(
    rf"(?P<mean>{NUMBER})(?: \((?P<low>{NUMBER}) to (?P<high>{NUMBER})\)| ± (?P<half>{NUMBER}))?"
    r" = (?P<file>\S+) (?P<path>.+)"
)
FROM = re.compile(r"<!-- from\n(?P<lines>(?:.*\n)*?) *-->")
ROWS = re.compile(r"<!-- rows = (?P<file>\S+) -->\n\n?(?P<table>(?:\|.*\n)+)")
ANY_MARK = re.compile(r"<!-- (?:from|rows|=)")
STEP = re.compile(r"\.?([\w-]+)|\[([^\]]+)\]")


class Unfounded(AssertionError):
    """A figure that its file does not have."""


@dataclass(frozen=True)
class Figure:
    """What a file says: a number, and the ends of its interval where it has one."""

    mean: float
    interval: tuple[float, float] | None


def unfounded(text: str, folder: Path = RESULTS) -> Iterator[str]:
    """What of the marked figures and tables of a page is not as its file has it, a sentence for each."""
    read = 0
    for comment in FROM.finditer(text):
        read += 1
        above = " ".join(re.split(r"\n\n|-->", text[: comment.start()])[-1].split())
        for line in comment["lines"].splitlines():
            yield from _unfounded_line(line.strip(), above, folder)
    for match in ROWS.finditer(text):
        read += 1
        lines = set((folder / match["file"]).read_text(encoding="utf-8").splitlines())
        yield from (f"{match['file']} has no row {row}" for row in match["table"].splitlines() if row not in lines)
    marks = len(ANY_MARK.findall(text))
    if marks != read:
        yield f"{marks - read} of {marks} marks have no lines with figures, or stand over no table"


def _unfounded_line(line: str, above: str, folder: Path) -> Iterator[str]:
    match = STATED.fullmatch(line)
    if match is None:
        yield f"{line!r} is no figure with a file and a path"
        return
    said = re.escape(line.partition(" = ")[0])
    if re.search(rf"(?<![\d.,{MINUS}-]){said}(?!\d|\.\d)", above) is None:
        yield f"{line}: the text above does not say so"
    try:
        found = look_up(folder / match["file"], match["path"])
    except (Unfounded, OSError, ValueError) as error:
        yield f"{line}: {error}"
        return
    low, high = found.interval or (None, None)
    half = None if low is None or high is None else (high - low) / 2
    stated = [match["mean"], match["low"], match["high"], match["half"]]
    for said, figure in zip(stated, [found.mean, low, high, half], strict=True):
        if said is not None and (figure is None or said != as_said(figure, like=said)):
            yield f"{line}: says {said}, the file has {figure}"


def as_said(figure: float, *, like: str) -> str:
    """The figure with as many decimals as the text gives it, and with its minus sign."""
    decimals = len(like.partition(".")[2])
    text = f"{figure:,.{decimals}f}" if "," in like else f"{figure:.{decimals}f}"
    return text.replace("-", MINUS) if MINUS in like or "-" not in like else text


def look_up(path: Path, where: str) -> Figure:
    """The figure that stands at a path of a file.

    Args:
        path: a JSON or Markdown file.
        where: the path in it.

    Returns:
        The figure.

    Raises:
        Unfounded: nothing stands there, or more than one thing does.
    """
    text = path.read_text(encoding="utf-8")
    return _in_tables(text, where) if path.suffix == ".md" else _in_json(json.loads(text), where)


def _in_json(value: Any, where: str) -> Figure:
    for match in STEP.finditer(where):
        key, chosen = match.groups()
        try:
            value = value[key] if key is not None else _only(value, chosen)
        except (KeyError, TypeError) as error:
            raise Unfounded(f"there is no {match[0]} on the way {where}") from error
    if isinstance(value, dict):
        mean = value.get("mean", value.get("difference"))
        interval = value.get("interval")
        return Figure(_number(mean, where), None if interval is None else (interval[0], interval[1]))
    return Figure(_number(value, where), None)


def _only(entries: Any, chosen: str) -> Any:
    wanted = dict(part.strip().split("=") for part in chosen.split(","))
    found = [entry for entry in entries if all(str(entry.get(key)) == value for key, value in wanted.items())]
    if len(found) != 1:
        raise Unfounded(f"{len(found)} entries have {chosen}, wanted one")
    return found[0]


def _in_tables(text: str, where: str) -> Figure:
    match = re.fullmatch(r"\[(?P<row>[^\]]+)\] (?P<column>.+)", where)
    if match is None:
        raise Unfounded(f"the path {where!r} is no [row] column")
    row, found, names = [cell.strip() for cell in match["row"].split(",")], [], None
    for line in text.splitlines():
        if not line.startswith("|"):
            names = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if names is None:
            names = cells
        elif match["column"] in names and all(a in ("*", b) for a, b in zip(row, cells, strict=False)):
            found.append(cells[names.index(match["column"])])
    if len(found) != 1:
        raise Unfounded(f"{len(found)} rows of tables with a column {match['column']!r} begin with {match['row']}")
    numbers = [float(n.replace(MINUS, "-").replace(",", "")) for n in re.findall(NUMBER, found[0])]
    return Figure(numbers[0], (numbers[1], numbers[2]) if len(numbers) == 3 else None)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unfounded(f"{where} is {value!r}, which is no number")
    return float(value)
