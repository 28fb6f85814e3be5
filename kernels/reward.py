"""`fused_reward`: softmax, confidence, clip, KL and the terminal reward in one pass and one launch.

Bytes moved per counted token: C * sizeof(logits) + 1 for the mask + sizeof(kl) where it has a weight + sizeof(real)
written; 1 + sizeof(real) per masked token of which no neighbour counts. Two classes in float32 with a KL: 17. A
`terminal` adds one more byte of mask per token, read from the cache.
"""

import triton.language as tl
from torch import Tensor

from tlcr.kernels.launch import (
    any_of_group,
    are_aligned,
    below,
    contiguous,
    device_of,
    jit_aligned,
    launch_options,
    read,
    tiles_of,
)
from tlcr.ops._arithmetic import arithmetic_dtype
from tlcr.ops._spec import takes
from tlcr.ops.reward import RewardArguments

# Neighbouring tokens of a thread, by the bytes of a logit: the fastest on an H100 where both logits of a token are read
# by one access. Three logits are three accesses 6 bytes apart or more, of which more tokens would use less.
GROUPS = {2: 16, 4: 4, 8: 4}
GROUP_OF_THREE_CLASSES = 4
THREADS = 128
OPTIONS = launch_options(warps=4)
# The shortest tile. A shorter row leaves threads idle, but moves no byte more, and costs no compilation of its own.
SHORTEST = 128


@jit_aligned("length")
def _reward_kernel(
    logits_BTC: tl.tensor,
    mask_BT: tl.tensor,
    kl_BT: tl.tensor,
    terminal_B: tl.tensor,
    rewards_BT: tl.tensor,
    batch: tl.int64,
    length: tl.int64,
    temperature: tl.float64,
    scale: tl.float64,
    clip: tl.float64,
    kl_coef: tl.float64,
    band: tl.float64,
    CLASSES: tl.constexpr,
    DISCRETE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """One tile of `ROWS` rows per program; of several only where the tile holds them whole."""
    real: tl.constexpr = rewards_BT.dtype.element_ty
    program = tl.program_id(0)
    tiles = tl.cdiv(length, TILE).to(tl.int32)
    rows = (program // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = rows[:, None]
    start = (program % tiles).to(tl.int64) * TILE
    begin = row * length + start
    lane = tl.arange(0, TILE)[None, :]
    exists = below(tl.where(row < batch, length, 0) - start, TILE)
    counts = tl.load(mask_BT + begin + lane, mask=exists, other=0) != 0
    reads = any_of_group(counts, WIDE)

    if CLASSES == 2:
        # Both logits of a token by one access: two would each use half of the bytes that they move.
        element = tl.arange(0, 2 * TILE)[None, :]
        pairs = tl.load(logits_BTC + 2 * begin + element, mask=any_of_group(counts, WIDE, 2), other=0).to(real)
        negative, positive = tl.split(tl.reshape(pairs, (ROWS, TILE, 2)))
        negative = tl.where(counts, negative, 0.0)
        positive = tl.where(counts, positive, 0.0)
    else:
        negative = read(logits_BTC, 3 * (begin + lane), counts, reads, real)
        neutral = read(logits_BTC + 1, 3 * (begin + lane), counts, reads, real)
        positive = read(logits_BTC + 2, 3 * (begin + lane), counts, reads, real)
    # NaN, dropped by the maximum, comes back with the exponentials.
    largest = tl.maximum(negative, positive)
    if CLASSES == 3:
        largest = tl.maximum(largest, neutral)
    temperature = tl.full((), temperature, real)
    negative = tl.exp((negative - largest) / temperature)
    positive = tl.exp((positive - largest) / temperature)
    total = negative + positive
    if CLASSES == 3:
        total += tl.exp((neutral - largest) / temperature)
    confidence = (positive - negative) / total
    if DISCRETE:
        sign = (confidence > 0).to(real) - (confidence < 0).to(real)
        sign = tl.where(confidence == confidence, sign, confidence)  # NaN stays NaN
        confidence = tl.where(tl.abs(confidence) <= tl.full((), band, real), 0.0, sign)

    reward = tl.full((), scale, real) * confidence
    clip = tl.full((), clip, real)
    reward = tl.where(reward > clip, clip, tl.where(reward < -clip, -clip, reward))
    if kl_BT is not None:
        reward -= tl.full((), kl_coef, real) * read(kl_BT, begin + lane, counts, reads, real)
    reward = tl.where(counts, reward, 0.0)

    if terminal_B is not None:
        # The last counted token of the tile is that of the row if none after the tile counts. A tile searches only
        # to the next token that counts, and not at all if it has none itself: at most a second look at each mask.
        last = tl.max(tl.where(counts, lane, -1), axis=1, keep_dims=True)
        behind = 0
        if ROWS == 1:
            ahead = tl.where(tl.max(last) >= 0, start + TILE, length)
            while (ahead < length) & (behind == 0):
                within = lane < tl.minimum(length - ahead, TILE).to(tl.int32)
                mask = tl.load(mask_BT + row * length + ahead + lane, mask=within, other=0) != 0
                behind = tl.sum(mask.to(tl.int32))
                ahead += TILE
        terminal_of_row = tl.load(terminal_B + rows, mask=rows < batch, other=0).to(real)[:, None]
        reward += tl.where((lane == last) & (behind == 0), terminal_of_row, 0.0)
    tl.store(rewards_BT + begin + lane, reward, mask=exists)


@takes(RewardArguments)
def fused_reward(arguments: RewardArguments) -> Tensor:
    """`tlcr.ops.fused_reward` of checked arguments."""
    logits, mask, a = arguments
    rewards_BT = mask.new_empty(mask.shape, dtype=arithmetic_dtype(logits))
    if rewards_BT.numel() == 0:
        return rewards_BT
    kl = contiguous(a.kl) if a.kl_coef != 0 else None
    given = logits.contiguous(), mask.contiguous(), kl
    batch, length, classes = logits.shape
    group = GROUPS[logits.element_size()] if classes == 2 else GROUP_OF_THREE_CLASSES
    tokens = THREADS * group
    if a.terminal is None:
        # No token depends on another one: all are one row.
        batch, length = 1, batch * length
    tiles = tiles_of(length, tokens, shortest=tokens if a.terminal is None else SHORTEST)
    aligned = are_aligned(length, *given)
    with device_of(logits):
        _reward_kernel.of(aligned)[(tiles.programs(batch, length),)](
            *given,
            contiguous(a.terminal),
            rewards_BT,
            batch,
            length,
            a.temperature,
            a.scale,
            float("inf") if a.clip is None else a.clip,
            a.kl_coef,
            a.band,
            CLASSES=classes,
            DISCRETE=a.discrete,
            ROWS=tiles.rows,
            TILE=tiles.tile,
            WIDE=group if aligned else 1,
            **OPTIONS,
        )
    return rewards_BT
