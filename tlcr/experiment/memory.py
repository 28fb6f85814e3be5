"""Estimates the memory of a run from the model's config; no weights are loaded.

Weights, gradients and optimiser states are counted exactly. What a step allocates beside them is found by taking it
with tensors that have no memory (``tlcr/experiment/simulation.py``).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcr.config.schema import RunConfig, TrainingConfig
from tlcr.config.trials import arms_of
from tlcr.experiment.architecture import BYTES, Architecture, Machine, shards_of

if TYPE_CHECKING:
    from tlcr.experiment.simulation import Step

__all__ = [
    "Estimate",
    "Phase",
    "Role",
    "checkpoint_of",
    "estimate_run",
    "estimate_stage",
    "of_a_process",
    "ppo_roles",
    "roles_of_a_process",
    "section_of",
    "stage_roles",
]


@dataclass(frozen=True)
class Role:
    """One model in memory, in bytes.

    gradients: with ``buckets``, in which data parallelism sums them.
    optimizer: float32 moments and, for bfloat16, the rest of the masters.
    """

    name: str
    parameters: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    buckets: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Phase:
    """A part of a stage: what it allocates beside the models, in bytes, and whether gradients are there meanwhile."""

    name: str
    allocated: int
    with_gradients: bool = False


@dataclass(frozen=True)
class Estimate:
    """The memory of a stage, in bytes: its models, and its phases, of which the largest makes the peak."""

    stage: str
    roles: tuple[Role, ...]
    phases: tuple[Phase, ...]

    def at(self, phase: Phase) -> int:
        """The peak of one phase: weights, optimiser states, gradients where it has them, and what it allocates."""
        gradients = sum(role.gradients for role in self.roles) if phase.with_gradients else 0
        return sum(role.weights + role.optimizer for role in self.roles) + gradients + phase.allocated

    @property
    def peak(self) -> Phase:
        """The largest phase."""
        return max(self.phases, key=self.at)

    @property
    def total(self) -> int:
        return self.at(self.peak)


def estimate_run(cfg: RunConfig, architecture: Architecture, machine: Machine) -> list[Estimate]:
    """The peak of every stage that the config switches on, on one process. Stages follow one another."""
    asked = _asked_models(cfg)
    trained = {
        "sft": cfg.sft.enabled,
        "reward model": cfg.reward_model.path is None and asked["reward model"],
        "q model": cfg.q_model.path is None and asked["q model"],
        "dpo": cfg.dpo.path is None and asked["DPO policy"],
        "discriminator": cfg.discriminator.path is None and asked["discriminator"],
        "ppo": True,
    }
    return [estimate_stage(stage, cfg, architecture, machine) for stage, on in trained.items() if on]


def estimate_stage(stage: str, cfg: RunConfig, architecture: Architecture, machine: Machine) -> Estimate:
    """The peak of one stage on one process, whether the config switches it on or not."""
    make = _ppo if stage == "ppo" else functools.partial(_supervised, stage)
    return make(cfg, architecture, machine)


def checkpoint_of(stage: str, cfg: RunConfig, architecture: Architecture) -> int:
    """The bytes of one checkpoint of a stage, of all processes together: what is trained, and AdamW's states.

    Of a model with an adapter that is the adapter alone; of a discriminator that learns on within PPO the weights,
    because its optimiser begins anew at each refresh.
    """
    roles = stage_roles(cfg, architecture, stage)
    states = sum(role.optimizer for role in roles if stage != "ppo" or role.name != "discriminator")
    return sum(role.gradients for role in roles) + states


def roles_of_a_process(cfg: RunConfig, architecture: Architecture, machine: Machine) -> tuple[Role, ...]:
    """What one process holds of the models of PPO."""
    return tuple(of_a_process(role, cfg, machine) for role in ppo_roles(cfg, architecture))


def of_a_process(role: Role, cfg: RunConfig, machine: Machine) -> Role:
    """What of a model one process holds: a shard, or the whole."""
    shards = shards_of(cfg, machine)
    if shards is None:
        # Data parallelism sums gradients in buckets, which are as large.
        buckets = 0 if machine.processes == 1 else role.gradients
        return replace(role, gradients=role.gradients + buckets, buckets=buckets)
    weights, gradients, optimizer = (math.ceil(n / shards[-1]) for n in (role.weights, role.gradients, role.optimizer))
    return replace(role, weights=weights, gradients=gradients, optimizer=optimizer)


def stage_roles(cfg: RunConfig, architecture: Architecture, stage: str) -> tuple[Role, ...]:
    """The models of a stage, whole."""
    return ppo_roles(cfg, architecture) if stage == "ppo" else (_supervised_role(stage, cfg, architecture),)


def ppo_roles(cfg: RunConfig, architecture: Architecture) -> tuple[Role, ...]:
    """The models of PPO: two that are trained, the reference, and those that the rewards ask.

    With adapters the reference is the frozen weights that the others stand on, and what they add is theirs.
    """
    dtype, size = cfg.model.dtype, architecture.size
    adapters = cfg.lora.trains("policy")
    parameters_of = {
        "discriminator": size.with_head(_classes(cfg)),
        "reward model": size.with_head(1),
        "q model": size.with_head(1),
        "DPO policy": size.parameters,
    }
    refreshed = any(arm.reward.refresh.every for arm in arms_of(cfg))
    judges = [
        Role(name, (own := architecture.adapter(cfg.lora)), own * 4)
        if name == "discriminator" and not refreshed and _discriminator_is_a_role(cfg)
        else (_trained if name == "discriminator" and refreshed else _frozen)(name, parameters_of[name], dtype)
        for name, needed in _asked_models(cfg).items()
        if needed
    ]
    policy = (
        _with_adapter("policy", 0, architecture.adapter(cfg.lora), dtype)
        if adapters
        else _trained("policy", size.parameters, dtype)
    )
    reference = _frozen("reference", size.parameters, dtype)
    if adapters:
        reference = _in_bits(reference, cfg, architecture)
    return policy, _value_role(cfg, architecture), reference, *judges


def section_of(stage: str) -> Any:
    """The section of the config, and the role of ``lora.roles``, that a supervised stage is."""
    return stage.replace(" ", "_")


def _asked_models(cfg: RunConfig) -> dict[str, bool]:
    """The frozen models that the rewards, or the start of the value model, need."""
    rewards = [arm.reward for arm in arms_of(cfg)]
    return {
        "discriminator": any(map(cfg.uses_discriminator, rewards)),
        "reward model": any(map(cfg.uses_reward_model, rewards)),
        "q model": any(map(cfg.uses_q_model, rewards)),
        "DPO policy": any(map(cfg.uses_dpo, rewards)),
    }


def _classes(cfg: RunConfig) -> int:
    return 3 if cfg.discriminator.targets == "three_class" else 2


def _trained(name: str, parameters: int, dtype: str) -> Role:
    remainder = 0 if dtype == "float32" else 2
    width = BYTES[dtype]
    return Role(name, parameters, parameters * width, parameters * width, parameters * (8 + remainder))


def _with_adapter(name: str, frozen: int, adapter: int, dtype: str) -> Role:
    """frozen: parameters that no other model has; adapter: those that are trained, in float32."""
    return Role(name, frozen + adapter, frozen * BYTES[dtype] + adapter * 4, adapter * 4, adapter * 8)


def _in_bits(role: Role, cfg: RunConfig, architecture: Architecture) -> Role:
    """The model that adapters stand on, in as few bits as the config asks for."""
    if cfg.lora.base_bits is None:
        return role
    return replace(role, weights=role.weights - architecture.saved_by_bits(cfg))


def _reading(cfg: RunConfig, architecture: Architecture) -> list[Phase]:
    """Weights are read whole before they are kept in few bits."""
    return [] if cfg.lora.base_bits is None else [Phase("reading", architecture.saved_by_bits(cfg))]


def _frozen(name: str, parameters: int, dtype: str) -> Role:
    return Role(name, parameters, parameters * BYTES[dtype])


def _supervised(stage: str, cfg: RunConfig, architecture: Architecture, machine: Machine) -> Estimate:
    from tlcr.experiment.simulation import Step

    training: TrainingConfig = getattr(cfg, section_of(stage))
    pairs = 1 if stage == "sft" else 2
    kinds = {
        "reward model": "sequence classifier",
        "q model": "sequence classifier",
        "discriminator": "token classifier",
    }
    kind = kinds.get(stage, "language model")
    role = of_a_process(_supervised_role(stage, cfg, architecture), cfg, machine)
    share = math.ceil(training.batch_size / machine.processes)
    examples = min(training.micro_batch_size or share, share)
    step = Step(
        kind,
        rows=pairs * examples,
        columns=cfg.data.max_prompt_tokens + cfg.data.max_answer_tokens,
        answer=cfg.data.max_answer_tokens,
        outputs=_outputs(stage, cfg) or 1,
        stage=section_of(stage),
        again=examples < share,
    )
    reading = _reading(cfg, architecture) if cfg.lora.trains(section_of(stage)) else []
    return Estimate(stage, (role,), (*reading, _training("training", step, (role,), cfg, architecture, machine)))


def _supervised_role(stage: str, cfg: RunConfig, architecture: Architecture) -> Role:
    outputs, size = _outputs(stage, cfg), architecture.size
    parameters = size.parameters if outputs is None else size.with_head(outputs)
    name = section_of(stage)
    if cfg.lora.trains(name):
        head = 0 if outputs is None else outputs * size.hidden
        role = _with_adapter("model", parameters - head, architecture.adapter(cfg.lora) + head, cfg.model.dtype)
        return _in_bits(role, cfg, architecture)
    return _trained("model", parameters, cfg.model.dtype)


def _outputs(stage: str, cfg: RunConfig) -> int | None:
    """Outputs of the head that a stage trains; None for a language model."""
    return {"reward model": 1, "q model": 1, "discriminator": _classes(cfg)}.get(stage)


def _training(
    name: str, step: Step, roles: tuple[Role, ...], cfg: RunConfig, architecture: Architecture, machine: Machine
) -> Phase:
    """A phase with gradients. A step that is the first since they were freed makes them itself."""
    peak = architecture.peak(step, cfg, machine)
    own = 0 if step.again else sum(role.gradients - role.buckets for role in roles)
    return Phase(name, max(0, peak - own), with_gradients=True)


def _discriminator_is_a_role(cfg: RunConfig) -> bool:
    """Whether PPO will load the discriminator as an adapter on the policy's weights."""
    from tlcr.experiment.frozen_models import may_be_a_role
    from tlcr.models.lora.files import FOLDER, read_base

    path = cfg.discriminator.path
    about: dict[str, Any] = {}
    if not cfg.lora.trains("policy"):
        return False
    if path is None and cfg.lora.trains("discriminator"):
        about = {"config": {"tlcr_bidirectional_layers": cfg.discriminator.bidirectional_layers}}
    elif path is not None and not cfg.sft.enabled:  # SFT makes weights that no adapter of another run stands on
        about = read_base(Path(path) / FOLDER)
    return may_be_a_role(cfg, about)


