"""Makes the top layers of a decoder see the whole sequence (paper, an unused option of the released code; form: ours).

A causal discriminator scores a token by the prompt and the answer up to that token. With the top `k` layers
bidirectional it also sees the rest of the answer, which can decide whether a token is good or bad.
The weights stay those of the model; `model.config.tlcr_bidirectional_layers` stores `k`, and
`load_discriminator` applies it again. A plain `from_pretrained` elsewhere gives the same weights, with causal layers.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tlcr.errors import ConfigError
from tlcr.models import attention
from tlcr.models.heads import backbone

__all__ = ["make_top_layers_bidirectional"]

_ATTENTION = ("eager", "sdpa", attention.NAME)


def make_top_layers_bidirectional(model: PreTrainedModel, layers: int) -> None:
    """Lets the top decoder layers of ``model`` attend to every token that is not padding, in place.

    Works on models built like Llama (Mistral, Qwen, Gemma, Phi-3, OLMo, SmolLM, ...): decoder layers in
    ``backbone.layers``, each with a ``self_attn`` that has ``is_causal``.

    Args:
        model: the model to change.
        layers: how many layers, counted from the top; 0 leaves the model as it is.

    Raises:
        ConfigError: the model is built otherwise, has fewer layers, restricts those layers to a sliding window or uses
            an attention implementation other than eager or sdpa.
    """
    if layers == 0:
        return
    decoder_layers = _decoder_layers(model)
    if layers > len(decoder_layers):
        raise ConfigError(
            f"discriminator.bidirectional_layers is {layers}, but {type(model).__name__} has {len(decoder_layers)} "
            f"layers; set it to at most {len(decoder_layers)}"
        )
    implementation = model.config._attn_implementation
    if implementation not in _ATTENTION:
        raise ConfigError(
            f"discriminator.bidirectional_layers needs attention implementation {' or '.join(_ATTENTION[:2])}, not "
            f"{implementation!r}; set model.attn_implementation accordingly"
        )
    kinds = getattr(model.config, "layer_types", None)
    if kinds is None:
        windowed = getattr(model.config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if windowed else "full_attention"] * len(decoder_layers)
    others = sorted(set(kinds[-layers:]) - {"full_attention"})
    if others:
        raise ConfigError(
            f"discriminator.bidirectional_layers is {layers}, but some of those layers of {type(model).__name__} have "
            f"{' and '.join(others)}; only full_attention can be made to see everything: set it lower"
        )
    for layer in decoder_layers[-layers:]:
        # While this is True, sdpa reads a missing mask as a causal one.
        layer.get_submodule("self_attn").is_causal = False  # type: ignore[assignment]
        layer.register_forward_pre_hook(_see_everything, with_kwargs=True)
    model.config.tlcr_bidirectional_layers = layers


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    layers = getattr(backbone(model), "layers", None)
    if isinstance(layers, nn.ModuleList) and all(
        isinstance(getattr(getattr(layer, "self_attn", None), "is_causal", None), bool) for layer in layers
    ):
        return list(layers)
    raise ConfigError(
        f"discriminator.bidirectional_layers is not supported for {type(model).__name__}: it needs a decoder whose "
        "layers stand in `layers`, each with a `self_attn` (Llama, Mistral, Qwen, Gemma, Phi-3, OLMo, SmolLM and "
        "others built like them); set it to 0"
    )


def _see_everything(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replaces the causal mask (B, 1, L, L) by one that hides padding only; no mask (no padding) stays None.

    The last row of the causal mask already is that mask: the last token sees every column that is not padding.
    """
    mask = kwargs["attention_mask"]
    if mask is None:
        return args, kwargs
    return args, {**kwargs, "attention_mask": mask[..., -1:, :].expand_as(mask)}
