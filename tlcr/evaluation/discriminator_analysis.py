"""What a discriminator gets right and where: by kind of edit, by position, near edits, and over whole answers.

Everything here takes labels and rewards of tokens that a model has scored already; no model runs. A reward is
p(positive) - p(negative) at the calibrated temperature. It is right about an edited token where its sign is that of the
label: below 0 for removed tokens, above 0 for inserted ones. Intervals are over pairs (bootstrap.py).

Axes: N counted tokens of all answers, in the order of `predict_tokens`; K tokens that an edit kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn.metrics import roc_auc_score

from tlcr.evaluation.bootstrap import Estimate, estimate, mean_estimate
from tlcr.types import LabelledAnswer, LabelledPair

__all__ = [
    "AnalysedTokens",
    "AnswerComparison",
    "Cell",
    "KindRow",
    "PlaceRow",
    "SpillRow",
    "TokenPlace",
    "analysed_tokens",
    "by_absolute_position",
    "by_kind",
    "by_relative_position",
    "compare_answers",
    "edit_structure",
    "rewards_by_answer",
    "spill",
]

Kind = Literal["substitution", "deletion", "insertion", "kept", "end moved", "end kept"]
KINDS: tuple[Kind, ...] = ("substitution", "deletion", "insertion", "kept", "end moved", "end kept")
FIFTHS = 5
FIRST_EDGES = (0, 8, 16)
"""Bins of absolute positions begin here, and then at each doubling."""
DISTANCES = ((None, -4), (-3, -3), (-2, -2), (-1, -1), (1, 1), (2, 2), (3, 3), (4, 4), (5, 8), (9, None))
"""Bins of distances from an edit, both ends included."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
HISTOGRAM_BINS = 24

Array = npt.NDArray[Any]


# ---- the edit around a token


@dataclass(frozen=True)
class TokenPlace:
    """What an edit did to one token, and the token's position among the kept ones.

    kept: its number among the kept tokens, counted from 0; the same on both sides. distance: from a kept token to the
    last edit before it, counted in kept tokens (1: right after it); where nothing before it was edited, minus the
    distance to the first edit (-1: right before it). Both are None for other tokens, the distance also where nothing
    was edited.
    """

    kind: Kind
    kept: int | None = None
    distance: int | None = None


def edit_structure(
    rejected_labels: Sequence[int], revised_labels: Sequence[int]
) -> tuple[list[TokenPlace], list[TokenPlace]]:
    """What the labels of a whole pair, without its end-of-sequence tokens, say of each token.

    The kept tokens of both sides are the same in the same order; between two of them lie n tokens that were taken away
    and m that were put in. Of a minimal script min(n, m) are substitutions, and by the tie rule of ``ops.token_labels``
    they are the first of each side; what is left over was deleted or inserted.

    Args:
        rejected_labels: labels of the rejected answer.
        revised_labels: labels of its revision.

    Returns:
        One place for each token of either side.

    Raises:
        ValueError: the two sides have not as many kept tokens.
    """
    gaps = [_edited_between_kept(labels) for labels in (rejected_labels, revised_labels)]
    if len(gaps[0]) != len(gaps[1]):
        raise ValueError(
            f"rejected_labels keep {len(gaps[0]) - 1} tokens and revised_labels {len(gaps[1]) - 1}; wanted the labels "
            "of one alignment, whole and without end-of-sequence tokens"
        )
    edited = [place for place, (taken, put_in) in enumerate(zip(*gaps, strict=True)) if taken or put_in]
    sides: tuple[list[TokenPlace], list[TokenPlace]] = ([], [])
    left_over: tuple[Kind, Kind] = ("deletion", "insertion")
    for kept, both in enumerate(zip(*gaps, strict=True)):
        for places, count, over in zip(sides, both, left_over, strict=True):
            places += [TokenPlace("substitution" if i < min(both) else over) for i in range(count)]
            if kept < len(gaps[0]) - 1:
                places.append(TokenPlace("kept", kept, _distance(kept, edited)))
    return sides


def _edited_between_kept(labels: Sequence[int]) -> list[int]:
    """How many edited tokens stand before the first kept one, between each two, and after the last."""
    gaps = [0]
    for label in labels:
        if label == 0:
            gaps.append(0)
        else:
            gaps[-1] += 1
    return gaps


