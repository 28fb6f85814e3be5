"""From the signal of a reward source to the reward of every action, and the shares of its parts.

Arithmetic only: no text, no models. One formula holds for every kind of reward,

    r_t = clamp(scale * c_t, -clip, clip) - centre - kl_coef * KL_t - length_penalty + [t is the last token] * terminal

where c_t is the kind's reward of token t (`compose_rewards`). The centre is a mean of values that were already scaled
and clipped; it is not scaled or clipped again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from tlcr import ops
from tlcr.config.schema import LOGIT_KINDS, SHARED_SCORE_KINDS, RewardConfig
from tlcr.errors import ConfigError, DataError, ShapeError, TrainingDiverged
from tlcr.rewards.centre import Centre
from tlcr.types import Rewards, RewardSignal

__all__ = ["PARTS", "check_kl", "check_signal", "compose_rewards", "reward_accounting"]

PARTS = ("dense", "terminal", "kl", "length")

# A part with more than this share of the return dominates the other parts, which then have no effect.
DOMINANT_SHARE = 0.95


@torch.no_grad()
def compose_rewards(
    signal: RewardSignal,
    mask_BT: Tensor,
    *,
    ended_B: Tensor,
    kl_BT: Tensor | None,
    kl_coef: float,
    cfg: RewardConfig,
    temperature: float,
    centre: Centre | None,
    max_tokens: int | None = None,
) -> Rewards:
    """The reward of every action: the source's signal minus KL and penalties.

    The reward of token t by kind, with p = softmax(logits_t / temperature) and d = p_positive - p_negative::

        continuous      d                       (2 p_positive - 1 for two classes; paper, section 3.3)
        discrete        0 where |d| <= band, else sign(d)
        sign            sign(d)
        positive_only   max(d, 0)
        negative_only   min(d, 0)
        sum_at_end      what 'continuous' pays for all counted tokens, at the last one
        spans           the mean of d over the counted tokens of the span that holds t
        sequence        nothing; the source's score is paid at the last token
        uniform, attention, prefix_difference, q, dpo, random
                        the source's number
        callable        the source's numbers; or d, where it gives logits

    compat 'tlcr-official' repeats the released code: it takes the softmax of probabilities, so that two classes pay
    tanh(d / 2), at most 0.462, with the band on that scale; and the reward of token t is paid to the next action, so
    that the first action gets nothing and the last token's reward is lost.

    The parts of the result, each (B, T) and 0 where nothing counts, sum to the rewards; a part that is not used is
    absent::

        dense       clamp(scale * c_t, -clip, clip) - centre.at(t) at every counted token
        terminal    at the last counted token: scale * terminal_B + sequence_coef * sequence_B; for 'sum_at_end' the sum
                    of what would have been dense; then within +-terminal_clip
        kl          -kl_coef * kl_BT at every counted token
        length      -length_penalty at every counted token; at the last one -missing_eos_penalty where not ended_B, and
                    -overlong_penalty * clamp((n - (max_tokens - overlong_buffer)) / overlong_buffer, 0, 1) for an
                    answer of n counted tokens (DAPO, arXiv 2503.14476, eq. 13, with a penalty of 1)

    Values at positions that do not count have no effect; a row without counted positions gets no reward.

    Args:
        signal: the source's signal for the rollout.
        mask_BT: bool (B, T), True where a response token counts.
        ended_B: bool (B,), True where the policy chose to stop.
        kl_BT: the KL estimate to subtract, (B, T) in nats; None where KL is in the loss.
        kl_coef: reward subtracted per nat.
        cfg: kind, scale, clips and penalties.
        temperature: the discriminator's, which divides its logits.
        centre: with ``cfg.centre``, is updated with the sum of this batch's dense and kl parts, then what it gives is
            subtracted. A token of average reward and average KL then earns 0, so that neither longer nor shorter
            answers gain by their length (ours).
        max_tokens: the length limit of an answer, where ``cfg.overlong_buffer`` needs it.

    Returns:
        Rewards and parts, float32, or float64 where the signal is; no gradient.

    Raises:
        ShapeError: tensors do not fit.
        ConfigError: the signal of the kind is missing, or nothing of it would be paid, or it has no token rewards and
            ``cfg.centre`` is set.
        DataError: the signal is not finite.
        TrainingDiverged: the KL is not finite.
    """
    _check_shapes(mask_BT, ended_B, kl_BT)
    check_signal(signal, mask_BT, cfg)
    dtype = _dtype(signal, kl_BT)
    last_BT = _last_counted(mask_BT)
    parts: dict[str, Tensor] = {}

    terminal_B = torch.zeros_like(ended_B, dtype=dtype)
    pays_at_end = False
    if kl_BT is not None and kl_coef != 0:
        check_kl(kl_BT, mask_BT)
        parts["kl"] = torch.where(mask_BT, -kl_coef * kl_BT.to(dtype), 0.0)
    token_BT = _token_rewards(signal, mask_BT, parts.get("kl"), cfg, temperature, centre)
    if token_BT is not None and cfg.kind == "sum_at_end":
        terminal_B, pays_at_end = token_BT.sum(-1).to(dtype), True
    elif token_BT is not None:
        parts["dense"] = token_BT.to(dtype)
    if signal.terminal_B is not None:
        terminal_B, pays_at_end = terminal_B + cfg.scale * signal.terminal_B, True
    if signal.sequence_B is not None and cfg.sequence_coef != 0:
        terminal_B, pays_at_end = terminal_B + cfg.sequence_coef * signal.sequence_B, True
    if cfg.terminal_clip is not None:
        terminal_B = terminal_B.clamp(-cfg.terminal_clip, cfg.terminal_clip)
    if pays_at_end:
        parts["terminal"] = torch.where(last_BT, terminal_B.to(dtype).unsqueeze(-1), 0.0)
    if cfg.length_penalty != 0 or cfg.missing_eos_penalty != 0 or cfg.overlong_buffer is not None:
        at_end_B = cfg.missing_eos_penalty * (~ended_B).to(dtype) + _overlong(mask_BT, cfg, max_tokens).to(dtype)
        at_end_BT = torch.where(last_BT, at_end_B.unsqueeze(-1), 0.0)
        parts["length"] = -(cfg.length_penalty * mask_BT.to(dtype) + at_end_BT)

    rewards_BT = torch.zeros(mask_BT.shape, dtype=dtype, device=mask_BT.device)
    for part_BT in parts.values():
        rewards_BT = rewards_BT + part_BT
    return Rewards(rewards_BT, parts)


@torch.no_grad()
def reward_accounting(
    rewards: Rewards, mask_BT: Tensor, *, reduce: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """The shares of the return's parts, as 0-d float64 tensors. Source: ours::

        reward/mean_token           mean reward of a counted token, all parts together
        reward/mean_abs_token       mean |reward| of a counted token: the scale to compare kl.coef with
        reward/mean_score           mean over counted tokens of dense + terminal: the source's reward
        reward/mean_return          mean over answers of the sum of their rewards
        reward/nonzero_share        share of counted tokens where dense + terminal is not 0
        reward/share_<part>         sum of |part| over the sum of |every part|; dense, terminal, kl, length; 0 if absent
        reward/dominated            1 where several parts are present and one has more than 95 % of that sum, else 0
        reward/length_correlation   Pearson correlation, over answers, of return and length; 0 where either is constant

    Args:
        rewards: the reward of every action and its parts.
        mask_BT: bool (B, T), True where a response token counts.
        reduce: sums a tensor over all processes (``accelerator.reduce``). It is called once, and the results are then
            exact over all of them. None: this process alone.

    Returns:
        The figures by name. Answers with no counted token do not count.
    """
    rewards_BT = torch.where(mask_BT, rewards.rewards_BT.double(), 0.0)
    zero_BT = torch.zeros_like(rewards_BT)
    part_BT = {name: torch.where(mask_BT, rewards.parts.get(name, zero_BT).double(), 0.0) for name in PARTS}
    score_BT = part_BT["dense"] + part_BT["terminal"]
    # Sums over all processes, then ratios: a mean of ratios would give every process the same weight.
    return_B, length_B = rewards_BT.sum(-1), mask_BT.sum(-1).double()
    counts_B = length_B > 0
    answers = counts_B.sum().double()
    sums = torch.stack(
        [
            length_B.sum(),
            answers,
            rewards_BT.sum(),
            rewards_BT.abs().sum(),
            score_BT.sum(),
            (score_BT != 0).sum().double(),
            *(part_BT[name].abs().sum() for name in PARTS),
            return_B.square().sum(),
            length_B.square().sum(),
            (return_B * length_B).sum(),
        ]
    )
    if reduce is not None:
        sums = reduce(sums)
    tokens, answers, total, absolute, score, nonzero = sums[:6].unbind()
    magnitudes = sums[6 : 6 + len(PARTS)]
    return_square, length_square, product = sums[6 + len(PARTS) :].unbind()

    shares = _ratio(magnitudes, magnitudes.sum())
    dominated = (shares.max() > DOMINANT_SHARE).double() if len(rewards.parts) > 1 else torch.zeros_like(tokens)
    covariance = answers * product - total * tokens
    return_variance = answers * return_square - total.square()
    length_variance = answers * length_square - tokens.square()
    # A difference that comes from rounding alone is not variance.
    varies = (return_variance > 1e-12 * answers * return_square) & (length_variance > 1e-12 * answers * length_square)
    correlation = _ratio(covariance, torch.where(varies, return_variance * length_variance, 0.0).sqrt())
    return {
        "reward/mean_token": _ratio(total, tokens),
        "reward/mean_abs_token": _ratio(absolute, tokens),
        "reward/mean_score": _ratio(score, tokens),
        "reward/mean_return": _ratio(total, answers),
        "reward/nonzero_share": _ratio(nonzero, tokens),
        **{f"reward/share_{name}": share for name, share in zip(PARTS, shares.unbind(), strict=True)},
        "reward/dominated": dominated,
        "reward/length_correlation": correlation,
    }


def _token_rewards(
    signal: RewardSignal,
    mask_BT: Tensor,
    kl_part_BT: Tensor | None,
    cfg: RewardConfig,
    temperature: float,
    centre: Centre | None,
) -> Tensor | None:
    """clamp(scale * c_t, -clip, clip) - centre, 0 where not counted; None for a signal without token rewards."""
    if signal.logits_BTC is None and signal.dense_BT is None:
        return None
    if cfg.centre and centre is None:
        raise ConfigError(
            "reward.centre is on, but compose_rewards got centre=None; pass one of build_centre that outlives it"
        )
    # Scaling and clipping commute with the one-sided kinds, so one call is enough.
    in_one_call = signal.dense_BT is None and cfg.kind != "spans"
    token_BT = torch.zeros(mask_BT.shape, device=mask_BT.device)
    logits_BTC = signal.logits_BTC
    if logits_BTC is not None and cfg.compat == "tlcr-official":
        logits_BTC, temperature = (logits_BTC / temperature).softmax(dim=-1), 1.0
    if logits_BTC is not None:
        token_BT = ops.fused_reward(
            logits_BTC,
            mask_BT,
            temperature=temperature,
            scale=cfg.scale if in_one_call else 1.0,
            clip=cfg.clip if in_one_call else None,
            kind="discrete" if cfg.kind in ("discrete", "sign") else "continuous",
            band=cfg.band if cfg.kind == "discrete" else 0.0,
        )
        if cfg.kind == "positive_only":
            token_BT = token_BT.clamp(min=0)
        elif cfg.kind == "negative_only":
            token_BT = token_BT.clamp(max=0)
        elif cfg.kind == "spans":
            token_BT = _span_means(token_BT, signal.spans_BT, mask_BT)
    if signal.dense_BT is not None:
        token_BT = token_BT + torch.where(mask_BT, signal.dense_BT, 0.0)
    if not in_one_call:
        token_BT = cfg.scale * token_BT
        if cfg.clip is not None:
            token_BT = token_BT.clamp(-cfg.clip, cfg.clip)
    if cfg.compat == "tlcr-official":
        token_BT = _one_action_late(token_BT, mask_BT)
    if cfg.centre and centre is not None:
        centre.update(token_BT if kl_part_BT is None else token_BT + kl_part_BT, mask_BT)
        token_BT = torch.where(mask_BT, token_BT - centre.at(mask_BT).to(token_BT.dtype), 0.0)
    return token_BT


def _overlong(mask_BT: Tensor, cfg: RewardConfig, max_tokens: int | None) -> Tensor:
    """What each answer pays for coming near the length limit, float64 (B,)."""
    tokens_B = mask_BT.sum(-1).double()
    if cfg.overlong_buffer is None:
        return torch.zeros_like(tokens_B)
    if max_tokens is None:
        raise ConfigError(
            "reward.overlong_buffer is set, but compose_rewards got max_tokens=None; pass the length limit"
        )
    free = max_tokens - cfg.overlong_buffer
    return cfg.overlong_penalty * ((tokens_B - free) / cfg.overlong_buffer).clamp(0, 1)


def _span_means(token_BT: Tensor, spans_BT: Tensor | None, mask_BT: Tensor) -> Tensor:
    """Each counted token's value replaced by the mean over the counted tokens of its span; 0 where not counted."""
    assert spans_BT is not None  # checked by check_signal
    inside_BT = torch.where(mask_BT, spans_BT, 0)
    sums_BT = torch.zeros_like(token_BT).scatter_add(1, inside_BT, token_BT)
    counts_BT = torch.zeros_like(token_BT).scatter_add(1, inside_BT, mask_BT.to(token_BT.dtype))
    return torch.where(mask_BT, (sums_BT / counts_BT.clamp(min=1)).gather(1, inside_BT), 0.0)


