"""`ppo_loss` and its backward pass.

Forward, two launches: every tile of a row leaves its sums, then one program adds them up in a fixed order. Backward,
one launch: elementwise, with the weight of a row's tokens in the mean from the forward pass.

Bytes moved per counted token, with `real` the type of every input: forward 3 sizeof(real) + 1 for the mask, 3 more with
a clipped value loss, 1 more each with entropy and kl; backward the same without entropy and kl, and one written for
every gradient. In float32 with everything: 33 and 41. Masked tokens cost 1 byte forward, and their zeros backward.
"""

import triton
import triton.language as tl
from torch import Tensor

from tlcr.kernels.launch import contiguous, device_of, jit, launch_options
from tlcr.ops._arithmetic import arithmetic_dtype
from tlcr.ops._spec import takes
from tlcr.ops.ppo import LOG_RATIO_MAX, PPOArguments, PPOBackward, PPOInputs
from tlcr.ops.types import PPOLoss

# Tokens per program, 8 to each thread: up to 8 inputs are loaded for each, which is plenty in flight.
TILE = 1024
OPTIONS = launch_options(warps=4)
# Rows that the one finishing program adds at once, all their sums side by side.
FINISH_ROWS = 512
FINISH_OPTIONS = launch_options(warps=8)

# The index of each sum and each result: the order of PPOLoss, but the sums hold the count in place of the loss.
_COUNT = _LOSS = tl.constexpr(PPOLoss._fields.index("loss"))
_POLICY = tl.constexpr(PPOLoss._fields.index("policy"))
_VALUE = tl.constexpr(PPOLoss._fields.index("value"))
_ENTROPY = tl.constexpr(PPOLoss._fields.index("entropy"))
_KL = tl.constexpr(PPOLoss._fields.index("kl"))
_CLIP_FRACTION = tl.constexpr(PPOLoss._fields.index("clip_fraction"))
_VALUE_CLIP_FRACTION = tl.constexpr(PPOLoss._fields.index("value_clip_fraction"))
_APPROX_KL = tl.constexpr(PPOLoss._fields.index("approx_kl"))
# The last one, and the only one that is not a sum.
_RATIO_MAX = tl.constexpr(PPOLoss._fields.index("ratio_max"))

_LOG_RATIO_MAX = tl.constexpr(LOG_RATIO_MAX)


@triton.jit
def _policy_terms(logprobs, old_logprobs, advantages, low, high, dual_clip):  # type: ignore[no-untyped-def]
    """log r, r, the policy's loss, whether its clipped side was taken, and its derivative by the log-probability."""
    difference = logprobs - old_logprobs
    log_ratio = tl.where(difference > _LOG_RATIO_MAX, _LOG_RATIO_MAX, difference)
    ratio = tl.exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    # A tie takes the unclipped side. Where the clipped one is larger, the ratio is out of bounds and has no gradient.
    is_clipped = clipped > unclipped
    loss = tl.where(is_clipped, clipped, unclipped)
    bound = -dual_clip * advantages
    is_bounded = (advantages < 0) & (loss > bound)
    loss = tl.where(is_bounded, bound, loss)
    moves = (difference <= _LOG_RATIO_MAX) & (is_clipped | is_bounded == 0)
    return log_ratio, ratio, loss, is_clipped, tl.where(moves, unclipped, 0.0)


