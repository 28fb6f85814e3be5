"""Supervised fine-tuning: the loss of a causal language model on answers alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tlcr import ops
from tlcr.padding import pad_right
from tlcr.supervised import LossParts
from tlcr.types import EncodedAnswer


def collate_completions(answers: Sequence[EncodedAnswer], *, pad_token_id: int) -> dict[str, Tensor]:
    """Prompt and answer of each example as a row, padded on the right.

    Returns ids (B, L), attention_mask (B, L) bool and answer_mask (B, K) bool. K is the number of columns from the
    earliest answer to the end, so ``answer_mask`` lies over the LAST K columns; True at answer tokens, the
    end-of-sequence token among them. Where the prompt is empty, nothing predicts the first token: it does not count.
    """
    ids_BL, attention_mask_BL = pad_right([answer.ids for answer in answers], pad_token_id)
    starts_B = torch.tensor([max(answer.answer_start, 1) for answer in answers])
    answer_mask_BL = attention_mask_BL & (torch.arange(ids_BL.shape[1]) >= starts_B[:, None])
    return {
        "ids": ids_BL,
        "attention_mask": attention_mask_BL,
        "answer_mask": answer_mask_BL[:, int(starts_B.min()) :],
    }


def completion_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> LossParts:
    """The sum over answer tokens of -log p(token | all before it), in nats, and the number of those tokens."""
    answer_mask_BK = batch["answer_mask"]
    columns = answer_mask_BK.shape[1]
    logits_BKV = model(
        input_ids=batch["ids"],
        attention_mask=batch["attention_mask"].long(),
        logits_to_keep=columns + 1,  # the last column of the prompt predicts the first token of the answer
        use_cache=False,
    ).logits[:, :-1]
    targets_BK = batch["ids"][:, batch["ids"].shape[1] - columns :]
    logprobs_BK = ops.score_tokens(logits_BKV, targets_BK).logprobs
    return LossParts(-logprobs_BK[answer_mask_BK].sum(), answer_mask_BK.sum())
