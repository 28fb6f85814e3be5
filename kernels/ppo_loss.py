"""`ppo_loss` and its backward pass.

Forward, two launches: up to 1024 programs share out the tokens and leave their sums, then one launch adds these up in a
fixed order, every program of it for the rows whose weights it writes. The mean of a row's mean needs the row's count
first, which is one launch more. Backward, one launch: elementwise, with the weight of a row's tokens in the mean from
the forward pass.

A mean over all tokens knows of no rows: forward, all tokens are one row.

Bytes moved per counted token, with `real` the type of every input: forward 3 sizeof(real) + 1 for the mask, 3 more with
a clipped value loss, 1 more each with entropy and kl; backward the same without entropy and kl, and one written for
every gradient. In float32 with everything: 33 and 41. Tokens of which no neighbour counts cost 1 byte forward, and
their zeros backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlcr.kernels.launch import (
    any_of_group,
    are_aligned,
    below,
    contiguous,
    device_of,
    jit,
    jit_aligned,
    launch_options,
    read,
    tiles_of,
)
from tlcr.ops._arithmetic import arithmetic_dtype
from tlcr.ops._spec import takes
from tlcr.ops.ppo import LOG_RATIO_MAX, PPOArguments, PPOBackward, PPOInputs
from tlcr.ops.types import PPOLoss

# Neighbouring tokens of a thread: up to 8 inputs are loaded for each, which is plenty in flight.
GROUP = 8
# Tokens that a program takes at once, of one row or of several short ones.
TOKENS = 1024
# The shortest tile. A shorter row leaves threads idle, but moves no byte more, and costs no compilation of its own.
SHORTEST = 128
OPTIONS = launch_options(warps=4)
# In float64 the assembler would else rather spill one number than hold one program less.
GRADIENTS_OPTIONS = launch_options(warps=4, registers=112)
# The most programs that leave sums, whatever the device, so that no sum depends on it: nearly 8 for each multiprocessor
# of an H100, and one tile for those that add them up.
PROGRAMS = 1024
# Rows of which a program of the last launch writes the weights.
FINISH_ROWS = 1024
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


@triton.jit
def _added(total, terms, row_count, GROUP: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds the terms of a tile to one sum for each thread; of each row the mean, where rows have a count."""
    of_thread = tl.sum(_by_thread(terms, GROUP, WIDE), axis=2)
    if row_count is not None:
        of_thread = of_thread / tl.maximum(row_count, 1).to(of_thread.dtype)
    return total + of_thread


