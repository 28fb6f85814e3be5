"""Models of the Hugging Face libraries: loading one in its role, or making a classifier of a causal LM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GgufConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from tlcr.config.schema import GeneratorConfig, ModelConfig
from tlcr.errors import ConfigError
from tlcr.models import classifiers, inspection, probes
from tlcr.models.faults import AUTO, LOADABLE, WHAT, Role, one_line, raise_first, refuse_embedded, some
from tlcr.models.heads import backbone, classification_head, name_of_head, name_of_last_layer, use_float32_head
from tlcr.models.inspection import THREE_CLASSES, TWO_CLASSES, Inspection
from tlcr.models.notes import note
from tlcr.models.preparing import prepared
from tlcr.models.stored import (
    find_stored,
    is_unread,
    leave_unread,
    make_buffers,
    stored_for_copy,
    when_read,
    without_weights,
)
from tlcr.models.weight_files import read_weights, weight_files
from tlcr.models.weight_names import report_faults, unused
from tlcr.training.sharding import Sharding, has_shards


def load_causal_lm(
    cfg: GeneratorConfig, *, device: torch.device | None = None, sharding: Sharding | None = None
) -> PreTrainedModel:
    """The causal language model of ``cfg``, in its dtype, with no dropout. Safetensors only, or the GGUF file named.

    Args:
        cfg: the model's folder or hub name, and settings of loading.
        device: where the weights go, each straight from its file; None: the CPU.
        sharding: how the caller will cut the model (``tlcr.training.sharding.shard``), alone or as a part of another
            module. The model is then on the meta device, and its weights are read when it is cut. Where that cannot be
            (a GGUF file, weights that transformers converts), every process reads them whole, and a note says so.

    Returns:
        The model, every weight of which was in the file.

    Raises:
        ConfigError: the folder has a fault (``tlcr.models.inspection``), or it is not one that transformers can load.
    """
    refuse_embedded(cfg.path)
    found = _inspected(cfg, "policy")
    model = None if sharding is None else _without_weights("policy", AUTO["policy"], cfg, found)
    if model is None:
        model = _read("policy", AUTO["policy"], cfg, found, device if sharding is None else None)
    when_read(model, partial(probes.require_causal, model))
    return prepared(model, cfg)


def load_token_classifier(
    source: str | Path | PreTrainedModel,
    cfg: ModelConfig,
    *,
    id2label: Mapping[int, str] | None = None,
    copy_head: bool = False,
    device: torch.device | None = None,
    sharding: Sharding | None = None,
) -> PreTrainedModel:
    """A standard ``AutoModelForTokenClassification`` whose labels are negative/positive or negative/neutral/positive.

    Args:
        source: a folder (or hub name) with a trained classifier, or a causal LM, whose backbone is copied under a new
            head (see ``_with_new_head``) and which stays as it is.
        cfg: dtype and settings of loading.
        id2label: the labels wanted. None accepts either set, and is allowed for a folder only.
        copy_head: where ``source`` is a model with a head of as many outputs, its weight is copied too.
        device: where the weights of a folder go; None: the CPU. A copy of a causal LM is made where that is.
        sharding: as for ``load_causal_lm``, for a folder. A copy of a causal LM that was loaded so has no weights
            either before it is cut.

    Returns:
        The classifier.

    Raises:
        ConfigError: a loaded classifier has other labels, or has them in another order; or a new one gets no labels.
    """
    if isinstance(source, PreTrainedModel):
        if id2label is None:
            raise ConfigError(
                "a new token classifier needs id2label: TWO_CLASSES or THREE_CLASSES of tlcr.models.inspection"
            )
        return _with_new_head(AutoModelForTokenClassification, source, cfg, dict(id2label), copy_head=copy_head)
    model = _load_classifier("discriminator", source, cfg, device, sharding)
    accepted = [TWO_CLASSES, THREE_CLASSES] if id2label is None else [dict(id2label)]
    raise_first(inspection.label_faults(model.config, str(source), accepted))
    return model


def load_sequence_classifier(
    source: str | Path | PreTrainedModel,
    cfg: ModelConfig,
    *,
    device: torch.device | None = None,
    sharding: Sharding | None = None,
) -> PreTrainedModel:
    """A standard ``AutoModelForSequenceClassification`` with one output, the score of an answer.

    Args:
        source: as for ``load_token_classifier``.
        cfg: dtype and settings of loading.
        device: as for ``load_token_classifier``.
        sharding: as for ``load_token_classifier``.

    Returns:
        The classifier.

    Raises:
        ConfigError: a loaded classifier has more than one output, or cannot be run on padded rows
            (``probes.check_reward_model``).
    """
    if isinstance(source, PreTrainedModel):
        return _with_new_head(AutoModelForSequenceClassification, source, cfg, {0: "score"})
    model = _load_classifier("reward_model", source, cfg, device, sharding)
    outputs = model.config.num_labels or 0
    if outputs != 1:
        raise_first([inspection.several_outputs(str(source), outputs)])
    own = {name: getattr(model.config, name) for name in ("mean", "std") if hasattr(model.config, name)}
    if own:
        said = " and ".join(f"{name} {value}" for name, value in own.items())
        note(f"the reward model {str(source)!r} has {said} in its config.json: not applied, scores are the head's own")
    when_read(model, partial(probes.check_reward_model, model))
    return model


def _inspected(cfg: GeneratorConfig, role: Role) -> Inspection:
    found = inspection.inspect_model(cfg, role)
    raise_first(found.faults)
    if found.attention == "eager" and cfg.attn_implementation != "eager":
        note(f"{cfg.path!r} runs with eager attention (model.attn_implementation): its architecture has no other")
    return found


def _common(cfg: GeneratorConfig, found: Inspection) -> dict[str, Any]:
    return {
        "config": found.config,
        "dtype": getattr(torch, cfg.dtype),
        "attn_implementation": found.attention,
        "trust_remote_code": cfg.trust_remote_code,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # the report names them, see _check_report
    }


def _onto(device: torch.device | None) -> dict[str, Any]:
    """Lets ``from_pretrained`` put each weight on the device as it reads it: the model is never whole on the host."""
    return {} if device is None or device.type == "cpu" else {"device_map": {"": device}}


def _move(model: PreTrainedModel, device: torch.device | None) -> None:
    nn.Module.to(model, device)  # the wrapper of PreTrainedModel.to loses its type


def _check_report(
    report: Mapping[str, Any],
    model: PreTrainedModel,
    cfg: GeneratorConfig,
    role: Role,
    found: Inspection,
) -> None:
    """Raises ConfigError where a weight was newly initialised; a note of weights that no part of the model took."""
    raise_first(report_faults(report, model, cfg, role, found.head))
    left_over = unused(report, found.head)
    if left_over:
        count = "1 weight" if len(left_over) == 1 else f"{len(left_over)} weights"
        verb = "is" if len(left_over) == 1 else "are"
        note(f"{count} of {cfg.path!r} {verb} not used as {type(model).__name__}: {some(left_over)}")


@contextmanager
def _loading(what: str, source: str) -> Iterator[None]:
    """Turns any error from a missing folder, or from one of another format, into a ConfigError of one line."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = one_line(error)
        raise ConfigError(f"cannot load a {what} from {source!r}: {reason}; {LOADABLE}") from error


