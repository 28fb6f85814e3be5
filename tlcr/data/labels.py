"""From edits to token labels (paper, section 3.1): removed tokens are negative, inserted tokens are positive.

The alignment uses the token ids that a model reads, prompt and answer tokenised together, and whole answers: an answer
that is too long is labelled first and cut afterwards, so that no token counts as deleted or added only because its
partner was cut off. The end-of-sequence token is not aligned; a separate rule labels it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from tlcr import ops
from tlcr.config.schema import DataConfig, LabelConfig
from tlcr.files import write_json_lines
from tlcr.ops import TokenLabel
from tlcr.text.tokenization import cut_answer, encode_answers, token_pieces
from tlcr.text.truncation import note_cuts
from tlcr.types import EditPair, EncodedAnswer, LabelledAnswer, LabelledPair

__all__ = ["LabelStatistics", "label_pair", "label_pairs", "write_labels"]

logger = logging.getLogger("tlcr")

EndOfSequence = Literal["neutral", "ignore", "boundary"]
BINS = 10
"""Bins of the histogram of edited shares."""
CHUNK = 1024
"""Answers tokenised in one call: enough for the tokenizer's threads, few enough for memory."""
MOSTLY_EDITED = 0.6
"""A larger share of edited tokens causes a warning. Source: ours."""


@dataclass(frozen=True)
class LabelStatistics:
    """Statistics of the labels, over all kept answer tokens except end-of-sequence tokens.

    A share is of the tokens of both sides together, and 0 where there are none.
    """

    pairs: int
    rejected_tokens: int
    revised_tokens: int
    negative_share: float
    neutral_share: float
    positive_share: float
    edited_share: float
    """negative_share + positive_share."""
    unedited_pairs: int
    """Pairs without an edited token among the kept ones."""
    truncated_pairs: int
    """Pairs of which at least one side was cut at the length limit."""
    edited_share_histogram: tuple[int, ...]
    """Pairs by their own edited share, in the ten bins [0, .1), [.1, .2), ... [.9, 1]."""

    def summary(self) -> str:
        """A summary in one line."""
        return (
            f"{self.pairs} pairs, {self.rejected_tokens} + {self.revised_tokens} tokens, {self.edited_share:.1%} "
            f"edited ({self.negative_share:.1%} negative, {self.positive_share:.1%} positive); "
            f"{self.unedited_pairs} pairs unedited, {self.truncated_pairs} cut at the length limit"
        )


def label_pair(
    pair: EditPair,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_answer_tokens: int,
    end_of_sequence: EndOfSequence,
) -> LabelledPair:
    """Label every token of a rejected answer and of its revision: see ``ops.token_labels`` for the edit script.

    Every token counts except, under "ignore", the end of sequence. Its label is neutral under "neutral". Under
    "boundary" it says whether the reviser moved the end: let the tail of a side be its tokens after the last one that
    the edit kept. Where the two tails are equally long, tokens were at most replaced one for one, the answer ends where
    it did, and both ends are neutral. Where they differ, the rejected answer's end is negative and the revision's is
    positive.

    A side that is longer than ``max_answer_tokens``, its end of sequence included, keeps that many tokens with the
    labels that they have in the whole edit; cut tokens, the end of sequence included, are removed and not counted.

    Args:
        pair: the edit.
        tokenizer: a fast tokenizer.
        max_prompt_tokens: a longer prompt keeps its end.
        max_answer_tokens: a longer answer keeps its beginning.
        end_of_sequence: "neutral", "ignore" or "boundary".

    Returns:
        Both sides, labelled.

    Raises:
        ConfigError: the tokenizer is not a fast one, or it names no end-of-sequence token.
    """
    return _label(
        [pair],
        tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        max_answer_tokens=max_answer_tokens,
        end_of_sequence=end_of_sequence,
    )[0]


def label_pairs(
    pairs: Iterable[EditPair], tokenizer: PreTrainedTokenizerBase, data: DataConfig, labels: LabelConfig
) -> tuple[list[LabelledPair], LabelStatistics]:
    """``label_pair`` for a whole corpus, with its statistics; warns where texts are cut or most tokens were edited."""
    pairs = list(pairs)
    labelled: list[LabelledPair] = []
    for first in range(0, len(pairs), CHUNK):
        labelled += _label(
            pairs[first : first + CHUNK],
            tokenizer,
            max_prompt_tokens=data.max_prompt_tokens,
            max_answer_tokens=data.max_answer_tokens,
            end_of_sequence=labels.end_of_sequence,
        )
    encoded = [(sides.rejected.encoded, sides.revised.encoded) for sides in labelled]
    note_cuts(zip([pair.prompt for pair in pairs], encoded, strict=True), data, stage="token labels")
    statistics = _statistics(labelled)
    if statistics.edited_share > MOSTLY_EDITED:
        logger.warning(
            "%.0f%% of the answer tokens were edited, more than %.0f%%: few neutral tokens are "
            "left, and the labels say little about which words were wrong. Likely the 'revised' answers are other "
            "answers (the chosen ones, say), not minimal edits of the rejected ones; have a reviser edit those instead",
            100 * statistics.edited_share,
            100 * MOSTLY_EDITED,
        )
    if statistics.unedited_pairs:
        logger.warning(
            "%d of %d edit pairs have no edited token within the length limit: all of their labels are neutral",
            statistics.unedited_pairs,
            statistics.pairs,
        )
    return labelled, statistics


