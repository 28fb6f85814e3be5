"""Measures of a discriminator beside the metrics of its training: agreement with gold values, and spill.

On the embedded task every word of an answer has a gold value in its context, which no training sees
(docs/embedded_task.md). A token reward is good if it orders words by that value, not if it
repeats a reviser who edits at random. This is measured on answers without edits: the chosen and the rejected ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import DataConfig
from tlcr.data import embedded
from tlcr.evaluation.discriminator_analysis import analysed_tokens, spill
from tlcr.evaluation.discriminator_metrics import evaluate_predictions, pairwise_accuracy, token_rewards
from tlcr.models.discriminator import TokenPredictions, predict_tokens, score_answers, temperature_of
from tlcr.text.tokenization import character_spans, encode_answers
from tlcr.types import EncodedAnswer, LabelledPair, PreferencePair


@dataclass(frozen=True)
class HeldOut:
    """What every discriminator of a seed is measured on. `whole`: `pairs`, labelled without a limit of length."""

    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    pairs: Sequence[LabelledPair]
    whole: Sequence[LabelledPair]
    preferences: Sequence[PreferencePair]
    has_gold: bool

    @property
    def answers(self) -> list[tuple[str, str]]:
        """Prompt and text of the chosen and the rejected answer of every preference, in turn."""
        return [(pair.prompt, answer) for pair in self.preferences for answer in (pair.chosen, pair.rejected)]

    @cached_property
    def encoded(self) -> list[EncodedAnswer]:
        """`answers`, tokenised and cut as the discriminator reads them."""
        return encode_answers(
            self.tokenizer,
            [prompt for prompt, _ in self.answers],
            [answer for _, answer in self.answers],
            max_prompt_tokens=self.data.max_prompt_tokens,
            max_answer_tokens=self.data.max_answer_tokens,
        )


def of_model(model: PreTrainedModel, held_out: HeldOut, batch_size: int) -> dict[str, float]:
    """The measures of a trained discriminator, at its temperature."""
    tokenizer = held_out.tokenizer
    predictions = predict_tokens(model, held_out.pairs, pad_token_id=tokenizer.pad_token_id, batch_size=2 * batch_size)
    scores = score_answers(
        model,
        tokenizer,
        held_out.answers,
        max_prompt_tokens=held_out.data.max_prompt_tokens,
        max_answer_tokens=held_out.data.max_answer_tokens,
        batch_size=2 * batch_size,
    )
    rewards_N = token_rewards(predictions.logits_NC, temperature_of(model))
    return measures(held_out, rewards_N.tolist(), [score.rewards for score in scores])


def of_token_alone(training: Sequence[LabelledPair], held_out: HeldOut) -> dict[str, float]:
    """The same for a reward without a model: the mean label that a token had in training, 0 where it never occurred.

    A discriminator that is better than this has learned from the context.
    """
    sums: dict[int, int] = defaultdict(int)
    counts: dict[int, int] = defaultdict(int)
    for pair in training:
        for answer in (pair.rejected, pair.revised):
            for token, label, counted in zip(answer.encoded.answer_ids, answer.labels, answer.counted, strict=True):
                sums[token] += label * counted
                counts[token] += counted
    mean = {token: sums[token] / counts[token] for token in counts if counts[token]}

    rewards, labels, answer_N = [], [], []
    for number, answer in enumerate(side for pair in held_out.pairs for side in (pair.rejected, pair.revised)):
        for token, label, counted in zip(answer.encoded.answer_ids, answer.labels, answer.counted, strict=True):
            if counted:
                rewards.append(mean.get(token, 0.0))
                labels.append(label)
                answer_N.append(number)
    p_N = (torch.tensor(rewards) + 1) / 2
    logits_NC = torch.stack([1 - p_N, p_N], dim=-1).clamp(min=1e-6).log()
    predictions = TokenPredictions(logits_NC, torch.tensor(labels), torch.tensor(answer_N))
    evaluated = evaluate_predictions(predictions, temperature=1.0, targets="soft", calibrated=False).defined
    by_answer = [[mean.get(token, 0.0) for token in row.answer_ids] for row in held_out.encoded]
    return {**evaluated, **measures(held_out, rewards, by_answer), "training_pairs": len(training)}


def measures(
    held_out: HeldOut, edit_rewards_N: Sequence[float], answer_rewards: Sequence[Sequence[float]]
) -> dict[str, float]:
    """From rewards of the tokens of `held_out.pairs`, in the order of `predict_tokens`, and of `held_out.answers`.

    spill_before, spill_after: mean reward of a kept token in the revised answer less that in the rejected one, right
    before the first edit and right after the last. preference_accuracy: chosen over rejected, by mean reward.
    length_correlation: Spearman's, of tokens and mean reward of an answer. gold_words, gold_content: Spearman's, of a
    word's gold value and the mean reward of its tokens, over all words, over content words; gold_answers: of an
    answer's gold per word and its mean reward. Undefined measures are left out.
    """
    found: dict[str, float] = {}
    for row in spill(analysed_tokens(held_out.pairs, held_out.whole, edit_rewards_N)):
        name = {-1: "spill_before", 1: "spill_after"}.get(row.first or 0)
        if name is not None:
            found[name] = row.difference.value
    lengths = [len(rewards) for rewards in answer_rewards]
    means = [sum(rewards) / max(len(rewards), 1) for rewards in answer_rewards]
    accuracy = pairwise_accuracy(means[0::2], means[1::2])
    if accuracy is not None:
        found["preference_accuracy"] = accuracy
    if len(set(lengths)) > 1 and len(set(means)) > 1:
        found["length_correlation"] = float(stats.spearmanr(lengths, means).statistic)
    if held_out.has_gold:
        found |= gold_correlations(held_out, answer_rewards, means)
    return found


def gold_correlations(
    held_out: HeldOut, answer_rewards: Sequence[Sequence[float]], means: Sequence[float]
) -> dict[str, float]:
    """See `measures`."""
    words: list[tuple[float, float, bool]] = []
    per_word = []
    for (prompt, answer), row, rewards in zip(held_out.answers, held_out.encoded, answer_rewards, strict=True):
        scored = embedded.gold(prompt, answer)
        per_word.append(scored.per_word)
        spans = character_spans(held_out.tokenizer, row.answer_ids, context=row.ids[: row.answer_start])
        for word in scored.words:
            own = rewards_of_word(word.start, word.end, spans, rewards)
            if own:
                words.append((sum(own) / len(own), word.gold, word.kind == "content"))
    content = [(reward, gold) for reward, gold, is_content in words if is_content]
    return {
        "gold_words": float(stats.spearmanr([w[0] for w in words], [w[1] for w in words]).statistic),
        "gold_content": float(stats.spearmanr(*zip(*content, strict=True)).statistic),
        "gold_answers": float(stats.spearmanr(means, per_word).statistic),
    }


def rewards_of_word(start: int, end: int, spans: Sequence[tuple[int, int]], rewards: Sequence[float]) -> list[float]:
    """The rewards of the tokens that write some of the characters [start, end)."""
    return [reward for (first, last), reward in zip(spans, rewards, strict=True) if max(first, start) < min(last, end)]
