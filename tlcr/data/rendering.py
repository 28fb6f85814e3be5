"""Records as a model reads them: the complete prompt, and every answer as it follows its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from tlcr.data.records import (
    Answer,
    Context,
    Malformed,
    Message,
    RawEdit,
    RawMarkedAnswer,
    RawPreference,
    RawPrompt,
    Values,
    placed,
)
from tlcr.text.template_variables import template_variables
from tlcr.text.tokenization import render_prompt, render_prompt_and_answers
from tlcr.text.turns import without_beginning, without_end
from tlcr.types import EditPair, MarkedAnswer, PreferencePair


def rendered_prompt(raw: RawPrompt, tokenizer: PreTrainedTokenizerBase, rendered_at: datetime | None = None) -> str:
    """The complete prompt as a model with this tokenizer reads it."""
    context, template = _without_marks(raw.prompt, tokenizer), template_arguments(raw.template, tokenizer)
    return render_prompt(tokenizer, context, rendered_at=rendered_at, **template)


def rendered_preference(
    raw: RawPreference, tokenizer: PreTrainedTokenizerBase, rendered_at: datetime | None = None
) -> PreferencePair:
    """The pair as a model with this tokenizer reads it; ``rendered_at`` as for ``render_prompt``."""
    prompt, (chosen, rejected) = _rendered(raw, [raw.chosen, raw.rejected], tokenizer, rendered_at)
    if chosen == rejected:
        raise Malformed("chosen and rejected are the same text in this tokenizer's chat template")
    return PreferencePair(id=raw.id, prompt=prompt, chosen=chosen, rejected=rejected)


def rendered_edit(raw: RawEdit, tokenizer: PreTrainedTokenizerBase, rendered_at: datetime | None = None) -> EditPair:
    """The same for an edited answer."""
    answers = [raw.rejected, raw.revised, *([] if raw.chosen is None else [raw.chosen])]
    prompt, (rejected, revised, *chosen) = _rendered(raw, answers, tokenizer, rendered_at)
    return EditPair(id=raw.id, prompt=prompt, rejected=rejected, revised=revised, chosen=chosen[0] if chosen else None)


def rendered_marked_answer(
    raw: RawMarkedAnswer, tokenizer: PreTrainedTokenizerBase, rendered_at: datetime | None = None
) -> MarkedAnswer:
    """The same for an answer with marked errors, whose spans still mark the same words."""
    prompt, (response,) = _rendered(raw, [raw.response], tokenizer, rendered_at)
    return MarkedAnswer(raw.id, prompt, response, placed(raw.spans, without_end(tokenizer, raw.response), response))


def template_arguments(template: Values, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a chat template is given beside the messages.

    Args:
        template: the columns of a record that are not its texts.
        tokenizer: the tokenizer whose chat template it is.

    Returns:
        The columns `tools` and `documents`, those that the chat template names, and the switches that
        `chat_template_kwargs` hold, which come before columns of the same name.
    """
    names = ("tools", "documents", *template_variables(tokenizer))
    own = {name: value for name, value in template.items() if name in names}
    return own | dict(template.get("chat_template_kwargs", {}))


def _rendered(
    raw: RawPreference | RawEdit | RawMarkedAnswer,
    answers: Sequence[Answer],
    tokenizer: PreTrainedTokenizerBase,
    rendered_at: datetime | None,
) -> tuple[str, Sequence[str]]:
    context = _without_marks(raw.prompt, tokenizer)
    bare = [_answer_without_marks(answer, tokenizer) for answer in answers]
    if isinstance(context, str):
        return render_prompt(tokenizer, context), [answer for answer in bare if isinstance(answer, str)]
    template = template_arguments(raw.template, tokenizer)
    return render_prompt_and_answers(tokenizer, context, bare, rendered_at=rendered_at, **template)


def _without_marks(context: Context, tokenizer: PreTrainedTokenizerBase) -> Context:
    """The messages without the special tokens around their texts, which the chat template writes; text as it is."""
    if isinstance(context, str):
        return context
    return [_message_without_marks(message, tokenizer) for message in context]


def _answer_without_marks(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> Answer:
    if not isinstance(answer, str):
        return _message_without_marks(answer, tokenizer)
    bare = without_end(tokenizer, without_beginning(tokenizer, answer))
    if answer.strip() and not bare.strip():
        raise Malformed(f"an answer is {answer.strip()[:40]!r}, which is special tokens alone")
    return bare


def _message_without_marks(message: Message, tokenizer: PreTrainedTokenizerBase) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": without_end(tokenizer, without_beginning(tokenizer, content))}
