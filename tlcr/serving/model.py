"""The discriminator that is served: what it is given becomes rows of ids, and rows become rewards."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from tlcr.config.schema import ModelConfig
from tlcr.data.records import RawMarkedAnswer
from tlcr.data.rendering import rendered_marked_answer
from tlcr.distribution import installed_version
from tlcr.hosts.client import vocabulary_fingerprint
from tlcr.models.discriminator import Opinion, load_discriminator, temperature_of, token_opinions
from tlcr.models.positions import position_limit
from tlcr.text.tokenization import answer_spans, encode_answers
from tlcr.text.turns import without_end
from tlcr.types import EncodedAnswer

__all__ = ["Row", "ServedModel"]

logger = logging.getLogger("tlcr")

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One answer as the model's ids, and the characters of the text that each of its tokens writes, if it was text."""

    encoded: EncodedAnswer
    offsets: tuple[tuple[int, int], ...] | None = None

    @property
    def tokens(self) -> int:
        """How many tokens the model reads for it."""
        return len(self.encoded.ids)


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

    # ---- rows

    def row_of_text(
        self, prompt: Prompt, response: str, *, ended: bool = True, template: Mapping[str, Any] | None = None
    ) -> Row:
        """A prompt and an answer as ``tlcr score`` reads them.

        Args:
            prompt: text, or messages for the tokenizer's chat template.
            response: the answer. End tokens at its end count as its end.
            ended: whether the answer ended by itself: its end of sequence then is its last token, with a reward.
            template: what the chat template is given beside messages, as ``RawMarkedAnswer`` has it.

        Returns:
            The row. Its offsets count characters of the answer as given, without end tokens; tokens that write nothing
            of it, the end of sequence among them, have empty spans.

        Raises:
            DataError: the chat template refuses the messages.
            ConfigError: messages, and a tokenizer without a chat template.
        """
        rendered = rendered_marked_answer(RawMarkedAnswer("", prompt, response, (), template or {}), self.tokenizer)
        return self._row(rendered.prompt, rendered.response, without_end(self.tokenizer, response), ended)

    def row_of_complete_text(self, prompt: str, response: str) -> Row:
        """The same for texts with all their special tokens; the answer ended where it has an end token."""
        bare = without_end(self.tokenizer, response)
        return self._row(prompt, bare, bare, bare != response)

    def _row(self, prompt: str, response: str, given: str, ended: bool) -> Row:
        (encoded,) = encode_answers(
            self.tokenizer,
            [prompt],
            [response],
            max_prompt_tokens=sys.maxsize,
            max_answer_tokens=None,
            end_of_sequence=ended,
        )
        spans = answer_spans(self.tokenizer, prompt, response, encoded)
        # what the chat template writes before the answer belongs to the row, and not to the text that was given
        by, last = len(response.rstrip()) - len(given.rstrip()), len(given)
        offsets = [(min(max(start - by, 0), last), min(max(end - by, 0), last)) for start, end in spans]
        return Row(encoded, (*offsets, *([(last, last)] if ended else [])))

    def ids_of_text(self, text: str) -> list[int]:
        """A text's ids with the special tokens that the tokenizer adds by itself."""
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids

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
