"""Records as their source has them: prompts, preference pairs, edits and marked answers, without a tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tlcr.errors import DataError
from tlcr.types import ErrorSpan

__all__ = [
    "ASSISTANT",
    "HUMAN",
    "TURN",
    "Answer",
    "Context",
    "Malformed",
    "Message",
    "RawEdit",
    "RawMarkedAnswer",
    "RawPreference",
    "RawPrompt",
    "TextPreference",
    "Values",
    "answer_key",
    "as_texts",
    "message_text",
    "message_words",
    "placed",
    "prompt_key",
    "same_turns",
]

Values = Mapping[str, Any]
Message = dict[str, Any]
"""A message of a conversation: its role, its content, and other fields that a chat template may render."""
Context = str | list[Message]
"""The input before an answer: text, or messages that still need a chat template."""
Answer = str | Message
"""An answer: its text, or its message if that holds more than text (tool calls, reasoning)."""
IDS = ("id", "message_id", "tool_call_id")
"""Fields of a message that sources make up anew for each conversation."""
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")


class Malformed(DataError):
    """This record cannot be used, for the reason given."""


@dataclass(frozen=True)
class RawPrompt:
    """A prompt as in its source. template: the columns that its chat template may render (`template_arguments`)."""

    prompt: Context
    template: Values = field(default_factory=dict)


@dataclass(frozen=True)
class RawPreference:
    """A preference pair as in its source; template as in `RawPrompt`."""

    id: str
    prompt: Context
    chosen: Answer
    rejected: Answer
    template: Values = field(default_factory=dict)


@dataclass(frozen=True)
class TextPreference:
    """A preference pair whose answers are texts, as a reviser needs it; template as in `RawPrompt`."""

    id: str
    prompt: Context
    chosen: str
    rejected: str
    template: Values = field(default_factory=dict)


@dataclass(frozen=True)
class RawEdit:
    """An edited answer as in its source; template as in `RawPrompt`."""

    id: str
    prompt: Context
    rejected: Answer
    revised: Answer
    chosen: Answer | None = None
    template: Values = field(default_factory=dict)


@dataclass(frozen=True)
class RawMarkedAnswer:
    """An answer with marked errors as in its source."""

    id: str
    prompt: Context
    response: str
    spans: tuple[ErrorSpan, ...]
    template: Values = field(default_factory=dict)


def as_texts(pairs: Sequence[RawPreference]) -> tuple[TextPreference, ...]:
    """The pairs with answers that are texts.

    Args:
        pairs: the raw pairs.

    Returns:
        The same pairs, in their order.

    Raises:
        DataError: an answer holds more than text, which only a chat template can write.
    """
    found = []
    for pair in pairs:
        if not isinstance(pair.chosen, str) or not isinstance(pair.rejected, str):
            raise DataError(
                f"an answer of {pair.id} holds more than a text (tool calls, reasoning), and a reviser edits texts; "
                "leave such pairs out of data.preferences, or bring their revisions as data.edits"
            )
        found.append(TextPreference(pair.id, pair.prompt, pair.chosen, pair.rejected, pair.template))
    return tuple(found)


def message_text(message: Message) -> str:
    """A message as text: its content, then its other fields as JSON."""
    more = {name: value for name, value in message.items() if name not in ("role", "content")}
    parts = [str(message.get("content") or "").strip(), json.dumps(more, ensure_ascii=False) if more else ""]
    return " ".join(part for part in parts if part)


def message_words(message: Message) -> str:
    """What a message is known by: its content, or its other fields but ids where it has none (tool calls).

    Fields beside a content, and ids, are seldom rendered: two messages that differ in them may be one text.

    Args:
        message: the message.

    Returns:
        The text.
    """
    return str(message.get("content") or "").strip() or message_text(_without_ids(message))


def same_turns(one: Sequence[Message], other: Sequence[Message]) -> bool:
    """Whether two conversations, or parts of them, are the same.

    Sources give one turn another id in each conversation that has it: of ids only those of tool calls matter, and only
    for which result belongs to which call.

    Args:
        one: messages.
        other: messages.

    Returns:
        True where they differ at most in ids.
    """
    return list(map(_without_ids, one)) == list(map(_without_ids, other)) and _links(one) == _links(other)


def _without_ids(message: Message) -> Message:
    bare = {name: value for name, value in message.items() if name not in IDS}
    if isinstance(calls := bare.get("tool_calls"), list):
        bare["tool_calls"] = [
            {name: value for name, value in call.items() if name != "id"} if isinstance(call, Mapping) else call
            for call in calls
        ]
    return bare


def _links(messages: Sequence[Message]) -> list[int]:
    """The ids of tool calls and of their results in their order, each as the number of its first appearance."""
    ids: list[object] = []
    for message in messages:
        calls = message.get("tool_calls")
        ids += [call.get("id") for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []
        ids.append(message.get("tool_call_id"))
    numbers: dict[str, int] = {}
    return [numbers.setdefault(str(given), len(numbers)) for given in ids if given is not None]


def prompt_key(prompt: Context) -> str:
    """A key of a prompt that is the same in every source.

    Args:
        prompt: text or messages.

    Returns:
        The text without white space, roles, or a transcript's marks of turns; of messages, the `message_words`.
    """
    if not isinstance(prompt, str):
        return " ".join(" ".join(map(message_words, prompt)).split())
    return " ".join(TURN.sub(" ", "\n\n" + prompt.lstrip()).split())


def answer_key(raw: RawPrompt | RawPreference | RawEdit | RawMarkedAnswer) -> str:
    """A key of a record's rejected (or only) answer, which preferences and edits of one answer share; "" for a prompt.

    Args:
        raw: the record.

    Returns:
        The answer's text without white space.
    """
    answer = getattr(raw, "rejected", getattr(raw, "response", ""))
    return " ".join((answer if isinstance(answer, str) else message_words(answer)).split())


def placed(spans: Sequence[ErrorSpan], text: str, as_read: str) -> tuple[ErrorSpan, ...]:
    """The spans of a text in the text that a model reads: its beginning may differ, and white space at its end."""
    by = len(as_read.rstrip()) - len(text.rstrip())
    moved = [ErrorSpan(max(0, span.start + by), min(span.end + by, len(as_read)), span.label) for span in spans]
    return tuple(span for span in moved if span.start < span.end)
