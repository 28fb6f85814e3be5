"""An advantage for every token without a critic: reward-to-go, centred within the group of answers to one prompt.

Trainers without a value model compare the answers to one prompt. Most add an answer's rewards up first, and give all
its tokens one number; here each token keeps its own. Plain torch, on the device of the rewards.

Axes: B answers, T response tokens, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tlcr.errors import ConfigError, ShapeError

__all__ = ["Baseline", "Normalise", "group_reward_to_go", "reward_to_go"]

Normalise = Literal["none", "batch", "group"]
Baseline = Literal["position", "return"]


def group_reward_to_go(
    token_rewards_BT: Tensor,
    mask_BT: Tensor,
    group_B: Tensor | Sequence[int],
    *,
    gamma: float = 1.0,
    normalise: Normalise = "none",
    baseline: Baseline = "position",
    per_token: bool = False,
) -> Tensor:
    """The reward-to-go of every token, less what the group's answers get on average::

        R_t = r_t + gamma R_next         next: the next counted token of the row; 0 after the last
        A_t = R_t - mean over the group of R_t            baseline="position"; an answer that has ended counts as 0
        A_t = R_t - mean over the group of R_0            baseline="return"
        A   = A / sqrt(mean of A^2)                       normalise="batch" or "group"; the mean is over counted tokens

    With ``per_token`` the rewards of an answer with n counted tokens are divided by n first, so that its return is the
    mean of its rewards. At a token that does not count, R is that of the next one that does, and A is 0.

    What it assumes, and when it is biased as an estimate of the policy gradient of the sum of rewards:

    - The answers of a group are drawn independently from one policy, and a reward depends on the tokens up to its own
      alone. A discriminator with bidirectional layers breaks the second: rewards before t then depend on action t, and
      leaving them out is a bias.
    - A group of n answers gives the gradient times (n - 1) / n, because an answer is part of its own baseline. Between
      groups of one size that is a smaller learning rate and no bias; a group of one answer teaches nothing. It holds at
      every t because answers that have ended stay in the mean, as 0, which they truly get from there on. Where few
      answers reach t that baseline is small and the noise is that of R_t itself.
    - ``baseline="return"`` is unbiased too and noisier: late in an answer little is left of the return.
    - ``gamma < 1`` favours what is paid soon, and is a bias.
    - ``per_token`` is a bias: n depends on later actions, and what a longer answer does to the share of the rewards
      before t is left out. It takes away that long answers pay where rewards are above 0 on average.
    - ``normalise="group"`` weighs prompts whose answers are alike as much as others (Liu et al. 2025, arXiv
      2503.20783). ``"batch"`` is one factor for all, which varies a little from batch to batch.
    - The noise of R_t is that of all rewards after t. A critic takes out what can be foreseen of them; PPO with GAE
      is the better choice where there is one.

    ``tlcr.fused_gae(rewards, zeros, mask, gamma=gamma, lam=1)`` returns the same R as its advantages.

    Args:
        token_rewards_BT: (B, T), any float dtype.
        mask_BT: (B, T) bool or integers, True where a token counts; what stands elsewhere, NaN included, is not read.
        group_B: (B,) integers, equal for answers to the same prompt, in any order.
        gamma: the discount, in [0, 1].
        normalise: what the advantages are scaled to a mean square of 1 over; a batch or group of zeros stays 0.
        baseline: what is subtracted.
        per_token: rewards become shares of the answer's mean.

    Returns:
        (B, T) float32, or float64 where the rewards are; without a gradient.

    Raises:
        ShapeError: the shapes do not fit.
        ConfigError: an option has another value than these.

    Source: ours; the centring is that of GRPO (Shao et al. 2024, arXiv 2402.03300), at every token.
    """
    group_B = torch.as_tensor(group_B, device=token_rewards_BT.device)
    if token_rewards_BT.dim() != 2 or mask_BT.shape != token_rewards_BT.shape:
        raise ShapeError(
            f"rewards have the shape {tuple(token_rewards_BT.shape)} and the mask {tuple(mask_BT.shape)}; wanted "
            "(B, T) for both"
        )
    if group_B.shape != token_rewards_BT.shape[:1] or group_B.is_floating_point():
        raise ShapeError(
            f"group has the shape {tuple(group_B.shape)} and dtype {group_B.dtype}; wanted one integer for each of the "
            f"{token_rewards_BT.shape[0]} answers"
        )
    if normalise not in ("none", "batch", "group") or baseline not in ("position", "return"):
        raise ConfigError(
            f"normalise is {normalise!r} and baseline {baseline!r}; wanted none, batch or group, and position or return"
        )
    mask_BT = mask_BT.bool()
    rewards_BT = token_rewards_BT.detach()
    if rewards_BT.dtype != torch.float64:
        rewards_BT = rewards_BT.float()
    if per_token:
        rewards_BT = rewards_BT / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    returns_BT = reward_to_go(rewards_BT, mask_BT, gamma=gamma)
    if returns_BT.numel() == 0:
        return returns_BT

    groups, index_B = group_B.unique(return_inverse=True)
    size_G = index_B.bincount(minlength=len(groups))
    compared_BT = returns_BT if baseline == "position" else returns_BT[:, :1].expand_as(returns_BT)
    mean_GT = returns_BT.new_zeros(len(groups), returns_BT.shape[1]).index_add_(0, index_B, compared_BT)
    mean_GT /= size_G[:, None]
    advantages_BT = (returns_BT - mean_GT[index_B]).where(mask_BT, 0)

    if normalise == "none":
        return advantages_BT
    square_B, counted_B = advantages_BT.square().sum(dim=1), mask_BT.sum(dim=1).to(advantages_BT)
    if normalise == "group":
        square_B, counted_B = (torch.zeros_like(x).index_add_(0, index_B, x)[index_B] for x in (square_B, counted_B))
    else:
        square_B, counted_B = square_B.sum(), counted_B.sum()
    size = (square_B / counted_B.clamp(min=1)).sqrt()
    return advantages_BT / size.where(size > 0, 1).reshape(-1, 1)


def reward_to_go(rewards_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0) -> Tensor:
    """R_t = r_t + gamma R_next, where next is the next counted token of the row and R is 0 after the last.

    Args:
        rewards_BT: (B, T) of any float dtype.
        mask_BT: (B, T) bool, True where a token counts; what stands elsewhere, NaN included, is not read.
        gamma: the discount, in [0, 1].

    Returns:
        (B, T) of the rewards' dtype. At a token that does not count: the R of the next one that does.

    Raises:
        ConfigError: gamma is outside [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ConfigError(f"gamma is {gamma}; wanted a discount in [0, 1]")
    rewards_BT = rewards_BT.where(mask_BT, 0)
    if gamma == 1:
        return rewards_BT.flip(1).cumsum(1).flip(1)
    returns_BT = torch.empty_like(rewards_BT)
    later_B = rewards_BT.new_zeros(rewards_BT.shape[0])
    for t in reversed(range(rewards_BT.shape[1])):
        later_B = torch.where(mask_BT[:, t], rewards_BT[:, t] + gamma * later_B, later_B)
        returns_BT[:, t] = later_B
    return returns_BT
