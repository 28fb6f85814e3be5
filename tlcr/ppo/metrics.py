"""The figures of one round of PPO, over all processes; docs/metrics.md explains every key."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from tlcr import ops
from tlcr.ppo.kl import kl_of
from tlcr.ppo.update import UpdateStatistics
from tlcr.rewards.composition import reward_accounting
from tlcr.training.distributed import sum_over_processes
from tlcr.training.profiling import part
from tlcr.types import Advantages, PolicyScores, Rewards, Rollout

logger = logging.getLogger(__name__)


def rollout_metrics(
    rollout: Rollout,
    scores: PolicyScores,
    rewards: Rewards,
    advantages: Advantages,
    estimator: Literal["k1", "k2", "k3", "full"],
    *,
    gamma: float,
) -> dict[str, float]:
    """Figures of the answers of all processes, before the update.

    Sums are taken first and ratios then: a mean over processes would weigh an answer by where it was sampled.

    Args:
        rollout: the answers of this process.
        scores: log-probabilities, values and entropies of these answers.
        rewards: the reward of every action.
        advantages: advantages and returns.
        estimator: the estimate of the KL penalty.
        gamma: discount of the next reward.

    Returns:
        The figures by their names in ``metrics.jsonl``; docs/metrics.md explains each.
    """
    mask_BT = rollout.mask_BT
    kl_BT = kl_of(scores, "k1") if scores.kl_BT is None else scores.kl_BT
    per_token = {
        "kl/per_token": kl_BT,
        "kl/estimate": kl_of(scores, estimator),
        "policy/entropy": scores.entropy_BT,
        "value/mean": scores.values_BT,
        "value/mean_return": advantages.returns_BT,
    }
    counts_B = mask_BT.any(dim=1)
    sums = sum_over_processes(
        torch.stack(
            [
                mask_BT.sum().double(),
                counts_B.sum().double(),
                (rollout.ended_B & counts_B).sum().double(),
                (rollout.read_BT & ~mask_BT).sum().double(),
                *(torch.where(mask_BT, x_BT.double(), 0.0).sum() for x_BT in per_token.values()),
            ]
        )
    )
    tokens, answers, ended, messages, *totals = sums.tolist()
    accounting = reward_accounting(rewards, mask_BT, reduce=sum_over_processes)
    names, figures = list(accounting), torch.stack(list(accounting.values())).tolist()
    return {
        **dict(zip(names, figures, strict=True)),
        **{name: total / max(tokens, 1) for name, total in zip(per_token, totals, strict=True)},
        "value/explained_variance": explained_variance(scores.values_BT, advantages.returns_BT, mask_BT),
        "value/explained_variance_mc": explained_variance(
            scores.values_BT, monte_carlo_returns(rewards, mask_BT, gamma=gamma), mask_BT
        ),
        "kl/per_answer": totals[0] / max(answers, 1),
        "length/mean": tokens / max(answers, 1),
        "length/ended_share": ended / max(answers, 1),
        "length/tokens": tokens,
        **({} if rollout.messages_BT is None else {"length/message_tokens": messages / max(answers, 1)}),
    }


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> float:
    """How much of the returns the values foretell, over the counted tokens of all processes::

        1 - Var(returns - values) / Var(returns)

    Args:
        values_BT: (B, T), from before the update.
        returns_BT: (B, T), what the values are held against.
        mask_BT: bool (B, T), True where a response token counts.

    Returns:
        1 for perfect values, 0 for none better than a constant, below 0 for worse; 0 where all returns are equal.
    """
    pair_2BT = torch.stack([returns_BT.double(), returns_BT.double() - values_BT.double()])
    pair_2BT = torch.where(mask_BT, pair_2BT, 0.0)
    *totals, tokens = sum_over_processes(torch.cat([pair_2BT.sum(dim=(1, 2)), mask_BT.sum().double()[None]]))
    means_2 = torch.stack(totals) / tokens.clamp(min=1)
    centred_2BT = torch.where(mask_BT, pair_2BT - means_2[:, None, None], 0.0)
    of_returns, of_residuals = sum_over_processes(centred_2BT.square().sum(dim=(1, 2))).tolist()
    return 1 - of_residuals / of_returns if of_returns > 0 else 0.0


def monte_carlo_returns(rewards: Rewards, mask_BT: Tensor, *, gamma: float) -> Tensor:
    """The discounted sum of the rewards of each action and all later ones of its answer; no value is in it.

    An answer that the length limit cut counts with what it was paid, as in the advantages, where the limit is an end
    like any other: nothing is paid beyond it. A value there would be what the values are to be held against, and
    leaving those answers out would hold them against the shorter answers alone.

    Args:
        rewards: the reward of every action.
        mask_BT: bool (B, T), True where a response token counts.
        gamma: discount of the next reward, in [0, 1].

    Returns:
        (B, T) float32 or float64, 0 where not counted; no gradient.
    """
    no_values_BT = torch.zeros_like(rewards.rewards_BT)
    return ops.fused_gae(rewards.rewards_BT, no_values_BT, mask_BT, gamma=gamma, lam=1.0, whiten=False)[1]


def update_metrics(statistics: UpdateStatistics) -> dict[str, float]:
    """The update's own statistics under their logged names."""
    return {
        "policy/loss": statistics.policy_loss,
        "policy/clip_fraction": statistics.clip_fraction,
        "policy/approx_kl": statistics.approx_kl,
        "policy/ratio_max": statistics.ratio_max,
        "policy/grad_norm": statistics.policy_grad_norm,
        "value/loss": statistics.value_loss,
        "value/clip_fraction": statistics.value_clip_fraction,
        "value/grad_norm": statistics.value_grad_norm,
        "kl/loss": statistics.kl,
        "update/loss": statistics.loss,
        "update/optimizer_steps": statistics.optimizer_steps,
        "update/stopped_early": float(statistics.stopped_early),
    }


class Stopwatch:
    """Seconds spent in each phase of a round; each is logged, at level DEBUG, when it ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        with part(name):
            yield
            if self._device.type == "cuda":
                # Kernels run asynchronously: without this their time would count in the next phase.
                torch.cuda.synchronize(self._device)
        self._seconds[name] = time.perf_counter() - began
        logger.debug("%s took %.3f s", name, self._seconds[name])

    def metrics(self, tokens: float) -> dict[str, float]:
        """time/<phase>_s, their total, and response tokens of all processes per second of it."""
        total = time.perf_counter() - self._began
        phases = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        return {**phases, "time/total_s": total, "time/tokens_per_s": tokens / total}
