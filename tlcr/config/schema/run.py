"""A whole run: its sections, the policies that it compares, and what no section can check alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from tlcr.config.schema.checked import Checked, knob
from tlcr.config.schema.data import DataConfig, LabelConfig
from tlcr.config.schema.generation import ReviserConfig, RolloutConfig
from tlcr.config.schema.models import LoRAConfig, ModelConfig, ShardingConfig
from tlcr.config.schema.ppo import KLConfig, PPOConfig
from tlcr.config.schema.rewards import LOGIT_KINDS, SCORED_KINDS, RewardConfig
from tlcr.config.schema.training import (
    DiscriminatorConfig,
    DPOConfig,
    QModelConfig,
    RewardModelConfig,
    SFTConfig,
)
from tlcr.errors import ConfigError


@dataclass(frozen=True)
class EvaluationConfig(Checked):
    """How a policy is evaluated."""

    prompts: int = knob(256, "held-out prompts", ge=1)
    scorer: str | None = knob(
        None,
        "'package.module:function' or 'file.py:function', from texts to scores that training never sees; the embedded "
        "task has its own",
        path=True,
    )
    samples: int = knob(12, "answers kept with per-token detail for the report", ge=0)
    per: Literal["token", "answer"] | None = knob(
        None,
        "whether arms are compared by gold and KL per token or per answer; default: answer with a scorer, which scores "
        "whole answers, and token on the embedded task, whose gold is a sum over words",
        advanced=True,
        decides=False,
    )

    @property
    def judged_by(self) -> dict[str, int | str | None]:
        """What decides the figures of an evaluation beside the policy: evaluations with others are not one curve."""
        return {"prompts": self.prompts, "scorer": self.scorer}


def _check_kl_coefs(coefs: tuple[float, ...], owner: str) -> None:
    for coef in coefs:
        if coef < 0:
            raise ConfigError(f"{owner}.kl_coefs has {coef!r}; each must be at least 0")
        if coefs.count(coef) > 1:
            raise ConfigError(f"{owner}.kl_coefs has {coef!r} twice; each names the folder of a run of its own")


@dataclass(frozen=True)
class Arm(Checked):
    """One policy of a comparison: a name, and the settings that differ from those of the run."""

    name: str
    reward: RewardConfig = field(default_factory=RewardConfig)
    kl_coefs: tuple[float, ...] = knob((), "KL coefficients of this arm; default: those of the run")
    gamma: float | None = knob(
        None, "discount of this arm: 0 pays an action its own reward alone; default: ppo.gamma", ge=0, le=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ConfigError(f"Arm.name is {self.name!r}; it names a folder: use letters, digits, '.', '_' and '-'")
        _check_kl_coefs(self.kl_coefs, "Arm")


@dataclass(frozen=True)
class RunConfig(Checked):
    """What is trained, for which seeds, KL coefficients and rewards, and where it is written."""

    output_dir: str = knob("runs/default", "everything a run writes goes here", path=True)
    seed: int = knob(0, "seed of every stage before PPO", ge=0)
    seeds: tuple[int, ...] = knob((0,), "one PPO run for each seed, arm and KL coefficient")
    models_per_seed: bool = knob(
        False,
        "train SFT and reward models for each of seeds, shared by its arms; else all seeds use those of 'seed'",
        advanced=True,
    )
    kl_coefs: tuple[float, ...] = knob((), "KL coefficients to compare every arm at; default: kl.coef alone")
    tracker: Literal["tensorboard", "wandb", "none"] = knob("none", "also log to this tracker, through accelerate")
    parallel: int = knob(1, "PPO runs at a time, each in its own process", ge=1)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reviser: ReviserConfig = field(default_factory=ReviserConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)
    sft: SFTConfig = field(default_factory=lambda: SFTConfig(batch_size=16, weight_decay=0.0))
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    q_model: QModelConfig = field(default_factory=lambda: QModelConfig(epochs=1))
    dpo: DPOConfig = field(default_factory=lambda: DPOConfig(epochs=1, learning_rate=1e-6, weight_decay=0.0))
    reward: RewardConfig = field(default_factory=RewardConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    arms: tuple[Arm, ...] = knob((), "policies to train and compare; none: one policy, trained on 'reward'")

    def __post_init__(self) -> None:
        super().__post_init__()
        named: dict[str, list[object]] = {"arms": [arm.name for arm in self.arms], "seeds": list(self.seeds)}
        for path, values in named.items():
            for value in values:
                if values.count(value) > 1:
                    raise ConfigError(
                        f"RunConfig.{path} has {value!r} twice; each names the folder of a run of its own"
                    )
        if not self.seeds:
            raise ConfigError("RunConfig.seeds is empty; name at least one seed, such as [0]")
        if self.reviser.backend != "none" and self.data.edits is not None:
            raise ConfigError(
                f"RunConfig.data.edits is {self.data.edits!r} and reviser.backend is {self.reviser.backend!r}: edits "
                "are read, or a reviser makes them; drop one of the two settings"
            )
        if self.lora.trains("sft") and self.model.path == "embedded" and self.sft.enabled:
            raise ConfigError(
                "RunConfig.lora.roles has 'sft', but model.path is 'embedded': SFT starts from random weights there, "
                "which adapters cannot make a language model of; drop 'sft' from lora.roles"
            )
        if self.lora.base_bits is not None and self.sharding.kind != "none":
            raise ConfigError(
                f"RunConfig.lora.base_bits is {self.lora.base_bits} and sharding.kind {self.sharding.kind!r}: weights "
                "in 4 bits are packed, and cannot be cut by rows; set sharding.kind: none, or lora.base_bits: null"
            )
        elsewhere = self.ppo.value_model == "separate" and self.ppo.value_init != "policy"
        if elsewhere and self.lora.trains("value"):
            raise ConfigError(
                f"RunConfig.ppo.value_init is {self.ppo.value_init!r}, but lora.roles has 'value': its adapter stands "
                "on the policy's weights; set ppo.value_init: policy, or drop 'value' from lora.roles"
            )
        _check_kl_coefs(self.kl_coefs, "RunConfig")
        several = self.kl_coefs or [coef for arm in self.arms for coef in arm.kl_coefs]
        if several and self.kl.target is not None:
            raise ConfigError(
                f"RunConfig.kl_coefs compares fixed coefficients, but kl.target {self.kl.target} adapts each of them "
                "to one KL; drop one of the two"
            )
        if self.rollout.may_use_servers and self.parallel > len(self.rollout.server):
            raise ConfigError(
                f"RunConfig.parallel is {self.parallel} and rollout.server names {len(self.rollout.server)}: PPO runs "
                "at a time give their servers different weights, so each needs one of its own; set parallel: "
                f"{len(self.rollout.server)}, or name more servers"
            )
        if any(reward.refresh.every for reward in (self.reward, *(arm.reward for arm in self.arms))):
            self._check_refresh()
        self._check_overlong()
        official = [reward for reward in (self.reward, *(arm.reward for arm in self.arms)) if reward.compat is not None]
        if official and self.kl.placement != "reward":
            raise ConfigError(
                f"RunConfig.kl.placement is {self.kl.placement!r}, but reward.compat {official[0].compat!r} pays the "
                "KL in the reward, as the released code does; set kl.placement: reward"
            )

    def _check_refresh(self) -> None:
        own_task = self.model.path == "embedded" and self.data.preferences is None and self.data.prompts is None
        if not own_task and self.reviser.backend not in ("endpoint", "local"):
            raise ConfigError(
                f"RunConfig.reward.refresh has the policy's answers revised during PPO, but reviser.backend is "
                f"{self.reviser.backend!r}; set it to endpoint or local, or reward.refresh.every: 0"
            )
        if not own_task and self.data.preferences is None:
            raise ConfigError(
                "RunConfig.reward.refresh compares the policy's answers with chosen ones, but data.preferences is not "
                "set; name preferences, or set reward.refresh.every: 0"
            )
        if not own_task and self.data.prompts is not None:
            raise ConfigError(
                f"RunConfig.reward.refresh compares the policy's answers with chosen ones, which the prompts in "
                f"data.prompts {self.data.prompts!r} have not; drop data.prompts, or set reward.refresh.every: 0"
            )
        for name, value, refused in (
            ("sharding.kind", self.sharding.kind, self.sharding.kind != "none"),
            ("lora.roles", self.lora.roles, self.lora.trains("discriminator")),
            ("rollout.environment", self.rollout.environment, self.rollout.environment is not None),
        ):
            if refused:
                raise ConfigError(
                    f"RunConfig.reward.refresh trains a whole discriminator, on single answers, which {name} "
                    f"{value!r} does not leave; change that setting, or set reward.refresh.every: 0"
                )
        if self.ppo.keep_best:
            raise ConfigError(
                "RunConfig.ppo.keep_best compares the own rewards of several moments, and reward.refresh changes what "
                "they are measured by; set ppo.keep_best: false, or reward.refresh.every: 0"
            )

    def _check_overlong(self) -> None:
        for reward in (self.reward, *(arm.reward for arm in self.arms)):
            if reward.overlong_buffer is None:
                continue
            if reward.overlong_buffer > self.rollout.max_new_tokens:
                raise ConfigError(
                    f"RunConfig.reward.overlong_buffer is {reward.overlong_buffer}, more than rollout.max_new_tokens, "
                    f"{self.rollout.max_new_tokens}: every answer would pay; set it to a share of them, such as a fifth"
                )
            if self.rollout.environment is not None:
                raise ConfigError(
                    "RunConfig.reward.overlong_buffer is the end of one answer's length, but rollout.environment makes "
                    "conversations of several; drop one of the two"
                )

    @property
    def kl_estimator(self) -> Literal["k1", "k2", "k3", "full"]:
        """The estimator of the KL penalty: kl.estimator, or the exact KL where reward.compat is set."""
        return "full" if self.reward.compat is not None else self.kl.estimator

    def uses_reward_model(self, reward: RewardConfig) -> bool:
        """Whether PPO on this reward loads the sequence reward model."""
        scored = reward.kind in SCORED_KINDS or reward.sequence_coef > 0
        return scored or self._value_starts_from("reward_model")

    def uses_discriminator(self, reward: RewardConfig) -> bool:
        """Whether PPO on this reward loads the discriminator."""
        return reward.kind in LOGIT_KINDS or self._value_starts_from("discriminator")

    def uses_q_model(self, reward: RewardConfig) -> bool:
        """Whether PPO on this reward loads the token-level Q function."""
        return reward.kind == "q"

    def uses_dpo(self, reward: RewardConfig) -> bool:
        """Whether PPO on this reward loads the policy trained by DPO."""
        return reward.kind == "dpo"

    def _value_starts_from(self, model: str) -> bool:
        return self.ppo.value_model == "separate" and self.ppo.value_init == model