def _distance(kept: int, edited: Sequence[int]) -> int | None:
    """edited: the gaps with an edit, gap k right before kept token k."""
    if not edited:
        return None
    before = [gap for gap in edited if gap <= kept]
    return kept - before[-1] + 1 if before else kept - edited[0]


@dataclass(frozen=True)
class AnalysedTokens:
    """Every counted token of labelled pairs, flat, each field (N,).

    pair: number of the pair. revised: 1 on the revised side, else 0. kind: index into `KINDS`. label: -1, 0, 1.
    reward: in [-1, 1].
    position: from 0, in the answer. length: tokens of the answer as far as it is kept, end of sequence aside.
    kept, distance: see `TokenPlace`; -1 and 0 where that has None.
    """

    pair: Array
    revised: Array
    kind: Array
    label: Array
    reward: Array
    position: Array
    length: Array
    kept: Array
    distance: Array

    def where(self, chosen_N: Array) -> AnalysedTokens:
        return AnalysedTokens(*(field[chosen_N] for field in vars(self).values()))


def analysed_tokens(
    pairs: Sequence[LabelledPair], whole: Sequence[LabelledPair], rewards_N: npt.ArrayLike
) -> AnalysedTokens:
    """Puts rewards together with what the edits did.

    Args:
        pairs: the labelled edits that were scored.
        whole: the same pairs, labelled without a limit of length, because only a whole alignment tells a substitution
            from a deletion.
        rewards_N: (N,) rewards, in the order of ``predict_tokens(pairs)``.

    Returns:
        Every counted token with its reward and its place.

    Raises:
        ValueError: there is not one reward for each counted token.
    """
    parts = [[np.empty(0, dtype=np.int64)] * len(_FIELDS)]
    for number, (pair, uncut) in enumerate(zip(pairs, whole, strict=True)):
        structure = edit_structure(uncut.rejected.labels[:-1], uncut.revised.labels[:-1])
        for answer, places in zip((pair.rejected, pair.revised), structure, strict=True):
            parts.append(_of_answer(number, answer, places))
    fields = {name: np.concatenate(part) for name, part in zip(_FIELDS, zip(*parts, strict=True), strict=True)}
    reward_N = np.asarray(rewards_N, dtype=np.float64)
    if len(reward_N) != len(fields["pair"]):
        raise ValueError(
            f"{len(reward_N)} rewards came with {len(fields['pair'])} counted tokens; score these very pairs"
        )
    return AnalysedTokens(reward=reward_N, **fields)


_FIELDS = ("pair", "revised", "kind", "label", "position", "length", "kept", "distance")


def _of_answer(number: int, answer: LabelledAnswer, places: Sequence[TokenPlace]) -> list[Array]:
    """The fields of one answer's counted tokens. places: of the whole answer."""
    total = len(answer.labels)
    length = total - answer.encoded.complete
    end = TokenPlace("end moved" if answer.labels and answer.labels[-1] else "end kept")
    own = [*places[:length], end] if answer.encoded.complete else places[:length]
    columns = (
        [number] * total,
        [answer.side == "revised"] * total,
        [KINDS.index(place.kind) for place in own],
        answer.labels,
        range(total),
        [length] * total,
        [-1 if place.kept is None else place.kept for place in own],
        [place.distance or 0 for place in own],
    )
    counted = np.array(answer.counted, dtype=bool)
    return [np.array(column, dtype=np.int64)[counted] for column in columns]


# ---- figures of tokens


@dataclass(frozen=True)
class Cell:
    """Some tokens of some pairs: their mean reward and, of those that are edited, the share on the right side of 0."""

    tokens: int
    pairs: int
    mean_reward: Estimate | None
    accuracy: Estimate | None


def cell(tokens: AnalysedTokens) -> Cell:
    edited = tokens.where(tokens.label != 0)
    return Cell(
        tokens=len(tokens.pair),
        pairs=len(np.unique(tokens.pair)),
        mean_reward=mean_estimate(tokens.reward, tokens.pair),
        accuracy=mean_estimate(edited.reward * edited.label > 0, edited.pair),
    )


@dataclass(frozen=True)
class KindRow:
    """The tokens to which an edit did one kind of thing.

    auc_kept: ROC-AUC of these tokens against those that the edit kept on the same side, by their reward (its negative
    on the rejected side): whether they can be found, not only told from the other side's.
    """

    side: Literal["rejected", "revised"]
    kind: Kind
    cell: Cell
    auc_kept: float | None


