"""Norms and gated feed-forward layers that keep less for their backward pass, in low precision on a CPU.

transformers writes both in a few operations of torch, each of which keeps what it read: a norm a float32 and a rounded
copy of its input, a gate what its activation made of it. Here the backward pass makes them again from what a model
keeps anyway. On a CPU, whose elementwise code is bound by memory, norms are faster for it and gated layers no slower
(docs/ppo_step.md).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from transformers import PreTrainedModel

from tlcr.optim import LOW_PRECISION

Forward = Callable[[Any, Tensor], Tensor]


def keep_less(model: PreTrainedModel) -> None:
    """Gives the layers of ``model`` that this module knows their forward pass from here, in place.

    Known is a layer that computes the same, bit for bit: a class is tried with random weights on random input before
    its layers are changed. What a model computes without gradients, in float32 or on a GPU stays transformers' own.
    """
    forwards: dict[type[nn.Module], Forward | None] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in forwards:
            forwards[kind] = _forward_for(module)
        forward = forwards[kind]
        if forward is not None:
            module.forward = MethodType(forward, module)


def _forward_for(module: nn.Module) -> Forward | None:
    if set(dict(module.named_parameters())) == {"weight"} and hasattr(module, "variance_epsilon"):
        forward, width = _norm, module.get_parameter("weight").numel()
    elif {name for name, _ in module.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        forward, width = _gated, getattr(module.get_submodule("gate_proj"), "in_features", 0)
    else:
        return None
    if len(signature(type(module).forward).parameters) != 2:  # self and x
        return None
    return forward if _computes(module, forward, width) else None


def _computes(module: nn.Module, forward: Forward, width: int) -> bool:
    """Whether ``forward`` is what ``module`` computes: on a copy, whose weights are all different numbers."""
    parameters = list(module.parameters())
    if not parameters or not all(p.dtype in LOW_PRECISION and p.device.type == "cpu" for p in parameters):
        return False
    generator = torch.Generator().manual_seed(0)
    random = deepcopy(module)
    for parameter in random.parameters():
        nn.init.normal_(parameter, mean=1.0, generator=generator)
    x_NH = torch.randn(4, width, generator=generator).to(parameters[0].dtype).requires_grad_()
    return torch.equal(random(x_NH), forward(random, x_NH))


def _is_for_us(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled() and x.dtype in LOW_PRECISION and x.device.type == "cpu"


def _norm(self: Any, x: Tensor) -> Tensor:
    if not _is_for_us(x) or x.dtype != self.weight.dtype:
        return type(self).forward(self, x)
    normed: Tensor = RMSNorm.apply(x, self.weight, self.variance_epsilon)
    return normed


def _gated(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    product = SiLUProduct.apply(gate, up) if _is_for_us(gate) else self.act_fn(gate) * up
    answer: Tensor = self.down_proj(product)
    return answer


class RMSNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps) over the last axis; the quotient in float32, rounded before it meets w.

    With n = x r, r = 1 / sqrt(mean(x^2) + eps), and g the gradient of y, all in float32:
    dw = sum of g n over all rows; dx = r (g w - n mean(g n w)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * wide.mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, wide, wide_weight = x.float().mul_(scale), grad.float(), weight.float()
        products_NH = (wide * normed).flatten(end_dim=-2)
        grad_weight = products_NH.sum(0).to(weight.dtype)
        along = (products_NH @ wide_weight).div_(weight.numel()).view(scale.shape)
        grad_x = wide.mul_(wide_weight).addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None


class SiLUProduct(torch.autograd.Function):
    """silu(gate) * up, silu(z) = z / (1 + exp(-z)), with gradients bit for bit those of torch's two operations."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)
