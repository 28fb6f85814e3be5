"""The figures of one round of PPO, over all processes; docs/metrics.md explains every key."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

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
) -> dict[str, float]:
    """Figures of the answers of all processes, before the update.

    Sums are taken first and ratios then: a mean over processes would weigh an answer by where it was sampled.

    Args:
        rollout: the answers of this process.
        scores: log-probabilities, values and entropies of these answers.
        rewards: the reward of every action.
        advantages: advantages and returns.
        estimator: the estimate of the KL penalty.

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
        "kl/per_answer": totals[0] / max(answers, 1),
        "length/mean": tokens / max(answers, 1),
        "length/ended_share": ended / max(answers, 1),
        "length/tokens": tokens,
        **({} if rollout.messages_BT is None else {"length/message_tokens": messages / max(answers, 1)}),
    }


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
        "value/explained_variance": statistics.explained_variance,
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
