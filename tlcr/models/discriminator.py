"""The token discriminator: a token classifier that says of each answer token whether a reviser would keep it.

It is a standard `AutoModelForTokenClassification` with labels [negative, positive] (or [negative, neutral, positive]).
The score of a token is read at the token's own position, where the model has seen the prompt and the answer up to and
including that token. `reward = p(positive) - p(negative)`, which is `2 p(positive) - 1` for two classes (paper, 3.2).

Axes: B answers (rows), L columns of a padded row, T response tokens, C classes, N counted tokens of many answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr import ops
from tlcr.config.schema import ModelConfig
from tlcr.models.bidirectional import make_top_layers_bidirectional
from tlcr.models.heads import evaluating
from tlcr.models.inspection import THREE_CLASSES, TWO_CLASSES
from tlcr.models.loading import load_token_classifier
from tlcr.models.tokenizers import load_tokenizer
from tlcr.text.padding import pad_right
from tlcr.text.tokenization import encode_answers, token_pieces
from tlcr.training.sharding import Sharding, as_forward, device_of
from tlcr.training.supervised import LossParts
from tlcr.types import EncodedAnswer, LabelledAnswer, LabelledPair

__all__ = [
    "AnswerScores",
    "Opinion",
    "TokenPredictions",
    "collate_pairs",
    "discriminator_loss",
    "labels_of",
    "load_discriminator",
    "predict_tokens",
    "score_answers",
    "score_encoded",
    "target_distribution",
    "temperature_of",
    "token_logits",
    "token_opinions",
]

Targets = Literal["soft", "hard", "three_class"]


def labels_of(targets: Targets) -> dict[int, str]:
    """The class names, in the order of the logits, of a discriminator trained on these targets."""
    return THREE_CLASSES if targets == "three_class" else TWO_CLASSES


# ---- loss


def target_distribution(labels: Tensor, classes: int) -> Tensor:
    """The target distribution over the classes for labelled tokens.

    Two classes: negative [1, 0], neutral [.5, .5], positive [0, 1] (paper, 3.2). Three: one class each.

    Args:
        labels: integers (...), each -1, 0 or 1.
        classes: 2 or 3.

    Returns:
        (..., classes) float32.
    """
    if classes == 3:
        return one_hot(labels.long() + 1, 3).float()
    positive = (labels.float() + 1) / 2
    return torch.stack([1 - positive, positive], dim=-1)


def is_trained_on(labels: Tensor, targets: Targets) -> Tensor:
    """Which labels enter the loss: all of them, or the edited tokens alone where the targets are hard."""
    return labels != 0 if targets == "hard" else torch.ones_like(labels, dtype=torch.bool)


def collate_pairs(pairs: Sequence[LabelledPair], *, pad_token_id: int, targets: Targets) -> dict[str, Tensor]:
    """Both sides of every pair as the rows of one batch, padded on the right to its longest row.

    Args:
        pairs: the labelled edits.
        pad_token_id: the id that fills padding.
        targets: which tokens enter the loss, see ``is_trained_on``.

    Returns:
        ``ids`` (B, L), ``attention_mask`` (B, L) bool, ``labels`` (B, L) in {-1, 0, 1} and ``weights`` (B, L) float32,
        with B = 2 * pairs. The rejected answers come first, then the revised ones. ``weights`` is 1 / n at each of the
        n tokens of a row that enter the loss, and 0 elsewhere (prompt, padding, tokens that do not count).
    """
    answers = [pair.rejected for pair in pairs] + [pair.revised for pair in pairs]
    return collate_answers(answers, pad_token_id=pad_token_id, targets=targets)


def collate_answers(answers: Sequence[LabelledAnswer], *, pad_token_id: int, targets: Targets) -> dict[str, Tensor]:
    """The rows of `collate_pairs`, for any labelled answers."""
    ids_BL, mask_BL = pad_right([answer.encoded.ids for answer in answers], pad_token_id)
    labels_BL, weights_BL = torch.zeros_like(ids_BL), torch.zeros(ids_BL.shape)
    for row, answer in enumerate(answers):
        labels_T = torch.tensor(answer.labels, dtype=torch.long)
        counts_T = torch.tensor(answer.counted, dtype=torch.bool) & is_trained_on(labels_T, targets)
        columns = slice(answer.encoded.answer_start, len(answer.encoded.ids))
        labels_BL[row, columns] = labels_T
        weights_BL[row, columns] = counts_T / counts_T.sum().clamp(min=1)
    return {"ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL, "weights": weights_BL}


def discriminator_loss(logits_BLC: Tensor, labels_BL: Tensor, weights_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over a batch's answers of their mean token loss, and the weight that turns sums into the paper's mean::

        l_t  = - sum_c q_c log softmax(logits_t)_c           q: target_distribution of the label of token t
        sum  = sum_b mean_{t counted in row b} l_t           (paper, 3.2; released code)
        loss = sum / weight,  weight = (rows with anything counted) / 2

    Long and short answers have equal weight, and so do the two sides. For pairs whose sides both count, the loss is the
    mean over pairs of the rejected side's mean plus the revised side's. A side with nothing counted (hard targets: an
    edit that only inserts) adds neither loss nor weight. Sums and weights of the parts of a batch add up to those of
    the whole. Logits where the weight is 0, NaN included, affect neither the loss nor a gradient.

    Args:
        logits_BLC: (B, L, C) of any float dtype; the arithmetic is float32 (float64 for float64).
        labels_BL: integers (B, L), see ``collate_pairs``.
        weights_BL: float32 (B, L), see ``collate_pairs``.

    Returns:
        Sum and weight, two scalars.
    """
    counts_BL = weights_BL > 0
    logits_NC = logits_BLC[counts_BL]
    if logits_NC.dtype != torch.float64:
        logits_NC = logits_NC.float()
    targets_NC = target_distribution(labels_BL[counts_BL], logits_NC.shape[-1])
    loss_N = -(targets_NC * log_softmax(logits_NC, dim=-1)).sum(dim=-1)
    total = (loss_N * weights_BL[counts_BL]).sum()
    return total, counts_BL.any(dim=1).sum() / 2


