"""Common parts of the Triton kernels and of the functions that launch them.

Each of the other files holds kernels and the host functions that launch them; these take the arguments that the spec in
`tlcr.ops` describes, checked and in the order of the operator's schema, and only `tlcr.ops` calls them.

Conventions of the kernels:
- `real` is the type of the arithmetic and of the results. Python's numbers arrive as float64, because Triton would pass
  them as float32, and are rounded to `real` once.
- Where a token does not count only its mask is loaded: padding saves bandwidth, and a NaN in it has no effect.
- Kernels use comparisons and `tl.where` in place of `tl.minimum` and `tl.maximum`, which drop NaN.
- A tile begins at its row's first token plus a multiple of the tile, wherever the row lies in memory. So the result of
  a row depends neither on the other rows nor on how far it is padded, to the last bit; and as rows begin anywhere,
  nothing is to be gained from pointers or sizes that are multiples of 16.
- No kernel adds atomically: the order of every sum is fixed.
- Offsets from a tensor's beginning are 64-bit, those within a tile 32-bit.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def jit(kernel: Callable[..., None]) -> Any:
    """`triton.jit`, with one compilation per dtypes and options: a new size never compiles anything.

    By default, Triton compiles variants for a size of 1, for multiples of 16 and for more than 32 bits. So kernels
    annotate their sizes as int64, and no argument is specialised on its value.
    """
    parameters = inspect.signature(kernel).parameters.values()
    run_time = [parameter.name for parameter in parameters if parameter.annotation is not tl.constexpr]
    return triton.jit(kernel, do_not_specialize=run_time)


def launch_options(warps: int) -> dict[str, Any]:
    """Fuses products and sums, whatever the default of the installed Triton is."""
    return {"num_warps": warps, "enable_fp_fusion": True}


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
