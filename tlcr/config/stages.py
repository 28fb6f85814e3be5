"""Which stages a run of a config has, and by which files its folder shows what was done.

Nothing here imports torch, so that a config can be refused at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from tlcr.config.schema import DiscriminatorConfig, DPOConfig, QModelConfig, RewardConfig, RewardModelConfig, RunConfig
from tlcr.config.trials import arms_of

__all__ = ["CONFIG", "DONE", "HOLDER", "LOCK", "STAGES", "STARTED", "TRAINED", "replays", "stages_of", "wants"]

STAGES = ("revisions", "sft", "reward_model", "q_model", "dpo", "labels", "discriminator", "analysis", "ppo")
"""In the order in which a run goes through them."""

Frozen: TypeAlias = RewardModelConfig | QModelConfig | DPOConfig | DiscriminatorConfig
"""How a model is trained that a reward asks."""

CONFIG = "config.yaml"
STARTED = "started.json"
"""When the run began, which is the date that its chat template writes on every later day too."""
LOCK = ".lock"
"""Held by the one run that works in the folder, or in that of a stage."""
HOLDER = ".lock-holder"
"""Says who holds the lock, as long as it is held."""
DONE = "done.json"
"""The record of a finished stage, or of a finished training of PPO."""
TRAINED = "arm.json"
"""The record of a finished trial: trained, and evaluated too. done.json in the same folder is train_ppo's."""


def stages_of(cfg: RunConfig) -> tuple[str, ...]:
    """The stages of a whole run of ``cfg``."""
    return tuple(stage for stage in STAGES if wants(cfg, stage))


def wants(cfg: RunConfig, stage: str) -> bool:
    """Whether a run of all stages includes this one: a model is trained if an arm needs it and no path is set."""
    rewards = [arm.reward for arm in arms_of(cfg)]
    discriminator = (cfg.discriminator, cfg.uses_discriminator)
    frozen: dict[str, tuple[Frozen, Callable[[RewardConfig], bool]]] = {
        "reward_model": (cfg.reward_model, cfg.uses_reward_model),
        "q_model": (cfg.q_model, cfg.uses_q_model),
        "dpo": (cfg.dpo, cfg.uses_dpo),
        **dict.fromkeys(("labels", "discriminator", "analysis"), discriminator),
    }
    if stage in frozen:
        training, used = frozen[stage]
        return training.path is None and any(map(used, rewards))
    if stage == "revisions":
        return cfg.reviser.backend != "none" and (wants(cfg, "labels") or any(map(replays, rewards)))
    return cfg.sft.enabled if stage == "sft" else True


def replays(reward: RewardConfig) -> bool:
    """Whether a refresh of the discriminator mixes in edits of the run, whoever trained it first."""
    return reward.refresh.every > 0 and reward.refresh.share > 0
