"""What verdicts come to: win rates with intervals, at equal length too, and agreement.

A win of model_a is 1 point, a tie 1/2, a loss 0. Turns of one conversation are not independent, so intervals take
questions, not turns, for what was drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score

from tlcr.evaluation.bootstrap import estimate

__all__ = [
    "Agreement",
    "LengthControlled",
    "agreement",
    "bootstrap_interval",
    "length_controlled",
    "wilson_interval",
]

Array = NDArray[np.float64]
Interval = tuple[float, float]

INVERSE_PENALTY = 1e4
"""Weight of the data against half the squared coefficients, which are there so that a judge who always finds for one
side has a finite coefficient; on twenty comparisons it moves a win rate in the fifth decimal."""


@dataclass(frozen=True)
class LengthControlled:
    """A win rate at equal length, and the regression that it comes from.

    quality: log-odds of a win at equal length. length: log-odds that a standardised length difference is worth, at
    tanh = 1.
    """

    win_rate: float
    quality: float
    length: float


@dataclass(frozen=True)
class Agreement:
    """How far two judges of the same answers agree.

    with_ties: share of equal verdicts. without_ties: the same where neither says tie. kappa: Cohen's, with ties as a
    verdict like others; 1 is perfect, 0 what chance gives. None where there is nothing to divide by.
    """

    both: int
    with_ties: float | None
    decided: int
    without_ties: float | None
    kappa: float | None


def wilson_interval(mean: float, count: int, confidence: float) -> Interval:
    """Wilson's score interval (1927) for the mean of ``count`` independent outcomes in [0, 1].

        (m + z^2 / 2n +- z sqrt(m (1 - m) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Exact in form for wins and losses. Scores between 0 and 1 vary less than wins and losses of the same mean, so with
    ties it is on the wide side. Unlike the bootstrap it does not shrink to a point where every outcome is the same.
    """
    z = float(norm.ppf((1 + confidence) / 2))
    centre = mean + z * z / (2 * count)
    half = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def length_controlled(points: Array, lengths_a: Array, lengths_b: Array) -> LengthControlled:
    """The win rate that model_a would have if its replies were as long as model_b's (Dubois et al. 2024).

        P(win) = sigmoid(quality + length * tanh((l_a - l_b) / s)),   s the sample standard deviation of l_a - l_b

    fitted to the points (a tie counts half as a win, half as a loss); the win rate is sigmoid(quality). AlpacaEval's
    third term, the difficulty of each of its instructions, needs its own data and is left out. One comparison or more;
    all arrays (N,).
    """
    difference = lengths_a - lengths_b
    deviation = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
    term = np.tanh(difference / deviation) if deviation > 0 else np.zeros_like(difference)
    # Every comparison is there as a win and as a loss, weighted by its points; the constant is a column like the other.
    columns = np.tile(np.stack([np.ones_like(term), term], axis=1), (2, 1))
    outcomes = np.repeat([1, 0], len(points))
    model = LogisticRegression(C=INVERSE_PENALTY, fit_intercept=False, tol=1e-8, max_iter=1000)
    model.fit(columns, outcomes, sample_weight=np.concatenate([points, 1 - points]))
    quality, length = (float(coefficient) for coefficient in model.coef_[0])
    return LengthControlled(float(expit(quality)), quality, length)


def bootstrap_interval(
    statistic: Callable[[NDArray[np.intp]], float],
    questions: Sequence[Hashable],
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> Interval | None:
    """Percentile bootstrap (Efron 1979) of a statistic of rows, drawing whole questions with replacement.

    statistic: takes the indices of rows, some of them several times. questions: which question each row belongs to.
    None where no resample differs from another, all outcomes being equal, say: the bootstrap then knows no error, which
    is not to say that there is none.
    """
    rows: dict[Hashable, list[int]] = {}
    for row, question in enumerate(questions):
        rows.setdefault(question, []).append(row)
    groups = list(rows.values())
    interval = estimate(
        lambda drawn: statistic(np.concatenate([groups[group] for group in drawn]).astype(np.intp)),
        len(groups),
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    ).interval
    return None if interval is None or interval[1] - interval[0] < 1e-9 else interval


def agreement(ours: Sequence[str], theirs: Sequence[str]) -> Agreement:
    """Agreement of two lists of verdicts on the same comparisons, "tie" among the verdicts."""
    pairs = list(zip(ours, theirs, strict=True))
    decided = [(our, their) for our, their in pairs if "tie" not in (our, their)]
    # Where both always say the same one thing, chance would do so too: kappa is 0 / 0.
    varied = len({*ours, *theirs}) > 1
    return Agreement(
        both=len(pairs),
        with_ties=_share(pairs),
        decided=len(decided),
        without_ties=_share(decided),
        kappa=float(cohen_kappa_score(list(ours), list(theirs))) if varied else None,
    )


def _share(pairs: Sequence[tuple[str, str]]) -> float | None:
    return sum(our == their for our, their in pairs) / len(pairs) if pairs else None
