"""Win rates, intervals, length control and agreement, each against hand-worked or independent figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binomtest

from tlcr.judging.statistics import agreement, bootstrap_interval, length_controlled, wilson_interval


@pytest.mark.parametrize(("wins", "count"), [(0, 7), (3, 7), (41, 80), (80, 80)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_s_interval_is_scipy_s_where_there_are_no_ties(wins: int, count: int, confidence: float) -> None:
    expected = binomtest(wins, count).proportion_ci(confidence, method="wilson")
    assert wilson_interval(wins / count, count, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_s_interval_takes_ties_as_halves() -> None:
    """One win, two ties: m = 2/3, n = 3, z = 1.96: (0.66667 + 0.64024 -+ 1.95996 sqrt(0.07407 + 0.10671)) / 2.28049."""
    low, high = wilson_interval(2 / 3, 3, 0.95)
    assert (low, high) == (pytest.approx(0.20765, abs=1e-4), pytest.approx(0.93851, abs=1e-4))


def lengths(*differences: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of a and b with these differences."""
    difference = np.array(differences, dtype=float)
    return 1000 + difference, np.full_like(difference, 1000)


def test_length_control_of_a_saturated_case_worked_by_hand() -> None:
    """Ten replies are longer by 300 characters and nine of them win; ten are shorter by as much and five win.

    Two kinds of rows, two coefficients: the fit is exact, and the standard deviation drops out. The log-odds are
    q + k t = ln 9 and q - k t = 0, so q = ln 3, and the win rate at equal length is 3/4, where the raw one is 14/20.
    """
    scores = np.array([1.0] * 9 + [0] + [1.0] * 5 + [0] * 5)
    found = length_controlled(scores, *lengths(*[300] * 10, *[-300] * 10))
    assert scores.mean() == 0.7
    assert found.win_rate == pytest.approx(0.75, abs=5e-5)
    assert found.quality == pytest.approx(math.log(3), abs=5e-4)
    deviation = np.std([300] * 10 + [-300] * 10, ddof=1)
    assert found.length == pytest.approx(math.log(3) / math.tanh(300 / deviation), abs=1e-3)


def test_the_sides_change_places_and_the_win_rate_is_mirrored() -> None:
    generator = np.random.default_rng(3)
    a, b = generator.integers(100, 2000, size=(2, 60)).astype(float)
    scores = generator.choice([0.0, 0.5, 1.0], size=60, p=[0.2, 0.2, 0.6])
    here, there = length_controlled(scores, a, b), length_controlled(1 - scores, b, a)
    assert here.win_rate == pytest.approx(1 - there.win_rate, abs=1e-6)
    assert here.length == pytest.approx(there.length, abs=1e-5)


def test_a_tie_counts_as_half_a_win_and_half_a_loss() -> None:
    ties = length_controlled(np.array([0.5, 0.5, 1.0, 0.0]), *lengths(100, -50, 20, 70))
    split = length_controlled(
        np.array([1.0, 0, 1, 0, 1, 1, 0, 0]), *lengths(100, 100, -50, -50, 20, 20, 70, 70)
    )  # the same rows twice, but for the standard deviation: that is over N - 1
    assert ties.win_rate == pytest.approx(split.win_rate, abs=0.02)
    assert length_controlled(np.full(8, 0.5), *lengths(*range(8))).win_rate == pytest.approx(0.5)


@pytest.mark.parametrize(("quality", "bias"), [(0.0, 2.0), (0.8, 1.5), (-0.6, 2.5), (0.7, 0.0)])
def test_a_known_quality_is_found_behind_a_known_bias_for_length(quality: float, bias: float) -> None:
    """Verdicts drawn from the model itself, with model_a's replies longer on average: raw win rates are off."""
    generator = np.random.default_rng(11)
    count = 20_000
    a, b = generator.normal(1300, 500, count), generator.normal(1000, 300, count)
    term = np.tanh((a - b) / (a - b).std(ddof=1))
    scores = (generator.random(count) < expit(quality + bias * term)).astype(float)
    found = length_controlled(scores, a, b)
    assert found.quality == pytest.approx(quality, abs=0.06)
    assert found.length == pytest.approx(bias, abs=0.12)
    assert found.win_rate == pytest.approx(expit(quality), abs=0.015)
    assert (scores.mean() - expit(quality) > 0.05) == (bias > 0)


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_a_judge_of_one_mind_and_replies_of_one_length_have_a_finite_answer(score: float) -> None:
    found = length_controlled(np.full(5, score), np.full(5, 9.0), np.full(5, 9.0))
    assert found.length == pytest.approx(0, abs=1e-9)
    assert found.win_rate == pytest.approx(score, abs=0.01)
    single = length_controlled(np.array([score]), np.array([3.0]), np.array([9.0]))
    assert 0 <= single.win_rate <= 1 and math.isfinite(single.quality)


