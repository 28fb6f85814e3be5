"""The two parts of a classifier: its backbone, and a linear layer on top that works in float32.

Scores, values and class logits are float32 whatever the backbone's dtype. A bfloat16 number has 8 significant bits. A
value or a score in bfloat16 would be off by up to 0.4 %, and answers that differ by less would tie. The hidden states
keep the backbone's dtype; their product with the head's weights is formed and kept in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlcr.errors import ConfigError
from tlcr.models.modeling_classifier import backbone_of

HEADS = ("score", "classifier")
"""Names of the head in the classifiers of transformers."""


class Head(nn.Linear):
    """A linear layer that computes in the dtype of its weights, for any dtype of its input: y = x W' + b.

    x (..., H) of any float dtype; y (..., C) in the weights' dtype, which is float32 or float64.
    """

    def forward(self, x: Tensor) -> Tensor:
        # A copy: among layers of another dtype it is sharded by itself, and fully_shard wants no view of its output.
        return super().forward(x.to(self.weight.dtype)).clone()


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head: ids to ``last_hidden_state`` (B, L, H)."""
    base = backbone_of(model)
    if base is None:
        raise ConfigError(f"{type(model).__name__} has no backbone of its own (base_model is the model itself)")
    return base


def name_of_backbone(model: PreTrainedModel) -> str:
    """The name of ``backbone`` in the model, such as model or transformer."""
    body = backbone(model)
    return next(name for name, module in model.named_modules() if module is body)


def has_linear_head(model: PreTrainedModel) -> bool:
    """Whether ``classification_head`` finds a head."""
    return name_of_head(model) is not None


def classification_head(model: PreTrainedModel) -> nn.Linear:
    """The linear layer from hidden states to the outputs of a token or sequence classifier.

    Args:
        model: the classifier.

    Returns:
        Its head, which is called ``score`` or ``classifier``.

    Raises:
        ConfigError: the model has no linear layer of these names.
    """
    name = name_of_head(model)
    if name is None:
        raise ConfigError(
            f"{type(model).__name__} has no single linear head under {' or '.join(HEADS)}; use a decoder architecture "
            "such as Llama, Qwen, Mistral, Gemma or GPT-2"
        )
    return model.get_submodule(name)  # type: ignore[return-value]


def head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters of ``classification_head``; none where the model has no head."""
    return list(classification_head(model).parameters()) if has_linear_head(model) else []


def use_float32_head(model: PreTrainedModel, stored: Mapping[str, Tensor] | None = None) -> None:
    """Replaces the linear head of a classifier by a ``Head`` with the same weights, in place.

    Weights of bfloat16 or float16 become float32; float32 and float64 stay, and such a model computes the same bits
    as before. Where the head has several layers, as in encoders of the RoBERTa kind, its last one is replaced; a
    classifier without a single last layer stays as it is.

    Args:
        model: the classifier.
        stored: "weight" and perhaps "bias" of that layer as the model's files have them: transformers rounds every
            weight that it loads to one dtype. None: the weights are those that the model has.
    """
    name = name_of_last_layer(model)
    if name is None:
        return
    head = model.get_submodule(name)
    assert isinstance(head, nn.Linear)
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    if stored is None and isinstance(head, Head) and head.weight.dtype == dtype:
        return
    weights = head.state_dict() if stored is None else stored
    # On "meta" no random number is drawn, so that later random numbers do not depend on this replacement.
    wide = Head(head.in_features, head.out_features, bias="bias" in weights, device="meta")
    wide.load_state_dict({key: weight.to(head.weight.device, dtype) for key, weight in weights.items()}, assign=True)
    model.set_submodule(name, wide)


def name_of_head(model: PreTrainedModel) -> str | None:
    """The name of the linear head that a classifier has; None where it has no single one."""
    return next((name for name in HEADS if isinstance(getattr(model, name, None), nn.Linear)), None)


def name_of_last_layer(model: PreTrainedModel) -> str | None:
    """``name_of_head``; else the name of the only linear layer outside the backbone that is as wide as the outputs."""
    own = name_of_head(model)
    if own is not None:
        return own
    base = backbone_of(model)
    inside = set() if base is None else set(base.modules())
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in inside and module.out_features == model.config.num_labels
    ]
    return names[0] if len(names) == 1 else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; the model's mode is restored after."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
