"""`fused_gae`: generalised advantage estimation."""

from typing import NamedTuple

import torch
from torch import Tensor

from tlcr.errors import ShapeError
from tlcr.ops import _checks
from tlcr.ops._arithmetic import arithmetic_dtype
from tlcr.ops._spec import Impl, Op

# A deviation below this many rounding errors of the mean comes from rounding alone.
WHITEN_FLOOR = 16


class GAEArguments(NamedTuple):
    rewards: Tensor
    values: Tensor
    mask: Tensor | None
    gamma: float
    lam: float
    whiten: bool
    cu_seqlens: Tensor | None


def fused_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = False,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the counted tokens of every row.

        delta_t = r_t + gamma V_next - V_t        A_t = delta_t + gamma lam A_next        returns_t = A_t + V_t

    where next is the next counted token of the row, and V and A are 0 after the last one: tokens that do not count
    (tool output inside an answer, padding) are skipped, not treated as zeros. Both results are 0 where not counted.

    `whiten` turns the advantages, after the returns are taken, into zero mean and unit population variance over all
    counted tokens. Advantages that are equal but for rounding (a deviation below 16 eps of their mean) become 0.
    Source: Schulman et al. 2016, arXiv:1506.02438.

    Args:
        rewards: (B, T), or packed (N,) with `cu_seqlens`.
        values: the same shape, V of the state in which each token was chosen.
        mask: the same shape, True counts; None: all count.
        gamma: discount, 0 to 1.
        lam: lambda, 0 to 1.
        whiten: whether to whiten the advantages.
        cu_seqlens: (B + 1,) int32, the cumulative lengths: sequence b is [cu_seqlens[b], cu_seqlens[b + 1]) of the
            packed axis. It begins with 0, never descends and ends at N or before; tokens behind the last sequence do
            not count. Other offsets raise on the CPU and fail a device assertion elsewhere.
        impl: which implementation runs.

    Returns:
        `(advantages, returns)` in the shape of `rewards`, without gradients: float64 where an input is, else float32.

    Raises:
        ShapeError: a tensor has another shape, dtype or device.
        DataError: cu_seqlens are not cumulative lengths within N.
        ConfigError: gamma or lam lies outside [0, 1].
        BackendUnavailable: `impl` names one that cannot run here.
    """
    arguments = GAEArguments(rewards, values, mask, gamma, lam, bool(whiten), cu_seqlens)
    device = _device_if_ready(arguments)
    if device is None:
        device, arguments = _checked(arguments)
    return FUSED_GAE(impl, device, arguments)


def _device_if_ready(a: GAEArguments) -> torch.device | None:
    """The device of the tensors if everything is as implementations take it. All that most calls pay for checks."""
    rewards, values, mask, gamma, lam, _, cu_seqlens = a
    if cu_seqlens is not None or not isinstance(rewards, Tensor) or type(gamma) is not float or type(lam) is not float:
        return None
    shape, device = rewards.shape, rewards.device
    ready = (
        len(shape) == 2
        and values is not None
        and _checks.alike(shape, device, rewards, values)
        and (mask is None or _checks.is_mask(shape, device, mask))
        and 0.0 <= gamma <= 1.0
        and 0.0 <= lam <= 1.0
    )
    return device if ready else None


def _checked(a: GAEArguments) -> tuple[torch.device, GAEArguments]:
    """Raises what is wrong, or brings the arguments into the form that implementations take."""
    op = "fused_gae"
    rewards, mask = a.rewards, a.mask
    for name, required in (("rewards", rewards), ("values", a.values)):
        _checks.dense(op, name, required)
    _checks.floating(op, rewards=rewards, values=a.values)
    if a.cu_seqlens is None:
        if rewards.ndim != 2:
            raise ShapeError(
                f"{op}: rewards has shape {tuple(rewards.shape)}, wanted (B, T), or packed (N,) with cu_seqlens"
            )
    else:
        _checks.axes(op, "rewards (with cu_seqlens)", rewards, "N")
        _checks.cumulative_lengths(op, a.cu_seqlens)
    _checks.same_shape(op, rewards.shape, "rewards", values=a.values)
    if mask is not None:
        mask = _checks.bool_mask(op, mask, rewards.shape, "rewards")
    device = _checks.same_device(op, rewards=rewards, values=a.values, mask=mask, cu_seqlens=a.cu_seqlens)
    gamma = _checks.number(op, "gamma", a.gamma, least=0, most=1)
    lam = _checks.number(op, "lam", a.lam, least=0, most=1)
    return device, a._replace(mask=mask, gamma=gamma, lam=lam)


def _read(a: GAEArguments) -> None:
    if a.cu_seqlens is not None:
        _checks.offsets_within("fused_gae", a.cu_seqlens, a.rewards.shape[0])


@torch.no_grad()
def _reference(arguments: GAEArguments) -> tuple[Tensor, Tensor]:
    rewards, values, mask, gamma, lam, whiten, cu_seqlens = arguments
    dtype = arithmetic_dtype(rewards, values)
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    if cu_seqlens is not None:
        torch._assert_async(
            _ascends(cu_seqlens, mask.shape[0]), "fused_gae: cu_seqlens must ascend from 0 to at most N"
        )
        mask = mask & (torch.arange(mask.shape[0], device=mask.device) < cu_seqlens[-1])
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


def _ascends(cu_seqlens: Tensor, n: int) -> Tensor:
    """Whether the offsets begin with 0, never descend and end at n or before; on their device."""
    return (cu_seqlens[0] == 0) & (cu_seqlens.diff() >= 0).all() & (cu_seqlens[-1] <= n)


def _packed_advantages(
    rewards_N: Tensor, values_N: Tensor, mask_N: Tensor, gamma: float, lam: float, cu_seqlens: Tensor
) -> Tensor:
    # The padded loop would need the longest length on the host, and so a wait for the device. As a scan over N the
    # recurrence needs none: a token that does not count passes on what it gets from the token after it, and the end
    # of a sequence passes on 0.
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
    # The mean itself is rounded; its rounding error is subtracted from the small differences.
    centred = torch.where(mask, centred - centred.sum() / count, 0.0)
    deviation = (centred.square().sum() / count).sqrt()
    floor = WHITEN_FLOOR * torch.finfo(advantages.dtype).eps * mean.abs()
    whitened = torch.where(deviation <= floor, torch.zeros_like(centred), centred / deviation)
    # A deviation that is NaN or infinite is that of the counted advantages, and stays with them.
    return torch.where(mask, whitened, 0.0)


def _fake(arguments: GAEArguments) -> tuple[Tensor, Tensor]:
    rewards = arguments.rewards
    dtype = arithmetic_dtype(rewards, arguments.values)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


FUSED_GAE = Op(
    door=fused_gae,
    arguments=GAEArguments,
    results=("advantages", "returns"),
    reference=_reference,
    fake=_fake,
    read=_read,
    cpp=True,
    triton="tlcr.kernels.gae",
)
