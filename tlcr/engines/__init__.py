"""What samples answers in a rollout: an `Engine` takes token ids and gives token ids.

An engine that runs in this process reads the policy's weights in every call. Another one is given them by `refresh`.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from tlcr.config.schema import EngineConfig
from tlcr.engines.choice import Choice, choose, resolved
from tlcr.engines.generate import Generate
from tlcr.engines.paged import Paged
from tlcr.engines.protocol import Answer, Engine, Sampling

__all__ = ["Answer", "Choice", "Engine", "Sampling", "build_engine", "choose", "resolved"]


def build_engine(cfg: EngineConfig, policy: PreTrainedModel, folder: Path | None = None) -> Engine:
    """The engine that ``engine`` names, or with "auto" the best that is there (``choose``).

    Args:
        cfg: names the engine, and where its servers are.
        policy: the model itself, not a data-parallel wrapper.
        folder: where weights for servers are written, and everything else deleted. None: a temporary folder.

    Returns:
        The engine; one with servers wants ``refresh`` before it samples.

    Raises:
        ConfigError: it cannot run this policy.
        BackendUnavailable: its packages are not installed.
    """
    cfg = resolved(cfg, policy)
    if cfg.engine == "server":
        from tlcr.engines.server import Server  # it needs the extra openai

        return Server(cfg, policy, folder)
    if cfg.engine == "vllm":
        from tlcr.engines.vllm import VLLM  # it starts one, which takes seconds

        return VLLM(cfg, policy)
    if cfg.engine == "paged":
        return Paged(policy)
    return Generate(policy, static_cache=cfg.engine == "static")
