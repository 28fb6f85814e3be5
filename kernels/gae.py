"""`fused_gae`: generalised advantage estimation by a reverse scan in a tree, padded or packed.

Each token passes y_t = gamma lam A_t + gamma V_t to the token before it: its share of the later advantage and the
value of its state. With it the recurrence over rewards and values becomes linear in one quantity:

    A_t = r_t - V_t + y_next        y_t = x_t + decay y_next
                                    x_t = gamma (lam r_t + (1 - lam) V_t), decay = gamma lam

A token that does not count passes on what it gets: y_t = y_next. So one scan over pairs (x, decay) does it, without a
search for the next counted value, and nothing is divided by gamma lam, which may be 0.

The scan is a tree (`_passed_on`). Two neighbours together are one map y -> x + decay y, and so are two pairs. Going up,
the maps of the right and the left half are composed; going down, the left half gets what the right half passes on. The
lowest three levels are the 8 neighbours that a thread reads at once, and stay in its registers. Between threads it is
Triton's scan of 8 times fewer pairs.

A program scans its rows tile by tile, from the last to the first. Where there are fewer rows than multiprocessors, and
they are long, their tiles are shared out instead: one launch leaves the map of each tile, in the next each tile applies
those of all tiles after it, one by one. That is the arithmetic of one program that goes from tile to tile, so it is the
same to the last bit.

Bytes moved per counted token: sizeof(rewards) + sizeof(values) + 1 for the mask + 2 sizeof(real) written; per masked
token 1 + 2 sizeof(real), where none of 8 neighbours counts. In float32: 17, and 16 without a mask. Whitening adds
2 sizeof(real) + 1. Rows that are shared out are read twice.
"""

import math
from typing import NamedTuple

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
    multiprocessors,
    read,
    tiles_of,
)
from tlcr.ops._arithmetic import arithmetic_dtype
from tlcr.ops._spec import takes
from tlcr.ops.gae import WHITEN_FLOOR, GAEArguments

# Neighbouring tokens of a thread. With 16 it would hold twice as many numbers, and a multiprocessor fewer programs.
GROUP = 8
# Tokens that a program scans at once, of one row or of several short ones.
TILE = 1024
OPTIONS = launch_options(warps=4)
# The shortest tile. A shorter row leaves threads idle, but moves no byte more, and costs no compilation of its own.
SHORTEST = 128
# Packed sequences have many lengths. A long one among short ones should not be walked in their small steps.
PACKED_TILE = 512
# From so many tiles on the rows are shared out where they are few: a second launch and reading twice cost less than
# that many steps of one program.
SHARED_TILES = 8
# Maps of later tiles that are loaded at once.
AHEAD = 16
# Triton drops device_assert unless it compiles for debugging, and then checks every sum of integers too.
CHECKED = OPTIONS | {"debug": True, "sanitize_overflow": False}
# Moments that a program merges at once.
MOMENTS_TILE = 1024
# Tokens that a program whitens at once, 16 to each thread, and the programs for each multiprocessor. Each of them
# merges the last moments for itself, which a launch less repays while they are few.
WHITEN_TILE = 2048
WHITEN_PROGRAMS = 8


class Plan(NamedTuple):
    """How the work is divided. It changes the speed and, but for the order in which moments are merged, no bit."""

    rows: int
    """Rows of a program."""
    tile: int
    """Tokens of each that it scans at once."""
    shared: bool
    """Whether the tiles of a row are shared out among programs."""


def plan(sequences: int, length: int, multiprocessors: int, *, packed: bool = False) -> Plan:
    """How `sequences` rows of `length` tokens, or packed ones of about that length, are divided among programs."""
    rows, tile = tiles_of(length, TILE, shortest=PACKED_TILE if packed else SHORTEST)
    return Plan(rows, tile, shared=sequences < multiprocessors and length >= SHARED_TILES * tile)


@triton.jit
def _then(x, decay, x_left, decay_left):  # type: ignore[no-untyped-def]
    """Composes two maps y -> x + decay y: first that of the tokens on the right, then that of those on the left."""
    return tl.fma(decay_left, x, x_left), decay_left * decay


@triton.jit
def _then_both(x, decay, x_after, decay_after, x_left, decay_left, x_after_left, decay_after_left):  # type: ignore[no-untyped-def]
    """Composes maps, and beside each the map of what follows its first element."""
    x_after, decay_after = _then(x, decay, x_after_left, decay_after_left)
    x, decay = _then(x, decay, x_left, decay_left)
    return x, decay, x_after, decay_after