def by_kind(tokens: AnalysedTokens) -> tuple[KindRow, ...]:
    """A row for each kind that occurs, first of the rejected side, in the order of `KINDS`."""
    rows = []
    sides: tuple[tuple[Literal["rejected", "revised"], int], ...] = (("rejected", -1), ("revised", 1))
    for side, sign in sides:
        on_side = tokens.where(tokens.revised == (side == "revised"))
        kept = on_side.where(on_side.kind == KINDS.index("kept"))
        for index, kind in enumerate(KINDS):
            own = on_side.where(on_side.kind == index)
            if not len(own.pair):
                continue
            auc = None
            if own.label.any() and len(kept.pair):
                is_own = np.repeat([True, False], [len(own.pair), len(kept.pair)])
                auc = float(roc_auc_score(is_own, sign * np.concatenate([own.reward, kept.reward])))
            rows.append(KindRow(side, kind, cell(own), auc))
    return tuple(rows)


@dataclass(frozen=True)
class PlaceRow:
    """The tokens between two places of their answers (`first` to `last`, both included), by label."""

    first: int
    last: int
    negative: Cell
    kept: Cell
    positive: Cell


def by_relative_position(tokens: AnalysedTokens) -> tuple[PlaceRow, ...]:
    """By fifths of the answer, 0 to 4: token t of n is in fifth 5 t // n. End-of-sequence tokens are left out."""
    inside = tokens.where(tokens.position < tokens.length)
    fifth_N = FIFTHS * inside.position // np.maximum(inside.length, 1)
    return tuple(_place_row(inside, fifth_N, fifth, fifth) for fifth in range(FIFTHS))


def by_absolute_position(tokens: AnalysedTokens) -> tuple[PlaceRow, ...]:
    """By the number of tokens of the answer before the token: 0 to 7, 8 to 15, 16 to 31, 32 to 63 and so on."""
    inside = tokens.where(tokens.position < tokens.length)
    last = int(inside.position.max(initial=0))
    edges = [*FIRST_EDGES]
    while edges[-1] <= last:
        edges.append(2 * edges[-1])
    rows = (_place_row(inside, inside.position, first, after - 1) for first, after in pairwise(edges))
    return tuple(row for row in rows if row.first <= last)


def _place_row(tokens: AnalysedTokens, place_N: Array, first: int, last: int) -> PlaceRow:
    here = tokens.where((place_N >= first) & (place_N <= last))
    negative, kept, positive = (cell(here.where(here.label == label)) for label in (-1, 0, 1))
    return PlaceRow(first, last, negative, kept, positive)


@dataclass(frozen=True)
class SpillRow:
    """Kept tokens at some distance from an edit (`first` to `last`, both included; None: without bound).

    rejected, revised: the mean reward of these tokens in either answer. difference: of the revised answer minus the
    rejected one, token by token: the same token, so that what differs is the edit before it, or, to a model that looks
    ahead, after it.
    """

    first: int | None
    last: int | None
    tokens: int
    rejected: Estimate
    revised: Estimate
    difference: Estimate


def spill(tokens: AnalysedTokens) -> tuple[SpillRow, ...]:
    """How far the reward of an edit reaches to tokens that the edit kept: ``TokenPlace.distance`` says how they lie.

    Over tokens that count on both sides. A causal model says the same of a token before the first edit twice, so that
    its differences at negative distances are 0.

    Args:
        tokens: every counted token with its reward and its place.

    Returns:
        One row for each distance.
    """
    kept = tokens.where((tokens.kept >= 0) & (tokens.distance != 0))
    sides = [kept.where(kept.revised == revised) for revised in (0, 1)]
    widest = int(kept.kept.max(initial=0)) + 1
    in_one, in_other = (side.pair * widest + side.kept for side in sides)
    _, in_rejected, in_revised = np.intersect1d(in_one, in_other, assume_unique=True, return_indices=True)
    rejected, revised = sides[0].where(in_rejected), sides[1].where(in_revised)
    rows = []
    for first, last in DISTANCES:
        low, high = -math.inf if first is None else first, math.inf if last is None else last
        here = (rejected.distance >= low) & (rejected.distance <= high)
        pair_K, before_K, after_K = rejected.pair[here], rejected.reward[here], revised.reward[here]
        means = [mean_estimate(values, pair_K) for values in (before_K, after_K, after_K - before_K)]
        if means[0] is not None and means[1] is not None and means[2] is not None:
            rows.append(SpillRow(first, last, len(pair_K), means[0], means[1], means[2]))
    return tuple(rows)


