"""Layers with low-rank adapters (LoRA), which peft makes: all that tlcr knows of how peft keeps them.

An adapted linear layer computes x W' + (alpha / rank) x A' B', with W frozen, A (rank, in) and B (out, rank) trained
(Hu et al. 2021, arXiv 2106.09685). B starts at zero, so that an untrained adapter changes nothing. A and B are float32
whatever the dtype of W, and AdamW trains them as they are. Adapters have no dropout: PPO's ratios compare two passes of
one policy, which must be the same function.

peft is imported inside the functions that need it: tlcr does without where ``lora.rank`` is null.
"""

from __future__ import annotations

import math
import zlib
from copy import copy
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tlcr.config.schema import LoRAConfig
from tlcr.errors import ConfigError
from tlcr.models.heads import backbone
from tlcr.models.stored import is_unread
from tlcr.training.distributed import process_device


def missing_peft() -> ConfigError | None:
    """The error for adapters where peft is not installed; None where it is."""
    if find_spec("peft") is not None:
        return None
    from tlcr.distribution import install_command  # it reads the metadata of packages

    return ConfigError(f"lora.rank needs the package peft, and it is not installed; {install_command('lora')}")


def require_peft() -> None:
    """Raises ``missing_peft`` where it is an error."""
    if (error := missing_peft()) is not None:
        raise error


def peft_config(model: PreTrainedModel, cfg: LoRAConfig) -> Any:
    """peft's config of the adapters of a model's backbone."""
    require_peft()
    from peft import LoraConfig

    assert cfg.rank is not None
    targets: str | list[str] = "all-linear" if "all-linear" in cfg.targets else list(cfg.targets)
    conv = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2's weights are (in, out)
    options: dict[str, Any] = {"lora_alpha": cfg.alpha, "lora_dropout": 0.0, "fan_in_fan_out": conv}
    return LoraConfig(r=cfg.rank, target_modules=targets, **options)


def name_of_output(model: PreTrainedModel) -> str | None:
    """The name of a causal LM's output head, such as lm_head; None where it has none."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def inject(body: PreTrainedModel, config: Any, name: str) -> None:
    """Adds an adapter without values to the layers of a backbone; what is trained stays as it was."""
    from peft.tuners.lora import LoraModel

    wanted = config.target_modules
    trained = {id(parameter): parameter.requires_grad for parameter in body.parameters()}
    try:
        LoraModel(body, config, name, low_cpu_mem_usage=True)
    except ValueError as error:
        linear = {path.rpartition(".")[2] for path, m in body.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
        raise ConfigError(
            f"{type(body).__name__} has no linear layer named {' or '.join(map(repr, wanted))} to adapt; name some of "
            f"{', '.join(sorted(linear))} in lora.targets, or all-linear"
        ) from error
    del body.peft_config  # peft would take it for an adapter of another kind when it adds the next
    peft_configs(body)[name] = config
    for parameter in body.parameters():
        parameter.requires_grad_(trained.get(id(parameter), False))


def inject_into_head(model: PreTrainedModel, config: Any, name: str) -> None:
    """Adds an adapter without values to the output head, as ``inject`` does to a backbone."""
    path = name_of_output(model)
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise ConfigError(
            f"lora.targets names {path}, but in {type(model).__name__} the output head is the embedding "
            "(tie_word_embeddings): merged weights would have to be two matrices; leave it out"
        )
    config = copy(config)
    config.target_modules, config.fan_in_fan_out = {path}, False
    inject(model, config, name)


def home_of(model: PreTrainedModel) -> torch.device:
    """Where the adapters and heads of a model are made: no file has them, so they have values before it is read."""
    return process_device() if is_unread(model) else backbone(model).device


def initialise(model: PreTrainedModel, name: str, seed: int, device: torch.device) -> None:
    """Gives an adapter its first weights: A uniform, as nn.Linear's, and B zero (Hu et al. 2021; peft).

    Args:
        model: the model whose layers have the adapter.
        name: of the adapter.
        seed: decides A, with the name. A is drawn on the CPU, so that it does not depend on the device.
        device: where the weights go.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    for _, layer in adapted_layers(model, name):
        base = layer.base_layer.weight
        dtype = torch.promote_types(base.dtype, torch.float32)
        down, up = layer.lora_A[name], layer.lora_B[name]
        a = torch.empty(down.weight.shape, dtype=dtype)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        b = torch.zeros(up.weight.shape, dtype=dtype, device=device)
        down.weight = nn.Parameter(a.to(device), requires_grad=False)
        up.weight = nn.Parameter(b, requires_grad=False)


def peft_configs(body: PreTrainedModel) -> dict[str, Any]:
    """The configs of a backbone's adapters by name, which backbones of ``Roles`` share."""
    if not hasattr(body, "_tlcr_peft_configs"):
        body._tlcr_peft_configs = {}  # type: ignore[assignment]
    configs: dict[str, Any] = body._tlcr_peft_configs  # type: ignore[assignment]
    return configs


def adapted_layers(module: nn.Module, name: str | None = None) -> list[tuple[str, Any]]:
    """The adapted layers of a module with their paths; of ``name`` alone where it is given."""
    found = [(path, m) for path, m in module.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    return [(path, layer) for path, layer in found if name is None or name in layer.lora_A]


def adapter_parameters(model: PreTrainedModel, name: str) -> list[nn.Parameter]:
    """A and B of each layer that has the adapter."""
    return [part[name].weight for _, layer in adapted_layers(model, name) for part in (layer.lora_A, layer.lora_B)]


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return ".lora_" in name