@triton.jit
def _halves(x):  # type: ignore[no-untyped-def]
    """The left and the right ones of all pairs of neighbours."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _scanned(x, decay):  # type: ignore[no-untyped-def]
    """For each element the map of all that follow it; and the map of the whole row."""
    none = tl.zeros_like(x)
    x, decay, x_after, decay_after = tl.associative_scan((x, decay, none, none + 1.0), 1, _then_both, reverse=True)
    is_first = tl.arange(0, x.shape[1])[None, :] == 0
    x = tl.sum(tl.where(is_first, x, 0.0), axis=1, keep_dims=True)
    decay = tl.sum(tl.where(is_first, decay, 0.0), axis=1, keep_dims=True)
    return x_after, decay_after, x, decay


@triton.jit
def _passed_on(x, decay, carry, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """What each token gets from those after it, the last one `carry`; and what the first one passes on."""
    if GROUP == 1:
        x_after, decay_after, x, decay = _scanned(x, decay)
        return tl.fma(decay_after, carry, x_after), tl.fma(decay, carry, x)
    else:
        x_left, x_right = _halves(x)
        decay_left, decay_right = _halves(decay)
        x_both, decay_both = _then(x_right, decay_right, x_left, decay_left)
        to_right, carry = _passed_on(x_both, decay_both, carry, GROUP // 2)
        to_left = tl.fma(decay_right, to_right, x_right)
        return tl.reshape(tl.join(to_left, to_right), x.shape), carry


@triton.jit
def _composed(x, decay, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The map of the whole row, by the arithmetic of `_passed_on`."""
    if GROUP == 1:
        _, _, x, decay = _scanned(x, decay)
        return x, decay
    else:
        x_left, x_right = _halves(x)
        decay_left, decay_right = _halves(decay)
        x, decay = _then(x_right, decay_right, x_left, decay_left)
        return _composed(x, decay, GROUP // 2)


@triton.jit
def _rows(cu_seqlens, row, sequences, length):  # type: ignore[no-untyped-def]
    """Where rows begin, how many tokens they have, and how many of these may count; all 0 beyond the last row.

    Packed, one more row holds what follows the last sequence and does not count.
    """
    inside = row < sequences
    if cu_seqlens is None:
        begin = row * length
        size = tl.where(inside, length, 0)
    else:
        begin = tl.load(cu_seqlens + row, mask=row <= sequences, other=0).to(tl.int64)
        end = tl.load(cu_seqlens + row + 1, mask=inside, other=0).to(tl.int64)
        end = tl.where(inside, end, tl.where(row == sequences, length, begin))
        tl.device_assert((begin >= 0) & (begin <= end) & (end <= length), "cu_seqlens must ascend from 0 to at most N")
        tl.device_assert((row > 0) | (begin == 0), "cu_seqlens must begin with 0")
        size = end - begin
    return begin, size, tl.where(inside, size, 0)


@triton.jit
def _read(rewards, values, mask, at, may_count, real: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which tokens count, and their rewards and values."""
    counts = may_count
    if mask is not None:
        counts = tl.load(mask + at, mask=may_count, other=0) != 0
    reads = may_count if mask is None else any_of_group(counts, WIDE)
    return counts, read(rewards, at, counts, reads, real), read(values, at, counts, reads, real)


@triton.jit
def _maps(counts, reward, value, gamma, lam):  # type: ignore[no-untyped-def]
    """The map y_next -> y of each token."""
    # Each is rounded once: 1 - lam, computed from a rounded lam, would lose a digit.
    of_reward = tl.full((), gamma * lam, reward.dtype)
    of_value = tl.full((), gamma * (1.0 - lam), reward.dtype)
    return tl.fma(of_reward, reward, of_value * value), tl.where(counts, of_reward, 1.0)


@triton.jit
def _write(advantages, returns, at, exists, counts, reward, value, following):  # type: ignore[no-untyped-def]
    advantage = tl.where(counts, reward - value + following, 0.0)
    tl.store(advantages + at, advantage, mask=exists)
    tl.store(returns + at, advantage + value, mask=exists)
    return advantage


@triton.jit
def _merged(count, mean, square, more, mean_of_more, square_of_more):  # type: ignore[no-untyped-def]
    """Count, mean and sum of squared deviations of two sets together (Chan, Golub and LeVeque)."""
    total = count + more
    share = more / tl.where(total == 0, 1.0, total)
    apart = mean_of_more - mean
    return total, mean + apart * share, square + square_of_more + apart * apart * count * share


@triton.jit
def _moments(counts, advantage):  # type: ignore[no-untyped-def]
    """Count, mean and sum of squared deviations of a tile.

    Around a mean rounded to `real`, whose error is then known, so that only scalars need float64.
    """
    count = tl.sum(counts.to(advantage.dtype))
    divisor = tl.maximum(count, 1.0)
    about = tl.sum(advantage) / divisor
    off = tl.where(counts, advantage - about, 0.0)
    rest = tl.sum(off).to(tl.float64)
    mean_rest = rest / divisor.to(tl.float64)
    square = tl.sum(off * off).to(tl.float64) - rest * mean_rest
    return count.to(tl.float64), about.to(tl.float64) + mean_rest, square


@triton.jit
def _store_moments(moments_P3, program, count, mean, square):  # type: ignore[no-untyped-def]
    program = program.to(tl.int64)
    tl.store(moments_P3 + program * 3, count)
    tl.store(moments_P3 + program * 3 + 1, mean)
    tl.store(moments_P3 + program * 3 + 2, square)


@jit_aligned("length")
def _gae_kernel(
    rewards: tl.tensor,
    values: tl.tensor,
    mask: tl.tensor,
    cu_seqlens: tl.tensor,
    advantages: tl.tensor,
    returns: tl.tensor,
    moments_P3: tl.tensor,
    sequences: tl.int64,
    length: tl.int64,
    gamma: tl.float64,
    lam: tl.float64,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """`ROWS` rows per program, from last tile to first."""
    real: tl.constexpr = advantages.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row = (program * ROWS + tl.arange(0, ROWS))[:, None]
    begin, size, may_count = _rows(cu_seqlens, row, sequences, length)
    longest = length
    if cu_seqlens is not None:
        longest = tl.maximum(tl.max(size), 0)

    carry = tl.zeros((ROWS, 1), real)
    count = tl.full((), 0, tl.float64)
    mean = tl.full((), 0, tl.float64)
    square = tl.full((), 0, tl.float64)
    tiles = tl.cdiv(longest, TILE)
    for done in range(tiles):
        first = (tiles - 1 - done) * TILE
        at = begin + first + tl.arange(0, TILE)[None, :]
        counts, reward, value = _read(rewards, values, mask, at, below(may_count - first, TILE), real, WIDE)
        x, decay = _maps(counts, reward, value, gamma, lam)
        following, carry = _passed_on(x, decay, carry, GROUP)
        exists = below(size - first, TILE)
        advantage = _write(advantages, returns, at, exists, counts, reward, value, following)
        if moments_P3 is not None:
            more, mean_of_more, square_of_more = _moments(counts, advantage)
            count, mean, square = _merged(count, mean, square, more, mean_of_more, square_of_more)
    if moments_P3 is not None:
        _store_moments(moments_P3, program, count, mean, square)


@jit_aligned("length")
def _maps_kernel(
    rewards: tl.tensor,
    values: tl.tensor,
    mask: tl.tensor,
    cu_seqlens: tl.tensor,
    maps: tl.tensor,
    sequences: tl.int64,
    length: tl.int64,
    tiles: tl.int64,
    gamma: tl.float64,
    lam: tl.float64,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """The first of two launches for rows that are shared out: the map of one tile per program to `maps[2][program]`."""
    real: tl.constexpr = maps.dtype.element_ty
    program = tl.program_id(0)
    row = tl.zeros((1, 1), tl.int64) + program // tiles.to(tl.int32)
    first = (program % tiles.to(tl.int32)).to(tl.int64) * TILE
    begin, _, may_count = _rows(cu_seqlens, row, sequences, length)
    at = begin + first + tl.arange(0, TILE)[None, :]
    counts, reward, value = _read(rewards, values, mask, at, below(may_count - first, TILE), real, WIDE)
    x, decay = _maps(counts, reward, value, gamma, lam)
    x, decay = _composed(x, decay, GROUP)
    here = maps + program + tl.zeros((1, 1), tl.int64)
    tl.store(here, x)
    tl.store(here + tl.num_programs(0), decay)


@jit_aligned("length")
def _shared_kernel(
    rewards: tl.tensor,
    values: tl.tensor,
    mask: tl.tensor,
    cu_seqlens: tl.tensor,
    maps: tl.tensor,
    advantages: tl.tensor,
    returns: tl.tensor,
    moments_P3: tl.tensor,
    sequences: tl.int64,
    length: tl.int64,
    tiles: tl.int64,
    gamma: tl.float64,
    lam: tl.float64,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    AHEAD: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """The second: one tile per program, after the maps of the tiles that follow in its row, from the last one on."""
    real: tl.constexpr = advantages.dtype.element_ty
    program = tl.program_id(0)
    row = tl.zeros((1, 1), tl.int64) + program // tiles.to(tl.int32)
    tile = program % tiles.to(tl.int32)
    first = tile.to(tl.int64) * TILE
    begin, size, may_count = _rows(cu_seqlens, row, sequences, length)
    at = begin + first + tl.arange(0, TILE)[None, :]
    counts, reward, value = _read(rewards, values, mask, at, below(may_count - first, TILE), real, WIDE)
    x, decay = _maps(counts, reward, value, gamma, lam)

    carry = tl.full((), 0, real)
    later = tiles.to(tl.int32) - 1 - tile
    for step in range(tl.cdiv(later, AHEAD)):
        for ahead in tl.static_range(AHEAD):
            follows = later - step * AHEAD - ahead
            map_of = maps + program + follows
            # A map that does not exist passes on what it gets.
            x_of_tile = tl.load(map_of, mask=follows > 0, other=0.0)
            decay_of_tile = tl.load(map_of + tl.num_programs(0), mask=follows > 0, other=1.0)
            carry = tl.fma(decay_of_tile, carry, x_of_tile)

    following, _ = _passed_on(x, decay, tl.zeros((1, 1), real) + carry, GROUP)
    exists = below(size - first, TILE)
    advantage = _write(advantages, returns, at, exists, counts, reward, value, following)
    if moments_P3 is not None:
        count, mean, square = _moments(counts, advantage)
        _store_moments(moments_P3, program, count, mean, square)


@triton.jit
def _moments_of(moments_P3, first, programs, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The moments that up to `TILE` programs left from `first` on, merged in a fixed order."""
    lane = tl.arange(0, TILE)
    exists = lane < tl.minimum(programs - first, TILE).to(tl.int32)
    of_program = moments_P3 + (first + lane) * 3
    count = tl.load(of_program, mask=exists, other=0)
    mean = tl.load(of_program + 1, mask=exists, other=0)
    square = tl.load(of_program + 2, mask=exists, other=0)
    total = tl.sum(count, axis=0)
    mean_of_all = tl.sum(count * mean, axis=0) / tl.maximum(total, 1.0)
    apart = mean - mean_of_all
    return total, mean_of_all, tl.sum(square + count * apart * apart, axis=0)


@jit
def _merge_kernel(moments_P3: tl.tensor, merged_Q3: tl.tensor, programs: tl.int64, TILE: tl.constexpr) -> None:
    """The moments of `TILE` programs to one."""
    program = tl.program_id(0).to(tl.int64)
    count, mean, square = _moments_of(moments_P3, program * TILE, programs, TILE)
    _store_moments(merged_Q3, program, count, mean, square)


@jit_aligned("tokens")
def _whiten_kernel(
    advantages: tl.tensor,
    mask: tl.tensor,
    cu_seqlens: tl.tensor,
    moments_P3: tl.tensor,
    programs: tl.int64,
    sequences: tl.int64,
    tokens: tl.int64,
    floor: tl.float64,
    TILE: tl.constexpr,
    MOMENTS_TILE: tl.constexpr,
) -> None:
    """Every program merges all moments by itself, then whitens tiles of all tokens, whatever their rows, in place."""
    real: tl.constexpr = advantages.dtype.element_ty
    count, mean, square = _moments_of(moments_P3, 0, programs, MOMENTS_TILE)
    for first in range(MOMENTS_TILE, programs, MOMENTS_TILE):
        more, mean_of_more, square_of_more = _moments_of(moments_P3, first, programs, MOMENTS_TILE)
        count, mean, square = _merged(count, mean, square, more, mean_of_more, square_of_more)
    deviation = tl.sqrt(square / tl.maximum(count, 1.0))
    # A deviation that comes from rounding alone makes all quotients 0.
    scale = tl.where(deviation <= tl.full((), floor, tl.float64) * tl.abs(mean), 0.0, 1.0 / deviation).to(real)
    # The mean is in two parts: a single one, rounded to `real`, would shift all results by the same error.
    high = mean.to(real)
    low = (mean - high.to(tl.float64)).to(real)

    counted = tokens
    if cu_seqlens is not None:
        counted = tl.load(cu_seqlens + sequences).to(tl.int64)
    lane = tl.arange(0, TILE)
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(tokens, TILE), tl.num_programs(0)):
        first = tile * TILE
        exists = lane < tl.minimum(tokens - first, TILE).to(tl.int32)
        counts = lane < tl.minimum(tl.maximum(counted - first, 0), TILE).to(tl.int32)
        if mask is not None:
            counts = tl.load(mask + first + lane, mask=exists, other=0) != 0
            if cu_seqlens is not None:
                counts = counts & (first + lane < counted)
        advantage = tl.load(advantages + first + lane, mask=exists, other=0)
        whitened = tl.where(counts, (advantage - high - low) * scale, 0.0)
        tl.store(advantages + first + lane, whitened, mask=exists)


@takes(GAEArguments)
def fused_gae(arguments: GAEArguments) -> tuple[Tensor, Tensor]:
    """`tlcr.ops.fused_gae` of checked arguments."""
    rewards, values, mask, gamma, lam, whiten, cu_seqlens = arguments
    dtype = arithmetic_dtype(rewards, values)
    advantages, returns = (torch.empty(rewards.shape, dtype=dtype, device=rewards.device) for _ in range(2))
    tokens = rewards.numel()
    if tokens == 0:
        return advantages, returns
    cu_seqlens = contiguous(cu_seqlens)
    given = rewards.contiguous(), values.contiguous(), contiguous(mask)
    if cu_seqlens is None:
        sequences, length = rewards.shape
        rows = sequences
        divided = plan(sequences, length, multiprocessors(rewards.device))
    else:
        sequences, length = cu_seqlens.shape[0] - 1, tokens
        rows = sequences + 1
        divided = plan(sequences, math.ceil(length / rows), multiprocessors(rewards.device), packed=True)
    tiles = triton.cdiv(length, divided.tile)
    programs = rows * tiles if divided.shared else triton.cdiv(rows, divided.rows)
    moments_P3 = rewards.new_empty((programs, 3), dtype=torch.float64) if whiten else None

    aligned = cu_seqlens is None and are_aligned(length, *given)
    of_all = {"TILE": divided.tile, "GROUP": GROUP, "WIDE": GROUP if aligned else 1}
    of_all |= OPTIONS if cu_seqlens is None else CHECKED
    written = advantages, returns, moments_P3
    with device_of(rewards):
        if divided.shared:
            maps = advantages.new_empty((2, programs))
            sizes = sequences, length, tiles, gamma, lam
            _maps_kernel.of(aligned)[(programs,)](*given, cu_seqlens, maps, *sizes, **of_all)
            _shared_kernel.of(aligned)[(programs,)](*given, cu_seqlens, maps, *written, *sizes, AHEAD=AHEAD, **of_all)
        else:
            scan = _gae_kernel.of(aligned)[(programs,)]
            scan(*given, cu_seqlens, *written, sequences, length, gamma, lam, ROWS=divided.rows, **of_all)
        if moments_P3 is not None:
            _whiten(advantages, given[2], cu_seqlens, moments_P3)
    return advantages, returns


def _whiten(advantages: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, moments_P3: Tensor) -> None:
    """Whitens in place, with the moments that the programs of the scan left."""
    if len(moments_P3) > MOMENTS_TILE:
        merged_Q3 = moments_P3.new_empty((triton.cdiv(len(moments_P3), MOMENTS_TILE), 3))
        merge = _merge_kernel[(len(merged_Q3),)]
        merge(moments_P3, merged_Q3, len(moments_P3), TILE=MOMENTS_TILE, **OPTIONS)
        moments_P3 = merged_Q3
    tokens = advantages.numel()
    programs = min(triton.cdiv(tokens, WHITEN_TILE), WHITEN_PROGRAMS * multiprocessors(advantages.device))
    _whiten_kernel.of(are_aligned(tokens, advantages, mask))[(programs,)](
        advantages,
        mask,
        cu_seqlens,
        moments_P3,
        len(moments_P3),
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        tokens,
        WHITEN_FLOOR * torch.finfo(advantages.dtype).eps,
        TILE=WHITEN_TILE,
        MOMENTS_TILE=MOMENTS_TILE,
        **OPTIONS,
    )
