"""Rows of a rollout, sorted by length and cut to the longest of each micro-batch, so that there is little padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tlcr.types import Rollout

CPU_TOKENS = 1024
"""Tokens of a micro-batch on a CPU. They are enough to keep its cores busy; a forward pass of more only keeps more
activations (ours; docs/ppo_step.md has the figures). On a GPU only the user's limit applies."""


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a rollout, for one forward pass, without the columns that are padding in all of them."""

    rows_B: Tensor
    ids_BL: Tensor
    attention_mask_BL: Tensor
    mask_BT: Tensor

    @property
    def response_length(self) -> int:
        return self.mask_BT.shape[1]

    def take(self, x_BT: Tensor) -> Tensor:
        """This micro-batch's part of a value of the whole rollout."""
        return x_BT[self.rows_B, : self.response_length]

    def put(self, x_BT: Tensor, into_BT: Tensor) -> None:
        """Writes this micro-batch's values to their places in a value of the whole rollout."""
        into_BT[self.rows_B, : self.response_length] = torch.where(self.mask_BT, x_BT, 0.0)


class MicroBatches:
    """Cuts a rollout into micro-batches. The lengths are read from the device once, here."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout
        prompt_columns_P = torch.arange(rollout.prompt_mask_BP.shape[1], 0, -1, device=rollout.mask_BT.device)
        answer_columns_T = torch.arange(1, rollout.mask_BT.shape[1] + 1, device=rollout.mask_BT.device)
        self._lengths: list[tuple[int, int]] = [
            (prompt, answer)
            for prompt, answer in torch.stack(
                [
                    (rollout.prompt_mask_BP * prompt_columns_P).amax(dim=1),
                    (rollout.mask_BT * answer_columns_T).amax(dim=1),
                ],
                dim=1,
            ).tolist()
        ]

    def split(self, at_most: int | None, rows: Sequence[int] | None = None) -> list[MicroBatch]:
        """All rows, or those named, in micro-batches of nearly one size, the longest rows first.

        Args:
            at_most: rows of a micro-batch; None: no limit. On a CPU a micro-batch holds at most ``CPU_TOKENS`` on
                average, whatever the limit.
            rows: numbers of the rows wanted; None: all.

        Returns:
            The micro-batches.
        """
        rows = range(len(self._lengths)) if rows is None else rows
        by_length = sorted(rows, key=lambda row: sum(self._lengths[row]), reverse=True)
        number = math.ceil(len(by_length) / (at_most or len(by_length) or 1))
        if self._rollout.mask_BT.device.type == "cpu":
            tokens = sum(sum(self._lengths[row]) for row in by_length)
            number = min(len(by_length), max(number, math.ceil(tokens / CPU_TOKENS)))
        return [self._cut(list(part)) for part in np.array_split(by_length, number)] if number else []

    def _cut(self, rows: Sequence[int]) -> MicroBatch:
        rollout = self._rollout
        prompt_length = max(self._lengths[row][0] for row in rows)
        response_length = max(self._lengths[row][1] for row in rows)
        rows_B = torch.tensor(rows, device=rollout.mask_BT.device)
        first = rollout.prompt_ids_BP.shape[1] - prompt_length
        mask_BT = rollout.mask_BT[rows_B, :response_length]
        return MicroBatch(
            rows_B=rows_B,
            ids_BL=torch.cat(
                [rollout.prompt_ids_BP[rows_B, first:], rollout.response_ids_BT[rows_B, :response_length]], dim=1
            ),
            attention_mask_BL=torch.cat([rollout.prompt_mask_BP[rows_B, first:], mask_BT], dim=1),
            mask_BT=mask_BT,
        )
