"""One frontier of the arms of several runs, gold against KL, from the tables that their reports wrote.

    python -m examples.frontier OUTPUT.svg RESULTS.md [RESULTS.md ...]

Each RESULTS.md is a run's (`tlcr report`). An arm that several of them have is drawn from the first. The lines are
means over seeds, from the reference through the ends of training, from the largest coefficient to the smallest; of a
run with a single coefficient, whose tables have no evaluations on the way, from the reference to its end. The
reference is drawn at 0 gold: it has no row in the tables, and on the embedded task is within 0.01 of that.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples.study import command
from tlcr.errors import DataError
from tlcr.files import atomic_write
from tlcr.report import figures

COLUMNS = ("arm", "gold per token", "KL, nats per token")
MINUS = "\N{MINUS SIGN}"


def ends(text: str) -> dict[str, list[tuple[float, float]]]:
    """The mean ends of training of each arm, (KL, gold) as COLUMNS has them, in the order of the table's rows.

    Raises DataError where the text has no such table.
    """
    places: list[int] = []
    found: dict[str, list[tuple[float, float]]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if set(COLUMNS) <= set(cells):
            places = [cells.index(name) for name in COLUMNS]
        elif places and set(line) <= set("|- "):
            if not line:
                break
        elif places:
            arm, gold, kl = (cells[place] for place in places)
            found.setdefault(arm, []).append((_mean(kl), _mean(gold)))
    if not found:
        raise DataError(f"no table with the columns {', '.join(COLUMNS)} was found; give the results.md of a run")
    return found


def _mean(cell: str) -> float:
    """The number before an interval."""
    return float(cell.split()[0].replace(MINUS, "-"))


def plot(arms: dict[str, list[tuple[float, float]]]) -> str:
    """The frontier as an SVG file."""
    ways = {arm: [(0.0, 0.0), *reversed(points)] for arm, points in arms.items()}
    label = f"Gold against KL to the reference, both per token: {', '.join(arms)}"
    return figures.as_file(figures.frontier_plot(dict.fromkeys(arms, ()), ways, list(arms), [], "token", label))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the figure to write")
    parser.add_argument("tables", type=Path, nargs="+", help="results.md of runs")
    options = parser.parse_args(arguments)

    def work() -> None:
        arms: dict[str, list[tuple[float, float]]] = {}
        for table in options.tables:
            for arm, points in ends(table.read_text(encoding="utf-8")).items():
                arms.setdefault(arm, points)
        with atomic_write(options.output) as aside:
            aside.write_text(plot(arms), encoding="utf-8")

    return command(work)


if __name__ == "__main__":
    raise SystemExit(main())
