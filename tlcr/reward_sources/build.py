"""From a config to its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config import DataConfig, RewardConfig
from tlcr.errors import ConfigError
from tlcr.reward_sources.callable import CallableSource
from tlcr.reward_sources.discriminator import DiscriminatorSource
from tlcr.reward_sources.judge import Judge
from tlcr.reward_sources.protocol import RewardSource
from tlcr.reward_sources.random import RandomSource
from tlcr.reward_sources.sequence import SequenceRewardSource
from tlcr.types import RewardSignal, Rollout


class CombinedSource:
    """A source, and beside it the sequence reward model's score, for `reward.sequence_coef` to weigh."""

    def __init__(self, source: RewardSource, sequence: SequenceRewardSource) -> None:
        self.source = source
        self.sequence = sequence

    def __call__(self, rollout: Rollout) -> RewardSignal:
        return replace(self.source(rollout), sequence_B=self.sequence(rollout).terminal_B)

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.source.load_state_dict(state)


def build_reward_source(
    cfg: RewardConfig,
    *,
    policy_tokenizer: PreTrainedTokenizerBase,
    discriminator: PreTrainedModel | None,
    discriminator_tokenizer: PreTrainedTokenizerBase | None,
    reward_model: PreTrainedModel | None,
    reward_model_tokenizer: PreTrainedTokenizerBase | None,
    data: DataConfig,
    seed: int,
    micro_batch_size: int | None = None,
) -> RewardSource:
    """The source that `cfg.kind` asks for, with the sequence reward model beside it where `cfg.sequence_coef` is not 0.

    Models that the kind does not need may be None. `micro_batch_size` answers are scored at a time, all by default.
    Raises ConfigError where a model that the kind needs is missing, or its callable cannot be imported.
    """

    def judge(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None, name: str, why: str) -> Judge:
        if model is None or tokenizer is None:
            raise ConfigError(
                f"{why} needs the {name}, but there is none; train it (set {name}.enabled: true) or name a trained one "
                f"in {name}.path"
            )
        return Judge(model, tokenizer, policy_tokenizer, data.max_prompt_tokens, micro_batch_size)

    def sequence(why: str) -> SequenceRewardSource:
        return SequenceRewardSource(judge(reward_model, reward_model_tokenizer, "reward_model", why))

    kind = f"reward.kind {cfg.kind!r}"
    source: RewardSource
    if cfg.kind == "random":
        source = RandomSource(seed)
    elif cfg.kind == "callable":
        if cfg.callable is None:
            raise ConfigError(f"{kind} needs reward.callable; write it as 'package.module:function'")
        source = CallableSource(cfg.callable)
    elif cfg.kind == "sequence":
        source = sequence(kind)
    else:
        source = DiscriminatorSource(judge(discriminator, discriminator_tokenizer, "discriminator", kind))
    if cfg.sequence_coef == 0:
        return source
    return CombinedSource(source, sequence(f"reward.sequence_coef {cfg.sequence_coef}"))
