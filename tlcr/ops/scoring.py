"""`score_tokens` and `score_hidden`: scores of given tokens under a policy and, optionally, a reference.

Both are specified in plain torch, a chunk of tokens at a time. With x the logits over the temperature, p = softmax(x)
for the policy and q for the reference, the gradient that reaches x from the gradients g of the three differentiable
results is, for each token and each entry v of the vocabulary,

    g_logprob (1[v = token] - p_v) - g_entropy p_v (log p_v + H) + g_kl p_v (log p_v - log q_v - KL)

It is formed from the logits again in the backward pass, so that nothing of size V outlives a chunk. Every sum over the
vocabulary is taken over log-probabilities, never over raw logits: those share a large offset that would cost digits.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlcr.errors import ConfigError, ShapeError
from tlcr.ops import _checks
from tlcr.ops._arithmetic import arithmetic_dtype, no_autocast
from tlcr.ops._autograd import (
    differentiable_once,
    keep_for_backward,
    kept_tensors,
    refuse_batched,
    refuse_forward_mode,
    refuse_transforms,
)
from tlcr.ops._spec import Gradient, Impl, Op
from tlcr.ops.types import TokenScores

# Number of logits held at a time, by device type; a few temporaries of this size exist at once. On the CPU they fit in
# the last-level cache; on an accelerator they take longer than the launches of a dozen kernels.
CHUNK_LOGITS = {"cpu": 1 << 20}
CHUNK_LOGITS_ACCELERATOR = 1 << 26
# Bytes of the logits that `score_hidden` holds at a time where it is not told how many tokens: the last-level cache of
# a CPU, and on an accelerator so many that arithmetic limits the products, not the reading of the head for each chunk.
# An accelerator makes a product of tiles with 128 rows: of a chunk that is no multiple of them a part of the last tiles
# is wasted. 512 MiB of float32 are some 4000 tiles of 128 x 256, 31 for each of 132 processors: whatever is left over
# for the last round, at most a thirtieth of the device's time is lost to it.
CHUNK_BYTES = {"cpu": 1 << 22}
CHUNK_BYTES_ACCELERATOR = 1 << 29
CHUNK_TILE = 128
CHUNK_TOKENS_LEAST = 256


class ScoreTokensArguments(NamedTuple):
    logits: Tensor
    token_ids: Tensor
    ref_logits: Tensor | None
    temperature: float
    temperatures: Tensor | None


class ScoreTokensBackward(NamedTuple):
    g_logprobs: Tensor | None
    g_entropy: Tensor | None
    g_kl: Tensor | None
    inputs: ScoreTokensArguments
    entropy: Tensor
    kl: Tensor
    stats: Tensor
    ref_stats: Tensor


class ScoreHiddenArguments(NamedTuple):
    hidden: Tensor
    weight: Tensor
    token_ids: Tensor
    bias: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    temperature: float
    temperatures: Tensor | None
    chunk_tokens: int


class ScoreHiddenBackward(NamedTuple):
    g_logprobs: Tensor | None
    g_entropy: Tensor | None
    g_kl: Tensor | None
    inputs: ScoreHiddenArguments
    entropy: Tensor
    kl: Tensor
    stats: Tensor
    ref_stats: Tensor
    wants_hidden: bool
    wants_weight: bool
    wants_bias: bool


def score_tokens(
    logits: Tensor,
    token_ids: Tensor,
    *,
    ref_logits: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    impl: Impl = "auto",
) -> TokenScores:
    """Log-probability and entropy of given tokens, and the KL to a reference, from logits.

    With p = softmax(logits / temperature) and q = softmax(ref_logits / temperature):

        logprobs = log p[token]         entropy = -sum p log p
        ref_logprobs = log q[token]     kl = sum p (log p - log q)

    Equal to `log_softmax` and sums over V, but nothing of size V is kept for the backward pass beside the inputs.
    Gradients of logprobs, entropy and kl flow to `logits`; the reference and the temperature are constants. A token
    whose incoming gradient is 0 sends exactly 0 to its logits, even if they are NaN.

    Logits of -inf are legal: p log p is 0 at p = 0, and so is the KL's term, whatever q is. Where p > 0 and the
    reference's logit is -inf the KL is inf, and has no gradient that could be used. p = 0 means as computed: a logit so
    low that its exponential underflows counts as masked. A token of probability 0 has logprob -inf.

    Args:
        logits: (..., V).
        token_ids: (...) integers in [0, V), also where the result will be masked. Out-of-range ids raise `DataError`
            on the CPU and fail a device assertion elsewhere.
        ref_logits: (..., V) of the reference, already aligned with `logits`.
        temperature: a number > 0, or a (...) tensor of such, which is not checked; divides both logits.
        impl: which implementation runs.

    Returns:
        `TokenScores`, each field (...): float64 where logits or ref_logits are, else float32.

    Raises:
        ShapeError: a tensor has another shape, dtype, layout or device.
        DataError: an id lies outside [0, V), on the CPU.
        ConfigError: the temperature is not above 0, or requires a gradient.
        BackendUnavailable: `impl` names one that cannot run here.
    """
    number, tensor = (1.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)
    arguments = ScoreTokensArguments(logits, token_ids, ref_logits, number, tensor)
    device = _device_if_ready(arguments)
    if device is None:
        device, arguments = _checked(arguments)
    return SCORE_TOKENS(impl, device, arguments)


def _device_if_ready(a: ScoreTokensArguments) -> torch.device | None:
    """The device of the tensors if everything is as implementations take it. All that most calls pay for checks."""
    logits, token_ids, ref_logits, temperature, temperatures = a
    if not isinstance(logits, Tensor) or not isinstance(token_ids, Tensor) or type(temperature) is not float:
        return None
    shape, device = logits.shape, logits.device
    ready = (
        len(shape) > 0
        and shape[-1] > 0
        and shape == (*token_ids.shape, shape[-1])
        and logits.dtype in _checks.FLOATS
        and logits.layout is _checks.STRIDED
        and (ref_logits is None or _checks.alike(shape, device, ref_logits))
        and token_ids.dtype in _checks.INTEGERS
        and token_ids.device == device
        and token_ids.layout is _checks.STRIDED
        and 0.0 < temperature < math.inf
        and temperatures is None
    )
    return device if ready else None


def _checked(a: ScoreTokensArguments) -> tuple[torch.device, ScoreTokensArguments]:
    """Raises what is wrong, or brings the arguments into the form that implementations take."""
    op = "score_tokens"
    logits, token_ids, ref_logits, temperature, temperatures = a
    _checks.dense(op, "logits", logits)
    _checks.dense(op, "token_ids", token_ids)
    _checks.floating(op, logits=logits, ref_logits=ref_logits)
    _checks.integers(op, token_ids=token_ids)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ShapeError(f"{op}: logits has shape {tuple(logits.shape)}, wanted (..., V) with V >= 1")
    _checks.same_shape(op, logits.shape[:-1], "logits without V", token_ids=token_ids)
    if ref_logits is not None:
        of_same_tokens = ref_logits.shape[:-1] == logits.shape[:-1]
        remedy = "use a reference with the policy's vocabulary" if of_same_tokens else _checks.PER_TOKEN
        _checks.same_shape(op, logits.shape, "logits", remedy, ref_logits=ref_logits)
    number, tensor = _temperature(op, temperature if temperatures is None else temperatures, token_ids)
    device = _checks.same_device(op, logits=logits, token_ids=token_ids, ref_logits=ref_logits, temperature=tensor)
    return device, ScoreTokensArguments(logits, token_ids, ref_logits, number, tensor)


def _read_tokens(a: ScoreTokensArguments) -> None:
    _checks.whole_batch("score_tokens", a)
    _checks.vocabulary_ids("score_tokens", a.token_ids, a.logits.shape[-1])


def score_hidden(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    chunk_tokens: int | None = None,
    impl: Impl = "auto",
) -> TokenScores:
    """`score_tokens(hidden @ weight.T + bias, ...)` with logits present for `chunk_tokens` tokens at a time only.

    The logits are formed in float32 (float64) whatever the inputs are, and again in the backward pass. Gradients flow
    to `hidden`, `weight` and `bias`; the reference's tensors and the temperature are constants. What `score_tokens`
    says of -inf, of KL and of tokens whose incoming gradient is 0 holds here too.

    Args:
        hidden: (..., H), the policy's last hidden states.
        weight: (V, H), its `lm_head` weight.
        token_ids: (...) integers in [0, V).
        bias: (V,).
        ref_hidden: (..., H') of the reference; wants `ref_weight` beside it.
        ref_weight: (V, H'); pass `weight` again if the two share their head.
        ref_bias: (V,).
        temperature: a number > 0, or a (...) tensor of such, which is not checked; divides both logits.
        chunk_tokens: tokens whose logits exist at once, >= 1. The backward pass works in the memory that these logits
            take. None: 512 MiB of logits on an accelerator, 4 MiB on a CPU, and 256 tokens at least.
        impl: which implementation runs.

    Returns:
        `TokenScores`, each field (...): float64 where hidden states, a weight or a bias are, else float32.

    Raises:
        ShapeError: a tensor has another shape, dtype, layout or device.
        DataError: an id lies outside [0, V), on the CPU.
        ConfigError: a number is out of its range, or an argument that another needs is missing.
        BackendUnavailable: `impl` names one that cannot run here.
    """
    op = "score_hidden"
    for name, required in (("hidden", hidden), ("weight", weight), ("token_ids", token_ids)):
        _checks.dense(op, name, required)
    _checks.floating(
        op, hidden=hidden, weight=weight, bias=bias, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias
    )
    _checks.integers(op, token_ids=token_ids)
    if (ref_hidden is None) != (ref_weight is None) or (ref_bias is not None and ref_hidden is None):
        raise ConfigError(
            f"{op}: of ref_hidden, ref_weight and ref_bias only some are given; pass the first two together "
            "(ref_weight=weight for a shared head)"
        )
    for name, states, head in (("weight", hidden, weight), ("ref_weight", ref_hidden, ref_weight)):
        if states is None or head is None:
            continue
        if states.ndim == 0 or head.ndim != 2 or 0 in head.shape or head.shape[1] != states.shape[-1]:
            raise ShapeError(
                f"{op}: {name} has shape {tuple(head.shape)}, wanted (V, H) with V >= 1 and H >= 1 for hidden states "
                f"of shape {tuple(states.shape)}"
            )
        if head.shape[0] != weight.shape[0] or states.shape[:-1] != hidden.shape[:-1]:
            raise ShapeError(
                f"{op}: ref_hidden {tuple(states.shape)} and ref_weight {tuple(head.shape)} do not match hidden "
                f"{tuple(hidden.shape)} and weight {tuple(weight.shape)}; both need the same tokens and vocabulary"
            )
    _checks.same_shape(op, hidden.shape[:-1], "hidden without H", token_ids=token_ids)
    _checks.same_shape(
        op, weight.shape[:1], "weight's vocabulary", "pass the bias of that head", bias=bias, ref_bias=ref_bias
    )
    number, tensor = _temperature(op, temperature, token_ids)
    if chunk_tokens is not None and (not isinstance(chunk_tokens, int) or chunk_tokens < 1):
        raise ConfigError(f"{op}: chunk_tokens is {chunk_tokens!r}, wanted an int >= 1 or None")
    device = _checks.same_device(
        op,
        hidden=hidden,
        weight=weight,
        token_ids=token_ids,
        bias=bias,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        temperature=tensor,
    )
    if chunk_tokens is None:
        dtype = arithmetic_dtype(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        chunk_tokens = default_chunk(weight.shape[0], dtype, device, with_reference=ref_hidden is not None)
    heads = hidden, weight, token_ids, bias, ref_hidden, ref_weight, ref_bias
    return SCORE_HIDDEN(impl, device, ScoreHiddenArguments(*heads, number, tensor, chunk_tokens))


def _read_hidden(a: ScoreHiddenArguments) -> None:
    _checks.whole_batch("score_hidden", a)
    _checks.vocabulary_ids("score_hidden", a.token_ids, a.weight.shape[0])


def default_chunk(vocabulary: int, dtype: torch.dtype, device: torch.device, *, with_reference: bool) -> int:
    """How many tokens' logits exist at once in `score_hidden` where the caller does not say."""
    per_token = vocabulary * dtype.itemsize * (2 if with_reference else 1)
    tokens = CHUNK_BYTES.get(device.type, CHUNK_BYTES_ACCELERATOR) // per_token
    # Every chunk reads the whole head. Small chunks would do little else.
    return max(CHUNK_TOKENS_LEAST, tokens // CHUNK_TILE * CHUNK_TILE)


def _temperature(op: str, temperature: float | Tensor, token_ids: Tensor) -> tuple[float, Tensor | None]:
    """The temperature as operators take it: a number, or 1 and a tensor."""
    if not isinstance(temperature, Tensor):
        return _checks.number(op, "temperature", temperature, above=0), None
    _checks.floating(op, temperature=temperature)
    _checks.same_shape(
        op, token_ids.shape, "token_ids", "pass one number, or one for each token", temperature=temperature
    )
    if temperature.requires_grad:
        raise ConfigError(f"{op}: temperature requires a gradient, but is a constant here; pass temperature.detach()")
    return 1.0, temperature


def _reference_tokens(arguments: ScoreTokensArguments) -> TokenScores:
    logits, token_ids, ref_logits, temperature, temperatures = arguments
    _refuse_other_derivatives("score_tokens", logits)
    dtype = arithmetic_dtype(logits, ref_logits)
    ref_logits = None if ref_logits is None else ref_logits.detach()
    ids_N1, temperature_N1 = _per_token(token_ids, temperature, temperatures, dtype)
    scores: tuple[Tensor | None, ...] = _ScoreTokens.apply(logits, ids_N1, ref_logits, temperature_N1, dtype)
    return _token_scores(scores, token_ids.shape)


def _reference_hidden(a: ScoreHiddenArguments) -> TokenScores:
    _refuse_other_derivatives("score_hidden", a.hidden, a.weight, a.bias)
    dtype = _dtype_of(a)
    reference = tuple(None if x is None else x.detach() for x in (a.ref_hidden, a.ref_weight, a.ref_bias))
    ids_N1, temperature_N1 = _per_token(a.token_ids, a.temperature, a.temperatures, dtype)
    scores: tuple[Tensor | None, ...] = _ScoreHidden.apply(
        a.hidden, a.weight, a.bias, ids_N1, *reference, temperature_N1, a.chunk_tokens, dtype
    )
    return _token_scores(scores, a.token_ids.shape)


def _refuse_other_derivatives(op: str, *trained: Tensor | None) -> None:
    if not torch.compiler.is_compiling():
        refuse_forward_mode(op, False, trained)
        refuse_transforms(op, False)


def _dtype_of(a: ScoreHiddenArguments) -> torch.dtype:
    return arithmetic_dtype(a.hidden, a.weight, a.bias, a.ref_hidden, a.ref_weight, a.ref_bias)


class _ScoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids_N1: Tensor,
        ref_logits: Tensor | None,
        temperature_N1: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, ...]:
        scores = _empty_scores(ids_N1, dtype, with_reference=ref_logits is not None)
        for at, (logits_RV, ref_RV) in _row_blocks(_chunk_rows(logits.shape[-1], logits.device), logits, ref_logits):
            log_p_RV = _log_softmax(logits_RV, temperature_N1[at], dtype)
            log_q_RV = None if ref_RV is None else _log_softmax(ref_RV, temperature_N1[at], dtype)
            _fill_scores(scores, at, log_p_RV, log_q_RV, ids_N1[at])
        _finish(ctx, scores, logits, ids_N1, ref_logits, temperature_N1)
        return tuple(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_batched("score_tokens", grads)
        saved = kept_tensors(ctx)  # once: under torch's checkpointing this computes them again
        logits, ids_N1, ref_logits, temperature_N1, entropy_N, kl_N = saved
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        dtype = temperature_N1.dtype
        # The reference is used only if the KL has a gradient.
        ref_logits = ref_logits if grads[3] is not None else None
        blocks = _row_blocks(_chunk_rows(logits.shape[-1], logits.device), logits, ref_logits, grad_logits)
        for at, (logits_RV, ref_RV, grad_RV) in blocks:
            assert grad_RV is not None
            log_p_RV = _log_softmax(logits_RV, temperature_N1[at], dtype)
            log_q_RV = None if ref_RV is None else _log_softmax(ref_RV, temperature_N1[at], dtype)
            grad_x_RV = _grad_logits(log_p_RV, log_q_RV, ids_N1, entropy_N, kl_N, grads, at)
            grad_RV.copy_(grad_x_RV / temperature_N1[at])
        (found,) = differentiable_once("score_tokens", False, (grad_logits,), (*grads, *saved))
        return found, None, None, None, None


class _ScoreHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids_N1: Tensor,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        temperature_N1: Tensor,
        rows: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, ...]:
        scores = _empty_scores(ids_N1, dtype, with_reference=ref_hidden is not None)
        head, ref_head = _Head(weight, bias, dtype), _Head(ref_weight, ref_bias, dtype)
        with no_autocast(hidden.device):
            for at, (hidden_RH, ref_RH) in _row_blocks(rows, hidden, ref_hidden):
                log_p_RV = _log_softmax(head(hidden_RH), temperature_N1[at], dtype)
                log_q_RV = None if ref_RH is None else _log_softmax(ref_head(ref_RH), temperature_N1[at], dtype)
                _fill_scores(scores, at, log_p_RV, log_q_RV, ids_N1[at])
        inputs = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        _finish(ctx, scores, *inputs, ids_N1, temperature_N1)
        ctx.rows = rows
        return tuple(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_batched("score_hidden", grads)
        saved = kept_tensors(ctx)
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, ids_N1, temperature_N1, entropy_N, kl_N = saved
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dtype = temperature_N1.dtype
        ref_hidden = ref_hidden if grads[3] is not None else None
        ref_weight = ref_weight if ref_hidden is not None else None
        head, ref_head = _Head(weight, bias, dtype), _Head(ref_weight, ref_bias, dtype)
        counts_N1 = torch.zeros_like(ids_N1, dtype=torch.bool)
        for grad_N in grads:
            counts_N1 |= grad_N.unsqueeze(-1) != 0 if grad_N is not None else False

        grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if wants_hidden else None
        grad_weight_VH = torch.zeros_like(weight, dtype=dtype) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias, dtype=dtype) if wants_bias else None
        with no_autocast(hidden.device):
            for at, (hidden_RH, ref_RH, grad_RH) in _row_blocks(ctx.rows, hidden, ref_hidden, grad_hidden):
                assert hidden_RH is not None
                # A row that takes no gradient must not add to the weight's gradient either: 0 * NaN would be NaN.
                hidden_RH = torch.where(counts_N1[at], hidden_RH.to(dtype), 0.0)
                log_p_RV = _log_softmax(head(hidden_RH), temperature_N1[at], dtype)
                log_q_RV = None if ref_RH is None else _log_softmax(ref_head(ref_RH), temperature_N1[at], dtype)
                grad_RV = _grad_logits(log_p_RV, log_q_RV, ids_N1, entropy_N, kl_N, grads, at) / temperature_N1[at]
                if grad_RH is not None:
                    grad_RH.copy_(grad_RV @ head.weight_VH)
                if grad_weight_VH is not None:
                    grad_weight_VH.addmm_(grad_RV.t(), hidden_RH)
                if grad_bias_V is not None:
                    grad_bias_V += grad_RV.sum(dim=0)
        grad_weight = None if grad_weight_VH is None else grad_weight_VH.to(weight.dtype)
        grad_bias = None if grad_bias_V is None else grad_bias_V.to(bias.dtype)
        found = differentiable_once("score_hidden", False, (grad_hidden, grad_weight, grad_bias), (*grads, *saved))
        return *found, None, None, None, None, None, None, None


class _Head:
    """logits = hidden @ weight^T + bias in `dtype`; a half-precision weight is widened once per pass, not per chunk."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.bias = bias
        if weight is not None:
            self.weight_VH = weight.to(dtype)

    def __call__(self, hidden_RH: Tensor | None) -> Tensor:
        assert hidden_RH is not None
        logits_RV = hidden_RH.to(self.dtype) @ self.weight_VH.t()
        return logits_RV if self.bias is None else logits_RV + self.bias.to(self.dtype)


def _log_softmax(logits_RV: Tensor | None, temperature_R1: Tensor, dtype: torch.dtype) -> Tensor:
    assert logits_RV is not None
    return torch.log_softmax(logits_RV.to(dtype) / temperature_R1, dim=-1)


def _fill_scores(
    scores: Sequence[Tensor | None], at: slice, log_p_RV: Tensor, log_q_RV: Tensor | None, ids_R1: Tensor
) -> None:
    """Write logprobs, entropy, ref_logprobs and kl of the rows `at`."""
    logprobs_N, entropy_N, ref_logprobs_N, kl_N = scores
    assert logprobs_N is not None and entropy_N is not None
    p_RV = log_p_RV.exp()
    logprobs_N[at] = log_p_RV.gather(1, ids_R1).squeeze(1)
    # A NaN row is not p == 0 and stays NaN.
    entropy_N[at] = -torch.where(p_RV == 0, 0.0, p_RV * log_p_RV).sum(dim=-1)
    if log_q_RV is not None and ref_logprobs_N is not None and kl_N is not None:
        ref_logprobs_N[at] = log_q_RV.gather(1, ids_R1).squeeze(1)
        kl_N[at] = torch.where(p_RV == 0, 0.0, p_RV * (log_p_RV - log_q_RV)).sum(dim=-1)


def _grad_logits(
    log_p_RV: Tensor,
    log_q_RV: Tensor | None,
    ids_N1: Tensor,
    entropy_N: Tensor,
    kl_N: Tensor | None,
    grads: Sequence[Tensor | None],
    at: slice,
) -> Tensor:
    """The module docstring's gradient. A result whose own gradient is 0 adds exactly 0, whatever its row holds."""
    p_RV = log_p_RV.exp()
    g_logprob_R1, g_entropy_R1, _, g_kl_R1 = (None if g is None else g[at].unsqueeze(-1) for g in grads)
    grad_RV = torch.zeros_like(p_RV)
    if g_logprob_R1 is not None:
        grad_RV -= torch.where(g_logprob_R1 == 0, 0.0, g_logprob_R1 * p_RV)
        grad_RV.scatter_add_(1, ids_N1[at], g_logprob_R1)
    if g_entropy_R1 is not None:
        term_RV = g_entropy_R1 * p_RV * (log_p_RV + entropy_N[at].unsqueeze(-1))
        grad_RV -= torch.where((g_entropy_R1 == 0) | (p_RV == 0), 0.0, term_RV)
    if g_kl_R1 is not None and log_q_RV is not None and kl_N is not None:
        term_RV = g_kl_R1 * p_RV * (log_p_RV - log_q_RV - kl_N[at].unsqueeze(-1))
        grad_RV += torch.where((g_kl_R1 == 0) | (p_RV == 0), 0.0, term_RV)
    return grad_RV


def _finish(ctx: Any, scores: Sequence[Tensor | None], *inputs: Tensor | None) -> None:
    """Keep the inputs and two numbers per token for the backward pass."""
    _, entropy_N, ref_logprobs_N, kl_N = scores
    keep_for_backward(ctx, *inputs, entropy_N, kl_N)
    if ref_logprobs_N is not None:
        ctx.mark_non_differentiable(ref_logprobs_N)
    ctx.set_materialize_grads(False)


def _per_token(
    token_ids: Tensor, temperature: float, temperatures: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    ids_N1 = token_ids.reshape(-1, 1).long()
    if temperatures is not None:
        return ids_N1, temperatures.detach().to(dtype).reshape(-1, 1)
    return ids_N1, torch.full_like(ids_N1, temperature, dtype=dtype)


def _empty_scores(ids_N1: Tensor, dtype: torch.dtype, *, with_reference: bool) -> list[Tensor | None]:
    n_fields = 4 if with_reference else 2
    fields = [torch.empty(ids_N1.shape[0], dtype=dtype, device=ids_N1.device) for _ in range(n_fields)]
    return [*fields, *[None] * (4 - n_fields)]


def _token_scores(scores: Sequence[Tensor | None], shape: torch.Size) -> TokenScores:
    logprobs, entropy, ref_logprobs, kl = (None if x is None else x.view(shape) for x in scores)
    assert logprobs is not None and entropy is not None
    return TokenScores(logprobs, entropy, ref_logprobs, kl)


def _chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens per chunk."""
    return max(1, CHUNK_LOGITS.get(device.type, CHUNK_LOGITS_ACCELERATOR) // vocabulary)


def _row_blocks(rows: int, *tensors: Tensor | None) -> Iterator[tuple[slice, tuple[Tensor | None, ...]]]:
    """Cut tensors (..., K), with the same leading axes, into 2-D blocks of at most `rows` rows, in row-major order.

    Blocks are views: flattening a slice such as logits[:, :-1] as a whole would copy all of it.
    """
    start = 0
    for matrices in _matrices(tensors):
        height = next(matrix.shape[0] for matrix in matrices if matrix is not None)
        for begin in range(0, height, rows):
            end = min(begin + rows, height)
            yield (
                slice(start + begin, start + end),
                tuple(None if matrix is None else matrix[begin:end] for matrix in matrices),
            )
        start += height


def _matrices(tensors: Sequence[Tensor | None]) -> Iterator[tuple[Tensor | None, ...]]:
    given = [tensor for tensor in tensors if tensor is not None]
    if all(_flattens(tensor) for tensor in given):
        yield tuple(None if tensor is None else tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors)
        return
    for index in range(given[0].shape[0]):
        yield from _matrices([None if tensor is None else tensor[index] for tensor in tensors])


def _flattens(tensor: Tensor) -> bool:
    """Whether all axes but the last merge into one without a copy."""
    if tensor.ndim <= 2 or tensor.numel() == 0:
        return True
    leading = [(n, stride) for n, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if n != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in itertools.pairwise(leading))


def _fake_scores(token_ids: Tensor, dtype: torch.dtype, *, with_reference: bool) -> tuple[Tensor, ...]:
    shape = token_ids.shape
    ref_shape = shape if with_reference else (0,)
    shapes = (shape, shape, ref_shape, ref_shape, (*shape, 2), (*ref_shape, 2))
    return tuple(token_ids.new_empty(shape, dtype=dtype) for shape in shapes)


def _fake_tokens(a: ScoreTokensArguments) -> tuple[Tensor, ...]:
    dtype = arithmetic_dtype(a.logits, a.ref_logits)
    return _fake_scores(a.token_ids, dtype, with_reference=a.ref_logits is not None)


def _fake_hidden(a: ScoreHiddenArguments) -> tuple[Tensor, ...]:
    return _fake_scores(a.token_ids, _dtype_of(a), with_reference=a.ref_hidden is not None)


def _result(results: tuple[Tensor, ...], *, with_reference: bool) -> TokenScores:
    return TokenScores(*results[:4]) if with_reference else TokenScores(results[0], results[1])


_RESULTS = ("logprobs", "entropy", "ref_logprobs", "kl", "stats", "ref_stats")

SCORE_TOKENS = Op(
    door=score_tokens,
    arguments=ScoreTokensArguments,
    results=_RESULTS,
    reference=_reference_tokens,
    fake=_fake_tokens,
    read=_read_tokens,
    result=lambda arguments, results: _result(results, with_reference=arguments.ref_logits is not None),
    gradient=Gradient(of=("logits",), arguments=ScoreTokensBackward, only_with={"kl": "ref_logits"}, plain=False),
    cpp=True,
    cuda=True,
)

SCORE_HIDDEN = Op(
    door=score_hidden,
    arguments=ScoreHiddenArguments,
    results=_RESULTS,
    reference=_reference_hidden,
    fake=_fake_hidden,
    read=_read_hidden,
    result=lambda arguments, results: _result(results, with_reference=arguments.ref_hidden is not None),
    gradient=Gradient(
        of=("hidden", "weight", "bias"),
        arguments=ScoreHiddenBackward,
        absent="weight",
        only_with={"kl": "ref_hidden"},
        plain=False,
    ),
    cpp=True,
    cuda=True,
)
