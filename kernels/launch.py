"""Common parts of the Triton kernels and of the functions that launch them.

Each of the other files holds kernels and the host functions that launch them; these take the arguments that the spec in
`tlcr.ops` describes, checked and in the order of the operator's schema, and only `tlcr.ops` calls them.

Conventions of the kernels:
- `real` is the type of the arithmetic and of the results. Python's numbers arrive as float64, because Triton would pass
  them as float32, and are rounded to `real` once.
- Each thread takes a group of neighbouring tokens, and moves 16 bytes of them by one access, or all if they are fewer.
  That needs rows that begin at multiples of 16 bytes, so a kernel is compiled twice, for such rows and for any others
  (`Kernel`). `WIDE` is the size of the group for the first and 1 for the others. The arithmetic is the same.
- Where none of a group's tokens counts only their masks are loaded: padding saves bandwidth. What else is loaded where
  a token does not count is replaced by 0, so that a NaN there has no effect.
- Kernels use comparisons and `tl.where` in place of `tl.minimum` and `tl.maximum`, which drop NaN.
- A tile begins at its row's first token plus a multiple of the tile, wherever the row lies in memory.
- No kernel adds atomically: the order of every sum is fixed.
- Offsets from a tensor's beginning are 64-bit, those within a tile 32-bit.
"""

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# What an access moves at once, in bytes, and so what addresses must be multiples of.
ALIGNMENT = 16


class Kernel(NamedTuple):
    """A kernel, compiled at most twice for the dtypes of its arguments and its options, whatever their sizes."""

    unaligned: Any
    aligned: Any
    """For pointers and sizes that are multiples of 16."""

    def of(self, aligned: bool) -> Any:
        return self.aligned if aligned else self.unaligned


def jit(kernel: Callable[..., None]) -> Any:
    """`triton.jit`, with one compilation per dtypes and options: a new size never compiles anything.

    By default, Triton compiles variants for a size of 1, for multiples of 16 and for more than 32 bits. So kernels
    annotate their sizes as int64, and no argument is specialised on its value.
    """
    return triton.jit(kernel, do_not_specialize=[name for name, kind in _parameters(kernel) if kind != tl.constexpr])


def jit_aligned(*sizes: str) -> Callable[[Callable[..., None]], Kernel]:
    """`jit`, and a second time for pointers and `sizes`, parameters of the kernel, that are multiples of 16."""

    def compile_twice(kernel: Callable[..., None]) -> Kernel:
        others = [name for name, kind in _parameters(kernel) if kind in (tl.int64, tl.float64) and name not in sizes]
        return Kernel(jit(kernel), triton.jit(kernel, do_not_specialize=others))

    return compile_twice


def _parameters(kernel: Callable[..., None]) -> list[tuple[str, Any]]:
    return [(parameter.name, parameter.annotation) for parameter in inspect.signature(kernel).parameters.values()]


def are_aligned(length: int, *tensors: Tensor | None) -> bool:
    """Whether rows of `length` begin at multiples of 16 elements and 16 bytes in all of the contiguous `tensors`."""
    return length % ALIGNMENT == 0 and all(tensor is None or tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)


@triton.jit
def any_of_group(counts, GROUP: tl.constexpr, EACH: tl.constexpr = 1):  # type: ignore[no-untyped-def]
    """For `EACH` elements of each token whether any of its group counts: one predicate for the accesses of a thread."""
    if GROUP == 1 and EACH == 1:
        return counts
    else:
        groups = tl.reshape(counts.to(tl.int32), (counts.numel // GROUP, GROUP))
        any_counts = tl.max(groups, axis=1, keep_dims=True)
        of_elements = tl.broadcast_to(any_counts, (groups.shape[0], GROUP * EACH))
        of_elements = tl.reshape(of_elements, (counts.shape[0], counts.shape[1] * EACH)) != 0
        return tl.max_constancy(of_elements, (1, GROUP * EACH))


@triton.jit
def read(pointer, at, counts, reads, real: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers of tokens that count, and 0 for the others; `reads` is `any_of_group(counts)`."""
    return tl.where(counts, tl.load(pointer + at, mask=reads, other=0).to(real), 0.0)


@triton.jit
def below(limit, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which lanes of a tile lie below the limit of their row."""
    return tl.arange(0, TILE)[None, :] < tl.minimum(tl.maximum(limit, 0), TILE).to(tl.int32)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of programs that certainly run at the same time; 1 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class Tiles(NamedTuple):
    """How rows are divided among programs."""

    rows: int
    """Rows of a program."""
    tile: int
    """Neighbouring tokens of each of its rows that it takes at once."""

    def programs(self, rows: int, length: int) -> int:
        """How many take one tile of each of their rows."""
        return triton.cdiv(rows, self.rows) * triton.cdiv(length, self.tile)


def tiles_of(length: int, tokens: int, shortest: int) -> Tiles:
    """The tile that holds a row of `length`, and as many rows as make up `tokens`; a tile of a longer row.

    All three are powers of 2 but `length`. No tile is below `shortest`.
    """
    tile = min(max(triton.next_power_of_2(max(length, 1)), shortest), tokens)
    return Tiles(tokens // tile, tile)


def launch_options(warps: int, registers: int | None = None) -> dict[str, Any]:
    """Fuses products and sums, whatever the default of the installed Triton is; `registers` are the most of a thread,
    which Triton takes for NVIDIA's GPUs alone."""
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return options if registers is None or torch.version.hip else options | {"maxnreg": registers}


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors. Mostly it is, and nothing is to be
    done: switching to a device and back costs as much as a fifth of a launch."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _AS_IT_IS
    return torch.cuda.device(tensor.device)


_AS_IT_IS = nullcontext()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The kernels read contiguous tensors; any other is copied."""
    return None if tensor is None else tensor.contiguous()
