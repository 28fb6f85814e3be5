"""What the tests of the ops share. Tolerances live here and nowhere else."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tlcr import ops

NAN, INF = float("nan"), float("inf")
NO_ERROR = 1e-18


class Backend(NamedTuple):
    """A device and the implementation to run there."""

    device: str
    impl: Any


def backends(op: str) -> pytest.MarkDecorator:
    """Run a test once with every implementation of `op` that can run here, named as its argument `backend`."""
    params = [
        pytest.param(Backend(status.device, impl), id=f"{status.device}-{impl}")
        for status in ops.available()
        if status.op == op
        for impl in status.usable
    ]
    return pytest.mark.parametrize("backend", params)


def crossed(op: str, few: Callable[..., bool], **values: Sequence[Any]) -> pytest.MarkDecorator:
    """As `backends`, with every combination of some values; under the interpreter with those alone that `few` takes.

    Args:
        op: the op.
        few: of the places of the values, by their names.
        values: the test's other arguments.
    """
    params = []
    for given in backends(op).args[1]:
        for places in itertools.product(*(range(len(one)) for one in values.values())):
            named = dict(zip(values, places, strict=True))
            if not interpreted(given.values[0]) or few(**named):
                words = [f"{name}{place}" for name, place in named.items()]
                taken = [values[name][place] for name, place in named.items()]
                params.append(pytest.param(*given.values, *taken, id="-".join([*words, given.id])))
    return pytest.mark.parametrize(("backend", *values), params)


def interpreted(backend: Backend) -> bool:
    """Whether kernels run as Python, in milliseconds per row: some tests are then content with less."""
    return backend == Backend("cpu", "triton")


def row_lengths(backend: Backend) -> tuple[int, ...]:
    """Lengths of rows around the widths of vector registers and the sizes of tiles."""
    return (1, 9) if interpreted(backend) else (1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 63, 65)


def to_device(values: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}


def assert_close(actual: Tensor, truth: Any, *, ulps: float = 64, magnitude: float = 0.0) -> None:
    """`actual` equals `truth` to `ulps` rounding errors of its own dtype, relative to the largest finite true value.

    `magnitude` is the size of the terms that were summed, where the sum may be smaller. NaN matches nothing, infinities
    match themselves.
    """
    truth = torch.as_tensor(truth, dtype=torch.float64).cpu()
    got = actual.detach().double().cpu()
    assert got.shape == truth.shape, f"shape {tuple(got.shape)}, wanted {tuple(truth.shape)}"
    error, scale = _error(got, truth)
    bound = ulps * torch.finfo(actual.dtype).eps * max(scale, magnitude, torch.finfo(torch.float32).tiny)
    assert error <= bound, f"error {error:.3e} is above {bound:.3e}\ngot  {got}\nwant {truth}"


def assert_no_worse_than_reference(fast: Tensor, reference: Tensor, truth: Tensor, *, slack: float = 2.0) -> None:
    """`fast` is as near to the float64 truth as a plain computation in the same dtype, but for a factor of `slack`.

    A floor of one rounding error keeps a reference that happens to be exact from failing an honest result, and so does
    NO_ERROR where even the largest value is next to nothing beside the terms that it comes from, which are about 1.
    """
    assert fast.dtype == reference.dtype and truth.dtype == torch.float64
    truth = truth.detach().cpu()
    error, scale = _error(fast.detach().double().cpu(), truth)
    reference_error, _ = _error(reference.detach().double().cpu(), truth)
    bound = slack * reference_error + torch.finfo(fast.dtype).eps * scale + NO_ERROR
    assert error <= bound, f"error {error:.3e} is above {bound:.3e}, {slack:g} times the plain one's plus 1 ulp"


def _error(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """The largest error and the largest finite true value."""
    assert not truth.isnan().any(), "the truth itself is NaN"
    infinite = truth.isinf()
    assert torch.equal(got[infinite], truth[infinite]), f"infinities differ: got {got}, want {truth}"
    got, truth = got[~infinite], truth[~infinite]
    assert got.isfinite().all(), f"NaN or infinite where the truth is finite: {got}"
    if truth.numel() == 0:
        return 0.0, 0.0
    return float((got - truth).abs().max()), float(truth.abs().max())


def strided(tensor: Tensor) -> Tensor:
    """The same values, not contiguous: every axis has gaps, and the first two are swapped in memory."""
    if tensor.ndim == 0:
        return tensor
    wide = tensor.new_zeros([2 * n + 1 for n in tensor.shape])
    if tensor.ndim > 1:
        wide = wide.transpose(0, 1).contiguous().transpose(0, 1)
    view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    view.copy_(tensor)
    return view.requires_grad_(tensor.requires_grad) if tensor.requires_grad else view


def from_address(tensor: Tensor, offset: int) -> Tensor:
    """The same contiguous values, `offset` elements behind an address that is a multiple of 16 bytes."""
    memory = tensor.new_empty(tensor.numel() + 16)
    assert memory.data_ptr() % 16 == 0
    return memory[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)
