"""score_tokens and score_hidden."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import (
    INF,
    NAN,
    Backend,
    assert_close,
    assert_no_worse_than_reference,
    backends,
    strided,
    to_device,
)
from tlcr import ops
from tlcr.errors import ConfigError, DataError, ShapeError
from tlcr.ops import TokenScores, scoring

FIELDS = ("logprobs", "entropy", "ref_logprobs", "kl")
DIFFERENTIABLE = ("logprobs", "entropy", "kl")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def row_truth(logits: list[float], token: int, ref_logits: list[float], temperature: float) -> tuple[float, ...]:
    """One token on Python floats: logprob, entropy, reference logprob, KL."""

    def log_probabilities(row: list[float]) -> list[float]:
        scaled = [x / temperature for x in row]
        top = max(scaled)
        log_sum = top + math.log(math.fsum(math.exp(x - top) for x in scaled))
        return [x - log_sum for x in scaled]

    log_p, log_q = log_probabilities(logits), log_probabilities(ref_logits)
    present = [v for v in range(len(log_p)) if log_p[v] > -INF]
    entropy = -math.fsum(math.exp(log_p[v]) * log_p[v] for v in present)
    kl = math.fsum(math.exp(log_p[v]) * (log_p[v] - log_q[v]) for v in present)
    return log_p[token], entropy, log_q[token], kl


def truth(logits: Tensor, token_ids: Tensor, ref_logits: Tensor, temperature: float | Tensor = 1.0) -> TokenScores:
    rows = logits.detach().double().reshape(-1, logits.shape[-1]).tolist()
    ref_rows = ref_logits.double().reshape(-1, logits.shape[-1]).tolist()
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(token_ids.shape).reshape(-1).tolist()
    scores = [row_truth(*row) for row in zip(rows, token_ids.reshape(-1).tolist(), ref_rows, temperatures, strict=True)]
    columns = torch.tensor(scores, dtype=torch.float64).reshape(-1, 4).unbind(1)
    return TokenScores(*(column.reshape(token_ids.shape) for column in columns))


def plain(logits: Tensor, token_ids: Tensor, ref_logits: Tensor, temperature: float | Tensor = 1.0) -> TokenScores:
    """What one would write in torch, in the dtype of the logits and differentiable as it stands; finite logits only."""
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.dtype).unsqueeze(-1)
    log_p, log_q = (torch.log_softmax(x / temperature, dim=-1) for x in (logits, ref_logits))
    p, at = log_p.exp(), token_ids.unsqueeze(-1)
    return TokenScores(
        log_p.gather(-1, at).squeeze(-1),
        -(p * log_p).sum(-1),
        log_q.gather(-1, at).squeeze(-1),
        (p * (log_p - log_q)).sum(-1),
    )


def example(
    shape: tuple[int, ...] = (3, 5), vocabulary: int = 37, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    logits = 3 * torch.randn(*shape, vocabulary)
    return {
        "logits": logits.to(dtype),
        "token_ids": torch.randint(vocabulary, shape),
        "ref_logits": (logits + torch.randn_like(logits)).to(dtype),
    }


def weighted(scores: TokenScores, weights: dict[str, Tensor]) -> Tensor:
    """A scalar that sends the gradient weights[name] to the result called name."""
    total = torch.zeros((), dtype=torch.float64, device=scores.logprobs.device)
    for name, weight in weights.items():
        total = total + (getattr(scores, name).double() * weight.to(total)).sum()
    return total


def gradient(
    of: Callable[..., TokenScores], inputs: dict[str, Any], weights: dict[str, Tensor], **options: Any
) -> Tensor:
    logits = inputs["logits"].detach().clone().requires_grad_()
    return torch.autograd.grad(weighted(of(**inputs | {"logits": logits}, **options), weights), logits)[0]


def random_weights(shape: tuple[int, ...], names: tuple[str, ...] = DIFFERENTIABLE) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name in names}


@pytest.fixture(params=[None, 1, 100], ids=["one-chunk", "row-chunks", "odd-chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's chunk of logits: everything at once, one row at a time, or a size that divides nothing."""
    if request.param is not None:
        monkeypatch.setitem(scoring.CHUNK_LOGITS, "cpu", request.param)


