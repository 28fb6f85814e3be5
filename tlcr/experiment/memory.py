"""Estimates the memory of a run from the model's config; no weights are loaded.

Weights, gradients and optimiser states are counted exactly. Activations are estimated, with one block of a decoder
keeping 8 H + 4 I values per token for the backward pass (H hidden, I intermediate size: norms, projections, attention
output and residuals; gate, up, activation and product), or H where gradient checkpointing recomputes the rest.
Source: ours, after Korthikanti et al. 2022 (arXiv 2205.05198), without their term for attention scores, which fused
attention does not keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tlcr.config.schema import ModelConfig, RunConfig, TrainingConfig
from tlcr.config.trials import arms_of
from tlcr.errors import ConfigError
from tlcr.training.disk import in_words

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Estimate", "ModelSize", "Role", "advice", "build_on_meta", "estimate_run", "in_words", "measure_model"]

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a decoder that decide its memory; tied parameters are counted once."""

    parameters: int
    backbone: int
    vocabulary: int
    hidden: int
    layers: int
    intermediate: int
    key_value: int
    """Values of one token's key in one layer: key-value heads times head width."""

    def with_head(self, outputs: int) -> int:
        """Parameters of the backbone under a linear head without bias."""
        return self.backbone + outputs * self.hidden


@dataclass(frozen=True)
class Role:
    """One model in memory, in bytes. ``optimizer``: float32 moments and, for bfloat16, the rest of the masters."""

    name: str
    parameters: int
    weights: int
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Estimate:
    """The peak memory of a stage, in bytes: that of its models plus that of its largest phase."""

    stage: str
    roles: tuple[Role, ...]
    phases: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(role.total for role in self.roles) + max(self.phases.values())


def build_on_meta(cfg: ModelConfig) -> PreTrainedModel:
    """The model on the meta device, which allocates nothing. Raises ConfigError where its config cannot be read."""
    import torch
    from transformers import AutoModelForCausalLM

    from tlcr.data import embedded
    from tlcr.models.faults import LOADABLE, one_line
    from tlcr.models.inspection import read_config

    if cfg.path == "embedded":
        tokenizer = embedded.build_tokenizer()
        with torch.device("meta"):
            model: PreTrainedModel = embedded.build_model(tokenizer)
    else:
        try:
            config = read_config(cfg)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=cfg.trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"model.path {cfg.path!r}: {one_line(error)[:300]}; {LOADABLE}") from error
    model.tie_weights()
    return model


def measure_model(model: PreTrainedModel) -> ModelSize:
    """The sizes of a causal language model; it may be on the meta device."""
    config = model.config.get_text_config()
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        backbone=sum(p.numel() for p in model.base_model.parameters()),
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        key_value=(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_width,
    )


def estimate_run(cfg: RunConfig, size: ModelSize) -> list[Estimate]:
    """The peak of every stage that the config switches on, on one process. Stages follow one another."""
    estimates = []
    if cfg.sft.enabled:
        estimates.append(_supervised("sft", cfg, size, cfg.sft, rows=1, outputs=None))
    if cfg.reward_model.path is None and _asked_models(cfg)["reward model"]:
        estimates.append(_supervised("reward model", cfg, size, cfg.reward_model, rows=2, outputs=1))
    if cfg.dpo.path is None and _asked_models(cfg)["DPO policy"]:
        estimates.append(_supervised("dpo", cfg, size, cfg.dpo, rows=2, outputs=None))
    if cfg.discriminator.path is None and _asked_models(cfg)["discriminator"]:
        estimates.append(_supervised("discriminator", cfg, size, cfg.discriminator, rows=2, outputs=_classes(cfg)))
    return [*estimates, _ppo(cfg, size)]


def _asked_models(cfg: RunConfig) -> dict[str, bool]:
    """The frozen models that the rewards, or the start of the value model, need."""
    rewards = [arm.reward for arm in arms_of(cfg)]
    return {
        "discriminator": any(map(cfg.uses_discriminator, rewards)),
        "reward model": any(map(cfg.uses_reward_model, rewards)),
        "DPO policy": any(map(cfg.uses_dpo, rewards)),
    }


def _classes(cfg: RunConfig) -> int:
    return 3 if cfg.discriminator.targets == "three_class" else 2


def _trained(name: str, parameters: int, dtype: str) -> Role:
    remainder = 0 if dtype == "float32" else 2
    width = BYTES[dtype]
    return Role(name, parameters, parameters * width, parameters * width, parameters * (8 + remainder))


def _frozen(name: str, parameters: int, dtype: str) -> Role:
    return Role(name, parameters, parameters * BYTES[dtype])


