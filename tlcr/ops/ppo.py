"""`ppo_loss`: the losses of PPO with a reward for every token."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tlcr.errors import ConfigError, ShapeError
from tlcr.ops import _checks
from tlcr.ops._arithmetic import arithmetic_dtype
from tlcr.ops._spec import Gradient, Impl, Op
from tlcr.ops.types import PPOLoss

# log r is capped here, far beyond any ratio that can be trained on: an infinite ratio times an advantage or a gradient
# of 0 would be NaN.
LOG_RATIO_MAX = 40.0


class PPOInputs(NamedTuple):
    """What both passes read."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    clip: float
    clip_high: float
    dual_clip: float | None
    values: Tensor | None
    old_values: Tensor | None
    returns: Tensor | None
    value_clip: float | None
    value_coef: float
    entropy: Tensor | None
    entropy_coef: float
    kl: Tensor | None
    kl_coef: float


class PPOArguments(NamedTuple):
    inputs: PPOInputs
    per_sequence: bool
    denominator: float | None
    denominator_tensor: Tensor | None


class PPOWithGradients(NamedTuple):
    forward: PPOArguments
    wants_logprobs: bool
    wants_values: bool
    wants_entropy: bool
    wants_kl: bool


class PPOBackward(NamedTuple):
    g_loss: Tensor
    row_weights: Tensor
    inputs: PPOInputs
    wants_logprobs: bool
    wants_values: bool
    wants_entropy: bool
    wants_kl: bool


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    value_clip: float | None = 0.2,
    value_coef: float = 1.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    aggregate: Literal["token", "sequence"] = "token",
    denominator: float | Tensor | None = None,
    impl: Impl = "auto",
) -> PPOLoss:
    """The clipped policy and value losses of PPO with a reward for every token, and their statistics.

    With r = exp(logprobs - old_logprobs) and A the advantages:

        policy = mean max(-A r, -A clamp(r, 1 - clip, 1 + clip_high)), and at most -dual_clip A where A < 0
        value = mean 0.5 max((V - R)^2, (V_old + clamp(V - V_old, -value_clip, value_clip) - R)^2)
        loss = policy + value_coef value - entropy_coef mean(entropy) + kl_coef mean(kl)
        approx_kl = mean(r - 1 - log r)

    mean is over all counted tokens ("token"), or over the rows that have any of each row's mean ("sequence"). With a
    `denominator` it is the sum of tokens, or of row means, over that number: the same for every part of a batch, so
    that losses and gradients of the parts add up to those of the whole.

    Gradients flow to logprobs, values, entropy and kl; everything else is a constant. At a tie of the two sides of a
    max the gradient is that of the unclipped side. A term whose coefficient is 0 is reported but takes no part in the
    loss. log r is capped at 40, so that an exploded ratio is large and not NaN. Sources: Schulman et al. 2017,
    arXiv:1707.06347; dual clip: Ye et al. 2020, arXiv:1912.09729; approx_kl: Schulman's k3.

    Args:
        logprobs: (B, T), of the policy that is trained, nats.
        old_logprobs: (B, T), of the policy that sampled.
        advantages: (B, T).
        mask: (B, T), True counts.
        clip: the ratio is clipped at 1 - clip, >= 0.
        clip_high: and at 1 + clip_high, >= 0; None: clip.
        dual_clip: bound c > 1 of the loss where A < 0; None: no bound.
        values: (B, T), V. Without it there is no value loss.
        old_values: (B, T), V at sampling time; needed with `values` unless `value_clip` is None.
        returns: (B, T), what V regresses to; needed with `values`.
        value_clip: how far V may move from V_old, > 0; None: no bound.
        value_coef: weight of the value loss.
        entropy: (B, T), nats, as from `score_tokens`.
        entropy_coef: its weight.
        kl: (B, T), nats, as from `score_tokens`.
        kl_coef: its weight.
        aggregate: "token" or "sequence".
        denominator: the global count of tokens or rows, a number > 0 or a tensor of one element (a tensor is not
            checked, and 0, where nothing counts anywhere, is taken as 1).
        impl: which implementation runs.

    Returns:
        `PPOLoss`: scalars on the device, float64 where an input (B, T) is, else float32; only `loss` has a gradient.

    Raises:
        ShapeError: a tensor has another shape, dtype, layout or device.
        ConfigError: a number is out of its range, or an argument that another needs is missing.
        BackendUnavailable: `impl` names one that cannot run here.
    """
    _checks.choice("ppo_loss", "aggregate", aggregate, ("token", "sequence"))
    inputs = PPOInputs(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip,
        clip if clip_high is None else clip_high,
        dual_clip,
        values,
        old_values,
        returns,
        value_clip,
        value_coef,
        entropy,
        entropy_coef,
        kl,
        kl_coef,
    )
    number, tensor = (None, denominator) if isinstance(denominator, Tensor) else (denominator, None)
    arguments = PPOArguments(inputs, aggregate == "sequence", number, tensor)
    device = _device_if_ready(arguments)
    if device is None:
        device, arguments = _checked(arguments)
    return PPO_LOSS(impl, device, arguments)


