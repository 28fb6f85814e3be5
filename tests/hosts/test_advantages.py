"""The estimator for trainers without a critic: against plain float64 loops, by hand, and against the true gradient."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from torch import Tensor

import tlcr
from tests.hosts.golden import load
from tlcr.errors import ConfigError, ShapeError
from tlcr.hosts.advantages import Baseline, Normalise, group_reward_to_go, reward_to_go

NAN = math.nan


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Seven answers in groups of 3, 3 and 1, mixed; holes, an empty answer, a full row; NaN where not counted."""
    mask_BT = torch.rand(7, 9) > 0.3
    mask_BT &= torch.arange(9) < torch.tensor([9, 5, 0, 7, 1, 9, 4])[:, None]
    rewards_BT = (torch.rand(7, 9, dtype=dtype) * 2 - 1).masked_fill(~mask_BT, NAN)
    return rewards_BT, mask_BT, torch.tensor([4, -2, 4, -2, 9, 4, -2])


def by_loops(
    rewards: Tensor, mask: Tensor, group: Tensor, gamma: float, normalise: str, baseline: str, per_token: bool
) -> Tensor:
    """The formula of the docstring, a number at a time, in float64."""
    B, T = rewards.shape
    going = [[0.0] * (T + 1) for _ in range(B)]
    for b in range(B):
        n = int(mask[b].sum())
        for t in reversed(range(T)):
            r = float(rewards[b, t]) / (n if per_token else 1) if mask[b, t] else 0.0
            going[b][t] = r + gamma * going[b][t + 1] if mask[b, t] else going[b][t + 1]
    mates = [[k for k in range(B) if group[k] == group[b]] for b in range(B)]
    result = torch.zeros(B, T, dtype=torch.float64)
    for b, t in itertools.product(range(B), range(T)):
        mean = sum(going[k][t if baseline == "position" else 0] for k in mates[b]) / len(mates[b])
        result[b, t] = going[b][t] - mean if mask[b, t] else 0.0
    scaled = result.clone()
    for b in range(B):
        rows = {"none": [], "batch": list(range(B)), "group": mates[b]}[normalise]
        counted = [float(result[k, t]) for k in rows for t in range(T) if mask[k, t]]
        size = math.sqrt(math.fsum(x * x for x in counted) / max(len(counted), 1))
        scaled[b] = result[b] / size if size else result[b]
    return scaled


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("baseline", get_args(Baseline))
@pytest.mark.parametrize("normalise", get_args(Normalise))
@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_it_is_the_formula(gamma: float, normalise: Normalise, baseline: Baseline, per_token: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)):
        rewards, mask, group = example(dtype)
        wanted = by_loops(rewards.double(), mask, group, gamma, normalise, baseline, per_token)
        found = group_reward_to_go(
            rewards, mask, group, gamma=gamma, normalise=normalise, baseline=baseline, per_token=per_token
        )
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)


def test_by_hand() -> None:
    """Two answers to one prompt, of three tokens and of one; and one token of a tool."""
    rewards = torch.tensor([[0.5, 9.0, -1.0], [0.25, 0.0, 0.0]])
    mask = torch.tensor([[True, False, True], [True, False, False]])
    # to go: -0.5, -1 (of the next that counts), -1; and 0.25, 0, 0
    found = group_reward_to_go(rewards, mask, [7, 7])
    torch.testing.assert_close(found, torch.tensor([[-0.375, 0.0, -0.5], [0.375, 0.0, 0.0]]))
    found = group_reward_to_go(rewards, mask, [7, 7], baseline="return")
    torch.testing.assert_close(found, torch.tensor([[-0.375, 0.0, -0.875], [0.375, 0.0, 0.0]]))
    found = group_reward_to_go(rewards, mask, [7, 7], per_token=True)  # 0.25 and -0.5 a token; and 0.25
    torch.testing.assert_close(found, torch.tensor([[-0.25, 0.0, -0.25], [0.25, 0.0, 0.0]]))
    found = group_reward_to_go(rewards, mask, [7, 7], normalise="batch")
    assert found[mask].square().mean() == pytest.approx(1)


def test_the_golden_advantages() -> None:
    golden = load()
    wanted = torch.tensor(golden["hosts"]["trl"]["advantages_BT"], dtype=torch.float64)
    rewards = torch.tensor(golden["hosts"]["trl"]["rewards_BT"], dtype=torch.float64)
    mask = torch.zeros(rewards.shape, dtype=torch.long)
    for row, item in zip(mask, golden["items"], strict=True):
        row[: len(item["mask"])] = torch.tensor(item["mask"])
    found = group_reward_to_go(rewards, mask, golden["group"])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
    assert not torch.allclose(group_reward_to_go(rewards.roll(1, 1), mask, golden["group"]), wanted, atol=1e-3)


@pytest.mark.parametrize("gamma", [1.0, 0.97])
def test_the_op_gives_the_same_reward_to_go(gamma: float) -> None:
    rewards, mask, _ = example()
    by_op, _ = tlcr.fused_gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    torch.testing.assert_close(reward_to_go(rewards, mask, gamma=gamma).where(mask, 0), by_op, rtol=0, atol=1e-13)