def _value_role(cfg: RunConfig, architecture: Architecture) -> Role:
    size = architecture.size
    if cfg.ppo.value_model == "shared":
        return _trained("value head", size.hidden + 1, "float32")
    if cfg.lora.trains("value"):
        return _with_adapter("value model", 0, architecture.adapter(cfg.lora) + size.hidden, cfg.model.dtype)
    return _trained("value model", size.with_head(1), cfg.model.dtype)


def _ppo(cfg: RunConfig, architecture: Architecture, machine: Machine) -> Estimate:
    from tlcr.experiment.simulation import Step
    from tlcr.ppo.microbatches import CPU_TOKENS

    ppo, processes = cfg.ppo, machine.processes
    roles = roles_of_a_process(cfg, architecture, machine)
    columns = cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens
    tokens = ppo.micro_batch_tokens or (None if machine.gpu else CPU_TOKENS)

    def rows(at_most: int) -> int:
        return max(1, min(at_most, at_most if tokens is None else tokens // columns))

    share = math.ceil(ppo.minibatch_size / processes)
    answers = rows(min(ppo.micro_batch_size or share, share))
    update = Step(
        "policy and values",
        rows=answers,
        columns=columns,
        answer=cfg.rollout.max_response_tokens,
        again=answers < share,
        reference=cfg.kl.placement == "loss" and cfg.kl.estimator == "full",
        packed=ppo.packing == "always",
        shared_values=ppo.value_model == "shared",
        chunk_tokens=ppo.chunk_tokens,
    )
    asked = _asked_models(cfg)

    def answering(answers: int, *, exact: bool, packed: bool) -> dict[str, int]:
        """What it takes to sample so many answers, to score them, and to ask what gives the rewards."""
        prompt = Step("prompt", rows=answers, columns=cfg.data.max_prompt_tokens, trains=False)
        token = Step("next token", rows=answers, columns=columns, trains=False)
        score = replace(update, rows=rows(answers), trains=False, again=False, reference=exact, packed=packed)
        judge = Step("token classifier", rows=answers, columns=columns, outputs=_classes(cfg), trains=False)
        # a policy trained by DPO, and then the reference, give all logits of the answers
        ratio = Step(
            "language model",
            rows=answers,
            columns=columns,
            answer=cfg.rollout.max_response_tokens,
            stage="dpo",
            trains=False,
        )
        judges = [judge] if any(needed for name, needed in asked.items() if name != "DPO policy") else []
        if asked["DPO policy"]:
            judges.append(ratio)
        steps = {"generation": [prompt, token], "scoring": [score], "rewards": judges}
        return {name: max(architecture.peak(step, cfg, machine) for step in of) for name, of in steps.items() if of}

    def at_a_time(answers: int) -> int:
        return min(cfg.rollout.batch_size, math.ceil(answers / processes))

    rounds = answering(at_a_time(ppo.batch_size), exact=cfg.kl_estimator == "full", packed=ppo.packing == "always")
    # an evaluation has batches of its own, and their exact KL whatever the estimator of training
    evaluation = answering(at_a_time(cfg.evaluation.prompts), exact=True, packed=False)
    phases = [Phase(name, allocated) for name, allocated in rounds.items()]
    phases.append(Phase("evaluation", max(evaluation.values())))
    refreshed = tuple(role for role in roles if role.gradients and role.name == "discriminator")
    trained = tuple(role for role in roles if role.gradients and role not in refreshed)
    phases.append(_training("update", update, trained, cfg, architecture, machine))
    if refreshed:
        phases.append(_training("refresh", _refresh_step(cfg), refreshed, cfg, architecture, machine))
    reading = _reading(cfg, architecture) if cfg.lora.trains("policy") else []
    return Estimate("ppo", roles, (*reading, *phases))


def _refresh_step(cfg: RunConfig) -> Step:
    """The discriminator's training on the policy's answers within PPO, by its own batches."""
    from tlcr.experiment.simulation import Step

    training = cfg.discriminator
    examples = min(training.micro_batch_size or training.batch_size, training.batch_size)
    answer = min(cfg.data.max_answer_tokens, cfg.rollout.max_response_tokens)
    return Step(
        "token classifier",
        rows=2 * examples,
        columns=cfg.data.max_prompt_tokens + answer,
        answer=answer,
        outputs=_classes(cfg),
        stage="discriminator",
        again=examples < training.batch_size,
    )
