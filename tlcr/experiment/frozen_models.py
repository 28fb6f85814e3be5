"""The frozen models that an arm's reward needs, and the reward source made from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from tlcr.config.schema import RunConfig
from tlcr.experiment.run_folder import RunFolder
from tlcr.models.discriminator import load_discriminator, temperature_of
from tlcr.models.loading import load_causal_lm, load_sequence_classifier, load_tokenizer
from tlcr.rewards.sources import LoadedModel, RewardSource, build_reward_source

__all__ = ["FrozenModels", "load_frozen_models", "load_reference"]


@dataclass(frozen=True)
class FrozenModels:
    """The frozen models of a reward, on their device; None where the reward does not need one."""

    discriminator: LoadedModel | None = None
    reward_model: LoadedModel | None = None
    dpo: LoadedModel | None = None

    @property
    def models(self) -> list[PreTrainedModel]:
        return [loaded.model for loaded in (self.discriminator, self.reward_model, self.dpo) if loaded is not None]

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
            dpo=self.dpo,
            reference=reference,
            dpo_beta=cfg.dpo.beta,
            data=cfg.data,
            seed=seed,
            micro_batch_size=cfg.rollout.batch_size,
        )


def load_frozen_models(run: RunFolder, cfg: RunConfig) -> FrozenModels:
    """The models that `cfg.reward` needs, trained by the run or named in the config; ConfigError if one is missing."""
    frozen = FrozenModels()
    if cfg.uses_discriminator(cfg.reward):
        model, tokenizer = load_discriminator(run.discriminator_folder, cfg.model, device=run.device)
        frozen = replace(frozen, discriminator=LoadedModel(model, tokenizer))
    if cfg.uses_reward_model(cfg.reward):
        own = cfg.model.saved_in(run.reward_model_folder)
        model = load_sequence_classifier(run.reward_model_folder, own, device=run.device)
        frozen = replace(frozen, reward_model=LoadedModel(model, load_tokenizer(own)))
    if cfg.uses_dpo(cfg.reward):
        own = cfg.model.saved_in(run.dpo_folder)
        frozen = replace(frozen, dpo=LoadedModel(load_causal_lm(own, device=run.device), load_tokenizer(own)))
    return frozen


def load_reference(run: RunFolder) -> PreTrainedModel:
    """The initial policy of PPO, on the run's device."""
    return load_causal_lm(run.policy_source, device=run.device)
