"""One step off: the answers of the next round are sampled while this one trains::

    round          u                         u + 1
    servers        sample batch u + 1        sample batch u + 2
                   by the weights of u       by the weights of u + 1
    trainer        train on batch u          train on batch u + 1, which is one update old

The log-probabilities that they were drawn with correct for the update (`tlcr.ppo.correction`). The weights that drew a
batch are gone when it is trained on, so that a checkpoint holds the batch itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from tlcr.text.padding import pad_left, pad_right
from tlcr.training.distributed import process_count, process_index
from tlcr.types import Rollout

__all__ = ["Ahead"]

logger = logging.getLogger("tlcr")


@dataclass(frozen=True)
class _Batch:
    """A batch that is being sampled, and where the prompts stood before it took its own."""

    answers: Future[Rollout]
    cursor: int


class Ahead:
    """At most one batch that a thread samples. Every process has one of its own.

    The thread does not touch torch's global random state, nor the weights.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "rollout")
        self._next: _Batch | None = None

    def begin(self, sample: Callable[[], Rollout], *, cursor: int) -> None:
        """Begins the next batch. cursor: that of the prompts before it took its own."""
        assert self._next is None, "the batch before was not taken"
        self._next = _Batch(self._pool.submit(sample), cursor)

    def take(self) -> Rollout | None:
        """The batch that was begun, when it is complete; None where none was. Raises what sampling it raised."""
        batch, self._next = self._next, None
        return None if batch is None else batch.answers.result()

    def settle(self) -> None:
        """Waits until no server is asked, so that others may give them weights."""
        if self._next is not None:
            self._next.answers.exception()

    def state(self, cursor: int) -> dict[str, Any]:
        """For a checkpoint; every process calls it. A batch that failed is left out, and its prompts come again.

        Args:
            cursor: that of the prompts now.

        Returns:
            The batch of every process and the cursor that goes with it, as JSON holds them.
        """
        batch = self._next
        own = None
        if batch is not None and batch.answers.exception() is None:
            own = _to_json(batch.answers.result())
        everyones = list(gather_object([own])) if process_count() > 1 else [own]
        if batch is None or any(one is None for one in everyones):
            return {"cursor": cursor if batch is None else batch.cursor}
        return {"cursor": cursor, "ahead": {"rollouts": everyones, "cursor": batch.cursor}}

    def load(self, state: Mapping[str, Any], *, pad_id: int, device: torch.device) -> int:
        """Takes up the batch of a checkpoint, if it has one. That of another number of processes cannot be shared out
        anew: its prompts come again.

        Args:
            state: as ``state`` gave it.
            pad_id: what stands in padding.
            device: where the rollouts are read.

        Returns:
            The cursor of the prompts.
        """
        batch = state.get("ahead")
        if batch is None:
            return int(state["cursor"])
        if len(batch["rollouts"]) != process_count():
            logger.info(
                "the batch that %d processes had sampled ahead is left out, because there are %d now: its prompts are "
                "answered again",
                len(batch["rollouts"]),
                process_count(),
            )
            return int(batch["cursor"])
        done: Future[Rollout] = Future()
        done.set_result(_of_json(batch["rollouts"][process_index()], pad_id, device))
        self._next = _Batch(done, batch["cursor"])
        return int(state["cursor"])

    def close(self) -> None:
        """Forgets a batch that nobody will take."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _to_json(rollout: Rollout) -> dict[str, Any]:
    def rows(values: Tensor, mask: Tensor) -> list[list[Any]]:
        return [row[counts].tolist() for row, counts in zip(values.cpu(), mask.cpu(), strict=True)]

    assert rollout.engine_logprobs_BT is not None  # servers always report them
    return {
        "prompts": list(rollout.prompts),
        "responses": list(rollout.responses),
        "prompt_ids": rows(rollout.prompt_ids_BP, rollout.prompt_mask_BP),
        "ids": rows(rollout.response_ids_BT, rollout.read_BT),
        "acted": rows(rollout.mask_BT, rollout.read_BT),
        "ended": rollout.ended_B.tolist(),
        "logprobs": rows(rollout.engine_logprobs_BT, rollout.mask_BT),
        "conversations": rollout.messages_BT is not None,
    }


def _of_json(state: Mapping[str, Any], pad_id: int, device: torch.device) -> Rollout:
    def flat(rows: Sequence[Sequence[Any]], dtype: torch.dtype) -> Tensor:
        return torch.tensor([value for row in rows for value in row], dtype=dtype)

    prompt_ids_BP, prompt_mask_BP = pad_left(state["prompt_ids"], pad_id)
    response_ids_BT, read_BT = pad_right(state["ids"], pad_id)
    mask_BT, logprobs_BT = torch.zeros_like(read_BT), torch.zeros(read_BT.shape)
    mask_BT[read_BT] = flat(state["acted"], torch.bool)
    logprobs_BT[mask_BT] = flat(state["logprobs"], torch.float32)
    return Rollout(
        prompts=tuple(state["prompts"]),
        responses=tuple(state["responses"]),
        prompt_ids_BP=prompt_ids_BP.to(device),
        prompt_mask_BP=prompt_mask_BP.to(device),
        response_ids_BT=response_ids_BT.to(device),
        mask_BT=mask_BT.to(device),
        ended_B=torch.tensor(state["ended"], device=device),
        engine_logprobs_BT=logprobs_BT.to(device),
        messages_BT=(read_BT & ~mask_BT).to(device) if state["conversations"] else None,
    )