@triton.jit
def _value_terms(values, old_values, returns, value_clip, CLIPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The value's loss, whether its clipped side was taken, and its derivative by the value."""
    derivative = values - returns
    loss = derivative * derivative
    is_near = loss < 0
    if CLIPPED:
        moved = values - old_values
        is_far = (moved < -value_clip) | (moved > value_clip)
        moved = tl.where(moved < -value_clip, -value_clip, tl.where(moved > value_clip, value_clip, moved))
        near = old_values + moved - returns
        # A move within the bounds is not clipped, even if old + (new - old) rounds to another number than new.
        is_near = is_far & (near * near > loss)
        loss = tl.where(is_near, near * near, loss)
        derivative = tl.where(is_near, 0.0, derivative)
    return 0.5 * loss, is_near, derivative


@triton.jit
def _ratio_less_log(log_ratio, ratio):  # type: ignore[no-untyped-def]
    """r - 1 - log r, by its power series where r is so near to 1 that the differences would lose every digit."""
    series = tl.zeros_like(log_ratio) + 1.0
    for order in tl.static_range(15, 0, -1):
        series = 1.0 + series * log_ratio * (1.0 / (order + 2))
    return tl.where(tl.abs(log_ratio) < 0.5, 0.5 * log_ratio * log_ratio * series, ratio - 1.0 - log_ratio)


@jit
def _sums_kernel(
    logprobs_BT: tl.tensor,
    old_logprobs_BT: tl.tensor,
    advantages_BT: tl.tensor,
    mask_BT: tl.tensor,
    values_BT: tl.tensor,
    old_values_BT: tl.tensor,
    returns_BT: tl.tensor,
    entropy_BT: tl.tensor,
    kl_BT: tl.tensor,
    sums: tl.tensor,
    batch: tl.int64,
    length: tl.int64,
    tiles: tl.int64,
    low: tl.float64,
    high: tl.float64,
    dual_clip: tl.float64,
    value_clip: tl.float64,
    TILE: tl.constexpr,
) -> None:
    """One tile of one row per program: its sums to `sums[statistic][tile][row]`."""
    real: tl.constexpr = sums.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) // tiles
    tile = tl.program_id(0).to(tl.int64) % tiles
    begin = row * length + tile * TILE
    lane = tl.arange(0, TILE)
    exists = lane < tl.minimum(length - tile * TILE, TILE).to(tl.int32)
    counts = tl.load(mask_BT + begin + lane, mask=exists, other=0) != 0
    statistic_stride = tiles * batch
    sums += tile * batch + row

    tl.store(sums + _COUNT * statistic_stride, tl.sum(counts.to(real), axis=0))
    logprobs = tl.load(logprobs_BT + begin + lane, mask=counts, other=0).to(real)
    old_logprobs = tl.load(old_logprobs_BT + begin + lane, mask=counts, other=0).to(real)
    advantages = tl.load(advantages_BT + begin + lane, mask=counts, other=0).to(real)
    low, high = tl.full((), low, real), tl.full((), high, real)
    log_ratio, ratio, loss, is_clipped, _ = _policy_terms(
        logprobs, old_logprobs, advantages, low, high, tl.full((), dual_clip, real)
    )
    # Tokens that do not count are read as r = 1 with A = 0, which adds 0 to every sum; a maximum must exclude them.
    tl.store(sums + _POLICY * statistic_stride, tl.sum(loss, axis=0))
    tl.store(sums + _CLIP_FRACTION * statistic_stride, tl.sum(is_clipped.to(real), axis=0))
    tl.store(sums + _APPROX_KL * statistic_stride, tl.sum(_ratio_less_log(log_ratio, ratio), axis=0))
    largest = tl.max(tl.where(counts, ratio, 0.0), axis=0)
    any_nan = tl.max((ratio != ratio).to(tl.int32), axis=0) > 0
    tl.store(sums + _RATIO_MAX * statistic_stride, tl.where(any_nan, float("nan"), largest))

    value_loss = tl.zeros_like(loss)
    is_near = counts & (counts == 0)
    if values_BT is not None:
        values = tl.load(values_BT + begin + lane, mask=counts, other=0).to(real)
        returns = tl.load(returns_BT + begin + lane, mask=counts, other=0).to(real)
        old_values = values
        if old_values_BT is not None:
            old_values = tl.load(old_values_BT + begin + lane, mask=counts, other=0).to(real)
        value_loss, is_near, _ = _value_terms(
            values, old_values, returns, tl.full((), value_clip, real), old_values_BT is not None
        )
    tl.store(sums + _VALUE * statistic_stride, tl.sum(value_loss, axis=0))
    tl.store(sums + _VALUE_CLIP_FRACTION * statistic_stride, tl.sum(is_near.to(real), axis=0))

    entropy = tl.zeros_like(loss)
    if entropy_BT is not None:
        entropy = tl.load(entropy_BT + begin + lane, mask=counts, other=0).to(real)
    tl.store(sums + _ENTROPY * statistic_stride, tl.sum(entropy, axis=0))
    kl = tl.zeros_like(loss)
    if kl_BT is not None:
        kl = tl.load(kl_BT + begin + lane, mask=counts, other=0).to(real)
    tl.store(sums + _KL * statistic_stride, tl.sum(kl, axis=0))


