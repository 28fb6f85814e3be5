"""What score_hidden takes beside its inputs and results: measured on the CPU, and by the same formula for a GPU."""

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.clocks import CPUClocks, calls
from benchmarks.score_hidden import TARGET
from tlcr.ops import _extension
from tlcr.ops.scoring import default_chunk
from tlcr.ops.scratch import Scratch

on_cpp = pytest.mark.skipif(_extension.unavailable("cpu") is not None, reason="the compiled operator")
# More tokens than entries of the vocabulary and fewer; a chunk of a part of the tokens and of more than there are.
SHAPES = [(512, 32, 4096, 64), (300, 64, 2000, 1000), (2048, 64, 1000, 256)]
GIB = 2**30


def scratch(
    shape: tuple[int, int, int, int], dtype: torch.dtype, reference: bool, wants: tuple[bool, bool] | None
) -> int:
    """The most that was allocated at once, less the results; `wants` are the two gradients, None a forward pass."""
    tokens, width, vocabulary, chunk = shape
    hidden, ref_hidden = torch.randn(2, tokens, width).to(dtype)
    weight, ref_weight = torch.randn(2, vocabulary, width).to(dtype)
    ids, direction = torch.randint(vocabulary, (tokens,)), torch.randn(tokens)
    of_reference = (ref_hidden, ref_weight, None) if reference else (None, None, None)
    arguments = hidden, weight, ids, None, *of_reference, 1.0, None, chunk
    found = torch.ops.tlcr.score_hidden(*arguments)
    if wants is None:
        peak = CPUClocks().peak(calls(lambda: torch.ops.tlcr.score_hidden(*arguments)))
        return peak - sum(result.nbytes for result in found)
    _, entropy, _, kl, stats, ref_stats = found
    gradients = direction, None, direction if reference else None
    kept = *arguments, entropy, kl, stats, ref_stats, *wants, False

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.ops.tlcr.score_hidden_backward(*gradients, *kept)  # type: ignore[no-any-return]

    results = sum(gradient.nbytes for gradient in backward())
    return CPUClocks().peak(calls(backward)) - results


@on_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("wants", [None, (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula_is_what_the_allocator_gave(
    shape: tuple[int, int, int, int], wants: tuple[bool, bool] | None, reference: bool, dtype: torch.dtype
) -> None:
    measured = scratch(shape, dtype, reference, wants)
    ways = []
    # Whether a CPU multiplies bfloat16 into float32 depends on its maker.
    for widens in (False, True) if dtype == torch.bfloat16 else (False,):
        by_shapes = Scratch(*shape, element=dtype.itemsize, with_reference=reference, widens=widens)
        ways.append(by_shapes.forward() if wants is None else by_shapes.backward(hidden=wants[0], weight=wants[1]))
    slack = 16 * shape[0] + 4096
    assert any(0.97 * way - slack <= measured <= way + slack for way in ways), (measured, ways)


@on_cpp
def test_no_float32_sum_of_the_head_is_held() -> None:
    """In bfloat16, a head that is trained with its hidden states and one that is frozen take less than that sum."""
    shape = (256, 512, 8192, 32)
    float32_head = 4 * shape[1] * shape[2]
    assert scratch(shape, torch.bfloat16, False, (True, True)) < float32_head
    assert scratch(shape, torch.float32, False, (True, False)) < float32_head


@pytest.mark.parametrize("reference", [False, True])
def test_less_than_a_gibibyte_where_the_project_wants_it(reference: bool) -> None:
    chunk = default_chunk(TARGET[2], torch.float32, torch.device("cuda"), with_reference=reference)
    taken = Scratch(*TARGET, chunk, with_reference=reference)
    assert taken.forward() <= GIB / 2
    for hidden, weight in ((True, False), (True, True), (False, True)):
        assert taken.backward(hidden=hidden, weight=weight) < GIB
    passes = [taken.forward()]
    passes += [taken.backward(hidden=hidden, weight=weight) for hidden, weight in ((True, False), (True, True))]
    passes.append(taken.backward(hidden=False, weight=True))
    listed = "policy and reference, with KL" if reference else "policy"
    row = " | ".join([f"| {listed}", *(f"{bytes_ / 2**20:.0f} MiB" for bytes_ in passes)])
    assert f"\n{row} |\n" in (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    # The float32 sum of the head alone is more.
    assert 4 * TARGET[1] * TARGET[2] > GIB
    assert dataclasses.replace(taken, chunk_tokens=16 * chunk).backward(hidden=True, weight=True) > GIB


@pytest.mark.parametrize("vocabulary", [1, 1000, 32_000, 50_257, 128_256, 256_000, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_chunk_follows_from_shapes(vocabulary: int, dtype: torch.dtype) -> None:
    """Whole tiles of a product, at least 256 tokens, and half a GiB where more than those fit."""
    for device, budget in (("cuda", 2**29), ("cpu", 2**22), ("mps", 2**29)):
        for heads in (1, 2):
            chunk = default_chunk(vocabulary, dtype, torch.device(device), with_reference=heads == 2)
            taken = chunk * vocabulary * dtype.itemsize * heads
            assert chunk % 128 == 0 and chunk >= 256
            assert chunk == 256 or budget - 128 * vocabulary * dtype.itemsize * heads < taken <= budget
