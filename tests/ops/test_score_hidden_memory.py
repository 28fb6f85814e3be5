"""What score_hidden takes beside its inputs and results: measured on the CPU, and by the same formula for a GPU."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.clocks import CPUClocks, calls
from benchmarks.score_hidden import TARGET
from tlcr.ops import _extension
from tlcr.ops.scoring import default_chunk
from tlcr.ops.scratch import Head, Scratch, scratch_of

on_cpp = pytest.mark.skipif(_extension.unavailable("cpu") is not None, reason="the compiled operator")
# More tokens than entries of the vocabulary and fewer; a chunk of a part of the tokens and of more than there are.
SHAPES = [(512, 32, 4096, 64), (300, 64, 2000, 1000), (2048, 64, 1000, 256)]
GIB = 2**30


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def scratch(
    shape: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    reference: tuple[torch.dtype, torch.dtype] | None,
    wants: tuple[bool, bool] | None,
    *,
    kl: bool = True,
) -> tuple[int, int]:
    """The most that was allocated at once, less the results, and what the formula says.

    The dtypes are those of hidden states and head; `wants` are the two gradients, None a forward pass; `kl` says
    whether that of a reference's KL comes in.
    """
    tokens, width, vocabulary, chunk = shape

    def model(dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[torch.Tensor, torch.Tensor, None]:
        return torch.randn(tokens, width).to(dtypes[0]), torch.randn(vocabulary, width).to(dtypes[1]), None

    hidden, weight, bias = model(dtypes)
    ids, direction = torch.randint(vocabulary, (tokens,)), torch.randn(tokens)
    of_reference = (None, None, None) if reference is None else model(reference)
    arguments = hidden, weight, ids, bias, *of_reference, 1.0, None, chunk
    name = "score_hidden"
    if wants is not None:
        _, entropy, _, of_kl, stats, ref_stats = torch.ops.tlcr.score_hidden(*arguments)
        gradients = direction, None, direction if reference is not None and kl else None
        arguments = *gradients, *arguments, entropy, of_kl, stats, ref_stats, *wants, False
        name = "score_hidden_backward"
    operator = getattr(torch.ops.tlcr, name)
    peak = CPUClocks().peak(calls(lambda: operator(*arguments)))
    results = sum(result.nbytes for result in operator(*arguments))
    return peak - results, scratch_of(f"tlcr::{name}", arguments, on_cpu=True)


@on_cpp
@pytest.mark.parametrize(
    ("dtypes", "reference"),
    [
        *(((hidden, weight), None) for hidden in (F32, BF16, F16) for weight in (F32, BF16, F16)),
        *((same, same) for same in ((F32, F32), (BF16, BF16))),
        ((F32, F32), (BF16, BF16)),
        ((BF16, BF16), (F16, F32)),
    ],
    ids=str,
)
@pytest.mark.parametrize("wants", [None, (True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_formula_is_what_the_allocator_gave(shape: Any, wants: Any, dtypes: Any, reference: Any) -> None:
    slack = 16 * shape[0] + 4096
    for kl in (True, False) if reference is not None and wants is not None else (True,):
        measured, formula = scratch(shape, dtypes, reference, wants, kl=kl)
        assert 0.97 * formula - slack <= measured <= formula + slack, (kl, measured, formula)


@on_cpp
def test_no_float32_sum_of_the_head_is_held() -> None:
    """In bfloat16, a head that is trained with its hidden states and one that is frozen take less than that sum."""
    shape = (256, 512, 8192, 32)
    float32_head = 4 * shape[1] * shape[2]
    assert scratch(shape, (BF16, BF16), None, (True, True))[0] < float32_head
    assert scratch(shape, (F32, F32), None, (True, False))[0] < float32_head


@pytest.mark.parametrize("reference", [False, True])
def test_less_than_a_gibibyte_where_the_project_wants_it(reference: bool) -> None:
    chunk = default_chunk(TARGET[2], torch.float32, torch.device("cuda"), with_reference=reference)
    half = Head(2, 2, 2)
    taken = Scratch(*TARGET, chunk, half, half if reference else None)
    assert taken.forward() <= GIB / 2
    for hidden, weight in ((True, False), (True, True), (False, True)):
        assert taken.backward(hidden=hidden, weight=weight, kl=reference) < GIB
    passes = [taken.forward()]
    for hidden, weight in ((True, False), (True, True), (False, True)):
        passes.append(taken.backward(hidden=hidden, weight=weight, kl=reference))
    listed = "policy and reference, with KL" if reference else "policy"
    row = " | ".join([f"| {listed}", *(f"{bytes_ / 2**20:.0f} MiB" for bytes_ in passes)])
    assert f"\n{row} |\n" in (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    # The float32 sum of the head alone is more.
    assert 4 * TARGET[1] * TARGET[2] > GIB
    larger = dataclasses.replace(taken, chunk_tokens=16 * chunk)
    assert larger.backward(hidden=True, weight=True, kl=reference) > GIB


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
