"""The memory that operators of tlcr take for themselves while they run, from shapes alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlcr.ops._arithmetic import arithmetic_dtype
from tlcr.ops._extension import library_facts
from tlcr.ops._spec import names
from tlcr.ops.scoring import ScoreHiddenArguments, ScoreHiddenBackward

__all__ = ["Head", "Scratch", "scratch_of"]

TILE = 128
"""What csrc/torch/scoring.cpp rounds a part of the logits down to a multiple of."""
MOST_OF_MKL = 2**31 - 1
"""Elements of a matrix that MKL takes."""


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
        return _of_hidden(inputs, on_cpu).backward(**wanted, kl=given["g_kl"] is not None)
    return 0


def _of_hidden(a: ScoreHiddenArguments, on_cpu: bool) -> Scratch:
    real = arithmetic_dtype(a.hidden, a.weight, a.bias, a.ref_hidden, a.ref_weight, a.ref_bias)

    def head(hidden: Tensor, weight: Tensor) -> Head:
        narrow = real is torch.float32 and hidden.dtype == weight.dtype and _multiplies_into_float(weight, on_cpu)
        factor = weight.dtype if narrow else real
        return Head(hidden.dtype.itemsize, weight.dtype.itemsize, factor.itemsize)

    return Scratch(
        tokens=a.token_ids.numel(),
        width=a.weight.shape[1],
        vocabulary=a.weight.shape[0],
        chunk_tokens=a.chunk_tokens,
        policy=head(a.hidden, a.weight),
        reference=head(a.ref_hidden, a.ref_weight) if a.ref_hidden is not None and a.ref_weight is not None else None,
        real=real.itemsize,
    )


def _multiplies_into_float(factor: Tensor, on_cpu: bool) -> bool:
    """As the function of that name in csrc/torch/product.cpp."""
    if not on_cpu:
        return factor.dtype in (torch.bfloat16, torch.float16)
    return factor.dtype is torch.bfloat16 and factor.numel() <= MOST_OF_MKL and _cpu_multiplies_bfloat16()


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    """It takes an Intel processor with the instructions and a torch with MKL, which the library looks at."""
    return bool(library_facts()["multiplies_bfloat16"])


class Head(NamedTuple):
    """Bytes of an element of a head's tensors."""

    hidden: int
    """Of its hidden states."""
    weight: int
    factor: int
    """Of the factors of its products; what has another dtype is widened to it first."""


@dataclass(frozen=True)
class Scratch:
    """The bytes that `score_hidden` needs beside its inputs and results, from shapes and dtypes alone.

    Exact but for a few bytes a token and what a library's products take for themselves.
    """

    tokens: int
    width: int
    vocabulary: int
    chunk_tokens: int
    policy: Head
    reference: Head | None = None
    real: int = 4
    """Bytes of a logit: the arithmetic's."""

    def forward(self) -> int:
        heads = self._heads(self.reference is not None)
        rows = min(self.chunk_tokens, self.tokens)
        # Widened hidden states are let go before those of the next model are made.
        return (
            len(heads) * rows * self.vocabulary * self.real
            + self._weights(heads, self.vocabulary)
            + max(self._widened_states(heads, rows))
        )

    def backward(self, *, hidden: bool, weight: bool, kl: bool) -> int:
        """Where the gradients of the hidden states and of the head are wanted, or one of them, and perhaps the KL has
        one."""
        heads = self._heads(kl and self.reference is not None)
        narrow = self.policy.factor if self.policy.factor != self.real else 0
        rounds_hidden, rounds_weight = self.policy.hidden != self.real, self.policy.weight != self.real
        logit = len(heads) * self.real + narrow
        column = self.width * self.real * (rounds_weight + (self.policy.weight != self.policy.factor))
        memory = self.chunk_tokens * self.vocabulary * self.real * (1 if self.reference is None else 2)
        rows, columns = self.tokens, self.vocabulary
        if weight and (not hidden or self.tokens <= self.vocabulary):
            columns = _fitting(memory, rows * logit + column, columns)
        else:
            rows = _fitting(memory, columns * logit, rows)
        needed = rows * columns * logit + self._weights(heads, columns)
        # Hidden states with zeros where nothing is wanted. While they are made for some rows, those of the rows before
        # are there, and the reference's; where one part has all rows, the policy's widened ones are let go before the
        # reference's are made.
        states, widened = rows * self.width * self.policy.factor, self._widened_states(heads, rows)
        needed += states + max(widened) if rows == self.tokens else 2 * states + sum(widened)
        if rounds_hidden and hidden:
            needed += (rows if columns == self.vocabulary else self.tokens) * self.width * self.real
        if rounds_weight and weight:
            needed += (columns if rows == self.tokens else self.vocabulary) * self.width * self.real
        return needed

    def _heads(self, with_reference: bool) -> list[Head]:
        return [self.policy, self.reference] if with_reference and self.reference is not None else [self.policy]

    def _weights(self, heads: Sequence[Head], columns: int) -> int:
        """The widened heads."""
        return sum(columns * self.width * head.factor for head in heads if head.weight != head.factor)

    def _widened_states(self, heads: Sequence[Head], rows: int) -> list[int]:
        """Of each model."""
        return [rows * self.width * head.factor * (head.hidden != head.factor) for head in heads]


def _fitting(memory: int, each: int, most: int) -> int:
    count = memory // each
    return max(1, min(count if count < TILE else count // TILE * TILE, most))
