"""The discriminator that is served: rows of ids become rewards."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from tlcr.config.schema import ModelConfig
from tlcr.distribution import installed_version
from tlcr.hosts.client import vocabulary_fingerprint
from tlcr.models.discriminator import Opinion, load_discriminator, temperature_of, token_opinions
from tlcr.models.positions import position_limit
from tlcr.types import EncodedAnswer

__all__ = ["ServedModel"]

logger = logging.getLogger("tlcr")


class ServedModel:
    """A discriminator with its tokenizer, loaded once.

    Raises ConfigError where the folder holds no discriminator, or one whose labels are others.
    """

    def __init__(self, folder: str, *, dtype: str, device: torch.device) -> None:
        cfg = ModelConfig(path=folder, dtype=dtype)  # type: ignore[arg-type]
        self.name = folder
        self.model, self.tokenizer = load_discriminator(folder, cfg, device=device)
        self.temperature = temperature_of(self.model)
        self.vocabulary = int(self.model.config.get_text_config().vocab_size)
        self.positions = position_limit(self.model)
        labels: Mapping[int, str] = self.model.config.id2label or {}  # type: ignore[assignment]
        self.labels = [labels[index] for index in sorted(labels)]

    # ---- rewards

    def opinions(self, rows: Sequence[EncodedAnswer]) -> list[Opinion]:
        """Logits and rewards of rows in one forward pass; in smaller ones where the device's memory does not do."""
        try:
            return self._opinions(rows)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(rows) // 2
        logger.warning(
            "a batch of %d rows, the longest of %d tokens, did not fit into the device's memory and is halved; lower "
            "--batch-tokens",
            len(rows),
            max(len(row.ids) for row in rows),
        )
        return [*self.opinions(rows[:half]), *self.opinions(rows[half:])]

    def _opinions(self, rows: Sequence[EncodedAnswer]) -> list[Opinion]:
        return token_opinions(self.model, rows, pad_token_id=self.pad_token_id, batch_size=len(rows))

    @property
    def pad_token_id(self) -> int:
        """The id that fills padding, which no result depends on."""
        return self.tokenizer.pad_token_id or 0

    # ---- facts

    def facts(self) -> Mapping[str, Any]:
        """What clients have to know, under the names of ``/v1/info``."""
        return {
            "server": "tlcr",
            "model": self.name,
            "labels": self.labels,
            "temperature": self.temperature,
            "max_tokens": self.positions,
            "bidirectional_layers": getattr(self.model.config, "tlcr_bidirectional_layers", 0),
            "tokenizer": _facts_of_tokenizer(self.tokenizer, self.vocabulary),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "versions": {
                "tlcr": installed_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }


def _facts_of_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> dict[str, Any]:
    return {
        "fingerprint": vocabulary_fingerprint(tokenizer),
        "vocabulary": vocabulary,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "chat_template": tokenizer.chat_template is not None,
    }
