"""Text to token ids and back, aligned by character offsets.

Prompt and answer are tokenised together, because a model reads them together: a byte-pair encoder may tokenise
" answer" after a prompt differently from " answer" alone. The offsets, which only a fast tokenizer gives, show where
the answer begins. No function here adds special tokens: a prompt's text is complete (see ``render_prompt``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import takewhile
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from tlcr.config.schema import DataConfig
from tlcr.errors import ConfigError, DataError
from tlcr.text.turns import Message, Opening, apply_template, find_opening, without_end
from tlcr.types import EncodedAnswer, EncodedComparison, PreferencePair

__all__ = [
    "answer_spans",
    "character_spans",
    "cut_answer",
    "decode_text",
    "encode_answer",
    "encode_answers",
    "encode_comparisons",
    "is_written",
    "opening",
    "render_answer",
    "render_messages",
    "render_prompt",
    "render_prompt_and_answers",
    "render_question",
    "start_of_text",
    "token_pieces",
]


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    answer: str,
    *,
    max_prompt_tokens: int,
    max_answer_tokens: int | None,
    end_of_sequence: bool = True,
) -> EncodedAnswer:
    """Tokenise ``prompt + answer`` as one text and find where the answer begins.

    The answer begins at the first token whose end lies beyond the prompt's last character. A token across the
    boundary therefore belongs to the answer. The prompt's ids then differ from those of the prompt alone, which a
    policy gets in a rollout. To avoid this, end prompts where the tokenizer ends words, as a template does.

    Args:
        tokenizer: a fast tokenizer, which gives character offsets.
        prompt: complete text, template and beginning-of-sequence token included.
        answer: the text that follows the prompt.
        max_prompt_tokens: a longer prompt is cut at the beginning, its beginning-of-sequence token included.
        max_answer_tokens: a longer answer is cut at the end; the end-of-sequence token counts towards this limit, as it
            does when a policy generates. None: no limit.
        end_of_sequence: append the end-of-sequence token to an answer that was not cut, in place of the end tokens that
            its text may end with (``turns.without_end``). ``complete`` says whether the answer ends with it.

    Returns:
        The ids of both and where the answer begins.

    Raises:
        ConfigError: the tokenizer is not a fast one, or it names no end-of-sequence token.
    """
    return encode_answers(
        tokenizer,
        [prompt],
        [answer],
        max_prompt_tokens=max_prompt_tokens,
        max_answer_tokens=max_answer_tokens,
        end_of_sequence=end_of_sequence,
    )[0]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    max_prompt_tokens: int,
    max_answer_tokens: int | None,
    end_of_sequence: bool = True,
) -> list[EncodedAnswer]:
    """``encode_answer`` for many at once, several times faster than one by one."""
    _require_fast(tokenizer, "locating an answer in its context")
    if end_of_sequence and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r} names no end-of-sequence token; set its eos_token and save it again"
        )
    if not prompts:
        return []
    batch = tokenizer(
        [
            prompt + (without_end(tokenizer, answer) if end_of_sequence else answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ],
        add_special_tokens=False,
        return_offsets_mapping=True,
        padding=False,
        truncation=False,
        verbose=False,
    )
    encoded = []
    for prompt, ids, offsets in zip(prompts, batch["input_ids"], batch["offset_mapping"], strict=True):
        start = _answer_start(offsets, prompt)
        first = max(0, start - max_prompt_tokens)
        tail = [tokenizer.eos_token_id] if end_of_sequence else []
        whole = EncodedAnswer(
            ids=(*ids[first:], *tail), answer_start=start - first, complete=end_of_sequence, prompt_cut=first
        )
        encoded.append(whole if max_answer_tokens is None else cut_answer(whole, max_answer_tokens))
    return encoded


def _answer_start(offsets: Sequence[tuple[int, int]], prompt: str) -> int:
    """The first token whose end lies beyond the prompt.

    An empty prompt has no token, not even a word-boundary mark without characters.
    """
    return next((k for k, (_, end) in enumerate(offsets) if end > len(prompt)), len(offsets)) if prompt else 0


def encode_comparisons(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair], data: DataConfig
) -> list[EncodedComparison]:
    """Both answers of each pair, each with its prompt, cut as `data` says."""
    chosen, rejected = (
        encode_answers(
            tokenizer,
            [pair.prompt for pair in pairs],
            answers,
            max_prompt_tokens=data.max_prompt_tokens,
            max_answer_tokens=data.max_answer_tokens,
        )
        for answers in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    )
    return list(map(EncodedComparison, chosen, rejected))


def cut_answer(encoded: EncodedAnswer, max_answer_tokens: int) -> EncodedAnswer:
    """The answer's first ``max_answer_tokens`` tokens; a cut answer is not complete."""
    limit = encoded.answer_start + max_answer_tokens
    if len(encoded.ids) <= limit:
        return encoded
    cut = encoded.answer_cut + len(encoded.ids) - limit
    return replace(encoded, ids=encoded.ids[:limit], complete=False, answer_cut=cut)


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    *,
    rendered_at: datetime | None = None,
    **template: Any,
) -> str:
    """A prompt's complete text, to be tokenised without adding special tokens.

    Args:
        tokenizer: the tokenizer whose chat template and beginning-of-sequence token apply.
        prompt: messages ({"role", "content"}) are rendered by the chat template, with the header of the next answer
            (``turns.find_opening``). Plain text gets the beginning-of-sequence token in front if the tokenizer would
            add one. It never stands there twice. A text without a token (an empty one) becomes the ``start_of_text``: a
            model needs something to predict the first token from.
        rendered_at: what the clock of the chat template shows; None: the time.
        **template: other values for the chat template: tools, documents, its own switches.

    Returns:
        The text.

    Raises:
        ConfigError: messages, and a tokenizer without a chat template.
        DataError: the chat template refuses the messages (their order of roles, say).
    """
    bos = tokenizer.bos_token
    if not isinstance(prompt, str):
        return _with_one_beginning(tokenizer, opening(tokenizer, prompt, rendered_at=rendered_at, **template).prompt)
    if bos is not None and not prompt.startswith(bos) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = bos + prompt
    elif not prompt.strip() and not tokenizer(prompt, add_special_tokens=False)["input_ids"]:
        text = start_of_text(tokenizer) + prompt
    else:
        text = prompt
    return _with_one_beginning(tokenizer, text)