@backends("score_tokens")
def test_hand_worked(backend: Backend) -> None:
    # p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): H = 3/2 log 2, KL = (1/2 - 1/4) log 2; chosen: tokens 0 and 2.
    logits = torch.tensor([[2.0, 1.0, 1.0], [2.0, 1.0, 1.0]], device=backend.device).log().requires_grad_()
    ref_logits = torch.tensor([[1.0, 1.0, 2.0], [1.0, 1.0, 2.0]], device=backend.device).log()
    token_ids = torch.tensor([0, 2], device=backend.device)
    scores = ops.score_tokens(logits, token_ids, ref_logits=ref_logits, impl=backend.impl)
    log2 = math.log(2)
    assert_close(scores.logprobs, [-log2, -2 * log2])
    assert_close(scores.entropy, [1.5 * log2] * 2)
    assert scores.ref_logprobs is not None and scores.kl is not None
    assert_close(scores.ref_logprobs, [-2 * log2, -log2])
    assert_close(scores.kl, [0.25 * log2] * 2)
    (got,) = torch.autograd.grad(scores.logprobs.sum(), logits)
    wanted = [[0.5, -0.25, -0.25], [-0.5, -0.25, 0.75]]
    assert_close(got, wanted)
    for broken in (got.roll(1, dims=0), got * (1 + 1e-4)):
        with pytest.raises(AssertionError):
            assert_close(broken, wanted)


