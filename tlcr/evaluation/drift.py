"""Whether a discriminator still tells good from bad as the policy moves away from the answers that it was trained on.

Where the data have a gold for every word, the discriminator's confidence in each token that the policy wrote is held
against it. The discriminator's training labels say nothing of these answers: nobody edited them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from transformers import PreTrainedTokenizerBase

from tlcr.evaluation.discriminator_metrics import expected_calibration_error, reliability_bins
from tlcr.evaluation.span_metrics import is_in_span
from tlcr.text.tokenization import character_spans
from tlcr.types import ErrorSpan

__all__ = ["JudgedToken", "WordGold", "calibration_error", "judge", "ranking"]

WordGold = Callable[[str, str], Sequence[tuple[int, int, float]]]
"""(prompt, response) to its words: their characters [start, end) in the response, and the gold that each adds."""


class JudgedToken(NamedTuple):
    """A token of an answer, as the discriminator judged it and as it is."""

    confidence: float
    """p(positive), plus half of p(neutral) where there are three classes: (reward + 1) / 2, in [0, 1]."""
    good: bool
    """Whether its word adds to the gold; False where it takes away."""


def judge(
    words: Sequence[tuple[int, int, float]],
    response: str,
    ids: Sequence[int],
    confidence: Sequence[float],
    *,
    context: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[JudgedToken, ...]:
    """The tokens of one answer that belong to a word whose gold is not 0.

    A token belongs to the word that holds at least half of its characters that are not white space. Every token of a
    word has the word's gold, because every one of them is paid. Tokens of words worth nothing, punctuation and the end
    of sequence are left out: no confidence in them is right or wrong.

    Args:
        words: what ``WordGold`` gives for the answer.
        response: the answer's text.
        ids: its tokens.
        confidence: of each token.
        context: the ids of the prompt.
        tokenizer: the policy's.

    Returns:
        The judged tokens, in their order.
    """
    judged = []
    spans = character_spans(tokenizer, ids, context=context)
    for (start, end), sure in zip(spans, confidence, strict=True):
        for first, last, gold in words:
            if (
                gold != 0
                and first < end
                and start < last
                and is_in_span(start, end, response, [ErrorSpan(first, last, "word")])
            ):
                judged.append(JudgedToken(sure, gold > 0))
                break
    return tuple(judged)


def ranking(tokens: Sequence[JudgedToken]) -> float | None:
    """ROC-AUC of the confidence, good tokens against bad: 0.5 is chance. None where all are good, or all bad."""
    good = [token.good for token in tokens]
    if all(good) or not any(good):
        return None
    return float(roc_auc_score(good, [token.confidence for token in tokens]))


def calibration_error(tokens: Sequence[JudgedToken]) -> float | None:
    """Expected calibration error of the confidence as a probability that the token is good, in 15 bins.

    A discriminator is calibrated on edits, of which some are mistakes, so that this is not 0 before training either.
    What tells of drift is how it changes.

    Args:
        tokens: the judged tokens of all answers.

    Returns:
        The error, in [0, 1]; None without tokens.
    """
    confidence_N = torch.tensor([token.confidence for token in tokens], dtype=torch.float64)
    good_N = torch.tensor([float(token.good) for token in tokens], dtype=torch.float64)
    return expected_calibration_error(reliability_bins(confidence_N, good_N))