def _with_one_beginning(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    bos, start = str(tokenizer.bos_token or ""), 0
    while bos and text.startswith(bos + bos, start):
        start += len(bos)
    return text[start:]


def start_of_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands before a text without a prompt: the beginning-of-sequence token or, where the tokenizer has none, the
    end-of-sequence token, which separates the texts of a pre-training corpus.

    Args:
        tokenizer: the tokenizer.

    Returns:
        The token's text.

    Raises:
        ConfigError: the tokenizer names neither.
    """
    token = tokenizer.bos_token or tokenizer.eos_token
    if token is None:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r} names neither a beginning- nor an end-of-sequence token to stand "
            "before text without a prompt; set one of them and save it again"
        )
    return str(token)


def render_question(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The text that asks a model for an answer in words, with all that its chat template's generation prompt opens.

    Args:
        tokenizer: the model's tokenizer, with a chat template.
        messages: the conversation before the answer.

    Returns:
        The generation prompt as it is, also where whole conversations do not have its end (``<think>``): no answer is
        compared with it. Where it lacks the header of an answer, ``render_prompt``.

    Raises:
        ConfigError: as ``render_prompt``.
        DataError: as ``render_prompt``.
    """
    found = opening(tokenizer, messages)
    if found.added and not found.dropped:
        return found.prompt
    return apply_template(tokenizer, messages, {}, add_generation_prompt=True)


def opening(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    *,
    rendered_at: datetime | None = None,
    **template: Any,
) -> Opening:
    """How the tokenizer's chat template begins the answer to ``prompt``; see ``turns.find_opening``."""

    def render(messages: Sequence[Message], wanted: bool) -> str:
        return apply_template(tokenizer, messages, template, add_generation_prompt=wanted, rendered_at=rendered_at)

    return find_opening(render, prompt)


def render_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    answer: str | Message,
    *,
    rendered_at: datetime | None = None,
    **template: Any,
) -> str:
    """An assistant message's text as it follows ``render_prompt`` of the same messages, moment and other values.

    Args:
        tokenizer: the tokenizer whose chat template applies.
        prompt: the messages before the answer.
        answer: the content of the assistant's message, or the message if it holds more (tool calls, reasoning).
        rendered_at: as for the prompt.
        **template: other values for the chat template, as for the prompt.

    Returns:
        All that the chat template writes for the answer after the prompt, without the end of the turn: prompt, answer
        and that end are the rendered conversation. White space before the answer and an empty block of thoughts belong
        to it, where the template writes them. If the template leaves out a part of a text (its thoughts), the text
        itself follows the white space (``is_written`` tells).

    Raises:
        DataError: the chat template does not continue its own prompt with such a message.
    """
    found = opening(tokenizer, prompt, rendered_at=rendered_at, **template)
    return _after_opening(tokenizer, found, prompt, answer, rendered_at, template)


