"""A narrow model of another's architecture, to try on a CPU what will run with the large one."""

from __future__ import annotations

from copy import deepcopy

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tlcr.errors import ConfigError
from tlcr.models.faults import one_line

__all__ = ["LAYERS", "WIDTH", "miniature"]

WIDTH, LAYERS, HEADS = 64, 2, 4
EXPERTS = 4
"""Experts of each layer, at most."""


def miniature(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """A model with random weights of the architecture of ``config``: the same kinds of layers, two of them, 64 wide.

    Queries share keys and values as they do in the large model. Positions, normalisation, activations, tied
    embeddings and all else stay as ``config`` has them.

    Args:
        config: the large model's.
        tokenizer: whose tokens the small one has.
        seed: decides the weights; the caller's random state is left alone.

    Returns:
        The model, in float32 on the CPU.

    Raises:
        ConfigError: the architecture cannot be made so small.
    """
    small = deepcopy(config.get_text_config())
    heads = getattr(small, "num_attention_heads", None) or HEADS
    shared = heads // (getattr(small, "num_key_value_heads", None) or heads)
    layers = list(dict.fromkeys(vars(small).get("layer_types") or ()))[:LAYERS]
    changes = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "ffn_dim": 3 * WIDTH,
        "moe_intermediate_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "num_hidden_layers": LAYERS,
        "layer_types": (layers * LAYERS)[:LAYERS],
        "num_attention_heads": HEADS,
        "num_key_value_heads": max(1, HEADS // max(1, shared)),
        "head_dim": WIDTH // HEADS,
        "num_experts": EXPERTS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    always = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    for name, value in changes.items():
        if name in always or getattr(small, name, None) is not None:
            setattr(small, name, value)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    except Exception as error:  # a model's own code can raise anything
        raise ConfigError(
            f"a {config.model_type!r} model of width {WIDTH} cannot be made to try the run with ({one_line(error)}); "
            "leave --check out, and use 'tlcr doctor'"
        ) from error
    return model
