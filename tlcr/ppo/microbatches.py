"""Rows of a rollout cut into forward passes, with little padding, and as many of them on every process.

A rollout holds two rectangles: prompts padded on the left, answers padded on the right. A micro-batch holds one, whose
rows are prompt, answer, and padding at the end. It is full where the rows' whole lengths are alike:

    rollout    p p p p p a a a . .         micro-batch    p p p p p a a a
               . . . p p a a a a a                        p p a a a a a .
               . . p p p a a . . .                        p p p a a . . .

Packed, its rows stand end to end (`tlcr.models.packing`), and nothing is padding.

Models speak of the actions alone, laid end to end (axis N). `spread` and `put` give these their rows and columns again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tlcr.errors import DataError
from tlcr.models.packing import Packing
from tlcr.training.distributed import largest_of_processes
from tlcr.types import Rollout

CPU_TOKENS = 1024
"""Tokens of a micro-batch on a CPU. They are enough to keep its cores busy; a forward pass of more only keeps more
activations (ours; docs/ppo_step.md has the figures). On a GPU only the user's limits apply."""


@dataclass(frozen=True)
class MicroBatch(ABC):
    """Some rows of a rollout for one forward pass: tokens, N actions, and which of them count, (B, T).

    An action that does not count lies before one that does, in the same answer.
    """

    rows_B: Tensor
    ids_BL: Tensor
    """The tokens, (B, L); packed, (1, L)."""
    actions_N: Tensor
    """The place of each action in the tokens, laid end to end."""
    mask_BT: Tensor
    _places_N: Tensor
    """Where each action stands in (B, T), laid end to end."""

    @property
    @abstractmethod
    def tokens(self) -> tuple[Tensor, Tensor | Packing, Tensor]:
        """What an ``ActorCritic`` reads: the tokens, how they are laid out, and the places of the actions."""

    @property
    def response_length(self) -> int:
        return self.mask_BT.shape[1]

    def take(self, x_BT: Tensor) -> Tensor:
        """This micro-batch's part of a value of the whole rollout, (B, T)."""
        return x_BT[self.rows_B, : self.response_length]

    def spread(self, x_N: Tensor) -> Tensor:
        """(B, T): what a model says of each action, 0 where there is none. Gradients flow."""
        return x_N.new_zeros(self.mask_BT.numel()).index_copy(0, self._places_N, x_N).view(self.mask_BT.shape)

    def put(self, x_N: Tensor, into_BT: Tensor) -> None:
        """Writes what a model says of each action that counts to its place in a value of the whole rollout."""
        # All else stays: an idle micro-batch has the row of another one, which may have been written before.
        said_BT = self.spread(x_N).to(into_BT.dtype)
        into_BT[self.rows_B, : self.response_length] = torch.where(self.mask_BT, said_BT, self.take(into_BT))


@dataclass(frozen=True)
class PaddedMicroBatch(MicroBatch):
    """Rows as one rectangle, padded at their ends; True where a token counts."""

    attention_mask_BL: Tensor

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids_BL, self.attention_mask_BL, self.actions_N


@dataclass(frozen=True)
class PackedMicroBatch(MicroBatch):
    """Rows end to end, without padding. There is no attention mask, because with one rows would see each other."""

    packing: Packing

    @property
    def tokens(self) -> tuple[Tensor, Packing, Tensor]:
        return self.ids_BL, self.packing, self.actions_N


