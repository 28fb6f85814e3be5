"""Rows of tokens end to end in one row, without padding, and what a model has to be told of it.

    padded    p p p p a a . .        packed    p p p p a a p a a a a p p a
              p a a a a . . .        positions 0 1 2 3 4 5 0 1 2 3 4 0 1 2
              p p a . . . . .

A model keeps the rows apart by positions that start again, from which transformers derives a mask, or by where each row
begins, which kernels of flash attention read. transformers does neither where it is given an attention mask: with a
mask of ones every token sees the rows before its own. So packed rows have no mask, and nothing here takes one.

Axes: L tokens of all rows, S rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["Packing", "packed_inputs", "takes_positions"]


class Packing(NamedTuple):
    """Where the rows of a packed batch stand."""

    positions_1L: Tensor
    """Integers (1, L), which start again at 0 with every row."""
    starts_S: Tensor
    """int32 (S + 1,), where each row begins, and L."""
    longest: int
    """Tokens of the longest row."""

    @classmethod
    def of(cls, lengths: Sequence[int] | np.ndarray, device: torch.device) -> Packing:
        """Rows of these lengths, one after the other; a row without tokens is none."""
        lengths_S = np.array([length for length in lengths if length > 0], dtype=np.int64)
        starts_S = np.concatenate([[0], lengths_S.cumsum()])
        positions_L = np.arange(starts_S[-1]) - starts_S[:-1].repeat(lengths_S)
        return cls(
            torch.from_numpy(positions_L).unsqueeze(0).to(device),
            torch.from_numpy(starts_S.astype(np.int32)).to(device),
            int(lengths_S.max(initial=0)),
        )


def packed_inputs(model: PreTrainedModel, ids_1L: Tensor, packing: Packing) -> dict[str, Any]:
    """The arguments of ``model`` for packed rows.

    Args:
        model: the model, or its backbone.
        ids_1L: integers (1, L).
        packing: where the rows stand.

    Returns:
        Ids and positions. Where ``model`` hands further arguments to its attention, also where the rows begin: with
        them flash attention does not search the positions for it in every layer.
    """
    inputs = {"input_ids": ids_1L, "position_ids": packing.positions_1L, "use_cache": False}
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        inputs |= {
            "cu_seq_lens_q": packing.starts_S,
            "cu_seq_lens_k": packing.starts_S,
            "max_length_q": packing.longest,
            "max_length_k": packing.longest,
        }
    return inputs


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model can be told the position of each token."""
    return "position_ids" in inspect.signature(model.forward).parameters