def write_labels(path: str | Path, pairs: Iterable[LabelledPair], tokenizer: PreTrainedTokenizerBase) -> None:
    """Write labelled pairs as JSON lines: for each side its tokens' text, ids, labels by name, and which of them count.

    One line holds {"id", "prompt", "rejected": {"tokens", "ids", "labels", "counted", "complete"}, "revised": {...}};
    the prompt is the kept part of the rejected side's prompt.

    Args:
        path: the file to write.
        pairs: the labelled pairs.
        tokenizer: turns ids to text.
    """
    lines = (
        {
            "id": pair.id,
            "prompt": "".join(token_pieces(tokenizer, pair.rejected.encoded.ids[: pair.rejected.encoded.answer_start])),
            "rejected": _readable(pair.rejected, tokenizer),
            "revised": _readable(pair.revised, tokenizer),
        }
        for pair in pairs
    )
    write_json_lines(path, lines)


def _readable(answer: LabelledAnswer, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    encoded = answer.encoded
    return {
        "tokens": token_pieces(tokenizer, encoded.answer_ids, context=encoded.ids[: encoded.answer_start]),
        "ids": list(encoded.answer_ids),
        "labels": [TokenLabel(label).name.lower() for label in answer.labels],
        "counted": list(answer.counted),
        "complete": encoded.complete,
    }


def _label(
    pairs: Sequence[EditPair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_answer_tokens: int,
    end_of_sequence: EndOfSequence,
) -> list[LabelledPair]:
    sides = encode_answers(
        tokenizer,
        [pair.prompt for pair in pairs] * 2,
        [pair.rejected for pair in pairs] + [pair.revised for pair in pairs],
        max_prompt_tokens=max_prompt_tokens,
        max_answer_tokens=None,
    )
    labelled = []
    for pair, rejected, revised in zip(pairs, sides[: len(pairs)], sides[len(pairs) :], strict=True):
        # Whole answers end with the end of sequence, which is not aligned.
        rejected_labels, revised_labels = ops.token_labels(rejected.answer_ids[:-1], revised.answer_ids[:-1])
        moved = end_of_sequence == "boundary" and _edited_tail(rejected_labels) != _edited_tail(revised_labels)
        rejected_end = TokenLabel.NEGATIVE if moved else TokenLabel.NEUTRAL
        revised_end = TokenLabel.POSITIVE if moved else TokenLabel.NEUTRAL
        end_counts = end_of_sequence != "ignore"
        labelled.append(
            LabelledPair(
                id=pair.id,
                rejected=_cut("rejected", rejected, [*rejected_labels, rejected_end], end_counts, max_answer_tokens),
                revised=_cut("revised", revised, [*revised_labels, revised_end], end_counts, max_answer_tokens),
            )
        )
    return labelled


def _edited_tail(labels: Sequence[TokenLabel]) -> int:
    """How many tokens follow the last one that the edit kept."""
    return next((k for k, label in enumerate(reversed(labels)) if label == TokenLabel.NEUTRAL), len(labels))


def _cut(
    side: Literal["rejected", "revised"],
    whole: EncodedAnswer,
    labels: Sequence[TokenLabel],
    end_counts: bool,
    max_answer_tokens: int,
) -> LabelledAnswer:
    kept = cut_answer(whole, max_answer_tokens)
    length = len(kept.answer_ids)
    counted = [True] * length
    if kept.complete:
        counted[-1] = end_counts
    return LabelledAnswer(
        side=side,
        encoded=kept,
        labels=tuple(int(label) for label in labels[:length]),
        counted=tuple(counted),
    )


def _statistics(pairs: Sequence[LabelledPair]) -> LabelStatistics:
    counts = dict.fromkeys(TokenLabel, 0)
    tokens = {"rejected": 0, "revised": 0}
    histogram = [0] * BINS
    unedited = truncated = 0
    for pair in pairs:
        edited = total = 0
        for answer in (pair.rejected, pair.revised):
            content = answer.labels[:-1] if answer.encoded.complete else answer.labels
            for label in content:
                counts[TokenLabel(label)] += 1
            tokens[answer.side] += len(content)
            total += len(content)
            edited += sum(label != TokenLabel.NEUTRAL for label in content)
        unedited += edited == 0
        truncated += not (pair.rejected.encoded.complete and pair.revised.encoded.complete)
        # Integer arithmetic: the share 3 / 10 belongs in bin 3, where floating point would give 2.999...
        histogram[min(BINS - 1, edited * BINS // max(1, total))] += 1
    total = max(1, sum(tokens.values()))
    negative, positive = counts[TokenLabel.NEGATIVE], counts[TokenLabel.POSITIVE]
    return LabelStatistics(
        pairs=len(pairs),
        rejected_tokens=tokens["rejected"],
        revised_tokens=tokens["revised"],
        negative_share=negative / total,
        neutral_share=counts[TokenLabel.NEUTRAL] / total,
        positive_share=positive / total,
        edited_share=(negative + positive) / total,
        unedited_pairs=unedited,
        truncated_pairs=truncated,
        edited_share_histogram=tuple(histogram),
    )
