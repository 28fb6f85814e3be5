"""How a rollout is cut into forward passes: every row once and whole, little padding, as many on every process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from tests.ppo.helpers import ANSWER_IDS, PROMPT_IDS, known_rollout
from tests.ppo.test_invariance import assert_same, update
from tlcr.errors import DataError
from tlcr.models.actor_critic import ActorCritic
from tlcr.ppo import microbatches
from tlcr.ppo.microbatches import CPU_TOKENS, MicroBatch, MicroBatches, PackedMicroBatch, PaddedMicroBatch
from tlcr.ppo.scores import score_rollout
from tlcr.types import PolicyScores, Rollout


def rollout(prompts: list[int], answers: list[int]) -> Rollout:
    """Rows of these lengths; the ids of row r count upwards from 1000 (r + 1), prompt and answer in one."""
    P, T, B = max(prompts), max(answers), len(prompts)
    shift_B1, first_B1 = P - torch.tensor(prompts).unsqueeze(1), 1000 * torch.arange(1, B + 1).unsqueeze(1)
    mask_BT = torch.arange(T) < torch.tensor(answers).unsqueeze(1)
    prompt_mask_BP = torch.arange(P) >= shift_B1
    ids_BL = first_B1 + torch.arange(P + T) - shift_B1
    return Rollout(
        prompts=("",) * B,
        responses=("",) * B,
        prompt_ids_BP=torch.where(prompt_mask_BP, ids_BL[:, :P], 7),
        prompt_mask_BP=prompt_mask_BP,
        response_ids_BT=torch.where(mask_BT, ids_BL[:, P:], 7),
        mask_BT=mask_BT,
        ended_B=torch.ones(B, dtype=torch.bool),
    )


def split(of: Rollout, rows: int | None = None, tokens: int | None = None) -> list[PaddedMicroBatch]:
    (parts,) = MicroBatches(of, rows=rows, tokens=tokens).split()
    assert sorted(row for part in parts for row in part.rows_B.tolist()) == list(range(len(of.mask_BT)))
    return [part for part in parts if isinstance(part, PaddedMicroBatch)]


def split_packed(of: Rollout, rows: int | None = None, tokens: int | None = None) -> list[PackedMicroBatch]:
    (parts,) = MicroBatches(of, rows=rows, tokens=tokens, packed=True).split()
    assert sorted(row for part in parts for row in part.rows_B.tolist()) == list(range(len(of.mask_BT)))
    return [part for part in parts if isinstance(part, PackedMicroBatch)]


def sizes(parts: Sequence[MicroBatch]) -> list[int]:
    return [len(part.rows_B) for part in parts]


# ---- what a micro-batch holds


@pytest.mark.parametrize("rows", [None, 3])
def test_a_row_is_its_prompt_its_answer_and_padding(rows: int | None) -> None:
    prompts, answers = [1, 2, 9, 3, 2, 1, 8, 2, 1, 1], [5, 1, 20, 2, 1, 1, 30, 2, 1, 1]
    parts = split(rollout(prompts, answers), rows)
    assert parts[0].rows_B[:2].tolist() == [6, 2]
    for part in parts:
        numbers = part.rows_B.tolist()
        L = part.ids_BL.shape[1]
        assert max(prompts[row] + answers[row] for row in numbers) == L
        assert part.response_length == max(answers[row] for row in numbers)
        expected_actions = []
        for at, row in enumerate(numbers):
            whole = prompts[row] + answers[row]
            assert part.ids_BL[at, :whole].tolist() == [1000 * (row + 1) + column for column in range(whole)]
            assert part.attention_mask_BL[at].tolist() == [column < whole for column in range(L)]
            expected_actions += [at * L + prompts[row] + t for t in range(answers[row])]
        assert part.actions_N.tolist() == expected_actions


def test_what_is_said_of_an_action_goes_to_its_row_and_column() -> None:
    of = known_rollout(extra_left=2, extra_right=3)
    written_BT = torch.full(of.mask_BT.shape, -1.0)
    for part in split(of, 3):
        ids_N = part.ids_BL.flatten()[part.actions_N].double()
        spread_BT = part.spread(ids_N)
        assert torch.equal(spread_BT[part.mask_BT], part.take(of.response_ids_BT)[part.mask_BT].double())
        assert (spread_BT[~part.mask_BT] == 0).all()
        part.put(ids_N, written_BT)
    for row, answer in enumerate(ANSWER_IDS):
        assert written_BT[row, : len(answer)].tolist() == answer


def test_an_action_that_does_not_count_between_others_keeps_its_place() -> None:
    """What a tool wrote into an answer, say: later actions stay where they are, and its own figures go nowhere."""
    of = known_rollout()
    of.mask_BT[0, 1] = of.mask_BT[6, 3] = False
    written_BT = torch.full(of.mask_BT.shape, -1.0)
    for part in split(of, 4):
        part.put(part.ids_BL.flatten()[part.actions_N].double(), written_BT)
    assert written_BT[0, :4].tolist() == [41, -1, 60, 2]
    assert written_BT[6].tolist() == [33, 34, 35, -1, 37]


def test_gradients_come_back_from_rows_and_columns() -> None:
    (part,) = split(known_rollout())
    x_N = torch.arange(len(part.actions_N), dtype=torch.float64, requires_grad=True)
    (part.spread(x_N) * part.take(known_rollout().response_ids_BT)).sum().backward()
    assert x_N.grad is not None
    assert torch.equal(x_N.grad, part.ids_BL.flatten()[part.actions_N].double())


# ---- how rows are cut


def test_short_rows_go_together_and_the_largest_part_is_as_small_as_can_be() -> None:
    of = rollout([2] * 10, [3] * 10)
    assert sizes(split(of)) == [10]
    assert sizes(split(of, rows=6)) == [5, 5]
    assert sizes(split(of, rows=3)) == [3, 3, 3, 1]
    assert sizes(split(of, tokens=5 * 4)) == [4, 4, 2]
    assert sizes(split(of, rows=2, tokens=5 * 4)) == [2] * 5
    assert sizes(split(of, tokens=1)) == [1] * 10
    some = MicroBatches(of, rows=None, tokens=None).split([[4, 7, 1], [], [0]])
    assert [[part.rows_B.tolist() for part in parts] for parts in some] == [[[4, 7, 1]], [], [[0]]]


def test_long_rows_are_cut_to_what_a_cpu_has_use_for() -> None:
    of = rollout([CPU_TOKENS // 4] * 10, [CPU_TOKENS // 4] * 10)
    assert sizes(split(of)) == sizes(split(of, rows=5)) == [2] * 5
    assert sizes(split(of, rows=1)) == [1] * 10
    assert sizes(split(of, tokens=CPU_TOKENS * 2)) == [4, 4, 2]
    assert sizes(split(rollout([CPU_TOKENS] * 10, [9] * 10))) == [1] * 10


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=24),
    rows=st.none() | st.integers(1, 9),
    tokens=st.none() | st.integers(1, 400),
)
def test_no_limit_is_passed_and_no_row_is_lost(
    lengths: list[tuple[int, int]], rows: int | None, tokens: int | None
) -> None:
    parts = split(rollout(*map(list, zip(*lengths, strict=True))), rows, tokens)
    for part in parts:
        assert rows is None or len(part.rows_B) <= rows
        assert part.ids_BL.numel() <= (tokens or CPU_TOKENS) or len(part.rows_B) == 1
        assert part.mask_BT.any()


def test_rows_of_unlike_parts_and_like_lengths_waste_nothing() -> None:
    """Two rectangles would hold 9 + 9 columns a row, of which the rows fill 10."""
    (part,) = split(rollout([1, 3, 5, 7, 9], [9, 7, 5, 3, 1]))
    assert part.ids_BL.shape == (5, 10) and part.attention_mask_BL.all()


# ---- packed


@pytest.mark.parametrize("rows", [None, 3])
def test_packed_rows_stand_end_to_end_without_padding(rows: int | None) -> None:
    prompts, answers = [1, 2, 9, 3, 2, 1, 8, 2, 1, 1], [5, 1, 20, 0, 1, 1, 30, 2, 1, 1]
    for part in split_packed(rollout(prompts, answers), rows):
        numbers = part.rows_B.tolist()
        lengths = [prompts[row] + answers[row] for row in numbers]
        assert part.ids_BL[0].tolist() == [
            1000 * (row + 1) + at for row in numbers for at in range(prompts[row] + answers[row])
        ]
        assert part.packing.positions_1L[0].tolist() == [at for length in lengths for at in range(length)]
        assert part.packing.starts_S.tolist() == [sum(lengths[:at]) for at in range(len(lengths) + 1)]
        assert part.packing.longest == max(lengths)
        actions = part.ids_BL[0, part.actions_N].tolist()
        assert actions == [1000 * (row + 1) + prompts[row] + t for row in numbers for t in range(answers[row])]


def test_what_is_said_of_packed_actions_goes_to_row_and_column() -> None:
    of = known_rollout(extra_left=2, extra_right=3)
    written_BT = torch.full(of.mask_BT.shape, -1.0)
    for part in split_packed(of, 3):
        part.put(part.ids_BL.flatten()[part.actions_N].double(), written_BT)
    for row, answer in enumerate(ANSWER_IDS):
        assert written_BT[row, : len(answer)].tolist() == answer
    assert (written_BT[~of.mask_BT] <= 0).all()


def test_packed_rows_are_cut_by_the_tokens_that_they_have() -> None:
    of = rollout([2] * 5, [18, 3, 2, 1, 1])
    assert sizes(split_packed(of, tokens=35)) == sizes(split_packed(of)) == [5]
    assert sizes(split_packed(of, tokens=34)) == [1, 4]
    assert sizes(split(of, tokens=35)) == [1, 4]
    assert sizes(split_packed(of, rows=2)) == [1, 2, 2]
    assert sizes(split_packed(of, tokens=9)) == [1, 2, 2]
    assert sizes(split_packed(of, tokens=1)) == [1] * 5


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=24).filter(
        lambda rows: any(answer for _, answer in rows)
    ),
    rows=st.none() | st.integers(1, 9),
    tokens=st.none() | st.integers(1, 400),
)
def test_packed_micro_batches_pass_no_limit_and_are_no_more_than_padded_ones(
    lengths: list[tuple[int, int]], rows: int | None, tokens: int | None
) -> None:
    of = rollout(*map(list, zip(*lengths, strict=True)))
    parts = split_packed(of, rows, tokens)
    assert sum(part.ids_BL.numel() for part in parts) == sum(map(sum, lengths))
    assert len(parts) <= len(split(of, rows, tokens))
    for part in parts:
        assert rows is None or len(part.rows_B) <= rows
        assert part.ids_BL.numel() <= (tokens or CPU_TOKENS) or len(part.rows_B) == 1


def test_a_token_inside_a_row_that_does_not_count_cannot_be_packed() -> None:
    of = known_rollout()
    of.mask_BT[6, 3] = False
    with pytest.raises(DataError, match=r"answer 6 of the rollout has 1 token\(s\) .* set ppo.packing to never"):
        MicroBatches(of, rows=None, tokens=None, packed=True)


def test_packed_idle_micro_batches_change_no_gradient(
    another_process: Callable[[list[int]], None], tiny_gpt2: Callable[..., PreTrainedModel]
) -> None:
    alone = update(tiny_gpt2, packed=True)
    another_process([11])
    assert_same(alone, update(tiny_gpt2, packed=True))


# ---- as many on every process


@pytest.fixture
def another_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    """Call it with the numbers of micro-batches that another process needs."""

    def needs(numbers: list[int]) -> None:
        monkeypatch.setattr(microbatches, "largest_of_processes", lambda own: torch.maximum(own, torch.tensor(numbers)))

    return needs


def test_a_process_that_needs_fewer_cuts_its_rows_finer(another_process: Callable[[list[int]], None]) -> None:
    of = rollout([2] * 10, [3] * 10)
    another_process([5, 1])
    first, second = MicroBatches(of, rows=None, tokens=None).split([[0, 1, 2, 3, 4, 5, 6, 7], [8, 9]])
    assert sizes(first) == [2, 2, 2, 2, 1] and sizes(second) == [2]
    # Four parts of two are as small as five can make them; the fifth takes part without counting.
    assert [bool(part.mask_BT.any()) for part in first] == [True] * 4 + [False]


def test_where_rows_do_not_suffice_a_micro_batch_counts_nothing(another_process: Callable[[list[int]], None]) -> None:
    of = known_rollout()
    another_process([4, 2])
    first, second = MicroBatches(of, rows=None, tokens=None).split([[0, 1], []])
    assert [bool(part.mask_BT.any()) for part in first] == [True, True, False, False]
    assert [bool(part.mask_BT.any()) for part in second] == [False, False]
    idle = second[0]
    written_BT = torch.full(of.mask_BT.shape, 7.0)
    idle.put(torch.ones(len(idle.actions_N)), written_BT)
    assert (written_BT == 7).all(), "its row is another micro-batch's"
    shortest = min(range(8), key=lambda row: len(PROMPT_IDS[row] + ANSWER_IDS[row]))
    assert idle.ids_BL[0].tolist() == PROMPT_IDS[shortest] + ANSWER_IDS[shortest] and idle.attention_mask_BL.all()


def test_idle_micro_batches_change_no_gradient_and_no_statistic(
    another_process: Callable[[list[int]], None], tiny_gpt2: Callable[..., PreTrainedModel]
) -> None:
    alone = update(tiny_gpt2)
    another_process([11])
    assert_same(alone, update(tiny_gpt2))


def test_idle_micro_batches_change_no_score(
    another_process: Callable[[list[int]], None], tiny_gpt2: Callable[..., PreTrainedModel]
) -> None:
    """Eight answers of one length: whichever of them the idle micro-batches have was scored before."""
    of = rollout([2] * 8, [3] * 8)
    of = replace(of, prompt_ids_BP=of.prompt_ids_BP % 50, response_ids_BT=of.response_ids_BT % 50)
    actor_critic, reference = ActorCritic(tiny_gpt2(seed=1), None).eval(), tiny_gpt2(seed=2)
    assert actor_critic.value_head is not None
    torch.nn.init.normal_(actor_critic.value_head.weight)

    def scores() -> PolicyScores:
        return score_rollout(actor_critic, reference, of, temperature=1.0, exact_kl=True, micro_batch_size=2)

    alone = scores()
    assert all((found != 0).all() for found in (alone.logprobs_BT, alone.values_BT, alone.entropy_BT))
    another_process([11])
    found = scores()
    for name in ("logprobs_BT", "ref_logprobs_BT", "values_BT", "entropy_BT", "kl_BT"):
        torch.testing.assert_close(getattr(found, name), getattr(alone, name))


def test_largest_of_one_process_is_its_own() -> None:
    own = torch.tensor([3, 1])
    found: Tensor = microbatches.largest_of_processes(own)
    assert torch.equal(found, own) and found is not own