@backends("score_tokens")
@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (4,), (3, 5), (2, 3, 2)])
@pytest.mark.parametrize("temperature", [1.0, 0.6, "per token"])
def test_against_sums_on_python_floats(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], temperature: float | str
) -> None:
    inputs = example(shape, dtype=dtype)
    warmth: Any = 0.5 + torch.rand(shape) if temperature == "per token" else temperature
    wanted = truth(**inputs, temperature=warmth)
    arguments = to_device(inputs | {"temperature": warmth}, backend.device)
    got = ops.score_tokens(**arguments, impl=backend.impl)
    spread = {k: strided(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    of_strided = ops.score_tokens(**spread, impl=backend.impl)
    for result, strided_result, true in zip(got, of_strided, wanted, strict=True):
        assert result is not None and strided_result is not None
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(result, true, magnitude=1.0)
        assert_close(strided_result, true, magnitude=1.0)
    without = ops.score_tokens(**arguments | {"ref_logits": None}, impl=backend.impl)
    assert without.ref_logprobs is None and without.kl is None
    assert_close(without.logprobs, wanted.logprobs)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("impl", [pytest.param("cpp", id="cpp")])
def test_digits_are_kept_as_the_temperature_falls(impl: Any, temperature: float) -> None:
    """Also by processors without fused multiply-add, where tests/ops/test_instruction_sets.py runs this."""
    if "cpp" not in next(status.usable for status in ops.available() if status.op == "score_tokens"):
        pytest.skip("the C++ kernels are not built here")
    logits, ref_logits = torch.randn(2, 12, 3001) * 4
    token_ids = torch.where(torch.arange(12) % 2 == 0, logits.argmax(-1), torch.randint(3001, (12,)))
    wanted = truth(logits, token_ids, ref_logits, temperature)
    got = ops.score_tokens(logits, token_ids, ref_logits=ref_logits, temperature=temperature, impl=impl)
    for name in FIELDS:
        error = (getattr(got, name).double() - getattr(wanted, name)).abs()
        assert (error <= 1e-6 * getattr(wanted, name).abs().clamp(min=1)).all(), (name, error.max())
    assert got.logprobs.max() <= 0


@backends("score_tokens")
@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("names", [("logprobs",), ("entropy",), ("kl",), ("logprobs", "entropy"), DIFFERENTIABLE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_against_float64_autograd(backend: Backend, names: tuple[str, ...], dtype: torch.dtype) -> None:
    inputs = example(dtype=dtype)
    weights = random_weights((3, 5), names)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    wanted = gradient(plain, wide, weights, temperature=0.8)
    got = gradient(ops.score_tokens, to_device(inputs, backend.device), weights, temperature=0.8, impl=backend.impl)
    assert got.dtype == dtype
    assert_close(got, wanted)


@backends("score_tokens")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("ref_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_one_result_whatever_the_two_dtypes(
    backend: Backend, dtype: torch.dtype, ref_dtype: torch.dtype, name: str
) -> None:
    """Of a reference in float64 the backward pass of the others reads float64 statistics, and not the reference."""
    inputs = example(dtype=dtype)
    inputs["ref_logits"] = inputs["ref_logits"].to(ref_dtype)
    weights = random_weights((3, 5), (name,))
    wanted = gradient(ops.score_tokens, inputs, weights, temperature=0.8, impl="reference")
    got = gradient(ops.score_tokens, to_device(inputs, backend.device), weights, temperature=0.8, impl=backend.impl)
    assert got.dtype == dtype
    assert_close(got, wanted.double())


@backends("score_tokens")
@pytest.mark.usefixtures("chunks")
def test_gradcheck(backend: Backend) -> None:
    inputs = to_device(example((2, 3), 5, torch.float64), backend.device)
    warmth = 0.5 + torch.rand(2, 3, dtype=torch.float64, device=backend.device)

    def function(logits: Tensor) -> tuple[Tensor | None, ...]:
        scores = ops.score_tokens(**inputs | {"logits": logits}, temperature=warmth, impl=backend.impl)
        return scores.logprobs, scores.entropy, scores.kl

    assert torch.autograd.gradcheck(function, (inputs["logits"].requires_grad_(),))


@backends("score_tokens")
@pytest.mark.parametrize("vocabulary", [1, 2, 251, 1003])
@pytest.mark.parametrize("kind", ["spread", "peaked", "equal", "offset", "huge"])
def test_as_accurate_as_plain_torch(backend: Backend, vocabulary: int, kind: str) -> None:
    inputs = example((4, 3), vocabulary)
    if kind == "peaked":
        inputs["logits"][..., 0] += 40
    if kind == "equal":
        inputs["logits"][:], inputs["ref_logits"][:] = 1.25, -2.5
    if kind == "offset":
        # Nearly equal distributions on a common offset: where sums over raw logits lose the KL.
        inputs["logits"] += 30
        inputs["ref_logits"] = inputs["logits"] + 0.01 * torch.randn_like(inputs["logits"])
    if kind == "huge":
        inputs["logits"] *= 1e4
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    weights = random_weights((4, 3))
    # In the float32 sums of `plain` any order is as good as another: hence more slack than one order's error.
    options = {"slack": 4.0}
    got = ops.score_tokens(**to_device(inputs, backend.device), impl=backend.impl)
    for result, reference, true in zip(got, plain(**inputs), truth(**inputs), strict=True):
        assert result is not None and reference is not None and true is not None
        assert_no_worse_than_reference(result, reference, true, **options)
    assert_no_worse_than_reference(
        gradient(ops.score_tokens, to_device(inputs, backend.device), weights, impl=backend.impl),
        gradient(plain, inputs, weights),
        gradient(plain, wide, weights),
        **options,
    )


@backends("score_tokens")
def test_masked_vocabulary(backend: Backend) -> None:
    """-inf logits on both sides give the result of a vocabulary without those entries."""
    inputs = example((3, 5), 11)
    inputs["token_ids"] %= 7
    kept = {k: v[..., :7] if v.is_floating_point() else v for k, v in inputs.items()}
    inputs["logits"][..., 7:] = -INF
    inputs["ref_logits"][..., 7:9] = -INF
    # Entries that only the reference has take part in q.
    inputs["ref_logits"][..., 9:] = torch.finfo(torch.float32).min
    weights = random_weights((3, 5))
    got = ops.score_tokens(**to_device(inputs, backend.device), impl=backend.impl)
    for result, true in zip(got, truth(**kept), strict=True):
        assert result is not None
        assert_close(result, true)
    got_grad = gradient(ops.score_tokens, to_device(inputs, backend.device), weights, impl=backend.impl)
    assert_close(
        got_grad[..., :7], gradient(plain, {k: v.double() if k != "token_ids" else v for k, v in kept.items()}, weights)
    )
    assert not got_grad[..., 7:].any()


@backends("score_tokens")
def test_masking_by_the_lowest_float_is_masking(backend: Backend) -> None:
    low = torch.finfo(torch.float32).min
    for in_policy, in_reference in ((low, low), (low, -INF), (-INF, low)):
        logits = torch.tensor([[0.0, 0.0, in_policy]], device=backend.device)
        ref_logits = torch.tensor([[0.0, 0.0, in_reference]], device=backend.device)
        ids = torch.zeros(1, dtype=torch.long, device=backend.device)
        scores = ops.score_tokens(logits, ids, ref_logits=ref_logits, temperature=0.5, impl=backend.impl)
        assert scores.kl is not None
        assert_close(scores.kl, [0.0])
        assert_close(scores.entropy, [math.log(2)])


@backends("score_tokens")
def test_infinite_kl(backend: Backend) -> None:
    """The reference rules out what the policy allows: KL is inf there, and only its own gradient is lost."""
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0]], device=backend.device).requires_grad_()
    ref_logits = torch.tensor([[0.0, -INF], [0.0, 0.0]], device=backend.device)
    ids = torch.tensor([0, 1], device=backend.device)
    scores = ops.score_tokens(logits, ids, ref_logits=ref_logits, impl=backend.impl)
    assert scores.kl is not None and scores.ref_logprobs is not None
    assert scores.kl[0] == INF and scores.kl[1].isfinite()
    assert_close(scores.ref_logprobs, [0.0, -math.log(2)])
    counts = torch.tensor([False, True], device=backend.device)
    (got,) = torch.autograd.grad(scores.logprobs.sum() + torch.where(counts, scores.kl, 0.0).sum(), logits)
    assert got.isfinite().all()


@backends("score_tokens")
def test_token_of_probability_zero(backend: Backend) -> None:
    logits = torch.tensor([[0.0, -INF]], device=backend.device)
    ids = torch.tensor([1], device=backend.device)
    assert_close(ops.score_tokens(logits, ids, impl=backend.impl).logprobs, [-INF])


@backends("score_tokens")
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_tokens_without_gradient_send_none(backend: Backend, poison: float) -> None:
    inputs = example((3, 4), 9)
    mask = torch.rand(3, 4) < 0.6
    weights = {name: weight * mask for name, weight in random_weights((3, 4)).items()}
    clean = gradient(ops.score_tokens, to_device(inputs, backend.device), weights, impl=backend.impl)
    dirty = inputs | {"logits": inputs["logits"].masked_fill(~mask.unsqueeze(-1), poison)}
    logits = dirty["logits"].to(backend.device).requires_grad_()
    scores = ops.score_tokens(**to_device(dirty, backend.device) | {"logits": logits}, impl=backend.impl)
    total = sum(
        (torch.where(mask.to(backend.device), getattr(scores, name), 0.0) * weight.to(backend.device)).sum()
        for name, weight in weights.items()
    )
    (got,) = torch.autograd.grad(total, logits)
    assert torch.equal(got.cpu()[mask], clean.cpu()[mask])
    assert not got.cpu()[~mask].any()


@backends("score_tokens")
def test_nothing_of_size_v_is_saved_beside_the_inputs(backend: Backend) -> None:
    inputs = to_device(example((8,), 1000), backend.device)
    inputs["logits"].requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        ops.score_tokens(**inputs, impl=backend.impl)
    own = {inputs["logits"].data_ptr(), inputs["ref_logits"].data_ptr()}
    assert sum(tensor.numel() for tensor in saved if tensor.data_ptr() not in own) < 100


@backends("score_tokens")
def test_a_slice_is_scored_without_a_copy(backend: Backend) -> None:
    """logits[:, :-1], as every trainer passes it, has rows that do not flatten."""
    wide = torch.randn(3, 6, 11, device=backend.device)
    ids = torch.randint(11, (3, 5), device=backend.device)
    logits = wide[:, :-1].requires_grad_()
    got = ops.score_tokens(logits, ids, impl=backend.impl)
    wanted = ops.score_tokens(wide[:, :-1].contiguous(), ids, impl=backend.impl)
    assert_close(got.logprobs, wanted.logprobs)
    assert all(
        block is not None and block.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()
        for _, blocks in scoring._row_blocks(4, wide[:, :-1])
        for block in blocks
    )


@backends("score_tokens")
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_nothing_to_score(backend: Backend, shape: tuple[int, ...]) -> None:
    inputs = to_device(example(shape, 7), backend.device)
    for result in ops.score_tokens(**inputs, impl=backend.impl):
        assert result is not None and result.shape == shape
    got = gradient(ops.score_tokens, inputs, random_weights(shape), impl=backend.impl)
    assert got.shape == (*shape, 7)


@backends("score_tokens")
def test_reference_is_a_constant(backend: Backend) -> None:
    inputs = to_device(example(), backend.device)
    ref_logits = inputs["ref_logits"].requires_grad_()
    scores = ops.score_tokens(**inputs | {"logits": inputs["logits"].requires_grad_()}, impl=backend.impl)
    assert scores.ref_logprobs is not None and scores.kl is not None
    assert not scores.ref_logprobs.requires_grad
    scores.kl.sum().backward()
    assert ref_logits.grad is None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"token_ids": torch.zeros(3, 4).long()}, ShapeError, r"token_ids has shape \(3, 4\), wanted \(3, 5\)"),
        ({"token_ids": torch.zeros(3, 5)}, ShapeError, r"token_ids has dtype torch.float32, wanted integers"),
        ({"token_ids": torch.full((3, 5), -100)}, DataError, r"token_ids holds -100, wanted ids in \[0, 37\); put any"),
        ({"token_ids": torch.full((3, 5), 37)}, DataError, r"token_ids holds 37"),
        (
            {"ref_logits": torch.zeros(3, 5, 36)},
            ShapeError,
            r"ref_logits has shape \(3, 5, 36\), wanted \(3, 5, 37\).*policy's vocabulary$",
        ),
        ({"logits": torch.zeros(3, 5, 0)}, ShapeError, r"logits has shape \(3, 5, 0\), wanted \(..., V\) with V >= 1"),
        ({"temperature": 0}, ConfigError, r"temperature is 0, wanted a number > 0"),
        (
            {"temperature": torch.ones(3)},
            ShapeError,
            r"temperature has shape \(3,\), wanted \(3, 5\).*one for each token$",
        ),
        ({"temperature": torch.ones(3, 5).requires_grad_()}, ConfigError, r"temperature requires a gradient"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="score_tokens: " + message):
        ops.score_tokens(**{**example(), **changes})


