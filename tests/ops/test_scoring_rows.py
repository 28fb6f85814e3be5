"""score_tokens on long rows: lengths about the kernels' blocks, what may stand where, what a row does not depend on."""

import math

import psutil
import pytest
import torch
from torch import Tensor

from tests.ops.helpers import INF, NAN, Backend, assert_close, backends, interpreted, to_device
from tests.ops.test_score_tokens import DIFFERENTIABLE, FIELDS, example, gradient, plain, random_weights
from tlcr import ops

# About one register, one step of several registers, one tile, two tiles.
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 2047, 2048, 2049, 4095, 4096, 4097)
LONG = 5000
ENDS = (0, 2047, 2048, LONG - 1)


def wide(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def score(inputs: dict[str, Tensor], backend: Backend, temperature: float = 1.0) -> dict[str, Tensor]:
    scores = ops.score_tokens(**to_device(inputs, backend.device), temperature=temperature, impl=backend.impl)
    return {name: value.cpu() for name, value in scores._asdict().items() if value is not None}


def assert_right(inputs: dict[str, Tensor], backend: Backend, temperature: float = 1.0) -> None:
    """Results and gradient of finite logits."""
    got, true = score(inputs, backend, temperature), plain(**wide(inputs), temperature=temperature)
    for name in FIELDS:
        assert_close(got[name], getattr(true, name), magnitude=1.0)
    weights = random_weights(inputs["token_ids"].shape)
    of = gradient(
        ops.score_tokens, to_device(inputs, backend.device), weights, temperature=temperature, impl=backend.impl
    )
    assert_close(of, gradient(plain, wide(inputs), weights, temperature=temperature), magnitude=1.0)


@backends("score_tokens")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", LENGTHS)
def test_every_length(backend: Backend, vocabulary: int, dtype: torch.dtype) -> None:
    inputs = example((3,), vocabulary, dtype)
    inputs["token_ids"][0], inputs["token_ids"][1] = 0, vocabulary - 1
    assert_right(inputs, backend, temperature=0.7)


@backends("score_tokens")
@pytest.mark.parametrize("order", ["rising", "falling"])
def test_a_maximum_that_moves(backend: Backend, order: str) -> None:
    """Every tile has a larger maximum than the one before, of the policy or of the reference."""
    inputs = example((2,), LONG)
    for name, descending in (("logits", order == "falling"), ("ref_logits", order == "rising")):
        inputs[name] = inputs[name].sort(dim=-1, descending=descending).values
    assert_right(inputs, backend)


@backends("score_tokens")
@pytest.mark.parametrize("at", ENDS)
def test_one_hot(backend: Backend, at: int) -> None:
    """All probability on one token, by -inf elsewhere: certain, and so without a gradient."""
    inputs = example((1,), LONG)
    inputs["logits"][:] = -INF
    inputs["logits"][:, at], inputs["token_ids"][:] = 3.0, at
    got = score(inputs, backend)
    assert_close(got["logprobs"], [0.0])
    assert_close(got["entropy"], [0.0])
    assert_close(got["kl"], -torch.log_softmax(inputs["ref_logits"].double(), dim=-1)[:, at])
    of = gradient(ops.score_tokens, to_device(inputs, backend.device), random_weights((1,)), impl=backend.impl)
    assert_close(of, torch.zeros(1, LONG), magnitude=1.0)


@backends("score_tokens")
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("at", ENDS)
def test_a_row_without_a_distribution_is_nan(backend: Backend, at: int, poison: float) -> None:
    """As log_softmax has it, wherever in the row the NaN or inf stands, and in no other row."""
    inputs = example((3,), LONG)
    clean = score(inputs, backend)
    inputs["logits"][1, at] = poison
    got = score(inputs, backend)
    for name in FIELDS:
        kept = [0, 1, 2] if name == "ref_logprobs" else [0, 2]
        assert torch.equal(got[name][kept], clean[name][kept])
        assert name == "ref_logprobs" or got[name][1].isnan()
    of = gradient(ops.score_tokens, to_device(inputs, backend.device), random_weights((3,)), impl=backend.impl)
    assert of[1].isnan().all() and of[[0, 2]].isfinite().all()


@backends("score_tokens")
def test_a_row_of_nothing_is_nan(backend: Backend) -> None:
    inputs = example((2,), LONG)
    inputs["logits"][0] = -INF
    inputs["ref_logits"][1] = -INF
    got = score(inputs, backend)
    assert all(got[name][0].isnan() for name in ("logprobs", "entropy", "kl"))
    assert got["ref_logprobs"][1].isnan() and got["kl"][1].isnan()
    assert got["logprobs"][1].isfinite() and got["entropy"][1].isfinite() and got["ref_logprobs"][0].isfinite()


@backends("score_tokens")
@pytest.mark.parametrize("masked", [slice(0, 2048), slice(2048, 4096), slice(4096, LONG), slice(1, LONG)])
def test_masked_parts(backend: Backend, masked: slice) -> None:
    """Whole tiles of -inf, in the policy and the reference, are as if they were not there."""
    inputs = example((2,), LONG)
    kept = torch.ones(LONG, dtype=torch.bool)
    kept[masked] = False
    inputs["token_ids"][:] = kept.nonzero()[-1]
    for name in ("logits", "ref_logits"):
        inputs[name][..., masked] = -INF
    left = {name: x[..., kept].double() for name, x in inputs.items() if x.is_floating_point()}
    left["token_ids"] = torch.full((2,), int(kept.sum()) - 1)
    got, true = score(inputs, backend), plain(**left)
    for name in FIELDS:
        assert_close(got[name], getattr(true, name), magnitude=1.0)
    weights = random_weights((2,))
    of = gradient(ops.score_tokens, to_device(inputs, backend.device), weights, impl=backend.impl)
    assert_close(of[:, kept], gradient(plain, left, weights), magnitude=1.0)
    assert not of[:, masked].any()


@backends("score_tokens")
@pytest.mark.parametrize(("later", "infinite"), [(200.0, False), (50.0, True)])
def test_infinite_kl_is_judged_by_the_last_maximum(backend: Backend, later: float, infinite: bool) -> None:
    """The reference rules out a token at the row's begin, whose probability underflows, or not, by one at its end."""
    logits, ref_logits = torch.zeros(1, LONG), torch.zeros(1, LONG)
    logits[0, -1], ref_logits[0, 0] = later, -INF
    got = score({"logits": logits, "ref_logits": ref_logits, "token_ids": torch.tensor([LONG - 1])}, backend)
    assert_close(got["kl"], [INF if infinite else math.log(LONG - 1)])


@backends("score_tokens")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_alone_add_up_to_the_one_together(backend: Backend, dtype: torch.dtype) -> None:
    inputs, weights = to_device(example((3,), 100, dtype), backend.device), random_weights((3,))

    def of(*names: str) -> Tensor:
        return gradient(ops.score_tokens, inputs, {name: weights[name] for name in names}, impl=backend.impl).double()

    eps = torch.finfo(dtype).eps
    alone = sum(of(name) for name in DIFFERENTIABLE)
    assert float((of(*DIFFERENTIABLE) - alone).abs().max()) <= 8 * eps * max(
        float(of(n).abs().max()) for n in DIFFERENTIABLE
    )
    zero = {"entropy": torch.zeros(3), "kl": torch.zeros(3)}
    given = gradient(ops.score_tokens, inputs, zero | {"logprobs": weights["logprobs"]}, impl=backend.impl)
    assert torch.equal(given.double(), of("logprobs"))


@backends("score_tokens")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [37, LONG])
def test_the_same_bits_again_and_for_a_row_alone(backend: Backend, vocabulary: int, dtype: torch.dtype) -> None:
    inputs, weights = example((4,), vocabulary, dtype), random_weights((4,))

    def everything(rows: slice) -> list[Tensor]:
        part = {name: x[rows] for name, x in inputs.items()}
        of = {name: weight[rows] for name, weight in weights.items()}
        grad = gradient(ops.score_tokens, to_device(part, backend.device), of, temperature=0.9, impl=backend.impl)
        return [*score(part, backend, temperature=0.9).values(), grad.cpu()]

    whole = everything(slice(None))
    assert all(torch.equal(x, again) for x, again in zip(whole, everything(slice(None)), strict=True))
    if backend.impl == "reference":
        return  # torch sums a matrix of one row in another order
    for row in range(4):
        alone = everything(slice(row, row + 1))
        assert all(torch.equal(x[row], single[0]) for x, single in zip(whole, alone, strict=True))


