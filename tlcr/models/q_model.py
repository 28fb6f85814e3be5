"""A token-level Q function learned from comparisons of whole answers: Q-RM (Chen et al. 2025, arXiv 2505.23363).

A discriminative policy phi(a | s) = softmax over actions of Z(s, a) whose preferences maximise entropy has
beta log phi = Q - V, so that the logit Z differs from the optimal Q by a term of the state alone and a factor. An
answer is worth the mean of its tokens' Z, and Bradley and Terry's model of comparisons fits Z.

Z is one output of the model at each token that it has read, action a_t included. No softmax is ever taken, and nothing
but the comparisons moves the model: that is what the paper means by leaving the language model out of the reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tlcr.models.heads import backbone, classification_head
from tlcr.models.reward_model import collate_comparisons
from tlcr.training.supervised import LossParts, ranking_loss
from tlcr.types import EncodedComparison


def collate_answers(comparisons: Sequence[EncodedComparison], *, pad_token_id: int) -> dict[str, Tensor]:
    """``collate_comparisons`` with ``answer_mask`` (2B, L), True at the tokens of answers, ends of sequence included.

    Args:
        comparisons: tokenised preference pairs.
        pad_token_id: the id that fills padding.

    Returns:
        ``ids``, ``attention_mask`` and ``answer_mask``, each (2B, L): the chosen answers, then the rejected ones.
    """
    batch = collate_comparisons(comparisons, pad_token_id=pad_token_id)
    answers = [c.chosen for c in comparisons] + [c.rejected for c in comparisons]
    starts_B = torch.tensor([answer.answer_start for answer in answers])
    columns_L = torch.arange(batch["ids"].shape[1])
    return {**batch, "answer_mask": batch["attention_mask"] & (columns_L >= starts_B[:, None])}


def q_loss(model: PreTrainedModel, batch: dict[str, Tensor], *, beta: float, margin: float) -> LossParts:
    """The sum over pairs of -log sigmoid(beta (mean_t Z_chosen,t - mean_t Z_rejected,t) - margin).

    Z of a token is read at that token, where the model has seen it. The mean is over an answer's own tokens, so that
    length by itself is worth nothing; a number added to every Z changes no loss. Source: the released code of Q-RM
    (``PairwiseVerifierStrategyForMeanScore``), with its beta of 0.2 and margin of 2.

    Args:
        model: a decoder with one output.
        batch: what ``collate_answers`` returns.
        beta: factor on the difference.
        margin: what beta times the difference should exceed.

    Returns:
        The sums of the loss. Statistics are those of ``ranking_loss`` for beta times the difference.
    """
    inputs = {"input_ids": batch["ids"], "attention_mask": batch["attention_mask"].long(), "use_cache": False}
    values_BL = classification_head(model)(backbone(model)(**inputs).last_hidden_state).squeeze(-1)
    mask_BL = batch["answer_mask"]
    means_B = torch.where(mask_BL, values_BL, 0.0).sum(dim=1) / mask_BL.sum(dim=1).clamp(min=1)
    chosen_B, rejected_B = means_B.chunk(2)
    differences_B = beta * (chosen_B - rejected_B)
    return replace(ranking_loss(differences_B), total=ranking_loss(differences_B - margin).total)
