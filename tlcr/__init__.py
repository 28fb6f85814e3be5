"""Token-Level Continuous Reward: dense preference rewards for RLHF (arXiv 2407.16574).

The public names are listed in ``__all__`` and resolved when first used: importing tlcr imports neither torch nor
any other large package, so that ``tlcr --help`` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlcr import ops
    from tlcr.config.loading import dump_config, load_config
    from tlcr.config.schema import RunConfig
    from tlcr.experiment.pipeline import run
    from tlcr.models.actor_critic import ActorCritic
    from tlcr.ops import (
        PPOLoss,
        TokenLabel,
        TokenScores,
        build_info,
        fused_gae,
        fused_reward,
        ppo_loss,
        reward_from_hidden,
        score_hidden,
        score_tokens,
        token_labels,
    )
    from tlcr.recipes.train_discriminator import train_discriminator
    from tlcr.recipes.train_dpo import train_dpo
    from tlcr.recipes.train_ppo import train_ppo
    from tlcr.recipes.train_q_model import train_q_model
    from tlcr.recipes.train_reward_model import train_reward_model
    from tlcr.recipes.train_sft import train_sft
    from tlcr.rewards.sources import RewardSource, build_reward_source

    __version__: str

__all__ = [
    "ActorCritic",
    "PPOLoss",
    "RewardSource",
    "RunConfig",
    "TokenLabel",
    "TokenScores",
    "__version__",
    "build_info",
    "build_reward_source",
    "dump_config",
    "fused_gae",
    "fused_reward",
    "load_config",
    "ops",
    "ppo_loss",
    "reward_from_hidden",
    "run",
    "score_hidden",
    "score_tokens",
    "token_labels",
    "train_discriminator",
    "train_dpo",
    "train_ppo",
    "train_q_model",
    "train_reward_model",
    "train_sft",
]

_HOME = {
    "ActorCritic": "tlcr.models.actor_critic",
    "RewardSource": "tlcr.rewards.sources",
    "RunConfig": "tlcr.config.schema",
    "build_reward_source": "tlcr.rewards.sources",
    "dump_config": "tlcr.config.loading",
    "load_config": "tlcr.config.loading",
    "run": "tlcr.experiment.pipeline",
    "train_discriminator": "tlcr.recipes.train_discriminator",
    "train_dpo": "tlcr.recipes.train_dpo",
    "train_ppo": "tlcr.recipes.train_ppo",
    "train_q_model": "tlcr.recipes.train_q_model",
    "train_reward_model": "tlcr.recipes.train_reward_model",
    "train_sft": "tlcr.recipes.train_sft",
}
"""The module of each name that is not an op."""

if not TYPE_CHECKING:  # a type checker that saw this would accept every misspelt name as Any

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'tlcr' has no attribute {name!r}")
        if name == "__version__":
            from tlcr.distribution import installed_version

            return installed_version()
        if name == "ops":
            return import_module("tlcr.ops")
        value = getattr(import_module(_HOME.get(name, "tlcr.ops")), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
