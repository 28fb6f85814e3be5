"""`rms_norm` and `gated_silu`, forward and backward.

Where transformers rounds between two operations of a model in half precision, the kernels round too.

Bytes moved, with s bytes for each of the N H elements: `rms_norm` reads a row twice, the second time from the cache:
2 s for each element, and backward 3 s for the gradient of x and 2 s for that of the weight. `gated_silu`: 3 s, and
backward 5 s.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlcr.kernels.launch import ALIGNMENT, are_aligned, device_of, jit_aligned, launch_options
from tlcr.ops._arithmetic import arithmetic_dtype
from tlcr.ops._spec import takes
from tlcr.ops.layers import GatedSiLUArguments, GatedSiLUBackward, RMSNormArguments, RMSNormBackward

# Elements per program, or of a row at a time: 8 to each thread.
TILE = 1024
# Rows whose part of the weight's gradient one program sums, and columns that it sums it for.
WEIGHT_ROWS = 32
WEIGHT_TILE = 1024
OPTIONS = launch_options(warps=4)


@jit_aligned("width")
def _rms_norm_kernel(
    x_NH: tl.tensor,
    weight_H: tl.tensor,
    y_NH: tl.tensor,
    scales_N: tl.tensor,
    width: tl.int64,
    eps: tl.float64,
    TILE: tl.constexpr,
) -> None:
    """One row per program."""
    real: tl.constexpr = scales_N.dtype.element_ty
    element: tl.constexpr = x_NH.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE)
    squares = tl.zeros((TILE,), real)
    for begin in range(0, width, TILE):
        exists = lane < tl.minimum(width - begin, TILE).to(tl.int32)
        x = tl.load(x_NH + row * width + begin + lane, mask=exists, other=0).to(real)
        squares += x * x
    mean = tl.sum(squares, axis=0) / width.to(real)
    scale = 1 / tl.sqrt(mean + tl.full((), eps, real))
    tl.store(scales_N + row, scale)
    for begin in range(0, width, TILE):
        exists = lane < tl.minimum(width - begin, TILE).to(tl.int32)
        x = tl.load(x_NH + row * width + begin + lane, mask=exists, other=0).to(real)
        weight = tl.load(weight_H + begin + lane, mask=exists, other=0).to(real)
        normed = (x * scale).to(element).to(real)
        tl.store(y_NH + row * width + begin + lane, (weight * normed).to(element), mask=exists)


@jit_aligned("width")
def _rms_norm_x_kernel(
    g_y_NH: tl.tensor,
    x_NH: tl.tensor,
    weight_H: tl.tensor,
    scales_N: tl.tensor,
    g_x_NH: tl.tensor,
    width: tl.int64,
    TILE: tl.constexpr,
) -> None:
    """The gradient of one row of x per program."""
    real: tl.constexpr = scales_N.dtype.element_ty
    element: tl.constexpr = x_NH.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE)
    scale = tl.load(scales_N + row)
    products = tl.zeros((TILE,), real)
    for begin in range(0, width, TILE):
        exists = lane < tl.minimum(width - begin, TILE).to(tl.int32)
        x = tl.load(x_NH + row * width + begin + lane, mask=exists, other=0).to(real)
        g_y = tl.load(g_y_NH + row * width + begin + lane, mask=exists, other=0).to(real)
        weight = tl.load(weight_H + begin + lane, mask=exists, other=0).to(real)
        products += g_y * weight * (x * scale)
    mean = tl.sum(products, axis=0) / width.to(real)
    for begin in range(0, width, TILE):
        exists = lane < tl.minimum(width - begin, TILE).to(tl.int32)
        x = tl.load(x_NH + row * width + begin + lane, mask=exists, other=0).to(real)
        g_y = tl.load(g_y_NH + row * width + begin + lane, mask=exists, other=0).to(real)
        weight = tl.load(weight_H + begin + lane, mask=exists, other=0).to(real)
        g_x = (g_y * weight - x * scale * mean) * scale
        tl.store(g_x_NH + row * width + begin + lane, g_x.to(element), mask=exists)


@jit_aligned("width")
def _rms_norm_weight_kernel(
    g_y_NH: tl.tensor,
    x_NH: tl.tensor,
    scales_N: tl.tensor,
    parts_PH: tl.tensor,
    rows: tl.int64,
    width: tl.int64,
    tiles: tl.int64,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The sum over ROWS rows, in their order, of the gradient of a tile of the weight."""
    real: tl.constexpr = scales_N.dtype.element_ty
    part = tl.program_id(0).to(tl.int64) // tiles
    begin = tl.program_id(0).to(tl.int64) % tiles * TILE
    lane = tl.arange(0, TILE)
    exists = lane < tl.minimum(width - begin, TILE).to(tl.int32)
    total = tl.zeros((TILE,), real)
    for row in range(part * ROWS, tl.minimum(rows, (part + 1) * ROWS)):
        x = tl.load(x_NH + row * width + begin + lane, mask=exists, other=0).to(real)
        g_y = tl.load(g_y_NH + row * width + begin + lane, mask=exists, other=0).to(real)
        total += g_y * (x * tl.load(scales_N + row))
    tl.store(parts_PH + part * width + begin + lane, total, mask=exists)


