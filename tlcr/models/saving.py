"""Models and tokenizers written in the standard formats of the Hugging Face libraries."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import ADDED_TOKENS_FILE, SPECIAL_TOKENS_MAP_FILE
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CHAT_TEMPLATE_DIR,
    CHAT_TEMPLATE_FILE,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
)

from tlcr.errors import CheckpointError
from tlcr.files import atomic_write, move_into, remove
from tlcr.models import classifiers
from tlcr.training.distributed import on_main_process
from tlcr.training.sharding import has_shards, whole_state

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
"""The names of a model's weights: of another number of shards there are others."""
ONLY_SOMETIMES = (
    ADDED_TOKENS_FILE, CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE, GENERATION_CONFIG_NAME, SPECIAL_TOKENS_MAP_FILE
)  # fmt: skip
"""What a model or a tokenizer is saved with only if it has it. Of an earlier one it would be loaded with this one."""


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Writes model and tokenizer to ``folder`` so that ``AutoModel*.from_pretrained`` loads them from there.

    Everything is written to a temporary folder and then renamed into place, config.json last: a folder with a
    config.json is complete. What an earlier model and tokenizer had there goes; other files stay. The configs record
    the ids of padding and of the end of sequence for other programs that load the model: they stop where the policy's
    answers ended in training.
    Every process calls it: the weights of a sharded model are gathered in the main process's memory.

    Args:
        model: the model to save.
        tokenizer: its tokenizer.
        folder: where to write.
        weights: what to write as the model's weights, on the main process; None: its own.

    Raises:
        CheckpointError: the folder holds an adapter, or cannot be written.
    """
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG_NAME).exists():
        raise CheckpointError(f"{folder} holds an adapter, which would be loaded with the model; name another folder")
    state = whole_state(model) if weights is None and has_shards(model) else weights

    def write() -> None:
        for config in filter(None, (model.config, getattr(model, "generation_config", None))):
            config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        parts = folder / ".model"
        classifiers.name_source(model)
        with atomic_write(parts) as aside:
            model.save_pretrained(aside, state_dict=state)
            classifiers.write_source(model, aside)
            tokenizer.save_pretrained(aside)
        names = {part.name for part in parts.iterdir()}
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        earlier = {
            part.name for part in folder.iterdir() if WEIGHTS.fullmatch(part.name) or part.name in ONLY_SOMETIMES
        }
        for name in earlier - names:
            remove(folder / name)
        move_into(folder, parts, last=CONFIG_NAME)

    on_main_process(write)
