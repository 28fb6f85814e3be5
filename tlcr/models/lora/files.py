"""Models with adapters in folders: the merged model, and its adapter as peft writes one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from tlcr.errors import CheckpointError, ConfigError
from tlcr.files import atomic_write, write_json
from tlcr.models.heads import backbone, has_linear_head, head_parameters, name_of_head
from tlcr.models.lora.adapters import adapter_of, base_digest, keep_in_four_bits, require_plain
from tlcr.models.lora.four_bits import BITS, dequantised, is_quantised
from tlcr.models.lora.peft_layers import (
    adapted_layers,
    home_of,
    initialise,
    inject,
    inject_into_head,
    is_of_adapter,
    name_of_output,
    peft_configs,
    require_peft,
)
from tlcr.models.saving import save_model
from tlcr.models.stored import without_adapters
from tlcr.training.distributed import is_main_process, on_main_process
from tlcr.training.sharding import fill_tensor, has_shards, whole, whole_state

FOLDER = "adapter"
"""Where a model's folder keeps the adapter that was merged into it."""
PEFT_CONFIG, PEFT_WEIGHTS, BASE = ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, "base.json"
PEFT_PREFIX = "base_model.model."
"""What peft writes before the name of every weight."""


def save_trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """``save_model``, which for a model with an adapter writes the merged weights, and the adapter in ``adapter/``.

    Every process calls it.

    Args:
        model: the model to save; it stays as it is.
        tokenizer: its tokenizer.
        folder: where to write.
    """
    if adapter_of(model) is None:
        save_model(model, tokenizer, folder)
        return
    save_adapter(model, Path(folder) / FOLDER)
    save_model(model, tokenizer, folder, weights=merged_weights(model))


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of the whole model that computes what a model with an adapter does, up to one rounding.

    An adapted layer's weight is W + (alpha / rank) B A, added in float32 and rounded once to the dtype of W. The model
    is not touched: merging into it and taking that back would leave other weights than before. Every process calls it.

    Args:
        model: a model with an adapter.

    Returns:
        All weights by their names without adapters, on the CPU where they differ from the model's own: on the main
        process; an empty mapping on the others.
    """
    name = adapter_of(model)
    assert name is not None
    state = whole_state(model) if has_shards(model) else model.state_dict()
    if not is_main_process():
        return {}
    weights = {without_adapters(key): weight for key, weight in state.items() if not is_of_adapter(key)}
    weights |= _dequantised(model, weights)
    for path, layer in adapted_layers(model, name):
        base, (down, up) = weights[f"{path}.weight"], (state[f"{path}.lora_{part}.{name}.weight"] for part in "AB")
        weights[f"{path}.weight"] = _merged(base, down, up, layer, name).cpu()
    return weights


@torch.no_grad()
def whole_weights(model: PreTrainedModel, *, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model one after the other, for an engine: whole, and merged where there is an adapter.

    They are those of ``merged_weights``, or of the state dictionary of a model without an adapter. One at a time is
    gathered from its shards or merged, and the model is not touched. Every process iterates.

    Args:
        model: any model; of a sharded one that is not inside ``gathered`` each weight is gathered in its turn.
        merged: False gives the weights that the adapter stands on, without it.

    Yields:
        Name and tensor; tied weights once, as they are named first.
    """
    adapter = adapter_of(model)
    layers = {} if adapter is None else dict(adapted_layers(model, adapter))
    parameters = dict(model.named_parameters())
    for key, parameter in parameters.items():
        if is_of_adapter(key):
            continue
        path, module = key.removesuffix(".base_layer.weight"), model.get_submodule(key.rpartition(".")[0])
        weight = dequantised(module) if is_quantised(module) and key.endswith(".weight") else whole(parameter.detach())
        if merged and path != key and path in layers:
            down, up = (whole(parameters[f"{path}.lora_{part}.{adapter}.weight"].detach()) for part in "AB")
            weight = _merged(weight, down, up, layers[path], adapter)
        yield without_adapters(key), weight
    for path, module in model.named_modules():
        for key, buffer in module.named_buffers(path, recurse=False):
            if key.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield without_adapters(key), buffer


def save_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Writes a model's adapter, and its classification head, as peft does: ``PeftModel.from_pretrained`` loads it.

    ``base.json`` beside it says what weights it was trained on. Every process calls it.

    Args:
        model: a model with an adapter.
        folder: where to write.
    """
    folder, body = Path(folder), backbone(model)
    weights, sha256 = adapter_weights(model), base_digest(model)

    def write() -> None:
        write_adapter(model, weights, folder)
        dtype = str(body.dtype).removeprefix("torch.")
        about: dict[str, Any] = {"path": _source(model), "dtype": dtype, "sha256": sha256}
        if hasattr(body, "_tlcr_base_digest"):
            about["base_bits"] = BITS
        if has_linear_head(model):
            own = {key: value for key, value in vars(model.config).items() if key.startswith("tlcr_")}
            about |= {"id2label": model.config.id2label, "config": own}
        write_json(folder / BASE, about)

    on_main_process(write)


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's adapter, and its classification head, on the CPU, whole, by the names that peft has for them.

    Args:
        model: a model with an adapter. Where it is sharded every process calls, or has it inside ``gathered``.

    Returns:
        The weights.
    """
    name = adapter_of(model)
    assert name is not None
    return {key: whole(weight.detach()).cpu().contiguous() for key, weight in _peft_weights(model, name).items()}


