"""How preference and edit records are written, and how each becomes a ``PreferencePair`` or an ``EditPair``.

Every format is a function from the values of one record to a pair as its source gives it, which takes no tokenizer;
what cannot be used raises ``Malformed`` with the reason. ``rendered_preference`` and ``rendered_edit`` make of it what
a model reads: the prompt complete (``tokenization.render_prompt``), and every answer as it follows its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tlcr.data.edit_codes import check_edit_codes
from tlcr.errors import DataError
from tlcr.text.tokenization import render_answer, render_prompt
from tlcr.types import EditPair, ErrorSpan, MarkedAnswer, PreferencePair

__all__ = [
    "ASSISTANT",
    "EDIT_FORMATS",
    "PREFERENCE_FORMATS",
    "REVISION_MARKER",
    "Context",
    "Malformed",
    "RawEdit",
    "RawMarkedAnswer",
    "RawPreference",
    "RawPrompt",
    "Values",
    "edit",
    "hh_preference",
    "marked_answer",
    "preference",
    "prompt",
    "prompt_key",
    "rendered_edit",
    "rendered_marked_answer",
    "rendered_preference",
    "tlcr_edit",
    "tlcr_preference",
    "tlcr_revision",
]

Values = Mapping[str, Any]
Context = str | list[dict[str, str]]
"""The text before an answer, plain or as messages that still want a chat template."""

REVISION_MARKER = "<|Start Of Modified Response|>\n"
"""In the published TLCR data a reviser's raw text is its reasoning, this marker, and the revision."""

UNNAMED_ERROR = "error"
"""The kind of a span without a label."""

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")


class Malformed(DataError):
    """This record cannot be used, for the reason given."""


@dataclass(frozen=True)
class RawPrompt:
    """A prompt as its source gives it."""

    prompt: Context


@dataclass(frozen=True)
class RawPreference:
    """A preference pair as its source gives it."""

    id: str
    prompt: Context
    chosen: str
    rejected: str


@dataclass(frozen=True)
class RawEdit:
    """An edited answer as its source gives it."""

    id: str
    prompt: Context
    rejected: str
    revised: str
    chosen: str | None = None


@dataclass(frozen=True)
class RawMarkedAnswer:
    """An answer with marked errors as its source gives it."""

    id: str
    prompt: Context
    response: str
    spans: tuple[ErrorSpan, ...]


def rendered_preference(raw: RawPreference, tokenizer: PreTrainedTokenizerBase) -> PreferencePair:
    """The pair as a model with this tokenizer reads it."""
    prompt, (chosen, rejected) = _rendered(raw.prompt, [raw.chosen, raw.rejected], tokenizer)
    return PreferencePair(id=raw.id, prompt=prompt, chosen=chosen, rejected=rejected)


def rendered_edit(raw: RawEdit, tokenizer: PreTrainedTokenizerBase) -> EditPair:
    """The same for an edited answer."""
    answers = [raw.rejected, raw.revised, *([] if raw.chosen is None else [raw.chosen])]
    prompt, (rejected, revised, *chosen) = _rendered(raw.prompt, answers, tokenizer)
    return EditPair(id=raw.id, prompt=prompt, rejected=rejected, revised=revised, chosen=chosen[0] if chosen else None)


def rendered_marked_answer(raw: RawMarkedAnswer, tokenizer: PreTrainedTokenizerBase) -> MarkedAnswer:
    """The same for an answer with marked errors, which stay where they are in its words."""
    prompt, (response,) = _rendered(raw.prompt, [raw.response], tokenizer)
    return MarkedAnswer(raw.id, prompt, response, _placed(raw.spans, raw.response, response))


def _rendered(
    context: Context, answers: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, Sequence[str]]:
    if isinstance(context, str):
        return render_prompt(tokenizer, context), answers
    return render_prompt(tokenizer, context), [render_answer(tokenizer, context, answer) for answer in answers]


def preference(id: str, values: Values) -> RawPreference:
    """``prompt``, ``chosen``, ``rejected``: texts, or conversations (see ``_answers``)."""
    context, (chosen, rejected) = _answers(values, ("chosen", "rejected"))
    return _preference(id, context, chosen, rejected)


def hh_preference(id: str, values: Values) -> RawPreference:
    r"""``chosen`` and ``rejected`` as whole transcripts "\n\nHuman: ..\n\nAssistant: .." that differ in the last turn.

    The prompt is the transcript they share, through the last "\n\nAssistant:"; answers keep their leading space.

    Args:
        id: the record's name.
        values: the columns.

    Returns:
        The pair.

    Raises:
        Malformed: a column is missing, or an earlier turn differs.
    """
    (prompt, chosen), (other, rejected) = (_split_transcript(values, name) for name in ("chosen", "rejected"))
    if prompt != other:
        at = next(
            (k for k, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), min(len(prompt), len(other))
        )
        raise Malformed(f"the turns before the last answer differ between chosen and rejected, from character {at + 1}")
    return _preference(id, prompt, chosen, rejected)


