"""The table of how a discriminator judges a policy's own answers: over the seeds of an arm, coefficient and update."""

from __future__ import annotations

import pytest

from examples import drift
from tlcr.errors import DataError
from tlcr.report.results import SeedRun


def run(arm: str, seed: int, auc: float | None) -> SeedRun:
    curve = [
        {"update": update, "gold_per_token": 0.1 * update, "discriminator_auc": auc, "discriminator_ece": 0.2}
        for update in (0, 10)
    ]
    return SeedRun(arm, 0.1, seed, curve[0], curve[-1], curve)  # type: ignore[arg-type]


def test_rows_are_means_over_the_seeds_of_an_arm_at_an_update() -> None:
    rows = drift.table([run("continuous", 0, 0.8), run("continuous", 1, 0.9), run("q", 0, None)])
    assert rows[0].count("|") == rows[1].count("|") == 8
    # two seeds: 12.706 standard errors of 0.05 on either side of 0.85
    assert rows[2:] == [
        "| continuous | 0.1 | 0 | 2 | 0.000 (0.000 to 0.000) | 0.850 (0.215 to 1.485) | 0.200 (0.200 to 0.200) |",
        "| continuous | 0.1 | 10 | 2 | 1.000 (1.000 to 1.000) | 0.850 (0.215 to 1.485) | 0.200 (0.200 to 0.200) |",
    ]


def test_runs_without_a_discriminator_are_refused() -> None:
    with pytest.raises(DataError, match="no evaluation has an AUC"):
        drift.table([run("q", 0, None)])