def _one_action_late(token_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Each counted token's value at the next counted one: the first gets 0, and the last value is lost."""
    late_BT = torch.zeros_like(token_BT)
    for row, counts_T in enumerate(mask_BT):
        late_BT[row, counts_T] = pad(token_BT[row, counts_T], (1, 0))[:-1]
    return late_BT


def _last_counted(mask_BT: Tensor) -> Tensor:
    """(B, T) bool: True at the last counted token of each row."""
    counted_from_here_BT = mask_BT.flip(-1).cumsum(-1).flip(-1)
    return mask_BT & (counted_from_here_BT == 1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator != 0, numerator / torch.where(denominator != 0, denominator, 1.0), 0.0)


def _dtype(signal: RewardSignal, kl_BT: Tensor | None) -> torch.dtype:
    given = (signal.logits_BTC, signal.dense_BT, signal.terminal_B, signal.sequence_B, kl_BT)
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in given)
    return torch.float64 if wide else torch.float32


def _check_shapes(mask_BT: Tensor, ended_B: Tensor, kl_BT: Tensor | None) -> None:
    if mask_BT.ndim != 2 or mask_BT.dtype != torch.bool:
        raise ShapeError(
            f"compose_rewards: mask has shape {tuple(mask_BT.shape)} and dtype {mask_BT.dtype}, wanted (B, T) bool "
            "(True counts)"
        )
    B, _ = mask_BT.shape
    if ended_B.shape != (B,) or ended_B.dtype != torch.bool:
        raise ShapeError(
            f"compose_rewards: ended has shape {tuple(ended_B.shape)} and dtype {ended_B.dtype}, wanted ({B},) bool"
        )
    _check_fits({"kl": kl_BT}, {}, mask_BT)


