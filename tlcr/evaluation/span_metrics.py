"""How well a score for every token finds the errors that people marked in answers.

Everything here takes tokens that are already scored and marked; no model runs. A score is higher where an error is
likelier: for a reward, its negative.

Tokens of one answer are no independent draws, so that intervals are taken over answers (the bootstrap of Efron 1979):
whole answers are drawn with replacement, and an interval holds the middle 95 % of what the draws give. The same draws
serve every score of the same tokens, so that two scores can be compared draw by draw.

Axes: N tokens of many answers, A answers, R draws of answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlcr.errors import DataError, ShapeError
from tlcr.types import ErrorSpan

__all__ = ["Figure", "MarkedTokens", "SpanEvaluation", "best_threshold", "difference", "evaluate_spans", "is_in_span"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

RESAMPLES = 1000
"""Draws of answers: the ends of a 95 % interval are then the 25th lowest and highest (ours)."""
COVERAGE = 0.95


def is_in_span(start: int, end: int, text: str, spans: Sequence[ErrorSpan]) -> bool:
    """Whether the token that writes the characters [start, end) of ``text`` counts as part of one of the spans.

    It does where the spans hold at least half of its characters that are not white space (of all of its characters,
    where it is nothing but white space). A byte-pair token brings the space before its word along, which people leave
    out of a span that begins with the word; and a span that ends inside a word has the tokens that it mostly holds.
    A token without characters is never in a span. Source: ours.

    Args:
        start: the token's first character.
        end: the first character after it.
        text: the answer.
        spans: the marked errors.

    Returns:
        True where the token is in a span.
    """
    characters = [k for k in range(start, end) if not text[k].isspace()] or range(start, end)
    inside = sum(any(span.start <= k < span.end for span in spans) for k in characters)
    return 2 * inside >= len(characters) > 0


@dataclass(frozen=True)
class MarkedTokens:
    """The tokens of many answers, flattened answer by answer, and which of them people marked.

    error_N: whether the token is in any span. kinds: for every kind of error, whether it is in a span of that kind.
    answer_N: the number of its answer, from 0 to answers - 1; an answer may have no token.
    """

    error_N: Bools
    kinds: Mapping[str, Bools]
    answer_N: NDArray[np.int64]
    answers: int


@dataclass(frozen=True)
class Figure:
    """A number and its 95 % interval; None where it is not defined, such as a ROC-AUC without errors."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class SpanEvaluation:
    """What `evaluate_spans` found: the figures by name, and each in every draw of answers (R,), for `difference`."""

    counts: dict[str, int]
    threshold: float | None
    figures: dict[str, Figure]
    draws: dict[str, Floats] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a JSON file; the draws stay behind."""
        figures = {name: vars(figure) for name, figure in self.figures.items()}
        return {"counts": self.counts, "threshold": self.threshold, "figures": figures}


def best_threshold(error_N: Bools, score_N: Floats) -> float:
    """The threshold with the highest F1 where tokens above it are called errors; of equal ones, the highest.

    Args:
        error_N: bool (N,), True where a token is an error.
        score_N: (N,), higher where an error is likelier.

    Returns:
        The next lower score, or a value below all of them. For a constant score every token is called an error.

    Raises:
        DataError: no token is an error.
    """
    if not error_N.any():
        raise DataError(
            "no token of the answers to choose a threshold on is marked as an error; give some that people marked"
        )
    ranking = _Ranking(error_N, score_N)
    right, wrong = ranking.counts(np.ones(len(score_N)))
    f1 = 2 * right / (right + wrong + error_N.sum())
    best = int(np.argmax(f1))  # the first of equal ones
    lower = ranking.distinct[best + 1 :]
    return float(lower[0] if len(lower) else np.nextafter(ranking.distinct[best], -np.inf))


def evaluate_spans(
    tokens: MarkedTokens, score_N: Floats, *, threshold: float | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> SpanEvaluation:
    """Figures over all tokens, with intervals over answers. A token is called an error where its score is above a cut.

    - share: of the tokens, those that are errors: the average precision of a random score.
    - auc, average_precision: does the score put errors before the other tokens? As in scikit-learn.
    - precision, recall, f1: at the cut 0, where a reward changes its sign. precision_at_threshold and so on: at
      ``threshold``.
    - auc_per_answer, f1_per_answer, f1_per_answer_at_threshold: the mean over answers of each one's own figure, over
      answers with an error and (for the AUC) another token. Where the AUC over all tokens is far higher, the score
      tells bad answers from good ones rather than bad tokens from good ones.
    - share/<kind>, auc/<kind>, recall/<kind>, recall_at_threshold/<kind>: of the errors of one kind. The AUC is against
      the tokens that are in no span at all; the recall of other kinds does not enter.
    - counts: tokens, errors, answers, answers_with_errors.

    A figure that a draw does not define (no error of a rare kind is in it) is left out of that figure's interval.

    Args:
        tokens: which tokens are errors, of what kind, and in which answer.
        score_N: (N,), higher where an error is likelier.
        threshold: a cut that does not come from these tokens (``best_threshold`` of others); None: no such figures.
        resamples: draws of whole answers.
        seed: of the draws.

    Returns:
        The figures.

    Raises:
        ShapeError: there is not one score a token.
        DataError: a score is not finite, or there is no token.
    """
    _check(tokens, score_N)
    error_N, answer_N, A = tokens.error_N, tokens.answer_N, tokens.answers
    rng = np.random.default_rng(seed)
    # The first row is the answers as they are, the others are draws.
    weight_RA = np.vstack([np.ones(A), rng.multinomial(A, np.full(A, 1 / A), size=resamples)]).astype(np.float64)

    def per_answer(chosen_N: Bools) -> Floats:
        return np.bincount(answer_N[chosen_N], minlength=A).astype(np.float64)

    tokens_A, errors_A = per_answer(np.ones_like(error_N)), per_answer(error_N)
    rows: dict[str, Floats] = {"share": _ratio(weight_RA @ errors_A, weight_RA @ tokens_A)}
    rows["auc"], rows["average_precision"] = _ranked(error_N, score_N, answer_N, weight_RA)
    cuts = {"": 0.0} if threshold is None else {"": 0.0, "_at_threshold": threshold}
    for suffix, cut in cuts.items():
        called_N = score_N > cut
        hits_A, called_A = per_answer(called_N & error_N), per_answer(called_N)
        hits_R, called_R, errors_R = (weight_RA @ counts_A for counts_A in (hits_A, called_A, errors_A))
        rows[f"precision{suffix}"] = _ratio(hits_R, called_R)
        rows[f"recall{suffix}"] = _ratio(hits_R, errors_R)
        rows[f"f1{suffix}"] = _ratio(2 * hits_R, called_R + errors_R)
        own_f1_A = np.where(errors_A > 0, _ratio(2 * hits_A, called_A + errors_A), np.nan)
        rows[f"f1_per_answer{suffix}"] = _mean(own_f1_A, weight_RA)
    own_auc_A = np.full(A, np.nan)
    for a in np.unique(answer_N):
        own = answer_N == a
        own_auc_A[a] = _ranked(error_N[own], score_N[own], np.zeros(own.sum(), dtype=np.int64), np.ones((1, 1)))[0][0]
    rows["auc_per_answer"] = _mean(own_auc_A, weight_RA)
    for kind, kind_N in sorted(tokens.kinds.items()):
        compared_N = kind_N | ~error_N
        rows[f"share/{kind}"] = _ratio(weight_RA @ per_answer(kind_N), weight_RA @ tokens_A)
        rows[f"auc/{kind}"] = _ranked(kind_N[compared_N], score_N[compared_N], answer_N[compared_N], weight_RA)[0]
        for suffix, cut in cuts.items():
            hits_A = per_answer(kind_N & (score_N > cut))
            rows[f"recall{suffix}/{kind}"] = _ratio(weight_RA @ hits_A, weight_RA @ per_answer(kind_N))
    counts = {
        "tokens": len(error_N),
        "errors": int(error_N.sum()),
        "answers": A,
        "answers_with_errors": int((errors_A > 0).sum()),
    }
    figures = {name: _figure(row_R[0], row_R[1:]) for name, row_R in rows.items()}
    return SpanEvaluation(counts, threshold, figures, {name: row_R[1:] for name, row_R in rows.items()})


def difference(one: SpanEvaluation, other: SpanEvaluation, name: str) -> Figure:
    """By how much a figure of ``one`` is above that of ``other``, of the same tokens, in the same draws of answers.

    Args:
        one: an evaluation.
        other: another one, of the same tokens.
        name: the figure.

    Returns:
        The difference and its interval.

    Raises:
        DataError: the two are not of the same tokens, or draws.
    """
    if one.counts != other.counts or len(one.draws[name]) != len(other.draws[name]):
        raise DataError(f"the two evaluations are not of the same tokens: {one.counts} and {other.counts}")
    values = one.figures[name].value, other.figures[name].value
    if values[0] is None or values[1] is None:
        return Figure(None, None, None)
    return _figure(values[0] - values[1], one.draws[name] - other.draws[name])


def _check(tokens: MarkedTokens, score_N: Floats) -> None:
    if score_N.shape != tokens.error_N.shape:
        raise ShapeError(f"scores have shape {score_N.shape}; wanted {tokens.error_N.shape}, one for each token")
    if len(score_N) == 0:
        raise DataError("there is no token to evaluate: every answer is empty")
    if not np.isfinite(score_N).all():
        first = int(np.argmin(np.isfinite(score_N)))
        raise DataError(f"the score of token {first} of answer {tokens.answer_N[first]} is {score_N[first]}, no number")


class _Ranking:
    """Tokens sorted once by their score, the highest first, to be weighed many times."""

    def __init__(self, error_N: Bools, score_N: Floats) -> None:
        self._order_N = np.argsort(-score_N, kind="stable")
        self._error_N = error_N[self._order_N]
        sorted_N = score_N[self._order_N]
        # Tokens of equal score are passed together: there is no order among them.
        self._last = (
            np.flatnonzero(np.append(sorted_N[1:] != sorted_N[:-1], True)) if len(score_N) else np.array([], int)
        )
        self.distinct = sorted_N[self._last]

    def counts(self, weight_N: Floats) -> tuple[Floats, Floats]:
        """For each distinct score, the errors and the other tokens (by weight) with that score or a higher one."""
        sorted_N = weight_N[self._order_N]
        right, wrong = np.cumsum(sorted_N * self._error_N), np.cumsum(sorted_N * ~self._error_N)
        return right[self._last], wrong[self._last]


def _ranked(error_N: Bools, score_N: Floats, answer_N: NDArray[np.int64], weight_RA: Floats) -> tuple[Floats, Floats]:
    """ROC-AUC and average precision (R,) for every row of weights; scikit-learn's, at a hundredth of its time."""
    ranking = _Ranking(error_N, score_N)
    auc_R, precision_R = np.full(len(weight_RA), np.nan), np.full(len(weight_RA), np.nan)
    for r, weight_A in enumerate(weight_RA):
        right, wrong = ranking.counts(weight_A[answer_N])
        if not len(right) or right[-1] == 0:
            continue
        recall = np.append(0.0, right / right[-1])
        # A draw may have no token with the highest score: nothing is found there, and the precision does not count.
        precision_R[r] = np.diff(recall) @ _ratio(right, right + wrong, empty=0.0)
        if wrong[-1] > 0:
            false_alarms = np.append(0.0, wrong / wrong[-1])
            auc_R[r] = np.diff(false_alarms) @ (recall[1:] + recall[:-1]) / 2
    return auc_R, precision_R


def _ratio(numerator: Floats, denominator: Floats, *, empty: float = np.nan) -> Floats:
    return np.divide(numerator, denominator, out=np.full(len(numerator), empty), where=denominator > 0)


def _mean(value_A: Floats, weight_RA: Floats) -> Floats:
    """The weighted mean (R,) over the answers that have a value."""
    defined_A = ~np.isnan(value_A)
    return _ratio(weight_RA[:, defined_A] @ value_A[defined_A], weight_RA[:, defined_A].sum(axis=1))


def _figure(value: float, draws_R: Floats) -> Figure:
    if np.isnan(value):
        return Figure(None, None, None)
    defined_R = draws_R[~np.isnan(draws_R)]
    if not len(defined_R):
        return Figure(float(value), None, None)
    low, high = np.quantile(defined_R, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Figure(float(value), float(low), float(high))
