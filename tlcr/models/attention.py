"""Attention for short sequences in bfloat16 on a CPU, where torch's backward pass is several times slower.

Two matrix products use the CPU's bfloat16 units, forward and backward. The kernel behind
`torch.nn.functional.scaled_dot_product_attention` does not use them backward (`benchmarks/attention.py` compares both).
The products keep T x S probabilities for the backward pass, so longer sequences use torch's kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Keys of one query up to which the probabilities are kept (ours, by that benchmark).
SHORT = 256

NAME = "tlcr_sdpa"
"""Its name in transformers' `attn_implementation`; a name with "sdpa" makes transformers check the model's support."""

BEYOND = ("position_bias", "softcap", "cache", "output_attentions")
"""Keyword arguments that only transformers' sdpa handles; with one of them the call goes to it."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling query key^T) value for each head, several heads of queries sharing one of keys and values.

    query (B, Hq, T, D); key, value (B, Hk, S, D), Hk a divisor of Hq; attention_mask bool (B or 1, 1, T, S), True where
    a query sees a key. None is the causal mask, or no mask where is_causal (default: `module.is_causal`) is False.
    scaling: 1 / sqrt(D) where None. Returns (B, T, Hq, D). A query that sees no key gets a mean of the values. Calls
    that this module does not handle go to transformers' sdpa.
    """
    short = 1 < query.shape[2] == key.shape[2] <= SHORT
    low_precision = query.device.type == "cpu" and query.dtype == torch.bfloat16 and multiplies_bfloat16()
    beyond = [kwargs.get(name) for name in BEYOND]
    plain = dropout == 0 and not any(isinstance(value, Tensor) or value for value in beyond)
    if not (short and low_precision and plain) or (attention_mask is not None and attention_mask.dtype != torch.bool):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[
            None, None
        ]
    return _two_products(
        query, key, value, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling
    ), None


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16. Without them two products are slower than torch's
    kernel, which works in float32 (by the same benchmark, with ONEDNN_MAX_CPU_ISA=AVX2 before it)."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def _two_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    (B, Hq, T, D), (Hk, S) = query.shape, key.shape[1:3]
    # The queries that share one head of keys are stacked, so that no key is repeated.
    query_NTD = query.reshape(B * Hk, Hq // Hk * T, D)
    bias_NTS = query.new_zeros(())
    if mask is not None:
        # Half of the lowest number, so that adding a score cannot reach infinity.
        bias = query.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(query.dtype).min / 2)
        bias_NTS = bias.expand(B, Hq, T, S).reshape(B * Hk, Hq // Hk * T, S)
    scores_NTS = torch.baddbmm(bias_NTS, query_NTD, key.reshape(B * Hk, S, D).transpose(1, 2), alpha=scaling)
    answer_NTD = torch.bmm(scores_NTS.softmax(dim=-1), value.reshape(B * Hk, S, D))
    return answer_NTD.view(B, Hq, T, D).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
