"""Notes on what a chat template makes of conversations: what it leaves out, and where it writes the date.

A template decides what a model reads of a conversation. A field that it does not render is lost without a word, and a
template that writes the date gives other tokens on every day. Both are found by rendering: once as it is, and once with
the field changed or taken away, or on another day. Source: ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from tlcr.data.formats import TEMPLATE_COLUMNS
from tlcr.data.records import Message, RawEdit, RawMarkedAnswer, RawPreference, RawPrompt
from tlcr.data.rendering import rendered_prompt, template_arguments
from tlcr.data.repairs import shown
from tlcr.errors import DataError
from tlcr.text.template_dates import another_day, asks_the_clock
from tlcr.text.template_variables import template_variables
from tlcr.text.tokenization import render_messages
from tlcr.text.turns import MARK

__all__ = ["template_notes"]

Raw = RawPrompt | RawPreference | RawEdit | RawMarkedAnswer

LOOKED_AT = 200
"""Records that are rendered again for the date, and for each kind of field; all that hold the field are counted."""
NOON = datetime(2026, 1, 1, 12)
"""A moment for renderings that are compared, which must not differ by the time."""


def template_notes(
    raws: Sequence[Raw], tokenizer: PreTrainedTokenizerBase, rendered_at: datetime | None
) -> tuple[str, ...]:
    """Notes on the conversations among some records, and on texts that no template renders.

    Args:
        raws: the records of a source.
        tokenizer: the tokenizer whose chat template renders them.
        rendered_at: what the template's clock shows; None: the time.

    Returns:
        Notes, one line each: columns that the template is given because it names them, fields that it leaves out, the
        date, and columns for a template beside prompts that are texts.
    """
    conversations = [raw for raw in raws if not isinstance(raw.prompt, str)]
    texts = [raw for raw in raws if isinstance(raw.prompt, str)]
    return (
        *_given(conversations, tokenizer),
        *_left_out(conversations, tokenizer),
        *_date(conversations, tokenizer, rendered_at),
        *_beside_texts(texts, tokenizer),
    )


def _date(raws: Sequence[Raw], tokenizer: PreTrainedTokenizerBase, rendered_at: datetime | None) -> tuple[str, ...]:
    """A note where the chat template writes the date into prompts."""
    templates = tokenizer.chat_template or ""
    if not any(map(asks_the_clock, templates.values() if isinstance(templates, dict) else [templates])):
        return ()
    moment = rendered_at or datetime.now()
    dated, looked_at = [], raws[:LOOKED_AT]
    for raw in looked_at:
        prompt = RawPrompt(raw.prompt, raw.template)
        try:
            lines, others = (
                rendered_prompt(prompt, tokenizer, at).splitlines() for at in (moment, another_day(moment))
            )
        except DataError:
            continue  # refused on another day alone
        if lines != others:
            dated.append(next((line for line, other in zip(lines, others, strict=False) if line != other), ""))
    if not dated:
        return ()
    of = str(len(raws)) if len(raws) == len(looked_at) else f"the first {len(looked_at)}"
    return (
        f"the chat template writes the date into {len(dated)} of {of} prompts ({shown(dated[0].strip())}): a "
        "run keeps the date on which it began, and whoever uses its models later gives them another; to avoid that, "
        f"give the template a date of its own{_date_variable(tokenizer)}, or set model.chat_template to one without",
    )


def _date_variable(tokenizer: PreTrainedTokenizerBase) -> str:
    names = sorted(name for name in template_variables(tokenizer) if "date" in name)
    return f" in a column {names[0]!r} of the data, which it reads," if names else ""


def _given(raws: Sequence[Raw], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    named = template_variables(tokenizer)
    found = {name: value for raw in reversed(raws) for name, value in raw.template.items() if name in named}
    if not found:
        return ()
    name, value = next(iter(found.items()))
    return (
        f"columns that the chat template is given, because it names them: {', '.join(found)} "
        f"(the first {name} is {shown(value)})",
    )


def _beside_texts(raws: Sequence[Raw], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    names = {*TEMPLATE_COLUMNS, *template_variables(tokenizer)}
    holding = [(raw, found) for raw in raws if (found := [name for name in raw.template if name in names])]
    if not holding:
        return ()
    (first, columns), *_ = holding
    return (
        f"{len(holding)} of {len(raws)} prompts are texts, which no chat template renders, so that their "
        f"{', '.join(columns)} are not read (the first holds {shown(first.template[columns[0]])}): give such prompts "
        "as messages",
    )


# ---- what the template leaves out


def _left_out(raws: Sequence[Raw], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    held: Counter[str] = Counter()
    looked: Counter[str] = Counter()
    lost: dict[str, list[Any]] = {}
    for raw in raws:
        kinds: dict[str, list[_Field]] = {}
        for part in _fields(raw, tokenizer):
            kinds.setdefault(part.kind, []).append(part)
        for kind, parts in kinds.items():
            held[kind] += 1
            if looked[kind] < LOOKED_AT:
                looked[kind] += 1
                missing = next((part for part in parts if not part.is_rendered(tokenizer)), None)
                if missing is not None:
                    lost.setdefault(kind, []).append(missing.value)
    if not lost:
        return ()
    each = [
        f"{kind} in {len(values)} of {looked[kind]} records"
        + (f" looked at, of {held[kind]}" if held[kind] > looked[kind] else "")
        + f" (the first is {shown(values[0])})"
        for kind, values in lost.items()
    ]
    return (
        f"the chat template does not render {', '.join(each)}: no model reads that; set model.chat_template to one "
        "that does, or leave it out of the data",
    )


class _Field:
    """A field of a message, or a value that the template is given, in one conversation."""

    def __init__(
        self, kind: str, messages: Sequence[Message], template: Mapping[str, Any], at: int | None, name: str
    ) -> None:
        self.kind, self.messages, self.template, self.at, self.name = kind, messages, template, at, name
        self.value = (template if at is None else messages[at])[name]

    def is_rendered(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the conversation is another text with the field changed or, if it may be missing, taken away."""

        def text(values: Mapping[str, Any] | None) -> str | None:
            messages, template = list(self.messages), dict(self.template)
            if values is not None and self.at is None:
                template = dict(values)
            elif values is not None and self.at is not None:
                messages[self.at] = dict(values)
            try:
                return render_messages(tokenizer, messages, rendered_at=NOON, **template)
            except (DataError, TypeError, ValueError):
                return None  # a template that refuses a value has read it

        own = self.template if self.at is None else self.messages[self.at]
        variants = [{**own, self.name: other} for other in _others(self.value)]
        if self.name != "content":
            variants.append({name: value for name, value in own.items() if name != self.name})
        as_it_is = text(None)
        return as_it_is is None or any(text(variant) != as_it_is for variant in variants)


def _fields(raw: Raw, tokenizer: PreTrainedTokenizerBase) -> Iterator[_Field]:
    assert not isinstance(raw.prompt, str)
    template = template_arguments(raw.template, tokenizer)
    for name in template:
        yield _Field(name, raw.prompt, template, None, name)
    for at, message in enumerate(raw.prompt):
        for name in message:
            if name != "role":
                yield _Field(f"{name} of {message['role']} messages", raw.prompt, template, at, name)
    for answer in (getattr(raw, name, None) for name in ("chosen", "rejected", "revised", "response")):
        if isinstance(answer, dict):
            for name in answer:
                if name != "role":
                    yield _Field(f"{name} of answers", [*raw.prompt, answer], template, len(raw.prompt), name)


def _others(value: Any) -> list[Any]:
    """Other values of the same type."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + 1]
    return [MARK] if isinstance(value, str) else []