def write_adapter(model: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes an adapter as peft does, on this process.

    Args:
        model: the model that has it.
        weights: of ``adapter_weights``.
        folder: where to write.
    """
    name = adapter_of(model)
    assert name is not None
    config = deepcopy(peft_configs(backbone(model))[name])
    config.task_type, config.inference_mode = _task(model), True
    config.base_model_name_or_path = _source(model)
    config.target_modules = sorted({path.rpartition(".")[2] for path, _ in adapted_layers(model, name)})
    config.modules_to_save = [name_of_head(model)] if has_linear_head(model) else None
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / PEFT_WEIGHTS) as aside:
        save_file(dict(weights), aside, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def load_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Fills a model's adapter and head from a folder of peft, in place.

    Args:
        model: a model with an adapter of the same layers and rank.
        folder: the adapter's folder.

    Raises:
        CheckpointError: there is no adapter, or it is of other layers, another rank or another head.
    """
    name, file = adapter_of(model), Path(folder) / PEFT_WEIGHTS
    assert name is not None
    if not file.is_file():
        raise CheckpointError(f"no adapter in {folder}: wanted {PEFT_WEIGHTS} and {PEFT_CONFIG}, as peft writes them")
    stored, own = load_file(file), _peft_weights(model, name)
    other = sorted(set(stored) ^ set(own)) or [key for key in own if stored[key].shape != own[key].shape]
    if other:
        raise CheckpointError(
            f"the adapter in {folder} does not fit {type(model).__name__}: {len(other)} of its weights are missing, "
            f"left over or of another shape, such as {other[0]}; it was trained with another lora.rank, lora.targets "
            "or model"
        )
    for key, weight in own.items():
        fill_tensor(weight, stored[key])


def attach_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Puts the adapter of a folder of peft on a model that has none.

    Args:
        model: the model that it was trained on.
        folder: the adapter's folder.

    Raises:
        CheckpointError: it does not fit the model.
        ConfigError: peft is not installed, or the adapter is no LoRA that can be merged.
    """
    model.requires_grad_(False)
    require_plain(model)
    config = read_peft_config(folder)
    if read_base(folder).get("base_bits") is not None:
        keep_in_four_bits(model)
    inject(backbone(model), config, "default")
    if name_of_output(model) in config.target_modules:
        inject_into_head(model, config, "default")
    initialise(model, "default", 0, home_of(model))
    model._tlcr_adapter = "default"  # type: ignore[assignment]
    load_adapter(model, folder)


def read_peft_config(folder: str | Path) -> Any:
    """The ``LoraConfig`` of an adapter's folder.

    Args:
        folder: the adapter's folder.

    Returns:
        peft's config.

    Raises:
        CheckpointError: the folder holds none.
        ConfigError: peft is not installed, or the adapter is of another kind than LoRA on linear layers.
    """
    require_peft()
    from peft import LoraConfig, PeftConfig

    if not (Path(folder) / PEFT_CONFIG).is_file():
        raise CheckpointError(f"no adapter in {folder}: wanted {PEFT_CONFIG}, as peft writes it")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig) or config.use_dora or config.bias != "none":
        raise ConfigError(
            f"the adapter in {folder} is no plain LoRA (peft_type {config.peft_type.value}, use_dora, bias): tlcr adds "
            "products of two matrices to weights, and nothing else; merge it by peft's merge_and_unload"
        )
    config.inference_mode = False
    return config


def read_base(folder: str | Path) -> dict[str, Any]:
    """``base.json`` of an adapter's folder; empty where another program wrote the adapter."""
    path = Path(folder) / BASE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _dequantised(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of layers in 4 bits as numbers; what else ``weights`` has of such layers is taken out of it."""
    layers = {path: layer for path, layer in model.named_modules() if is_quantised(layer)}
    found = {}
    for path, layer in layers.items():
        name = without_adapters(f"{path}.weight")
        for key in [key for key in weights if key.startswith(f"{name}.")]:
            del weights[key]
        found[name] = dequantised(layer).cpu()
    return found


def _merged(base: Tensor, down: Tensor, up: Tensor, layer: Any, adapter: str | None) -> Tensor:
    wide = torch.promote_types(base.dtype, torch.float32)
    delta = (up.to(wide) @ down.to(wide)) * layer.scaling[adapter]
    return (base.to(delta.device, wide) + (delta.T if layer.fan_in_fan_out else delta)).to(base.dtype)


def _peft_weights(model: PreTrainedModel, name: str) -> dict[str, nn.Parameter]:
    """Adapter and head under the names that peft has for them."""
    adapter = re.compile(rf"\.(lora_[AB])\.{re.escape(name)}\.weight$")
    head = {id(parameter) for parameter in head_parameters(model)}
    return {
        PEFT_PREFIX + adapter.sub(r".\1.weight", key): parameter
        for key, parameter in model.named_parameters()
        if adapter.search(key) or id(parameter) in head
    }


def _task(model: PreTrainedModel) -> str:
    if not has_linear_head(model):
        return "CAUSAL_LM"
    return "TOKEN_CLS" if "TokenClassification" in type(model).__name__ else "SEQ_CLS"


def _source(model: PreTrainedModel) -> str | None:
    """What the model was loaded from: a hub name, or a folder, which is named from the root."""
    path = model.name_or_path or None
    return os.path.abspath(path) if path and os.path.isdir(path) else path
