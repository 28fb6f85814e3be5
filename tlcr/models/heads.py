"""The two parts of a classifier: its backbone, and a linear layer on top that works in float32.

Scores, values and class logits are float32 whatever the backbone's dtype. A bfloat16 number has 8 significant bits. A
value or a score in bfloat16 would be off by up to 0.4 %, and answers that differ by less would tie. The hidden states
keep the backbone's dtype; their product with the head's weights is formed and kept in float32.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from tlcr.errors import ConfigError
from tlcr.models.modeling_classifier import backbone_of

logger = logging.getLogger(__name__)

HEADS = ("score", "classifier")
"""Names of the head in the classifiers of transformers."""


class Head(nn.Linear):
    """A linear layer that computes in the dtype of its weights, for any dtype of its input: y = x W' + b.

    x (..., H) of any float dtype; y (..., C) in the weights' dtype, which is float32 or float64.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head: ids to ``last_hidden_state`` (B, L, H)."""
    base = backbone_of(model)
    if base is None:
        raise ConfigError(f"{type(model).__name__} has no backbone of its own (base_model is the model itself)")
    return base


def has_linear_head(model: PreTrainedModel) -> bool:
    """Whether ``classification_head`` finds a head."""
    return _name_of_head(model) is not None


def classification_head(model: PreTrainedModel) -> nn.Linear:
    """The linear layer from hidden states to the outputs of a token or sequence classifier.

    Args:
        model: the classifier.

    Returns:
        Its head, which is called ``score`` or ``classifier``.

    Raises:
        ConfigError: the model has no linear layer of these names.
    """
    name = _name_of_head(model)
    if name is None:
        raise ConfigError(
            f"{type(model).__name__} has no single linear head under {' or '.join(HEADS)}; use a decoder architecture "
            "such as Llama, Qwen, Mistral, Gemma or GPT-2"
        )
    return model.get_submodule(name)  # type: ignore[return-value]


def use_float32_head(model: PreTrainedModel, saved_in: str | None = None) -> None:
    """Replaces the linear head of a classifier by a ``Head`` with the same weights, in place.

    Weights of bfloat16 or float16 become float32; float32 and float64 stay, and such a model computes the same bits
    as before. Where the head has several layers, as in encoders of the RoBERTa kind, its last one is replaced; a
    classifier without a single last layer stays as it is.

    Args:
        model: the classifier.
        saved_in: the folder or hub name that the model was loaded from. transformers rounds every weight that it loads
            to one dtype, so the head's are read from there once more. None: the weights are those that the model has.
    """
    name = _name_of_head(model) or _name_of_last_layer(model)
    if name is None:
        return
    head = model.get_submodule(name)
    assert isinstance(head, nn.Linear)
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    if isinstance(head, Head) and head.weight.dtype == dtype:
        return
    weights = head.state_dict()
    if saved_in is not None and dtype != head.weight.dtype:
        weights = _stored_weights(saved_in, name, weights)
    # On "meta" no random number is drawn, so that later random numbers do not depend on this replacement.
    wide = Head(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    wide.load_state_dict({key: weight.to(head.weight.device, dtype) for key, weight in weights.items()}, assign=True)
    model.set_submodule(name, wide)


def _name_of_head(model: PreTrainedModel) -> str | None:
    return next((name for name in HEADS if isinstance(getattr(model, name, None), nn.Linear)), None)


def _name_of_last_layer(model: PreTrainedModel) -> str | None:
    """The only linear layer outside the backbone that is as wide as the classifier's outputs."""
    base = backbone_of(model)
    inside = set() if base is None else set(base.modules())
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in inside and module.out_features == model.config.num_labels
    ]
    return names[0] if len(names) == 1 else None


def _stored_weights(source: str, name: str, rounded: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the head `name` in the dtype that the safetensors of `source` have them in."""
    found = {}
    for key, weight in rounded.items():
        file = _file_with(source, f"{name}.{key}")
        if file is None:
            logger.warning("%s keeps no %s.%s under that name; it was read in %s", source, name, key, weight.dtype)
            return rounded
        with safe_open(file, framework="pt") as tensors:
            found[key] = tensors.get_tensor(f"{name}.{key}")
    return found


def _file_with(source: str, key: str) -> str | None:
    """The safetensors file of a folder or hub name that holds the tensor `key`."""
    whole = cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if whole is not None:
        with safe_open(whole, framework="pt") as tensors:
            return whole if key in tensors.keys() else None  # noqa: SIM118 (no mapping)
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME)
    assert index is not None  # it raises where there is none
    part = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].get(key)
    return None if part is None else cached_file(source, part)