@jit
def _finish_kernel(
    sums: tl.tensor,
    given_denominator: tl.tensor,
    loss: tl.tensor,
    statistics: tl.tensor,
    row_weights_B: tl.tensor,
    batch: tl.int64,
    tiles: tl.int64,
    denominator: tl.float64,
    value_coef: tl.float64,
    entropy_coef: tl.float64,
    kl_coef: tl.float64,
    PER_SEQUENCE: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """One program: the sums of all tiles to the means, the loss, and the weight of each row's tokens in a mean."""
    statistic = tl.arange(0, _RATIO_MAX)
    lane = tl.arange(0, ROWS)
    totals = tl.zeros((_RATIO_MAX,), tl.float64)
    ratio_max = tl.full((), 0, tl.float64)
    nans = 0
    for first in range(0, batch, ROWS):
        exists = lane < tl.minimum(batch - first, ROWS).to(tl.int32)
        of_rows = tl.zeros((_RATIO_MAX, ROWS), tl.float64)
        for tile in range(0, tiles):
            at = (statistic[:, None].to(tl.int64) * tiles + tile) * batch + first + lane[None, :]
            of_rows += tl.load(sums + at, mask=exists[None, :], other=0).to(tl.float64)
            ratio = tl.load(sums + (_RATIO_MAX * tiles + tile) * batch + first + lane, mask=exists, other=0)
            ratio_max = tl.maximum(ratio_max, tl.max(ratio, axis=0).to(tl.float64))
            nans += tl.sum((ratio != ratio).to(tl.int32), axis=0)
        if PER_SEQUENCE:
            # The count itself becomes 1 where anything counts: in sum, the number of rows that take part.
            count = tl.sum(tl.where(statistic[:, None] == _COUNT, of_rows, 0.0), axis=0)
            of_rows = of_rows / tl.maximum(count, 1.0)[None, :]
        totals += tl.sum(of_rows, axis=1)

    if given_denominator is not None:
        denominator = tl.load(given_denominator).to(tl.float64)
        denominator = tl.where(denominator == 0, 1.0, denominator)
    else:
        total = tl.sum(tl.where(statistic == _COUNT, totals, 0.0), axis=0)
        denominator = tl.full((), denominator, tl.float64)
        denominator = tl.where(denominator == 0, tl.maximum(total, 1.0), denominator)

    means = totals / denominator
    result = tl.sum(tl.where(statistic == _POLICY, means, 0.0), axis=0)
    value_coef = tl.full((), value_coef, tl.float64)
    entropy_coef = tl.full((), entropy_coef, tl.float64)
    kl_coef = tl.full((), kl_coef, tl.float64)
    # A term with coefficient 0 is left out: 0 times an infinite term would be NaN.
    value = tl.sum(tl.where(statistic == _VALUE, means, 0.0), axis=0)
    result += tl.where(value_coef == 0, 0.0, value_coef * value)
    entropy = tl.sum(tl.where(statistic == _ENTROPY, means, 0.0), axis=0)
    result -= tl.where(entropy_coef == 0, 0.0, entropy_coef * entropy)
    kl = tl.sum(tl.where(statistic == _KL, means, 0.0), axis=0)
    result += tl.where(kl_coef == 0, 0.0, kl_coef * kl)
    tl.store(loss, result)
    tl.store(statistics + statistic, tl.where(statistic == _LOSS, result, means))
    tl.store(statistics + _RATIO_MAX, tl.where(nans > 0, float("nan"), ratio_max))

    for first in range(0, batch, ROWS):
        exists = lane < tl.minimum(batch - first, ROWS).to(tl.int32)
        row_count = tl.zeros((ROWS,), tl.float64)
        if PER_SEQUENCE:
            for tile in range(0, tiles):
                at = (_COUNT * tiles + tile) * batch + first + lane
                row_count += tl.load(sums + at, mask=exists, other=0).to(tl.float64)
        tl.store(row_weights_B + first + lane, 1.0 / (tl.maximum(row_count, 1.0) * denominator), mask=exists)


@jit
def _gradients_kernel(
    g_loss: tl.tensor,
    row_weights_B: tl.tensor,
    logprobs_BT: tl.tensor,
    old_logprobs_BT: tl.tensor,
    advantages_BT: tl.tensor,
    mask_BT: tl.tensor,
    values_BT: tl.tensor,
    old_values_BT: tl.tensor,
    returns_BT: tl.tensor,
    g_logprobs_BT: tl.tensor,
    g_values_BT: tl.tensor,
    g_entropy_BT: tl.tensor,
    g_kl_BT: tl.tensor,
    length: tl.int64,
    tiles: tl.int64,
    low: tl.float64,
    high: tl.float64,
    dual_clip: tl.float64,
    value_clip: tl.float64,
    value_coef: tl.float64,
    entropy_coef: tl.float64,
    kl_coef: tl.float64,
    TILE: tl.constexpr,
) -> None:
    """One tile of one row per program: the gradients that are wanted, 0 where a token does not count."""
    real: tl.constexpr = row_weights_B.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) // tiles
    tile = tl.program_id(0).to(tl.int64) % tiles
    begin = row * length + tile * TILE
    lane = tl.arange(0, TILE)
    exists = lane < tl.minimum(length - tile * TILE, TILE).to(tl.int32)
    counts = tl.load(mask_BT + begin + lane, mask=exists, other=0) != 0
    weight = tl.load(g_loss).to(real) * tl.load(row_weights_B + row)

    if g_logprobs_BT is not None:
        logprobs = tl.load(logprobs_BT + begin + lane, mask=counts, other=0).to(real)
        old_logprobs = tl.load(old_logprobs_BT + begin + lane, mask=counts, other=0).to(real)
        advantages = tl.load(advantages_BT + begin + lane, mask=counts, other=0).to(real)
        low, high = tl.full((), low, real), tl.full((), high, real)
        _, _, _, _, derivative = _policy_terms(
            logprobs, old_logprobs, advantages, low, high, tl.full((), dual_clip, real)
        )
        tl.store(g_logprobs_BT + begin + lane, tl.where(counts, weight * derivative, 0.0), mask=exists)
    if g_values_BT is not None:
        values = tl.load(values_BT + begin + lane, mask=counts, other=0).to(real)
        returns = tl.load(returns_BT + begin + lane, mask=counts, other=0).to(real)
        old_values = values
        if old_values_BT is not None:
            old_values = tl.load(old_values_BT + begin + lane, mask=counts, other=0).to(real)
        _, _, derivative = _value_terms(
            values, old_values, returns, tl.full((), value_clip, real), old_values_BT is not None
        )
        value_coef = tl.full((), value_coef, real)
        gradient = tl.where(value_coef == 0, 0.0, weight * value_coef * derivative)
        tl.store(g_values_BT + begin + lane, tl.where(counts, gradient, 0.0), mask=exists)
    if g_entropy_BT is not None:
        gradient = -weight * tl.full((), entropy_coef, real)
        tl.store(g_entropy_BT + begin + lane, tl.where(counts, gradient, 0.0), mask=exists)
    if g_kl_BT is not None:
        gradient = weight * tl.full((), kl_coef, real)
        tl.store(g_kl_BT + begin + lane, tl.where(counts, gradient, 0.0), mask=exists)


