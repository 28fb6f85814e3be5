"""csrc/kernels/cuda/hidden_reward.cu on the CPU, held to the float64 reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda.emulated import EmulatedKernels, HiddenRewardArguments, KernelFault, real
from tests.ops.helpers import INF, NAN, assert_close
from tlcr import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


def example(
    batch: int, length: int, width: int, dtype: torch.dtype, classes: int = 2
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    hidden = torch.randn(batch, length, width).to(dtype)
    weight = torch.randn(classes, width, dtype=real(dtype)) / max(1, width) ** 0.5
    mask = torch.rand(batch, length) < 0.7
    options = {
        "bias": torch.randn(classes, dtype=real(dtype)),
        "kl": torch.randn(batch, length, dtype=real(dtype)),
        "terminal": torch.randn(batch, dtype=real(dtype)),
    }
    return hidden, weight, mask, options


def truth(hidden: Tensor, weight: Tensor, mask: Tensor, **options: Any) -> Tensor:
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    return ops.reward_from_hidden(hidden.double(), weight.double(), mask, **wide, impl="reference")


# The odd ones are not read in packs.
@pytest.mark.parametrize("width", [0, 1, 2, 8, 31, 64, 250, 256, 257, 264, 520, 1000])
@pytest.mark.parametrize("classes", [2, 3])
def test_against_float64(kernels: EmulatedKernels, dtype: torch.dtype, width: int, classes: int) -> None:
    hidden, weight, mask, options = example(3, 7, width, dtype, classes)
    options |= {"kl_coef": 0.3, "temperature": 1.7, "scale": 2.0, "clip": 1.5}
    got = kernels.hidden_reward(hidden, weight, mask, **options)
    assert_close(got, truth(hidden, weight, mask, **options))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip": 0.25},
        {"temperature": 0.1, "scale": -3.0},
        {"kind": "discrete"},
        {"kind": "discrete", "band": 0.4, "scale": 2.0},
        {"kl_coef": -0.5},
    ],
)
@pytest.mark.parametrize("given", [(), ("bias",), ("kl",), ("terminal",), ("bias", "kl", "terminal")])
def test_options(kernels: EmulatedKernels, changes: dict[str, Any], given: tuple[str, ...]) -> None:
    hidden, weight, mask, tensors = example(4, 9, 40, torch.float32, 3)
    if "kl_coef" in changes and "kl" not in given:
        given = (*given, "kl")
    options = {name: tensors[name] for name in given} | changes
    assert_close(kernels.hidden_reward(hidden, weight, mask, **options), truth(hidden, weight, mask, **options))


def test_a_coefficient_of_zero_reads_no_kl(kernels: EmulatedKernels) -> None:
    hidden, weight, mask, _ = example(2, 5, 16, torch.float32)
    got = kernels.hidden_reward(hidden, weight, mask, kl=torch.full((2, 5), NAN), kl_coef=0.0)
    assert_close(got, truth(hidden, weight, mask))


@pytest.mark.parametrize("width", [24, 25])
def test_what_does_not_count_is_not_read(kernels: EmulatedKernels, dtype: torch.dtype, width: int) -> None:
    hidden, weight, mask, options = example(5, 6, width, dtype)
    mask[2] = False
    options["kl_coef"] = 0.5
    wanted = truth(hidden, weight, mask, **options)
    hidden[~mask], options["kl"][~mask], options["terminal"][2] = NAN, INF, NAN
    got = kernels.hidden_reward(hidden, weight, mask, **options)
    assert_close(got, wanted)
    assert not got[~mask].any()


def test_a_broken_token_stays_broken_and_alone(kernels: EmulatedKernels) -> None:
    hidden, weight, mask, _ = example(3, 5, 32, torch.float32)
    mask[:] = True
    hidden[1, 2, 7] = NAN
    for options in ({}, {"clip": 0.5}, {"kind": "discrete"}, {"kind": "discrete", "band": 0.4, "clip": 0.5}):
        got = kernels.hidden_reward(hidden, weight, mask, **options)
        assert got[1, 2].isnan() and int(got.isnan().sum()) == 1


@pytest.mark.parametrize("length", [1, 31, 300, 600])
def test_terminal_at_the_last_counted_token(kernels: EmulatedKernels, length: int) -> None:
    """Gaps before, inside and after; longer than one look at the mask, which is 256 positions."""
    hidden, weight, _, options = example(7, length, 8, torch.float32)
    mask = torch.zeros(7, length, dtype=torch.bool)
    mask[0] = True
    mask[1, 0] = True
    mask[2, -1] = True
    mask[3, length // 2] = True
    mask[4, ::3] = True
    mask[5, [0, -1]] = True
    # Row 6 counts nothing, and row 5 ends where it begins.
    got = kernels.hidden_reward(hidden, weight, mask, terminal=options["terminal"])
    assert_close(got, truth(hidden, weight, mask, terminal=options["terminal"]))
    added = got - kernels.hidden_reward(hidden, weight, mask)
    assert [int(row.count_nonzero()) for row in added] == [1, 1, 1, 1, 1, 1, 0]


# Each of what a pack must be aligned to is once the only one that it is not: start, batch, time, width; then none.
@pytest.mark.parametrize(
    ("width", "start", "strides"),
    [
        (48, 1, (8 * 64, 64)),
        (48, 0, (8 * 64 + 1, 64)),
        (48, 0, (8 * 49, 49)),
        (45, 0, (8 * 64, 64)),
        (48, 0, (8 * 64, 64)),
        (48, 16, (48, 4 * 48)),
    ],
)
def test_any_strides(
    kernels: EmulatedKernels, dtype: torch.dtype, width: int, start: int, strides: tuple[int, int]
) -> None:
    hidden, weight, mask, options = example(4, 6, width, dtype)
    placed = torch.full((start + 4 * 8 * 65,), NAN, dtype=dtype).as_strided(hidden.shape, (*strides, 1), start)
    placed.copy_(hidden)
    assert_close(kernels.hidden_reward(placed, weight, mask, **options), truth(hidden, weight, mask, **options))


@pytest.mark.parametrize("width", [1, 48, 265])
def test_no_bit_depends_on_where_a_row_begins(kernels: EmulatedKernels, dtype: torch.dtype, width: int) -> None:
    hidden, weight, mask, options = example(4, 6, width, dtype)
    wanted = kernels.hidden_reward(hidden, weight, mask, **options)
    phases = 16 // dtype.itemsize
    aligned = width + -width % phases
    for start in range(phases):
        for stride in (aligned, aligned + 1):
            room = torch.full((start + 24 * stride,), NAN, dtype=dtype)
            placed = room.as_strided(hidden.shape, (6 * stride, stride, 1), start).copy_(hidden)
            assert torch.equal(kernels.hidden_reward(placed, weight, mask, **options), wanted)


@pytest.mark.parametrize("width", [40, 41])
def test_no_bit_depends_on_the_order_of_threads_or_on_other_tokens(
    kernels: EmulatedKernels, dtype: torch.dtype, width: int
) -> None:
    hidden, weight, mask, options = example(5, 7, width, dtype, 3)
    wanted = kernels.hidden_reward(hidden, weight, mask, **options)
    for order in (1, 2, 3):
        kernels.set_order(order)
        assert torch.equal(kernels.hidden_reward(hidden, weight, mask, **options), wanted)
    for b in range(5):
        row = {name: value[b : b + 1] for name, value in options.items() if name != "bias"}
        alone = kernels.hidden_reward(hidden[b : b + 1], weight, mask[b : b + 1], bias=options["bias"], **row)
        assert torch.equal(alone, wanted[b : b + 1])
    fewer = mask.clone()
    fewer[:, ::2] = False
    without_terminal = {"bias": options["bias"]}
    all_of_them = kernels.hidden_reward(hidden, weight, mask, **without_terminal)
    some = kernels.hidden_reward(hidden, weight, fewer, **without_terminal)
    assert torch.equal(some[fewer], all_of_them[fewer])


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (3, 0), (0, 0)])
def test_no_tokens(kernels: EmulatedKernels, batch: int, length: int) -> None:
    hidden, weight, mask, options = example(batch, length, 16, torch.float32)
    assert kernels.hidden_reward(hidden, weight, mask, **options).shape == (batch, length)


@pytest.mark.parametrize("classes", [1, 4])
def test_classes_that_no_kernel_takes(kernels: EmulatedKernels, classes: int) -> None:
    with pytest.raises(KernelFault, match="hidden_reward returned 1:"):
        kernels._call("hidden_reward", HiddenRewardArguments(0, 1, 1, 16, classes))
