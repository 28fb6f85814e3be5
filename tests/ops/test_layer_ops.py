"""rms_norm and gated_silu: values and gradients against float64, and against transformers' own rounding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from tests.ops.helpers import (
    Backend,
    assert_close,
    assert_no_worse_than_reference,
    backends,
    from_address,
    interpreted,
    strided,
)
from tlcr import ops
from tlcr.errors import ConfigError, ShapeError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EPS = 1e-5


def norm_inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype), (torch.rand(shape[-1]) + 0.5).to(dtype)


def gate_inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)


def norm_truth(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def gate_truth(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def skip_where_nothing_is_rounded(backend: Backend, dtype: torch.dtype) -> None:
    if interpreted(backend) and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts a bfloat16 off where compiled code rounds")


def with_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], direction: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    result = function(*leaves)
    assert result.dtype == leaves[0].dtype and result.shape == leaves[0].shape
    return [result.detach().cpu(), *(gradient.cpu() for gradient in torch.autograd.grad(result, leaves, direction))]


def norm_at(impl: Any, inputs: list[Tensor], offset: int) -> list[Tensor]:
    g_y, x, weight = (from_address(tensor, offset) for tensor in inputs)
    leaves = x.requires_grad_(), weight.requires_grad_()
    y = ops.rms_norm(*leaves, eps=EPS, impl=impl)
    return [y, *torch.autograd.grad(y, leaves, g_y)]


def gate_at(impl: Any, inputs: list[Tensor], offset: int) -> list[Tensor]:
    gate, up, _ = (from_address(tensor, offset) for tensor in inputs)
    leaves = gate.requires_grad_(), up.requires_grad_()
    y = ops.gated_silu(*leaves, impl=impl)
    return [y, *torch.autograd.grad(y, leaves, from_address(inputs[1], offset))]


def check(op: Any, true: Callable[..., Tensor], inputs: tuple[Tensor, ...], backend: Backend, **options: Any) -> None:
    """Values and gradients are as near to float64 as those of the reference, which is torch's operations in a row."""
    direction = torch.randn(inputs[0].shape).to(inputs[0].dtype)
    truths = with_gradients(true, tuple(tensor.double() for tensor in inputs), direction.double())
    plain = with_gradients(lambda *x: op(*x, impl="reference", **options), inputs, direction)
    moved = tuple(tensor.to(backend.device) for tensor in inputs)
    fast = with_gradients(lambda *x: op(*x, impl=backend.impl, **options), moved, direction.to(backend.device))
    for got, reference, wanted in zip(fast, plain, truths, strict=True):
        assert_no_worse_than_reference(got, reference, wanted)


