"""Logits of the tokens that count, and the log-probabilities of an answer's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tlcr import ops


def last_logits(model: PreTrainedModel, inputs: Mapping[str, Any], count: int) -> Tensor:
    """The logits (B, count, V) of the last `count` columns of `inputs["input_ids"]`; no others are computed."""
    keep: int | Tensor = count
    if not torch.is_grad_enabled():
        # A list of columns makes torch copy them together. With a slice, outside autograd, torch multiplies row by row,
        # and on a CPU copies the whole head for each row.
        ids_BL = inputs["input_ids"]
        keep = torch.arange(max(0, ids_BL.shape[1] - count), ids_BL.shape[1], device=ids_BL.device)
    return model(**inputs, logits_to_keep=keep).logits[:, -count:]


def answer_logprobs(model: PreTrainedModel, ids_BL: Tensor, attention_mask_BL: Tensor, columns: int) -> Tensor:
    """log p(token | all before it) of the tokens in the last K columns. Gradients flow.

    The log-probability of column j is read at column j - 1. Values in padding are meaningless.

    Args:
        model: a causal language model.
        ids_BL: integers (B, L), padded on the right.
        attention_mask_BL: bool (B, L), True where a token counts.
        columns: K, below L, because nothing predicts the first column.

    Returns:
        (B, K) float32, in nats.
    """
    inputs = {"input_ids": ids_BL, "attention_mask": attention_mask_BL.long(), "use_cache": False}
    logits_BKV = last_logits(model, inputs, columns + 1)[:, :-1]
    return ops.score_tokens(logits_BKV, ids_BL[:, ids_BL.shape[1] - columns :]).logprobs