def label_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> LossParts:
    """``discriminator_loss`` of the model's logits.

    Args:
        model: the discriminator.
        batch: what ``collate_pairs`` returns.

    Returns:
        Its sum and weight. The statistic accuracy_edited is the share of edited tokens on the right side of 0.
    """
    logits_BLC = classify(model, batch["ids"], batch["attention_mask"])
    total, weight = discriminator_loss(logits_BLC, batch["labels"], batch["weights"])
    edited_BL = (batch["weights"] > 0) & (batch["labels"] != 0)
    margin_N = (logits_BLC[..., -1] - logits_BLC[..., 0])[edited_BL]
    right = (margin_N * batch["labels"][edited_BL] > 0).sum()
    return LossParts(total, weight, {"accuracy_edited": (right, edited_BL.sum())})


# ---- logits


def classify(model: PreTrainedModel, ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
    """The logits (B, L, C), float32 or float64, of rows that are padded on the right."""
    inputs = {"input_ids": ids_BL, "attention_mask": attention_mask_BL.long(), "use_cache": False}
    return as_forward(model, lambda: model(**inputs).logits)


def token_logits(
    model: PreTrainedModel,
    ids_BL: Tensor,
    attention_mask_BL: Tensor,
    answer: slice,
    *,
    micro_batch_size: int | None = None,
) -> Tensor:
    """The discriminator's logits at the response tokens of a rollout, read at their columns.

    Each row's counted tokens are moved to the left before the model reads them, so that their positions are the same as
    in training for every architecture.

    Args:
        model: the discriminator.
        ids_BL: integers (B, L) as a ``Rollout`` has them, prompts padded on the left and responses on the right.
        attention_mask_BL: bool (B, L), True where a token counts.
        answer: the responses' columns, ``slice(P, P + T)``.
        micro_batch_size: rows of one forward pass; None: all.

    Returns:
        (B, T, C) float32, without gradient or dropout. Where the mask is False the logits are finite but meaningless.
    """
    rows = ids_BL.shape[0]
    # counted columns first, in their order: a token masked inside a row leaves no gap
    source_BL = attention_mask_BL.bool().logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    moved_ids_BL, moved_mask_BL = ids_BL.gather(1, source_BL), attention_mask_BL.bool().gather(1, source_BL)
    length_B = moved_mask_BL.sum(dim=1)
    target_BT = source_BL.argsort(dim=1)[:, answer]
    logits_BTC = torch.zeros((*target_BT.shape, model.config.num_labels or 0), device=ids_BL.device)
    with evaluating(model):
        lengths = length_B.tolist()
        for batch in _length_sorted(lengths, micro_batch_size or max(rows, 1)):
            longest = max(lengths[batch[0]], 1)
            logits_bLC = classify(model, moved_ids_BL[batch, :longest], moved_mask_BL[batch, :longest])
            target_bT = target_BT[batch].clamp(max=longest - 1)
            logits_BTC[batch] = logits_bLC.gather(1, target_bT[..., None].expand(-1, -1, logits_bLC.shape[-1])).float()
    return logits_BTC


def _length_sorted(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first, so that a lack of memory shows in the first batch."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for i in range(0, len(order), batch_size):
        yield order[i : i + batch_size]


@dataclass(frozen=True)
class TokenPredictions:
    """The logits and labels of all counted tokens of labelled pairs, flattened answer by answer.

    logits_NC float32, labels_N in {-1, 0, 1}; answer_N is 2 i for a token of pair i's rejected answer and 2 i + 1 for
    one of its revised answer. Everything on the CPU.
    """

    logits_NC: Tensor
    labels_N: Tensor
    answer_N: Tensor


def predict_tokens(
    model: PreTrainedModel, pairs: Sequence[LabelledPair], *, pad_token_id: int, batch_size: int
) -> TokenPredictions:
    """The discriminator's logits for every counted token of both sides of `pairs`, neutral ones included."""
    answers = [answer for pair in pairs for answer in (pair.rejected, pair.revised)]
    logits: list[Tensor] = [torch.empty(0)] * len(answers)
    device = device_of(model)
    with evaluating(model):
        for batch in _length_sorted([len(answer.encoded.ids) for answer in answers], batch_size):
            tensors = collate_answers([answers[i] for i in batch], pad_token_id=pad_token_id, targets="soft")
            ids_BL, mask_BL = tensors["ids"].to(device), tensors["attention_mask"].to(device)
            logits_BLC = classify(model, ids_BL, mask_BL).float().cpu()
            for i, logits_LC, weights_L in zip(batch, logits_BLC, tensors["weights"], strict=True):
                logits[i] = logits_LC[weights_L > 0]
    labels = [
        torch.tensor([label for label, counts in zip(a.labels, a.counted, strict=True) if counts], dtype=torch.long)
        for a in answers
    ]
    answer_N = torch.repeat_interleave(torch.arange(len(answers)), torch.tensor([len(row) for row in labels]))
    return TokenPredictions(torch.cat(logits), torch.cat(labels), answer_N)


# ---- scoring text


@dataclass(frozen=True)
class AnswerScores:
    """One answer, token by token: its text in pieces, the ids, the reward in [-1, 1] and p(positive) of each.

    prompt_cut and answer_cut are the numbers of tokens that the limits cut.
    """

    pieces: tuple[str, ...]
    ids: tuple[int, ...]
    rewards: tuple[float, ...]
    p_positive: tuple[float, ...]
    prompt_cut: int = 0
    answer_cut: int = 0

    @property
    def mean_reward(self) -> float:
        """The mean token reward, the score by which whole answers are compared; 0 for an answer without tokens."""
        return sum(self.rewards) / max(len(self.rewards), 1)


def temperature_of(model: PreTrainedModel) -> float:
    """The calibrated temperature stored with the model; 1 where it was never calibrated."""
    return float(getattr(model.config, "tlcr_temperature", 1.0))


def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[tuple[str, str]],
    *,
    max_prompt_tokens: int,
    max_answer_tokens: int,
    batch_size: int,
    end_of_sequence: bool = True,
) -> list[AnswerScores]:
    """Scores (prompt, answer) texts, in their order, at the model's calibrated temperature.

    Args:
        model: the discriminator.
        tokenizer: its tokenizer.
        answers: complete prompts (``render_prompt``) and answers.
        max_prompt_tokens: a longer prompt keeps its end.
        max_answer_tokens: a longer answer is scored up to this limit.
        batch_size: answers of one forward pass.
        end_of_sequence: also score the end-of-sequence token, as in training; its piece is that token's text.

    Returns:
        The scores of each answer.
    """
    encoded = encode_answers(
        tokenizer,
        [prompt for prompt, _ in answers],
        [answer for _, answer in answers],
        max_prompt_tokens=max_prompt_tokens,
        max_answer_tokens=max_answer_tokens,
        end_of_sequence=end_of_sequence,
    )
    return score_encoded(model, tokenizer, encoded, batch_size=batch_size)


def score_encoded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[EncodedAnswer],
    *,
    batch_size: int,
) -> list[AnswerScores]:
    """``score_answers`` for answers that are tokens already.

    Args:
        model: the discriminator.
        tokenizer: its tokenizer.
        encoded: prompts with their answers, as ``encode_answers`` gives them.
        batch_size: answers of one forward pass.

    Returns:
        The scores of each answer.
    """
    opinions = token_opinions(model, encoded, pad_token_id=tokenizer.pad_token_id, batch_size=batch_size)
    scores = []
    for row, opinion in zip(encoded, opinions, strict=True):
        pieces = token_pieces(tokenizer, row.answer_ids, context=row.ids[: row.answer_start])
        p_positive_T = (opinion.logits_TC / temperature_of(model)).softmax(dim=-1)[..., -1]
        rewards, p_positive = tuple(opinion.rewards_T.tolist()), tuple(p_positive_T.tolist())
        scores.append(AnswerScores(tuple(pieces), row.answer_ids, rewards, p_positive, row.prompt_cut, row.answer_cut))
    return scores


