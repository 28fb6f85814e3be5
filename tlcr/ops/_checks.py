"""Argument checks shared by every implementation of an op.

They look at shapes, dtypes, layouts, devices and Python numbers only. Tensor values are never read on an accelerator:
that would make the host wait for the device.

`alike` and `is_mask` are all that a call costs whose arguments are in order. Where one says no, the other functions say
what is wrong, or bring into form what is merely unusual.
"""

import math
import numbers
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from tlcr.errors import ConfigError, DataError, ShapeError

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STRIDED = torch.strided
INTEGERS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
)  # every call looks for its own: the usual first


def alike(shape: torch.Size, device: torch.device, *tensors: Tensor | None) -> bool:
    """Whether each of them, if it is given at all, is a float tensor of that shape on that device."""
    for tensor in tensors:
        if tensor is not None and (
            not isinstance(tensor, Tensor)
            or tensor.dtype not in FLOATS
            or tensor.shape != shape
            or tensor.device != device
            or tensor.layout is not STRIDED
        ):
            return False
    return True


def is_mask(shape: torch.Size, device: torch.device, mask: Tensor) -> bool:
    """Whether it is a bool tensor of that shape on that device."""
    return (
        isinstance(mask, Tensor)
        and mask.dtype is torch.bool
        and mask.shape == shape
        and mask.device == device
        and mask.layout is STRIDED
    )


def floating(op: str, **tensors: Tensor | None) -> None:
    """Each tensor that is given must be a float tensor."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        dense(op, name, tensor)
        if tensor.dtype not in FLOATS:
            raise ShapeError(
                f"{op}: {name} has dtype {tensor.dtype}, wanted a float dtype ({', '.join(str(x)[6:] for x in FLOATS)})"
                f"; pass {name}.float()"
            )


def integers(op: str, **tensors: Tensor | None) -> None:
    """Each tensor that is given must be an integer tensor."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        dense(op, name, tensor)
        if tensor.dtype not in INTEGERS:
            raise ShapeError(f"{op}: {name} has dtype {tensor.dtype}, wanted integers; pass {name}.long()")


def dense(op: str, name: str, tensor: Tensor) -> None:
    """`tensor` must be a tensor of plain memory, with whatever strides."""
    if not isinstance(tensor, Tensor):
        raise ShapeError(f"{op}: {name} is a {type(tensor).__name__}, wanted a torch.Tensor")
    if tensor.layout is not torch.strided:
        raise ShapeError(f"{op}: {name} has layout {tensor.layout}, wanted a dense tensor; pass {name}.to_dense()")


def dtype(op: str, name: str, tensor: Tensor, wanted: torch.dtype) -> None:
    """`tensor` must have that dtype and no other."""
    dense(op, name, tensor)
    if tensor.dtype != wanted:
        raise ShapeError(f"{op}: {name} has dtype {tensor.dtype}, wanted {wanted}")


def axes(op: str, name: str, tensor: Tensor, names: str) -> None:
    """`tensor` must have as many axes as `names` says, as in "B, T"."""
    dense(op, name, tensor)
    wanted = len(names.split(","))
    if tensor.ndim != wanted:
        raise ShapeError(f"{op}: {name} has shape {tuple(tensor.shape)}, wanted {wanted} axes ({names})")


PER_TOKEN = "slice or pad it so that index t is the action that emitted token t"
"""What to do about a tensor that has not one value for each token."""


