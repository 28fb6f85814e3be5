"""csrc/kernels/cuda/scoring.cu on the CPU, held to the float64 reference and to it in the same arithmetic."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.cuda.emulated import EmulatedKernels, KernelFault, ScoreArguments, Scores, real
from tests.ops.helpers import INF, NAN, assert_close, assert_no_worse_than_reference
from tlcr import ops
from tlcr.ops import TokenScores

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Around a warp, a pack, a tile of a warp and of a block, and where a block takes over from a warp; the last is cut into
# segments backward, whatever the type.
VOCABULARIES = (1, 2, 7, 31, 32, 33, 255, 256, 257, 1000, 2047, 2048, 2049, 4097, 8191, 8200, 70_001)
FIELDS = ("logprobs", "entropy", "ref_logprobs", "kl")
DIFFERENTIABLE = ("logprobs", "entropy", "kl")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


def surrounded(values: Tensor, *, gap: int, offset: int) -> Tensor:
    """The same values in rows that begin `offset` elements into their storage, with NaN between, before and after."""
    *lead, width = values.shape
    rows = values.reshape(-1, width).shape[0]
    storage = torch.full((offset + rows * (width + gap) + gap,), NAN, dtype=values.dtype)
    strides = torch.empty(*lead, width + gap).stride()[:-1]
    view = storage.as_strided(values.shape, (*strides, 1), offset)
    view.copy_(values)
    return view


def example(
    shape: tuple[int, ...], vocabulary: int, dtype: torch.dtype, *, spread: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    logits = (spread * torch.randn(*shape, vocabulary)).to(dtype)
    ref_logits = (logits.double() + torch.randn(*shape, vocabulary)).to(dtype)
    return logits, torch.randint(vocabulary, shape), ref_logits


def reference(
    logits: Tensor, token_ids: Tensor, ref_logits: Tensor | None = None, temperature: float | Tensor = 1.0
) -> TokenScores:
    if isinstance(temperature, Tensor):
        temperature = temperature.to(real(logits.dtype))
    return ops.score_tokens(logits, token_ids, ref_logits=ref_logits, temperature=temperature, impl="reference")


def gradient(
    logits: Tensor,
    token_ids: Tensor,
    ref_logits: Tensor,
    temperature: float | Tensor,
    weights: dict[str, Tensor],
) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    scores = reference(leaf, token_ids, ref_logits, temperature)._asdict()
    torch.stack([(scores[name] * weight).sum() for name, weight in weights.items()]).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def named(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"g_{name}": weight for name, weight in weights.items()}


def fields(scores: Scores | TokenScores) -> Iterator[tuple[str, Tensor]]:
    for name in FIELDS:
        value = getattr(scores, name)
        if value is not None:
            yield name, value


def assert_same_bits(one: Scores, other: Scores, *, at: slice | Tensor = slice(None)) -> None:
    for name, value in one._asdict().items():
        if value is not None:
            wanted = getattr(other, name)[at]
            assert torch.equal(value.view(torch.uint8), wanted.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("with_reference", [False, True])
def test_forward_and_backward(
    kernels: EmulatedKernels, dtype: torch.dtype, vocabulary: int, with_reference: bool
) -> None:
    logits, ids, ref_logits = example((3,), vocabulary, dtype)
    wide = reference(logits.double(), ids, ref_logits.double(), 0.7)
    given = ref_logits if with_reference else None
    scores = kernels.score(logits, ids, given, 0.7)
    assert (scores.kl is None) != with_reference
    for name, value in fields(scores):
        assert_close(value, getattr(wide, name), magnitude=3.0)
    weights = {name: torch.randn(3, dtype=real(dtype)) for name in DIFFERENTIABLE if with_reference or name != "kl"}
    got = kernels.score_backward(scores, logits, ids, given, 0.7, **named(weights))
    assert_close(got, gradient(logits.double(), ids, ref_logits.double(), 0.7, weights), magnitude=3.0)


@pytest.mark.parametrize("vocabulary", [13, 264, 2053])
@pytest.mark.parametrize(("offset", "ref_offset"), [(0, 0), (0, 1), (1, 0), (3, 3), (5, 2), (7, 15)])
def test_rows_that_begin_anywhere(
    kernels: EmulatedKernels, dtype: torch.dtype, vocabulary: int, offset: int, ref_offset: int
) -> None:
    """Two axes of rows, gaps between them, and no read or write beyond a row: NaN stands there and must stay there."""
    logits, ids, ref_logits = example((2, 2), vocabulary, dtype)
    weights = {name: torch.randn(2, 2, dtype=real(dtype)) for name in DIFFERENTIABLE}
    wide = reference(logits.double(), ids, ref_logits.double())
    wanted = gradient(logits.double(), ids, ref_logits.double(), 1.0, weights)

    placed, ref_placed = surrounded(logits, gap=3, offset=offset), surrounded(ref_logits, gap=6, offset=ref_offset)
    scores = kernels.score(placed, ids, ref_placed)
    for name, value in fields(scores):
        assert_close(value, getattr(wide, name), magnitude=3.0)
    for out_offset in (offset, offset + 1):
        out = surrounded(torch.full_like(logits, 2.0), gap=3, offset=out_offset)
        kernels.score_backward(scores, placed, ids, ref_placed, **named(weights), out=out)
        assert_close(out, wanted, magnitude=3.0)
        storage = torch.empty(0, dtype=dtype).set_(out.untyped_storage())
        assert int(storage.isnan().sum()) == storage.numel() - out.numel()


@pytest.mark.parametrize("vocabulary", [3, 37, 264, 2053, 16_391])
def test_no_bit_depends_on_where_a_row_begins(kernels: EmulatedKernels, dtype: torch.dtype, vocabulary: int) -> None:
    """Every address that a row may have modulo 16 bytes, which is what one access moves."""
    logits, ids, ref_logits = example((3,), vocabulary, dtype)
    weights = {name: torch.randn(3, dtype=real(dtype)) for name in DIFFERENTIABLE}
    phases = 16 // dtype.itemsize
    gap = -vocabulary % phases + phases  # rows of a batch then begin alike

    def of(offset: int, ref_offset: int) -> tuple[Scores, Scores, Tensor]:
        placed = surrounded(logits, gap=gap, offset=offset)
        ref_placed = surrounded(ref_logits, gap=gap, offset=ref_offset)
        scores = kernels.score(placed, ids, ref_placed)
        grads = kernels.score_backward(scores, placed, ids, ref_placed, **named(weights))
        return kernels.score(placed, ids), scores, grads

    alone, wanted, grads = of(0, 0)
    for offset in range(phases):
        moved_alone, moved, moved_grads = of(offset, (3 * offset + 1) % phases)
        assert_same_bits(moved_alone, alone)
        assert_same_bits(moved, wanted)
        assert torch.equal(moved_grads, grads)


@pytest.mark.parametrize("vocabulary", [300, 2100])
@pytest.mark.parametrize("columns", [1, 64, 77])
def test_backward_of_a_part_of_the_vocabulary(
    kernels: EmulatedKernels, dtype: torch.dtype, vocabulary: int, columns: int
) -> None:
    """From the logits of these columns alone, and the statistics of the whole rows."""
    logits, ids, ref_logits = example((5,), vocabulary, dtype)
    scores = kernels.score(logits, ids, ref_logits)
    weights = {name: torch.randn(5, dtype=real(dtype)) for name in DIFFERENTIABLE}
    wanted = kernels.score_backward(scores, logits, ids, ref_logits, **named(weights))
    for first in {0, int(ids[0]), vocabulary - columns} - set(range(vocabulary - columns + 1, vocabulary)):
        part, ref_part = (x[:, first : first + columns].contiguous() for x in (logits, ref_logits))
        got = kernels.score_backward(scores, part, ids, ref_part, **named(weights), first_entry=first)
        assert torch.equal(got, wanted[:, first : first + columns])


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [5, 264, 2053])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_a_gradient_in_half_precision_is_the_one_in_float_rounded(
    kernels: EmulatedKernels, narrow: torch.dtype, vocabulary: int, offset: int
) -> None:
    logits, ids, ref_logits = example((4,), vocabulary, torch.float32)
    scores = kernels.score(logits, ids, ref_logits)
    weights = {name: torch.randn(4) for name in DIFFERENTIABLE}
    for weight in weights.values():
        weight[1] = 0  # a row of zeros
    weights["kl"][2] = 0  # a row that reads no reference
    wide = kernels.score_backward(scores, logits, ids, ref_logits, **named(weights))
    out = surrounded(torch.full(logits.shape, 2.0, dtype=narrow), gap=3, offset=offset)
    got = kernels.score_backward(scores, logits, ids, ref_logits, **named(weights), out=out)
    assert torch.equal(got, wide.to(narrow))
    storage = torch.empty(0, dtype=narrow).set_(out.untyped_storage())
    assert int(storage.isnan().sum()) == storage.numel() - out.numel()


def test_a_slice_of_positions_is_read_in_place(kernels: EmulatedKernels, dtype: torch.dtype) -> None:
    logits, ids, ref_logits = example((3, 5), 65, dtype)
    scores = kernels.score(logits[:, :-1], ids[:, :-1].contiguous(), ref_logits[:, 1:])
    wide = reference(logits[:, :-1].double(), ids[:, :-1], ref_logits[:, 1:].double())
    for name, value in fields(scores):
        assert_close(value, getattr(wide, name), magnitude=3.0)


@pytest.mark.parametrize("vocabulary", [251, 3001])
@pytest.mark.parametrize("kind", ["spread", "peaked", "one-hot", "equal", "offset", "huge", "low", "rising", "falling"])
def test_as_accurate_as_the_plain_dtype(kernels: EmulatedKernels, vocabulary: int, kind: str) -> None:
    logits, ids, ref_logits = example((6,), vocabulary, torch.float32)
    if kind == "peaked":
        logits[:, 0] += 40
    if kind == "one-hot":
        logits[:, 1:] -= 1e30
        ids[:3] = 0
    if kind == "equal":
        logits[:], ref_logits[:] = 1.25, -2.5
    if kind == "offset":
        logits += 30
        ref_logits = logits + 0.01 * torch.randn_like(logits)
    if kind == "huge":
        logits *= 1e4
    if kind == "low":
        logits[:, ::2] = -1e30
        ref_logits[:, ::3] = -1e30
    if kind in ("rising", "falling"):
        # Every pack brings a new maximum, or none after the first does.
        ramp = torch.linspace(-200, 200, vocabulary)
        logits += ramp if kind == "rising" else -ramp
        ref_logits = logits + torch.randn_like(logits)
    wide = reference(logits.double(), ids, ref_logits.double())
    plain = reference(logits, ids, ref_logits)
    scores = kernels.score(logits, ids, ref_logits)
    for name, value in fields(scores):
        # In plain float32 any order of the sum is as good as another: hence more slack than one order's error.
        assert_no_worse_than_reference(value, getattr(plain, name), getattr(wide, name), slack=4.0)
    weights = {name: torch.randn(6) for name in DIFFERENTIABLE}
    assert_no_worse_than_reference(
        kernels.score_backward(scores, logits, ids, ref_logits, **named(weights)),
        gradient(logits, ids, ref_logits, 1.0, weights),
        gradient(logits.double(), ids, ref_logits.double(), 1.0, weights),
        slack=4.0,
    )


def special_rows(vocabulary: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows of policy and reference, and what stands in them."""
    low = torch.finfo(torch.float32).min
    policy, ref = torch.randn(vocabulary), torch.randn(vocabulary)
    first, last = torch.arange(vocabulary) < 9, torch.arange(vocabulary) >= vocabulary - 9
    one = torch.arange(vocabulary) == vocabulary // 2

    def put(row: Tensor, at: Tensor, value: float) -> Tensor:
        return torch.where(at, value, row)

    return {
        "masked in both": (put(policy, first, -INF), put(ref, first, -INF)),
        "masked in the policy": (put(policy, last, -INF), ref),
        "masked in the reference": (policy, put(ref, one, -INF)),
        "masked in the reference where the policy underflows": (put(policy, one, -300.0), put(ref, one, -INF)),
        "masked by the lowest number": (put(policy, first, low), put(ref, first, -INF)),
        "masked by the lowest number in the reference": (put(policy, first, -INF), put(ref, first, low)),
        "all but one masked": (put(policy, ~one, -INF), ref),
        "nothing left of the policy": (torch.full_like(policy, -INF), ref),
        "nothing left of the reference": (policy, torch.full_like(ref, -INF)),
        "NaN in the policy": (put(policy, one, NAN), ref),
        "NaN in the reference": (policy, put(ref, one, NAN)),
        "NaN among masked": (put(put(policy, ~one, -INF), one, NAN), ref),
        "infinite policy": (put(policy, one, INF), ref),
        "infinite reference": (policy, put(ref, one, INF)),
        # The first entries are masked in the reference alone, and what they were before the peak was seen counted.
        "a peak behind entries of the policy alone": (put(policy, last, 500.0), put(ref, first, -INF)),
        "a peak before entries of the policy alone": (put(policy, first, 500.0), put(ref, last, -INF)),
    }


