"""Intervals for figures of tokens that come in groups.

The tokens of one pair, or of one answer, resemble each other: an interval that assumed independence would be far
too short. So whole groups are drawn with replacement, and a figure is computed again for each draw (Efron and
Tibshirani 1993, chapter 8). Draws are seeded: the same data give the same interval.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = ["Estimate", "estimate", "mean_estimate"]

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0
BATCH = 200
"""Draws computed at a time, so that memory stays small with many groups."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Estimate:
    """A figure, its percentile interval of the bootstrap over groups (95 %), and the number of groups.

    interval: None where it is not defined: for a single group, or if the figure of a draw is not defined.
    """

    value: float
    interval: tuple[float, float] | None
    groups: int


def estimate(
    statistic: Callable[[Array], float],
    groups: int,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> Estimate:
    """`statistic` of all groups and its interval; it is given the indices of groups, repeated as they were drawn."""
    indices = np.arange(groups)
    interval = _interval((indices,), statistic, vectorized=False, resamples=resamples, confidence=confidence, seed=seed)
    return Estimate(float(statistic(indices)), interval, groups)


def mean_estimate(values_N: npt.ArrayLike, group_N: npt.ArrayLike) -> Estimate | None:
    """The mean of values that belong to groups, all values with equal weight.

    Args:
        values_N: (N,) numbers.
        group_N: (N,) integers, the group of each value. Groups without a value are not drawn.

    Returns:
        The mean and its interval; None without values.
    """
    values, (_, group) = np.asarray(values_N, dtype=np.float64), np.unique(np.asarray(group_N), return_inverse=True)
    if not len(values):
        return None
    sums, counts = np.bincount(group, weights=values), np.bincount(group)

    def mean(sums: Array, counts: Array, axis: int = -1) -> Array:
        return np.asarray(sums.sum(axis=axis) / counts.sum(axis=axis))

    return Estimate(float(mean(sums, counts)), _interval((sums, counts), mean, vectorized=True), len(sums))


def _interval(
    data: tuple[Array, ...],
    statistic: Any,
    *,
    vectorized: bool,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> tuple[float, float] | None:
    if len(data[0]) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # of draws without a value, which give None below
        found = stats.bootstrap(
            data,
            statistic,
            paired=True,
            vectorized=vectorized,
            n_resamples=resamples,
            batch=BATCH,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    return None if math.isnan(low) or math.isnan(high) else (low, high)
