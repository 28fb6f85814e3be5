"""Settings that differ from their defaults and that nothing reads, because another setting leaves no place for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tlcr.config.schema import RewardConfig, RunConfig
from tlcr.config.trials import arms_of

__all__ = ["unread"]

OF_REWARDS: Mapping[str, tuple[Callable[[RewardConfig], bool], str]] = {
    "band": (lambda reward: reward.kind == "discrete", "reward.kind: discrete"),
    "span_end": (lambda reward: reward.kind == "spans", "reward.kind: spans"),
    "overlong_penalty": (lambda reward: reward.overlong_buffer is not None, "reward.overlong_buffer"),
    "refresh.share": (lambda reward: bool(reward.refresh.every), "reward.refresh.every"),
    "refresh.learning_rate": (lambda reward: bool(reward.refresh.every), "reward.refresh.every"),
}
"""Knobs of a reward: whether it reads them, and what makes one read them."""

OF_RUNS: Mapping[str, tuple[Callable[[RunConfig], bool], str]] = {
    "ppo.value_init": (lambda cfg: cfg.ppo.value_model == "separate", "ppo.value_model: separate"),
    "ppo.best_max_kl": (lambda cfg: cfg.ppo.keep_best, "ppo.keep_best"),
    "kl.horizon": (lambda cfg: cfg.kl.target is not None, "kl.target"),
    "rollout.server": (lambda cfg: cfg.rollout.may_use_servers, "rollout.engine: server"),
    "rollout.server_weights": (lambda cfg: cfg.rollout.may_use_servers, "rollout.engine: server"),
    "rollout.max_turns": (lambda cfg: cfg.rollout.environment is not None, "rollout.environment"),
    "rollout.max_message_tokens": (lambda cfg: cfg.rollout.environment is not None, "rollout.environment"),
    "sharding.offload": (lambda cfg: cfg.sharding.kind != "none", "sharding.kind: full"),
    "sharding.replicas": (lambda cfg: cfg.sharding.kind == "hybrid", "sharding.kind: hybrid"),
    "reviser.server": (lambda cfg: cfg.reviser.may_use_servers, "reviser.engine: server"),
}
"""Other knobs: whether the run reads them, and what makes it."""


def unread(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    """Knobs that were set and that the run does not read.

    A knob of a reward counts only where no arm reads it: arms may share a section.

    Args:
        cfg: the whole config.

    Yields:
        The knob's path, and the setting that it is read with.
    """
    rewards = [arm.reward for arm in arms_of(cfg)]
    for name, (reads, wanted) in OF_REWARDS.items():
        if any(_is_set(reward, name) for reward in rewards) and not any(map(reads, rewards)):
            yield f"reward.{name}", wanted
    for name, (reads_it, wanted) in OF_RUNS.items():
        if _is_set(cfg, name) and not reads_it(cfg):
            yield name, wanted


def _is_set(section: Any, path: str) -> bool:
    """Whether a knob is another than its default."""
    *parents, name = path.split(".")
    for parent in parents:
        section = getattr(section, parent)
    return bool(getattr(section, name) != getattr(type(section)(), name))
