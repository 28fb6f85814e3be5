"""The rivals of the ops: imported from their packages, or written here as their users write them.

A rival makes its function when it is asked for one, because only then is anything imported: what cannot be imported or
run reports it then. Each function takes the inputs of a case and returns the same results as tlcr's. A rival that does
less of the work is in no case, or its note says what it leaves out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ops.cases import (
    HOLES,
    LAM,
    LOSS_ONLY,
    NORM_EPS,
    PACKED,
    PADDED,
    PASSES,
    REWARD_OPTIONS,
    WHITENED,
    WITH_REFERENCE,
    Case,
    Function,
)

PACKAGES = ("liger-kernel", "cut-cross-entropy", "trl", "torchrl")

LOOP_TOKENS = 2**21
"""A loop over T is left out above so many tokens: it would take the run's time."""
CPU_TOKENS = 2**23
"""On a CPU, forms with many passes over memory are left out above so many tokens, for the same reason."""
CPU_LOGITS = 2**26
"""On a CPU, plain torch is left out above so many logits, of which it holds several float32 copies."""


@dataclass(frozen=True)
class Rival:
    """One other way to compute a case."""

    name: str
    make: Callable[[], Function]
    """Imports what it needs and returns the function; raises where it cannot run here."""
    passes: tuple[str, ...] = PASSES
    most: float = math.inf
    """Elements of a case (`Case.elements`) above which it is left out."""
    plain: bool = False
    """Whether it stands in cases without rivals: the plain form in torch."""
    note: str = ""
    """The part of the work that it does not do, or the extra work that it does."""


def rivals(case: Case, device: str) -> list[Rival]:
    """All rivals of a case on "cpu" or "cuda" tensors."""
    found = {
        "fused_reward": _reward,
        "fused_gae": _gae,
        "score_tokens": _tokens,
        "score_hidden": _hidden,
        "ppo_loss": _loss,
        "rms_norm": _norm,
        "gated_silu": _gate,
    }[case.op](case, device)
    return [rival for rival in found if case.rivals or rival.plain]


def _compiled(function: Function) -> Function:
    return torch.compile(function, dynamic=False)


# fused_reward


def _reward(case: Case, device: str) -> Iterator[Rival]:
    def eager(logits: Tensor, mask: Tensor, kl: Tensor, terminal: Tensor) -> tuple[Tensor]:
        p = torch.softmax(logits.float(), dim=-1)
        clip, kl_coef = REWARD_OPTIONS["clip"], REWARD_OPTIONS["kl_coef"]
        rewards = torch.where(mask, (p[..., -1] - p[..., 0]).clamp(-clip, clip) - kl_coef * kl, 0.0)
        last = mask.sum(dim=1, keepdim=True) - 1
        return (rewards.scatter_add(1, last, terminal.unsqueeze(1)),)

    most = CPU_TOKENS if device == "cpu" else math.inf
    yield Rival("eager torch", lambda: eager, most=most, plain=True)
    yield Rival("torch.compile", lambda: _compiled(eager))


# fused_gae


def _gae(case: Case, device: str) -> Iterator[Rival]:
    most = CPU_TOKENS if device == "cpu" else math.inf
    if case.name == PACKED:
        yield Rival("TRL's loop", lambda: partial(_packed, _trl_loop), most=LOOP_TOKENS, note="pads to rows first")
        yield Rival("torchrl vec_gae", _torchrl("vec_generalized_advantage_estimate"))
    elif case.name == HOLES:
        yield Rival("verl's loop", lambda: _verl_loop, most=LOOP_TOKENS)
        yield Rival("torch.compile of doubling", lambda: _compiled(_doubling), most=most)
    elif case.name == WHITENED:
        yield Rival("TRL's loop and masked_whiten", _trl_whitened, most=LOOP_TOKENS, note="unbiased variance")
        yield Rival("verl's loop, whitened", lambda: _verl_whitened, most=LOOP_TOKENS, note="unbiased variance")
    else:
        yield Rival("TRL's loop", lambda: _trl_loop, most=LOOP_TOKENS, plain=True)
        if case.name == PADDED:
            yield Rival("OpenRLHF's loop", lambda: _openrlhf_loop, most=LOOP_TOKENS)
            yield Rival("verl's loop", lambda: _verl_loop, most=LOOP_TOKENS)
        yield Rival("torchrl gae", _torchrl("generalized_advantage_estimate"), most=LOOP_TOKENS)
        yield Rival("torchrl vec_gae", _torchrl("vec_generalized_advantage_estimate"), most=CPU_TOKENS)
        yield Rival("eager torch, chunks", lambda: _chunks)
        yield Rival("torch.compile of chunks", lambda: _compiled(_chunks))
        yield Rival("torch.compile of doubling", lambda: _compiled(_doubling), most=most)


