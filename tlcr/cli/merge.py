"""``tlcr merge``: an adapter and the model that it was trained on, written as one whole model."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from tlcr.config.schema import ModelConfig
from tlcr.errors import CheckpointError, ConfigError
from tlcr.models.inspection import read_config
from tlcr.models.loading import load_causal_lm, load_sequence_classifier, load_token_classifier
from tlcr.models.lora.adapters import base_digest
from tlcr.models.lora.files import PEFT_CONFIG, attach_adapter, merged_weights, read_base, read_peft_config
from tlcr.models.saving import save_model
from tlcr.models.tokenizers import load_tokenizer

__all__ = ["merge_command"]

logger = logging.getLogger("tlcr")

DTYPES = ("float32", "bfloat16")


def merge_command(*, adapter: Path, output: Path, base: str | None, trust_remote_code: bool = False) -> None:
    """Writes the whole model to ``output``, as ``AutoModel*.from_pretrained`` loads it.

    An adapted layer's weight is W + (alpha / rank) B A, added in float32 and rounded once. Where the adapter was
    trained on weights in 4 bits, W is what these stood for.

    Args:
        adapter: a folder of peft, such as ``policy/adapter`` of a run.
        output: a folder that holds no model and no adapter yet.
        base: the model that the adapter was trained on; None: the one that the adapter names.
        trust_remote_code: run code that comes with that model.

    Raises:
        ConfigError: peft is not installed, no model is named, ``output`` holds one or an adapter, or the adapter cannot
            be merged.
        CheckpointError: the folder holds no adapter, or one that was trained on other weights.
    """
    config, about = read_peft_config(adapter), read_base(adapter)
    if (output / CONFIG_NAME).exists():
        raise ConfigError(f"{output} holds a model already; name another folder, or delete that one")
    if (output / PEFT_CONFIG).exists():
        raise ConfigError(f"{output} holds an adapter, which would be loaded with the whole model; name another folder")
    path = base or config.base_model_name_or_path
    if path is None:
        raise ConfigError(f"the adapter in {adapter} names no model that it was trained on; name it with --base")
    cfg = ModelConfig(path=path, trust_remote_code=trust_remote_code)
    dtype: Any = about.get("dtype") or str(read_config(cfg).dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"{path} is {dtype}, and tlcr merges {' or '.join(DTYPES)}; convert it first")
    cfg = replace(cfg, dtype=dtype)
    model = _model(cfg, config, about, adapter)
    if about and base_digest(model, about.get("base_bits")) != about["sha256"]:
        raise CheckpointError(
            f"the adapter in {adapter} was trained on other weights than those in {path}; name the model that it was "
            "trained on with --base"
        )
    attach_adapter(model, adapter)
    save_model(model, load_tokenizer(cfg), output, weights=merged_weights(model))
    logger.info("wrote %s", output)


def _model(cfg: ModelConfig, config: Any, about: dict[str, Any], adapter: Path) -> PreTrainedModel:
    """The model without its adapter, with a new head where the adapter's folder has one."""
    model = load_causal_lm(cfg)
    if config.task_type in (None, "CAUSAL_LM"):
        return model
    if config.task_type not in ("TOKEN_CLS", "SEQ_CLS") or "id2label" not in about:
        raise ConfigError(
            f"the adapter in {adapter} is for the task {config.task_type}, whose labels only tlcr's own base.json "
            "names; merge it by peft's merge_and_unload"
        )
    if config.task_type == "SEQ_CLS":
        model = load_sequence_classifier(model, cfg)
    else:
        labels = {int(index): label for index, label in about["id2label"].items()}
        model = load_token_classifier(model, cfg, id2label=labels)
    for name, value in about["config"].items():
        setattr(model.config, name, value)
    return model