def hidden_example(
    shape: tuple[int, ...] = (3, 5), vocabulary: int = 23, dtype: torch.dtype = torch.float32, reference: bool = True
) -> dict[str, Tensor]:
    inputs = {
        "hidden": torch.randn(*shape, 6).to(dtype),
        "weight": torch.randn(vocabulary, 6).to(dtype),
        "token_ids": torch.randint(vocabulary, shape),
        "bias": torch.randn(vocabulary).to(dtype),
    }
    if reference:
        inputs["ref_hidden"] = torch.randn(*shape, 4).to(dtype)
        inputs["ref_weight"] = torch.randn(vocabulary, 4).to(dtype)
        inputs["ref_bias"] = torch.randn(vocabulary).to(dtype)
    return inputs


def plain_hidden(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor,
    temperature: float = 1.0,
) -> TokenScores:
    logits, ref_logits = hidden @ weight.t() + bias, ref_hidden @ ref_weight.t() + ref_bias
    return plain(logits, token_ids, ref_logits, temperature)


def hidden_gradients(
    of: Callable[..., TokenScores], inputs: dict[str, Any], weights: dict[str, Tensor], **options: Any
) -> tuple[Tensor, ...]:
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    return torch.autograd.grad(weighted(of(**inputs | leaves, **options), weights), tuple(leaves.values()))


