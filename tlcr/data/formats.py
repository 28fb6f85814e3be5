"""The formats of records: each a function from the values of one record to what it says, without a tokenizer.

A record that cannot be used raises ``Malformed`` with the reason. ``tlcr.data.rendering`` turns what it says into the
text that a model reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tlcr.data.edit_codes import check_edit_codes
from tlcr.data.records import (
    ASSISTANT,
    HUMAN,
    TURN,
    Answer,
    Context,
    Malformed,
    Message,
    RawEdit,
    RawMarkedAnswer,
    RawPreference,
    RawPrompt,
    Values,
    message_text,
    placed,
    same_turns,
)
from tlcr.text.files import parse_json, unicode_problem
from tlcr.types import ErrorSpan

__all__ = [
    "CONTEXT_COLUMNS",
    "EDIT_FORMATS",
    "PREFERENCE_FORMATS",
    "REVISION_MARKER",
    "TEMPLATE_COLUMNS",
    "edit",
    "hh_preference",
    "marked_answer",
    "preference",
    "prompt",
    "tlcr_edit",
    "tlcr_preference",
    "tlcr_revision",
]

TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")
"""Columns that every chat template is given beside the messages; of others it is given those that it names."""
TEXT_COLUMNS = ("id", "prompt", "messages", "chosen", "rejected", "revised", "response", "spans")
"""Columns that no chat template is given: they hold the conversation itself."""
CONTEXT_COLUMNS = ("system", "history")
"""Columns with the turns before the prompt: a system message, and turns as [question, answer] or messages."""
INSTRUCTING = ("system", "developer")
"""Roles of messages that may stand before the prompt in a conversation."""
SWITCHES = {"true": True, "True": True, "false": False, "False": False}
"""A switch in a table, which holds texts only; for a chat template the text "false" would be true."""
REVISION_MARKER = "<|Start Of Modified Response|>\n"
"""In the published TLCR data a reviser's raw text is its reasoning, this marker, and the revision."""
UNNAMED_ERROR = "error"
"""The kind of a span without a label."""


def preference(id: str, values: Values) -> RawPreference:
    """``prompt``, ``chosen``, ``rejected``: texts, or conversations (see ``_answers``)."""
    context, (chosen, rejected) = _answers(values, ("chosen", "rejected"))
    return _preference(id, context, chosen, rejected, _template(values))


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
    return RawEdit(id, context, rejected, revised, chosen[0] if chosen else None, _template(values))


def tlcr_edit(id: str, values: Values) -> RawEdit:
    """The published TLCR data: ``context``, ``reject_response``, and ``response`` or ``raw_response`` with its marker.

    Edit codes, where the record has them, must be consistent (``check_edit_codes``). They are not the source of the
    labels: they are for tokens of answers that were tokenised alone, and labels are for tokens in context.

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
    """The revised answer alone: ``response``, or the text after the marker in ``raw_response``."""
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
    if not isinstance(answer, str):
        raise Malformed(
            "field 'response' holds more than a text (tool calls, reasoning); spans count characters of one"
        )
    given = values["response"] if isinstance(values["response"], str) else answer
    spans = tuple(_span(value, number, len(given)) for number, value in enumerate(_list_of_spans(values), start=1))
    return RawMarkedAnswer(id, context, answer, placed(spans, given, answer), _template(values))


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
        context: Context = _after(_earlier(values), _messages(values["prompt"], "prompt"))
    else:
        context = _after(_earlier(values), _complete_transcript(_prompt_text(values, "prompt"))[0])
    _require_open(context)
    return RawPrompt(context, _template(values))


def text_field(values: Values, name: str) -> str:
    """A field's text, which must be there and not be blank."""
    if name not in values:
        raise Malformed(f"field {name!r} is missing")
    return _text(values[name], f"field {name!r}")


def _prompt_text(values: Values, name: str) -> str:
    """A prompt's text, which must be there and may be blank: what follows is then text without a prompt."""
    if name not in values:
        raise Malformed(f"field {name!r} is missing; text without a prompt has an empty text there")
    return _text(values[name], f"field {name!r}", may_be_blank=True)


def _preference(
    id: str, prompt: Context, chosen: Answer, rejected: Answer, template: Values | None = None
) -> RawPreference:
    if chosen == rejected:
        raise Malformed("chosen and rejected are the same text")
    return RawPreference(id, prompt, chosen, rejected, template or {})


