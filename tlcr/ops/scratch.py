"""The memory that operators of tlcr take for themselves while they run, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tlcr.ops._spec import names
from tlcr.ops.scoring import ScoreHiddenArguments, ScoreHiddenBackward

__all__ = ["Scratch", "scratch_of"]

TILE = 128
"""What csrc/torch/scoring.cpp rounds a part of the logits down to a multiple of."""


def scratch_of(operator: str, values: Sequence[Any], *, on_cpu: bool) -> int:
    """The bytes that a compiled operator allocates beside its inputs and results.

    Args:
        operator: its full name, such as "tlcr::score_hidden".
        values: its arguments, in their order; tensors need no memory.
        on_cpu: half-precision factors are widened there, where the CPU has no product for them.

    Returns:
        The bytes; 0 for an operator that needs none worth counting.
    """
    if operator == "tlcr::score_hidden":
        return _of_hidden(ScoreHiddenArguments(*values), on_cpu).forward()
    if operator == "tlcr::score_hidden_backward":
        given = dict(zip(names(ScoreHiddenBackward), values, strict=True))
        wanted = {name: given[f"wants_{name}"] for name in ("hidden", "weight")}
        inputs = ScoreHiddenArguments(*(given[name] for name in ScoreHiddenArguments._fields))
        return _of_hidden(inputs, on_cpu).backward(**wanted)
    return 0


def _of_hidden(a: ScoreHiddenArguments, on_cpu: bool) -> Scratch:
    half = a.hidden.dtype.itemsize == 2
    return Scratch(
        tokens=a.token_ids.numel(),
        width=a.weight.shape[1],
        vocabulary=a.weight.shape[0],
        chunk_tokens=a.chunk_tokens,
        element=a.hidden.dtype.itemsize,
        real=max(4, a.hidden.dtype.itemsize),
        with_reference=a.ref_hidden is not None,
        widens=half and on_cpu and not torch.cpu.get_capabilities().get("avx512_bf16", False),
    )


@dataclass(frozen=True)
class Scratch:
    """The bytes that `score_hidden` needs beside its inputs and results, from shapes alone.

    Exact but for a few bytes a token and what a library's products take for themselves.
    """

    tokens: int
    width: int
    vocabulary: int
    chunk_tokens: int
    element: int = 2
    """Bytes of an element of the hidden states and the head."""
    real: int = 4
    """Bytes of a logit: the arithmetic's."""
    with_reference: bool = False
    widens: bool = False
    """Whether the factors of products are widened to the arithmetic first: on a CPU without a product for them."""

    def forward(self) -> int:
        heads = 2 if self.with_reference else 1
        rows = min(self.chunk_tokens, self.tokens)
        widened = (self.vocabulary + rows) * self.width * self.real if self.widens else 0
        return heads * (rows * self.vocabulary * self.real + widened)

    def backward(self, *, hidden: bool, weight: bool) -> int:
        """Where the gradients of the hidden states and of the head are wanted, or one of them."""
        heads = 2 if self.with_reference else 1
        rounds = self.element != self.real
        factor = self.real if self.widens else self.element
        logit = heads * self.real + (self.element if rounds and not self.widens else 0)
        column = self.width * self.real * (rounds + self.widens)
        memory = self.chunk_tokens * self.vocabulary * self.real * heads
        rows, columns = self.tokens, self.vocabulary
        if weight and (not hidden or self.tokens <= self.vocabulary):
            columns = _fitting(memory, rows * logit + column, columns)
        else:
            rows = _fitting(memory, columns * logit, rows)
        needed = rows * columns * logit
        # Hidden states with zeros where nothing is wanted; while they are made for some rows, those of the rows before.
        needed += rows * self.width * factor * (1 if rows == self.tokens else 2)
        if self.widens:
            # Where one part has all rows, the policy's widened states are let go before the reference's are made.
            needed += (heads * columns + (1 if rows == self.tokens else heads) * rows) * self.width * self.real
        if rounds and hidden:
            needed += (rows if columns == self.vocabulary else self.tokens) * self.width * self.real
        if rounds and weight:
            needed += (columns if rows == self.tokens else self.vocabulary) * self.width * self.real
        return needed


def _fitting(memory: int, each: int, most: int) -> int:
    count = memory // each
    return max(1, min(count if count < TILE else count // TILE * TILE, most))