def widened(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@backends("score_hidden")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 1000])
def test_hidden_against_float64(backend: Backend, dtype: torch.dtype, chunk_tokens: int | None) -> None:
    inputs = hidden_example(dtype=dtype)
    wide = widened(inputs)
    weights = random_weights((3, 5))
    options: dict[str, Any] = {"temperature": 0.7}
    # Sums over V and H of terms that are larger than their sum.
    slack = {"ulps": 256.0}
    on_device = to_device(inputs, backend.device)
    wanted = plain_hidden(**wide, **options)
    for arguments in (on_device, {k: strided(v) for k, v in on_device.items()}):
        got = ops.score_hidden(**arguments, **options, chunk_tokens=chunk_tokens, impl=backend.impl)
        for result, true in zip(got, wanted, strict=True):
            assert result is not None and true is not None
            assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_close(result, true, **slack)
    got_grads = hidden_gradients(
        ops.score_hidden, on_device, weights, **options, chunk_tokens=chunk_tokens, impl=backend.impl
    )
    for grad, true in zip(got_grads, hidden_gradients(plain_hidden, wide, weights, **options), strict=True):
        assert grad.dtype == dtype
        assert_close(grad, true, **slack)


@backends("score_hidden")
@pytest.mark.parametrize(
    ("hidden_dtype", "head_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_hidden_of_any_layout_keeps_its_digits(
    backend: Backend, hidden_dtype: torch.dtype, head_dtype: torch.dtype, layout: str
) -> None:
    """Half-precision products are taken from matrices as they lie; what is wider is not narrowed for them."""
    inputs = hidden_example(dtype=torch.float64)
    for name, value in inputs.items():
        if name != "token_ids":
            inputs[name] = value.to(hidden_dtype if "hidden" in name else head_dtype)
    wanted = plain_hidden(**widened(inputs))
    for name in ("hidden", "weight", "ref_hidden", "ref_weight"):
        matrix = inputs[name]
        inputs[name] = matrix.mT.contiguous().mT if layout == "transposed" else torch.cat([matrix, matrix], -1)
        inputs[name] = inputs[name][..., : matrix.shape[-1]]
    on_device, weights = to_device(inputs, backend.device), random_weights((3, 5))
    got = ops.score_hidden(**on_device, impl=backend.impl)
    for result, true in zip(got, wanted, strict=True):
        assert_close(result, true, ulps=256.0)
    got_grads = hidden_gradients(ops.score_hidden, on_device, weights, impl=backend.impl)
    for grad, true in zip(got_grads, hidden_gradients(plain_hidden, widened(inputs), weights), strict=True):
        assert_close(grad, true, ulps=256.0)


@backends("score_hidden")
@pytest.mark.parametrize("reference", [False, True])
def test_hidden_gradcheck(backend: Backend, reference: bool) -> None:
    inputs = to_device(hidden_example((2, 3), 5, torch.float64, reference), backend.device)
    leaves = tuple(inputs[name].requires_grad_() for name in ("hidden", "weight", "bias"))

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        scores = ops.score_hidden(
            **inputs | {"hidden": hidden, "weight": weight, "bias": bias},
            temperature=0.6,
            chunk_tokens=4,
            impl=backend.impl,
        )
        return [field for field in (scores.logprobs, scores.entropy, scores.kl) if field is not None]

    assert torch.autograd.gradcheck(function, leaves)


@backends("score_hidden")
def test_hidden_is_score_tokens_of_the_logits(backend: Backend) -> None:
    inputs = to_device(hidden_example(dtype=torch.float64), backend.device)
    logits = inputs["hidden"] @ inputs["weight"].t() + inputs["bias"]
    ref_logits = inputs["ref_hidden"] @ inputs["ref_weight"].t() + inputs["ref_bias"]
    wanted = ops.score_tokens(logits, inputs["token_ids"], ref_logits=ref_logits, impl="reference")
    for result, true in zip(ops.score_hidden(**inputs, impl=backend.impl), wanted, strict=True):
        assert result is not None and true is not None
        assert_close(result, true)
        with pytest.raises(AssertionError):
            assert_close(result.roll(1, dims=1), true)
        with pytest.raises(AssertionError):
            assert_close(result * (1 + 1e-8), true)


@backends("score_hidden")
def test_hidden_tokens_without_gradient_send_none(backend: Backend) -> None:
    inputs = to_device(hidden_example(), backend.device)
    mask = torch.rand(3, 5, device=backend.device) < 0.6
    weights = {name: weight.to(backend.device) * mask for name, weight in random_weights((3, 5)).items()}
    clean = hidden_gradients(ops.score_hidden, inputs, weights, chunk_tokens=4, impl=backend.impl)
    dirty = inputs | {"hidden": inputs["hidden"].masked_fill(~mask.unsqueeze(-1), NAN)}

    def masked(**arguments: Any) -> TokenScores:
        scores = ops.score_hidden(**arguments)
        return TokenScores(*(torch.where(mask, x, 0.0) for x in scores if x is not None))

    got = hidden_gradients(masked, dirty, weights, chunk_tokens=4, impl=backend.impl)
    for grad, wanted in zip(got, clean, strict=True):
        assert_close(grad, wanted)


@backends("score_hidden")
def test_hidden_ignores_autocast(backend: Backend) -> None:
    inputs = to_device(hidden_example(), backend.device)
    weights = random_weights((3, 5))
    wanted = hidden_gradients(ops.score_hidden, inputs, weights, impl=backend.impl)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        got = hidden_gradients(ops.score_hidden, inputs, weights, impl=backend.impl)
    for grad, true in zip(got, wanted, strict=True):
        assert torch.equal(grad, true)


@backends("score_hidden")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("ref_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_gradients_of_one_result_whatever_the_two_dtypes(
    backend: Backend, dtype: torch.dtype, ref_dtype: torch.dtype, name: str
) -> None:
    inputs = hidden_example(dtype=dtype)
    inputs |= {key: inputs[key].to(ref_dtype) for key in ("ref_hidden", "ref_weight", "ref_bias")}
    weights = random_weights((3, 5), (name,))
    wanted = hidden_gradients(ops.score_hidden, inputs, weights, impl="reference")
    got = hidden_gradients(ops.score_hidden, to_device(inputs, backend.device), weights, impl=backend.impl)
    for result, true in zip(got, wanted, strict=True):
        assert result.dtype == dtype
        assert_close(result, true.double())


@backends("score_hidden")
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_hidden_gradient_of_one_input_alone(backend: Backend, trained: str) -> None:
    inputs = to_device(hidden_example(), backend.device)
    inputs[trained].requires_grad_()
    ops.score_hidden(**inputs, impl=backend.impl).logprobs.sum().backward()
    wide = widened({k: v.detach().cpu() for k, v in inputs.items()})
    wide[trained].requires_grad_()
    plain_hidden(**wide).logprobs.sum().backward()
    assert inputs[trained].grad is not None and wide[trained].grad is not None
    assert_close(inputs[trained].grad, wide[trained].grad)


@backends("score_hidden")
def test_hidden_keeps_no_logits(backend: Backend) -> None:
    inputs = to_device(hidden_example((8,), 1000), backend.device)
    inputs["hidden"].requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        ops.score_hidden(**inputs, impl=backend.impl)
    own = {tensor.data_ptr() for tensor in inputs.values()}
    assert sum(tensor.numel() for tensor in saved if tensor.data_ptr() not in own) < 100


@backends("score_hidden")
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_hidden_nothing_to_score(backend: Backend, shape: tuple[int, ...]) -> None:
    inputs = to_device(hidden_example(shape), backend.device)
    for result in ops.score_hidden(**inputs, impl=backend.impl):
        assert result is not None and result.shape == shape
    grads = hidden_gradients(ops.score_hidden, inputs, random_weights(shape), impl=backend.impl)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.zeros(23, 5)}, ShapeError, r"weight has shape \(23, 5\), wanted \(V, H\)"),
        ({"bias": torch.zeros(22)}, ShapeError, r"bias has shape \(22,\), wanted \(23,\).*bias of that head$"),
        ({"ref_weight": None}, ConfigError, r"only some are given; pass the first two together"),
        ({"ref_hidden": None, "ref_weight": None}, ConfigError, r"only some are given"),
        ({"ref_weight": torch.zeros(22, 4)}, ShapeError, r"do not match hidden .*same tokens and vocabulary"),
        ({"ref_hidden": torch.zeros(3, 4, 4)}, ShapeError, r"do not match hidden"),
        ({"token_ids": torch.zeros(3).long()}, ShapeError, r"token_ids has shape \(3,\), wanted \(3, 5\)"),
        ({"token_ids": torch.full((3, 5), 99)}, DataError, r"token_ids holds 99"),
        (
            {"hidden": torch.zeros(3, 5, 0), "weight": torch.zeros(23, 0)},
            ShapeError,
            r"weight has shape \(23, 0\), wanted \(V, H\) with V >= 1 and H >= 1",
        ),
        ({"chunk_tokens": 0}, ConfigError, r"chunk_tokens is 0, wanted an int >= 1 or None"),
    ],
)
def test_hidden_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="score_hidden: .*" + message):
        ops.score_hidden(**{**hidden_example(), **changes})
