"""Frozen linear layers whose weights are in 4 bits, by bitsandbytes: what adapters stand on where memory is short.

NF4 with quantised scales (Dettmers et al. 2023, QLoRA, arXiv 2305.14314). Each weight is one of 16 numbers, the
quantiles of a normal distribution, times the largest size among its block of 64; these sizes are kept in 8 bits, 256 of
them over a float32 again: 0.5 + 1 / 64 + 4 / (64 * 256) bytes a weight. A layer computes with the weights that these
codes stand for, in the dtype of the model, and they are made anew in each pass.

bitsandbytes is imported inside the functions that need it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlcr.errors import ConfigError

__all__ = ["BITS", "bytes_of", "dequantised", "is_quantised", "linear_layers", "missing_bitsandbytes", "quantise"]

BITS = 4
BLOCK, OF_BLOCKS = 64, 256
"""Weights that share a scale, and scales that share one."""
TABLES = 4 * (16 + 256 + 1)
"""Bytes of the float32 numbers that the codes of a layer's weights, and of their scales, stand for; and a mean."""


def missing_bitsandbytes() -> ConfigError | None:
    """Whether bitsandbytes is there.

    Returns:
        The error for 4-bit weights where it is not installed; None where it is.
    """
    if find_spec("bitsandbytes") is not None:
        return None
    return ConfigError(
        "lora.base_bits needs the package bitsandbytes, and it is not installed; pip install bitsandbytes, or set "
        "lora.base_bits: null"
    )


def linear_layers(body: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a backbone that ``quantise`` replaces: those whose rows are whole blocks.

    Others stay as they are. bitsandbytes 0.50 gives them wrong numbers on a CPU.

    Args:
        body: the backbone.

    Returns:
        The layers by their paths.
    """
    layers = {path: module for path, module in body.named_modules() if isinstance(module, nn.Linear)}
    return {path: layer for path, layer in layers.items() if layer.in_features % BLOCK == 0}


def quantise(body: PreTrainedModel) -> None:
    """Replaces the weights of a backbone's linear layers by 4-bit ones that stay as they are, in place.

    Embeddings, norms and biases stay in their dtype, and so do heads, which are no part of a backbone.

    Args:
        body: the backbone, on its device.

    Raises:
        ConfigError: bitsandbytes is not installed, or the backbone has no such layers, as GPT-2's has none.
    """
    if (error := missing_bitsandbytes()) is not None:
        raise error
    layers = linear_layers(body)
    if not layers:
        raise ConfigError(
            f"{type(body).__name__} has no linear layers (torch.nn.Linear) of a multiple of {BLOCK} inputs, which "
            "alone lora.base_bits keeps in 4 bits; set lora.base_bits: null"
        )
    for path, layer in layers.items():
        body.set_submodule(path, _in_four_bits(layer))


def _in_four_bits(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = layer.weight.detach()
    made: Any = Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, weight.dtype, quant_type="nf4", device="meta"
    )
    codes, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    made.weight = Params4bit(
        codes, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=made
    )
    made.quant_state = state
    made.bias = layer.bias
    # bitsandbytes would pack the codes in another way once a layer runs without gradients.
    made.support_avx512bf16_for_cpu = False
    return made.train(layer.training)


def is_quantised(layer: nn.Module) -> bool:
    """Whether ``quantise`` made a layer.

    Args:
        layer: any module.

    Returns:
        Whether its weight is in 4 bits.
    """
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def dequantised(layer: nn.Module) -> Tensor:
    """The weight that a layer of ``quantise`` computes with.

    Args:
        layer: the layer.

    Returns:
        (out, in), in the dtype that the weight had before.
    """
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = layer.weight
    found: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return found


def bytes_of(shape: torch.Size) -> int:
    """The bytes of a weight in 4 bits, with its scales.

    Args:
        shape: of the weight.

    Returns:
        The bytes that ``quantise`` needs for it.
    """
    blocks = -(-shape.numel() // BLOCK)
    return -(-shape.numel() // 2) + blocks + 4 * -(-blocks // OF_BLOCKS) + TABLES
