"""The implementations behind torch operators: from the door's arguments to those of `_library`, and back."""

from typing import Any

import torch
from torch import Tensor

from tlcr.ops._gradients import GRADIENTS, eager_function
from tlcr.ops.types import PPOLoss, TokenScores


class Operators:
    """The operators of one namespace, with the arguments of the door. torch takes the kernel of the tensors' device."""

    def __init__(self, namespace: str) -> None:
        self._ops: Any = getattr(torch.ops, namespace)
        self._functions = {op: eager_function(op, self._ops) for op in GRADIENTS if hasattr(self._ops, op)}

    def _differentiable(self, op: str, *args: Any) -> Any:
        """Call an operator that has a gradient. Where nothing traces it, a torch.autograd.Function costs the host far
        less than the gradient that is registered with torch.library."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return getattr(self._ops, op)(*args)
        return self._functions[op].apply(*args)

    def fused_reward(
        self,
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
        with torch.no_grad():
            rewards: Tensor = self._ops.fused_reward(
                logits, mask, kl, kl_coef, terminal, temperature, scale, clip, kind == "discrete", band
            )
        return rewards

    def reward_from_hidden(
        self,
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
        with torch.no_grad():
            rewards: Tensor = self._ops.reward_from_hidden(
                hidden, weight, mask, bias, kl, kl_coef, terminal, temperature, scale, clip, kind == "discrete", band
            )
        return rewards

    def fused_gae(
        self,
        rewards: Tensor,
        values: Tensor,
        mask: Tensor | None,
        *,
        gamma: float,
        lam: float,
        whiten: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            advantages, returns = self._ops.fused_gae(rewards, values, mask, gamma, lam, whiten, cu_seqlens)
        return advantages, returns

    def score_tokens(
        self, logits: Tensor, token_ids: Tensor, *, ref_logits: Tensor | None, temperature: float | Tensor
    ) -> TokenScores:
        results = self._differentiable(
            "score_tokens", logits, token_ids, _constant(ref_logits), *_number_or_tensor(temperature)
        )
        return _token_scores(results, with_reference=ref_logits is not None)

    def score_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        *,
        bias: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        temperature: float | Tensor,
        chunk_tokens: int | None,
    ) -> TokenScores:
        reference = _constant(ref_hidden), _constant(ref_weight), _constant(ref_bias)
        results = self._differentiable(
            "score_hidden", hidden, weight, token_ids, bias, *reference, *_number_or_tensor(temperature), chunk_tokens
        )
        return _token_scores(results, with_reference=ref_hidden is not None)

    def ppo_loss(
        self,
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
        is_tensor = isinstance(denominator, Tensor)
        loss, stats, _ = self._differentiable(
            "ppo_loss",
            logprobs,
            _constant(old_logprobs),
            _constant(advantages),
            mask,
            clip,
            clip_high,
            dual_clip,
            values,
            _constant(old_values),
            _constant(returns),
            value_clip,
            value_coef,
            entropy,
            entropy_coef,
            kl,
            kl_coef,
            aggregate == "sequence",
            None if is_tensor else denominator,
            _constant(denominator) if is_tensor else None,
        )
        return PPOLoss(loss, *stats.unbind()[1:])

    def adamw_step(
        self,
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
        with torch.no_grad():
            self._ops.adamw_step(
                parameter, grad, exp_avg, exp_avg_sq, remainder, learning_rate, *betas, eps, weight_decay, step
            )

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        y: Tensor = self._differentiable("rms_norm", x, weight, eps)[0]
        return y

    def gated_silu(self, gate: Tensor, up: Tensor) -> Tensor:
        y: Tensor = self._differentiable("gated_silu", gate, up)
        return y


def _constant(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach()


def _number_or_tensor(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    return (1.0, temperature.detach()) if isinstance(temperature, Tensor) else (temperature, None)


def _token_scores(results: tuple[Tensor, ...], *, with_reference: bool) -> TokenScores:
    logprobs, entropy, ref_logprobs, kl, _, _ = results
    return TokenScores(logprobs, entropy, *((ref_logprobs, kl) if with_reference else ()))
