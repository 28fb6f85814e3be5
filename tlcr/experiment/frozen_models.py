"""The frozen models that an arm's reward needs, the reward source made from them, and the roles that share weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import RunConfig
from tlcr.errors import ConfigError
from tlcr.experiment.run_folder import RunFolder
from tlcr.models.discriminator import load_discriminator, temperature_of
from tlcr.models.loading import load_causal_lm, load_sequence_classifier
from tlcr.models.lora.adapters import base_digest
from tlcr.models.lora.files import FOLDER, read_base
from tlcr.models.lora.roles import Roles
from tlcr.models.tokenizers import load_tokenizer
from tlcr.rewards.sources import LoadedModel, RewardSource, build_reward_source, same_tokenizer
from tlcr.training.sharding import Sharding

logger = logging.getLogger(__name__)

__all__ = [
    "FrozenModels",
    "check_value_start",
    "load_frozen_models",
    "load_reference",
    "load_roles",
    "may_be_a_role",
]


@dataclass(frozen=True)
class FrozenModels:
    """The frozen models of a reward, on their device; None where the reward does not need one."""

    discriminator: LoadedModel | None = None
    reward_model: LoadedModel | None = None
    q_model: LoadedModel | None = None
    dpo: LoadedModel | None = None

    @property
    def models(self) -> list[PreTrainedModel]:
        asked = self.discriminator, self.reward_model, self.q_model, self.dpo
        return [loaded.model for loaded in asked if loaded is not None]

    @property
    def temperature(self) -> float:
        return temperature_of(self.discriminator.model) if self.discriminator is not None else 1.0

    def source(self, run: RunFolder, cfg: RunConfig, reference: PreTrainedModel | None, seed: int) -> RewardSource:
        """reference: the initial policy of PPO, which only the kind 'dpo' needs."""
        return build_reward_source(
            cfg.reward,
            policy_tokenizer=run.tokenizer,
            discriminator=self.discriminator,
            reward_model=self.reward_model,
            q_model=self.q_model,
            q_beta=cfg.q_model.beta,
            dpo=self.dpo,
            reference=reference,
            dpo_beta=cfg.dpo.beta,
            data=cfg.data,
            seed=seed,
            micro_batch_size=cfg.rollout.batch_size,
        )


def load_frozen_models(
    run: RunFolder, cfg: RunConfig, roles: Roles | None = None, *, sharding: Sharding | None = None
) -> FrozenModels:
    """The models that `cfg.reward` needs, trained by the run or named in the config; ConfigError if one is missing.

    roles: the models of PPO that share their weights, which a discriminator joins that is an adapter on them.
    sharding: how the caller will cut the models, which have no weights before.
    """
    frozen = FrozenModels()
    if cfg.uses_discriminator(cfg.reward):
        frozen = replace(frozen, discriminator=_discriminator(run, cfg, roles, sharding))
    if cfg.uses_reward_model(cfg.reward):
        frozen = replace(frozen, reward_model=_scorer(run, cfg, run.reward_model_folder, sharding))
    if cfg.uses_q_model(cfg.reward):
        frozen = replace(frozen, q_model=_scorer(run, cfg, run.q_model_folder, sharding))
    if cfg.uses_dpo(cfg.reward):
        own = cfg.model.saved_in(run.dpo_folder)
        dpo = load_causal_lm(own, device=run.device, sharding=sharding)
        frozen = replace(frozen, dpo=LoadedModel(dpo, load_tokenizer(own)))
    return frozen


def load_roles(run: RunFolder, cfg: RunConfig, seed: int, *, sharding: Sharding | None = None) -> Roles | None:
    """The initial policy of PPO and its reference over one copy of the weights; None where the policy is trained whole.

    seed: decides the first weights of the adapters.
    sharding: how the caller will cut them; the frozen weights are not read before.
    """
    if not cfg.lora.trains("policy"):
        return None
    return Roles(load_causal_lm(run.policy_source, device=run.device, sharding=sharding), cfg.lora, seed=seed)


def load_reference(run: RunFolder, *, sharding: Sharding | None = None) -> PreTrainedModel:
    """The initial policy of PPO, on the run's device.

    sharding: how the caller will cut it; it has no weights before.
    """
    return load_causal_lm(run.policy_source, device=run.device, sharding=sharding)


def _scorer(run: RunFolder, cfg: RunConfig, folder: Path, sharding: Sharding | None) -> LoadedModel:
    """A model with one output: the sequence reward model, or the token-level Q function."""
    own = cfg.model.saved_in(folder)
    model = load_sequence_classifier(folder, own, device=run.device, sharding=sharding)
    return LoadedModel(model, load_tokenizer(own))


def check_value_start(cfg: RunConfig, policy: PreTrainedTokenizerBase, start: PreTrainedTokenizerBase) -> None:
    """Whether a value model can start from the model that ``ppo.value_init`` names: it reads the policy's ids.

    A reward source may have a tokenizer of its own, as it reads answers as text. A value model has not.

    Args:
        cfg: the run, with ``ppo.value_init`` other than "policy".
        policy: the policy's tokenizer.
        start: the tokenizer of the model that ``ppo.value_init`` names.

    Raises:
        ConfigError: their ids do not mean the same.
    """
    init = cfg.ppo.value_init
    if not same_tokenizer(policy, start):
        raise ConfigError(
            f"ppo.value_init is {init!r}, so that the value model starts from the model in {init}.path and reads the "
            "policy's ids, but that model has another tokenizer; set ppo.value_init: policy, or name a model trained "
            "from the policy's"
        )


def may_be_a_role(cfg: RunConfig, about: Mapping[str, Any]) -> bool:
    """Whether a discriminator whose adapter says this of itself can stand on the policy's weights, if they are its own.

    Args:
        cfg: the run, whose policy has an adapter.
        about: what ``read_base`` found.

    Returns:
        False where it is to be loaded whole.
    """
    # a value model that starts from the discriminator copies it whole, and a refresh trains it whole
    copied = cfg.ppo.value_model == "separate" and cfg.ppo.value_init == "discriminator"
    whole = copied or bool(cfg.reward.refresh.every)
    return bool(about) and not whole and not about["config"].get("tlcr_bidirectional_layers", 0)


def _discriminator(run: RunFolder, cfg: RunConfig, roles: Roles | None, sharding: Sharding | None) -> LoadedModel:
    """The discriminator, as a role where its adapter was trained on the same weights and changes nothing else."""
    folder = run.discriminator_folder
    about = read_base(folder / FOLDER)
    if roles is None or not may_be_a_role(cfg, about):
        return LoadedModel(*load_discriminator(folder, cfg.model, device=run.device, sharding=sharding))
    if about["sha256"] != base_digest(roles.policy):
        logger.info("the adapter in %s is for other weights than the policy's, so the discriminator is loaded", folder)
        return LoadedModel(*load_discriminator(folder, cfg.model, device=run.device, sharding=sharding))
    model = roles.load_classifier("discriminator", folder / FOLDER)
    return LoadedModel(model, load_tokenizer(cfg.model.saved_in(folder)))
