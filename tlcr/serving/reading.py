"""Answers of a request become rows of ids, within what the server takes. What is too much is refused before the work.

One thread reads the requests of a worker, because a tokenizer is not to be used by two at once. So no request may hold
it for long: answers are counted before any is read, a text whose length alone is too much is not tokenised, and what
is read for one request at a stretch is bounded (``Reading``).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tlcr.data.records import RawMarkedAnswer
from tlcr.data.rendering import rendered_marked_answer
from tlcr.errors import TlcrError
from tlcr.serving.limits import Refused
from tlcr.text.least_tokens import LeastTokens
from tlcr.text.tokenization import answer_spans, encode_answers
from tlcr.text.turns import without_beginning, without_end
from tlcr.types import EncodedAnswer

__all__ = ["Bad", "Reader", "Reading", "Row"]

Prompt = str | list[dict[str, Any]]

STRETCH = 0.05
"""Seconds for which one request is read before the next has its turn (ours)."""


class Bad(TlcrError, ValueError):
    """What is wrong with one answer of a request, as the end of a sentence that begins with its place."""


@dataclass(frozen=True)
class Row:
    """One answer as the model's ids, and the characters of the text that each of its tokens writes, if it was text."""

    encoded: EncodedAnswer
    offsets: tuple[tuple[int, int], ...] | None = None

    @property
    def tokens(self) -> int:
        """How many tokens the model reads for it."""
        return len(self.encoded.ids)


class Reader:
    """Makes rows of ids and texts.

    Args:
        tokenizer: the discriminator's.
        vocabulary: how many ids it knows.
        max_items: the most answers of one request.
        longest_row: the most tokens of one row.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, *, max_items: int, longest_row: int
    ) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.max_items, self.longest_row = max_items, longest_row
        self._least_tokens = LeastTokens(tokenizer)

    def refuse_too_many(self, items: Sequence[Any]) -> None:
        """Raises Refused (413) where a request has more answers than the server takes."""
        if len(items) > self.max_items:
            raise Refused(
                413,
                f"the request has {len(items)} answers, and this server takes at most {self.max_items}; split it, or "
                "start the server with a larger --max-items",
            )

    def row_of_ids(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Row:
        """Ids as they are. This and the other rows raise Bad where a row has more than ``longest_row`` tokens."""
        self._refuse_long(len(prompt_ids) + len(response_ids))
        return Row(EncodedAnswer((*prompt_ids, *response_ids), len(prompt_ids), complete=False))

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
        given = without_end(self.tokenizer, response)
        if isinstance(prompt, str):  # rendering tokenises it where it is white space alone
            self._refuse_long_text(without_beginning(self.tokenizer, prompt))
        rendered = rendered_marked_answer(RawMarkedAnswer("", prompt, response, (), template or {}), self.tokenizer)
        return self._row(rendered.prompt, rendered.response, given, ended)

    def row_of_complete_text(self, prompt: str, response: str) -> Row:
        """The same for texts with all their special tokens; the answer ended where it has an end token."""
        bare = without_end(self.tokenizer, response)
        return self._row(prompt, bare, bare, bare != response)

    def row_of_all(self, text: str) -> Row:
        """A text with the special tokens that the tokenizer adds by itself; all of it is the answer."""
        self._refuse_long_text(text)
        return self.row_of_ids((), self.tokenizer(text, verbose=False)["input_ids"])

    def _row(self, prompt: str, response: str, given: str, ended: bool) -> Row:
        self._refuse_long_text(prompt, response)
        (encoded,) = encode_answers(
            self.tokenizer,
            [prompt],
            [response],
            max_prompt_tokens=sys.maxsize,
            max_answer_tokens=None,
            end_of_sequence=ended,
        )
        self._refuse_long(len(encoded.ids))
        spans = answer_spans(self.tokenizer, prompt, response, encoded)
        # what the chat template writes before the answer belongs to the row, and not to the text that was given
        by, last = len(response.rstrip()) - len(given.rstrip()), len(given)
        offsets = [(min(max(start - by, 0), last), min(max(end - by, 0), last)) for start, end in spans]
        return Row(encoded, (*offsets, *([(last, last)] if ended else [])))

    def _refuse_long_text(self, *texts: str) -> None:
        self._refuse_long(self._least_tokens(*texts), "at least ")

    def _refuse_long(self, tokens: int, bound: str = "") -> None:
        if tokens > self.longest_row:
            raise Bad(
                f"has {bound}{tokens} tokens with its prompt, and the discriminator reads at most {self.longest_row}; "
                "make prompts or answers shorter"
            )


class Reading:
    """The rows of one request as far as they are read, and their tokens, of which no more than ``most_tokens``."""

    def __init__(self, rows: Iterator[Row], *, most_tokens: int) -> None:
        self._left, self._most_tokens = rows, most_tokens
        self.rows: list[Row] = []
        self.tokens = 0

    def go_on(self) -> bool:
        """Reads at least one row, and more for ``STRETCH`` seconds.

        Returns:
            Whether there may be more.

        Raises:
            Refused: a row cannot be read (400), or the request has more tokens than the server holds (413).
        """
        until = time.monotonic() + STRETCH
        for row in self._left:
            self.rows.append(row)
            self.tokens += row.tokens
            if self.tokens > self._most_tokens:
                raise Refused(
                    413,
                    f"the request has more than {self._most_tokens} tokens, which is all that this server holds; split "
                    "it, or start the server with a larger --queue-tokens",
                )
            if time.monotonic() >= until:
                return True
        return False
