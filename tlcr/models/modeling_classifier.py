"""Token and sequence classifiers for any decoder of transformers: the decoder's backbone under one linear layer.

For most decoders (OPT, Gemma 3, OLMo 2, Granite, ...) transformers has no token classifier. This file makes one from
the causal language model's class. It needs torch and transformers alone: tlcr saves a copy of it beside the weights of
such a classifier, with the class's name in the last lines, and ``auto_map`` in config.json leads there::

    AutoModelForTokenClassification.from_pretrained(folder, trust_remote_code=True)

Axes: B rows, L columns of a padded row, H hidden units, C outputs.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput


class LinearHead:
    """The backbone of ``causal_lm`` under ``score``, a linear layer whose weights and products are float32.

    The layer is as wide as the causal model's own head, whose place it takes. ``causal_lm`` and ``base_model_prefix``,
    the name of its backbone, are set by ``token_classifier`` and ``sequence_classifier``.
    """

    causal_lm: type[PreTrainedModel]
    bias: bool

    def __init__(self: Any, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        whole = self.causal_lm(config)
        setattr(self, self.base_model_prefix, backbone_of(whole))
        embeddings = whole.get_output_embeddings()
        self.score = nn.Linear(embeddings.weight.shape[1], config.num_labels, bias=self.bias)
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls.causal_lm._can_set_attn_implementation()  # transformers reads the source of the class's module

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.causal_lm._can_set_experts_implementation()

    def logits(
        self: Any, input_ids: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None, kwargs: Any
    ) -> Tensor:
        """The outputs (B, L, C) of every column."""
        backbone = getattr(self, self.base_model_prefix)
        kwargs = {"use_cache": False, **kwargs}
        if position_ids is not None and "position_ids" in inspect.signature(backbone.forward).parameters:
            kwargs = {**kwargs, "position_ids": position_ids}
        hidden_BLH = backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        logits_BLC: Tensor = self.score(hidden_BLH.to(self.score.weight.dtype))
        return logits_BLC


class TokenClassifier(LinearHead):
    """Outputs for every token."""

    bias = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        return TokenClassifierOutput(logits=self.logits(input_ids, attention_mask, position_ids, kwargs))


class SequenceClassifier(LinearHead):
    """Outputs for every row, read at its last token that counts; without an attention mask, at its last token."""

    bias = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        logits_BLC = self.logits(input_ids, attention_mask, position_ids, kwargs)
        rows_B = torch.arange(logits_BLC.shape[0], device=logits_BLC.device)
        last_B = torch.full_like(rows_B, logits_BLC.shape[1] - 1)
        if attention_mask is not None:
            last_B = last_B - attention_mask.flip(1).bool().int().argmax(dim=1).to(last_B.device)
        return SequenceClassifierOutput(logits=logits_BLC[rows_B, last_B])


def token_classifier(causal_lm: type[PreTrainedModel], config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The token classifier of a decoder: ``OPTForTokenClassification`` for ``OPTForCausalLM``.

    Args:
        causal_lm: the class of the causal language model.
        config_class: its configs; not always those that the class names itself.

    Returns:
        A class derived from the architecture's own ``PreTrainedModel``.
    """
    return _derive(TokenClassifier, "ForTokenClassification", causal_lm, config_class)


def sequence_classifier(
    causal_lm: type[PreTrainedModel], config_class: type[PreTrainedConfig]
) -> type[PreTrainedModel]:
    """The sequence classifier of a decoder: ``GraniteForSequenceClassification`` for ``GraniteForCausalLM``.

    Args:
        causal_lm: the class of the causal language model.
        config_class: its configs; not always those that the class names itself.

    Returns:
        A class derived from the architecture's own ``PreTrainedModel``.
    """
    return _derive(SequenceClassifier, "ForSequenceClassification", causal_lm, config_class)


def _derive(
    kind: type[LinearHead], suffix: str, causal_lm: type[PreTrainedModel], config_class: type[PreTrainedConfig]
) -> Any:
    own = next(
        base
        for base in causal_lm.__mro__[1:]
        if issubclass(base, PreTrainedModel) and not issubclass(base, GenerationMixin)
    )
    stem = re.sub(r"(For(CausalLM|ConditionalGeneration)|(Model)?(With)?LMHead(Model)?)$", "", causal_lm.__name__)
    strict = {*(own._keep_in_fp32_modules_strict or ()), *(causal_lm._keep_in_fp32_modules_strict or ()), "score"}
    return type(
        stem + suffix,
        (kind, own),
        {
            "__module__": __name__,
            "causal_lm": causal_lm,
            "config_class": config_class,
            "base_model_prefix": causal_lm.base_model_prefix,
            # whatever dtype a program asks for, the head is read and computed in the dtype that it was trained in
            "_keep_in_fp32_modules_strict": strict,
        },
    )


def backbone_of(model: PreTrainedModel) -> PreTrainedModel | None:
    """The part of a model that gives hidden states.

    Args:
        model: a model with a head.

    Returns:
        ``model.base_model``; where that is the model itself, its only part that is a ``PreTrainedModel``; else None.
    """
    base: PreTrainedModel = model.base_model  # type: ignore[assignment]
    if base is not model:
        return base
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    return parts[0] if len(parts) == 1 else None
