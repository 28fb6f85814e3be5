"""Where the turns of a conversation begin and end, as a chat template writes them.

A template says only how a whole conversation reads, and how a prompt reads for which an answer is wanted. Where an
answer begins and which token ends it is found by rendering a placeholder as the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from tlcr.errors import ConfigError, DataError
from tlcr.text.rendering import render
from tlcr.text.template_dates import shown_at

__all__ = [
    "Message",
    "Opening",
    "apply_template",
    "end_notes",
    "find_opening",
    "opening_note",
    "turn_end",
    "turn_notes",
    "without_beginning",
    "without_end",
]

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""(messages, add_generation_prompt) to their text."""

MARK = "\N{OBJECT REPLACEMENT CHARACTER}tlcr\N{OBJECT REPLACEMENT CHARACTER}"
"""A placeholder for an answer's text, to find the text that a chat template writes around it."""
MARKED = {"role": "assistant", "content": MARK}
SAMPLE: tuple[Message, ...] = ({"role": "user", "content": "Hello."},)

ENDS = (
    *("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"),
    *("<|end_of_turn|>", "<|eot|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
)
"""Names of end tokens in published models. One counts only where the tokenizer has it as a special token."""


@dataclass(frozen=True)
class Opening:
    """How a chat template begins an answer.

    prompt: the text before the answer, the same in training and in rollouts. lead: what the template writes between it
    and the answer's content (white space, or an empty block of thoughts). closing: what it writes after the content.
    dropped: the end of the generation prompt that whole conversations do not have, and that ``prompt`` is without.
    added: what ``prompt`` has in its place, or after the generation prompt. continues: whether whole conversations
    begin with ``prompt``; where they do not, it is the generation prompt as it is.
    """

    prompt: str
    lead: str = ""
    closing: str = ""
    dropped: str = ""
    added: str = ""
    continues: bool = True


def find_opening(render: Render, prompt: Sequence[Message]) -> Opening:
    """Where the answer to ``prompt`` begins, so that prompt and answer are a text that the template could have written.

    Args:
        render: the chat template.
        prompt: the messages before the answer.

    Returns:
        The prompt's text is the generation prompt where whole conversations begin with it. A generation prompt that
        opens what whole conversations leave out (``<think>``) is cut to what both have in common. One that lacks the
        header of an answer gets it.
    """
    asked = render(prompt, True)
    try:
        whole = render([*prompt, MARKED], False)
    except DataError:  # a template that only renders prompts; an answer to this one is refused when it is rendered
        return Opening(asked, continues=False)
    before, mark, closing = whole.partition(MARK)
    if not mark:
        return Opening(asked, continues=False)
    if before.startswith(asked):
        lead = before[len(asked) :]
        if not lead.strip() or render(prompt, False) != asked:
            return Opening(asked, lead, closing)
        common, shared = asked, before
    else:
        plain = render(prompt, False)
        if not before.startswith(plain):
            return Opening(asked, continues=False)
        common = _shared_start(asked, before)
        if common != before:  # both go on, perhaps from the middle of a tag or a word
            common = _without_half(common)
        shared = common if common[len(plain) :].strip() else before
    # Spaces before an answer belong to it: in most tokenizers they are part of its first word.
    text = shared.rstrip(" \t")
    return Opening(text, before[len(text) :], closing, asked[len(common) :], text[len(common) :])


def _without_half(text: str) -> str:
    """The text without the tag or the word that it may end in the middle of."""
    # from the end: a search from the beginning takes the square of a long word
    half = re.match(r"[^<>\s]*<|\w+", text[::-1])
    return text[: len(text) - half.end()] if half else text


def _shared_start(a: str, b: str) -> str:
    return a[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))]


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
    rendered_at: datetime | None = None,
) -> str:
    """The messages' text, by the tokenizer's chat template.

    Args:
        tokenizer: the tokenizer whose chat template applies.
        messages: the conversation.
        template: other values for the template.
        add_generation_prompt: end with what the template writes before an answer that is wanted.
        rendered_at: what the clock of the template shows; None: the time.

    Returns:
        The text.

    Raises:
        ConfigError: the tokenizer has no chat template, or several and none for every conversation.
        DataError: the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"the data hold conversations, but tokenizer {tokenizer.name_or_path!r} has no chat template; "
            "set model.chat_template to one (for a server, save it with the tokenizer), or give prompts as plain text"
        )
    try:
        source = tokenizer.get_chat_template(tools=template.get("tools"))
    except ValueError as error:  # several templates, and none of them for every conversation
        names = ", ".join(tokenizer.chat_template)
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r} has several chat templates ({names}) and none called 'default'; set "
            "model.chat_template to the one that you want"
        ) from error
    source, date = (source, {}) if rendered_at is None else shown_at(source, rendered_at)
    return render(tokenizer, messages, source, add_generation_prompt=add_generation_prompt, values={**template, **date})


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that the chat template writes right after an assistant's content.

    Args:
        tokenizer: a tokenizer with or without a chat template.

    Returns:
        One of the tokenizer's added tokens; None without a template, or if it writes none there.
    """
    if tokenizer.chat_template is None:
        return None
    try:
        whole = apply_template(tokenizer, [*SAMPLE, MARKED], {}, add_generation_prompt=False)
    except (
        ConfigError,
        DataError,
    ):  # templates for other conversations; their data will show what they want
        return None
    closing = whole.partition(MARK)[2].lstrip()
    names = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return max((name for name in names if name and closing.startswith(name)), key=len, default=None)