def same_shape(op: str, shape: torch.Size, like: str, remedy: str = PER_TOKEN, /, **tensors: Tensor | None) -> None:
    """Each tensor that is given must have `shape`, which is that of the argument called `like`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ShapeError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, wanted {tuple(shape)} to match {like}; {remedy}"
            )


def same_device(op: str, **tensors: Tensor | None) -> torch.device:
    """All tensors that are given must live on one device, which is returned."""
    first, device = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ShapeError(
                f"{op}: {name} is on {tensor.device} but {first} is on {device}; move one with .to(device)"
            )
    assert device is not None, "every op has a tensor that must be given"
    return device


def bool_mask(op: str, mask: Tensor, shape: torch.Size, like: str) -> Tensor:
    """`mask` as bool: True, or any integer but 0, counts."""
    dense(op, "mask", mask)
    if mask.dtype != torch.bool and mask.dtype not in INTEGERS:
        raise ShapeError(f"{op}: mask has dtype {mask.dtype}, wanted bool (True counts); pass mask.bool()")
    same_shape(op, shape, like, mask=mask)
    return mask.bool()


def number(
    op: str,
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    finite: bool = True,
) -> float:
    """`value` as a float, checked against `least <= value <= most` and `above < value < below`."""
    # Most are floats, and isinstance(value, Real) is slow.
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise ConfigError(f"{op}: {name} is a {type(value).__name__}, wanted a Python number")
    result = float(value)
    # Only comparisons: torch.compile can trace them, and they are false for a NaN.
    inside = (
        least <= result <= most and (above == -math.inf or result > above) and (below == math.inf or result < below)
    )
    if not inside or (finite and not -math.inf < result < math.inf):
        bounds = [f">= {least:g}"] * (least > -math.inf) + [f"> {above:g}"] * (above > -math.inf)
        bounds += [f"<= {most:g}"] * (most < math.inf) + [f"< {below:g}"] * (below < math.inf) + ["finite"] * finite
        raise ConfigError(f"{op}: {name} is {result:g}, wanted a number {' and '.join(bounds)}")
    return result


def pair(op: str, name: str, values: tuple[float, float], **bounds: float) -> tuple[float, float]:
    """`values` as two floats within bounds, as of `number`."""
    if not isinstance(values, tuple | list) or len(values) != 2:
        raise ConfigError(f"{op}: {name} is {values!r}, wanted two Python numbers")
    first, second = (number(op, f"{name}[{i}]", value, **bounds) for i, value in enumerate(values))  # type: ignore[arg-type]
    return first, second


def choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """`value` must be one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{op}: {name}={value!r} is unknown, choose from {', '.join(map(repr, choices))}")


def whole_batch(op: str, arguments: Iterable[object]) -> None:
    """Raises where torch.vmap maps over a tensor, which code that writes into results of its own cannot follow."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    if any(isinstance(one, Tensor) and torch._C._functorch.is_batchedtensor(one) for one in arguments):
        raise ShapeError(
            f"{op}: impl='reference' cannot be mapped by torch.vmap; call it once with the whole batch, or take "
            "another implementation"
        )


def has_memory(tensor: Tensor) -> bool:
    """Whether it has an address and values: not while code is compiled, on the meta device, or where it is fake."""
    return not torch.compiler.is_compiling() and tensor.device.type != "meta" and not is_fake(tensor)


def vocabulary_ids(op: str, token_ids: Tensor, vocabulary: int) -> None:
    """Ids must lie in [0, V). On the CPU only; elsewhere, and when compiled, the kernel looks."""
    if token_ids.device.type != "cpu" or not has_memory(token_ids) or token_ids.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(token_ids))
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise DataError(
            f"{op}: token_ids holds {wrong}, wanted ids in [0, {vocabulary}); "
            "put any valid id (0, say) where a position does not count and mask its result"
        )


def cumulative_lengths(op: str, cu_seqlens: Tensor) -> None:
    """Offsets of packed sequences must be int32 (B + 1,). Their values are another matter."""
    if not isinstance(cu_seqlens, Tensor):
        raise ShapeError(
            f"{op}: cu_seqlens is a {type(cu_seqlens).__name__}, wanted a torch.Tensor of int32 (B + 1,); pass "
            "torch.tensor(cu_seqlens, dtype=torch.int32)"
        )
    dense(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ShapeError(
            f"{op}: cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}, wanted int32 (B + 1,), "
            "the cumulative lengths with a leading 0"
        )


def offsets_within(op: str, cu_seqlens: Tensor, tokens: int) -> None:
    """Offsets must begin with 0, never descend, and end at `tokens` or before. On the CPU only; elsewhere, and when
    compiled, the kernel looks."""
    if cu_seqlens.device.type != "cpu" or not has_memory(cu_seqlens):
        return
    offsets = cu_seqlens.numpy()
    if offsets[0] != 0:
        problem = f"begins with {offsets[0]}"
    elif not (offsets[1:] >= offsets[:-1]).all():
        descent = int((offsets[1:] < offsets[:-1]).argmax())
        problem = f"goes from {offsets[descent]} down to {offsets[descent + 1]}"
    elif offsets[-1] > tokens:
        problem = f"ends with {offsets[-1]}"
    else:
        return
    raise DataError(
        f"{op}: cu_seqlens {problem}, wanted offsets that begin with 0, never descend and end at {tokens} (N) or "
        "before; from lengths: torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()"
    )