@triton.jit
def _by_thread(x, GROUP: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The elements of a tile by the thread that holds them: neighbours where accesses are wide, else every so many."""
    if WIDE == 1:
        return tl.trans(tl.reshape(x, (x.shape[0], GROUP, x.shape[1] // GROUP)), 0, 2, 1)
    else:
        return tl.reshape(x, (x.shape[0], x.shape[1] // GROUP, GROUP))


@jit_aligned("length")
def _counts_kernel(
    mask_BT: tl.tensor,
    counts_B: tl.tensor,
    batch: tl.int64,
    length: tl.int64,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """How many tokens count in each of `ROWS` rows per program."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    size = tl.where(row < batch, length, 0)
    count = tl.zeros((ROWS, 1), tl.int32)
    for first in range(0, length, TILE):
        at = row * length + first + tl.arange(0, TILE)[None, :]
        counts = tl.load(mask_BT + at, mask=below(size - first, TILE), other=0) != 0
        count += tl.sum(counts.to(tl.int32), axis=1, keep_dims=True)
    tl.store(counts_B + row, count, mask=row < batch)


@jit_aligned("length")
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
    counts_B: tl.tensor,
    sums: tl.tensor,
    batch: tl.int64,
    length: tl.int64,
    low: tl.float64,
    high: tl.float64,
    dual_clip: tl.float64,
    value_clip: tl.float64,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Every so many tiles of `ROWS` rows per program: their sums to `sums[statistic][program]`."""
    real: tl.constexpr = sums.dtype.element_ty
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    low, high = tl.full((), low, real), tl.full((), high, real)
    dual_clip, value_clip = tl.full((), dual_clip, real), tl.full((), value_clip, real)
    none = tl.zeros((ROWS, TILE // GROUP), real)
    count, policy, value, entropy, kl = none, none, none, none, none
    clip_fraction, value_clip_fraction, approx_kl, ratio_max = none, none, none, none

    tiles = tl.cdiv(length, TILE).to(tl.int32)
    for block in range(program, tl.cdiv(batch, ROWS).to(tl.int32) * tiles, programs):
        row = ((block // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        first = (block % tiles).to(tl.int64) * TILE
        at = row * length + first + tl.arange(0, TILE)[None, :]
        exists = below(tl.where(row < batch, length, 0) - first, TILE)
        counts = tl.load(mask_BT + at, mask=exists, other=0) != 0
        reads = any_of_group(counts, WIDE)
        row_count = None
        if counts_B is None:
            count = _added(count, counts.to(real), None, GROUP, WIDE)
        else:
            # The count is that of the rows that take part: each adds 1 once.
            row_count = tl.load(counts_B + row, mask=row < batch, other=0)
            begins = (first == 0) & (tl.arange(0, TILE // GROUP)[None, :] == 0)
            count += (begins & (row_count > 0)).to(real)

        logprobs = read(logprobs_BT, at, counts, reads, real)
        old_logprobs = read(old_logprobs_BT, at, counts, reads, real)
        advantages = read(advantages_BT, at, counts, reads, real)
        log_ratio, ratio, loss, is_clipped, _ = _policy_terms(logprobs, old_logprobs, advantages, low, high, dual_clip)
        # Tokens that do not count are r = 1 with A = 0, which adds 0 to every sum; a maximum must exclude them.
        policy = _added(policy, loss, row_count, GROUP, WIDE)
        clip_fraction = _added(clip_fraction, is_clipped.to(real), row_count, GROUP, WIDE)
        approx_kl = _added(approx_kl, _ratio_less_log(log_ratio, ratio), row_count, GROUP, WIDE)
        ratios = _by_thread(tl.where(counts, ratio, 0.0), GROUP, WIDE)
        largest = tl.max(ratios, axis=2)
        largest = tl.where(tl.sum((ratios != ratios).to(tl.int32), axis=2) > 0, float("nan"), largest)
        ratio_max = tl.where(largest <= ratio_max, ratio_max, tl.where(ratio_max != ratio_max, ratio_max, largest))

        if values_BT is not None:
            values = read(values_BT, at, counts, reads, real)
            returns = read(returns_BT, at, counts, reads, real)
            old_values = values
            if old_values_BT is not None:
                old_values = read(old_values_BT, at, counts, reads, real)
            loss, is_near, _ = _value_terms(values, old_values, returns, value_clip, old_values_BT is not None)
            value = _added(value, loss, row_count, GROUP, WIDE)
            value_clip_fraction = _added(value_clip_fraction, is_near.to(real), row_count, GROUP, WIDE)
        if entropy_BT is not None:
            entropy = _added(entropy, read(entropy_BT, at, counts, reads, real), row_count, GROUP, WIDE)
        if kl_BT is not None:
            kl = _added(kl, read(kl_BT, at, counts, reads, real), row_count, GROUP, WIDE)

    sums += program
    tl.store(sums + _COUNT * programs, tl.sum(count))
    tl.store(sums + _POLICY * programs, tl.sum(policy))
    tl.store(sums + _VALUE * programs, tl.sum(value))
    tl.store(sums + _ENTROPY * programs, tl.sum(entropy))
    tl.store(sums + _KL * programs, tl.sum(kl))
    tl.store(sums + _CLIP_FRACTION * programs, tl.sum(clip_fraction))
    tl.store(sums + _VALUE_CLIP_FRACTION * programs, tl.sum(value_clip_fraction))
    tl.store(sums + _APPROX_KL * programs, tl.sum(approx_kl))
    nans = tl.sum((ratio_max != ratio_max).to(tl.int32))
    tl.store(sums + _RATIO_MAX * programs, tl.where(nans > 0, float("nan"), tl.max(ratio_max)))


@jit
def _finish_kernel(
    sums: tl.tensor,
    counts_B: tl.tensor,
    given_denominator: tl.tensor,
    loss: tl.tensor,
    statistics: tl.tensor,
    row_weights_B: tl.tensor,
    batch: tl.int64,
    programs: tl.int64,
    denominator: tl.float64,
    value_coef: tl.float64,
    entropy_coef: tl.float64,
    kl_coef: tl.float64,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """The weight of the tokens of `ROWS` rows in a mean; the first program also writes the means and the loss."""
    lane = tl.arange(0, PROGRAMS)
    exists = lane < programs
    if given_denominator is not None:
        denominator = tl.load(given_denominator).to(tl.float64)
        denominator = tl.where(denominator == 0, 1.0, denominator)
    else:
        total = tl.sum(tl.load(sums + _COUNT * programs + lane, mask=exists, other=0).to(tl.float64), axis=0)
        denominator = tl.full((), denominator, tl.float64)
        denominator = tl.where(denominator == 0, tl.maximum(total, 1.0), denominator)

    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_count = tl.full((ROWS,), 1, tl.float64)
    if counts_B is not None:
        row_count = tl.maximum(tl.load(counts_B + row, mask=row < batch, other=0), 1).to(tl.float64)
    tl.store(row_weights_B + row, 1.0 / (row_count * denominator), mask=row < batch)

    if tl.program_id(0) == 0:
        statistic = tl.arange(0, _RATIO_MAX)
        of_programs = sums + statistic[:, None] * programs + lane[None, :]
        totals = tl.sum(tl.load(of_programs, mask=exists[None, :], other=0).to(tl.float64), axis=1)
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
        ratios = tl.load(sums + _RATIO_MAX * programs + lane, mask=exists, other=0).to(tl.float64)
        nans = tl.sum((ratios != ratios).to(tl.int32), axis=0)
        tl.store(statistics + _RATIO_MAX, tl.where(nans > 0, float("nan"), tl.max(ratios, axis=0)))


@jit_aligned("length")
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
    batch: tl.int64,
    length: tl.int64,
    low: tl.float64,
    high: tl.float64,
    dual_clip: tl.float64,
    value_clip: tl.float64,
    value_coef: tl.float64,
    entropy_coef: tl.float64,
    kl_coef: tl.float64,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """One tile of `ROWS` rows per program: the gradients that are wanted, 0 where a token does not count."""
    real: tl.constexpr = row_weights_B.dtype.element_ty
    program = tl.program_id(0)
    tiles = tl.cdiv(length, TILE).to(tl.int32)
    rows = (program // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = rows[:, None]
    first = (program % tiles).to(tl.int64) * TILE
    at = row * length + first + tl.arange(0, TILE)[None, :]
    exists = below(tl.where(row < batch, length, 0) - first, TILE)
    counts = tl.load(mask_BT + at, mask=exists, other=0) != 0
    reads = any_of_group(counts, WIDE)
    weight = tl.load(g_loss).to(real) * tl.load(row_weights_B + rows, mask=rows < batch, other=0)[:, None]

    if g_logprobs_BT is not None:
        logprobs = read(logprobs_BT, at, counts, reads, real)
        old_logprobs = read(old_logprobs_BT, at, counts, reads, real)
        advantages = read(advantages_BT, at, counts, reads, real)
        low, high = tl.full((), low, real), tl.full((), high, real)
        _, _, _, _, derivative = _policy_terms(
            logprobs, old_logprobs, advantages, low, high, tl.full((), dual_clip, real)
        )
        tl.store(g_logprobs_BT + at, tl.where(counts, weight * derivative, 0.0), mask=exists)
    if g_values_BT is not None:
        values = read(values_BT, at, counts, reads, real)
        returns = read(returns_BT, at, counts, reads, real)
        old_values = values
        if old_values_BT is not None:
            old_values = read(old_values_BT, at, counts, reads, real)
        _, _, derivative = _value_terms(
            values, old_values, returns, tl.full((), value_clip, real), old_values_BT is not None
        )
        value_coef = tl.full((), value_coef, real)
        gradient = tl.where(value_coef == 0, 0.0, weight * value_coef * derivative)
        tl.store(g_values_BT + at, tl.where(counts, gradient, 0.0), mask=exists)
    if g_entropy_BT is not None:
        gradient = -weight * tl.full((), entropy_coef, real)
        tl.store(g_entropy_BT + at, tl.where(counts, gradient, 0.0), mask=exists)
    if g_kl_BT is not None:
        gradient = weight * tl.full((), kl_coef, real)
        tl.store(g_kl_BT + at, tl.where(counts, gradient, 0.0), mask=exists)


@takes(PPOArguments)
def ppo_loss(arguments: PPOArguments) -> tuple[Tensor, Tensor, Tensor]:
    """`tlcr.ops.ppo_loss` of checked arguments: the loss, all statistics, the row weights.

    A row weight is the weight of each of the row's counted tokens in a mean; the backward pass needs nothing else.
    """
    a, per_sequence, denominator, denominator_tensor = arguments
    dtype = arithmetic_dtype(*(value for value in a if isinstance(value, Tensor)))
    batch, length = a.mask.shape
    loss = a.mask.new_empty((), dtype=dtype)
    statistics = a.mask.new_empty(len(PPOLoss._fields), dtype=dtype)
    row_weights_B = a.mask.new_empty(batch, dtype=dtype)
    counts_B = a.mask.new_empty(batch, dtype=torch.int32) if per_sequence else None
    given = *_tensors(a), contiguous(a.entropy), contiguous(a.kl)

    rows, row_length = (batch, length) if per_sequence else (1, batch * length)
    aligned = are_aligned(row_length, *given)
    tiles = tiles_of(row_length, TOKENS, shortest=SHORTEST if per_sequence else TOKENS)
    programs = min(tiles.programs(rows, row_length), PROGRAMS)
    sums = a.mask.new_empty((len(PPOLoss._fields), programs), dtype=dtype)
    shape = {"ROWS": tiles.rows, "TILE": tiles.tile, **OPTIONS}
    with device_of(a.mask):
        if counts_B is not None and batch > 0:
            mask_BT = given[PPOInputs._fields.index("mask")]
            count = _counts_kernel.of(aligned)[(triton.cdiv(batch, tiles.rows),)]
            count(mask_BT, counts_B, batch, length, **shape)
        if programs > 0:
            add = _sums_kernel.of(aligned)[(programs,)]
            wide = GROUP if aligned else 1
            add(*given, counts_B, sums, rows, row_length, *_bounds(a), GROUP=GROUP, WIDE=wide, **shape)
        _finish_kernel[(max(1, triton.cdiv(batch, FINISH_ROWS)),)](
            sums,
            counts_B,
            denominator_tensor,
            loss,
            statistics,
            row_weights_B,
            batch,
            programs,
            0.0 if denominator is None else denominator,
            a.value_coef,
            a.entropy_coef,
            a.kl_coef,
            PROGRAMS=PROGRAMS,
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
        given = _tensors(a)
        aligned = are_aligned(length, *given)
        tiles = tiles_of(length, TOKENS, shortest=SHORTEST)
        with device_of(a.mask):
            _gradients_kernel.of(aligned)[(tiles.programs(batch, length),)](
                g_loss,
                row_weights,
                *given,
                *(gradient if wants else None for gradient, wants in zip(gradients, wanted, strict=True)),
                batch,
                length,
                *_bounds(a),
                a.value_coef,
                a.entropy_coef,
                a.kl_coef,
                ROWS=tiles.rows,
                TILE=tiles.tile,
                WIDE=GROUP if aligned else 1,
                **GRADIENTS_OPTIONS,
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