def _counted(mask: Tensor | None, advantages: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    if mask is None:
        return advantages, advantages + values
    return torch.where(mask, advantages, 0.0), torch.where(mask, advantages + values, 0.0)


def _trl_loop(rewards: Tensor, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """As it stands in TRL's PPO trainer: what does not count is filled with 0, then one step of T after the other."""
    if mask is not None:
        rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    T, advantage, backwards = rewards.shape[1], torch.zeros_like(rewards[:, 0]), []
    for t in range(T - 1, -1, -1):
        following = values[:, t + 1] if t + 1 < T else 0.0
        advantage = rewards[:, t] + following - values[:, t] + LAM * advantage
        backwards.append(advantage)
    return _counted(mask, torch.stack(backwards[::-1], dim=1), values)


def _openrlhf_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """In the manner of OpenRLHF: values and rewards times the mask, then the same loop."""
    rewards, values = rewards * mask, values * mask
    T, advantage, backwards = rewards.shape[1], torch.zeros_like(rewards[:, 0]), []
    for t in range(T - 1, -1, -1):
        following = values[:, t + 1] if t + 1 < T else 0.0
        advantage = rewards[:, t] + following - values[:, t] + LAM * advantage
        backwards.append(advantage)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages * mask, (advantages + values) * mask


def _verl_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """In the manner of verl: a token that does not count passes on the later value and advantage."""
    counts, backwards = mask.to(rewards.dtype), []
    following = advantage = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        step = rewards[:, t] + following - values[:, t] + LAM * advantage
        following = counts[:, t] * values[:, t] + (1 - counts[:, t]) * following
        advantage = counts[:, t] * step + (1 - counts[:, t]) * advantage
        backwards.append(advantage)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages * counts, (advantages + values) * counts


def _trl_whitened() -> Function:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.ppo.ppo_trainer import masked_whiten

    def whitened(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        advantages, returns = _trl_loop(rewards, values, mask)
        return masked_whiten(advantages, mask).masked_fill(~mask, 0), returns

    return whitened


def _verl_whitened(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    advantages, returns = _verl_loop(rewards, values, mask)
    count = mask.sum()
    mean = (advantages * mask).sum() / count
    variance = ((advantages - mean).square() * mask).sum() / (count - 1)
    return (advantages - mean) * torch.rsqrt(variance + 1e-8) * mask, returns


def _packed(rows: Function, rewards: Tensor, values: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    """Packed tokens are padded to rows and packed again: the way to use a GAE that takes only rows."""
    lengths = cu_seqlens.diff()
    split = lengths.tolist()
    padded = [nn.utils.rnn.pad_sequence(x.split(split), batch_first=True) for x in (rewards, values)]
    mask = torch.arange(padded[0].shape[1], device=rewards.device) < lengths.unsqueeze(1)
    return tuple(result[mask] for result in rows(*padded, mask))


def _torchrl(name: str) -> Callable[[], Function]:
    """A token that is its sequence's last one is "done"; what lies behind it is computed, and not used."""

    def make() -> Function:
        from torchrl.objectives.value import functional

        estimate = getattr(functional, name)

        def gae(
            rewards: Tensor, values: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
        ) -> tuple[Tensor, ...]:
            shape = rewards.shape
            rewards_BT, values_BT = rewards.view(-1, shape[-1]), values.view(-1, shape[-1])
            done = torch.zeros_like(rewards_BT, dtype=torch.bool)
            if cu_seqlens is not None:
                done[0, cu_seqlens[1:].long() - 1] = True
            elif mask is None:
                done[:, -1] = True
            else:
                done.scatter_(1, mask.sum(dim=1, keepdim=True) - 1, True)
                done[:, -1] = True
            tensors = (values_BT, F.pad(values_BT[:, 1:], (0, 1)), rewards_BT, done)
            advantages, _ = estimate(1.0, LAM, *(x.unsqueeze(-1) for x in tensors))
            return _counted(mask, advantages.view(shape), values)

        return gae

    return make


def _deltas(rewards: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """With every token counted, or all those from some position on left out."""
    if mask is not None:
        rewards, values = rewards * mask, values * mask
    return rewards + F.pad(values[:, 1:], (0, 1)) - values


CHUNK = 128


def _chunks(rewards: Tensor, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """Sums within chunks as one matrix product, then a loop over chunks. Knows no gap inside a row."""
    deltas, T = _deltas(rewards, values, mask), rewards.shape[1]
    deltas = F.pad(deltas, (0, -T % CHUNK))
    position = torch.arange(CHUNK, device=rewards.device)
    distance = position.unsqueeze(1) - position
    powers = torch.where(distance >= 0, LAM ** distance.clamp(min=0).to(deltas.dtype), 0.0)
    local = deltas.unflatten(1, (-1, CHUNK)) @ powers
    to_end = LAM ** (CHUNK - position).to(deltas.dtype)
    following, advantages = torch.zeros_like(deltas[:, :1]), []
    for n in reversed(range(local.shape[1])):
        advantages.append(local[:, n] + to_end * following)
        following = advantages[-1][:, :1]
    return _counted(mask, torch.cat(advantages[::-1], dim=1)[:, :T], values)


def _doubling(rewards: Tensor, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """Sums over spans that double. A token that does not count passes on the later value and advantage."""
    T = rewards.shape[1]
    if mask is None:
        y, shift = _deltas(rewards, values, None), 1
        while shift < T:
            y, shift = y + LAM**shift * F.pad(y[:, shift:], (0, shift)), 2 * shift
        return _counted(None, y, values)
    from_here, known, shift = torch.where(mask, values, 0.0), mask, 1
    while shift < T:
        from_here = torch.where(known, from_here, F.pad(from_here[:, shift:], (0, shift)))
        known, shift = known | F.pad(known[:, shift:], (0, shift)), 2 * shift
    y = torch.where(mask, rewards + F.pad(from_here[:, 1:], (0, 1)) - values, 0.0)
    decay, shift = torch.where(mask, torch.full_like(y, LAM), 1.0), 1
    while shift < T:
        y = y + decay * F.pad(y[:, shift:], (0, shift))
        decay, shift = decay * F.pad(decay[:, shift:], (0, shift)), 2 * shift
    return _counted(mask, y, values)


# score_tokens


def _tokens(case: Case, device: str) -> Iterator[Rival]:
    most = CPU_LOGITS if device == "cpu" else math.inf
    yield Rival("eager torch", lambda: _scores, most=most, plain=True)
    yield Rival("torch.compile", lambda: _compiled(_scores))
    if case.elements == 128 * 128_256 or device == "cuda":
        yield Rival("torch.compile of shifted sums", lambda: _compiled(_shifted_scores))
    if case.name == "":
        yield Rival("TRL's helpers", _trl_scores, most=most)


def _scores(logits: Tensor, token_ids: Tensor, ref_logits: Tensor | None = None) -> tuple[Tensor, ...]:
    """What one would write: half precision widened, then log-softmax and sums over the vocabulary."""
    log_p, at = torch.log_softmax(logits.float(), dim=-1), token_ids.unsqueeze(-1)
    p = log_p.exp()
    logprobs, entropy = log_p.gather(-1, at).squeeze(-1), -(p * log_p).sum(dim=-1)
    if ref_logits is None:
        return logprobs, entropy
    log_q = torch.log_softmax(ref_logits.float(), dim=-1)
    return logprobs, entropy, (p * (log_p - log_q)).sum(dim=-1), log_q.gather(-1, at).squeeze(-1)


def _shifted_scores(logits: Tensor, token_ids: Tensor, ref_logits: Tensor | None = None) -> tuple[Tensor, ...]:
    """The same with fewer passes over the vocabulary: the form torch.compile was found to do best with on a CPU."""
    logits, at = logits.float(), token_ids.unsqueeze(-1)
    z = logits - logits.amax(dim=-1, keepdim=True)
    p = z.exp()
    total = p.sum(dim=-1)
    log_sum = total.log()
    logprobs, entropy = z.gather(-1, at).squeeze(-1) - log_sum, log_sum - (p * z).sum(dim=-1) / total
    if ref_logits is None:
        return logprobs, entropy
    ref_logits = ref_logits.float()
    ref_z = ref_logits - ref_logits.amax(dim=-1, keepdim=True)
    ref_log_sum = ref_z.exp().sum(dim=-1).log()
    kl = (p * (z - ref_z)).sum(dim=-1) / total - log_sum + ref_log_sum
    return logprobs, entropy, kl, ref_z.gather(-1, at).squeeze(-1) - ref_log_sum


def _trl_scores() -> Function:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def scores(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
        # Its trainers have a few rows of many tokens, and it loops over rows.
        rows = math.gcd(len(token_ids), 8)
        logits_BTV, token_ids_BT = logits.unflatten(0, (rows, -1)), token_ids.unflatten(0, (rows, -1))
        logprobs, entropy = selective_log_softmax(logits_BTV, token_ids_BT), entropy_from_logits(logits_BTV)
        return logprobs.flatten(), entropy.flatten()

    return scores


# score_hidden


def _hidden(case: Case, device: str) -> Iterator[Rival]:
    most = CPU_LOGITS if device == "cpu" else math.inf
    if case.name == LOSS_ONLY:
        for name, make in (
            ("F.linear_cross_entropy, chunked", _torch_linear_cross_entropy),
            ("Liger fused_linear_cross_entropy", _liger_loss),
            ("cut-cross-entropy", partial(_cut_cross_entropy, device)),
        ):
            yield Rival(name, make, note="no entropy")
        yield Rival("eager torch", lambda: _cross_entropy, most=most, plain=True, note="no entropy")
        return
    yield Rival("eager torch", lambda: _hidden_scores, most=most, plain=True)
    yield Rival("torch.compile", lambda: _compiled(_hidden_scores))
    if case.name != WITH_REFERENCE:
        yield Rival("Liger scaled cross-entropy", _liger_scores)
        yield Rival("TRL's chunked lm_head", _trl_hidden, passes=("forward",), note="its entropy has no gradient")


def _hidden_scores(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
) -> tuple[Tensor, ...]:
    ref_logits = None if ref_hidden is None or ref_weight is None else F.linear(ref_hidden, ref_weight)
    return _scores(F.linear(hidden, weight), token_ids, ref_logits)


def _cross_entropy(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
    return (F.cross_entropy(F.linear(hidden, weight).float(), token_ids),)


def _torch_linear_cross_entropy() -> Function:
    from torch.nn import LinearCrossEntropyOptions  # torch 2.13

    def loss(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
        return (F.linear_cross_entropy(hidden, weight, token_ids, options=LinearCrossEntropyOptions()),)

    return loss


def _liger_loss() -> Function:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    liger = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, token_ids: (liger(weight, hidden, token_ids),)


def _liger_scores() -> Function:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as ScaledCrossEntropy

    def scores(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
        negative, entropy = ScaledCrossEntropy.apply(hidden, weight, token_ids, 1.0, -100, 1, True)
        return -negative, entropy

    return scores


def _cut_cross_entropy(device: str) -> Function:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if device == "cuda" else "torch_compile"  # its kernels are Triton's
    return lambda hidden, weight, token_ids: (linear_cross_entropy(hidden, weight, token_ids, impl=impl),)


def _trl_hidden() -> Function:
    from trl.trainer.utils import _ChunkedLogProbFunction

    chunk = 8192
    return lambda hidden, weight, token_ids: _ChunkedLogProbFunction.apply(hidden, weight, token_ids, 1.0, chunk)


# ppo_loss


def _loss(case: Case, device: str) -> Iterator[Rival]:
    eager = partial(_ppo_loss, _masked_mean)
    most = CPU_TOKENS if device == "cpu" else math.inf
    yield Rival("eager torch", lambda: eager, most=most, plain=True)
    yield Rival("torch.compile", lambda: _compiled(eager))
    yield Rival("TRL's masked_mean", _trl_loss, most=most)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def _trl_loss() -> Function:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.ppo.ppo_trainer import masked_mean

    return partial(_ppo_loss, masked_mean)


def _ppo_loss(
    mean: Callable[[Tensor, Tensor], Tensor],
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
) -> tuple[Tensor, ...]:
    """The loss, and the statistics that trainers log."""
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    near = old_values + (values - old_values).clamp(-0.2, 0.2)
    far_loss, near_loss = (values - returns).square(), (near - returns).square()
    loss = mean(torch.max(unclipped, clipped), mask) + 0.5 * mean(torch.max(far_loss, near_loss), mask)
    with torch.no_grad():
        clip_fraction = mean((clipped > unclipped).float(), mask)
        value_clip_fraction = mean((near_loss > far_loss).float(), mask)
        approx_kl, ratio_max = mean(torch.expm1(log_ratio) - log_ratio, mask), (ratio * mask).amax()
    return loss, clip_fraction, value_clip_fraction, approx_kl, ratio_max


# rms_norm and gated_silu


def _norm(case: Case, device: str) -> Iterator[Rival]:
    def eager(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        """In the manner of transformers' models."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + NORM_EPS)
        return (weight * wide.to(x.dtype),)

    def of_torch(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (F.rms_norm(x, weight.shape, weight, NORM_EPS),)

    yield Rival("eager torch", lambda: eager, plain=True)
    yield Rival("torch.compile", lambda: _compiled(eager))
    yield Rival("torch rms_norm", lambda: of_torch)
    if device == "cuda":
        yield Rival("Liger RMSNorm", _liger_norm)


def _liger_norm() -> Function:
    from liger_kernel.ops import LigerRMSNormFunction

    return lambda x, weight: (LigerRMSNormFunction.apply(x, weight, NORM_EPS, 0.0, "llama", False),)


def _gate(case: Case, device: str) -> Iterator[Rival]:
    def eager(gate: Tensor, up: Tensor) -> tuple[Tensor]:
        return (F.silu(gate) * up,)

    yield Rival("eager torch", lambda: eager, plain=True)
    yield Rival("torch.compile", lambda: _compiled(eager))
    if device == "cuda":
        yield Rival("Liger SiLUMul", _liger_gate)


def _liger_gate() -> Function:
    from liger_kernel.ops import LigerSiLUMulFunction

    return lambda gate, up: (LigerSiLUMulFunction.apply(gate, up),)