@takes(PPOArguments)
def ppo_loss(arguments: PPOArguments) -> tuple[Tensor, Tensor, Tensor]:
    """`tlcr.ops.ppo_loss` of checked arguments: the loss, all statistics, the row weights.

    A row weight is the weight of each of the row's counted tokens in a mean; the backward pass needs nothing else.
    """
    a, per_sequence, denominator, denominator_tensor = arguments
    dtype = arithmetic_dtype(*(value for value in a if isinstance(value, Tensor)))
    batch, length = a.mask.shape
    tiles = triton.cdiv(length, TILE)
    loss = a.mask.new_empty((), dtype=dtype)
    statistics = a.mask.new_empty(len(PPOLoss._fields), dtype=dtype)
    row_weights_B = a.mask.new_empty(batch, dtype=dtype)
    sums = a.mask.new_empty((len(PPOLoss._fields), tiles, batch), dtype=dtype)
    with device_of(a.mask):
        if a.mask.numel() > 0:
            _sums_kernel[(batch * tiles,)](
                *_tensors(a),
                contiguous(a.entropy),
                contiguous(a.kl),
                sums,
                batch,
                length,
                tiles,
                *_bounds(a),
                TILE=TILE,
                **OPTIONS,
            )
        _finish_kernel[(1,)](
            sums,
            denominator_tensor,
            loss,
            statistics,
            row_weights_B,
            batch,
            tiles,
            0.0 if denominator is None else denominator,
            a.value_coef,
            a.entropy_coef,
            a.kl_coef,
            PER_SEQUENCE=per_sequence,
            ROWS=FINISH_ROWS,
            **FINISH_OPTIONS,
        )
    return loss, statistics, row_weights_B