# ---- figures of answers


@dataclass(frozen=True)
class AnswerComparison:
    """Two answers to each prompt, one known to be better, compared by their mean token reward.

    accuracy: share of pairs whose better answer has the higher mean, a tie counting half. accuracy_longer, _shorter,
    _same: the same where the better answer has more, fewer or as many tokens. length_accuracy: of calling the longer
    answer better. better, worse: mean of the mean rewards; quantiles at `QUANTILES`; histogram: counts in equal bins
    from `low` to `high`. correlation_mean, correlation_sum: Spearman's between the number of tokens of an answer and
    the mean (the sum) of its rewards, over all answers; None where one of them is constant.
    """

    pairs: int
    accuracy: Estimate | None
    accuracy_longer: Estimate | None
    accuracy_shorter: Estimate | None
    accuracy_same: Estimate | None
    length_accuracy: Estimate | None
    better: Estimate | None
    worse: Estimate | None
    better_quantiles: tuple[float, ...]
    worse_quantiles: tuple[float, ...]
    low: float
    high: float
    better_histogram: tuple[int, ...]
    worse_histogram: tuple[int, ...]
    correlation_mean: Estimate | None
    correlation_sum: Estimate | None


def compare_answers(better: Sequence[Sequence[float]], worse: Sequence[Sequence[float]]) -> AnswerComparison | None:
    """Compares whole answers by the mean reward of their tokens; an answer without tokens has mean 0, as everywhere.

    Args:
        better: token rewards of the better answer of each pair.
        worse: token rewards of the worse one.

    Returns:
        The comparison; None without pairs.
    """
    if not better:
        return None
    pairs = np.arange(len(better))
    lengths, sums = (
        np.array([[measure(rewards) for rewards in side] for side in (better, worse)], dtype=np.float64)
        for measure in (len, math.fsum)
    )
    means = sums / np.maximum(lengths, 1)
    right = _ahead(means)
    longer = np.sign(lengths[0] - lengths[1])
    edges = np.histogram_bin_edges(means, bins=HISTOGRAM_BINS)
    quantiles = [tuple(np.quantile(side, QUANTILES).tolist()) for side in means]
    histograms = [tuple(np.histogram(side, bins=edges)[0].tolist()) for side in means]
    accuracy = {sign: mean_estimate(right[longer == sign], pairs[longer == sign]) for sign in (1, -1, 0)}
    return AnswerComparison(
        pairs=len(pairs),
        accuracy=mean_estimate(right, pairs),
        accuracy_longer=accuracy[1],
        accuracy_shorter=accuracy[-1],
        accuracy_same=accuracy[0],
        length_accuracy=mean_estimate(_ahead(lengths), pairs),
        better=mean_estimate(means[0], pairs),
        worse=mean_estimate(means[1], pairs),
        better_quantiles=quantiles[0],
        worse_quantiles=quantiles[1],
        low=float(edges[0]),
        high=float(edges[-1]),
        better_histogram=histograms[0],
        worse_histogram=histograms[1],
        correlation_mean=_correlation(lengths, means),
        correlation_sum=_correlation(lengths, sums),
    )


def _ahead(values: Array) -> Array:
    """1 where the first row is ahead of the second, 0 where it is behind, a half for a tie."""
    return np.asarray((1 + np.sign(values[0] - values[1])) / 2)


def _correlation(lengths: Array, values: Array) -> Estimate | None:
    def spearman(drawn: Array) -> float:
        ranks = [stats.rankdata(side[:, drawn].ravel()) for side in (lengths, values)]
        if min(np.ptp(rank) for rank in ranks) == 0:
            return math.nan
        return float(np.corrcoef(*ranks)[0, 1])

    found = estimate(spearman, lengths.shape[1])
    return None if math.isnan(found.value) else found


def rewards_by_answer(rewards_N: Sequence[float], counts: Sequence[int]) -> list[Sequence[float]]:
    """Flat rewards, cut into answers of so many tokens."""
    ends = list(accumulate(counts))
    return [rewards_N[end - count : end] for end, count in zip(ends, counts, strict=True)]
