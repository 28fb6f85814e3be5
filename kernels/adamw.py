"""`adamw_step`: one step of AdamW over the bfloat16 weights of a model, with float32 masters, in one launch.

Bytes moved per weight: 14 read (weight, gradient and remainder of 2, two moments of 4) and 12 written.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from tlcr.kernels.launch import device_of, jit, launch_options
from tlcr.ops._spec import takes
from tlcr.ops.adamw import LISTS, AdamWArguments

# Weights of a tile, 8 to each thread, which read and write 16 bytes at a time; and of a program.
TILE = 1024
CHUNK = 4096
# No product is fused with a sum but where the kernel says so: what the compiler would fuse might differ between the
# copies of the code below, and a weight's bits between places in memory.
OPTIONS = launch_options(warps=4) | {"enable_fp_fusion": False}

# The table of tensors: a row of int64 for each, with the addresses of the lists' tensors and then these.
COUNT, FIRST_PROGRAM, IS_ALIGNED, ROW = (tl.constexpr(len(LISTS) + i) for i in range(4))


@triton.jit
def _step(
    weight: tl.tensor,
    gradient: tl.tensor,
    mean: tl.tensor,
    square: tl.tensor,
    remainder: tl.tensor,
    beta1: tl.float64,
    beta2: tl.float64,
    decay: tl.float64,
    step_size: tl.float64,
    correction: tl.float64,
    eps: tl.float64,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The weights, moments and remainders after the step; weights and remainders are halves of bits, as int16."""
    real: tl.constexpr = tl.float32
    gradient = gradient.to(real)
    mean = tl.fma(mean, tl.full((), beta1, real), tl.full((), 1 - beta1, real) * gradient)
    square = tl.fma(square, tl.full((), beta2, real), tl.full((), 1 - beta2, real) * gradient * gradient)
    master = ((weight.to(tl.int32) << 16) + remainder.to(tl.int32)).to(real, bitcast=True)
    denominator = tl.sqrt(square) / tl.full((), correction, real) + tl.full((), eps, real)
    master = tl.fma(master, tl.full((), decay, real), tl.full((), -step_size, real) * mean / denominator)
    # A NaN keeps only its upper half, as a quiet NaN: adding the remainder could make it a number.
    is_number = master == master
    bits = master.to(tl.int32, bitcast=True)
    rounded = tl.where(is_number, bits + 0x8000, bits | 0x400000)
    return (rounded >> 16).to(tl.int16), mean, square, tl.where(is_number, bits, 0).to(tl.int16)


@triton.jit
def _store_whole(to: tl.tensor, value: tl.tensor) -> None:
    """A tile of float32, of which each thread has 8 in a row: stored as a whole, it would first be exchanged between
    threads, so that each has 4."""
    rows: tl.constexpr = value.shape[0] // 8
    first, second = value.reshape(rows, 2, 4).permute(0, 2, 1).split()
    at = 8 * tl.arange(0, rows)[:, None] + tl.arange(0, 4)[None, :]
    tl.store(to + at, first)
    tl.store(to + 4 + at, second)


