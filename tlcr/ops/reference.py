"""The ops, specified in plain torch: the slow versions that every kernel is held to.

A convention that is not stated here or in the public docstrings of `tlcr.ops` does not exist. Arguments are checked by
the door, `tlcr.ops`; masks arrive as bool. Values at positions that do not count are replaced before any arithmetic,
because multiplying them by 0 afterwards keeps a NaN, in the result or in the gradient.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.optim.adamw import adamw

from tlcr.ops.types import PPOLoss

# A spread below this many rounding errors of the values' own size is rounding, not signal.
WHITEN_FLOOR = 16

# log r is capped here, far beyond any ratio that can be trained on: an infinite ratio times an advantage or a gradient
# of 0 would be NaN.
LOG_RATIO_MAX = 40.0

# Tokens of a discriminator's hidden states that are held in float32 at a time.
HIDDEN_ROWS = 4096


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any input is float64, else float32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products in the operands' own dtype: autocast would quietly round them to half precision."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@torch.no_grad()
def fused_reward(
    logits: Tensor,
    mask: Tensor,
    *,
    kl: Tensor | None,
    kl_coef: float,
    terminal: Tensor | None,
    temperature: float,
    scale: float,
    clip: float | None,
    kind: str,
    band: float,
) -> Tensor:
    dtype = arithmetic_dtype(logits)
    p_BTC = torch.softmax(torch.where(mask.unsqueeze(-1), logits.to(dtype), 0.0) / temperature, dim=-1)
    confidence_BT = p_BTC[..., -1] - p_BTC[..., 0]
    if kind == "discrete":
        confidence_BT = torch.where(confidence_BT.abs() <= band, 0.0, confidence_BT.sign())
    rewards_BT = scale * confidence_BT
    if clip is not None:
        rewards_BT = rewards_BT.clamp(-clip, clip)
    if kl is not None and kl_coef != 0:
        rewards_BT = rewards_BT - kl_coef * kl.to(dtype)
    rewards_BT = torch.where(mask, rewards_BT, 0.0)
    if terminal is not None:
        counted_from_here_BT = mask.flip(-1).cumsum(-1).flip(-1)
        last_BT = mask & (counted_from_here_BT == 1)
        rewards_BT = rewards_BT + torch.where(last_BT, terminal.to(dtype).unsqueeze(-1), 0.0)
    return rewards_BT


@torch.no_grad()
def reward_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None,
    kl: Tensor | None,
    kl_coef: float,
    terminal: Tensor | None,
    temperature: float,
    scale: float,
    clip: float | None,
    kind: str,
    band: float,
) -> Tensor:
    dtype = arithmetic_dtype(hidden, weight, bias)
    weight_HC = weight.to(dtype).t()
    rows = max(1, HIDDEN_ROWS // max(1, hidden.shape[1]))
    with no_autocast(hidden.device):
        logits_BTC = torch.cat([block_BTH.to(dtype) @ weight_HC for block_BTH in hidden.split(rows)])
    if bias is not None:
        logits_BTC = logits_BTC + bias.to(dtype)
    return fused_reward(
        logits_BTC,
        mask,
        kl=kl,
        kl_coef=kl_coef,
        terminal=terminal,
        temperature=temperature,
        scale=scale,
        clip=clip,
        kind=kind,
        band=band,
    )


@torch.no_grad()
def fused_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    gamma: float,
    lam: float,
    whiten: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = arithmetic_dtype(rewards, values)
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    if cu_seqlens is not None:
        mask = mask & _inside(cu_seqlens, mask.shape[0])
    rewards = torch.where(mask, rewards.to(dtype), 0.0)
    values = torch.where(mask, values.to(dtype), 0.0)
    if cu_seqlens is None:
        advantages = _padded_advantages(rewards, values, mask, gamma, lam)
    else:
        advantages = _packed_advantages(rewards, values, mask, gamma, lam, cu_seqlens)
    returns = torch.where(mask, advantages + values, 0.0)
    if whiten:
        advantages = _whiten(advantages, mask)
    return advantages, returns


def _padded_advantages(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> Tensor:
    advantages_BT = torch.zeros_like(rewards_BT)
    next_value_B = rewards_BT.new_zeros(rewards_BT.shape[0])
    next_advantage_B = next_value_B
    for t in reversed(range(rewards_BT.shape[1])):
        counts_B = mask_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        advantages_BT[:, t] = torch.where(counts_B, advantage_B, 0.0)
        next_value_B = torch.where(counts_B, values_BT[:, t], next_value_B)
        next_advantage_B = torch.where(counts_B, advantage_B, next_advantage_B)
    return advantages_BT


def _inside(cu_seqlens: Tensor, n: int) -> Tensor:
    """Which of n packed positions belong to a sequence at all."""
    position_N = torch.arange(n, device=cu_seqlens.device)
    return (position_N >= cu_seqlens[0]) & (position_N < cu_seqlens[-1])


def _packed_advantages(
    rewards_N: Tensor, values_N: Tensor, mask_N: Tensor, gamma: float, lam: float, cu_seqlens: Tensor
) -> Tensor:
    # The padded loop would need the longest length on the host, and so a wait for the device. As a scan over N the
    # recurrence needs none: a token that does not count hands on what stands behind it, a sequence's end hands on 0.
    n = rewards_N.shape[0]
    sequence_N = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(n, device=cu_seqlens.device), right=True)
    # The zero beyond the last token stands for "nothing follows".
    continues_N = torch.cat([sequence_N[1:] == sequence_N[:-1], sequence_N.new_zeros(min(n, 1), dtype=torch.bool)])
    value_from_here_N = _reverse_scan(values_N, torch.where(mask_N, 0.0, continues_N.to(values_N.dtype)))
    next_value_N = torch.where(continues_N, _shifted(value_from_here_N, 1), 0.0)
    delta_N = torch.where(mask_N, rewards_N + gamma * next_value_N - values_N, 0.0)
    # Not where(mask, gamma * lam, 1.0), which is float32 whatever the arithmetic.
    decay_N = torch.where(mask_N, torch.full_like(delta_N, gamma * lam), 1.0)
    decay_N = torch.where(continues_N, decay_N, 0.0)
    return torch.where(mask_N, _reverse_scan(delta_N, decay_N), 0.0)


def _reverse_scan(x_N: Tensor, decay_N: Tensor) -> Tensor:
    """y_i = x_i + decay_i y_{i+1}, by doubling: after k rounds y covers the 2^k terms from i on."""
    y_N = x_N
    shift = 1
    while shift < x_N.shape[0]:
        # Not decay * y alone: 0 * NaN would carry a broken sequence into its neighbour.
        y_N = y_N + torch.where(decay_N == 0, 0.0, decay_N * _shifted(y_N, shift))
        decay_N = decay_N * _shifted(decay_N, shift)
        shift *= 2
    return y_N


def _shifted(x_N: Tensor, by: int) -> Tensor:
    """x_{i + by}, and 0 beyond the end."""
    return torch.cat([x_N[by:], x_N.new_zeros(min(by, x_N.shape[0]))])


def _whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum().clamp(min=1)
    mean = advantages.sum() / count
    centred = torch.where(mask, advantages - mean, 0.0)
    # The mean itself is rounded; what is left of it is taken out of the small differences.
    centred = torch.where(mask, centred - centred.sum() / count, 0.0)
    deviation = (centred.square().sum() / count).sqrt()
    floor = WHITEN_FLOOR * torch.finfo(advantages.dtype).eps * mean.abs()
    return torch.where(deviation <= floor, torch.zeros_like(centred), centred / deviation)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    clip_high: float,
    dual_clip: float | None,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    value_clip: float | None,
    value_coef: float,
    entropy: Tensor | None,
    entropy_coef: float,
    kl: Tensor | None,
    kl_coef: float,
    aggregate: str,
    denominator: float | Tensor | None,
) -> PPOLoss:
    dtype = arithmetic_dtype(logprobs, old_logprobs, advantages, values, old_values, returns, entropy, kl)
    zero = torch.zeros((), dtype=dtype, device=logprobs.device)

    def counted(x_BT: Tensor) -> Tensor:
        return torch.where(mask, x_BT.to(dtype), 0.0)

    def mean(x_BT: Tensor) -> Tensor:
        count_B = mask.sum(dim=-1)
        if aggregate == "sequence":
            sums, count = x_BT.sum(dim=-1) / count_B.clamp(min=1), (count_B > 0).sum()
        else:
            sums, count = x_BT, count_B.sum()
        total = sums.sum()
        if denominator is None:
            return total / count.clamp(min=1)
        if isinstance(denominator, Tensor):
            return total / torch.where(denominator == 0, 1.0, denominator.detach().to(dtype))
        return total / denominator

    log_ratio_BT = (counted(logprobs) - counted(old_logprobs.detach())).clamp(max=LOG_RATIO_MAX)
    ratio_BT = log_ratio_BT.exp()
    advantages_BT = counted(advantages.detach())
    unclipped_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - clip, 1 + clip_high)
    # A choice and not a maximum, which would split the gradient at a tie: a tie takes the unclipped branch.
    is_clipped_BT = clipped_BT > unclipped_BT
    policy_BT = torch.where(is_clipped_BT, clipped_BT, unclipped_BT)
    if dual_clip is not None:
        bound_BT = -dual_clip * advantages_BT
        policy_BT = torch.where((advantages_BT < 0) & (policy_BT > bound_BT), bound_BT, policy_BT)
    policy = mean(policy_BT)
    loss = policy

    value, value_clip_fraction = zero, zero
    if values is not None and returns is not None:
        values_BT, returns_BT = counted(values), counted(returns.detach())
        value_loss_BT = (values_BT - returns_BT).square()
        if value_clip is not None and old_values is not None:
            old_values_BT = counted(old_values.detach())
            move_BT = values_BT - old_values_BT
            near_BT = old_values_BT + move_BT.clamp(-value_clip, value_clip)
            near_loss_BT = (near_BT - returns_BT).square()
            # A move within the bounds is not clipped, even if old + (new - old) rounds to another number than new.
            is_near_BT = (near_loss_BT > value_loss_BT) & (move_BT.abs() > value_clip)
            value_loss_BT = torch.where(is_near_BT, near_loss_BT, value_loss_BT)
            value_clip_fraction = mean(is_near_BT.to(dtype))
        value = 0.5 * mean(value_loss_BT)
        # A term with coefficient 0 is reported and left out: 0 times an infinite term would be NaN.
        loss = loss + value_coef * value if value_coef != 0 else loss

    mean_entropy = mean(counted(entropy)) if entropy is not None else zero
    if entropy_coef != 0:
        loss = loss - entropy_coef * mean_entropy
    mean_kl = mean(counted(kl)) if kl is not None else zero
    if kl_coef != 0:
        loss = loss + kl_coef * mean_kl

    with torch.no_grad():
        # expm1, because r - 1 loses every digit of a ratio near 1.
        approx_kl = mean(torch.expm1(log_ratio_BT) - log_ratio_BT)
        clip_fraction = mean(is_clipped_BT.to(dtype))
        ratio_max = torch.where(mask, ratio_BT, 0.0).amax() if mask.numel() else zero
    return PPOLoss(
        loss,
        policy.detach(),
        value.detach(),
        mean_entropy.detach(),
        mean_kl.detach(),
        clip_fraction,
        value_clip_fraction.detach(),
        approx_kl,
        ratio_max,
    )


@torch.no_grad()
def adamw_step(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    remainder: Tensor,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    master, gradient = join_master(parameter, remainder), grad.float()
    # torch's fused form takes its tensors for contiguous, and does not say so.
    fused = all(x.is_contiguous() and x.device.type in ("cpu", "cuda") for x in (master, gradient, exp_avg, exp_avg_sq))
    adamw(
        [master],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        max_exp_avg_sqs=[],
        state_steps=[torch.tensor(step - 1.0, device=master.device if fused else "cpu")],  # which torch increases
        fused=fused,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=learning_rate,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    split_master(master, parameter, remainder)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 whose upper half is nearly the weight's bits: nearly, as the remainder may be negative."""
    master = weight.float()
    master.view(torch.int32).add_(remainder)
    return master


def split_master(master: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """weight <- the bfloat16 nearest to master, of two the larger in magnitude; remainder <- what it lacks. A NaN lacks
    nothing: adding to its bits could make them those of a number."""
    bits = torch.where(master.isnan(), torch.nan, master).view(torch.int32)
    remainder.copy_(bits)  # the lower 16 bits, as a number from -2^15 to 2^15 - 1 ...
    weight.copy_((bits - remainder).view(torch.float32))  # ... without which the upper 16 are the nearest bfloat16


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    wide = x.to(arithmetic_dtype(x))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up
