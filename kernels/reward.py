"""`fused_reward`: softmax, confidence, clip, KL and the terminal reward in one pass and one launch.

Bytes moved per counted token: C * sizeof(logits) + 1 for the mask + sizeof(kl) where it has a weight + sizeof(real)
written; per masked token 1 + sizeof(real). Two classes in float32 with a KL: 17. A `terminal` adds one more byte of
mask per token, read from the cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from tlcr.kernels.launch import contiguous, device_of, jit, launch_options
from tlcr.ops._arithmetic import arithmetic_dtype
from tlcr.ops._spec import takes
from tlcr.ops.reward import RewardArguments

# Tokens per program: 4 to each thread, so that the loads of a warp overlap, and programs enough to occupy a GPU from
# 64 rows of 1024 tokens on.
TILE = 512
OPTIONS = launch_options(warps=4)


@jit
def _reward_kernel(
    logits_BTC: tl.tensor,
    mask_BT: tl.tensor,
    kl_BT: tl.tensor,
    terminal_B: tl.tensor,
    rewards_BT: tl.tensor,
    length: tl.int64,
    tiles: tl.int64,
    temperature: tl.float64,
    scale: tl.float64,
    clip: tl.float64,
    kl_coef: tl.float64,
    band: tl.float64,
    CLASSES: tl.constexpr,
    DISCRETE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One tile of one row per program."""
    real: tl.constexpr = rewards_BT.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) // tiles
    start = tl.program_id(0).to(tl.int64) % tiles * TILE
    row_begin = row * length
    begin = row_begin + start
    lane = tl.arange(0, TILE)
    exists = lane < tl.minimum(length - start, TILE).to(tl.int32)
    counts = tl.load(mask_BT + begin + lane, mask=exists, other=0) != 0

    logits = logits_BTC + begin * CLASSES + lane * CLASSES
    negative = tl.load(logits, mask=counts, other=0).to(real)
    positive = tl.load(logits + (CLASSES - 1), mask=counts, other=0).to(real)
    # NaN, dropped by the maximum, comes back with the exponentials.
    largest = tl.maximum(negative, positive)
    if CLASSES == 3:
        neutral = tl.load(logits + 1, mask=counts, other=0).to(real)
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
        confidence = tl.where(tl.abs(confidence) <= tl.full((), band, real), 0.0, sign)

    reward = tl.full((), scale, real) * confidence
    clip = tl.full((), clip, real)
    reward = tl.where(reward > clip, clip, tl.where(reward < -clip, -clip, reward))
    if kl_BT is not None:
        reward -= tl.full((), kl_coef, real) * tl.load(kl_BT + begin + lane, mask=counts, other=0).to(real)
    reward = tl.where(counts, reward, 0.0)

    if terminal_B is not None:
        # The last counted token of the tile is that of the row if none after the tile counts. A tile searches only
        # to the next token that counts, and not at all if it has none itself: at most a second look at each mask.
        last = tl.max(tl.where(counts, lane, -1), axis=0)
        ahead = tl.where(last >= 0, start + TILE, length)
        behind = 0
        while (ahead < length) & (behind == 0):
            within = lane < tl.minimum(length - ahead, TILE).to(tl.int32)
            mask = tl.load(mask_BT + row_begin + ahead + lane, mask=within, other=0) != 0
            behind = tl.sum(mask.to(tl.int32), axis=0)
            ahead += TILE
        is_last = (lane == last) & (behind == 0)
        reward += tl.where(is_last, tl.load(terminal_B + row).to(real), 0.0)
    tl.store(rewards_BT + begin + lane, reward, mask=exists)


@takes(RewardArguments)
def fused_reward(arguments: RewardArguments) -> Tensor:
    """`tlcr.ops.fused_reward` of checked arguments."""
    logits, mask, a = arguments
    rewards_BT = mask.new_empty(mask.shape, dtype=arithmetic_dtype(logits))
    if rewards_BT.numel() == 0:
        return rewards_BT
    batch, length, classes = logits.shape
    tiles = triton.cdiv(length, TILE)
    with device_of(logits):
        _reward_kernel[(batch * tiles,)](
            logits.contiguous(),
            mask.contiguous(),
            contiguous(a.kl) if a.kl_coef != 0 else None,
            contiguous(a.terminal),
            rewards_BT,
            length,
            tiles,
            a.temperature,
            a.scale,
            float("inf") if a.clip is None else a.clip,
            a.kl_coef,
            a.band,
            CLASSES=classes,
            DISCRETE=a.discrete,
            TILE=TILE,
            **OPTIONS,
        )
    return rewards_BT
