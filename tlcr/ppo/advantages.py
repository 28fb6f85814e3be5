"""Advantages: dense rewards and values to generalised advantage estimates."""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor

from tlcr import ops
from tlcr.types import Advantages, PolicyScores, Rewards


def compute_advantages(
    rewards: Rewards,
    scores: PolicyScores,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    whiten: bool,
    accelerator: Accelerator | None = None,
) -> Advantages:
    """GAE over the reward of every token (Schulman et al. 2016), and the returns that the value model regresses to.

    Whitening needs the tokens of every process. They are gathered, and the op runs on all of them, so that the result
    does not depend on the number of processes; three (B, T) tensors are small beside a forward pass.

    Args:
        rewards: the reward of every action.
        scores: the values of the rollout, from before the update.
        mask_BT: bool (B, T), True where a response token counts.
        gamma: discount of the next reward, in [0, 1].
        lam: lambda of GAE, in [0, 1].
        whiten: give the advantages zero mean and unit variance over all counted tokens of all processes. The returns
            are taken before that.
        accelerator: the processes that share a round. None: this one alone.

    Returns:
        Advantages and returns, (B, T) float32 or float64, 0 where not counted; no gradient.
    """
    rewards_BT, values_BT = rewards.rewards_BT, scores.values_BT
    if not whiten or accelerator is None or accelerator.num_processes == 1:
        return Advantages(*ops.fused_gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam, whiten=whiten))
    B, T = mask_BT.shape
    everyones = [
        accelerator.gather(accelerator.pad_across_processes(mine_BT, dim=1))
        for mine_BT in (
            rewards_BT,
            values_BT,
            mask_BT.int(),
        )  # padding turns bool into another dtype, on some processes
    ]
    advantages_AT, returns_AT = ops.fused_gae(*everyones, gamma=gamma, lam=lam, whiten=True)
    mine = slice(accelerator.process_index * B, (accelerator.process_index + 1) * B)
    return Advantages(advantages_AT[mine, :T], returns_AT[mine, :T])