class MicroBatches:
    """Cuts a rollout into micro-batches. The lengths are read from the device once, here.

    Args:
        rollout: the answers of this process.
        rows: rows of a micro-batch at most; None: no limit.
        tokens: tokens of a micro-batch at most, padding among them; a longer row is a micro-batch of its own. None:
            ``CPU_TOKENS`` on a CPU, elsewhere no limit.
        packed: rows stand end to end, so that there is no padding.

    Raises:
        DataError: rows are to be packed, and a token inside one of them does not count.
    """

    def __init__(self, rollout: Rollout, *, rows: int | None, tokens: int | None, packed: bool = False) -> None:
        self._rollout, self._packed = rollout, packed
        self._ids_BL, self._attention_mask_BL = rollout.ids_BL, rollout.attention_mask_BL
        device = rollout.mask_BT.device
        prompt_columns_P = torch.arange(rollout.prompt_mask_BP.shape[1], 0, -1, device=device)
        answer_columns_T = torch.arange(1, rollout.mask_BT.shape[1] + 1, device=device)
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
        if packed:
            self._check_whole()
        self._most_rows = rows
        self._most_tokens = CPU_TOKENS if tokens is None and device.type == "cpu" else tokens

    def split(self, parts: Sequence[Sequence[int]] | None = None) -> list[list[MicroBatch]]:
        """For each part of the rows its micro-batches, the longest rows first, their sizes alike.

        Every process gets as many for a part, because sharded models communicate in every forward pass. A process
        whose own rows need fewer cuts them finer, and where they do not suffice gets a micro-batch in which no action
        counts. Every process must call it, with equally many parts.

        Args:
            parts: numbers of the rows of each part; None: one part of all rows.

        Returns:
            The micro-batches of each part.
        """
        parts = [range(len(self._lengths))] if parts is None else parts
        sorted_parts = [sorted(rows, key=self._length, reverse=True) for rows in parts]
        own_numbers = [len(self._sizes(rows, self._most_tokens)) for rows in sorted_parts]
        numbers = largest_of_processes(torch.tensor(own_numbers)).tolist()
        return [self._cut(rows, number) for rows, number in zip(sorted_parts, numbers, strict=True)]

    def _length(self, row: int) -> int:
        return sum(self._lengths[row])

    def _check_whole(self) -> None:
        """A mask can hide a token inside a row, which packed rows have none of."""
        counted = self._attention_mask_BL.sum(dim=1).tolist()
        for row, count in enumerate(counted):
            if count != self._length(row):
                raise DataError(
                    f"answer {row} of the rollout has {self._length(row) - count} token(s) inside it, or inside its "
                    "prompt, that do not count, and packed rows have no mask to hide them; set ppo.packing to never"
                )

    def _sizes(self, rows: Sequence[int], most_tokens: int | None) -> list[int]:
        """How many of the rows, which are sorted by length, go into each micro-batch that is filled to the limits."""
        ends = np.cumsum([self._length(row) for row in rows])
        sizes, start = [], 0
        while start < len(rows):
            size = len(rows) - start
            if self._most_rows is not None:
                size = min(size, self._most_rows)
            if most_tokens is not None:
                if self._packed:
                    before = ends[start] - self._length(rows[start])
                    fitting = int(np.searchsorted(ends, before + most_tokens, side="right")) - start
                else:
                    fitting = most_tokens // self._length(rows[start])
                size = min(size, max(1, fitting))
            sizes.append(size)
            start += size
        return sizes

    def _cut(self, rows: Sequence[int], number: int) -> list[MicroBatch]:
        """`number` micro-batches of the sorted rows, of which the largest is as small as it can be."""
        if not rows:
            return [self._idle() for _ in range(number)]
        enough, too_few = self._length(rows[0]) * len(rows), 0
        while enough - too_few > 1:
            tokens = (enough + too_few) // 2
            if len(self._sizes(rows, tokens)) <= number:
                enough = tokens
            else:
                too_few = tokens
        ends = np.cumsum(self._sizes(rows, enough))
        cut = [self._join(part) for part in np.split(np.array(rows), ends[:-1])]
        return cut + [self._idle() for _ in range(number - len(cut))]

    def _join(self, rows: np.ndarray) -> MicroBatch:
        rollout, device = self._rollout, self._rollout.mask_BT.device
        prompts_B, answers_B = np.array([self._lengths[row] for row in rows]).T
        lengths_B, T = prompts_B + answers_B, max(answers_B)
        row_N, answer_column_N = _cells(answers_B)
        column_N = prompts_B[row_N] + answer_column_N
        rows_B = torch.from_numpy(rows).to(device)
        common = {
            "rows_B": rows_B,
            "mask_BT": rollout.mask_BT[rows_B, :T],
            "_places_N": torch.from_numpy(row_N * T + answer_column_N).to(device),
        }
        # Column c of a row is column P - prompt + c of the rollout.
        first_B = rollout.prompt_ids_BP.shape[1] - prompts_B
        if self._packed:
            row_L, column_L = _cells(lengths_B)
            source_L = torch.from_numpy(rows[row_L] * self._ids_BL.shape[1] + first_B[row_L] + column_L).to(device)
            starts_B = np.cumsum(lengths_B) - lengths_B
            return PackedMicroBatch(
                **common,
                ids_BL=self._ids_BL.flatten()[source_L].unsqueeze(0),
                packing=Packing.of(lengths_B, device),
                actions_N=torch.from_numpy(starts_B[row_N] + column_N).to(device),
            )
        L, width = max(lengths_B), self._ids_BL.shape[1]
        column_BL = np.arange(L) + first_B[:, None]
        # The last columns may lie beyond the rollout's.
        source_BL = torch.from_numpy(np.minimum(column_BL, width - 1)).to(device)
        inside_BL = torch.from_numpy(column_BL < width).to(device)
        return PaddedMicroBatch(
            **common,
            ids_BL=self._ids_BL[rows_B].gather(1, source_BL),
            attention_mask_BL=self._attention_mask_BL[rows_B].gather(1, source_BL) & inside_BL,
            actions_N=torch.from_numpy(row_N * L + column_N).to(device),
        )

    def _idle(self) -> MicroBatch:
        """The shortest row, none of whose actions counts: it takes part in communication and adds nothing."""
        shortest = min(range(len(self._lengths)), key=self._length)
        row = self._join(np.array([shortest]))
        return replace(row, mask_BT=torch.zeros_like(row.mask_BT))


def _cells(lengths_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every cell of rows of these lengths, one row after the other."""
    row_N = np.repeat(np.arange(len(lengths_B)), lengths_B)
    return row_N, np.arange(len(row_N)) - np.repeat(np.cumsum(lengths_B) - lengths_B, lengths_B)