def without_end(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text without the end tokens that stand at its end, and without the white space after them.

    End tokens are the tokenizer's end-of-sequence token, what its chat template ends turns with, and other special
    tokens with the name of an end (`ENDS`). Whoever encodes the text writes the one end that it should have.

    Args:
        tokenizer: the tokenizer of the text.
        text: an answer, or the content of a message.

    Returns:
        The text; as it is, where it ends with none of them.
    """
    ends = _after_marks(_ends_backwards(tokenizer), text[::-1])
    return text[: len(text) - ends]


def without_beginning(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text without the beginning-of-sequence tokens at its head, and without the white space before them."""
    bos = tokenizer.bos_token
    return text[_after_marks(_marks([str(bos)]), text) :] if bos else text


def _marks(texts: Sequence[str]) -> re.Pattern[str]:
    """One of the texts, the longest that fits, with all white space before it; none of no texts."""
    one = "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"
    return re.compile(rf"(?=(\s*))\1(?:{one})")  # the look-ahead keeps a text from beginning in that white space


def _after_marks(marks: re.Pattern[str], text: str) -> int:
    """Where a text goes on after the marks at its head. No copy for each: a stranger may send a million of them."""
    start = 0
    while found := marks.match(text, start):
        start = found.end()
    return start


def turn_notes(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What is unusual about the turns of a tokenizer's chat template, one sentence for each thing.

    Args:
        tokenizer: a tokenizer with or without a chat template.

    Returns:
        Notes on a generation prompt that whole conversations do not have, or that lacks the header of an answer; on
        a template that does not continue its own prompt; and on turns that end with another token than answers do.
    """
    if tokenizer.chat_template is None:
        return ()

    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return apply_template(tokenizer, messages, {}, add_generation_prompt=add_generation_prompt)

    try:
        note = opening_note(find_opening(render, SAMPLE))
    except (ConfigError, DataError) as error:
        return (str(error),)
    return (*([f"the chat template {note}"] if note else []), *end_notes(tokenizer))


def end_notes(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """A note of a chat template that ends turns with another token than answers do; empty for any other."""
    end = turn_end(tokenizer)
    if end is None or end == tokenizer.eos_token:
        return ()
    return (
        f"the chat template ends turns with {end!r}, and answers end with {tokenizer.eos_token!r}, the tokenizer's "
        "eos_token: where the model ends its answers as the template does, set eos_token to that",
    )


def opening_note(opening: Opening) -> str | None:
    """What is unusual about an opening, as what "the chat template" does; None for a usual one."""
    if not opening.continues:
        return (
            "does not begin a whole conversation with the text of its prompt: answers follow the prompt as they are, "
            "in a text that the template would not write"
        )
    if opening.dropped:
        instead = f"end with {opening.added!r} instead" if opening.added else "do without it"
        return (
            f"ends the prompt with {opening.dropped!r}, which it leaves out of whole conversations: prompts {instead}, "
            "in training and in rollouts, and an answer may begin with it"
        )
    if opening.added:
        return f"has no generation prompt: prompts get {opening.added!r}, the header that it writes before an answer"
    return None


_ENDS_OF: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, re.Pattern[str]]] = WeakKeyDictionary()


def _ends_backwards(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """The tokenizer's end tokens as ``_marks`` of a reversed text; found once: it costs a look at all added tokens."""
    described = (tokenizer.eos_token, tokenizer.chat_template, len(tokenizer))
    known = _ENDS_OF.get(tokenizer)
    if known is None or known[0] != described:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        found = {tokenizer.eos_token, turn_end(tokenizer), *(special & set(ENDS))}
        known = _ENDS_OF[tokenizer] = (described, _marks([str(end)[::-1] for end in found if end]))
    return known[1]