def _text(value: object, what: str, *, may_be_blank: bool = False) -> str:
    if value is None:
        raise Malformed(f"{what} is null")
    if not isinstance(value, str):
        raise Malformed(f"{what} is a {type(value).__name__}, not text")
    if not value.strip() and not may_be_blank:
        raise Malformed(f"{what} is empty")
    _require_unicode(value, what)
    return value


def _require_unicode(value: object, what: str) -> None:
    if problem := unicode_problem(value):
        raise Malformed(f"{what} {problem}")


def _answers(values: Values, names: Sequence[str]) -> tuple[Context, list[Answer]]:
    """The context before the answers, and each named answer.

    An answer is a text; or messages that end with the assistant's, after the whole conversation or only what follows
    ``prompt``. Such conversations must share all turns but the last; ids are those of the first. A prompt that is a
    text is then the user's message before the first of the assistant's, unless a user's message stands there or has
    that text.
    """
    for name in names:
        if name not in values:
            raise Malformed(f"field {name!r} is missing")
    prompt = values.get("prompt")
    earlier = _earlier(values)
    context: Context
    answers: list[Answer]
    if any(isinstance(values[name], list) for name in names):
        conversations = [_conversation(prompt, values[name], name) for name in names]
        context = _after(earlier, conversations[0][:-1])
        for name, conversation in zip(names, conversations, strict=True):
            if not same_turns(conversation[:-1], conversations[0][:-1]):
                raise Malformed(f"the messages before the last answer differ between {names[0]} and {name}")
        answers = [_answer(conversation[-1]) for conversation in conversations]
        if not context and prompt in ("", []):
            context = ""  # text without a prompt, whose answers are written as messages
            for name, answer in zip(names, answers, strict=True):
                _require_text(answer, name)
    elif isinstance(prompt, list):
        context = _after(earlier, _messages(prompt, "prompt"))
        answers = [text_field(values, name) for name in names]
    else:
        text, completed = _complete_transcript(_prompt_text(values, "prompt"))
        texts = [text_field(values, name) for name in names]
        if completed:
            texts = [" " + answer.lstrip().removeprefix(ASSISTANT.strip()).lstrip() for answer in texts]
        context, answers = _after(earlier, text), list(texts)
    _require_open(context)
    return context, answers


def _earlier(values: Values) -> list[Message]:
    """The messages before the prompt, from the columns `system` and `history`."""
    earlier: list[Message] = []
    if values.get("system"):
        earlier.append({"role": "system", "content": _text(values["system"], "field 'system'")})
    history = values.get("history")
    if not history:
        return earlier
    if not isinstance(history, list):
        raise Malformed("field 'history' is not a list of [question, answer] or of messages")
    if isinstance(history[0], Mapping):
        return earlier + _messages(history, "history")
    for number, turn in enumerate(history, start=1):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise Malformed(f"turn {number} of 'history' is not [question, answer]")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            earlier.append({"role": role, "content": _text(text, f"turn {number} of 'history'")})
    return earlier


def _after(earlier: list[Message], context: Context) -> Context:
    """The context after the earlier turns. A text becomes the user's message; a transcript gets text in front."""
    if not earlier:
        return context
    if isinstance(context, list):
        own = context[0]["role"] == "system" if context else False
        return [message for message in earlier if not (own and message["role"] == "system")] + context
    if not context.strip():
        return earlier
    if not ("\n\n" + context.lstrip()).startswith(HUMAN):
        return [*earlier, {"role": "user", "content": context}]
    marks = {"user": HUMAN + " ", "assistant": ASSISTANT + " "}
    return "".join(marks.get(m["role"], "") + message_text(m) for m in earlier) + "\n\n" + context.lstrip()


def _answer(message: Message) -> Answer:
    """The text of an answer's message, or the message itself if it holds more than text."""
    return message if set(message) - {"role", "content"} else str(message["content"])


def _require_text(answer: Answer, name: str) -> None:
    """Refuses an answer that only a chat template can write, where there are no messages for one to render."""
    if not isinstance(answer, str):
        more = ", ".join(sorted(set(answer) - {"role", "content"}))
        raise Malformed(
            f"field {name!r} holds more than a text ({more}), which only a chat template writes, and it writes nothing "
            "where there is no prompt; give a prompt, or leave these fields out"
        )


