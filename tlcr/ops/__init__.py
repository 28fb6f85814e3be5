"""The one door to tlcr's arithmetic. Nothing outside this package reaches an implementation in any other way.

Axes: B batch, T response tokens, V vocabulary, H hidden, C classes, N packed tokens. Index t of every (B, T) value
belongs to the action that emitted response token t. A mask is True where a token counts (an integer mask counts where
it is not 0); what stands where it does not count, NaN included, never reaches a result or a gradient. B = 0, T = 0, any
strides and rows with nothing counted are legal. KL, entropy and log-probabilities are in nats.

Arithmetic and results are float64 where any input is float64 (of a reward: the logits, or what makes them), else
float32; gradients come back in the dtype of their input. The ops do not wait for the device. `impl` names an
implementation: "auto" takes the best one that can run, "reference" is the specification in plain torch, and
`available()` lists the rest. Every op raises, beside what its own docstring says, `ShapeError` for a tensor of the
wrong shape, dtype or device, `ConfigError` for an option out of bounds or one that does not apply, and
`BackendUnavailable` for a named implementation that cannot run.
"""

from typing import Literal

import torch
from torch import Tensor

from tlcr.errors import ConfigError, ShapeError
from tlcr.ops import _checks
from tlcr.ops._extension import build_info
from tlcr.ops._registry import OpStatus, available, resolve
from tlcr.ops.alignment import token_labels
from tlcr.ops.types import PPOLoss, TokenLabel, TokenScores

__all__ = [
    "OpStatus",
    "PPOLoss",
    "TokenLabel",
    "TokenScores",
    "adamw_step",
    "available",
    "build_info",
    "fused_gae",
    "fused_reward",
    "gated_silu",
    "ppo_loss",
    "reward_from_hidden",
    "rms_norm",
    "score_hidden",
    "score_tokens",
    "token_labels",
]

Impl = Literal["auto", "reference", "cpp", "triton", "cuda"]


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

    and `terminal[b]` is added at the last counted token of row b. It has nowhere to go, and is dropped, in a row with
    nothing counted. For `kind="discrete"`, c becomes 0 where |c| <= band and its sign elsewhere.
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
        rewards (B, T), without a gradient.
    """
    _checks.floating("fused_reward", logits=logits)
    _checks.axes("fused_reward", "logits", logits, "B, T, C")
    if logits.shape[-1] not in (2, 3):
        raise ShapeError(
            f"fused_reward: logits has shape {tuple(logits.shape)}, wanted (B, T, 2) [negative, positive] "
            "or (B, T, 3) [negative, neutral, positive]"
        )
    tensors, options = _reward_arguments(
        "fused_reward", logits.shape[:-1], "logits", mask, kl, kl_coef, terminal, temperature, scale, clip, kind, band
    )
    device = _checks.same_device("fused_reward", logits=logits, mask=mask, kl=kl, terminal=terminal)
    rewards: Tensor = resolve("fused_reward", impl, device.type)(logits, tensors, kl=kl, terminal=terminal, **options)
    return rewards


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
        kl, kl_coef, terminal, temperature, scale, clip, kind, band, impl: as in `fused_reward`.

    Returns:
        rewards (B, T), without a gradient.
    """
    op = "reward_from_hidden"
    _checks.floating(op, hidden=hidden, weight=weight, bias=bias)
    _checks.axes(op, "hidden", hidden, "B, T, H")
    if weight.ndim != 2 or weight.shape[0] not in (2, 3) or weight.shape[1] != hidden.shape[-1]:
        raise ShapeError(
            f"{op}: weight has shape {tuple(weight.shape)}, wanted (2, {hidden.shape[-1]}) [negative, positive] "
            f"or (3, {hidden.shape[-1]}) [negative, neutral, positive]"
        )
    _checks.same_shape(op, weight.shape[:1], "weight's classes", bias=bias)
    tensors, options = _reward_arguments(
        op, hidden.shape[:-1], "hidden", mask, kl, kl_coef, terminal, temperature, scale, clip, kind, band
    )
    device = _checks.same_device(op, hidden=hidden, weight=weight, bias=bias, mask=mask, kl=kl, terminal=terminal)
    function = resolve(op, impl, device.type)
    rewards: Tensor = function(hidden, weight, tensors, bias=bias, kl=kl, terminal=terminal, **options)
    return rewards