def tlcr_preference(id: str, values: Values) -> RawPreference:
    """``context``, ``chosen_response`` and ``reject_response`` of the published TLCR data."""
    context = _tlcr_context(values)
    chosen, rejected = (_tlcr_answer(text_field(values, name)) for name in ("chosen_response", "reject_response"))
    return _preference(id, context, chosen, rejected)


def edit(id: str, values: Values) -> RawEdit:
    """``prompt``, ``rejected``, ``revised`` and perhaps ``chosen``: texts, or conversations (see ``_answers``)."""
    names = ("rejected", "revised", "chosen")
    given = names if values.get("chosen") is not None else names[:2]
    context, (rejected, revised, *chosen) = _answers(values, given)
    return RawEdit(id=id, prompt=context, rejected=rejected, revised=revised, chosen=chosen[0] if chosen else None)


def tlcr_edit(id: str, values: Values) -> RawEdit:
    """The published TLCR data: ``context``, ``reject_response``, and ``response`` or ``raw_response`` with its marker.

    Edit codes, where the record has them, must be consistent (``check_edit_codes``). They are not the source of the
    labels: they speak of tokens of answers that were tokenised alone, and labels are of tokens in context.

    Args:
        id: the record's name.
        values: the columns.

    Returns:
        The edit.

    Raises:
        Malformed: a column is missing, or the edit codes contradict each other.
    """
    context = _tlcr_context(values)
    rejected = _tlcr_answer(text_field(values, "reject_response"))
    revised = tlcr_revision(values)
    chosen = values.get("chosen_response")
    problem = check_edit_codes(values)
    if problem:
        raise Malformed(problem)
    return RawEdit(
        id=id,
        prompt=context,
        rejected=rejected,
        revised=_tlcr_answer(revised),
        chosen=None if chosen is None else _tlcr_answer(text_field(values, "chosen_response")),
    )


def tlcr_revision(values: Values) -> str:
    """The revised answer alone: ``response``, or what follows the marker in ``raw_response``."""
    if values.get("response") is not None:
        return text_field(values, "response")
    raw = text_field(values, "raw_response")
    if REVISION_MARKER not in raw:
        raise Malformed(f"field 'raw_response' has no line {REVISION_MARKER.strip()!r} before the revision")
    return _text(raw.rpartition(REVISION_MARKER)[2], "the revision in 'raw_response'")


def marked_answer(id: str, values: Values) -> RawMarkedAnswer:
    """``prompt``, ``response`` (see ``_answers``) and ``spans``: a list of {"start", "end", and perhaps "label"}.

    Args:
        id: the record's name.
        values: the columns; offsets count characters of the response as the record has it.

    Returns:
        The answer and its marked errors.

    Raises:
        Malformed: a column is missing, or a span is not inside the response.
    """
    context, (answer,) = _answers(values, ("response",))
    given = values["response"] if isinstance(values["response"], str) else answer
    spans = tuple(_span(value, number, len(given)) for number, value in enumerate(_list_of_spans(values), start=1))
    return RawMarkedAnswer(id, context, answer, _placed(spans, given, answer))


def _placed(spans: Sequence[ErrorSpan], text: str, as_read: str) -> tuple[ErrorSpan, ...]:
    """The spans of a text in the text as it is read: what stands at its beginning may change, its end never does."""
    by = len(as_read) - len(text)
    moved = [ErrorSpan(max(0, span.start + by), span.end + by, span.label) for span in spans]
    return tuple(span for span in moved if span.start < span.end)


def _list_of_spans(values: Values) -> list[object]:
    spans = values.get("spans")
    if not isinstance(spans, list):
        raise Malformed("field 'spans' is not a list of {'start', 'end', 'label'}; it is [] where nothing is wrong")
    return spans


def _span(value: object, number: int, length: int) -> ErrorSpan:
    if not isinstance(value, Mapping):
        raise Malformed(f"span {number} is a {type(value).__name__}, not {{'start', 'end', 'label'}}")
    start, end, label = value.get("start"), value.get("end"), value.get("label")
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= length:
        raise Malformed(
            f"span {number} goes from {start!r} to {end!r}; wanted whole numbers with 0 <= start < end <= {length}, "
            "the length of the response in characters"
        )
    return ErrorSpan(start, end, UNNAMED_ERROR if label is None else _text(label, f"the label of span {number}"))


def prompt(values: Values) -> RawPrompt:
    """``prompt``: a text, or the messages before the answer."""
    if isinstance(values.get("prompt"), list):
        messages = _messages(values["prompt"], "prompt")
        _require_open(messages)
        return RawPrompt(messages)
    return RawPrompt(_complete_transcript(text_field(values, "prompt"))[0])


def prompt_key(prompt: Context) -> str:
    """The words of a prompt, which are the same in every source.

    Args:
        prompt: text or messages.

    Returns:
        The text without white space, roles, or a transcript's marks of turns.
    """
    if isinstance(prompt, str):
        text = _TURN.sub(" ", "\n\n" + prompt.lstrip())
    else:
        text = " ".join(message["content"] for message in prompt)
    return " ".join(text.split())