def _load_classifier(
    role: Role, source: str | Path, cfg: ModelConfig, device: torch.device | None, sharding: Sharding | None
) -> PreTrainedModel:
    cfg = replace(cfg, path=str(source), gguf_file=None)
    found = _inspected(cfg, role)
    assert found.config is not None  # _inspected has raised
    kind = classifiers.saved_class(AUTO[role], found.config) or AUTO[role]
    model = None if sharding is None else _without_weights(role, kind, cfg, found)
    if model is None:
        model = _read(role, kind, cfg, found, device if sharding is None else None)
        use_float32_head(model, _stored_head(model, cfg, role, found))
    return prepared(model, cfg)


def _read(role: Role, kind: Any, cfg: GeneratorConfig, found: Inspection, device: torch.device | None) -> Any:
    """The model with its weights, as transformers loads it."""
    with _loading(WHAT[role], cfg.path), inspection.quiet():
        if cfg.gguf_file:
            # Packed GGUF blocks can be neither trained nor saved.
            options: dict[str, Any] = {"gguf_file": cfg.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
        else:
            options = {"use_safetensors": True, **_onto(device)}
        model, report = kind.from_pretrained(cfg.path, **options, **_common(cfg, found))
    if cfg.gguf_file:
        _move(model, device)
        model.config.quantization_config = None
        model.hf_quantizer = None
    _check_report(report, model, cfg, role, found)
    return model


def _without_weights(role: Role, kind: Any, cfg: GeneratorConfig, found: Inspection) -> PreTrainedModel | None:
    """The model on the meta device, unread; None, and a note, where its weights cannot be read in parts."""
    weights = None if cfg.gguf_file else found.weights or weight_files(cfg, role)[0]
    whole = cfg.gguf_file is not None or cfg.trust_remote_code or weights is None
    if not whole and getattr(found.config, "quantization_config", None) is None:
        assert weights is not None
        model = _read(role, kind, cfg, found, torch.device("meta"))
        renamed: dict[str, str] = {}
        if role != "policy":
            use_float32_head(model, _stored_head(model, cfg, role, found))
            own = name_of_head(model)
            if role == "reward_model" and own is not None and found.head is not None:
                renamed = {f"{own}.{part}": f"{found.head.name}.{part}" for part in ("weight", "bias")}
        stored = find_stored(model, weights, renamed)
        if stored is not None and make_buffers(model, getattr(torch, cfg.dtype)):
            leave_unread(model, stored)
            return model
    note(
        f"{cfg.path!r} is read whole by every process, and cut into shards after that: transformers converts its "
        "weights while it loads them, so no process can read its part alone"
    )
    return None


def _stored_head(
    model: PreTrainedModel, cfg: GeneratorConfig, role: Role, found: Inspection
) -> dict[str, Tensor] | None:
    """The weights of a classifier's last layer as its files have them; None where they have none under its name.

    A reward model's head may have another name there, or a bias that transformers' class is without.
    """
    name = name_of_last_layer(model)
    files = found.weights or weight_files(cfg, role)[0]  # a hub name may be in the cache only now
    if name is None or files is None:
        return None
    head = found.head if role == "reward_model" and name == name_of_head(model) else None
    stored = read_weights(files, name if head is None else head.name)
    if "weight" in stored:
        return stored
    dtype = model.get_submodule(name).weight.dtype
    note(f"{cfg.path!r} keeps no {name}.weight under that name; it was read in {dtype}")
    return None


def _with_new_head(
    auto: Any, causal_lm: PreTrainedModel, cfg: ModelConfig, id2label: dict[int, str], *, copy_head: bool = False
) -> PreTrainedModel:
    """A classifier with a copy of the causal LM's backbone under a head of zeros, or of the weights of its head.

    With zeros (ours) the first prediction is p = 1/2 for every token and the same score for every answer, for any scale
    of the hidden states and any seed. The head's gradient is not zero there, so it moves at the
    first step and the backbone from the second on.
    """
    if has_shards(causal_lm):
        raise ConfigError(
            f"no classifier can be made of a {type(causal_lm).__name__} that is cut into shards (sharding.kind): make "
            "it before the model is cut, or from a model that load_causal_lm gives with the same sharding"
        )
    config = deepcopy(causal_lm.config)
    config.id2label = id2label
    config.label2id = {label: index for index, label in id2label.items()}
    config.classifier_dropout = 0.0
    kind = classifiers.new_class(auto, causal_lm, config)
    attention = inspection.attention_for(cfg, kind, config)
    unread = is_unread(causal_lm)
    # made where it stays: a copy on the host would be as large as the model
    with no_init_weights(), without_weights() if unread else causal_lm.device:
        model = kind._from_config(config, dtype=causal_lm.dtype, attn_implementation=attention)
    use_float32_head(model)
    if unread:
        heads = [f"{name_of_head(one)}.weight" for one in (model, causal_lm)]
        leave_unread(model, stored_for_copy(model, causal_lm, dict([heads] if copy_head else [])))
        return prepared(model, cfg)
    backbone(model).load_state_dict(backbone(causal_lm).state_dict(), strict=True)
    for parameter in classification_head(model).parameters():
        nn.init.zeros_(parameter)
    if copy_head:
        with torch.no_grad():
            classification_head(model).weight.copy_(classification_head(causal_lm).weight)
    return prepared(model, cfg)
