"""Rows of token ids of different lengths as one rectangle; the mask comes from the lengths, never from the ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tlcr.types import EncodedAnswer


def pad_right(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """ids (B, L) int64 and the mask (B, L) bool, True where there is no padding; L is the length of the longest row."""
    lengths_B = torch.tensor([len(row) for row in rows], dtype=torch.long)
    mask_BL = torch.arange(int(lengths_B.max()))[None, :] < lengths_B[:, None]
    ids_BL = torch.full(mask_BL.shape, pad_token_id, dtype=torch.long)
    ids_BL[mask_BL] = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    return ids_BL, mask_BL


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """The same with the padding on the left."""
    backwards_BL, mask_BL = pad_right([row[::-1] for row in rows], pad_token_id)
    return backwards_BL.flip(1), mask_BL.flip(1)


def collate_completions(answers: Sequence[EncodedAnswer], *, pad_token_id: int) -> dict[str, Tensor]:
    """Prompt and answer of each example as a row, padded on the right.

    Args:
        answers: the examples.
        pad_token_id: the id that fills padding.

    Returns:
        ``ids`` (B, L), ``attention_mask`` (B, L) bool and ``answer_mask`` (B, K) bool. K is the number of columns from
        the earliest answer to the end, so ``answer_mask`` is for the LAST K columns. It is True at answer tokens,
        the end-of-sequence token among them. Where the prompt is empty, nothing predicts the first token: it does not
        count.
    """
    ids_BL, attention_mask_BL = pad_right([answer.ids for answer in answers], pad_token_id)
    starts_B = torch.tensor([max(answer.answer_start, 1) for answer in answers])
    answer_mask_BL = attention_mask_BL & (torch.arange(ids_BL.shape[1]) >= starts_B[:, None])
    return {
        "ids": ids_BL,
        "attention_mask": attention_mask_BL,
        "answer_mask": answer_mask_BL[:, int(starts_B.min()) :],
    }
