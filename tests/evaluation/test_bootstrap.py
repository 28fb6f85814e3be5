"""Intervals over groups: reproducible, and of whole groups, not of the values in them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tlcr.evaluation.bootstrap import Estimate, estimate, mean_estimate


def test_a_mean_weighs_every_value_the_same_and_counts_the_groups() -> None:
    found = mean_estimate([1, 1, 1, 0], [7, 7, 7, 3])
    assert found is not None
    assert (found.value, found.groups) == (0.75, 2)


def test_two_groups_give_the_three_draws_that_there_are() -> None:
    """Both first, both second, or one of each: means 0, 1 and a half, so that the interval is all of [0, 1]."""
    assert mean_estimate([0, 0, 1, 1], [0, 0, 1, 1]) == Estimate(0.5, (0.0, 1.0), 2)


def test_the_same_data_give_the_same_interval_and_other_data_another() -> None:
    rng = np.random.default_rng(1)
    values, groups = rng.normal(size=300), np.repeat(np.arange(30), 10)
    first = mean_estimate(values, groups)
    assert first == mean_estimate(values, groups)
    assert first != mean_estimate(values[::-1], groups)


def test_tokens_of_one_group_are_not_taken_for_independent() -> None:
    rng = np.random.default_rng(2)
    values, groups = np.repeat(rng.normal(size=30), 10), np.repeat(np.arange(30), 10)
    by_group, by_value = mean_estimate(values, groups), mean_estimate(values, np.arange(300))
    assert by_group is not None and by_value is not None and by_group.interval and by_value.interval
    widths = [high - low for low, high in (by_group.interval, by_value.interval)]
    # ten copies of each value: the deviation of the mean is larger by the root of ten
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(10), rel=0.1)


def test_the_interval_of_a_mean_has_the_width_that_theory_gives() -> None:
    values = np.random.default_rng(3).normal(size=400)
    found = mean_estimate(values, np.arange(400))
    assert found is not None and found.interval is not None
    assert found.interval[1] - found.interval[0] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)


def test_one_group_has_no_interval_and_no_value_no_estimate() -> None:
    assert mean_estimate([0.2, 0.4], [5, 5]) == Estimate(pytest.approx(0.3), None, 1)  # type: ignore[arg-type]
    assert mean_estimate([], []) is None


def test_any_statistic_of_the_drawn_groups() -> None:
    values = np.array([1.0, 2.0, 9.0])
    found = estimate(lambda drawn: float(np.median(values[drawn])), 3)
    assert (found.value, found.interval) == (2.0, (1.0, 9.0))
    assert estimate(lambda drawn: float(np.median(values[drawn])), 3) == found


def test_a_statistic_that_some_draws_do_not_have_leaves_the_interval_out() -> None:
    found = estimate(lambda drawn: math.nan if len(set(drawn)) == 1 else 1.0, 2)
    assert (found.value, found.interval) == (1.0, None)
