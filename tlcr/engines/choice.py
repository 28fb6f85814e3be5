"""What ``engine: auto`` takes, and why. It depends on the config and on the model alone, so that every process
takes the same, and the doctor says before a run what the run will take."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, TypeVar

from transformers import PreTrainedConfig, PreTrainedModel

from tlcr.config.schema import EngineConfig, EngineName
from tlcr.engines.paged import fault_of

PAGED_PARAMETERS = 100_000_000
"""A policy of fewer parameters samples faster by `generate`: a call of continuous batching costs more than its steps.
Of the sizes that were measured, 135M gained and 0.5M lost (docs/engines.md)."""
PAGED_BATCH = 32
"""Answers at a time with which `paged` was measured to be faster by sdpa, which computes the keys of all of them for
each (docs/engines.md). A flash attention does not."""


ConfigT = TypeVar("ConfigT", bound=EngineConfig)


class Choice(NamedTuple):
    """An engine, and a clause that says why it is taken."""

    engine: EngineName
    why: str


def choose(cfg: EngineConfig, policy: PreTrainedModel, config: PreTrainedConfig | None = None) -> Choice:
    """The fastest engine that is there for a policy: servers where the config names some, else `paged` where it was
    measured to be faster and can run the policy, else `generate`. `static` is not chosen: where it is faster, on GPUs,
    it has not been measured.

    Args:
        cfg: names an engine, which is then the choice; or "auto".
        policy: the model itself; its weights are not read.
        config: with the attention that it will have; None: its own.

    Returns:
        The engine and the reason.
    """
    if cfg.engine != "auto":
        return Choice(cfg.engine, "engine names it")
    if cfg.server:
        return Choice("server", f"server names {len(cfg.server)} of them")
    config = policy.config if config is None else config
    size, attention = policy.num_parameters(), config._attn_implementation
    if size < PAGED_PARAMETERS:
        return Choice("generate", f"continuous batching is slower for models as small as this one ({size / 1e6:.1f}M)")
    if cfg.batch_size > PAGED_BATCH and "flash" not in attention:
        why = f"with {attention} continuous batching was measured up to batch_size {PAGED_BATCH}"
        return Choice("generate", f"{why}, and it is {cfg.batch_size}")
    if (fault := fault_of(config, type(policy))) is not None:
        return Choice("generate", fault)
    return Choice("paged", "continuous batching runs this model, and saves the steps of answers that ended")


def resolved(cfg: ConfigT, policy: PreTrainedModel) -> ConfigT:
    """The config with the engine that is taken in place of "auto"."""
    return cfg if cfg.engine != "auto" else replace(cfg, engine=choose(cfg, policy).engine)
