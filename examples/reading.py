"""How gold between two points of a frontier is best read: each point left out, and read off its neighbours.

    python -m examples.reading RUN [RUN ...]

A report compares arms at equal KL, and so reads gold between points: among the ends of training under several KL
coefficients, and between the evaluations on the way of a run. Here a point that is known is left out and read on lines
that are straight in the root of the KL, in its power of three quarters, and in the KL itself. The table has the root
mean square of what they miss by, over seeds and points: for the first point behind the reference, and for later ones.
An arm that had several coefficients is read among its ends, as its report reads it, and each of its runs by itself.
Points that are not between their neighbours in KL are passed over.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from examples.study import command, markdown
from tlcr.errors import DataError
from tlcr.report.page import number
from tlcr.report.results import Curve, Per, compared_per, gold_at_kl, paths, read_config, read_runs

POWERS = {"root": 0.5, "three quarters": 0.75, "KL": 1.0}
ENDS, WAY = "ends", "evaluations"


Misses = dict[bool, list[list[float]]]
"""What is read less what is known: for each point left out, with each of POWERS; under whether it is the first point
behind the reference."""


def misses(ways: Iterable[Curve], measure: str, against: str) -> Misses:
    """Every point of these ways that lies between its neighbours in KL, read off them."""
    found: Misses = {True: [], False: []}
    for way in ways:
        known = [point for point in way if point.get(measure) is not None and point.get(against) is not None]
        for place in range(1, len(known) - 1):
            before, point, after = known[place - 1 : place + 2]
            if not before[against] < point[against] < after[against]:
                continue
            read = [
                gold_at_kl([before, after], point[against], power=power, measure=measure, against=against)
                for power in POWERS.values()
            ]
            found[place == 1].append([gold - point[measure] for gold in read if gold is not None])
    return found


def of_run(folder: Path) -> tuple[Per, dict[tuple[str, str], Misses]]:
    """What its gold and KL are per; and by arm and manner: among its ends, where it has several coefficients, and on
    the way of the runs of each."""
    runs, per = read_runs(folder), compared_per(read_config(folder))
    if not runs:
        raise DataError(f"{folder} holds no evaluated PPO run; name the output_dir of 'tlcr run'")
    measure, against = f"gold_per_{per}", f"kl_per_{per}"
    found = {}
    for arm in dict.fromkeys(run.arm for run in runs):
        own = [run for run in runs if run.arm == arm]
        coefs = sorted({run.kl_coef for run in own if run.kl_coef is not None})
        if coefs:
            found[arm, ENDS] = misses(paths(own)[arm].values(), measure, against)
        for coef in coefs or [None]:
            single = [replace(run, kl_coef=None) for run in own if run.kl_coef == coef]
            manner = WAY if coef is None else f"{WAY}, {coef}"
            found[arm, manner] = misses(paths(single)[arm].values(), measure, against)
    return per, found


def cells(missed: Misses) -> list[str]:
    """Root mean squares with each power and the number of points, of the first points and of later ones."""
    found = []
    for points in (missed[True], missed[False]):
        by_power = list(zip(*points, strict=True)) or [()] * len(POWERS)
        found += [number(math.sqrt(math.fsum(m**2 for m in own) / len(own)) if own else None) for own in by_power]
        found.append(str(len(points)))
    return found


def table(folders: Sequence[Path]) -> str:
    """The rows of all runs, and behind them all ends and all ways together, of each unit of gold by itself."""
    together: dict[tuple[Per, str], Misses] = {}
    rows = []
    for folder in folders:
        per, of_arms = of_run(folder)
        for (arm, manner), missed in of_arms.items():
            if any(missed.values()):
                rows.append([folder.name, arm, manner, *cells(missed)])
            for first, points in missed.items():
                kind = together.setdefault((per, manner.partition(",")[0]), {True: [], False: []})
                kind[first] += points
    rows += [[f"all, per {per}", "all", kind, *cells(missed)] for (per, kind), missed in sorted(together.items())]
    heading = ["run", "arm", "between", *(f"first, {name}" for name in POWERS), "points"]
    heading += [*(f"later, {name}" for name in POWERS), "points"]
    return markdown(heading, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="output_dir of runs")
    options = parser.parse_args(arguments)

    def work() -> None:
        sys.stdout.write(table(options.runs) + "\n")

    return command(work)


if __name__ == "__main__":
    raise SystemExit(main())
