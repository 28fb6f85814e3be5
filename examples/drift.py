"""How a discriminator judges a policy's own answers as PPO goes on, on the embedded task: a table over seeds.

    python -m examples.drift RUN [RUN ...]

For each arm and KL coefficient, at each evaluation on the way (`ppo.evaluate_every`): the gold of the answers to
held-out prompts, and how the discriminator of that update judges their tokens against the gold of their words, above 0
or below: ROC-AUC and calibration error. Means and 95 % intervals (Student's t) over seeds. The report of a run draws
the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from examples.study import command, markdown, runs_of, with_interval
from tlcr.errors import DataError
from tlcr.report.results import SeedRun, mean_over_seeds

MEASURES = {"gold_per_token": "gold per token", "discriminator_auc": "AUC", "discriminator_ece": "calibration error"}


def table(runs: Iterable[SeedRun]) -> list[str]:
    """The rows, as Markdown. Raises DataError where no run has what the table shows."""
    found: dict[tuple[str, float | None, int], list[dict[str, float]]] = {}
    for run in runs:
        for point in run.curve:
            if all(point.get(name) is not None for name in MEASURES):
                found.setdefault((run.arm, run.kl_coef, point["update"]), []).append(point)
    if not found:
        raise DataError(
            "no evaluation has an AUC of the discriminator; it is measured on the embedded task, for arms that read it"
        )
    rows = (
        [
            arm,
            "" if coef is None else str(coef),
            str(update),
            str(len(points)),
            *(_cell([point[name] for point in points]) for name in MEASURES),
        ]
        for (arm, coef, update), points in found.items()
    )
    return markdown(["arm", "KL coefficient", "update", "seeds", *MEASURES.values()], rows).splitlines()


def _cell(values: Sequence[float]) -> str:
    mean = mean_over_seeds(values)
    assert mean is not None  # a row has a run
    return with_interval(mean.mean, mean.interval)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of `tlcr run`")
    options = parser.parse_args(arguments)

    def work() -> None:
        lines = table(runs_of(options.runs))
        sys.stdout.write("\n".join(lines) + "\n")

    return command(work)


if __name__ == "__main__":
    raise SystemExit(main())
