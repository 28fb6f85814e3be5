"""Which class a new classifier gets, and what is saved with it so that it loads in any program.

transformers' own class is taken where it holds the decoder's backbone, unchanged, under a linear head. All other
decoders get a class of ``tlcr/models/modeling_classifier.py``, which is copied into the saved folder.
"""

from __future__ import annotations

import functools
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from tlcr.errors import ConfigError
from tlcr.models import modeling_classifier
from tlcr.models.heads import backbone, has_linear_head

MODULE = "modeling_classifier"
"""The saved module's name, of which ``auto_map`` in config.json speaks."""

_MAPPINGS: dict[Any, Any] = {
    AutoModelForTokenClassification: MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}


def new_class(auto: Any, source: PreTrainedModel, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a classifier with the backbone of ``source``.

    Args:
        auto: ``AutoModelForTokenClassification`` or ``AutoModelForSequenceClassification``.
        source: the model whose backbone the classifier gets.
        config: the classifier's config.

    Returns:
        transformers' class where it holds the same backbone under a linear head; else one of ours.

    Raises:
        ConfigError: ``source`` has not the backbone of a causal language model that transformers knows.
    """
    theirs = _MAPPINGS[auto].get(type(config), None)
    if theirs is not None and _holds(theirs, source, config):
        return theirs
    causal_lm: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if causal_lm is None or not causal_lm.__module__.startswith("transformers."):
        raise ConfigError(
            f"no {auto.__name__.removeprefix('AutoModelFor')} class can be made for {type(source).__name__}: it is no "
            "causal language model of transformers itself; use a decoder that transformers has, such as Llama or Qwen"
        )
    config_class: Any = type(config)
    ours: type[PreTrainedModel] = _our_class(auto, causal_lm, config_class)
    if not _holds(ours, source, config):
        raise ConfigError(
            f"no {auto.__name__.removeprefix('AutoModelFor')} class can be made for {type(source).__name__}: its "
            f"backbone is not that of {causal_lm.__name__}, the decoder of this kind; start from a decoder"
        )
    return ours


def saved_class(auto: Any, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Our class for a folder that ``save_model`` wrote, by its config; None where transformers has the class."""
    named = (getattr(config, "auto_map", None) or {}).get(auto.__name__, "")
    if not named.rpartition("--")[2].startswith(MODULE + "."):
        return None
    config_class: Any = type(config)
    return _our_class(auto, MODEL_FOR_CAUSAL_LM_MAPPING[config_class], config_class)


def name_source(model: PreTrainedModel) -> None:
    """Sets ``auto_map`` of the config of one of our classes; removes one that was copied from such a config."""
    if isinstance(model, modeling_classifier.LinearHead):
        model.config.auto_map = {_auto(model): f"{MODULE}.{type(model).__name__}"}
    elif any(MODULE + "." in str(name) for name in (getattr(model.config, "auto_map", None) or {}).values()):
        del model.config.auto_map


def write_source(model: PreTrainedModel, folder: Path) -> None:
    """Writes the module that ``auto_map`` names, where the model's class is one of ours."""
    if not isinstance(model, modeling_classifier.LinearHead):
        return
    name, parts = type(model).__name__, (model.causal_lm.__name__, type(model.config).__name__)
    make = "token_classifier" if _auto(model) == AutoModelForTokenClassification.__name__ else "sequence_classifier"
    general = Path(modeling_classifier.__file__).read_text(encoding="utf-8")
    imported = ", ".join(sorted(parts))
    own = f"\n\nfrom transformers import {imported}  # noqa: E402\n\n{name} = {make}({', '.join(parts)})\n"
    (folder / f"{MODULE}.py").write_text(general + own, encoding="utf-8")


def _auto(model: Any) -> str:
    token = isinstance(model, modeling_classifier.TokenClassifier)
    return (AutoModelForTokenClassification if token else AutoModelForSequenceClassification).__name__


@functools.cache
def _our_class(auto: Any, causal_lm: Any, config_class: Any) -> type[PreTrainedModel]:
    if auto is AutoModelForTokenClassification:
        return modeling_classifier.token_classifier(causal_lm, config_class)
    return modeling_classifier.sequence_classifier(causal_lm, config_class)


def _holds(kind: type[PreTrainedModel], source: PreTrainedModel, config: PreTrainedConfig) -> bool:
    """Whether models of ``kind`` have the backbone of ``source`` and a linear head; nothing is allocated."""
    with torch.device("meta"), no_init_weights():
        model = kind(deepcopy(config))
    if not has_linear_head(model) or modeling_classifier.backbone_of(model) is None:
        return False
    theirs, ours = ({n: w.shape for n, w in backbone(m).state_dict().items()} for m in (model, source))
    return theirs == ours
