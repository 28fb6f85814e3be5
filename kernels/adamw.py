"""`adamw_step`: one step of AdamW over bfloat16 weights with float32 masters, in one pass and one launch.

Bytes moved per weight: 14 read (weight, gradient and remainder of 2, two moments of 4) and 12 written.
"""

import math

import torch
import triton
import triton.language as tl

from tlcr.kernels.launch import device_of, jit, launch_options
from tlcr.ops._spec import takes
from tlcr.ops.adamw import AdamWArguments

# Weights per program: 8 to each thread, in loads of 16 bytes and more.
TILE = 1024
OPTIONS = launch_options(warps=4)


@jit
def _adamw_kernel(
    parameter: tl.tensor,
    grad: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    remainder: tl.tensor,
    count: tl.int64,
    beta1: tl.float64,
    beta2: tl.float64,
    decay: tl.float64,
    step_size: tl.float64,
    correction: tl.float64,
    eps: tl.float64,
    TILE: tl.constexpr,
) -> None:
    """One tile of weights per program; `parameter` and `remainder` are the halves of the masters' bits, as int16."""
    real: tl.constexpr = exp_avg.dtype.element_ty
    begin = tl.program_id(0).to(tl.int64) * TILE
    lane = tl.arange(0, TILE)
    exists = lane < tl.minimum(count - begin, TILE).to(tl.int32)

    gradient = tl.load(grad + begin + lane, mask=exists, other=0).to(real)
    mean = tl.load(exp_avg + begin + lane, mask=exists, other=0)
    square = tl.load(exp_avg_sq + begin + lane, mask=exists, other=0)
    mean = tl.full((), beta1, real) * mean + tl.full((), 1 - beta1, real) * gradient
    square = tl.full((), beta2, real) * square + tl.full((), 1 - beta2, real) * gradient * gradient
    tl.store(exp_avg + begin + lane, mean, mask=exists)
    tl.store(exp_avg_sq + begin + lane, square, mask=exists)

    upper = tl.load(parameter + begin + lane, mask=exists, other=0).to(tl.int32) << 16
    lower = tl.load(remainder + begin + lane, mask=exists, other=0).to(tl.int32)
    master = (upper + lower).to(real, bitcast=True)
    denominator = tl.sqrt(square) / tl.full((), correction, real) + tl.full((), eps, real)
    master = tl.full((), decay, real) * master - tl.full((), step_size, real) * mean / denominator

    # A NaN keeps only its upper half, as a quiet NaN: adding the remainder could make it a number.
    is_number = master == master
    bits = master.to(tl.int32, bitcast=True)
    rounded = tl.where(is_number, bits + 0x8000, bits | 0x400000)
    tl.store(parameter + begin + lane, (rounded >> 16).to(tl.int16), mask=exists)
    tl.store(remainder + begin + lane, tl.where(is_number, bits, 0).to(tl.int16), mask=exists)


@takes(AdamWArguments)
def adamw_step(a: AdamWArguments) -> None:
    """`tlcr.ops.adamw_step` of checked arguments."""
    if a.parameter.numel() == 0:
        return
    in_place = a.parameter, a.exp_avg, a.exp_avg_sq, a.remainder
    parameter_N, exp_avg_N, exp_avg_sq_N, remainder_N = dense = [tensor.contiguous() for tensor in in_place]
    with device_of(a.parameter):
        _adamw_kernel[(triton.cdiv(a.parameter.numel(), TILE),)](
            parameter_N.view(torch.int16),
            a.grad.contiguous(),
            exp_avg_N,
            exp_avg_sq_N,
            remainder_N,
            a.parameter.numel(),
            a.beta1,
            a.beta2,
            1 - a.learning_rate * a.weight_decay,
            a.learning_rate / (1 - a.beta1**a.step),
            math.sqrt(1 - a.beta2**a.step),
            a.eps,
            TILE=TILE,
            **OPTIONS,
        )
    for tensor, changed in zip(in_place, dense, strict=True):
        if changed is not tensor:
            tensor.copy_(changed)