@takes(PPOBackward)
def ppo_loss_backward(arguments: PPOBackward) -> tuple[Tensor, ...]:
    """The gradients of the loss times `g_loss`, each in the dtype of its input, of no elements where not wanted."""
    g_loss, row_weights, a, *wanted = arguments
    gradients: list[Tensor] = [
        row_weights.new_empty(a.mask.shape if wants else (0,), dtype=None if like is None else like.dtype)
        for like, wants in zip((a.logprobs, a.values, a.entropy, a.kl), wanted, strict=True)
    ]
    batch, length = a.mask.shape
    if a.mask.numel() > 0 and any(wanted):
        tiles = triton.cdiv(length, TILE)
        with device_of(a.mask):
            _gradients_kernel[(batch * tiles,)](
                g_loss,
                row_weights,
                *_tensors(a),
                *(gradient if wants else None for gradient, wants in zip(gradients, wanted, strict=True)),
                length,
                tiles,
                *_bounds(a),
                a.value_coef,
                a.entropy_coef,
                a.kl_coef,
                TILE=TILE,
                **OPTIONS,
            )
    return tuple(gradients)


def _tensors(a: PPOInputs) -> tuple[Tensor | None, ...]:
    """What both passes load, in the order of their kernels' parameters."""
    old_values = a.old_values if a.value_clip is not None else None
    loaded = a.logprobs, a.old_logprobs, a.advantages, a.mask, a.values, old_values, a.returns
    return tuple(contiguous(tensor) for tensor in loaded)


def _bounds(a: PPOInputs) -> tuple[float, ...]:
    """How far the ratio, the loss and the value may go."""
    return 1 - a.clip, 1 + a.clip_high, _bound(a.dual_clip), _bound(a.value_clip)


def _bound(limit: float | None) -> float:
    return float("inf") if limit is None else limit
