"""The ops and their rivals under pytest-benchmark, at a few small sizes; `benchmarks.ops` has all sizes and clocks.

    pytest benchmarks --benchmark-only --benchmark-group-by=group

runs on the GPU where torch sees one, else on the CPU; `OMP_NUM_THREADS=1` before it makes CPU figures comparable. What
is timed is the last pass of a case, "both" where the op has a gradient. Each implementation is first checked against
the reference in float64: tlcr fails on a wrong result, a rival is skipped. Not collected by a bare `pytest`.
"""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.ops.cases import (
    FORWARD,
    GAE_NAMES,
    LOSS_ONLY,
    WITH_REFERENCE,
    Case,
    Problem,
    tlcr_function,
    tlcr_implementations,
)
from benchmarks.ops.rivals import rivals
from benchmarks.ops.runs import one_line

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = DEVICE == "cuda"
B, T, N, H, V = (64, 1024, 4096, 2048, 128_256) if LARGE else (16, 256, 128, 256, 32_000)

CASES = (
    *(Case("fused_reward", name, (B, T), passes=FORWARD) for name in ("", "3 classes")),
    *(Case("fused_gae", name, (B, T), passes=FORWARD) for name in GAE_NAMES),
    *(Case("score_tokens", name, (N, V)) for name in ("", WITH_REFERENCE)),
    *(Case("score_hidden", name, (N, H, V)) for name in ("", WITH_REFERENCE, LOSS_ONLY)),
    Case("ppo_loss", "", (B, T)),
    *(Case(op, "", (N, H)) for op in ("rms_norm", "gated_silu")),
)

# Warnings from rivals are not errors of tlcr.
pytestmark = pytest.mark.filterwarnings("default")


def parameters() -> Iterator[Any]:
    for case in CASES:
        for impl, reason in tlcr_implementations(case.op, DEVICE):
            marks = [] if reason is None else [pytest.mark.skip(reason=reason)]
            yield pytest.param(case, f"tlcr {impl}", marks=marks, id=f"{case}-tlcr {impl}")
        for rival in rivals(case, DEVICE):
            yield pytest.param(case, rival.name, id=f"{case}-{rival.name}")


@functools.lru_cache(maxsize=1)
def problem(case: Case) -> Problem:
    return Problem(case, DEVICE)


@pytest.mark.parametrize(("case", "implementation"), list(parameters()))
def test_op(benchmark: Any, case: Case, implementation: str) -> None:
    which = case.passes[-1]
    if implementation.startswith("tlcr "):
        function = tlcr_function(case, implementation.removeprefix("tlcr "))
        problem(case).error(function)
    else:
        (rival,) = (rival for rival in rivals(case, DEVICE) if rival.name == implementation)
        which = which if which in rival.passes else rival.passes[-1]
        try:
            function = rival.make()
            problem(case).error(function, gradients=which != "forward")
        except Exception as failure:  # noqa: BLE001  (other people's code may raise anything)
            pytest.skip(one_line(failure))
    call = problem(case).work(function, which)(1)

    def step() -> None:
        call()
        if LARGE:
            torch.cuda.synchronize()

    benchmark.group = f"{case}, {which}, {DEVICE}"
    benchmark(step)
