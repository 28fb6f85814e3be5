"""Reward sources: a frozen model's scores of a rollout, for any tokenizer.

A source that shares the policy's tokenizer reads the policy's ids. Another one reads text, and its scores are mapped
back to the policy's tokens by the characters that they share. Weights are applied in the composition, not here.
"""

from tlcr.config.functions import import_function
from tlcr.rewards.sources.build import CombinedSource, LoadedModel, build_reward_source
from tlcr.rewards.sources.callable import CallableSource
from tlcr.rewards.sources.discriminator import DiscriminatorSource
from tlcr.rewards.sources.frozen_model import FrozenModel, same_tokenizer
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

__all__ = [
    "AttentionSource",
    "CallableSource",
    "CombinedSource",
    "DiscriminatorSource",
    "FrozenModel",
    "LoadedModel",
    "LogRatioSource",
    "PrefixDifferenceSource",
    "QSource",
    "RandomSource",
    "RewardSource",
    "SequenceRewardSource",
    "SpanSource",
    "UniformSource",
    "build_reward_source",
    "import_function",
    "models_of",
    "same_tokenizer",
]