def render_prompt_and_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    answers: Sequence[str | Message],
    *,
    rendered_at: datetime | None = None,
    **template: Any,
) -> tuple[str, list[str]]:
    """``render_prompt`` of messages and ``render_answer`` of each answer, for which the opening is found only once.

    Args:
        tokenizer: as for ``render_answer``.
        prompt: as for ``render_answer``.
        answers: as for ``render_answer``.
        rendered_at: as for ``render_answer``.
        **template: as for ``render_answer``.

    Returns:
        The prompt's text, and that of each answer.
    """
    found = opening(tokenizer, prompt, rendered_at=rendered_at, **template)
    after = [_after_opening(tokenizer, found, prompt, answer, rendered_at, template) for answer in answers]
    return _with_one_beginning(tokenizer, found.prompt), after


def _after_opening(
    tokenizer: PreTrainedTokenizerBase,
    found: Opening,
    prompt: Sequence[Message],
    answer: str | Message,
    rendered_at: datetime | None,
    template: Mapping[str, Any],
) -> str:
    message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    whole = apply_template(
        tokenizer, [*prompt, message], template, add_generation_prompt=False, rendered_at=rendered_at
    )
    continues, whole = whole.startswith(found.prompt), whole.removesuffix(found.closing)
    written = whole[len(found.prompt) :]
    if not isinstance(answer, str):
        if not continues:
            raise DataError(
                "the tokenizer's chat template does not continue its own prompt where an answer holds tool calls or "
                "reasoning; set model.chat_template to one that does, or give such answers as text"
            )
        return written
    if continues and found.continues and is_written(answer, whole):
        return written
    return (found.lead if not found.lead.strip() else "") + _reopened(answer, found.dropped)


def is_written(answer: str, conversation: str) -> bool:
    """Whether a rendered conversation, without the end of its last turn, ends with an answer, white space aside."""
    return "".join(conversation.split()).endswith("".join(answer.split()))


def _reopened(answer: str, dropped: str) -> str:
    """The answer, with the tag that the generation prompt opened if the answer only closes it."""
    tag = re.search(r"<(\w+)>\s*\Z", dropped)
    if tag and f"</{tag[1]}>" in answer and tag[0].strip() not in answer:
        return tag[0] + answer
    return answer


def render_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, rendered_at: datetime | None, **template: Any
) -> str:
    """What the chat template writes for whole messages, without the header of another."""
    return apply_template(tokenizer, messages, template, add_generation_prompt=False, rendered_at=rendered_at)


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, context: Sequence[int] = ()) -> str:
    """The text that ``ids`` add after ``context``: without special tokens and without clean-up of spaces.

    Tokenizers that mark words by a leading space need the context: without it, the first word would lose its space.

    Args:
        tokenizer: the tokenizer of the ids.
        ids: the ids to decode.
        context: the ids before them.

    Returns:
        The text.
    """
    text = _decode(tokenizer, [*context, *ids])
    return text[len(_decode(tokenizer, context)) :] if context else text


