"""The stages before PPO, each supervised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tlcr.config.schema.checked import Checked, knob


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """A supervised stage: SFT, the reward model, the discriminator."""

    epochs: int = knob(2, "passes over the data", source="released code", ge=1)
    batch_size: int = knob(32, "examples in one optimiser step, over all processes", source="released code", ge=1)
    micro_batch_size: int | None = knob(
        None, "examples in one forward pass of a process; default: all of its share", ge=1, decides=False
    )
    learning_rate: float = knob(1e-5, "peak learning rate", source="released code", gt=0)
    weight_decay: float = knob(0.1, "AdamW weight decay", source="released code", ge=0, advanced=True)
    warmup_share: float = knob(0.05, "share of the steps in which the rate rises linearly", ge=0, le=1, advanced=True)
    schedule: Literal["cosine", "linear", "constant"] = knob(
        "cosine", "decay after the warm-up", source="released code", advanced=True
    )
    max_grad_norm: float = knob(1.0, "gradients are clipped to this norm", gt=0, advanced=True)
    evaluate_every: int = knob(
        0, "optimiser steps between evaluations; 0: at the end of each epoch", ge=0, advanced=True
    )
    save_every: int = knob(
        100, "optimiser steps between checkpoints; 0: none, but when a run is stopped", ge=0, decides=False
    )
    save_in_background: bool = knob(
        False, "go on while a checkpoint is written, from copies in host memory", advanced=True, decides=False
    )


@dataclass(frozen=True)
class SFTConfig(TrainingConfig):
    """Supervised fine-tuning of the policy on the preferred answers."""

    enabled: bool = knob(True, "run this stage; off means that model.path is already fine-tuned")


@dataclass(frozen=True)
class DiscriminatorConfig(TrainingConfig):
    """The token discriminator."""

    targets: Literal["soft", "hard", "three_class"] = knob(
        "soft",
        "soft: neutral is 0.5; hard: neutral tokens do not count; three_class: neutral is a class",
        source="paper",
    )
    bidirectional_layers: int = knob(
        0, "top layers that see the whole answer", source="released code", ge=0, advanced=True
    )
    calibrate: bool = knob(True, "fit a temperature on held-out edits and store it with the model", advanced=True)
    path: str | None = knob(None, "use this trained discriminator and skip its training", path=True)


@dataclass(frozen=True)
class RewardModelConfig(TrainingConfig):
    """The sequence-level baseline: a Bradley-Terry reward model."""

    path: str | None = knob(None, "use this trained reward model and skip its training", path=True)


@dataclass(frozen=True)
class QModelConfig(TrainingConfig):
    """A token-level Q function learned from preferences (Q-RM); beta times it is the reward of kind 'q'."""

    beta: float = knob(
        0.2, "factor on the difference of the answers' means in the loss, and on a token's reward", source="Q-RM", gt=0
    )
    margin: float = knob(
        2.0, "a pair costs little only where beta times that difference is above this", source="Q-RM", ge=0
    )
    path: str | None = knob(None, "use this trained model and skip its training", path=True)


@dataclass(frozen=True)
class DPOConfig(TrainingConfig):
    """A policy trained on preferences as an implicit reward model; its log-ratio is the reward of kind 'dpo'."""

    loss: Literal["pairs", "outcomes"] = knob(
        "pairs",
        "pairs: the chosen answer's log-ratio above the rejected one's (DPO); outcomes: each answer by itself, good or "
        "bad (implicit process reward)",
        source="DPO",
    )
    beta: float = knob(
        0.1, "KL coefficient of the objective, and factor on the log-ratio", source="DPO", unit="reward per nat", gt=0
    )
    path: str | None = knob(None, "use this trained policy and skip its training", path=True)