def test_groups_do_not_touch_each_other_and_order_does_not_matter() -> None:
    rewards, mask, group = example()
    found = group_reward_to_go(rewards, mask, group)
    order = torch.randperm(7)
    torch.testing.assert_close(group_reward_to_go(rewards[order], mask[order], group[order]), found[order])
    other = rewards.clone()
    other[group == 4] = -other[group == 4]
    untouched = group != 4
    torch.testing.assert_close(group_reward_to_go(other, mask, group)[untouched], found[untouched])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_is_legal(shape: tuple[int, int]) -> None:
    group = torch.zeros(shape[0], dtype=torch.long)
    found = group_reward_to_go(torch.zeros(shape), torch.ones(shape), group, normalise="group")
    assert found.shape == shape


def test_a_group_of_one_teaches_nothing_and_zeros_stay_0() -> None:
    rewards, mask = torch.rand(2, 4), torch.ones(2, 4)
    for normalise in get_args(Normalise):
        assert not group_reward_to_go(rewards, mask, [0, 1], normalise=normalise).any()
        assert not group_reward_to_go(rewards * 0, mask, [0, 0], normalise=normalise).any()


def test_what_does_not_fit_is_refused() -> None:
    rewards = torch.zeros(2, 3)
    with pytest.raises(ShapeError, match=r"\(2, 3\) and the mask \(2, 4\)"):
        group_reward_to_go(rewards, torch.ones(2, 4), [0, 0])
    with pytest.raises(ShapeError, match=r"shape \(3,\).*each of the 2 answers"):
        group_reward_to_go(rewards, torch.ones(2, 3), [0, 0, 0])
    with pytest.raises(ShapeError, match=r"dtype torch\.float32"):
        group_reward_to_go(rewards, torch.ones(2, 3), torch.zeros(2))
    with pytest.raises(ConfigError, match="normalise is 'rows'"):
        group_reward_to_go(rewards, torch.ones(2, 3), [0, 0], normalise="rows")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"gamma is 1\.5"):
        group_reward_to_go(rewards, torch.ones(2, 3), [0, 0], gamma=1.5)


# ---- is it the gradient? All answers of a tiny process, weighed by their probability


EOS, LENGTH = 2, 3
REWARD = {0: 0.7, 1: -0.4, EOS: 0.1}
"""Answers over the tokens 0, 1 and the end, of at most 3 tokens; a token's reward, and 0.3 more after a 1."""


def answers() -> list[tuple[int, ...]]:
    found = []
    for length in range(1, LENGTH + 1):
        for ids in itertools.product(range(3), repeat=length):
            if EOS not in ids[:-1] and (ids[-1] == EOS or length == LENGTH):
                found.append(ids)
    return found


def rewards_of(ids: tuple[int, ...]) -> list[float]:
    return [REWARD[token] + (0.3 if t and ids[t - 1] == 1 else 0.0) for t, token in enumerate(ids)]


def expected_gradients(**options: object) -> tuple[Tensor, Tensor]:
    """The expected estimate over all pairs of answers to one prompt, and the gradient of the expected sum."""
    logits = torch.tensor([[0.3, -0.2, 0.1], [0.5, 0.0, -0.4], [0.0, 0.6, -0.1]], dtype=torch.float64).requires_grad_()
    every = answers()
    steps = logits.log_softmax(-1)  # a distribution for each position
    logp_BT = torch.stack(
        [
            torch.stack([steps[t, ids[t]] if t < len(ids) else steps.new_zeros(()) for t in range(LENGTH)])
            for ids in every
        ]
    )
    probability_B = logp_BT.sum(1).exp()
    assert float(probability_B.detach().sum()) == pytest.approx(1)
    total_B = torch.tensor([math.fsum(rewards_of(ids)) for ids in every], dtype=torch.float64)
    (true,) = torch.autograd.grad((probability_B * total_B).sum(), logits, retain_graph=True)

    mask_BT = torch.tensor([[t < len(ids) for t in range(LENGTH)] for ids in every])
    rewards_BT = torch.tensor([rewards_of(ids) + [0.0] * (LENGTH - len(ids)) for ids in every], dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for i, k in itertools.product(range(len(every)), repeat=2):
        pair = [i, k]
        advantages = group_reward_to_go(rewards_BT[pair], mask_BT[pair], [0, 0], **options)  # type: ignore[arg-type]
        weight = (probability_B[i] * probability_B[k]).detach()
        loss = loss + weight * (advantages * logp_BT[pair]).sum() / 2
    (estimate,) = torch.autograd.grad(loss, logits)
    return estimate, true


@pytest.mark.parametrize("baseline", get_args(Baseline))
def test_two_answers_give_half_the_gradient(baseline: Baseline) -> None:
    estimate, true = expected_gradients(baseline=baseline)
    torch.testing.assert_close(estimate, true / 2, rtol=0, atol=1e-12)
    assert true.abs().max() > 0.05


@pytest.mark.parametrize("options", [{"gamma": 0.5}, {"per_token": True}, {"normalise": "group"}])
def test_the_documented_biases_are_biases(options: dict[str, object]) -> None:
    estimate, true = expected_gradients(**options)
    cosine = torch.nn.functional.cosine_similarity(estimate.flatten(), true.flatten(), dim=0)
    assert cosine < 0.9999
