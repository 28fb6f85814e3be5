"""Builds the reward source of a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import SHARED_SCORE_KINDS, DataConfig, DPOConfig, QModelConfig, RewardConfig
from tlcr.errors import ConfigError
from tlcr.rewards.sources.callable import CallableSource
from tlcr.rewards.sources.discriminator import DiscriminatorSource
from tlcr.rewards.sources.frozen_model import FrozenModel
from tlcr.rewards.sources.log_ratio import LogRatioSource
from tlcr.rewards.sources.protocol import RewardSource, models_of
from tlcr.rewards.sources.q_values import QSource
from tlcr.rewards.sources.random import RandomSource
from tlcr.rewards.sources.sequence import (
    AttentionSource,
    PrefixDifferenceSource,
    SequenceRewardSource,
    UniformSource,
)
from tlcr.rewards.sources.spans import SpanSource
from tlcr.types import RewardSignal, Rollout

SEQUENCE_SOURCES: dict[str, Callable[[FrozenModel], RewardSource]] = {
    "sequence": SequenceRewardSource,
    "uniform": UniformSource,
    "attention": AttentionSource,
    "prefix_difference": PrefixDifferenceSource,
}


class CombinedSource:
    """A source plus the sequence reward model's score, which `reward.sequence_coef` weights."""

    def __init__(self, source: RewardSource, sequence: SequenceRewardSource) -> None:
        self.source = source
        self.sequence = sequence
        self.models = models_of(source) + sequence.models

    def __call__(self, rollout: Rollout) -> RewardSignal:
        return replace(self.source(rollout), sequence_B=self.sequence(rollout).terminal_B)

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.source.load_state_dict(state)


@dataclass(frozen=True)
class LoadedModel:
    """A frozen model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def build_reward_source(
    cfg: RewardConfig,
    *,
    policy_tokenizer: PreTrainedTokenizerBase,
    discriminator: LoadedModel | None = None,
    reward_model: LoadedModel | None = None,
    q_model: LoadedModel | None = None,
    q_beta: float = QModelConfig.beta,
    dpo: LoadedModel | None = None,
    reference: PreTrainedModel | None = None,
    dpo_beta: float = DPOConfig.beta,
    data: DataConfig,
    seed: int,
    micro_batch_size: int | None = None,
) -> RewardSource:
    """The source of ``cfg.kind``, with the reward model's score where ``cfg.sequence_coef`` is not 0.

    Models that the kind does not need may be None.

    Args:
        cfg: the reward.
        policy_tokenizer: the tokenizer of the rollouts.
        discriminator: for the kinds that use its logits.
        reward_model: for the kinds that use a sequence score.
        q_model: the token-level Q function.
        q_beta: scale of its values.
        dpo: the policy that DPO trained.
        reference: the initial policy of PPO, from which DPO started too.
        dpo_beta: scale of DPO's log-ratio.
        data: limits of prompt and answer, in tokens.
        seed: the seed of random rewards.
        micro_batch_size: answers scored at a time; None: all.

    Returns:
        The source.

    Raises:
        ConfigError: a model that the kind needs is missing, or its callable cannot be imported.
    """

    def frozen_model(loaded: LoadedModel | None, name: str, why: str) -> FrozenModel:
        if loaded is None:
            raise ConfigError(
                f"{why} needs the {name}, but there is none; train it ('tlcr train {name.replace('_', '-')}') or name "
                f"a trained one in {name}.path"
            )
        return FrozenModel(loaded.model, loaded.tokenizer, policy_tokenizer, data.max_prompt_tokens, micro_batch_size)

    kind = f"reward.kind {cfg.kind!r}"
    source: RewardSource
    if cfg.kind == "random":
        source = RandomSource(seed)
    elif cfg.kind == "callable":
        if cfg.callable is None:
            raise ConfigError(f"{kind} needs reward.callable; write it as 'package.module:function'")
        source = CallableSource(cfg.callable)
    elif cfg.kind == "q":
        source = QSource(frozen_model(q_model, "q_model", kind), q_beta)
    elif cfg.kind == "dpo":
        of = frozen_model(dpo, "dpo", kind)
        if reference is None:
            raise ConfigError(f"{kind} is a ratio to the reference, but build_reward_source got none; pass reference=")
        source = LogRatioSource(of, reference, dpo_beta)
    elif cfg.kind in SEQUENCE_SOURCES:
        source = SEQUENCE_SOURCES[cfg.kind](frozen_model(reward_model, "reward_model", kind))
    else:
        source = DiscriminatorSource(frozen_model(discriminator, "discriminator", kind))
        if cfg.kind == "spans":
            source = SpanSource(source, policy_tokenizer, cfg.span_end)
    if cfg.sequence_coef == 0 or cfg.kind in SHARED_SCORE_KINDS:
        return source
    why = f"reward.sequence_coef {cfg.sequence_coef}"
    return CombinedSource(source, SequenceRewardSource(frozen_model(reward_model, "reward_model", why)))