def _check_fits(
    of_tokens: Mapping[str, Tensor | None], of_answers: Mapping[str, Tensor | None], mask_BT: Tensor
) -> None:
    B, T = mask_BT.shape
    for tensors, wanted in ((of_tokens, (B, T)), (of_answers, (B,))):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.shape != wanted:
                raise ShapeError(
                    f"compose_rewards: {name} has shape {tuple(tensor.shape)}, wanted {wanted}; a score for each "
                    f"answer is ({B},), a reward for each token ({B}, {T}) with index t at the action that emitted "
                    "token t"
                )


def check_signal(signal: RewardSignal, mask_BT: Tensor, cfg: RewardConfig) -> None:
    """What ``compose_rewards`` asks of a signal, with its errors; mask_BT is bool (B, T)."""
    B, T = mask_BT.shape
    logits_BTC = signal.logits_BTC
    if logits_BTC is not None and (logits_BTC.ndim != 3 or logits_BTC.shape not in ((B, T, 2), (B, T, 3))):
        raise ShapeError(
            f"compose_rewards: logits has shape {tuple(logits_BTC.shape)}, wanted ({B}, {T}, 2) or ({B}, {T}, 3); "
            "index t is the discriminator's view of response token t, read at that token"
        )
    of_tokens = {"dense": signal.dense_BT, "spans": signal.spans_BT}
    of_answers = {"terminal": signal.terminal_B, "sequence": signal.sequence_B}
    _check_fits(of_tokens, of_answers, mask_BT)
    fields = {"logits": logits_BTC, "dense": signal.dense_BT, **of_answers}
    given = {name: tensor for name, tensor in fields.items() if tensor is not None}
    dense = dict.fromkeys((*SHARED_SCORE_KINDS, "q", "dpo", "random"), "dense")
    needs = {**dict.fromkeys(LOGIT_KINDS, "logits"), **dense, "sequence": "terminal"}.get(cfg.kind)
    if cfg.kind == "spans" and signal.spans_BT is None:
        needs = "spans"
    if not given or (needs is not None and needs not in given):
        raise ConfigError(
            f"reward.kind is {cfg.kind!r}, but its source gave {', '.join(given) or 'nothing'} and no "
            f"{needs or 'reward'}; make the source with build_reward_source, or set reward.kind to what it gives"
        )
    source = f"reward source {cfg.kind!r}" + (f" ({cfg.callable})" if cfg.callable else "")
    if given.keys() == {"sequence"} and cfg.sequence_coef == 0:
        raise ConfigError(
            f"{source} gave sequence_B alone, which reward.sequence_coef = 0 pays nothing for; give a score of whole "
            "answers as terminal_B"
        )
    if cfg.centre and not given.keys() & {"logits", "dense"}:
        raise ConfigError(
            f"reward.centre is for token rewards, but {source} gave {' and '.join(given)} alone; drop reward.centre, "
            "or give a reward for each token"
        )
    for name, tensor in given.items():
        counts = mask_BT.any(-1) if tensor.ndim == 1 else mask_BT
        finite = torch.isfinite(tensor)
        bad = counts & ~(finite.all(-1) if tensor.ndim == 3 else finite)
        if bad.any():
            first = bad.nonzero()[0].tolist()
            place = f"answer {first[0]}" + (f", token {first[1]}" if len(first) > 1 else "")
            raise DataError(
                f"{source} gave {int(bad.sum())} of {int(counts.sum())} {name} values that are not finite, first at "
                f"{place} ({tensor[tuple(first)].tolist()}); return finite numbers, 0 where it has no opinion"
            )


def check_kl(kl_BT: Tensor, mask_BT: Tensor) -> None:
    """Raises TrainingDiverged where the KL of a counted token is not finite. Both (B, T)."""
    bad_BT = mask_BT & ~torch.isfinite(kl_BT)
    if bad_BT.any():
        row, token = bad_BT.nonzero()[0].tolist()
        raise TrainingDiverged(
            f"the KL to the reference is not finite at {int(bad_BT.sum())} tokens, first at answer {row}, token "
            f"{token} ({kl_BT[row, token].item()}); lower ppo.learning_rate or raise kl.coef, and resume from an "
            "earlier checkpoint"
        )
