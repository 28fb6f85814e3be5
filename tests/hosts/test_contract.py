"""What reaches a trainer: one finite reward in [-1, 1] for each token that was sampled, 0 where it does not count."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.golden import FILE, GoldenScorer, build, load
from tlcr.errors import HostError
from tlcr.hosts.contract import Account, Item, checked, project

ROOT = Path(__file__).parents[2]
NAN, INF = math.nan, math.inf


def golden_items() -> list[Item]:
    return [Item(item["prompt_ids"], item["response_ids"], item["mask"]) for item in load()["items"]]


# ---- the golden file


def test_the_golden_file_is_what_its_program_writes() -> None:
    assert load() == build(), f"python -m tests.hosts.golden writes {FILE.name} anew"


def test_a_golden_reward_is_the_difference_of_two_probabilities() -> None:
    """By hand, for the first token of the first answer: logits 0.6 apart at temperature 1.7 are tanh(0.3 / 1.7)."""
    item, temperature = load()["items"][0], load()["temperature"]
    negative, positive = item["logits"][len(item["prompt_ids"])]
    assert item["rewards"][0] == pytest.approx(math.tanh((positive - negative) / temperature / 2), abs=1e-15)


def test_the_golden_answers_have_every_trap() -> None:
    golden = load()
    items, eos = golden["items"], golden["eos_token_id"]
    assert len({len(item["prompt_ids"]) for item in items}) > 1
    assert any(item["response_ids"] == [] for item in items)
    assert any(item["response_ids"] and item["response_ids"][-1] != eos for item in items)
    assert any(golden["pad_token_id"] in item["response_ids"] for item in items)
    assert any(0 in item["mask"][1:-1] for item in items) and any(item["mask"][:1] == [0] for item in items)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shift_by_one_token_shows_in_every_answer(shift: int) -> None:
    right, wrong = GoldenScorer(), GoldenScorer(shift)
    for ids, rewards in right.rewards.items():
        assert len(rewards) == len(ids[1])
        assert not any(rewards) or rewards != pytest.approx(wrong.rewards[ids], abs=1e-3)


# ---- items


@pytest.mark.parametrize("mask", [[1], [1, 1, 1], []])
def test_a_mask_of_another_length_is_refused_with_both_lengths(mask: list[int]) -> None:
    with pytest.raises(HostError, match=rf"2 tokens and its mask {len(mask)};"):
        Item([5], [6, 7], mask)


@pytest.mark.parametrize("token", [-100, 1.0, "6", None, True])
def test_what_is_no_id_is_refused_by_its_place(token: object) -> None:
    with pytest.raises(HostError, match=r"response_ids\[1\] is"):
        Item([5], [6, token])  # type: ignore[list-item]
    with pytest.raises(HostError, match=r"prompt_ids\[0\] is"):
        Item([token], [6])  # type: ignore[list-item]


def test_numbers_of_numpy_are_ids() -> None:
    np = pytest.importorskip("numpy")
    assert checked([[0.5, 0.5]], [Item(np.array([5]), np.array([6, 7]), np.array([True, False]))]) == [[0.5, 0.0]]


# ---- rewards


def test_rewards_pass_as_they_are_and_are_0_where_masked() -> None:
    items = [Item([1], [2, 3, 4], [1, 0, 1]), Item([1], [5]), Item([1], [])]
    assert checked([[0.25, NAN, -1.0], [1.0], []], items) == [[0.25, 0.0, -1.0], [1.0], []]


def test_the_golden_rewards_pass() -> None:
    items = golden_items()
    rewards = checked(GoldenScorer().token_rewards(items), items)
    assert rewards == [item["rewards"] for item in load()["items"]]


@pytest.mark.parametrize(("rewards", "said"), [([[0.1]], "2 tokens and 1"), ([[0.1] * 3], "2 tokens and 3")])
def test_a_list_of_another_length_names_both(rewards: list[list[float]], said: str) -> None:
    with pytest.raises(HostError, match=f"answer 0 has {said}"):
        checked(rewards, [Item([1], [2, 3])])


def test_a_missing_answer_names_both_numbers() -> None:
    with pytest.raises(HostError, match="2 answers were scored and 1 lists"):
        checked([[0.1]], [Item([1], [2]), Item([1], [3])])


@pytest.mark.parametrize("row", [None, 0.5, "0", {"0": 0.5}])
def test_what_is_no_list_is_named(row: Any) -> None:
    with pytest.raises(HostError, match=f"rewards of answer 1 are a {type(row).__name__}; a scorer returns a list"):
        checked([[0.0], row], [Item([1], [2]), Item([1], [3])])


@pytest.mark.parametrize("value", [None, "high", [0.5], 10**400])
def test_what_is_no_number_is_named(value: Any) -> None:
    with pytest.raises(HostError, match=f"reward of token 0 of answer 0 is a {type(value).__name__}; wanted a number"):
        checked([[value]], [Item([1], [2])])


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1.5, -1.0001])
def test_what_is_no_reward_is_refused_by_its_place(value: float) -> None:
    with pytest.raises(HostError, match="token 1 of answer 1 is"):
        checked([[0.0], [0.5, value]], [Item([1], [2]), Item([1], [2, 3])])


# ---- the account


def test_the_account_by_hand() -> None:
    account = Account().add([[0.5, 0.0, -1.0], [0.25]], [[1, 1, 1], [1]]).add([[0.75, 9.0]], [[1, 0]])
    assert account.figures() == pytest.approx(
        {
            "reward/mean_token": 0.5 / 5,
            "reward/mean_abs_token": 2.5 / 5,
            "reward/nonzero_share": 4 / 5,
            "reward/mean_return": 0.5 / 3,
            "reward/mean_answer": (-0.5 / 3 + 0.25 + 0.75) / 3,
            "reward/masked_paid": 1.0,
            "length/mean": 5 / 3,
        }
    )


def test_nothing_counted_is_accounted_as_0() -> None:
    assert set(Account().add([[], [0.0]], [[], [0]]).figures().values()) == {0.0}


def test_the_figures_are_those_of_the_document() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name in Account().figures():
        assert f"| `{name}` |" in page, name


# ---- another tokenizer


def test_a_token_takes_the_mean_over_its_characters() -> None:
    """`ab|cd|` by the discriminator, `a|bc|d|` by the policy, and both ends of sequence."""
    spans, other = [(0, 2), (2, 4), (4, 4)], [(0, 1), (1, 3), (3, 4), (4, 4)]
    assert project([0.5, -1.0, 0.75], spans, other) == [0.5, -0.25, -1.0, 0.75]
    assert project([0.5, -0.25, -1.0, 0.75], other, spans) == [0.125, -0.625, 0.75]


def test_the_same_spans_give_the_same_rewards() -> None:
    spans = [(0, 3), (3, 4), (4, 4), (4, 9), (9, 9)]
    rewards = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert project(rewards, spans, spans) == pytest.approx(rewards)


def test_pieces_of_one_character_share_its_reward() -> None:
    """Byte-level tokenizers split a character; each piece reports all of it."""
    assert project([0.2, 0.4, 1.0], [(0, 1), (0, 1), (1, 2)], [(0, 1), (1, 2)]) == pytest.approx([0.3, 1.0])
    assert project([0.2, 1.0], [(0, 1), (1, 2)], [(0, 1), (0, 1), (1, 2)]) == pytest.approx([0.2, 0.2, 1.0])


def test_a_token_that_nobody_scored_gets_nothing() -> None:
    """White space that a tokenizer leaves out of its spans, and an end of sequence that was not sampled."""
    assert project([0.5, 0.25], [(0, 1), (2, 3)], [(0, 1), (1, 2), (2, 3), (3, 3)]) == [0.5, 0.0, 0.25, 0.0]


def test_spans_of_different_texts_are_refused() -> None:
    with pytest.raises(HostError, match="end at character 2 and the policy's at 9"):
        project([0.5], [(0, 2)], [(7, 9)])
    with pytest.raises(HostError, match="2 rewards came with 1 character spans"):
        project([0.5, 0.5], [(0, 2)], [(0, 2)])
    with pytest.raises(HostError, match=r"other_offsets has \(0, 1\) after \(1, 2\)"):
        project([0.5], [(0, 2)], [(1, 2), (0, 1)])


# ---- what it imports


def test_the_contract_needs_the_standard_library_alone() -> None:
    """In a trainer's environment the rest of tlcr may not be importable."""
    code = """
import sys
for name in ("torch", "numpy", "transformers", "packaging", "requests", "aiohttp"):
    sys.modules[name] = None
import tlcr.hosts.contract, tlcr.hosts.guard, tlcr.hosts.local
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
