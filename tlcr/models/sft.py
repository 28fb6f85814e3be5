"""Supervised fine-tuning: the loss of a causal language model on answers alone."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from tlcr.models.logits import answer_logprobs
from tlcr.training.supervised import LossParts


def completion_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> LossParts:
    """The sum over answer tokens of -log p(token | all before it), in nats, and the number of those tokens."""
    answer_mask_BK = batch["answer_mask"]
    logprobs_BK = answer_logprobs(model, batch["ids"], batch["attention_mask"], answer_mask_BK.shape[1])
    return LossParts(-logprobs_BK[answer_mask_BK].sum(), answer_mask_BK.sum())
