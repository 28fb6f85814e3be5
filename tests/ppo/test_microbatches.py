"""How a rollout is cut into forward passes: every row once, sizes alike, no more than a CPU has use for."""

from __future__ import annotations

import pytest
import torch

from tlcr.ppo.microbatches import CPU_TOKENS, MicroBatches
from tlcr.types import Rollout


def rollout(prompts: list[int], answers: list[int]) -> Rollout:
    """Rows of these lengths, whose ids count upwards from 100 times their row."""
    P, T, B = max(prompts), max(answers), len(prompts)
    prompt_mask_BP = torch.arange(P) >= P - torch.tensor(prompts).unsqueeze(1)
    mask_BT = torch.arange(T) < torch.tensor(answers).unsqueeze(1)
    ids_BL = 100 * torch.arange(B).unsqueeze(1) + torch.arange(P + T)
    return Rollout(
        prompts=("",) * B,
        responses=("",) * B,
        prompt_ids_BP=ids_BL[:, :P],
        prompt_mask_BP=prompt_mask_BP,
        response_ids_BT=ids_BL[:, P:],
        mask_BT=mask_BT,
        ended_B=torch.ones(B, dtype=torch.bool),
    )


def sizes(batches: MicroBatches, at_most: int | None, rows: list[int] | None = None) -> list[int]:
    parts = batches.split(at_most, rows)
    taken = sorted(row for part in parts for row in part.rows_B.tolist())
    assert taken == sorted(range(10) if rows is None else rows)
    return [len(part.rows_B) for part in parts]


def test_short_rows_go_together_and_a_limit_is_shared_out_evenly() -> None:
    batches = MicroBatches(rollout([2] * 10, [3] * 10))
    assert sizes(batches, None) == [10]
    assert sizes(batches, 6) == [5, 5]
    assert sizes(batches, 3) == [3, 3, 2, 2]
    assert sizes(batches, None, [4, 7, 1]) == [3]
    assert batches.split(4, []) == []


def test_long_rows_are_cut_to_what_a_cpu_has_use_for_whatever_the_limit() -> None:
    batches = MicroBatches(rollout([CPU_TOKENS // 4] * 10, [CPU_TOKENS // 4] * 10))
    assert sizes(batches, None) == sizes(batches, 5) == [2] * 5
    assert sizes(batches, 1) == [1] * 10
    assert sizes(MicroBatches(rollout([CPU_TOKENS] * 10, [9] * 10)), None) == [1] * 10


@pytest.mark.parametrize("at_most", [None, 4])
def test_the_longest_come_first_without_the_columns_that_none_of_them_needs(at_most: int | None) -> None:
    prompts, answers = [1, 2, 9, 3, 2, 1, 8, 2, 1, 1], [5, 1, 20, 2, 1, 1, 30, 2, 1, 1]
    parts = MicroBatches(rollout(prompts, answers)).split(at_most)
    assert parts[0].rows_B[:2].tolist() == [6, 2]
    for part in parts:
        rows = part.rows_B.tolist()
        longest = max(answers[row] for row in rows)
        assert part.response_length == longest
        assert part.ids_BL.shape[1] == max(prompts[row] for row in rows) + longest
        # The first token of every answer stands where the prompts' columns, 9 of the rollout's, end.
        assert part.ids_BL[:, -longest].tolist() == [100 * row + 9 for row in rows]
