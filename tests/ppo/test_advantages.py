"""Advantages by hand, and what whitening leaves alone. Two processes: test_invariance_ppo."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tlcr.ppo.advantages import compute_advantages
from tlcr.types import PolicyScores, Rewards

GAMMA, LAM = 0.9, 0.5
REWARDS = torch.tensor([[1.0, 0.0, 2.0], [-1.0, torch.nan, torch.nan]], dtype=torch.float64)
VALUES = torch.tensor([[0.5, 1.0, -1.0], [0.25, torch.nan, torch.nan]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, False, False]])

# From the last token backwards: delta = r + 0.9 V' - V and A = delta + 0.45 A'.
A2 = 2.0 - (-1.0)
A1 = (0.0 + 0.9 * -1.0 - 1.0) + 0.45 * A2
A0 = (1.0 + 0.9 * 1.0 - 0.5) + 0.45 * A1
BY_HAND = torch.tensor([[A0, A1, A2], [-1.25, 0.0, 0.0]], dtype=torch.float64)


def scores(values_BT: Tensor) -> PolicyScores:
    nothing_BT = torch.zeros_like(values_BT)
    return PolicyScores(nothing_BT, nothing_BT, values_BT, nothing_BT)


def advantages(rewards_BT: Tensor, *, whiten: bool) -> tuple[Tensor, Tensor]:
    found = compute_advantages(Rewards(rewards_BT), scores(VALUES), MASK, gamma=GAMMA, lam=LAM, whiten=whiten)
    return found.advantages_BT, found.returns_BT


def test_advantages_and_returns_by_hand() -> None:
    advantages_BT, returns_BT = advantages(REWARDS, whiten=False)
    torch.testing.assert_close(advantages_BT, BY_HAND)
    torch.testing.assert_close(returns_BT, BY_HAND + torch.where(MASK, VALUES, 0.0))


def test_a_reward_one_token_late_changes_them() -> None:
    late_BT = REWARDS.roll(1, dims=1)
    assert (advantages(late_BT.nan_to_num(), whiten=False)[0] - BY_HAND)[MASK].abs().min() > 0.05


def test_whitening_standardises_the_advantages_and_leaves_the_returns() -> None:
    advantages_BT, returns_BT = advantages(REWARDS, whiten=True)
    counted_N = BY_HAND[MASK]
    expected_N = (counted_N - counted_N.mean()) / counted_N.std(correction=0)
    torch.testing.assert_close(advantages_BT[MASK], expected_N)
    assert (advantages_BT[~MASK] == 0).all()
    torch.testing.assert_close(returns_BT, BY_HAND + torch.where(MASK, VALUES, 0.0))


@pytest.mark.parametrize("whiten", [True, False])
def test_nothing_is_differentiable(whiten: bool) -> None:
    values_BT = VALUES.clone().requires_grad_()
    found = compute_advantages(Rewards(REWARDS), scores(values_BT), MASK, gamma=1.0, lam=1.0, whiten=whiten)
    assert not found.advantages_BT.requires_grad and not found.returns_BT.requires_grad
