"""Rows of token ids of different lengths as one rectangle; the mask comes from the lengths, never from the ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_right(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """ids (B, L) int64 and the mask (B, L) bool, True at the rows' own tokens; L is the length of the longest row."""
    lengths_B = torch.tensor([len(row) for row in rows], dtype=torch.long)
    mask_BL = torch.arange(int(lengths_B.max()))[None, :] < lengths_B[:, None]
    ids_BL = torch.full(mask_BL.shape, pad_token_id, dtype=torch.long)
    ids_BL[mask_BL] = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    return ids_BL, mask_BL


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """The same with the rows' own tokens at the end of each."""
    backwards_BL, mask_BL = pad_right([row[::-1] for row in rows], pad_token_id)
    return backwards_BL.flip(1), mask_BL.flip(1)
