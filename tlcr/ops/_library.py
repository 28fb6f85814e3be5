"""The torch operators that C++, CUDA and Triton kernels are registered under.

The schemas stand here, and nowhere in C++, because an installation without compiled code registers its Triton kernels
under the same ones; where there is compiled code, torch compares its signatures with these and refuses to load it if
they differ. An operator takes checked arguments (`tlcr.ops` is the door), returns float32 or float64, and where a
result does not exist (no reference, no gradient wanted) gives a tensor of no elements in its place.

The namespace ``tlcr`` holds the C++ kernels on the CPU, and on CUDA both the compiled and the Triton kernels. Triton
kernels on the CPU, which only its interpreter can run, live in ``tlcr_interpreted``: an operator has one kernel per
device.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Collection
from typing import Any

import torch

from tlcr.ops._fakes import FAKES
from tlcr.ops._gradients import GRADIENTS

SCHEMAS = {
    "fused_reward": (
        "(Tensor logits, Tensor mask, Tensor? kl, float kl_coef, Tensor? terminal, float temperature, float scale, "
        "float? clip, bool discrete, float band) -> Tensor"
    ),
    "reward_from_hidden": (
        "(Tensor hidden, Tensor weight, Tensor mask, Tensor? bias, Tensor? kl, float kl_coef, Tensor? terminal, "
        "float temperature, float scale, float? clip, bool discrete, float band) -> Tensor"
    ),
    "fused_gae": (
        "(Tensor rewards, Tensor values, Tensor? mask, float gamma, float lam, bool whiten, Tensor? cu_seqlens) "
        "-> (Tensor advantages, Tensor returns)"
    ),
    "score_tokens": (
        "(Tensor logits, Tensor token_ids, Tensor? ref_logits, float temperature, Tensor? temperatures) "
        "-> (Tensor logprobs, Tensor entropy, Tensor ref_logprobs, Tensor kl, Tensor stats, Tensor ref_stats)"
    ),
    "score_tokens_backward": (
        "(Tensor? g_logprobs, Tensor? g_entropy, Tensor? g_kl, Tensor logits, Tensor token_ids, Tensor? ref_logits, "
        "float temperature, Tensor? temperatures, Tensor entropy, Tensor kl, Tensor stats, Tensor ref_stats) -> Tensor"
    ),
    "score_hidden": (
        "(Tensor hidden, Tensor weight, Tensor token_ids, Tensor? bias, Tensor? ref_hidden, Tensor? ref_weight, "
        "Tensor? ref_bias, float temperature, Tensor? temperatures, int? chunk_tokens) "
        "-> (Tensor logprobs, Tensor entropy, Tensor ref_logprobs, Tensor kl, Tensor stats, Tensor ref_stats)"
    ),
    "score_hidden_backward": (
        "(Tensor? g_logprobs, Tensor? g_entropy, Tensor? g_kl, Tensor hidden, Tensor weight, Tensor token_ids, "
        "Tensor? bias, Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, float temperature, "
        "Tensor? temperatures, int? chunk_tokens, Tensor entropy, Tensor kl, Tensor stats, Tensor ref_stats, "
        "bool wants_hidden, bool wants_weight, bool wants_bias) -> (Tensor hidden, Tensor weight, Tensor bias)"
    ),
    "ppo_loss": (
        "(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, float clip, float clip_high, "
        "float? dual_clip, Tensor? values, Tensor? old_values, Tensor? returns, float? value_clip, float value_coef, "
        "Tensor? entropy, float entropy_coef, Tensor? kl, float kl_coef, bool per_sequence, float? denominator, "
        "Tensor? denominator_tensor) -> (Tensor loss, Tensor stats, Tensor row_weights)"
    ),
    "ppo_loss_backward": (
        "(Tensor g_loss, Tensor row_weights, Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, "
        "float clip, float clip_high, float? dual_clip, Tensor? values, Tensor? old_values, Tensor? returns, "
        "float? value_clip, float value_coef, Tensor? entropy, float entropy_coef, Tensor? kl, float kl_coef, "
        "bool wants_logprobs, bool wants_values, bool wants_entropy, bool wants_kl) "
        "-> (Tensor logprobs, Tensor values, Tensor entropy, Tensor kl)"
    ),
    "adamw_step": (
        "(Tensor(a!) parameter, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) remainder, "
        "float learning_rate, float beta1, float beta2, float eps, float weight_decay, int step) -> ()"
    ),
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor scales)",
    "rms_norm_backward": "(Tensor g_y, Tensor x, Tensor weight, Tensor scales) -> (Tensor x, Tensor weight)",
    "gated_silu": "(Tensor gate, Tensor up) -> Tensor",
    "gated_silu_backward": "(Tensor g_y, Tensor gate, Tensor up) -> (Tensor gate, Tensor up)",
}


# The operators that Triton has kernels for, and the module of each.
TRITON = {
    "fused_reward": "tlcr.kernels.reward",
    "fused_gae": "tlcr.kernels.gae",
    "ppo_loss": "tlcr.kernels.ppo_loss",
    "ppo_loss_backward": "tlcr.kernels.ppo_loss",
    "adamw_step": "tlcr.kernels.adamw",
}

# The ops that the CUDA extension has kernels for. What is in neither runs on a GPU as its specification.
CUDA = ("reward_from_hidden", "score_tokens", "score_hidden")

NAMESPACE, INTERPRETED = "tlcr", "tlcr_interpreted"


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU, as Python. Triton itself reads this when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def define() -> tuple[torch.library.Library, ...]:
    """Define the operators and register what is Python of them, once. They last as long as what is returned."""
    library = _define(NAMESPACE, SCHEMAS)
    if not has_triton():
        return (library,)
    _register_triton(library, "CUDA")
    if not interpreting():
        return (library,)
    interpreted = _define(INTERPRETED, TRITON)
    _register_triton(interpreted, "CPU")
    return library, interpreted


def _define(namespace: str, ops: Collection[str]) -> torch.library.Library:
    library = torch.library.Library(namespace, "DEF")
    for op in ops:
        library.define(op + SCHEMAS[op], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{op}", FAKES[op], lib=library)
    for op in GRADIENTS:
        if op in ops:
            setup_context, backward = GRADIENTS[op](getattr(torch.ops, namespace))
            torch.library.register_autograd(f"{namespace}::{op}", backward, setup_context=setup_context, lib=library)
    return library


def _register_triton(library: torch.library.Library, key: str) -> None:
    for op, module in TRITON.items():
        library.impl(op, _imported_when_called(module, op), key)


def _imported_when_called(module: str, op: str) -> Callable[..., Any]:
    """Triton takes long to import: not before one of its kernels runs."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), op)(*args)

    return call
