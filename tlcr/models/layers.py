"""Replaces norms and gated feed-forward layers of transformers' models by ops of tlcr, in low precision on a CPU.

transformers writes both in a few operations of torch, each of which reads and writes all of a layer's activations and
keeps what it read for the backward pass. `ops.rms_norm` and `ops.gated_silu` read them once and keep only their
inputs (docs/ppo_step.md has the gain). Models in float32 are unchanged and keep their results to the last bit; models
on a GPU are unchanged too: Liger has such kernels for them.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlcr import ops
from tlcr.training.optim import LOW_PRECISION

Forward = Callable[[Any, Tensor], Tensor]

# The share of a bfloat16 probe's elements that another order of summation may round to a neighbour.
# Another order of rounding changes more than a tenth, another formula nearly all.
ROUNDED_OTHERWISE = 0.02


def fuse_layers(model: PreTrainedModel, *, device: torch.device | None = None) -> None:
    """Replaces the forward pass of the layers of ``model`` that this module knows, in place.

    A layer is known if it computes the same: each class is tested with random weights on random input before its layers
    are changed. In float32 or on a GPU the code of transformers still runs.

    Args:
        model: the model to change.
        device: where a model on the meta device will have its weights; None: the weights are there.
    """
    forwards: dict[type[nn.Module], Forward | None] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in forwards:
            forwards[kind] = _forward_for(module, device)
        forward = forwards[kind]
        if forward is not None:
            module.forward = MethodType(forward, module)


def _forward_for(module: nn.Module, device: torch.device | None) -> Forward | None:
    if set(dict(module.named_parameters())) == {"weight"} and hasattr(module, "variance_epsilon"):
        forward, width = _norm, module.get_parameter("weight").numel()
    elif {name for name, _ in module.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        forward, width = _gated, getattr(module.get_submodule("gate_proj"), "in_features", 0)
    else:
        return None
    if len(signature(type(module).forward).parameters) != 2:  # self and x
        return None
    parameters = list(module.parameters())
    if not parameters or not all(_is_for_us(parameter, device) for parameter in parameters):
        return None
    # A class of one size is tested once: an estimate of memory makes many models of one kind.
    key = type(module), repr(module), parameters[0].dtype
    if key not in _tested:
        _tested[key] = _computes(module, forward, width)
    return forward if _tested[key] else None


_tested: dict[tuple[type[nn.Module], str, torch.dtype], bool] = {}


@torch.no_grad()
def _computes(module: nn.Module, forward: Forward, width: int) -> bool:
    """Whether ``forward`` computes what ``module`` does, tested on a bfloat16 copy, which shows where it rounds, with
    weights that all differ."""
    generator = torch.Generator().manual_seed(0)
    # the parameters may have no content yet
    copies: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty(parameter.shape, dtype=torch.bfloat16))
        for parameter in module.parameters()
    }
    random = deepcopy(module, copies).bfloat16()
    for parameter in random.parameters():
        nn.init.normal_(parameter, mean=1.0, generator=generator)
    x_NH = torch.randn(64, width, generator=generator).bfloat16()
    theirs_NH, ours_NH = random(x_NH), forward(random, x_NH)
    if ours_NH.shape != theirs_NH.shape or ours_NH.dtype != theirs_NH.dtype:
        return False
    return bool((ours_NH != theirs_NH).float().mean() <= ROUNDED_OTHERWISE)


def _is_for_us(x: Tensor, device: torch.device | None = None) -> bool:
    return x.dtype in LOW_PRECISION and (device or x.device).type == "cpu"


def _norm(self: Any, x: Tensor) -> Tensor:
    if not _is_for_us(x) or x.dtype != self.weight.dtype:
        return type(self).forward(self, x)
    return ops.rms_norm(x, self.weight, eps=self.variance_epsilon)


def _gated(self: Any, x: Tensor) -> Tensor:
    if not _is_for_us(x):
        return type(self).forward(self, x)
    answer: Tensor = self.down_proj(ops.gated_silu(self.gate_proj(x), self.up_proj(x)))
    return answer