def _template(values: Values) -> dict[str, Any]:
    """The columns beside the texts that a chat template may render: those that JSON can hold."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in (*TEXT_COLUMNS, *CONTEXT_COLUMNS) or not _is_plain(value):
            continue
        if isinstance(value, str) and name in TEMPLATE_COLUMNS and value.strip():
            try:
                value = parse_json(value)
            except ValueError as error:
                raise Malformed(f"field {name!r} is a text that is not JSON ({error})") from error
        if name == "chat_template_kwargs" and value and not isinstance(value, Mapping):
            raise Malformed(f"field {name!r} is a {type(value).__name__}, not a mapping of a template's switches")
        if name in TEMPLATE_COLUMNS and not value:
            continue
        if value is not None:
            _require_unicode(value, f"field {name!r}")
            found[name] = SWITCHES.get(value, value) if isinstance(value, str) else value
    return found


def _is_plain(value: object) -> bool:
    """Whether JSON can hold a value; images and sounds it cannot."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))


def _conversation(prompt: object, answer: object, name: str) -> list[Message]:
    """All messages through the last answer."""
    if isinstance(answer, str):
        messages = [{"role": "assistant", "content": _text(answer, f"field {name!r}")}]
    else:
        messages = _messages(answer, name)
    if messages[-1]["role"] != "assistant":
        raise Malformed(f"the last message of {name!r} is of role {messages[-1]['role']!r}, not 'assistant'")
    first = next(number for number, message in enumerate(messages) if message["role"] not in INSTRUCTING)
    if isinstance(prompt, str) and messages[first]["role"] == "assistant":
        text = _text(prompt, "field 'prompt'", may_be_blank=True)
        asked = [str(message.get("content")).strip() for message in messages if message["role"] == "user"]
        if not text.strip() or text.strip() in asked:
            return messages
        return [*messages[:first], {"role": "user", "content": text}, *messages[first:]]
    if isinstance(prompt, list) and prompt:
        before = _messages(prompt, "prompt")
        return messages if same_turns(messages[: len(before)], before) else before + messages
    return messages


def _messages(value: object, name: str) -> list[Message]:
    """The messages with all fields that JSON can hold and that are not null: Parquet gives every message the fields of
    all messages, and has bytes, dates and decimals too."""
    if not isinstance(value, list) or not value:
        raise Malformed(f"field {name!r} is not a list of messages")
    messages: list[Message] = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise Malformed(f"message {number} of {name!r} has no 'role'")
        held = {key: field for key, field in message.items() if field not in (None, [], {}) and _is_kept(key, field)}
        if not (set(held) - {"role", "content"}) or held.get("content"):
            _text(held.get("content"), f"the content of message {number} of {name!r}")
        _require_unicode(held, f"message {number} of {name!r}")
        messages.append(held)
    return messages


def _is_kept(key: str, field: object) -> bool:
    return key in ("role", "content") or _is_plain(field)


def _require_open(prompt: Context) -> None:
    if isinstance(prompt, str):
        return
    if not prompt:
        raise Malformed(
            "the conversation has nothing before the answer; text without a prompt has an empty text as its 'prompt' "
            "and its answers as texts"
        )
    if prompt[-1]["role"] == "assistant":
        raise Malformed("the prompt ends with an assistant's message, so there is nothing left to answer")


def _split_transcript(values: Values, name: str) -> tuple[str, str]:
    text = text_field(values, name)
    turns = list(TURN.finditer(text))
    if not turns or turns[-1].group(1) != "Assistant":
        raise Malformed(f"field {name!r} is not a transcript whose last turn opens with {ASSISTANT!r}")
    if len(turns) == 1:
        raise Malformed(f"field {name!r} has no turn before its answer")
    end = turns[-1].end()
    _text(text[end:], f"the last answer of {name!r}")
    return text[:end], text[end:]


def _complete_transcript(prompt: str) -> tuple[str, bool]:
    r"""An HH transcript that stops after the human's turn gets the "\n\nAssistant:" before the answer.

    Returns the prompt and whether it was completed; any other text is unchanged.
    """
    text = "\n\n" + prompt.lstrip()
    turns = TURN.findall(text)
    if not text.startswith(HUMAN) or turns[-1] != "Human":
        return prompt, False
    return text.rstrip() + ASSISTANT, True


def _tlcr_context(values: Values) -> str:
    context = _prompt_text(values, "context")
    return context.replace("###Human:", HUMAN).replace("###Assistant:", ASSISTANT).rstrip()


def _tlcr_answer(text: str) -> str:
    return " " + text.lstrip()


PREFERENCE_FORMATS: dict[str, Callable[[str, Values], RawPreference]] = {
    "preference": preference,
    "hh": hh_preference,
    "tlcr": tlcr_preference,
}
EDIT_FORMATS: dict[str, Callable[[str, Values], RawEdit]] = {"edits": edit, "tlcr": tlcr_edit}