def _device_if_ready(arguments: PPOArguments) -> torch.device | None:
    """The device of the tensors if everything is as implementations take it. All that most calls pay for checks."""
    inputs, _, denominator, denominator_tensor = arguments
    (
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip,
        clip_high,
        dual_clip,
        values,
        old_values,
        returns,
        value_clip,
        value_coef,
        entropy,
        entropy_coef,
        kl,
        kl_coef,
    ) = inputs
    if not isinstance(logprobs, Tensor) or old_logprobs is None or advantages is None:
        return None
    shape, device = logprobs.shape, logprobs.device
    ready = (
        len(shape) == 2
        and _checks.alike(shape, device, logprobs, old_logprobs, advantages, values, old_values, returns, entropy, kl)
        and _checks.is_mask(shape, device, mask)
        and type(clip) is type(clip_high) is type(value_coef) is type(entropy_coef) is type(kl_coef) is float
        and clip >= 0.0
        and clip_high >= 0.0
        # A sum is finite only where each of its terms is. torch.compile cannot trace math.isfinite.
        and -math.inf < clip + clip_high + value_coef + entropy_coef + kl_coef < math.inf
        and (dual_clip is None or (type(dual_clip) is float and 1.0 < dual_clip < math.inf))
        and (value_clip is None or (type(value_clip) is float and value_clip > 0.0))
        and (
            (old_values is None and returns is None)
            if values is None
            else (returns is not None and (value_clip is None or old_values is not None))
        )
        and (entropy is not None or entropy_coef == 0.0)
        and (kl is not None or kl_coef == 0.0)
        and (denominator is None or (type(denominator) is float and 0.0 < denominator < math.inf))
        and denominator_tensor is None
    )
    return device if ready else None


def _checked(arguments: PPOArguments) -> tuple[torch.device, PPOArguments]:
    """Raises what is wrong, or brings the arguments into the form that implementations take."""
    op = "ppo_loss"
    a, per_sequence, denominator, denominator_tensor = arguments
    for name, required in (("logprobs", a.logprobs), ("old_logprobs", a.old_logprobs), ("advantages", a.advantages)):
        _checks.dense(op, name, required)
    per_token = {
        "old_logprobs": a.old_logprobs,
        "advantages": a.advantages,
        "values": a.values,
        "old_values": a.old_values,
        "returns": a.returns,
        "entropy": a.entropy,
        "kl": a.kl,
    }
    _checks.floating(op, logprobs=a.logprobs, **per_token)
    _checks.axes(op, "logprobs", a.logprobs, "B, T")
    _checks.same_shape(op, a.logprobs.shape, "logprobs", **per_token)
    a = a._replace(
        mask=_checks.bool_mask(op, a.mask, a.logprobs.shape, "logprobs"),
        clip=_checks.number(op, "clip", a.clip, least=0),
        clip_high=_checks.number(op, "clip_high", a.clip_high, least=0),
        dual_clip=None if a.dual_clip is None else _checks.number(op, "dual_clip", a.dual_clip, above=1),
        value_clip=(
            None if a.value_clip is None else _checks.number(op, "value_clip", a.value_clip, above=0, finite=False)
        ),
        value_coef=_checks.number(op, "value_coef", a.value_coef),
        entropy_coef=_checks.number(op, "entropy_coef", a.entropy_coef),
        kl_coef=_checks.number(op, "kl_coef", a.kl_coef),
    )
    if a.values is None and (a.old_values is not None or a.returns is not None):
        raise ConfigError(f"{op}: old_values or returns is given but values is missing; pass values or neither")
    if a.values is not None and a.returns is None:
        raise ConfigError(f"{op}: values is given but returns is missing; pass the returns that fused_gae gives")
    if a.values is not None and a.value_clip is not None and a.old_values is None:
        raise ConfigError(f"{op}: value_clip is {a.value_clip:g} but old_values is missing; pass it or value_clip=None")
    for name, coefficient, tensor in (("entropy", a.entropy_coef, a.entropy), ("kl", a.kl_coef, a.kl)):
        if coefficient != 0 and tensor is None:
            raise ConfigError(f"{op}: {name}_coef is {coefficient:g} but {name} is missing; pass it or {name}_coef=0")
    if denominator_tensor is not None:
        _checks.dense(op, "denominator", denominator_tensor)
        if denominator_tensor.numel() != 1:
            raise ShapeError(f"{op}: denominator has shape {tuple(denominator_tensor.shape)}, wanted one element")
        denominator_tensor = denominator_tensor.reshape(())
    elif denominator is not None:
        denominator = _checks.number(op, "denominator", denominator, above=0)
    device = _checks.same_device(op, logprobs=a.logprobs, mask=a.mask, denominator=denominator_tensor, **per_token)
    return device, PPOArguments(a, per_sequence, denominator, denominator_tensor)


