"""What makes a stage fit into the memory that there is: the smallest change of its config."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tlcr.config.schema import RunConfig
from tlcr.errors import ConfigError
from tlcr.experiment.architecture import Architecture, Machine
from tlcr.experiment.memory import estimate_stage, of_a_process, section_of, stage_roles

LORA_RANK = 16
"""The rank that is proposed (ours: what the estimates of docs/scale.md are for)."""


@dataclass(frozen=True)
class Remedy:
    """Settings that lower a stage's peak, and the peak with them; ``fits`` is False where even all of them do not."""

    settings: tuple[str, ...]
    peak: int
    fits: bool


def remedy(cfg: RunConfig, architecture: Architecture, machine: Machine, stage: str, limit: int) -> Remedy:
    """The smallest change of the config with which a stage fits.

    A change of one setting is smaller than one of several; of two such, the one is smaller that stands earlier in
    ``_changes``: settings that cost time alone come before those that change what is trained.

    Args:
        cfg: the run.
        architecture: its model.
        machine: what the run is for.
        stage: a stage whose estimate is above ``limit``.
        limit: bytes that the stage may take.

    Returns:
        The settings, or the most that tlcr can do where nothing fits.
    """

    def peak(changes: Sequence[_Change]) -> int:
        changed = functools.reduce(lambda before, change: change.make(before), changes, cfg)
        states = [of_a_process(role, changed, machine) for role in stage_roles(changed, architecture, stage)]
        # What the models take is known at once; a step has to be simulated.
        if (least := sum(role.weights + role.optimizer for role in states)) > limit:
            return least
        return estimate_stage(stage, changed, architecture, machine).total

    changes = _changes(cfg, machine, stage)
    for change in changes:
        if (alone := peak([change])) <= limit:
            return Remedy((change.setting,), alone, fits=True)
    taken: list[_Change] = []
    for change in changes:
        taken = [*(other for other in taken if other.knob != change.knob), change]
        if peak(taken) <= limit:
            break
    for change in list(taken):
        others = [other for other in taken if other is not change]
        if peak(others) <= limit:
            taken = others
    reached = peak(taken)
    return Remedy(tuple(change.setting for change in taken), reached, fits=reached <= limit)


@dataclass(frozen=True)
class _Change:
    knob: str
    value: Any

    @property
    def setting(self) -> str:
        return f"{self.knob}: {str(self.value).lower() if isinstance(self.value, bool) else self.value}"

    def make(self, cfg: RunConfig) -> RunConfig:
        section, name = self.knob.split(".")
        return replace(cfg, **{section: replace(getattr(cfg, section), **{name: self.value})})


def _changes(cfg: RunConfig, machine: Machine, stage: str) -> list[_Change]:
    """What can be changed, first what costs least: time, then precision, then what is trained."""
    section = section_of(stage)
    settings = getattr(cfg, section)
    largest = settings.micro_batch_size or (cfg.ppo.minibatch_size if stage == "ppo" else settings.batch_size)
    changes = [_Change(f"{section}.micro_batch_size", size) for size in _halves(largest)]
    if stage == "ppo":
        changes += [_Change("rollout.batch_size", size) for size in _halves(cfg.rollout.batch_size)]
        if cfg.ppo.chunk_tokens is None:
            changes.append(_Change("ppo.chunk_tokens", 1024))
    if not cfg.model.gradient_checkpointing:
        changes.append(_Change("model.gradient_checkpointing", True))
    if cfg.sharding.kind == "none" and machine.processes > 1:
        changes.append(_Change("sharding.kind", "full"))
    if cfg.model.dtype != "bfloat16":
        changes.append(_Change("model.dtype", "bfloat16"))
    if cfg.lora.rank is None and (stage != "sft" or cfg.model.path != "embedded"):
        changes.append(_Change("lora.rank", LORA_RANK))
    if stage == "ppo" and cfg.ppo.value_model != "shared":
        changes.append(_Change("ppo.value_model", "shared"))
    return [change for change in changes if _is_possible(change, cfg)]


def _is_possible(change: _Change, cfg: RunConfig) -> bool:
    """Whether the config allows it: not adapters, for instance, where the value model starts from another model."""
    try:
        change.make(cfg)
    except ConfigError:
        return False
    return True


def _halves(number: int) -> Iterator[int]:
    while number > 1:
        number //= 2
        yield number
