"""Layers of a transformer that torch has no single operation for: `rms_norm` and `gated_silu`."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from tlcr.errors import ShapeError
from tlcr.ops import _checks
from tlcr.ops._arithmetic import arithmetic_dtype
from tlcr.ops._spec import Gradient, Impl, Op


class RMSNormArguments(NamedTuple):
    x: Tensor
    weight: Tensor
    eps: float


class RMSNormBackward(NamedTuple):
    g_y: Tensor
    x: Tensor
    weight: Tensor
    scales: Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, impl: Impl = "auto") -> Tensor:
    """y = weight * (x / sqrt(mean(x^2) + eps)), the mean over the last axis: the norm of Llama and its relatives.

    The quotient is formed in float32 (float64) and rounded to x's dtype before it meets the weight, as transformers
    does. Unlike torch's operations in a row, it keeps x and one number a row for the backward pass. With the quotient
    n = x s and the incoming gradient g: dweight = sum of g n over all rows; dx = s (g weight - n mean(g weight n)).
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.

    Args:
        x: (..., H), a float tensor.
        weight: (H,), in x's dtype.
        eps: added to the mean square, >= 0.
        impl: which implementation runs.

    Returns:
        (..., H) in x's dtype.
    """
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or not _norm_is_ready(x, weight, eps):
        eps = _checked_norm(x, weight, eps)
    return RMS_NORM(impl, x.device, RMSNormArguments(x, weight, eps))


def _norm_is_ready(x: Tensor, weight: Tensor, eps: float) -> bool:
    """Whether everything is as implementations take it. All that most calls pay for checks."""
    shape, device = x.shape, x.device
    return (
        len(shape) > 0
        and x.dtype is weight.dtype
        and _checks.alike(shape, device, x)
        and _checks.alike(shape[-1:], device, weight)
        and type(eps) is float
        and 0.0 <= eps < math.inf
    )


def _checked_norm(x: Tensor, weight: Tensor, eps: float) -> float:
    """Raises what is wrong, or returns eps as a float."""
    op = "rms_norm"
    _checks.dense(op, "x", x)
    _checks.dense(op, "weight", weight)
    _checks.floating(op, x=x, weight=weight)
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ShapeError(
            f"{op}: weight has shape {tuple(weight.shape)} and x {tuple(x.shape)}, wanted (H,) and (..., H)"
        )
    _checks.dtype(op, "weight", weight, x.dtype)
    _checks.same_device(op, x=x, weight=weight)
    return _checks.number(op, "eps", eps, least=0)


def _reference_norm(arguments: RMSNormArguments) -> Tensor:
    x, weight, eps = arguments
    wide = x.to(arithmetic_dtype(x))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def _fake_norm(arguments: RMSNormArguments) -> tuple[Tensor, Tensor]:
    x, weight, _ = arguments
    rows = x.numel() // max(1, weight.numel())
    return x.new_empty(x.shape), x.new_empty((rows,), dtype=arithmetic_dtype(x))


RMS_NORM = Op(
    door=rms_norm,
    arguments=RMSNormArguments,
    results=("y", "scales"),
    reference=_reference_norm,
    fake=_fake_norm,
    result=lambda arguments, results: results[0],
    gradient=Gradient(of=("x", "weight"), arguments=RMSNormBackward),
    cpp=True,
    triton="tlcr.kernels.layers",
)


class GatedSiLUArguments(NamedTuple):
    gate: Tensor
    up: Tensor


class GatedSiLUBackward(NamedTuple):
    g_y: Tensor
    gate: Tensor
    up: Tensor


def gated_silu(gate: Tensor, up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """y = silu(gate) * up with silu(z) = z / (1 + exp(-z)): what stands between the products of a gated feed-forward.

    silu(gate) is rounded to the tensors' dtype before the product, as transformers does. Only gate and up are kept for
    the backward pass, where torch's two operations keep silu(gate) too. Source: Shazeer 2020, arXiv:2002.05202.

    Args:
        gate: any shape, a float tensor.
        up: the same shape and dtype.
        impl: which implementation runs.

    Returns:
        the same shape and dtype.
    """
    ready = (
        isinstance(gate, Tensor)
        and up is not None
        and _checks.alike(gate.shape, gate.device, gate, up)
        and gate.dtype is up.dtype
    )
    if not ready:
        _check_gate(gate, up)
    return GATED_SILU(impl, gate.device, GatedSiLUArguments(gate, up))


def _check_gate(gate: Tensor, up: Tensor) -> None:
    op = "gated_silu"
    _checks.dense(op, "gate", gate)
    _checks.dense(op, "up", up)
    _checks.floating(op, gate=gate, up=up)
    _checks.same_shape(op, gate.shape, "gate", "pass two projections of the same hidden states", up=up)
    _checks.dtype(op, "up", up, gate.dtype)
    _checks.same_device(op, gate=gate, up=up)


GATED_SILU = Op(
    door=gated_silu,
    arguments=GatedSiLUArguments,
    results=("y",),
    reference=lambda arguments: silu(arguments.gate) * arguments.up,
    fake=lambda arguments: arguments.gate.new_empty(arguments.gate.shape),
    gradient=Gradient(of=("gate", "up"), arguments=GatedSiLUBackward),
    cpp=True,
    triton="tlcr.kernels.layers",
)
