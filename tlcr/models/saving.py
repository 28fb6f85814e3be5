"""Models and tokenizers written in the standard formats of the Hugging Face libraries."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from tlcr.files import atomic_write, sync_folder
from tlcr.models import classifiers
from tlcr.training.distributed import on_main_process
from tlcr.training.sharding import has_shards, whole_state


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Writes model and tokenizer to ``folder`` so that ``AutoModel*.from_pretrained`` loads them from there.

    Everything is written to a temporary folder and then renamed into place, config.json last: a folder with a
    config.json is complete. Other files of the folder stay. The configs record the ids of padding and of the end of
    sequence for other programs that load the model: they stop where the policy's answers ended in training.
    Every process calls it: the weights of a sharded model are gathered in the main process's memory.

    Args:
        model: the model to save.
        tokenizer: its tokenizer.
        folder: where to write.
        weights: what to write as the model's weights, on the main process; None: its own.
    """
    folder = Path(folder)
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
        for stale in folder.glob("*.safetensors*"):
            if stale.name not in names:
                stale.unlink()
        for name in sorted(names - {CONFIG_NAME}):
            os.replace(parts / name, folder / name)
        os.replace(parts / CONFIG_NAME, folder / CONFIG_NAME)
        parts.rmdir()
        sync_folder(folder)

    on_main_process(write)