def _reference(arguments: PPOArguments) -> PPOLoss:
    a, per_sequence, denominator, denominator_tensor = arguments
    dtype, mask = _dtype(a), a.mask
    zero = torch.zeros((), dtype=dtype, device=mask.device)

    def counted(x_BT: Tensor) -> Tensor:
        return torch.where(mask, x_BT.to(dtype), 0.0)

    def mean(x_BT: Tensor) -> Tensor:
        count_B = mask.sum(dim=-1)
        if per_sequence:
            sums, count = x_BT.sum(dim=-1) / count_B.clamp(min=1), (count_B > 0).sum()
        else:
            sums, count = x_BT, count_B.sum()
        total = sums.sum()
        if denominator is not None:
            return total / denominator
        if denominator_tensor is not None:
            return total / torch.where(denominator_tensor == 0, 1.0, denominator_tensor.detach().to(dtype))
        return total / count.clamp(min=1)

    log_ratio_BT = counted(a.logprobs) - counted(a.old_logprobs.detach())
    # At the bound itself the gradient passes: clamp's passes there in torch 2.13 and no longer in 2.15.
    log_ratio_BT = torch.where(log_ratio_BT == LOG_RATIO_MAX, log_ratio_BT, log_ratio_BT.clamp(max=LOG_RATIO_MAX))
    ratio_BT = log_ratio_BT.exp()
    advantages_BT = counted(a.advantages.detach())
    unclipped_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - a.clip, 1 + a.clip_high)
    # Not torch.maximum, which would split the gradient at a tie: here a tie takes the unclipped branch.
    is_clipped_BT = clipped_BT > unclipped_BT
    policy_BT = torch.where(is_clipped_BT, clipped_BT, unclipped_BT)
    if a.dual_clip is not None:
        bound_BT = -a.dual_clip * advantages_BT
        policy_BT = torch.where((advantages_BT < 0) & (policy_BT > bound_BT), bound_BT, policy_BT)
    policy = mean(policy_BT)
    loss = policy

    value, value_clip_fraction = zero, zero
    if a.values is not None and a.returns is not None:
        values_BT, returns_BT = counted(a.values), counted(a.returns.detach())
        value_loss_BT = (values_BT - returns_BT).square()
        if a.value_clip is not None and a.old_values is not None:
            old_values_BT = counted(a.old_values.detach())
            move_BT = values_BT - old_values_BT
            near_BT = old_values_BT + move_BT.clamp(-a.value_clip, a.value_clip)
            near_loss_BT = (near_BT - returns_BT).square()
            # A move within the bounds is not clipped, even if old + (new - old) rounds to another number than new.
            is_near_BT = (near_loss_BT > value_loss_BT) & (move_BT.abs() > a.value_clip)
            value_loss_BT = torch.where(is_near_BT, near_loss_BT, value_loss_BT)
            value_clip_fraction = mean(is_near_BT.to(dtype))
        value = 0.5 * mean(value_loss_BT)
        # A term with coefficient 0 is reported and left out: 0 times an infinite term would be NaN.
        loss = loss + a.value_coef * value if a.value_coef != 0 else loss

    mean_entropy = mean(counted(a.entropy)) if a.entropy is not None else zero
    if a.entropy_coef != 0:
        loss = loss - a.entropy_coef * mean_entropy
    mean_kl = mean(counted(a.kl)) if a.kl is not None else zero
    if a.kl_coef != 0:
        loss = loss + a.kl_coef * mean_kl

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


def _fake(arguments: PPOArguments) -> tuple[Tensor, ...]:
    mask = arguments.inputs.mask
    shapes = ((), (len(PPOLoss._fields),), mask.shape[:1])
    return tuple(mask.new_empty(shape, dtype=_dtype(arguments.inputs)) for shape in shapes)


def _dtype(inputs: PPOInputs) -> torch.dtype:
    return arithmetic_dtype(*(value for value in inputs if isinstance(value, Tensor)))


PPO_LOSS = Op(
    door=ppo_loss,
    arguments=PPOArguments,
    results=("loss", "stats", "row_weights"),
    reference=_reference,
    fake=_fake,
    result=lambda arguments, results: PPOLoss(results[0], *results[1].unbind()[1:]),
    gradient=Gradient(
        of=("logprobs", "values", "entropy", "kl"),
        arguments=PPOBackward,
        absent="row_weights",
        with_results=PPOWithGradients,
    ),
    cpp=True,
    triton="tlcr.kernels.ppo_loss",
)
