"""What samples answers in a rollout: an `Engine` takes token ids and gives token ids.

An engine that runs in this process reads the policy's weights in every call, so it samples from the policy as it is.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from tlcr.config.schema import EngineName
from tlcr.ppo.engines.generate import Generate
from tlcr.ppo.engines.paged import Paged
from tlcr.ppo.engines.protocol import Answer, Engine, Sampling

__all__ = ["Answer", "Engine", "Sampling", "build_engine"]


def build_engine(name: EngineName, policy: PreTrainedModel) -> Engine:
    """The engine that ``rollout.engine`` names.

    Args:
        name: the engine.
        policy: the model itself, not a data-parallel wrapper.

    Returns:
        The engine.

    Raises:
        ConfigError: it cannot run this policy.
    """
    if name == "paged":
        return Paged(policy)
    return Generate(policy, static_cache=name == "static")