def _placed(width: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, contiguous and, where a row is as long as the aligned kernel wants it, at an address for it.

    The two variants of a kernel add up a row in different orders. So which of them runs follows from the width alone,
    and the few tensors that begin elsewhere, such as parts of others, are copied.
    """
    dense = tuple(tensor.contiguous() for tensor in tensors)
    if width % ALIGNMENT != 0:
        return dense
    return tuple(tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone() for tensor in dense)


@takes(RMSNormArguments)
def rms_norm(a: RMSNormArguments) -> tuple[Tensor, Tensor]:
    """`tlcr.ops.rms_norm` of checked arguments, and one number a row for the backward pass."""
    width = a.weight.numel()
    x_NH, weight_H = _placed(width, a.x, a.weight)
    y_NH = torch.empty_like(x_NH)
    scales_N = x_NH.new_empty(x_NH.numel() // max(1, width), dtype=arithmetic_dtype(x_NH))
    if x_NH.numel() > 0:
        with device_of(x_NH):
            _rms_norm_kernel.of(are_aligned(width, x_NH, weight_H))[(scales_N.numel(),)](
                x_NH, weight_H, y_NH, scales_N, width, a.eps, TILE=TILE, **OPTIONS
            )
    return y_NH, scales_N


@takes(RMSNormBackward)
def rms_norm_backward(a: RMSNormBackward) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight."""
    width = a.weight.numel()
    g_y_NH, x_NH, weight_H, scales_N = _placed(width, *a)
    rows = scales_N.numel()
    g_x_NH = torch.empty_like(x_NH)
    if x_NH.numel() == 0:
        return g_x_NH, torch.zeros_like(weight_H)
    parts, tiles = triton.cdiv(rows, WEIGHT_ROWS), triton.cdiv(width, WEIGHT_TILE)
    parts_PH = scales_N.new_empty(parts, width)
    aligned = are_aligned(width, g_y_NH, x_NH, weight_H, scales_N)
    with device_of(x_NH):
        _rms_norm_x_kernel.of(aligned)[(rows,)](g_y_NH, x_NH, weight_H, scales_N, g_x_NH, width, TILE=TILE, **OPTIONS)
        _rms_norm_weight_kernel.of(aligned)[(parts * tiles,)](
            g_y_NH, x_NH, scales_N, parts_PH, rows, width, tiles, ROWS=WEIGHT_ROWS, TILE=WEIGHT_TILE, **OPTIONS
        )
    return g_x_NH, parts_PH.sum(0).to(weight_H.dtype)


@triton.jit
def _sigmoid(z: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-z)), from the exponential of -|z|, which does not overflow."""
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@jit_aligned("count")
def _gated_silu_kernel(
    gate: tl.tensor, up: tl.tensor, y: tl.tensor, count: tl.int64, REAL: tl.constexpr, TILE: tl.constexpr
) -> None:
    """One tile per program."""
    element: tl.constexpr = gate.dtype.element_ty
    begin = tl.program_id(0).to(tl.int64) * TILE
    lane = tl.arange(0, TILE)
    exists = lane < tl.minimum(count - begin, TILE).to(tl.int32)
    z = tl.load(gate + begin + lane, mask=exists, other=0).to(REAL)
    silu = (z * _sigmoid(z)).to(element).to(REAL)
    factor = tl.load(up + begin + lane, mask=exists, other=0).to(REAL)
    tl.store(y + begin + lane, (silu * factor).to(element), mask=exists)


@jit_aligned("count")
def _gated_silu_backward_kernel(
    g_y: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    g_gate: tl.tensor,
    g_up: tl.tensor,
    count: tl.int64,
    REAL: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One tile per program. With s = sigmoid(z): d silu(z) = s (1 + z (1 - s))."""
    element: tl.constexpr = gate.dtype.element_ty
    begin = tl.program_id(0).to(tl.int64) * TILE
    lane = tl.arange(0, TILE)
    exists = lane < tl.minimum(count - begin, TILE).to(tl.int32)
    g = tl.load(g_y + begin + lane, mask=exists, other=0).to(REAL)
    z = tl.load(gate + begin + lane, mask=exists, other=0).to(REAL)
    factor = tl.load(up + begin + lane, mask=exists, other=0).to(REAL)
    s = _sigmoid(z)
    silu = (z * s).to(element).to(REAL)
    tl.store(g_gate + begin + lane, (g * factor * s * (1 + z * (1 - s))).to(element), mask=exists)
    tl.store(g_up + begin + lane, (g * silu).to(element), mask=exists)


def _options(tensor: Tensor) -> dict[str, Any]:
    """With 8 numbers of float64 to a thread a division would spill registers."""
    if tensor.dtype == torch.float64:
        return {"REAL": tl.float64, "TILE": TILE // 2, **OPTIONS}
    return {"REAL": tl.float32, "TILE": TILE, **OPTIONS}


@takes(GatedSiLUArguments)
def gated_silu(a: GatedSiLUArguments) -> Tensor:
    """`tlcr.ops.gated_silu` of checked arguments."""
    gate, up = a.gate.contiguous(), a.up.contiguous()
    y = torch.empty_like(gate)
    if gate.numel() > 0:
        options = _options(gate)
        kernel = _gated_silu_kernel.of(are_aligned(gate.numel(), gate, up))
        with device_of(gate):
            kernel[(triton.cdiv(gate.numel(), options["TILE"]),)](gate, up, y, gate.numel(), **options)
    return y


@takes(GatedSiLUBackward)
def gated_silu_backward(a: GatedSiLUBackward) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    g_y, gate, up = (tensor.contiguous() for tensor in a)
    g_gate, g_up = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel() > 0:
        options = _options(gate)
        kernel = _gated_silu_backward_kernel.of(are_aligned(gate.numel(), g_y, gate, up))
        with device_of(gate):
            kernel[(triton.cdiv(gate.numel(), options["TILE"]),)](g_y, gate, up, g_gate, g_up, gate.numel(), **options)
    return g_gate, g_up