@jit
def _adamw_kernel(
    tensors: tl.tensor,
    tensor_of_program: tl.tensor,
    beta1: tl.float64,
    beta2: tl.float64,
    decay: tl.float64,
    step_size: tl.float64,
    correction: tl.float64,
    eps: tl.float64,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One chunk of one tensor per program: whole tiles, aligned to 16 bytes, by 16 bytes at a time."""
    program = tl.program_id(0)
    row = tensors + tl.load(tensor_of_program + program).to(tl.int64) * ROW
    begin = (program - tl.load(row + FIRST_PROGRAM)) * CHUNK
    left = tl.minimum(tl.load(row + COUNT) - begin, CHUNK).to(tl.int32)
    whole = tl.where(tl.load(row + IS_ALIGNED) != 0, left // TILE * TILE, 0)
    parameter = tl.load(row).to(tl.pointer_type(tl.int16)) + begin
    grad = tl.load(row + 1).to(tl.pointer_type(tl.bfloat16)) + begin
    exp_avg = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + begin
    exp_avg_sq = tl.load(row + 3).to(tl.pointer_type(tl.float32)) + begin
    remainder = tl.load(row + 4).to(tl.pointer_type(tl.int16)) + begin
    lane = tl.arange(0, TILE)
    for start in range(0, whole, TILE):
        to_weight = tl.multiple_of(parameter + start, 16) + lane
        to_mean = tl.multiple_of(exp_avg + start, 16)
        to_square = tl.multiple_of(exp_avg_sq + start, 16)
        to_remainder = tl.multiple_of(remainder + start, 16) + lane
        weight, mean, square, rest = _step(
            tl.load(to_weight),
            tl.load(tl.multiple_of(grad + start, 16) + lane),
            tl.load(to_mean + lane),
            tl.load(to_square + lane),
            tl.load(to_remainder),
            beta1,
            beta2,
            decay,
            step_size,
            correction,
            eps,
        )
        tl.store(to_weight, weight)
        _store_whole(to_mean, mean)
        _store_whole(to_square, square)
        tl.store(to_remainder, rest)
    for start in range(whole, left, TILE // 8):
        at = start + tl.arange(0, TILE // 8)
        exists = at < left
        weight, mean, square, rest = _step(
            tl.load(parameter + at, mask=exists),
            tl.load(grad + at, mask=exists),
            tl.load(exp_avg + at, mask=exists),
            tl.load(exp_avg_sq + at, mask=exists),
            tl.load(remainder + at, mask=exists),
            beta1,
            beta2,
            decay,
            step_size,
            correction,
            eps,
        )
        tl.store(parameter + at, weight, mask=exists)
        tl.store(exp_avg + at, mean, mask=exists)
        tl.store(exp_avg_sq + at, square, mask=exists)
        tl.store(remainder + at, rest, mask=exists)


@takes(AdamWArguments)
def adamw_step(a: AdamWArguments) -> None:
    """`tlcr.ops.adamw_step` of checked arguments."""
    dense: list[tuple[Tensor, ...]] = []
    for tensors in zip(*a[: len(LISTS)], strict=True):
        if tensors[0].numel() == 0:
            continue
        if all(tensor.is_contiguous() for tensor in tensors):
            dense.append(tensors)
            continue
        # Tensors with gaps in memory go alone, so that their copies do not wait for those of the others.
        copies = tuple(tensor.contiguous() for tensor in tensors)
        _launch([copies], a)
        for name, tensor, changed in zip(LISTS, tensors, copies, strict=True):
            if name != "grads" and changed is not tensor:
                tensor.copy_(changed)
    if dense:
        _launch(dense, a)


def _launch(tensors: Sequence[tuple[Tensor, ...]], a: AdamWArguments) -> None:
    """`tensors`: of each parameter those that the lists hold, contiguous."""
    like = tensors[0][0]
    with device_of(like):
        stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
        addresses = tuple(tensor.data_ptr() for row in tensors for tensor in row)
        counts = tuple(row[0].numel() for row in tensors)
        table = _table(like.device, stream, addresses, counts, CHUNK)
        tensor_of_program = _tensor_of_program(like.device, stream, counts, CHUNK)
        _adamw_kernel[tensor_of_program.shape](
            table,
            tensor_of_program,
            a.beta1,
            a.beta2,
            1 - a.learning_rate * a.weight_decay,
            a.learning_rate / (1 - a.beta1**a.step),
            math.sqrt(1 - a.beta2**a.step),
            a.eps,
            TILE=min(TILE, CHUNK),
            CHUNK=CHUNK,
            **OPTIONS,
        )


# What the kernel looks up is kept on the device while a model's tensors stay where they are. A stream has its own,
# because the copy to the device is in its queue.


@functools.lru_cache(maxsize=16)
def _table(
    device: torch.device, stream: int, addresses: tuple[int, ...], counts: tuple[int, ...], chunk: int
) -> Tensor:
    rows, chunks = np.array(addresses).reshape(-1, len(LISTS)), _chunks(counts, chunk)
    return _on(device, np.column_stack([rows, counts, chunks.cumsum() - chunks, (rows % 16 == 0).all(1)]))


@functools.lru_cache(maxsize=16)
def _tensor_of_program(device: torch.device, stream: int, counts: tuple[int, ...], chunk: int) -> Tensor:
    return _on(device, np.repeat(np.arange(len(counts), dtype=np.int32), _chunks(counts, chunk)))


def _chunks(counts: tuple[int, ...], chunk: int) -> NDArray[np.int64]:
    return -(-np.array(counts) // chunk)


def _on(device: torch.device, array: NDArray[Any]) -> Tensor:
    """Copied without waiting: from pinned memory, which torch keeps until the copy is done."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