@pytest.mark.parametrize("vocabulary", [40, 2100])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_special_values(kernels: EmulatedKernels, vocabulary: int, temperature: float) -> None:
    rows = special_rows(vocabulary)
    logits, ref_logits = (torch.stack(column) for column in zip(*rows.values(), strict=True))
    ids = torch.full((len(rows),), vocabulary // 2)
    scores = kernels.score(logits, ids, ref_logits, temperature)
    wanted = reference(logits, ids, ref_logits, temperature)
    for name, value in fields(scores):
        true = getattr(wanted, name)
        for index, row in enumerate(rows):
            assert value[index].isnan() == true[index].isnan(), f"{name} of {row}: {value[index]}, wanted {true[index]}"
        assert_close(value[~true.isnan()], true[~true.isnan()])
    # Every result's gradient is finite wherever the reference's is, and 0 where nothing flows.
    for names in (("logprobs",), ("entropy",), ("kl",), DIFFERENTIABLE):
        weights = {name: torch.ones(len(rows)) for name in names}
        got = kernels.score_backward(scores, logits, ids, ref_logits, temperature, **named(weights))
        true = gradient(logits, ids, ref_logits, temperature, weights)
        for index, row in enumerate(rows):
            assert torch.equal(got[index].isnan(), true[index].isnan()), f"gradient of {names}, {row}"
        assert_close(got[~true.isnan()], true[~true.isnan()])


def test_infinite_results_without_gradient_add_nothing(kernels: EmulatedKernels) -> None:
    logits, ids, ref_logits = example((4,), 50, torch.float32)
    ref_logits[:2, 3] = -INF
    scores = kernels.score(logits, ids, ref_logits)
    assert scores.kl is not None and scores.kl[:2].isinf().all() and scores.kl[2:].isfinite().all()
    weights = {"logprobs": torch.randn(4), "entropy": torch.randn(4), "kl": torch.tensor([0.0, 0.0, 1.0, -1.0])}
    got = kernels.score_backward(scores, logits, ids, ref_logits, **named(weights))
    ref_logits[:2, 3] = 0.0
    assert_close(got, gradient(logits.double(), ids, ref_logits.double(), 1.0, weights))


@pytest.mark.parametrize("names", [("logprobs",), ("entropy",), ("kl",), ("logprobs", "entropy"), ("entropy", "kl")])
@pytest.mark.parametrize("vocabulary", [37, 2060])
def test_each_gradient(kernels: EmulatedKernels, dtype: torch.dtype, names: tuple[str, ...], vocabulary: int) -> None:
    logits, ids, ref_logits = example((4,), vocabulary, dtype)
    scores = kernels.score(logits, ids, ref_logits)
    weights = {name: torch.randn(4, dtype=real(dtype)) for name in names}
    got = kernels.score_backward(scores, logits, ids, ref_logits, **named(weights))
    assert_close(got, gradient(logits.double(), ids, ref_logits.double(), 1.0, weights), magnitude=3.0)


@pytest.mark.parametrize("vocabulary", [45, 2061])
def test_rows_without_gradient_are_not_read(kernels: EmulatedKernels, dtype: torch.dtype, vocabulary: int) -> None:
    logits, ids, ref_logits = example((6,), vocabulary, dtype)
    scores = kernels.score(logits, ids, ref_logits)
    counts = torch.tensor([True, False, False, True, False, True])
    weights = {name: torch.randn(6, dtype=real(dtype)) * counts for name in DIFFERENTIABLE}
    wanted = kernels.score_backward(scores, logits, ids, ref_logits, **named(weights))
    logits[~counts], ref_logits[~counts] = NAN, NAN
    for value in scores:
        assert value is not None
        value[~counts] = NAN
    ids[~counts] = -1
    got = kernels.score_backward(scores, logits, ids, ref_logits, **named(weights))
    assert torch.equal(got, wanted) and not got[~counts].any()
    # Rows that take a gradient but none of the KL do not read the reference.
    ref_logits[counts], scores.kl[counts], weights["kl"] = NAN, NAN, torch.zeros(6, dtype=real(dtype))
    got = kernels.score_backward(scores, logits, ids, ref_logits, **named(weights))
    without = {name: weight for name, weight in weights.items() if name != "kl"}
    assert torch.equal(got, kernels.score_backward(scores, logits, ids, **named(without)))


@pytest.mark.parametrize("vocabulary", [45, 2061, 70_001])
def test_backward_in_place(kernels: EmulatedKernels, dtype: torch.dtype, vocabulary: int) -> None:
    logits, ids, ref_logits = example((3,), vocabulary, dtype)
    scores = kernels.score(logits, ids, ref_logits)
    weights = {name: torch.randn(3, dtype=real(dtype)) for name in DIFFERENTIABLE}
    weights["kl"][1] = 0
    for placed in (logits, surrounded(logits, gap=2, offset=1)):
        wanted = kernels.score_backward(scores, placed, ids, ref_logits, **named(weights), out=torch.zeros_like(placed))
        got = kernels.score_backward(scores, placed, ids, ref_logits, **named(weights), out=placed)
        assert torch.equal(got, wanted)


def test_temperature_per_row(kernels: EmulatedKernels, dtype: torch.dtype) -> None:
    logits, ids, ref_logits = example((5,), 300, dtype)
    temperature = (0.3 + torch.rand(5)).to(real(dtype))
    scores = kernels.score(logits, ids, ref_logits, temperature)
    wide = reference(logits.double(), ids, ref_logits.double(), temperature.double())
    for name, value in fields(scores):
        assert_close(value, getattr(wide, name), magnitude=3.0)
    one_by_one = [
        kernels.score(logits[i : i + 1], ids[i : i + 1], ref_logits[i : i + 1], float(temperature[i])) for i in range(5)
    ]
    for index, alone in enumerate(one_by_one):
        assert_close(alone.logprobs, wide.logprobs[index : index + 1], magnitude=3.0)
    weights = {name: torch.randn(5, dtype=real(dtype)) for name in DIFFERENTIABLE}
    got = kernels.score_backward(scores, logits, ids, ref_logits, temperature, **named(weights))
    true = gradient(logits.double(), ids, ref_logits.double(), temperature.double(), weights)
    assert_close(got, true, magnitude=3.0)


@pytest.mark.parametrize("vocabulary", [37, 40, 2500])
def test_no_bit_depends_on_the_order_of_threads_or_on_other_rows(
    kernels: EmulatedKernels, dtype: torch.dtype, vocabulary: int
) -> None:
    logits, ids, ref_logits = example((7,), vocabulary, dtype)
    weights = {name: torch.randn(7, dtype=real(dtype)) for name in DIFFERENTIABLE}
    scores = kernels.score(logits, ids, ref_logits)
    grads = kernels.score_backward(scores, logits, ids, ref_logits, **named(weights))
    for order in (0, 1, 2, 3):
        kernels.set_order(order)
        assert_same_bits(kernels.score(logits, ids, ref_logits), scores)
        assert torch.equal(kernels.score_backward(scores, logits, ids, ref_logits, **named(weights)), grads)
    for rows in (slice(2, 3), slice(4, 7)):
        alone = kernels.score(logits[rows], ids[rows], ref_logits[rows])
        assert_same_bits(alone, scores, at=rows)
        part = {name: weight[rows] for name, weight in named(weights).items()}
        assert torch.equal(
            kernels.score_backward(alone, logits[rows], ids[rows], ref_logits[rows], **part), grads[rows]
        )
    logits[3], ref_logits[3] = NAN, INF
    assert_same_bits(
        Scores(*(None if x is None else x[:3] for x in kernels.score(logits, ids, ref_logits))), scores, at=slice(3)
    )


def test_no_rows(kernels: EmulatedKernels, dtype: torch.dtype) -> None:
    logits, ids, ref_logits = example((0,), 40, dtype)
    scores = kernels.score(logits, ids, ref_logits)
    nothing = torch.zeros(0, dtype=real(dtype))
    grads = kernels.score_backward(scores, logits, ids, ref_logits, g_logprobs=nothing, g_entropy=nothing, g_kl=nothing)
    assert scores.logprobs.shape == (0,) and grads.shape == (0, 40)


@pytest.mark.parametrize("vocabulary", [40, 2100])
@pytest.mark.parametrize("token", ["-1", "vocabulary"])
def test_an_id_out_of_range_fails_an_assertion(kernels: EmulatedKernels, vocabulary: int, token: str) -> None:
    logits, ids, _ = example((6,), vocabulary, torch.float32)
    ids[4] = -1 if token == "-1" else vocabulary
    with pytest.raises(KernelFault, match="a device assertion failed"):
        kernels.score(logits, ids)


@pytest.mark.parametrize("vocabulary", [0, 1 << 31])
def test_a_vocabulary_that_no_kernel_takes(kernels: EmulatedKernels, vocabulary: int) -> None:
    with pytest.raises(KernelFault, match="score returned 1:"):
        kernels._call("score", ScoreArguments(0, 1, vocabulary))
