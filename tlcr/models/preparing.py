"""A loaded model as every stage runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tlcr.config.schema import GeneratorConfig, ModelConfig
from tlcr.models.layers import fuse_layers
from tlcr.models.stored import is_unread
from tlcr.training.distributed import process_device


def prepared(model: PreTrainedModel, cfg: GeneratorConfig, *, device: torch.device | None = None) -> PreTrainedModel:
    """A model as every stage runs it: no dropout, fused layers on a CPU, checkpoints where ``cfg`` asks for them.

    Args:
        model: the model, which is changed in place.
        cfg: settings of loading.
        device: where a model on the meta device is to run; None: where it is, or this process's device.

    Returns:
        The same model, in evaluation mode.
    """
    if device is None and is_unread(model):
        device = process_device()
    disable_dropout(model)
    fuse_layers(model, device=device)
    if isinstance(cfg, ModelConfig) and cfg.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model.eval()


def disable_dropout(model: PreTrainedModel) -> None:
    """Sets every dropout of ``model`` to 0, in the modules and in the config that is saved with it.

    PPO's ratios compare two passes of one policy: they must be the same function.

    Args:
        model: the model to change.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):  # some attention modules keep the rate as a plain number
                setattr(module, name, 0.0)
    for config in {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values():
        for name, value in list(vars(config).items()):
            if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
                setattr(config, name, 0.0)


def enable_gradient_checkpointing(model: PreTrainedModel, contexts: Callable[[], Any] | None = None) -> None:
    """Keep no activations within the blocks for the backward pass, which computes them again.

    Args:
        model: the model to change.
        contexts: called in each block's forward pass, for the contexts of that pass and of its repetition.
    """
    # transformers 5.23 renamed it and warns of the old name; 5.20, the last for python 3.10, has only the old one
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False} if contexts is None else {"use_reentrant": False, "context_fn": contexts})
