"""Arms of several runs are compared at equal KL as those of one run are."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import frontier, study
from tlcr.errors import DataError
from tlcr.report.results import SeedRun


def run(arm: str, kl_coef: float, seed: int, kl: float, gold: float) -> SeedRun:
    """A run from no gold at no KL to its end."""
    before = {"update": 0, "kl_per_token": 0.0, "gold_per_token": 0.0}
    after = {"update": 10, "kl_per_token": kl, "gold_per_token": gold}
    return SeedRun(arm, kl_coef, seed, before, after, (before, after))


RUNS = [
    *(run("continuous", 0.1, seed, 1.0, 0.4 + seed / 10) for seed in (0, 1)),
    *(run("continuous", 0.2, seed, 0.5, 0.3 + seed / 10) for seed in (0, 1)),
    *(run(arm, coef, seed, 0.5, 0.1) for arm, coef in (("q", 0.1), ("refresh", 0.2)) for seed in (0, 1)),
    *(run(arm, coef, seed, 0.2, 0.05) for arm, coef in (("q", 0.2), ("refresh", 0.4)) for seed in (0, 1)),
]


def test_the_arm_is_compared_with_each_other_one_at_the_kl_that_both_reached() -> None:
    # at 0.5 nats continuous ended at 0.3 and 0.4, the others at 0.1: 12.706 standard errors of 0.05 about 0.25
    row = "| 0.500 | 0.350 | 0.100 | 0.250 (\N{MINUS SIGN}0.385 to 0.885) | 2 |"
    assert frontier.table(frontier.compared(RUNS, "continuous", "token"))[2:] == [f"| q {row}", f"| refresh {row}"]


def test_runs_without_a_common_seed_have_no_difference() -> None:
    runs = [*RUNS[:4:2], *(run("q", kl, 1, kl, 0.1) for kl in (0.2, 0.5))]
    (row,) = frontier.table(frontier.compared(runs, "continuous", "token"))[2:]
    assert row == "| q | 0.500 | 0.300 | 0.100 | \N{EN DASH} | 0 |"


def test_any_arm_may_be_the_one() -> None:
    rows = frontier.table(frontier.compared(RUNS, "refresh", "token"))[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| continuous", "| q"]


@pytest.mark.parametrize(
    ("runs", "arm", "said"),
    [
        (RUNS, "sequence", "no run is of arm 'sequence'; there are continuous, q, refresh"),
        (
            [*RUNS, SeedRun("mute", 0.1, 0, {"kl_per_token": 0.0}, {"kl_per_token": 1.0}, ({"kl_per_token": 1.0},))],
            "mute",
            "no run of arm 'mute' has gold, only those of continuous, q, refresh",
        ),
        ([run("q", 0.1, 0, 0.0, 0.0)], "q", "no run has gold at a KL above 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs: list[SeedRun], arm: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        frontier.compared(runs, arm, "token")


def test_the_figure_draws_every_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "read_runs", lambda folder: RUNS[:4] if folder.name == "a" else RUNS[4:])
    drawn = tmp_path / "out.svg"
    assert frontier.main([str(tmp_path / "a"), str(tmp_path / "b"), "--figure", str(drawn)]) == 0
    text = drawn.read_text(encoding="utf-8")
    assert ' width="' in text.split(">")[0] and "prefers-color-scheme:dark" in text  # a file of its own, on any ground
    assert all(f">{arm}<" in text for arm in ("continuous", "q", "refresh"))


def test_a_comparison_without_gold_at_the_common_kl_has_dashes() -> None:
    comparison = {"other": "q", "kl": 0.5, "arm_gold": None, "other_gold": {"mean": 0.25}}
    assert study.golds_at_equal_kl(comparison) == ["q", "0.500", "\N{EN DASH}", "0.250"]