@dataclass(frozen=True)
class Opinion:
    """What a discriminator says of one answer: logits_TC (T, C) and rewards_T (T,), float32 on the CPU."""

    logits_TC: Tensor
    rewards_T: Tensor


def token_opinions(
    model: PreTrainedModel, encoded: Sequence[EncodedAnswer], *, pad_token_id: int, batch_size: int
) -> list[Opinion]:
    """Logits and reward of every answer token; whatever scores answers outside PPO reads them here.

        reward_t = p_t(positive) - p_t(negative),   p_t = softmax(logits_t / temperature_of(model))

    Args:
        model: the discriminator.
        encoded: prompts with their answers.
        pad_token_id: the id that fills padding.
        batch_size: answers of one forward pass, taken by length.

    Returns:
        One opinion for each answer, in their order.
    """
    opinions: dict[int, Opinion] = {}
    device = device_of(model)
    with evaluating(model):
        for batch in _length_sorted([len(row.ids) for row in encoded], batch_size):
            rows = [encoded[i] for i in batch]
            ids_BL, mask_BL = pad_right([row.ids for row in rows], pad_token_id)
            column_L = torch.arange(ids_BL.shape[1])
            answer_BL = mask_BL & (column_L >= torch.tensor([row.answer_start for row in rows])[:, None])
            logits_BLC = classify(model, ids_BL.to(device), mask_BL.to(device)).float().cpu()
            rewards_BL = ops.fused_reward(logits_BLC, answer_BL, temperature=temperature_of(model))
            for i, row, logits_LC, rewards_L in zip(batch, rows, logits_BLC, rewards_BL, strict=True):
                answer = slice(row.answer_start, len(row.ids))
                opinions[i] = Opinion(logits_LC[answer], rewards_L[answer])
    return [opinions[i] for i in range(len(encoded))]


# ---- loading


def load_discriminator(
    folder: str | Path, cfg: ModelConfig, *, device: torch.device | None = None, sharding: Sharding | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A trained discriminator and the tokenizer saved with it, ready to score.

    The model is in evaluation mode, and its top layers are bidirectional if they were in training. Its temperature is
    in its config (``temperature_of``).

    Args:
        folder: where the discriminator was saved.
        cfg: dtype and settings of loading.
        device: where its weights go; None: the CPU.
        sharding: as for ``load_causal_lm``.

    Returns:
        Model and tokenizer.

    Raises:
        ConfigError: the model's labels are not those of a discriminator, in their order.
    """
    model = load_token_classifier(folder, cfg, device=device, sharding=sharding)
    make_top_layers_bidirectional(model, getattr(model.config, "tlcr_bidirectional_layers", 0))
    return model.eval(), load_tokenizer(cfg.saved_in(folder))
