"""The models: how they are loaded, trained in part, and shared out among processes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from tlcr.config.schema.checked import Checked, knob
from tlcr.errors import ConfigError

Dtype = Literal["float32", "bfloat16"]
Adapted = Literal["sft", "reward_model", "q_model", "dpo", "discriminator", "policy", "value"]
"""What can be trained by adapters: the models before PPO, and the two that PPO trains."""


@dataclass(frozen=True)
class GeneratorConfig(Checked):
    """A language model that runs on this machine and only generates text."""

    path: str = knob(
        "embedded", "a model folder or hub name; 'embedded' makes the small model of the embedded task", path=True
    )
    tokenizer: str | None = knob(
        None, "a tokenizer's folder or hub name; default: the model's own", advanced=True, path=True
    )
    gguf_file: str | None = knob(None, "the GGUF file in the model's folder, for models in that format", advanced=True)
    dtype: Dtype = knob("float32", "dtype of weights and activations; the optimiser keeps float32 masters of bfloat16")
    pad_token: str | None = knob(None, "a token to pad with, for a tokenizer that names none", advanced=True)
    chat_template: str | None = knob(
        None, "a Jinja template (text, or a file's path) for a tokenizer without one", path=True
    )
    attn_implementation: str = knob(
        "auto",
        "attention implementation of transformers; auto: sdpa, or eager where the architecture has no other",
        advanced=True,
    )
    trust_remote_code: bool = knob(
        False, "run code that comes with the model: only for sources you trust", advanced=True
    )


@dataclass(frozen=True)
class ModelConfig(GeneratorConfig):
    """The language model that all training starts from."""

    gradient_checkpointing: bool = knob(
        False, "recompute activations in the backward pass: less memory, more time", decides=False
    )

    def saved_in(self, folder: object) -> ModelConfig:
        """These settings for a folder that a stage wrote: the tokenizer in it is complete."""
        return dataclasses.replace(
            self, path=str(folder), tokenizer=None, gguf_file=None, pad_token=None, chat_template=None
        )


@dataclass(frozen=True)
class LoRAConfig(Checked):
    """Low-rank adapters on frozen weights instead of training all weights; needs peft."""

    rank: int | None = knob(
        None, "rank of the adapters; default: no adapters, all weights are trained", source="LoRA", ge=1
    )
    alpha: float = knob(
        32.0, "an adapter's output is scaled by alpha / rank", source="Schulman et al. 2025", gt=0, advanced=True
    )
    targets: tuple[str, ...] = knob(
        ("all-linear",),
        "names of the linear layers that get adapters, as the last part of their names has it (q_proj); all-linear: "
        "all of the decoder's, but not the output head, which may be named beside it (lm_head)",
        source="Schulman et al. 2025",
        advanced=True,
    )
    roles: tuple[Adapted, ...] = knob(
        ("policy", "value", "discriminator"),
        "what is trained by adapters; all else is trained whole. In PPO, policy, value model and discriminator share "
        "one copy of the frozen weights with the reference",
    )
    base_bits: Literal[4] | None = knob(
        None,
        "bits of the frozen weights that adapters stand on, in the decoder's linear layers: 4 (NF4, by the package "
        "bitsandbytes); default: the weights are as they were read, in model.dtype",
        source="QLoRA",
        advanced=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_bits is not None and self.rank is None:
            raise ConfigError(
                f"LoRAConfig.base_bits is {self.base_bits} and rank null: weights that are trained cannot be in so few "
                "bits; set a rank, such as 16, or base_bits: null"
            )
        for name, given in (("targets", self.targets), ("roles", self.roles)):
            if not given:
                raise ConfigError(f"LoRAConfig.{name} is empty; name at least one, or set rank: null for no adapters")
        if "all-linear" in self.targets and len(self.targets) > 2:
            raise ConfigError(
                f"LoRAConfig.targets is {list(self.targets)!r}: all-linear stands for every layer; name it alone, "
                "beside the output head, or name layers"
            )
        if "value" in self.roles and "policy" not in self.roles:
            raise ConfigError(
                "LoRAConfig.roles has 'value' without 'policy': the value model's adapter stands on the weights that "
                "the policy's leaves frozen; add 'policy', or drop 'value'"
            )

    def trains(self, name: Adapted) -> bool:
        """Whether this model is trained by an adapter."""
        return self.rank is not None and name in self.roles


@dataclass(frozen=True)
class ShardingConfig(Checked):
    """How the weights, gradients and optimiser states of all models are shared out among processes."""

    kind: Literal["none", "full", "hybrid"] = knob(
        "none",
        "none: every process holds whole models; full: one shard for each process; hybrid: shards within a group of "
        "processes, which is repeated",
    )
    replicas: int | None = knob(
        None, "groups of processes that hold a whole model each, for hybrid; default: the number of nodes", ge=2
    )
    reduce_dtype: Dtype = knob("float32", "dtype in which the gradients of the processes are summed", advanced=True)
    offload: bool = knob(False, "keep shards and optimiser states in host memory: slower, for GPUs that are too small")

    def problem(self, processes: int, of_a_node: int) -> str | None:
        """Why so many processes, of which so many run on one machine, cannot share models so; None where they can."""
        if self.kind == "none":
            return None
        if processes == 1:
            return (
                f"sharding.kind is {self.kind!r}, which cuts models into one shard for each process, and there is one "
                "process; start several ('torchrun --nproc_per_node N -m tlcr ...'), or set sharding.kind: none"
            )
        if self.kind == "hybrid":
            replicas = self.replicas or processes // of_a_node
            if replicas < 2 or processes % replicas or processes == replicas:
                return (
                    f"sharding.kind: hybrid wants {processes} processes in equal groups of two or more, and "
                    f"sharding.replicas is {self.replicas or f'the number of nodes, {replicas}'}; set "
                    "sharding.replicas to the number of groups, or sharding.kind: full"
                )
        return None
