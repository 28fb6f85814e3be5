"""A model without its weights: its sizes, and what steps of it allocate."""

from __future__ import annotations

import functools
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tlcr.config.schema import GeneratorConfig, LoRAConfig, RunConfig
from tlcr.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tlcr.experiment.simulation import Simulator, Step

__all__ = [
    "BYTES",
    "GPUS_OF_A_NODE",
    "Architecture",
    "Machine",
    "ModelSize",
    "build_on_meta",
    "measure_model",
    "shards_of",
]

BYTES = {"float32": 4, "bfloat16": 2}
GPUS_OF_A_NODE = 8


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a decoder that decide its states; tied parameters are counted once."""

    parameters: int
    backbone: int
    hidden: int

    def with_head(self, outputs: int) -> int:
        """Parameters of the backbone under a linear head without bias."""
        return self.backbone + outputs * self.hidden


@dataclass(frozen=True)
class Machine:
    """What a run is estimated for.

    gpu: transformers' layers and torch's attention, and no limit of tokens of ours; else the CPU's.
    processes: that share the run, one for each GPU; in nodes of eight, where a sharding asks for nodes.
    """

    gpu: bool
    processes: int = 1


class Architecture:
    """A model on the meta device: its sizes, and simulated steps of it, each taken once.

    Args:
        model: what ``build_on_meta`` made.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._simulators: dict[tuple[object, ...], Simulator] = {}
        self._adapters: dict[LoRAConfig, int] = {}

    @functools.cached_property
    def size(self) -> ModelSize:
        return measure_model(self.model)

    def adapter(self, lora: LoRAConfig) -> int:
        """The parameters of one adapter."""
        if lora not in self._adapters:
            from tlcr.models.lora.adapters import add_adapter

            model = deepcopy(self.model)
            add_adapter(model, lora, "counted", seed=0)
            self._adapters[lora] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return self._adapters[lora]

    def saved_by_bits(self, cfg: RunConfig) -> int:
        """The bytes that ``lora.base_bits`` saves of the frozen weights of one model."""
        from tlcr.models.lora.four_bits import bytes_of

        width = BYTES[cfg.model.dtype]
        return sum(width * weight.numel() - bytes_of(weight.shape) for weight in self._linear_weights)

    @functools.cached_property
    def _linear_weights(self) -> list[Tensor]:
        from tlcr.models.lora.four_bits import linear_layers

        return [layer.weight for layer in linear_layers(self.model.base_model).values()]

    def peak(self, step: Step, cfg: RunConfig, machine: Machine) -> int:
        """The bytes that ``step`` allocates at its peak, beyond weights and earlier gradients."""
        from tlcr.experiment.simulation import Simulator

        model, shards = cfg.model, shards_of(cfg, machine)
        key = (
            model.dtype,
            model.gradient_checkpointing,
            model.attn_implementation,
            machine.gpu,
            shards,
            cfg.sharding,
            cfg.lora,
        )
        if key not in self._simulators:
            self._simulators[key] = Simulator(
                self.model,
                model,
                for_gpu=machine.gpu,
                shards=shards,
                reduce_dtype=cfg.sharding.reduce_dtype,
                lora=cfg.lora,
            )
        peak = self._simulators[key].peak(step)
        if cfg.lora.base_bits is None:
            return peak
        # a layer's weight in 4 bits is made whole where it is multiplied with
        return peak + BYTES[cfg.model.dtype] * max(weight.numel() for weight in self._linear_weights)


def shards_of(cfg: RunConfig, machine: Machine) -> tuple[int, ...] | None:
    """How the processes of ``machine`` share models: (processes,), (groups, processes of a group), or None."""
    kind, processes = cfg.sharding.kind, machine.processes
    if kind == "none" or processes == 1:
        return None
    groups = 1 if kind == "full" else cfg.sharding.replicas or processes // GPUS_OF_A_NODE
    return (processes,) if groups <= 1 or processes % groups else (groups, processes // groups)


def build_on_meta(cfg: GeneratorConfig, *, headless: bool = False) -> PreTrainedModel:
    """The causal model, or what any model of its kind has below its head, on the meta device, which allocates nothing.
    Raises ConfigError where its config cannot be read."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

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
                auto = AutoModel if headless else AutoModelForCausalLM
                model = auto.from_config(config, trust_remote_code=cfg.trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"model.path {cfg.path!r}: {one_line(error)[:300]}; {LOADABLE}") from error
    model.tie_weights()
    return model


def measure_model(model: PreTrainedModel) -> ModelSize:
    """The sizes of a causal language model; it may be on the meta device."""
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        backbone=sum(p.numel() for p in model.base_model.parameters()),
        hidden=model.config.get_text_config().hidden_size,
    )