@backends("score_tokens")
def test_a_row_read_from_any_address(backend: Backend) -> None:
    """The same bits for rows that begin 1, 2, 3 elements after an aligned address, as rows of an odd vocabulary do."""
    inputs = to_device(example((2,), 101), backend.device)
    weights = random_weights((2,))
    wanted = score(inputs, backend), gradient(ops.score_tokens, inputs, weights, impl=backend.impl)
    for offset in (1, 2, 3):
        moved = dict(inputs)
        for name in ("logits", "ref_logits"):
            room = torch.full((2, 128), NAN, device=backend.device)
            moved[name] = room[:, offset : offset + 101].copy_(inputs[name])
        for name, value in score(moved, backend).items():
            assert torch.equal(value, wanted[0][name])
        assert torch.equal(gradient(ops.score_tokens, moved, weights, impl=backend.impl), wanted[1])


@pytest.mark.slow
@backends("score_tokens")
def test_more_elements_than_32_bits_count(backend: Backend) -> None:
    rows, vocabulary = 2200, 1_000_000
    if backend.impl == "reference" or interpreted(backend):
        pytest.skip("takes minutes, and torch counts with 64 bits")
    needed = 2 * 2 * rows * vocabulary + (2 << 30)
    free = torch.cuda.mem_get_info()[0] if backend.device == "cuda" else psutil.virtual_memory().available
    if free < needed:
        pytest.skip(f"takes {needed / 2**30:.0f} GiB of memory, and {free / 2**30:.0f} GiB are free")
    assert rows * vocabulary > 2**31
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device=backend.device)
    logits[-1] = torch.randn(vocabulary).to(logits)
    logits.requires_grad_()
    ids = torch.full((rows,), vocabulary - 1, device=backend.device)
    scores = ops.score_tokens(logits, ids, impl=backend.impl)
    weights = torch.zeros(rows, device=backend.device)
    weights[0], weights[-1] = 1.0, 2.0
    (got,) = torch.autograd.grad([scores.logprobs, scores.entropy], logits, [weights, weights])
    log_p = torch.log_softmax(logits[-1].detach().double(), dim=-1)
    entropy = -(log_p.exp() * log_p).sum()
    assert_close(scores.logprobs[:-1], torch.full((rows - 1,), -math.log(vocabulary)))
    assert_close(scores.entropy[:-1], torch.full((rows - 1,), math.log(vocabulary)))
    assert_close(scores.logprobs[-1], log_p[-1])
    assert_close(scores.entropy[-1], entropy)
    wanted = -2 * log_p.exp() * (1 + log_p + entropy)
    wanted[-1] += 2
    assert_close(got[-1, :-1], wanted[:-1])
    assert_close(got[-1, -1], wanted[-1])
    assert_close(got[0, :-1], torch.full((vocabulary - 1,), -1 / vocabulary))
    assert not any(row.any() for row in got[1:-1])
