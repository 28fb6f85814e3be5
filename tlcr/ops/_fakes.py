"""What each operator of `_library` returns, in shapes and dtypes: for torch.compile, which traces without computing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tlcr.ops.reference import arithmetic_dtype
from tlcr.ops.types import PPOLoss

Scores = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _fused_reward(logits: Tensor, mask: Tensor, *_: Any) -> Tensor:
    return mask.new_empty(mask.shape, dtype=arithmetic_dtype(logits))


def _reward_from_hidden(hidden: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    return mask.new_empty(mask.shape, dtype=arithmetic_dtype(hidden, weight, bias))


def _fused_gae(rewards: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = arithmetic_dtype(rewards, values)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


def _scores(token_ids: Tensor, dtype: torch.dtype, *, with_reference: bool) -> Scores:
    shape = token_ids.shape
    ref_shape = shape if with_reference else (0,)
    shapes = (shape, shape, ref_shape, ref_shape, (*shape, 2), (*ref_shape, 2))
    logprobs, entropy, ref_logprobs, kl, stats, ref_stats = (token_ids.new_empty(s, dtype=dtype) for s in shapes)
    return logprobs, entropy, ref_logprobs, kl, stats, ref_stats


def _score_tokens(logits: Tensor, token_ids: Tensor, ref_logits: Tensor | None, *_: Any) -> Scores:
    return _scores(token_ids, arithmetic_dtype(logits, ref_logits), with_reference=ref_logits is not None)


def _score_tokens_backward(*args: Any) -> Tensor:
    logits: Tensor = args[3]
    return logits.new_empty(logits.shape)


def _score_hidden(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    *_: Any,
) -> Scores:
    dtype = arithmetic_dtype(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    return _scores(token_ids, dtype, with_reference=ref_hidden is not None)


def _score_hidden_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, _, bias = args[3:7]
    wants_hidden, wants_weight, wants_bias = args[-3:]
    return (
        _gradient(hidden, wants_hidden),
        _gradient(weight, wants_weight),
        _gradient(weight if bias is None else bias, wants_bias),
    )


def _ppo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *options: Any) -> Any:
    # The last is the denominator, which takes no part in the choice of the arithmetic.
    others = [option for option in options[:-1] if isinstance(option, Tensor)]
    dtype = arithmetic_dtype(logprobs, old_logprobs, advantages, *others)
    shapes = ((), (len(PPOLoss._fields),), mask.shape[:1])
    return tuple(mask.new_empty(shape, dtype=dtype) for shape in shapes)


def _ppo_loss_backward(g_loss: Tensor, row_weights: Tensor, logprobs: Tensor, *args: Any) -> Any:
    values, entropy, kl = args[6], args[11], args[13]
    inputs = zip((logprobs, values, entropy, kl), args[-4:], strict=True)
    return tuple(_gradient(row_weights if like is None else like, wanted) for like, wanted in inputs)


def _adamw_step(*_: Any) -> None:
    pass


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.numel() // max(1, weight.numel())
    return x.new_empty(x.shape), x.new_empty((rows,), dtype=arithmetic_dtype(x))


def _rms_norm_backward(g_y: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _gated_silu_backward(g_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _gradient(like: Tensor, wanted: bool) -> Tensor:
    return like.new_empty(like.shape if wanted else (0,))


FAKES: dict[str, Callable[..., Any]] = {
    "fused_reward": _fused_reward,
    "reward_from_hidden": _reward_from_hidden,
    "fused_gae": _fused_gae,
    "score_tokens": _score_tokens,
    "score_tokens_backward": _score_tokens_backward,
    "score_hidden": _score_hidden,
    "score_hidden_backward": _score_hidden_backward,
    "ppo_loss": _ppo_loss,
    "ppo_loss_backward": _ppo_loss_backward,
    "adamw_step": _adamw_step,
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "gated_silu": _gated_silu,
    "gated_silu_backward": _gated_silu_backward,
}
