"""What readers say of the turns of their records: special tokens in texts, and unusual chat templates.

The records themselves are put right by ``formats`` as they are rendered; here they are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from tlcr.data.records import Answer, Message, RawEdit, RawMarkedAnswer, RawPreference, RawPrompt
from tlcr.data.rendering import template_arguments
from tlcr.text.tokenization import is_written, opening, render_messages
from tlcr.text.turns import opening_note, without_beginning, without_end

__all__ = ["TurnNotes"]

T = TypeVar("T")
RawT = TypeVar("RawT", RawPrompt, RawPreference, RawEdit, RawMarkedAnswer)

LOOKED_AT = 200
"""Number of first conversations that are compared with what the chat template writes for them."""
SHOWN = 24
"""Characters of an example."""


class TurnNotes:
    """Counts over the records of one source, and one note for each kind that was met."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rendered_at: datetime | None = None) -> None:
        self._tokenizer, self._rendered_at = tokenizer, rendered_at
        self._records = self._conversations = self._answers = 0
        self._found: dict[str, tuple[int, str]] = {}

    def counting(self, render: Callable[[RawT, PreTrainedTokenizerBase, datetime | None], T]) -> Callable[[RawT], T]:
        """``render`` with this tokenizer and clock, as a function of a raw record alone, which counts the record."""

        def rendered(raw: RawT) -> T:
            found = render(raw, self._tokenizer, self._rendered_at)
            self._count(raw)
            return found

        return rendered

    def notes(self) -> tuple[str, ...]:
        """The notes, one line each."""
        of = {"records": self._records, "conversations": self._conversations, "answers": self._answers}
        return tuple(
            f"{count} of {of[what.partition(' ')[0]]} {what} ({example})"
            for what, (count, example) in self._found.items()
        )

    def _count(self, raw: RawPrompt | RawPreference | RawEdit | RawMarkedAnswer) -> None:
        self._records += 1
        texts = list(_texts(raw))
        ended = next((text for text in texts if without_end(self._tokenizer, text) != text), None)
        if ended is not None:
            what = "records have a text that ends with an end token, which is taken off: the end is written once"
            self._note(what, f"...{ended[-SHOWN:]!r}")
        begun = next((text for text in texts if without_beginning(self._tokenizer, text) != text), None)
        if begun is not None:
            what = "records have a text that begins with a beginning-of-sequence token, which is taken off"
            self._note(what, f"{begun[:SHOWN]!r}...")
        if not isinstance(raw.prompt, str) and self._conversations < LOOKED_AT:
            self._conversations += 1
            self._compare(raw, raw.prompt)

    def _compare(self, raw: RawPrompt | RawPreference | RawEdit | RawMarkedAnswer, prompt: list[Message]) -> None:
        """Notes on one conversation's opening, and on answers that the chat template would write otherwise."""
        template = template_arguments(raw.template, self._tokenizer)
        found = opening(self._tokenizer, prompt, rendered_at=self._rendered_at, **template)
        note = opening_note(found)
        if note:
            self._note(f"conversations are for a chat template that {note}", f"...{found.prompt[-SHOWN:]!r}")
        for answer in _answers(raw):
            if not isinstance(answer, str):
                continue
            self._answers += 1
            bare = without_end(self._tokenizer, without_beginning(self._tokenizer, answer))
            turns = [*prompt, {"role": "assistant", "content": bare}]
            whole = render_messages(self._tokenizer, turns, rendered_at=self._rendered_at, **template)
            if found.continues and not is_written(bare, whole.removesuffix(found.closing)):
                what = "answers hold text that the chat template leaves out (thoughts, say): they are used whole"
                self._note(what, f"{answer[:SHOWN]!r}...")

    def _note(self, what: str, example: str) -> None:
        count, first = self._found.get(what, (0, example))
        self._found[what] = (count + 1, first)


def _answers(raw: RawPrompt | RawPreference | RawEdit | RawMarkedAnswer) -> Iterator[Answer]:
    for name in ("chosen", "rejected", "revised", "response"):
        answer = getattr(raw, name, None)
        if answer is not None:
            yield answer


def _texts(raw: RawPrompt | RawPreference | RawEdit | RawMarkedAnswer) -> Iterator[str]:
    """The texts that lose special tokens: of answers, and of all messages; a prompt that is a text keeps its own."""
    messages = [] if isinstance(raw.prompt, str) else raw.prompt
    for each in (*messages, *_answers(raw)):
        yield each if isinstance(each, str) else str(each.get("content") or "")
