"""`fused_gae`: generalised advantage estimation by a reverse associative scan, padded or packed.

Each token passes y_t = gamma lam A_t + gamma V_t to the token before it: its share of the later advantage and the
value of its state. With it the recurrence over rewards and values becomes linear in one quantity:

    A_t = r_t - V_t + y_next        y_t = gamma (lam r_t + (1 - lam) V_t) + gamma lam y_next

A token that does not count passes on its input: y_t = y_next. So one scan over pairs (x, decay) does it, without
a search for the next counted value. A_t needs the result of the scan at t + 1: lane t scans token
t + 1. Its second read of rewards and values, at t, comes from the cache.

Bytes moved per counted token: sizeof(rewards) + sizeof(values) + 1 for the mask + 2 sizeof(real) written; per masked
token 1 + 2 sizeof(real). In float32: 17, and 16 without a mask. Whitening adds 2 sizeof(real) + 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlcr.kernels.launch import contiguous, device_of, jit, launch_options
from tlcr.ops._arithmetic import arithmetic_dtype
from tlcr.ops._spec import takes
from tlcr.ops.gae import WHITEN_FLOOR, GAEArguments

# Tokens that a program scans at once, 8 to each thread: most responses fit in one or two tiles, and the carry between
# tiles, which is the serial part of a long row, is paid once in a thousand tokens.
TILE = 1024
OPTIONS = launch_options(warps=4)
# Triton drops device_assert unless it compiles for debugging, and then checks every sum of integers too.
CHECKED = OPTIONS | {"debug": True, "sanitize_overflow": False}
# Rows whose moments are merged at once, by the one program that does it.
MOMENTS_TILE = 1024
# Tokens that a program whitens.
WHITEN_TILE = 1024


@triton.jit
def _then(x_right, decay_right, x_left, decay_left):  # type: ignore[no-untyped-def]
    """Composes two maps y -> x + decay y: first that of the tokens on the right, then that of those on the left."""
    return x_left + decay_left * x_right, decay_left * decay_right


@triton.jit
def _merged(count, mean, square, more, mean_of_more, square_of_more):  # type: ignore[no-untyped-def]
    """Count, mean and sum of squared deviations of two sets together (Chan, Golub and LeVeque)."""
    total = count + more
    share = more / tl.where(total == 0, 1.0, total)
    apart = mean_of_more - mean
    return total, mean + apart * share, square + square_of_more + apart * apart * count * share


@jit
def _gae_kernel(
    rewards: tl.tensor,
    values: tl.tensor,
    mask: tl.tensor,
    cu_seqlens: tl.tensor,
    advantages: tl.tensor,
    returns: tl.tensor,
    moments_B3: tl.tensor,
    sequences: tl.int64,
    length: tl.int64,
    gamma: tl.float64,
    lam: tl.float64,
    TILE: tl.constexpr,
) -> None:
    """One row per program, from last tile to first. Packed, one more program writes what follows the last sequence."""
    real: tl.constexpr = advantages.dtype.element_ty
    sequence = tl.program_id(0).to(tl.int64)
    inside = True
    if cu_seqlens is None:
        begin = sequence * length
        end = begin + length
        counted_end = end
    else:
        inside = sequence < sequences
        begin = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1, mask=inside, other=0).to(tl.int64)
        end = tl.where(inside, end, length)
        tl.device_assert((begin >= 0) & (begin <= end) & (end <= length), "cu_seqlens must ascend from 0 to at most N")
        tl.device_assert((sequence > 0) | (begin == 0), "cu_seqlens must begin with 0")
        counted_end = tl.where(inside, end, begin)

    # Each is rounded once: 1 - lam, computed from a rounded lam, would lose a digit.
    of_reward = tl.full((), gamma * lam, real)
    of_value = tl.full((), gamma * (1.0 - lam), real)
    carry = tl.full((), 0, real)
    count = tl.full((), 0, tl.float64)
    mean = tl.full((), 0, tl.float64)
    square = tl.full((), 0, tl.float64)
    lane = tl.arange(0, TILE)
    tiles = tl.cdiv(tl.maximum(end - begin, 0), TILE)
    for done in range(tiles):
        first = begin + (tiles - 1 - done) * TILE
        exists = lane < tl.minimum(end - first, TILE).to(tl.int32)
        counts = lane < tl.minimum(tl.maximum(counted_end - first, 0), TILE).to(tl.int32)
        next_counts = lane < tl.minimum(tl.maximum(counted_end - first - 1, 0), TILE).to(tl.int32)
        if mask is not None:
            counts = tl.load(mask + first + lane, mask=counts, other=0) != 0
            next_counts = tl.load(mask + first + 1 + lane, mask=next_counts, other=0) != 0

        reward = tl.load(rewards + first + 1 + lane, mask=next_counts, other=0).to(real)
        value = tl.load(values + first + 1 + lane, mask=next_counts, other=0).to(real)
        x = of_reward * reward + of_value * value
        decay = tl.where(next_counts, of_reward, 1.0)
        x, decay = tl.associative_scan((x, decay), 0, _then, reverse=True)
        following = x + decay * carry
        carry = tl.sum(tl.where(lane == 0, following, 0.0), axis=0)

        reward = tl.load(rewards + first + lane, mask=counts, other=0).to(real)
        value = tl.load(values + first + lane, mask=counts, other=0).to(real)
        advantage = tl.where(counts, reward - value + following, 0.0)
        tl.store(advantages + first + lane, advantage, mask=exists)
        tl.store(returns + first + lane, advantage + value, mask=exists)

        if moments_B3 is not None:
            # Around a mean rounded to `real`, whose error is then known, so that only scalars need float64.
            more = tl.sum(counts.to(real), axis=0)
            divisor = tl.maximum(more, 1.0)
            about = tl.sum(advantage, axis=0) / divisor
            off = tl.where(counts, advantage - about, 0.0)
            rest = tl.sum(off, axis=0).to(tl.float64)
            mean_rest = rest / divisor.to(tl.float64)
            mean_of_more = about.to(tl.float64) + mean_rest
            square_of_more = tl.sum(off * off, axis=0).to(tl.float64) - rest * mean_rest
            count, mean, square = _merged(count, mean, square, more.to(tl.float64), mean_of_more, square_of_more)
    if moments_B3 is not None:
        tl.store(moments_B3 + sequence * 3, count, mask=inside)
        tl.store(moments_B3 + sequence * 3 + 1, mean, mask=inside)
        tl.store(moments_B3 + sequence * 3 + 2, square, mask=inside)


@jit
def _moments_kernel(
    moments_B3: tl.tensor,
    mean_and_deviation: tl.tensor,
    sequences: tl.int64,
    floor: tl.float64,
    TILE: tl.constexpr,
) -> None:
    """One program: the moments of the rows, merged in a fixed order, to a mean and a deviation.

    A deviation that comes from rounding alone is set to infinity, so that the quotients become 0.
    """
    count = tl.full((), 0, tl.float64)
    mean = tl.full((), 0, tl.float64)
    square = tl.full((), 0, tl.float64)
    lane = tl.arange(0, TILE)
    for start in range(0, sequences, TILE):
        exists = lane < tl.minimum(sequences - start, TILE).to(tl.int32)
        row = moments_B3 + start * 3 + lane * 3
        count_row = tl.load(row, mask=exists, other=0)
        mean_row = tl.load(row + 1, mask=exists, other=0)
        square_row = tl.load(row + 2, mask=exists, other=0)
        more = tl.sum(count_row, axis=0)
        mean_of_more = tl.sum(count_row * mean_row, axis=0) / tl.maximum(more, 1.0)
        apart = mean_row - mean_of_more
        square_of_more = tl.sum(square_row + count_row * apart * apart, axis=0)
        count, mean, square = _merged(count, mean, square, more, mean_of_more, square_of_more)
    deviation = tl.sqrt(square / tl.maximum(count, 1.0))
    deviation = tl.where(deviation <= tl.full((), floor, tl.float64) * tl.abs(mean), float("inf"), deviation)
    tl.store(mean_and_deviation, mean)
    tl.store(mean_and_deviation + 1, deviation)


@jit
def _whiten_kernel(
    advantages: tl.tensor,
    mask: tl.tensor,
    cu_seqlens: tl.tensor,
    mean_and_deviation: tl.tensor,
    sequences: tl.int64,
    tokens: tl.int64,
    TILE: tl.constexpr,
) -> None:
    """One tile of all tokens, whatever their rows, per program; in place. What does not count is 0 already."""
    real: tl.constexpr = advantages.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * TILE
    lane = tl.arange(0, TILE)
    counts = lane < tl.minimum(tokens - first, TILE).to(tl.int32)
    if cu_seqlens is not None:
        position = first + lane
        counts = counts & (position < tl.load(cu_seqlens + sequences))
    if mask is not None:
        counts = tl.load(mask + first + lane, mask=counts, other=0) != 0
    # The mean is in two parts: a single one, rounded to `real`, would shift all results by the same error.
    mean = tl.load(mean_and_deviation)
    high = mean.to(real)
    low = (mean - high.to(tl.float64)).to(real)
    scale = (1.0 / tl.load(mean_and_deviation + 1)).to(real)
    advantage = tl.load(advantages + first + lane, mask=counts, other=0)
    tl.store(advantages + first + lane, (advantage - high - low) * scale, mask=counts)


@takes(GAEArguments)
def fused_gae(arguments: GAEArguments) -> tuple[Tensor, Tensor]:
    """`tlcr.ops.fused_gae` of checked arguments."""
    rewards, values, mask, gamma, lam, whiten, cu_seqlens = arguments
    dtype = arithmetic_dtype(rewards, values)
    advantages, returns = (torch.empty(rewards.shape, dtype=dtype, device=rewards.device) for _ in range(2))
    if rewards.numel() == 0:
        return advantages, returns
    mask, cu_seqlens = contiguous(mask), contiguous(cu_seqlens)
    if cu_seqlens is None:
        sequences, length = rewards.shape
        programs = sequences
    else:
        sequences, length = cu_seqlens.shape[0] - 1, rewards.shape[0]
        programs = sequences + 1
    moments_B3 = torch.empty((sequences, 3), dtype=torch.float64, device=rewards.device) if whiten else None
    with device_of(rewards):
        _gae_kernel[(programs,)](
            rewards.contiguous(),
            values.contiguous(),
            mask,
            cu_seqlens,
            advantages,
            returns,
            moments_B3,
            sequences,
            length,
            gamma,
            lam,
            TILE=TILE,
            **CHECKED,
        )
        if moments_B3 is not None:
            mean_and_deviation = torch.empty(2, dtype=torch.float64, device=rewards.device)
            floor = WHITEN_FLOOR * torch.finfo(dtype).eps
            _moments_kernel[(1,)](moments_B3, mean_and_deviation, sequences, floor, TILE=MOMENTS_TILE, **OPTIONS)
            _whiten_kernel[(triton.cdiv(rewards.numel(), WHITEN_TILE),)](
                advantages,
                mask,
                cu_seqlens,
                mean_and_deviation,
                sequences,
                rewards.numel(),
                TILE=WHITEN_TILE,
                **OPTIONS,
            )
    return advantages, returns
