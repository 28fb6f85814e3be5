"""Token-Level Continuous Reward: dense preference rewards for RLHF (arXiv 2407.16574).

The public names are listed in ``__all__`` and resolved when first used: importing tlcr imports neither torch nor
anything else of weight, so that ``tlcr --help`` answers at once. The recipes are modules that carry a function of their
own name: ``from tlcr.train_ppo import train_ppo``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlcr import ops, train_discriminator, train_ppo, train_reward_model, train_sft
    from tlcr.config import RunConfig
    from tlcr.config_loading import dump_config, load_config
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
    from tlcr.pipeline import run

    __version__: str

__all__ = [
    "PPOLoss",
    "RunConfig",
    "TokenLabel",
    "TokenScores",
    "__version__",
    "build_info",
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
    "train_ppo",
    "train_reward_model",
    "train_sft",
]

_HOME = {
    "RunConfig": "tlcr.config",
    "dump_config": "tlcr.config_loading",
    "load_config": "tlcr.config_loading",
    "run": "tlcr.pipeline",
}
_SUBMODULES = {"ops", "train_discriminator", "train_ppo", "train_reward_model", "train_sft"}


if not TYPE_CHECKING:  # a type checker that saw this would take every misspelt name for Any

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'tlcr' has no attribute {name!r}")
        if name == "__version__":
            from importlib.metadata import version

            return version("tlcr")
        if name in _SUBMODULES:
            return import_module(f"tlcr.{name}")
        value = getattr(import_module(_HOME.get(name, "tlcr.ops")), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