def _reward_arguments(
    op: str,
    shape_BT: torch.Size,
    like: str,
    mask: Tensor,
    kl: Tensor | None,
    kl_coef: float,
    terminal: Tensor | None,
    temperature: float,
    scale: float,
    clip: float | None,
    kind: str,
    band: float,
) -> tuple[Tensor, dict[str, float | str | None]]:
    """The mask as bool, and the checked options that are no tensors."""
    mask = _checks.bool_mask(op, mask, shape_BT, f"{like}' first two axes")
    _checks.floating(op, kl=kl, terminal=terminal)
    _checks.same_shape(op, shape_BT, "mask", kl=kl)
    _checks.same_shape(op, shape_BT[:1], "the batch axis", terminal=terminal)
    _checks.choice(op, "kind", kind, ("continuous", "discrete"))
    options: dict[str, float | str | None] = {
        "kl_coef": _checks.number(op, "kl_coef", kl_coef),
        "temperature": _checks.number(op, "temperature", temperature, above=0),
        "scale": _checks.number(op, "scale", scale),
        "clip": None if clip is None else _checks.number(op, "clip", clip, above=0, finite=False),
        "kind": kind,
        "band": _checks.number(op, "band", band, least=0, most=1),
    }
    if kl is None and kl_coef != 0:
        raise ConfigError(f"{op}: kl_coef is {kl_coef:g} but kl is missing; pass kl (B, T) or kl_coef=0")
    if band != 0 and kind != "discrete":
        raise ConfigError(f"{op}: band is {band:g} but kind is {kind!r}; pass kind='discrete' or band=0")
    return mask, options


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
        cu_seqlens: (B + 1,) int32, ascending: sequence b is [cu_seqlens[b], cu_seqlens[b + 1]) of the packed axis.
            Tokens outside all of them do not count.
        impl: which implementation runs.

    Returns:
        `(advantages, returns)` in the shape of `rewards`, without gradients.
    """
    op = "fused_gae"
    _checks.floating(op, rewards=rewards, values=values)
    if cu_seqlens is None:
        if rewards.ndim != 2:
            raise ShapeError(
                f"{op}: rewards has shape {tuple(rewards.shape)}, wanted (B, T), or packed (N,) with cu_seqlens"
            )
    else:
        _checks.axes(op, "rewards (with cu_seqlens)", rewards, "N")
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
            raise ShapeError(
                f"{op}: cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}, wanted int32 (B + 1,), "
                "the cumulative lengths with a leading 0"
            )
    _checks.same_shape(op, rewards.shape, "rewards", values=values)
    if mask is not None:
        mask = _checks.bool_mask(op, mask, rewards.shape, "rewards")
    device = _checks.same_device(op, rewards=rewards, values=values, mask=mask, cu_seqlens=cu_seqlens)
    advantages, returns = resolve(op, impl, device.type)(
        rewards,
        values,
        mask,
        gamma=_checks.number(op, "gamma", gamma, least=0, most=1),
        lam=_checks.number(op, "lam", lam, least=0, most=1),
        whiten=bool(whiten),
        cu_seqlens=cu_seqlens,
    )
    return advantages, returns


def score_tokens(
    logits: Tensor,
    token_ids: Tensor,
    *,
    ref_logits: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    impl: Impl = "auto",
) -> TokenScores:
    """Log-probability and entropy of given tokens, and the KL to a reference, from logits.

    With p = softmax(logits / temperature) and q = softmax(ref_logits / temperature):

        logprobs = log p[token]         entropy = -sum p log p
        ref_logprobs = log q[token]     kl = sum p (log p - log q)

    Equal to `log_softmax` and sums over V, but nothing of size V is kept for the backward pass beside the inputs.
    Gradients of logprobs, entropy and kl flow to `logits`; the reference and the temperature are constants. A token
    whose incoming gradient is 0 sends exactly 0 to its logits, even if they are NaN.

    Logits of -inf are legal: p log p is 0 at p = 0, and so is the KL's term, whatever q is. Where p > 0 and the
    reference's logit is -inf the KL is inf, and has no gradient that could be used. p = 0 means as computed: a logit so
    low that its exponential underflows counts as masked. A token of probability 0 has logprob -inf.

    Args:
        logits: (..., V).
        token_ids: (...) integers in [0, V), also where the result will be masked. Out-of-range ids raise `DataError`
            on the CPU and fail a device assertion elsewhere.
        ref_logits: (..., V) of the reference, already aligned with `logits`.
        temperature: a number > 0, or a (...) tensor of such, which is not checked; divides both logits.
        impl: which implementation runs.

    Returns:
        `TokenScores`, each field (...).
    """
    op = "score_tokens"
    _checks.floating(op, logits=logits, ref_logits=ref_logits)
    _checks.integers(op, token_ids=token_ids)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ShapeError(f"{op}: logits has shape {tuple(logits.shape)}, wanted (..., V) with V >= 1")
    _checks.same_shape(op, logits.shape[:-1], "logits without V", token_ids=token_ids)
    _checks.same_shape(op, logits.shape, "logits", ref_logits=ref_logits)
    temperature = _temperature(op, temperature, token_ids)
    device = _checks.same_device(
        op, logits=logits, token_ids=token_ids, ref_logits=ref_logits, temperature=_if_tensor(temperature)
    )
    _checks.vocabulary_ids(op, token_ids, logits.shape[-1])
    scores: TokenScores = resolve(op, impl, device.type)(
        logits, token_ids, ref_logits=ref_logits, temperature=temperature
    )
    return scores


def score_hidden(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    chunk_tokens: int | None = None,
    impl: Impl = "auto",
) -> TokenScores:
    """`score_tokens(hidden @ weight.T + bias, ...)` with logits present for `chunk_tokens` tokens at a time only.

    The logits are formed in float32 (float64) whatever the inputs are, and again in the backward pass. Gradients flow
    to `hidden`, `weight` and `bias`; the reference's tensors and the temperature are constants. What `score_tokens`
    says of -inf, of KL and of tokens whose incoming gradient is 0 holds here too.

    Args:
        hidden: (..., H), the policy's last hidden states.
        weight: (V, H), its `lm_head` weight.
        token_ids: (...) integers in [0, V).
        bias: (V,).
        ref_hidden: (..., H') of the reference; wants `ref_weight` beside it.
        ref_weight: (V, H'); pass `weight` again if the two share their head.
        ref_bias: (V,).
        temperature: a number > 0, or a (...) tensor of such, which is not checked; divides both logits.
        chunk_tokens: tokens whose logits exist at once, >= 1; None: as many as fit a fixed budget, and 128 at least.
        impl: which implementation runs.

    Returns:
        `TokenScores`, each field (...).
    """
    op = "score_hidden"
    _checks.floating(
        op, hidden=hidden, weight=weight, bias=bias, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias
    )
    _checks.integers(op, token_ids=token_ids)
    if (ref_hidden is None) != (ref_weight is None) or (ref_bias is not None and ref_hidden is None):
        raise ConfigError(
            f"{op}: of ref_hidden, ref_weight and ref_bias only some are given; pass the first two together "
            "(ref_weight=weight for a shared head)"
        )
    for name, states, head in (("weight", hidden, weight), ("ref_weight", ref_hidden, ref_weight)):
        if states is None or head is None:
            continue
        if states.ndim == 0 or head.ndim != 2 or head.shape[0] == 0 or head.shape[1] != states.shape[-1]:
            raise ShapeError(
                f"{op}: {name} has shape {tuple(head.shape)}, wanted (V, H) with V >= 1 for hidden states of shape "
                f"{tuple(states.shape)}"
            )
        if head.shape[0] != weight.shape[0] or states.shape[:-1] != hidden.shape[:-1]:
            raise ShapeError(
                f"{op}: ref_hidden {tuple(states.shape)} and ref_weight {tuple(head.shape)} do not match hidden "
                f"{tuple(hidden.shape)} and weight {tuple(weight.shape)}; both need the same tokens and vocabulary"
            )
    _checks.same_shape(op, hidden.shape[:-1], "hidden without H", token_ids=token_ids)
    _checks.same_shape(op, weight.shape[:1], "weight's vocabulary", bias=bias, ref_bias=ref_bias)
    temperature = _temperature(op, temperature, token_ids)
    if chunk_tokens is not None and (not isinstance(chunk_tokens, int) or chunk_tokens < 1):
        raise ConfigError(f"{op}: chunk_tokens is {chunk_tokens!r}, wanted an int >= 1 or None")
    device = _checks.same_device(
        op,
        hidden=hidden,
        weight=weight,
        token_ids=token_ids,
        bias=bias,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        temperature=_if_tensor(temperature),
    )
    _checks.vocabulary_ids(op, token_ids, weight.shape[0])
    scores: TokenScores = resolve(op, impl, device.type)(
        hidden,
        weight,
        token_ids,
        bias=bias,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
    return scores


def _temperature(op: str, temperature: float | Tensor, token_ids: Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        return _checks.number(op, "temperature", temperature, above=0)
    _checks.floating(op, temperature=temperature)
    _checks.same_shape(op, token_ids.shape, "token_ids", temperature=temperature)
    if temperature.requires_grad:
        raise ConfigError(f"{op}: temperature requires a gradient, but is a constant here; pass temperature.detach()")
    return temperature


def _if_tensor(value: float | Tensor | None) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


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
        values, old_values, returns: (B, T), V, V at sampling time, and what V regresses to. Without them there is no
            value loss. `old_values` is needed unless `value_clip` is None.
        value_clip: how far V may move from V_old, > 0; None: no bound.
        value_coef: weight of the value loss.
        entropy, kl: (B, T), nats, as from `score_tokens`.
        entropy_coef, kl_coef: their weights.
        aggregate: "token" or "sequence".
        denominator: the global count of tokens or rows, a number > 0 or a tensor of one element (a tensor is not
            checked, and 0, where nothing counts anywhere, is taken as 1).
        impl: which implementation runs.

    Returns:
        `PPOLoss`: scalars on the device; only `loss` carries a gradient.
    """
    op = "ppo_loss"
    per_token = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "values": values,
        "old_values": old_values,
        "returns": returns,
        "entropy": entropy,
        "kl": kl,
    }
    _checks.floating(op, logprobs=logprobs, **per_token)
    _checks.axes(op, "logprobs", logprobs, "B, T")
    _checks.same_shape(op, logprobs.shape, "logprobs", **per_token)
    mask = _checks.bool_mask(op, mask, logprobs.shape, "logprobs")
    _checks.choice(op, "aggregate", aggregate, ("token", "sequence"))
    clip = _checks.number(op, "clip", clip, least=0)
    clip_high = clip if clip_high is None else _checks.number(op, "clip_high", clip_high, least=0)
    if dual_clip is not None:
        dual_clip = _checks.number(op, "dual_clip", dual_clip, above=1)
    if value_clip is not None:
        value_clip = _checks.number(op, "value_clip", value_clip, above=0, finite=False)
    value_coef = _checks.number(op, "value_coef", value_coef)
    entropy_coef = _checks.number(op, "entropy_coef", entropy_coef)
    kl_coef = _checks.number(op, "kl_coef", kl_coef)
    if values is None and (old_values is not None or returns is not None):
        raise ConfigError(f"{op}: old_values or returns is given but values is missing; pass values or neither")
    if values is not None and returns is None:
        raise ConfigError(f"{op}: values is given but returns is missing; pass the returns that fused_gae gives")
    if values is not None and value_clip is not None and old_values is None:
        raise ConfigError(f"{op}: value_clip is {value_clip:g} but old_values is missing; pass it or value_clip=None")
    for name, coefficient, tensor in (("entropy", entropy_coef, entropy), ("kl", kl_coef, kl)):
        if coefficient != 0 and tensor is None:
            raise ConfigError(f"{op}: {name}_coef is {coefficient:g} but {name} is missing; pass it or {name}_coef=0")
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ShapeError(f"{op}: denominator has shape {tuple(denominator.shape)}, wanted one element")
        denominator = denominator.reshape(())
    elif denominator is not None:
        denominator = _checks.number(op, "denominator", denominator, above=0)
    device = _checks.same_device(op, logprobs=logprobs, mask=mask, denominator=_if_tensor(denominator), **per_token)
    result: PPOLoss = resolve(op, impl, device.type)(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip=clip,
        clip_high=clip_high,
        dual_clip=dual_clip,
        values=values,
        old_values=old_values,
        returns=returns,
        value_clip=value_clip,
        value_coef=value_coef,
        entropy=entropy,
        entropy_coef=entropy_coef,
        kl=kl,
        kl_coef=kl_coef,
        aggregate=aggregate,
        denominator=denominator,
    )
    return result


def adamw_step(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    remainder: Tensor,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int,
    impl: Impl = "auto",
) -> None:
    """One step of AdamW over bfloat16 weights whose float32 masters are stored as what the weights lack of them.

    bfloat16 is the upper half of a float32, so the master's bits are 2^16 times those of the weight plus the remainder,
    from -2^15 to 2^15 - 1: the weight is the bfloat16 nearest to its master (of two the larger in magnitude), and no
    second copy of it is kept. In place, in float32, with g = grad, t = step, rate = learning_rate:

        m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
        master <- (1 - rate weight_decay) master - rate m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        parameter, remainder <- master

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101; the split master is ours.

    Args:
        parameter: bfloat16, any shape; changed.
        grad: bfloat16, the same shape.
        exp_avg, exp_avg_sq: m and v, float32, the same shape; changed.
        remainder: int16, the same shape; changed. 0 where training begins.
        learning_rate: >= 0.
        betas: of the moments, 0 <= beta < 1.
        eps: >= 0.
        weight_decay: >= 0.
        step: t, the number of this step, from 1.
        impl: which implementation runs.
    """
    op = "adamw_step"
    given = {"parameter": parameter, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "remainder": remainder}
    low, high = torch.bfloat16, torch.float32
    for (name, tensor), dtype in zip(given.items(), (low, low, high, high, torch.int16), strict=True):
        _checks.dtype(op, name, tensor, dtype)
        _checks.same_shape(op, parameter.shape, "parameter", **{name: tensor})
    device = _checks.same_device(op, **given)
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise ConfigError(f"{op}: step is {step!r}, wanted the number of this step, an int from 1")
    resolve(op, impl, device.type)(
        *given.values(),
        learning_rate=_checks.number(op, "learning_rate", learning_rate, least=0),
        betas=tuple(_checks.number(op, f"betas[{i}]", beta, least=0, below=1) for i, beta in enumerate(betas)),
        eps=_checks.number(op, "eps", eps, least=0),
        weight_decay=_checks.number(op, "weight_decay", weight_decay, least=0),
        step=step,
    )


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, impl: Impl = "auto") -> Tensor:
    """y = weight * (x / sqrt(mean(x^2) + eps)), the mean over the last axis: the norm of Llama and its relatives.

    The quotient is formed in float32 (float64) and rounded to x's dtype before it meets the weight, as transformers
    does. Unlike torch's operations in a row, it keeps x and one number a row for the backward pass. With the quotient
    n = x s and the incoming gradient g: dweight = sum of g n over all rows; dx = s (g weight - n mean(g weight n)).
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.

    Args:
        x: (..., H), a float tensor.
        weight: (H,), in x's dtype.
        eps: added to the mean square, >= 0.
        impl: which implementation runs.

    Returns:
        (..., H) in x's dtype.
    """
    op = "rms_norm"
    _checks.floating(op, x=x, weight=weight)
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ShapeError(
            f"{op}: weight has shape {tuple(weight.shape)} and x {tuple(x.shape)}, wanted (H,) and (..., H)"
        )
    _checks.dtype(op, "weight", weight, x.dtype)
    device = _checks.same_device(op, x=x, weight=weight)
    eps = _checks.number(op, "eps", eps, least=0)
    y: Tensor = resolve(op, impl, device.type)(x, weight, eps=eps)
    return y


def gated_silu(gate: Tensor, up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """y = silu(gate) * up with silu(z) = z / (1 + exp(-z)): what stands between the products of a gated feed-forward.

    silu(gate) is rounded to the tensors' dtype before the product, as transformers does. Only gate and up are kept for
    the backward pass, where torch's two operations keep silu(gate) too. Source: Shazeer 2020, arXiv:2002.05202.

    Args:
        gate: any shape, a float tensor.
        up: the same shape and dtype.
        impl: which implementation runs.

    Returns:
        the same shape and dtype.
    """
    op = "gated_silu"
    _checks.floating(op, gate=gate, up=up)
    _checks.same_shape(op, gate.shape, "gate", up=up)
    _checks.dtype(op, "up", up, gate.dtype)
    device = _checks.same_device(op, gate=gate, up=up)
    y: Tensor = resolve(op, impl, device.type)(gate, up)
    return y
