"""Compares head's times with base's: computes ratios and their intervals, and which ratios are more than noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
FALSE_DISCOVERIES = 1 - CONFIDENCE
LEAST_ROUNDS = 6
"""With fewer rounds the sign test has no interval with this CONFIDENCE."""


class Comparison(NamedTuple):
    """One case over all rounds."""

    case: str
    base_seconds: float
    head_seconds: float
    ratio: float
    """Median over the rounds of head's time over base's."""
    interval: tuple[float, float]
    """Confidence interval of the ratio, at the level CONFIDENCE."""
    beyond_noise: bool
    """Whether the sign test finds a difference, with a false discovery rate of FALSE_DISCOVERIES over all cases."""

    @property
    def verdict(self) -> str:
        if not self.beyond_noise:
            return "within the noise"
        return "slower" if self.ratio > 1 else "faster"


def compare(base: Mapping[str, Sequence[float]], head: Mapping[str, Sequence[float]]) -> list[Comparison]:
    """The figures of both sides, paired by round.

    A sign test is made on the logarithms of the ratios; the interval lies between two of the ratios. A case is beyond
    the noise if Benjamini and Hochberg's procedure over all cases accepts it.
    """
    if not base:
        return []
    logs = {case: np.log(np.divide(head[case], seconds)) for case, seconds in base.items()}
    tests = {case: stats.quantile_test(values, q=0.0, p=0.5) for case, values in logs.items()}
    adjusted = stats.false_discovery_control([test.pvalue for test in tests.values()])
    found = []
    for (case, test), p in zip(tests.items(), adjusted, strict=True):
        interval = test.confidence_interval(CONFIDENCE)
        found.append(
            Comparison(
                case,
                float(np.median(base[case])),
                float(np.median(head[case])),
                float(np.exp(np.median(logs[case]))),
                (float(np.exp(interval.low)), float(np.exp(interval.high))),
                bool(p <= FALSE_DISCOVERIES),
            )
        )
    return found
