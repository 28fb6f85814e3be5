"""The dense reward of every token: `fused_reward` from a discriminator's logits, `reward_from_hidden` from its hidden
states, in one step."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tlcr.errors import ConfigError, ShapeError
from tlcr.ops import _checks
from tlcr.ops._arithmetic import arithmetic_dtype, no_autocast
from tlcr.ops._spec import Impl, Op

# Tokens of a discriminator's hidden states that are held in float32 at a time.
HIDDEN_ROWS = 4096


class RewardOptions(NamedTuple):
    """The options that turn the classes' probabilities into a reward."""

    kl: Tensor | None
    kl_coef: float
    terminal: Tensor | None
    temperature: float
    scale: float
    clip: float | None
    discrete: bool
    band: float


class RewardArguments(NamedTuple):
    logits: Tensor
    mask: Tensor
    options: RewardOptions


class HiddenRewardArguments(NamedTuple):
    hidden: Tensor
    weight: Tensor
    mask: Tensor
    bias: Tensor | None
    options: RewardOptions


def fused_reward(
    logits: Tensor,
    mask: Tensor,
    *,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    terminal: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    clip: float | None = None,
    kind: Literal["continuous", "discrete"] = "continuous",
    band: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """The dense reward of every token, from the logits of a token discriminator.

    With p = softmax(logits / temperature) and c = p_positive - p_negative, which is 2p - 1 for two classes:

        r_t = clamp(scale * c_t, -clip, clip) - kl_coef * kl_t        and 0 where masked out

    and `terminal[b]` is added at the last counted token of row b. In a row with no counted token it is dropped. For
    `kind="discrete"`, c becomes 0 where |c| <= band and its sign elsewhere. A counted token whose c is NaN has
    the reward NaN, whatever the kind.
    Source: TLCR, the paper's equation for the token reward.

    Args:
        logits: (B, T, 2) in the order [negative, positive], or (B, T, 3) [negative, neutral, positive].
        mask: (B, T), True counts.
        kl: (B, T) penalty per token, nats; the sampled log-ratio or a full KL. Not read while `kl_coef` is 0.
        kl_coef: weight of `kl`.
        terminal: (B,) reward of the whole answer.
        temperature: calibration temperature of the discriminator, > 0.
        scale: factor on c.
        clip: bound on |scale * c|, > 0; None: no bound.
        kind: "continuous" or "discrete".
        band: for "discrete" only, 0 <= band <= 1.
        impl: which implementation runs.

    Returns:
        rewards (B, T), without a gradient: float64 where the logits are, else float32, whatever dtype `kl` and
        `terminal` have.

    Raises:
        ShapeError: a tensor has another shape, dtype, layout or device.
        ConfigError: a number is out of its range, or an argument that another needs is missing.
        BackendUnavailable: `impl` names one that cannot run here.
    """
    _checks.choice("fused_reward", "kind", kind, ("continuous", "discrete"))
    options = RewardOptions(kl, kl_coef, terminal, temperature, scale, clip, kind == "discrete", band)
    device = _device_if_ready(logits, mask, options)
    if device is None:
        device, logits, mask, options = _checked(logits, mask, options)
    return FUSED_REWARD(impl, device, RewardArguments(logits, mask, options))


def _device_if_ready(logits: Tensor, mask: Tensor, options: RewardOptions) -> torch.device | None:
    """The device of the tensors if everything is as implementations take it. All that most calls pay for checks."""
    if not isinstance(logits, Tensor) or not isinstance(mask, Tensor):
        return None
    shape, shape_BT, device = logits.shape, mask.shape, logits.device
    ready = (
        logits.ndim == 3
        and shape[:-1] == shape_BT
        and 2 <= shape[-1] <= 3
        and _checks.alike(shape, device, logits)
        and _checks.is_mask(shape_BT, device, mask)
        and _options_are_ready(options, shape_BT, device)
    )
    return device if ready else None


def _checked(
    logits: Tensor, mask: Tensor, options: RewardOptions
) -> tuple[torch.device, Tensor, Tensor, RewardOptions]:
    """Raises what is wrong, or brings the arguments into the form that implementations take."""
    op = "fused_reward"
    _checks.floating(op, logits=logits)
    _checks.axes(op, "logits", logits, "B, T, C")
    if logits.shape[-1] not in (2, 3):
        raise ShapeError(
            f"{op}: logits has shape {tuple(logits.shape)}, wanted (B, T, 2) [negative, positive] "
            "or (B, T, 3) [negative, neutral, positive]"
        )
    shape_BT = logits.shape[:-1]
    mask = _checks.bool_mask(op, mask, shape_BT, "logits' first two axes")
    options = _checked_options(op, options, shape_BT)
    device = _checks.same_device(op, logits=logits, mask=mask, kl=options.kl, terminal=options.terminal)
    return device, logits, mask, options


@torch.no_grad()
def _reference(arguments: RewardArguments) -> Tensor:
    logits, mask, a = arguments
    dtype = arithmetic_dtype(logits)
    p_BTC = torch.softmax(torch.where(mask.unsqueeze(-1), logits.to(dtype), 0.0) / a.temperature, dim=-1)
    confidence_BT = p_BTC[..., -1] - p_BTC[..., 0]
    if a.discrete:
        sign_BT = torch.where(confidence_BT.isnan(), confidence_BT, confidence_BT.sign())  # of NaN, torch's is 0
        confidence_BT = torch.where(confidence_BT.abs() <= a.band, 0.0, sign_BT)
    rewards_BT = a.scale * confidence_BT
    if a.clip is not None:
        rewards_BT = rewards_BT.clamp(-a.clip, a.clip)
    if a.kl is not None and a.kl_coef != 0:
        rewards_BT = rewards_BT - a.kl_coef * a.kl.to(dtype)
    rewards_BT = torch.where(mask, rewards_BT, 0.0)
    if a.terminal is not None:
        counted_from_here_BT = mask.flip(-1).cumsum(-1).flip(-1)
        last_BT = mask & (counted_from_here_BT == 1)
        rewards_BT = rewards_BT + torch.where(last_BT, a.terminal.to(dtype).unsqueeze(-1), 0.0)
    return rewards_BT


def _fake(arguments: RewardArguments) -> Tensor:
    mask = arguments.mask
    return mask.new_empty(mask.shape, dtype=arithmetic_dtype(arguments.logits))


FUSED_REWARD = Op(
    door=fused_reward,
    arguments=RewardArguments,
    results=("rewards",),
    reference=_reference,
    fake=_fake,
    cpp=True,
    triton="tlcr.kernels.reward",
)


def reward_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    terminal: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    clip: float | None = None,
    kind: Literal["continuous", "discrete"] = "continuous",
    band: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """`fused_reward(hidden @ weight.T + bias, mask, ...)`: the discriminator's head and the reward in one step.

    Args:
        hidden: (B, T, H), the discriminator's last hidden states.
        weight: (2, H) or (3, H), the classes in the order of `fused_reward`.
        mask: (B, T), True counts.
        bias: (2,) or (3,).
        kl: as in `fused_reward`.
        kl_coef: as in `fused_reward`.
        terminal: as in `fused_reward`.
        temperature: as in `fused_reward`.
        scale: as in `fused_reward`.
        clip: as in `fused_reward`.
        kind: as in `fused_reward`.
        band: as in `fused_reward`.
        impl: as in `fused_reward`.

    Returns:
        rewards (B, T), without a gradient: float64 where hidden states, weight or bias are, else float32.

    Raises:
        ShapeError: a tensor has another shape, dtype, layout or device.
        ConfigError: as for `fused_reward`.
        BackendUnavailable: `impl` names one that cannot run here.
    """
    op = "reward_from_hidden"
    _checks.choice(op, "kind", kind, ("continuous", "discrete"))
    _checks.floating(op, hidden=hidden, weight=weight, bias=bias)
    _checks.axes(op, "hidden", hidden, "B, T, H")
    _checks.dense(op, "weight", weight)
    if weight.ndim != 2 or weight.shape[0] not in (2, 3) or weight.shape[1] != hidden.shape[-1]:
        raise ShapeError(
            f"{op}: weight has shape {tuple(weight.shape)}, wanted (2, {hidden.shape[-1]}) [negative, positive] "
            f"or (3, {hidden.shape[-1]}) [negative, neutral, positive]"
        )
    _checks.same_shape(op, weight.shape[:1], "weight's classes", "pass the bias of that head", bias=bias)
    shape_BT = hidden.shape[:-1]
    mask = _checks.bool_mask(op, mask, shape_BT, "hidden's first two axes")
    options = RewardOptions(kl, kl_coef, terminal, temperature, scale, clip, kind == "discrete", band)
    options = _checked_options(op, options, shape_BT)
    device = _checks.same_device(op, hidden=hidden, weight=weight, bias=bias, mask=mask, kl=kl, terminal=terminal)
    return REWARD_FROM_HIDDEN(impl, device, HiddenRewardArguments(hidden, weight, mask, bias, options))


@torch.no_grad()
def _reference_from_hidden(arguments: HiddenRewardArguments) -> Tensor:
    hidden, weight, mask, bias, options = arguments
    dtype = arithmetic_dtype(hidden, weight, bias)
    weight_HC = weight.to(dtype).t()
    rows = max(1, HIDDEN_ROWS // max(1, hidden.shape[1]))
    with no_autocast(hidden.device):
        logits_BTC = torch.cat([block_BTH.to(dtype) @ weight_HC for block_BTH in hidden.split(rows)])
    if bias is not None:
        logits_BTC = logits_BTC + bias.to(dtype)
    return _reference(RewardArguments(logits_BTC, mask, options))


def _fake_from_hidden(arguments: HiddenRewardArguments) -> Tensor:
    hidden, weight, mask, bias, _ = arguments
    return mask.new_empty(mask.shape, dtype=arithmetic_dtype(hidden, weight, bias))


REWARD_FROM_HIDDEN = Op(
    door=reward_from_hidden,
    arguments=HiddenRewardArguments,
    results=("rewards",),
    reference=_reference_from_hidden,
    fake=_fake_from_hidden,
    cpp=True,
    cuda=True,
)


def _options_are_ready(a: RewardOptions, shape_BT: torch.Size, device: torch.device) -> bool:
    kl, kl_coef, terminal, temperature, scale, clip, discrete, band = a
    return (
        type(kl_coef) is type(temperature) is type(scale) is type(band) is float
        and -math.inf < kl_coef < math.inf
        and 0.0 < temperature < math.inf
        and -math.inf < scale < math.inf
        and (band == 0.0 or (discrete and 0.0 < band <= 1.0))
        and (clip is None or (type(clip) is float and clip > 0.0))
        and (_checks.alike(shape_BT, device, kl) if kl is not None else kl_coef == 0.0)
        and (terminal is None or _checks.alike(shape_BT[:1], device, terminal))
    )


def _checked_options(op: str, a: RewardOptions, shape_BT: torch.Size) -> RewardOptions:
    """The options of both ops, checked, with numbers as float."""
    _checks.floating(op, kl=a.kl, terminal=a.terminal)
    _checks.same_shape(op, shape_BT, "mask", kl=a.kl)
    _checks.same_shape(op, shape_BT[:1], "the batch axis", "pass one value for each answer", terminal=a.terminal)
    options = RewardOptions(
        a.kl,
        _checks.number(op, "kl_coef", a.kl_coef),
        a.terminal,
        _checks.number(op, "temperature", a.temperature, above=0),
        _checks.number(op, "scale", a.scale),
        None if a.clip is None else _checks.number(op, "clip", a.clip, above=0, finite=False),
        a.discrete,
        _checks.number(op, "band", a.band, least=0, most=1),
    )
    if options.kl is None and options.kl_coef != 0:
        raise ConfigError(f"{op}: kl_coef is {options.kl_coef:g} but kl is missing; pass kl (B, T) or kl_coef=0")
    if options.band != 0 and not options.discrete:
        raise ConfigError(f"{op}: band is {options.band:g} but kind is 'continuous'; pass kind='discrete' or band=0")
    return options