def _activations(size: ModelSize, tokens: int, cfg: ModelConfig) -> int:
    block = 8 * size.hidden + 4 * size.intermediate
    kept = size.layers * size.hidden + block if cfg.gradient_checkpointing else size.layers * block
    return tokens * kept * BYTES[cfg.dtype]


def _supervised(
    stage: str, cfg: RunConfig, size: ModelSize, training: TrainingConfig, *, rows: int, outputs: int | None
) -> Estimate:
    """rows: sequences of one example. outputs: of the head; None: a language model, with logits and their gradient."""
    dtype = cfg.model.dtype
    sequences = rows * (training.micro_batch_size or training.batch_size)
    tokens = sequences * (cfg.data.max_prompt_tokens + cfg.data.max_answer_tokens)
    parameters = size.parameters if outputs is None else size.with_head(outputs)
    logits = 2 * tokens * size.vocabulary * BYTES[dtype] if outputs is None else 0
    return Estimate(
        stage, (_trained("model", parameters, dtype),), {"training": _activations(size, tokens, cfg.model) + logits}
    )


def _ppo(cfg: RunConfig, size: ModelSize) -> Estimate:
    dtype, width, ppo = cfg.model.dtype, BYTES[cfg.model.dtype], cfg.ppo
    shared = ppo.value_model == "shared"
    value_parameters = size.hidden + 1 if shared else size.with_head(1)
    parameters_of = {
        "discriminator": size.with_head(_classes(cfg)),
        "reward model": size.with_head(1),
        "DPO policy": size.parameters,
    }
    roles = (
        _trained("policy", size.parameters, dtype),
        _trained("value head" if shared else "value model", value_parameters, dtype),
        _frozen("reference", size.parameters, dtype),
        *(_frozen(name, parameters_of[name], dtype) for name, needed in _asked_models(cfg).items() if needed),
    )

    columns = cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    cache = 2 * size.layers * size.key_value * columns * width
    generation = cfg.rollout.batch_size * (cache + size.vocabulary * 4)

    answers = ppo.micro_batch_size or ppo.minibatch_size
    tokens = min(answers * columns, ppo.micro_batch_tokens or answers * columns)
    scored = min(answers * cfg.rollout.max_new_tokens, tokens)
    # Logits and their gradient, and the reference's logits where the exact KL is in the loss.
    copies = 3 if cfg.kl.placement == "loss" and cfg.kl.estimator == "full" else 2
    logits = (
        copies * size.vocabulary * (scored * width if ppo.chunk_tokens is None else min(ppo.chunk_tokens, scored) * 4)
    )
    activations = _activations(size, tokens, cfg.model) * (1 if shared else 2)
    return Estimate("ppo", roles, {"generation": generation, "update": activations + logits})


def advice(cfg: RunConfig, size: ModelSize, stage: str, limit: int) -> list[tuple[str, int]]:
    """Changes of the config that lower a stage's peak, as (what to set, the peak then), the lowest first."""
    now = _peak(cfg, size, stage)
    section = stage.replace(" ", "_")
    settings = getattr(cfg, section)
    changed = {
        "model.dtype: bfloat16": replace(cfg, model=replace(cfg.model, dtype="bfloat16")),
        "model.gradient_checkpointing: true": replace(cfg, model=replace(cfg.model, gradient_checkpointing=True)),
    }
    if stage == "ppo":
        rollout = replace(cfg.rollout, batch_size=max(1, cfg.rollout.batch_size // 4))
        changed[f"rollout.batch_size: {rollout.batch_size}"] = replace(cfg, rollout=rollout)
        changed["ppo.value_model: shared"] = replace(cfg, ppo=replace(cfg.ppo, value_model="shared"))
        if cfg.ppo.chunk_tokens is None:
            changed["ppo.chunk_tokens: 1024"] = replace(cfg, ppo=replace(cfg.ppo, chunk_tokens=1024))
    micro_batch = settings.micro_batch_size or (cfg.ppo.minibatch_size if stage == "ppo" else settings.batch_size)
    while micro_batch > 1:
        # The largest halving under which the stage fits; the smallest one where none does.
        micro_batch //= 2
        smaller = replace(cfg, **{section: replace(settings, micro_batch_size=micro_batch)})
        if micro_batch == 1 or _peak(smaller, size, stage) <= limit:
            changed[f"{section}.micro_batch_size: {micro_batch}"] = smaller
            break
    peaks = {name: _peak(other, size, stage) for name, other in changed.items()}
    return sorted(((name, peak) for name, peak in peaks.items() if peak < now), key=lambda item: item[1])


def _peak(cfg: RunConfig, size: ModelSize, stage: str) -> int:
    return next(estimate.total for estimate in estimate_run(cfg, size) if estimate.stage == stage)
