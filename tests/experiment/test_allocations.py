"""What is counted beside results, against what torch's CPU allocator gave."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.experiment.measured import measured
from tlcr import ops
from tlcr.experiment.allocations import Allocations
from tlcr.ops import _extension

N, H, V, CHUNK = 256, 64, 2000, 64
narrow, wide = torch.ones(N, V, dtype=torch.bfloat16), torch.ones(N, V)


def chunks(dtype: torch.dtype, trained: bool) -> Callable[[], object]:
    hidden = torch.randn(N, H, dtype=dtype, requires_grad=trained)
    weight, ids = torch.randn(V, H, dtype=dtype), torch.zeros(N, dtype=torch.long)

    def run() -> None:
        scores = ops.score_hidden(hidden, weight, ids, chunk_tokens=CHUNK)
        if trained:
            scores.logprobs.sum().backward()
            hidden.grad = None

    return run


def mixed(a: Tensor, b: Tensor) -> Callable[[], object]:
    return lambda: a + b


@pytest.mark.parametrize(
    ("work", "known"),
    [
        (mixed(wide, wide), (wide,)),
        (mixed(narrow, wide), (narrow, wide)),
        (mixed(narrow, narrow), (narrow,)),
        (lambda: torch.where(wide > 0, wide, wide), (wide,)),
    ],
)
def test_copies_to_a_common_dtype_count(work: Callable[[], object], known: tuple[Tensor, ...]) -> None:
    with Allocations(known, on_cpu=True) as counted:
        work()
    assert counted.peak == measured(work)


def test_a_gpu_converts_as_it_reads() -> None:
    with Allocations((narrow, wide), on_cpu=False) as counted:
        mixed(narrow, wide)()
    assert counted.peak == wide.nbytes


@pytest.mark.skipif(_extension.unavailable("cpu") is not None, reason="the compiled operator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_logits_of_a_chunk_count(dtype: torch.dtype, trained: bool) -> None:
    work = chunks(dtype, trained)
    work()
    with Allocations((), on_cpu=True) as counted:
        work()
    assert counted.peak == pytest.approx(measured(work), rel=0.05)
    assert counted.peak > CHUNK * V * 4