@backends("rms_norm")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 16), (65, 33), (100, 48), (2, 5, 4, 12), (7,)])
def test_the_norm(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Among the shapes more rows than one part of the weight's gradient sums, and norms of heads."""
    if interpreted(backend) and shape == (100, 48):
        shape = (36, 48)  # two parts all the same
    check(ops.rms_norm, norm_truth, norm_inputs(*shape, dtype=dtype), backend, eps=EPS)


@backends("gated_silu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 16), (65, 33), (300, 200)])
def test_the_gate(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(ops.gated_silu, gate_truth, gate_inputs(*shape, dtype=dtype), backend)


@backends("rms_norm")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_rounds_where_transformers_does(backend: Backend, dtype: torch.dtype) -> None:
    """Before the weight, and after it. Another order of summation may move the last bit of a sum and of few results."""
    skip_where_nothing_is_rounded(backend, dtype)
    x, weight = (tensor.to(backend.device) for tensor in norm_inputs(500, 48, dtype=dtype))
    normed = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)).to(dtype)
    different = ops.rms_norm(x, weight, eps=EPS, impl=backend.impl) != weight * normed
    assert different.float().mean() < 0.01
    once = (norm_truth(x.float(), weight.float())).to(dtype)  # what this test tells apart
    assert (once != weight * normed).float().mean() > 0.1


@backends("gated_silu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gate_rounds_where_transformers_does(backend: Backend, dtype: torch.dtype) -> None:
    skip_where_nothing_is_rounded(backend, dtype)
    gate, up = (tensor.to(backend.device) for tensor in gate_inputs(500, 48, dtype=dtype))
    different = ops.gated_silu(gate, up, impl=backend.impl) != silu(gate) * up
    assert different.float().mean() < 0.01
    once = gate_truth(gate.float(), up.float()).to(dtype)
    assert (once != silu(gate) * up).float().mean() > 0.1


@backends("gated_silu")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_wide_open_and_shut(backend: Backend, dtype: torch.dtype) -> None:
    """silu(z) goes to z and to 0, its slope to 1 and to 0, without an overflow on the way."""
    gate = torch.tensor([-6e4, -1e3, -100.0, 0.0, 100.0, 1e3, 6e4], device=backend.device).to(dtype)
    up = torch.ones_like(gate)
    got, g_gate, g_up = with_gradients(lambda *x: ops.gated_silu(*x, impl=backend.impl), (gate, up), up)
    for result, wanted in (
        (got, gate.clamp(min=0)),
        (g_up, gate.clamp(min=0)),
        (g_gate, torch.tensor([0, 0, 0, 0.5, 1, 1, 1], device=backend.device).to(dtype)),
    ):
        # What is below the least normal number may be 0.
        torch.testing.assert_close(result, wanted, rtol=0, atol=torch.finfo(torch.float32).tiny)


@backends("rms_norm")
@pytest.mark.parametrize("width", [33, 2100])
def test_rows_know_nothing_of_each_other(backend: Backend, width: int) -> None:
    x, weight = (tensor.to(backend.device) for tensor in norm_inputs(70, width))
    alone = torch.cat([ops.rms_norm(row[None], weight, eps=EPS, impl=backend.impl) for row in x])
    assert torch.equal(ops.rms_norm(x, weight, eps=EPS, impl=backend.impl), alone)


@backends("rms_norm")
@pytest.mark.parametrize("op", [norm_at, gate_at])
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_tensors_at_any_address(backend: Backend, op: Callable[..., Any], offset: int) -> None:
    """The same bits, though only aligned ones are read by 16 bytes."""
    inputs = [torch.randn(shape, device=backend.device) for shape in ((3, 5, 48), (3, 5, 48), (48,))]
    for got, wanted in zip(op(backend.impl, inputs, offset), op(backend.impl, inputs, 0), strict=True):
        assert torch.equal(got, wanted)


@backends("rms_norm")
def test_gaps_in_memory_and_nothing_at_all(backend: Backend) -> None:
    x, weight = norm_inputs(5, 3, 6)
    wanted = with_gradients(lambda *i: ops.rms_norm(*i, eps=EPS, impl=backend.impl), (x, weight), torch.ones_like(x))
    views = tuple(strided(tensor).to(backend.device) for tensor in (x, weight))
    expanded = torch.ones((), device=backend.device).expand(x.shape)  # what a sum's backward pass hands down
    leaves = [view.requires_grad_() for view in views]
    result = ops.rms_norm(*leaves, eps=EPS, impl=backend.impl)
    for got, want in zip([result, *torch.autograd.grad(result, leaves, expanded)], wanted, strict=True):
        assert_close(got, want)
    empty = torch.zeros(0, 6, device=backend.device)
    assert ops.rms_norm(empty, views[1], eps=EPS, impl=backend.impl).shape == (0, 6)
    assert ops.gated_silu(empty, empty, impl=backend.impl).shape == (0, 6)


@backends("rms_norm")
def test_gradients_by_finite_differences(backend: Backend) -> None:
    norm = tuple(t.to(backend.device).requires_grad_() for t in norm_inputs(4, 5, dtype=torch.float64))
    gate = tuple(t.to(backend.device).requires_grad_() for t in gate_inputs(4, 5, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, eps=EPS, impl=backend.impl), norm)
    assert torch.autograd.gradcheck(lambda g, u: ops.gated_silu(g, u, impl=backend.impl), gate)


def test_a_norm_by_hand() -> None:
    """mean(x^2) of 3 and 4 is 12.5."""
    y = ops.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), eps=0.0)
    torch.testing.assert_close(y, torch.tensor([[3 / 12.5**0.5, 8 / 12.5**0.5]]))


def test_what_is_refused() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(ShapeError, match=r"rms_norm: weight has shape \(2,\) and x \(2, 3\), wanted \(H,\)"):
        ops.rms_norm(x, torch.ones(2), eps=EPS)
    with pytest.raises(ShapeError, match=r"rms_norm: weight has dtype torch.float64, wanted torch.float32"):
        ops.rms_norm(x, torch.ones(3).double(), eps=EPS)
    with pytest.raises(ConfigError, match="rms_norm: eps is -1, wanted a number >= 0"):
        ops.rms_norm(x, torch.ones(3), eps=-1.0)
    with pytest.raises(ShapeError, match=r"gated_silu: up has shape \(3,\), wanted \(2, 3\) to match gate"):
        ops.gated_silu(x, x[0])
    with pytest.raises(ShapeError, match=r"gated_silu: gate has dtype torch\.int64, wanted a float dtype"):
        ops.gated_silu(x.long(), x)