def test_the_bootstrap_draws_questions_and_not_their_turns() -> None:
    """Both turns of a question have the same score: as turns, twice as much would seem to be known."""
    generator = np.random.default_rng(0)
    by_question = generator.random(40)
    scores = np.repeat(by_question, 2)

    def interval(questions: list[int]) -> tuple[float, float]:
        found = bootstrap_interval(
            lambda rows: float(scores[rows].mean()), questions, resamples=4000, confidence=0.95, seed=1
        )
        assert found is not None
        return found

    low, high = interval([row // 2 for row in range(80)])
    error = by_question.std() / math.sqrt(40)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.06)
    narrow_low, narrow_high = interval(list(range(80)))
    assert narrow_high - narrow_low == pytest.approx((high - low) / math.sqrt(2), rel=0.06)
    assert interval([row // 2 for row in range(80)]) == (low, high)


def test_the_bootstrap_takes_questions_of_several_sizes_whole() -> None:
    seen: list[tuple[int, ...]] = []

    def statistic(rows: np.ndarray) -> float:
        seen.append(tuple(rows.tolist()))
        return 0.0

    bootstrap_interval(statistic, ["p", "q", "p", "r"], resamples=100, confidence=0.9, seed=0)
    assert {rows.count(0) - rows.count(2) for rows in seen} == {0}
    assert {rows.count(0) + rows.count(1) + rows.count(3) for rows in seen} == {3}
    assert len(set(seen)) > 5


def test_equal_scores_have_no_interval_rather_than_one_of_no_width() -> None:
    settings = {"resamples": 100, "confidence": 0.95, "seed": 0}
    ties, lengths_a = np.full(6, 0.5), np.arange(6.0)
    assert bootstrap_interval(lambda rows: float(ties[rows].mean()), range(6), **settings) is None  # type: ignore[arg-type]
    fitted = bootstrap_interval(
        lambda rows: length_controlled(ties[rows], lengths_a[rows], np.ones(6)[rows]).win_rate,
        range(6),
        **settings,  # type: ignore[arg-type]
    )
    assert fitted is None


def test_kappa_worked_by_hand() -> None:
    """Ten comparisons. Equal: 6 of 10. Ours: 5 a, 3 b, 2 ties; theirs: 5 a, 3 b, 2 ties: chance .25 + .09 + .04 = .38.
    Kappa: (.6 - .38) / .62. Neither says tie in 7, of which 5 are equal."""
    ours = ["a", "a", "a", "a", "a", "b", "b", "b", "tie", "tie"]
    theirs = ["a", "a", "a", "b", "tie", "b", "b", "a", "tie", "a"]
    found = agreement(ours, theirs)
    assert (found.both, found.with_ties, found.decided) == (10, 0.6, 7)
    assert found.without_ties == pytest.approx(5 / 7)
    assert found.kappa == pytest.approx((0.6 - 0.38) / 0.62)


def test_agreement_has_no_figure_where_there_is_nothing_to_divide_by() -> None:
    nothing = agreement([], [])
    assert (nothing.both, nothing.with_ties, nothing.without_ties, nothing.kappa) == (0, None, None, None)
    alike = agreement(["tie", "tie"], ["tie", "tie"])
    assert (alike.with_ties, alike.decided, alike.without_ties, alike.kappa) == (1.0, 0, None, None)
    opposed = agreement(["a", "a"], ["b", "b"])
    assert (opposed.with_ties, opposed.kappa) == (0.0, 0.0)