def text_field(values: Values, name: str) -> str:
    """A field's text, which must be there and not be blank."""
    if name not in values:
        raise Malformed(f"field {name!r} is missing")
    return _text(values[name], f"field {name!r}")


def _preference(id: str, prompt: Context, chosen: str, rejected: str) -> RawPreference:
    if chosen == rejected:
        raise Malformed("chosen and rejected are the same text")
    return RawPreference(id=id, prompt=prompt, chosen=chosen, rejected=rejected)


def _text(value: object, what: str) -> str:
    if value is None:
        raise Malformed(f"{what} is null")
    if not isinstance(value, str):
        raise Malformed(f"{what} is a {type(value).__name__}, not text")
    if not value.strip():
        raise Malformed(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Malformed(
            f"{what} is not valid Unicode (half of a surrogate pair at character {error.start + 1})"
        ) from error
    return value


def _answers(values: Values, names: Sequence[str]) -> tuple[Context, list[str]]:
    """What comes before the answers, and each named answer.

    An answer is a text; or messages that end with the assistant's, after the whole conversation or only what follows
    ``prompt``. Such conversations must share all turns but the last; a prompt that is a text is then the first user
    message, unless the conversation has one itself.
    """
    for name in names:
        if name not in values:
            raise Malformed(f"field {name!r} is missing")
    prompt = values.get("prompt")
    context: Context
    if any(isinstance(values[name], list) for name in names):
        conversations = [_conversation(prompt, values[name], name) for name in names]
        context = conversations[0][:-1]
        for name, conversation in zip(names, conversations, strict=True):
            if conversation[:-1] != context:
                raise Malformed(f"the messages before the last answer differ between {names[0]} and {name}")
        answers = [conversation[-1]["content"] for conversation in conversations]
    elif isinstance(prompt, list):
        context = _messages(prompt, "prompt")
        answers = [text_field(values, name) for name in names]
    else:
        text, completed = _complete_transcript(text_field(values, "prompt"))
        answers = [text_field(values, name) for name in names]
        if completed:
            answers = [" " + answer.lstrip().removeprefix(ASSISTANT.strip()).lstrip() for answer in answers]
        return text, answers
    _require_open(context)
    return context, answers


def _conversation(prompt: object, answer: object, name: str) -> list[dict[str, str]]:
    """All messages through the last answer."""
    if isinstance(answer, str):
        messages = [{"role": "assistant", "content": _text(answer, f"field {name!r}")}]
    else:
        messages = _messages(answer, name)
    if messages[-1]["role"] != "assistant":
        raise Malformed(f"the last message of {name!r} is of role {messages[-1]['role']!r}, not 'assistant'")
    if isinstance(prompt, str) and all(message["role"] == "assistant" for message in messages):
        return [{"role": "user", "content": _text(prompt, "field 'prompt'")}, *messages]
    if isinstance(prompt, list):
        before = _messages(prompt, "prompt")
        return messages if messages[: len(before)] == before else before + messages
    return messages


def _messages(value: object, name: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise Malformed(f"field {name!r} is not a list of messages")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise Malformed(f"message {number} of {name!r} has no 'role'")
        content = _text(message.get("content"), f"the content of message {number} of {name!r}")
        messages.append({"role": message["role"], "content": content})
    return messages


def _require_open(prompt: Sequence[Mapping[str, str]]) -> None:
    if not prompt:
        raise Malformed("the conversation has nothing before the answer")
    if prompt[-1]["role"] == "assistant":
        raise Malformed("the prompt ends with an assistant's message, so there is nothing left to answer")


def _split_transcript(values: Values, name: str) -> tuple[str, str]:
    text = text_field(values, name)
    turns = list(_TURN.finditer(text))
    if not turns or turns[-1].group(1) != "Assistant":
        raise Malformed(f"field {name!r} is not a transcript whose last turn opens with {ASSISTANT!r}")
    if len(turns) == 1:
        raise Malformed(f"field {name!r} has no turn before its answer")
    end = turns[-1].end()
    _text(text[end:], f"the last answer of {name!r}")
    return text[:end], text[end:]


def _complete_transcript(prompt: str) -> tuple[str, bool]:
    r"""An HH transcript that stops after the human's turn gets the "\n\nAssistant:" that the answer follows.

    Returns the prompt and whether it was completed; every other text comes back as it is.
    """
    text = "\n\n" + prompt.lstrip()
    turns = _TURN.findall(text)
    if not text.startswith(HUMAN) or turns[-1] != "Human":
        return prompt, False
    return text.rstrip() + ASSISTANT, True


def _tlcr_context(values: Values) -> str:
    context = text_field(values, "context")
    return context.replace("###Human:", HUMAN).replace("###Assistant:", ASSISTANT).rstrip()


def _tlcr_answer(text: str) -> str:
    return " " + text.lstrip()


PREFERENCE_FORMATS: dict[str, Callable[[str, Values], RawPreference]] = {
    "preference": preference,
    "hh": hh_preference,
    "tlcr": tlcr_preference,
}
EDIT_FORMATS: dict[str, Callable[[str, Values], RawEdit]] = {"edits": edit, "tlcr": tlcr_edit}