def character_spans(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, context: Sequence[int] = ()
) -> list[tuple[int, int]]:
    """For each id, the characters [start, end) of ``decode_text(tokenizer, ids, context=context)`` that it writes.

    Where one character's bytes are spread over several tokens, each of them has the whole character in its span, so
    neighbouring spans may share a character; apart from that the spans follow one another without a gap. Special
    tokens, and tokens without visible text (a word-boundary mark at the very start), have empty spans.

    The cost is linear for byte-level and SentencePiece-like decoders; for others, each prefix is decoded once.

    Args:
        tokenizer: a fast tokenizer.
        ids: the ids to decode.
        context: the ids before them.

    Returns:
        One pair for each id.

    Raises:
        ConfigError: the tokenizer is not a fast one.
    """
    _require_fast(tokenizer, "locating tokens in the text")
    sequence = [*context, *ids]
    text = _decode(tokenizer, sequence)
    spans = _spans_by_bytes(tokenizer, sequence, text) or _spans_by_prefixes(tokenizer, sequence, text)
    offset = len(_decode(tokenizer, context)) if context else 0
    return [(max(0, start - offset), max(0, end - offset)) for start, end in spans[len(context) :]]


def answer_spans(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, encoded: EncodedAnswer
) -> list[tuple[int, int]]:
    """For each token of ``encode_answer``, the characters [start, end) of the answer that it writes.

    Decoding is most exact, white space included. Where it does not give back the answer, which has special tokens or is
    changed by the tokenizer (lower case, Unicode forms), the offsets of its encoding are used. White space that these
    leave between two tokens belongs to the second, as in decoding.

    Args:
        tokenizer: the tokenizer of ``encoded``.
        prompt: the prompt that was encoded.
        answer: the answer that was encoded.
        encoded: both as ids; a prompt or an answer that was cut stays whole in the other arguments.

    Returns:
        One pair for each token of the answer but its end of sequence. Characters of the prompt, which the first token
        may write too, are not counted.

    Raises:
        ConfigError: the tokenizer is not a fast one.
    """
    content = encoded.answer_ids[:-1] if encoded.complete else encoded.answer_ids
    context = encoded.ids[: encoded.answer_start]
    spans = character_spans(tokenizer, content, context=context)
    written = decode_text(tokenizer, content, context=context)
    read_answer = without_end(tokenizer, answer) if encoded.complete else answer
    for before in range(spans[0][1] + 1 if spans else 0):
        rest = written[before:]
        if encoded.answer_cut:
            rest = rest.rstrip("\ufffd")  # a cut may split a character
        as_read = rest == read_answer or (encoded.answer_cut > 0 and rest != "" and answer.startswith(rest))
        if as_read and prompt.endswith(written[:before]):
            return [(max(0, start - before), max(0, end - before)) for start, end in spans]
    read = tokenizer(prompt + read_answer, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    first, before = _answer_start(read["offset_mapping"], prompt), len(prompt)
    offsets = read["offset_mapping"][first : first + len(content)]
    return _without_gaps([(max(0, start - before), max(0, end - before)) for start, end in offsets], read_answer)


def _without_gaps(spans: Sequence[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    """The spans, each with the white space between it and the one before.

    Post-processors with ``trim_offsets`` (RoBERTa's) leave the space before a word to no token, and a token of spaces
    without a character.
    """
    whole: list[tuple[int, int]] = []
    settled = 0
    for start, end in spans:
        whole.append((settled if text[settled:start].isspace() else start, end))
        settled = max(settled, end)
    return whole


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, context: Sequence[int] = ()) -> list[str]:
    """The text of each id, for display. The joined pieces of ordinary tokens are the decoded text.

    Args:
        tokenizer: a fast tokenizer.
        ids: the ids to decode.
        context: the ids before them.

    Returns:
        One text for each id. A character spread over several tokens is written by the first of them. Special tokens are
        written by name.
    """
    text = decode_text(tokenizer, ids, context=context)
    special = _special_ids(tokenizer)
    pieces, written = [], 0
    for token, (start, end) in zip(ids, character_spans(tokenizer, ids, context=context), strict=True):
        pieces.append(
            str(tokenizer.convert_ids_to_tokens(token)) if token in special else text[max(start, written) : end]
        )
        written = max(written, end)
    return pieces


def _require_fast(tokenizer: PreTrainedTokenizerBase, purpose: str) -> None:
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{purpose} needs a fast tokenizer (one with a tokenizer.json), but {tokenizer.name_or_path!r} is a "
            f"{type(tokenizer).__name__}; convert it, or name another in model.tokenizer"
        )


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that decoding with ``skip_special_tokens`` leaves out; ``all_special_ids`` lists only the named ones."""
    return {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE writes printable bytes as themselves and the others as the characters from U+0100 on."""
    characters = set(ByteLevel.alphabet())
    themselves = {character: ord(character) for character in characters if ord(character) < 256}
    others = sorted(characters - themselves.keys())
    return themselves | dict(zip(others, sorted(set(range(256)) - set(themselves.values())), strict=True))


_BYTE_OF_CHARACTER = _byte_level_alphabet()


def _token_bytes(token: str, decoders: set[str]) -> bytes:
    if "ByteLevel" in decoders:
        if all(character in _BYTE_OF_CHARACTER for character in token):
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        return token.encode()
    if "ByteFallback" in decoders and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def _spans_by_bytes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[tuple[int, int]] | None:
    """Spans from the bytes of each token; None where these do not add up to the decoded text."""
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return None
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    decoders = {part["type"] for part in state.get("decoders", [state])}
    special = _special_ids(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    parts = [
        b"" if id in special or token is None else _token_bytes(token, decoders)
        for id, token in zip(ids, tokens, strict=True)
    ]
    written = b"".join(parts)
    characters = written.decode(errors="replace")
    # SentencePiece-like decoders remove the space that their encoders add before the text.
    stripped = 1 if characters == " " + text else 0
    if characters[stripped:] != text:
        return None
    character_of_byte = _characters_of_bytes(written, characters)
    spans, first = [], 0
    for part in parts:
        last = first + len(part)
        if part:
            spans.append((character_of_byte[first], character_of_byte[last - 1] + 1))
        else:
            spans.append((spans[-1][1],) * 2 if spans else (0, 0))
        first = last
    return [(max(0, start - stripped), max(0, end - stripped)) for start, end in spans]


def _characters_of_bytes(written: bytes, characters: str) -> list[int]:
    """For each byte, the index of the character that it belongs to; undecodable bytes belong to their U+FFFD."""
    indices: list[int] = []
    for index, character in enumerate(characters):
        width = len(character.encode())
        if character == "\ufffd" and not written.startswith(b"\xef\xbf\xbd", len(indices)):
            try:
                written[len(indices) : len(indices) + 4].decode()
            except UnicodeDecodeError as error:
                width = error.end
        indices += [index] * width
    return indices


def _spans_by_prefixes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[tuple[int, int]]:
    """Spans for any decoder, from the length of the text that is final after each id."""
    special = _special_ids(tokenizer)
    spans: list[tuple[int, int]] = []
    settled = 0
    for count, id in enumerate(ids, start=1):
        if id in special:
            spans.append((settled, settled))
            continue
        prefix = _decode(tokenizer, ids[:count])
        agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prefix, text, strict=False)))
        # The prefix ends in a replacement character if a later token completes the character that its bytes began.
        is_open = agreed < len(prefix)
        start, settled = settled, max(settled, agreed)
        spans.append((start, min(len(text), settled + is_open)))
    return spans
