"""A batch that was sampled ahead, in a checkpoint: taken up as it was, or its prompts come again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ppo.helpers import known_rollout
from tlcr.ppo import ahead
from tlcr.ppo.ahead import Ahead

CPU = torch.device("cpu")


def begun() -> Ahead:
    """With the batch of this process; the prompts stood at 8 before it, and at 16 after."""
    rollout = known_rollout()
    rollout = replace(rollout, engine_logprobs_BT=torch.where(rollout.mask_BT, -0.5, 0.0))
    waiting = Ahead()
    waiting.begin(lambda: rollout, cursor=8)
    return waiting


def test_a_batch_is_taken_up_as_it_was() -> None:
    state = begun().state(16)
    resumed = Ahead()
    assert resumed.load(state, pad_id=0, device=CPU) == 16
    taken, expected = resumed.take(), begun().take()
    assert taken is not None and expected is not None
    assert taken.prompts == expected.prompts and torch.equal(taken.mask_BT, expected.mask_BT)
    assert torch.equal(taken.response_ids_BT[taken.mask_BT], expected.response_ids_BT[expected.mask_BT])


def test_a_checkpoint_without_a_batch_says_where_the_prompts_stand() -> None:
    resumed = Ahead()
    assert resumed.load(Ahead().state(16), pad_id=0, device=CPU) == 16
    assert resumed.take() is None


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1)])
def test_the_prompts_of_a_batch_of_other_processes_come_again(
    before: int, now: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process took the share of its number, so that two had none, or half of a batch was never trained on."""
    state = begun().state(16)
    state["ahead"]["rollouts"] *= before
    monkeypatch.setattr(ahead, "process_count", lambda: now)
    monkeypatch.setattr(ahead, "process_index", lambda: now - 1)
    resumed = Ahead()
    assert resumed.load(state, pad_id=0, device=CPU) == 8
    assert resumed.take() is None
