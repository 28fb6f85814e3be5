"""Arms of several runs at equal KL, as the report of one run compares its own: a table, and a figure.

    python -m examples.frontier RUN [RUN ...] --arm continuous --figure OUTPUT.svg

The arm is compared with each other one of all the runs, at the largest KL that all seeds of both reached; differences
are taken within a seed, which is right where the runs share their models. Mean and 95 % interval of Student's t.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.study import command, golds_at_equal_kl, markdown, runs_of, with_interval
from tlcr.errors import DataError
from tlcr.files import atomic_write
from tlcr.report import figures
from tlcr.report.page import frontier_figure
from tlcr.report.results import SeedRun, compared_per, frontier, paths, read_config

COLUMNS = ("against", "KL, nats", "the arm", "the other", "difference", "seeds")


def compared(runs: Sequence[SeedRun], arm: str, per: Any) -> dict[str, Any]:
    """The comparison of an arm with all others, as ``collect_results`` has it of one run.

    Args:
        runs: of all folders.
        arm: the arm that is compared with each other one.
        per: "token" or "answer".

    Returns:
        ``frontier``, ``paths``, ``per`` and the names of ``arms``, this arm first.

    Raises:
        DataError: no run is of this arm, or none has gold, or none of this arm.
    """
    ordered = sorted(runs, key=lambda run: run.arm != arm)
    names = list(dict.fromkeys(run.arm for run in ordered))
    if arm not in names:
        raise DataError(f"no run is of arm {arm!r}; there are {', '.join(names) or 'none'}")
    found = frontier(ordered, per=per)
    if found is None:
        raise DataError("no run has gold at a KL above 0: its evaluations need a scorer, or the embedded task")
    if arm not in found["reached"]:
        raise DataError(f"no run of arm {arm!r} has gold, only those of {', '.join(found['reached'])}")
    return {"frontier": found, "paths": paths(ordered), "per": per, "arms": [{"name": name} for name in names]}


def table(results: dict[str, Any]) -> list[str]:
    """A row for each other arm, as Markdown."""
    rows = (
        [*golds_at_equal_kl(pair), with_interval(pair["difference"], pair["interval"]), str(len(pair["seeds"]))]
        for pair in results["frontier"]["comparisons"]
    )
    return markdown(COLUMNS, rows).splitlines()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of `tlcr run`")
    parser.add_argument("--arm", default="continuous", help="what is compared with the others (default: continuous)")
    parser.add_argument("--figure", type=Path, help="the figure to write: gold against KL, a line for every arm")
    options = parser.parse_args(arguments)
    if options.figure is not None and options.figure.is_dir():
        parser.error(f"--figure {options.figure} is a folder; name a file, as {options.figure / 'frontier.svg'}")

    def work() -> None:
        per = {compared_per(read_config(folder)) for folder in options.runs}
        if len(per) > 1:
            raise DataError("some of these runs are compared per token and some per answer (evaluation.per)")
        results = compared(runs_of(options.runs), options.arm, *per)
        if options.figure is not None:
            with atomic_write(options.figure) as aside:
                aside.write_text(figures.as_file(frontier_figure(results)), encoding="utf-8")
        sys.stdout.write("\n".join(table(results)) + "\n")

    return command(work)


if __name__ == "__main__":
    raise SystemExit(main())
