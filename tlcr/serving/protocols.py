"""What each route reads and writes: JSON to rows, and opinions to JSON. Errors name the field and what was wanted.

``token_rewards`` is ours. The others are what trainers and engines speak already: OpenRLHF's ``remote_url``, slime's
``remote_rm``, LLaMA-Factory's ``api`` and vLLM's ``/pooling``. Each is a class: ``rows`` reads a request,
``answer`` writes the response to what it read. docs/serving.md has an example of each.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from tlcr.data.formats import TEMPLATE_COLUMNS
from tlcr.errors import TlcrError
from tlcr.models.discriminator import Opinion
from tlcr.serving.limits import Refused
from tlcr.serving.model import ServedModel
from tlcr.serving.reading import Bad, Reader, Row
from tlcr.text.files import unicode_problem
from tlcr.text.template_variables import template_variables
from tlcr.text.tokenization import opening
from tlcr.text.turns import without_end

__all__ = ["ROUTES", "Route"]

Json = Mapping[str, Any]
Query = Mapping[str, str]
Form = Literal["rewards", "logits", "probabilities"]

SWITCHES = "chat_template_kwargs"
OF_ITEMS = ("prompt_ids", "response_ids", "prompt", "messages", "response", "ended", *TEMPLATE_COLUMNS)
"""What an item of our own route may have."""


class Route(Protocol):
    """How a route reads requests and writes answers.

    ``rows`` raises Refused: before its first row where there are too many, and at a row that cannot be read, with its
    place.
    """

    def rows(self, reader: Reader, body: Json, query: Query) -> Iterator[Row]:
        """The answers to score, in the request's order; at least one. Each is read when it is asked for."""
        ...

    def form(self, body: Json) -> Form:
        """What ``answer`` needs to know of the request beside its rows; the rest is let go while they wait."""
        ...

    def answer(self, model: ServedModel, form: Form, rows: Sequence[Row], opinions: Sequence[Opinion]) -> Any:
        """The response's JSON, for the rows and their opinions."""
        ...


class OneForm:
    """Of a route whose answers have one form."""

    def form(self, body: Json) -> Form:
        """The only one."""
        return "rewards"


# ---- ours


class TokenRewards(OneForm):
    """``{"items": [...]}`` to ``{"data": [{"rewards", "score", "tokens", "offsets"}], "model", "temperature"}``."""

    def rows(self, reader: Reader, body: Json, query: Query) -> Iterator[Row]:
        """One row for each item, which has ids, or a text with its prompt, or with messages and what they come with."""
        if unknown := sorted(body.keys() - {"items"}):
            raise Refused(400, f"the request has {unknown[0][:40]!r}, which is not read; wanted {{'items': [...]}}")
        for number, item in enumerate(_list(reader, body, "items")):
            yield _at(f"items[{number}]", _row, reader, item)

    def answer(self, model: ServedModel, form: Form, rows: Sequence[Row], opinions: Sequence[Opinion]) -> Any:
        """Rewards of every token of each answer."""
        data = [_scored(row, opinion) for row, opinion in zip(rows, opinions, strict=True)]
        return {"data": data, "model": model.name, "temperature": model.temperature}


def _row(reader: Reader, item: Any) -> Row:
    if not isinstance(item, dict):
        raise Bad(f"is a {type(item).__name__}; wanted an object")
    if unknown := sorted(item.keys() - set(OF_ITEMS)):
        raise Bad(f"has {unknown[0][:40]!r}, which is not read; an item may have {', '.join(OF_ITEMS)}")
    if "response_ids" in item or "prompt_ids" in item:
        columns = [name for name in TEMPLATE_COLUMNS if item.get(name)]
        for name in ("prompt", "messages", "response", *columns):
            if name in item:
                raise Bad(f"has both ids and {name!r}; send ids or text, so that it is clear what is scored")
        prompt_ids, response_ids = (_ids(item.get(name), name, reader) for name in ("prompt_ids", "response_ids"))
        if not response_ids:
            raise Bad("has an empty answer, 'response_ids': []; leave it out, there is no token to score")
        return reader.row_of_ids(prompt_ids, response_ids)
    if ("prompt" in item) == ("messages" in item):
        raise Bad("has no prompt, or two; wanted 'prompt_ids', 'prompt' or 'messages'")
    prompt = _messages(reader, item["messages"]) if "messages" in item else _text(item["prompt"], "prompt")
    ended = item.get("ended", True)
    if not isinstance(ended, bool):
        raise Bad(f"has 'ended': {ended!r}; wanted true, or false for an answer that was cut off")
    response, template = _text(item.get("response"), "response"), _template(reader, item)
    return _not_empty(reader.row_of_text(prompt, response, ended=ended, template=template))


def _template(reader: Reader, item: Json) -> dict[str, Any]:
    """What the chat template is given beside the messages; nothing that is empty, as for records of a file."""
    given = {name: item[name] for name in TEMPLATE_COLUMNS if item.get(name) is not None}
    for name, value in given.items():
        if value and "messages" not in item:
            raise Bad(f"has {name!r} beside 'prompt', and only a chat template reads them; send 'messages'")
        if problem := unicode_problem(value):
            raise Bad(f"has a text under {name!r} that {problem}")
        if name == SWITCHES:
            _require_switches(reader, value)
        elif not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            raise Bad(f"has {name!r} that are no list of objects")
    return {name: value for name, value in given.items() if value}


def _require_switches(reader: Reader, value: Any) -> None:
    """Refuses what the template does not read: a name that was misspelt, or what transformers would take for its own.

    Those are arguments of apply_chat_template, another template among them.
    """
    if not isinstance(value, dict):
        raise Bad(f"has {SWITCHES!r} that is a {type(value).__name__}; wanted an object")
    known = template_variables(reader.tokenizer)
    if unknown := sorted(value.keys() - known):
        named = f"which reads {', '.join(sorted(known))}" if known else "which reads none"
        raise Bad(f"has {unknown[0][:40]!r} in {SWITCHES!r}, which is no switch of the chat template, {named}")


def _scored(row: Row, opinion: Opinion) -> dict[str, Any]:
    rewards = opinion.rewards_T.tolist()
    offsets = {} if row.offsets is None else {"offsets": row.offsets}
    return {"rewards": rewards, "score": _mean(rewards), "tokens": len(rewards), **offsets}


def _mean(rewards: Sequence[float]) -> float:
    return sum(rewards) / len(rewards)


# ---- OpenRLHF


class OpenRLHF(OneForm):
    """``{"query": [text], "prompts": [text]}`` to ``{"rewards", "scores", "extra_logs"}``, a number for each answer.

    A query is a prompt with its answer, special tokens included. A list of numbers for an answer would be taken without
    a word, and rewards would go to the wrong samples; so the number is the mean token reward.
    """

    def rows(self, reader: Reader, body: Json, query: Query) -> Iterator[Row]:
        """One row for each query."""
        queries, prompts = _list(reader, body, "query"), _list(reader, body, "prompts")
        if len(queries) != len(prompts):
            raise Refused(400, f"'query' has {len(queries)} texts and 'prompts' {len(prompts)}; wanted as many")
        for number, pair in enumerate(zip(queries, prompts, strict=True)):
            yield _at(f"query[{number}]", _row_of_query, reader, *pair)

    def answer(self, model: ServedModel, form: Form, rows: Sequence[Row], opinions: Sequence[Opinion]) -> Any:
        """The mean token reward of each answer, and its share of tokens below 0 for the log."""
        rewards = [opinion.rewards_T.tolist() for opinion in opinions]
        means = list(map(_mean, rewards))
        negative = [sum(value < 0 for value in row) / len(row) for row in rewards]
        return {"rewards": means, "scores": means, "extra_logs": {"negative_share": negative}}


def _row_of_query(reader: Reader, query: Any, prompt: Any) -> Row:
    query, prompt = _text(query, "the query"), _text(prompt, "the prompt")
    place = query.find(prompt)
    if place < 0:
        raise Bad(
            "does not contain its prompt, so that the answer in it cannot be told from the prompt; send prompts as the "
            "policy read them (in OpenRLHF: as --data.apply_chat_template renders them)"
        )
    end = place + len(prompt)
    return _not_empty(reader.row_of_complete_text(query[:end], query[end:]))


# ---- slime


class Slime(OneForm):
    """``{"prompt", "response", "label"}`` to what becomes ``sample.reward``; ``--reward-key score`` picks the mean."""

    def rows(self, reader: Reader, body: Json, query: Query) -> Iterator[Row]:
        """The one answer of the request."""
        yield _at("the request", _row_of_sample, reader, body.get("prompt"), body.get("response"))

    def answer(self, model: ServedModel, form: Form, rows: Sequence[Row], opinions: Sequence[Opinion]) -> Any:
        """The entry of ``data`` that our own route gives."""
        return _scored(rows[0], opinions[0])


def _row_of_sample(reader: Reader, prompt: Any, response: Any) -> Row:
    response = _text(response, "response")
    if isinstance(prompt, list):
        ended = without_end(reader.tokenizer, response) != response  # slime sends the end that was sampled
        return _not_empty(reader.row_of_text(_messages(reader, prompt), response, ended=ended))
    return _not_empty(reader.row_of_complete_text(_text(prompt, "prompt"), response))


# ---- LLaMA-Factory


class LlamaFactory(OneForm):
    """``{"model", "messages": [text]}`` to ``{"scores": [number]}``, the mean token reward of the last answer.

    A text is a whole conversation. The answer begins after the last ``answer_after``, a part of the URL's query
    (``/score_texts?answer_after=Assistant:``), or after what the chat template writes before an answer.
    """

    def rows(self, reader: Reader, body: Json, query: Query) -> Iterator[Row]:
        """One row for each conversation."""
        texts = _list(reader, body, "messages")
        header = query.get("answer_after") or _header(reader)
        for number, text in enumerate(texts):
            yield _at(f"messages[{number}]", _row_of_conversation, reader, text, header)

    def answer(self, model: ServedModel, form: Form, rows: Sequence[Row], opinions: Sequence[Opinion]) -> Any:
        """The mean token reward of each answer."""
        return {"scores": [_mean(opinion.rewards_T.tolist()) for opinion in opinions]}


def _header(reader: Reader) -> str:
    """What the chat template writes between a user's message and the answer to it."""
    if reader.tokenizer.chat_template is not None:
        content = "\N{REPLACEMENT CHARACTER}"
        header = opening(reader.tokenizer, [{"role": "user", "content": content}]).prompt.rpartition(content)[2]
        # the end of the user's turn stands before it, on a line of its own
        found = header.rstrip().rpartition("\n")[2] + header[len(header.rstrip()) :]
        if found.strip():
            return found
    raise Refused(
        400,
        "a conversation came as one text, and nothing says where the answer in it begins; add to the URL what stands "
        "before every answer, as in /score_texts?answer_after=Assistant:",
    )


def _row_of_conversation(reader: Reader, text: Any, header: str) -> Row:
    text = _text(text, "the conversation")
    # from the end, as rpartition: that takes the product of both lengths for some texts and headers
    place = text[::-1].find(header[::-1])
    if place < 0:
        raise Bad(
            f"does not contain {header!r}, after which its answer would begin; add to the URL what stands before every "
            "answer, as in /score_texts?answer_after=Assistant:"
        )
    begins = len(text) - place
    return _not_empty(reader.row_of_complete_text(text[:begins], text[begins:]))


# ---- vLLM


class Pooling:
    """vLLM's ``/pooling`` of a token classifier: a list of numbers for every token, prompt and answer alike.

    ``"use_activation": false`` gives logits; true, vLLM's default, their softmax, which knows of no temperature.
    """

    def rows(self, reader: Reader, body: Json, query: Query) -> Iterator[Row]:
        """One row for each input, which is ids or text."""
        given = body.get("input")
        several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
        inputs = given if isinstance(given, list) and several else [given]
        reader.refuse_too_many(inputs)
        for number, one in enumerate(inputs):
            yield _at(f"input[{number}]" if several else "input", _input, reader, one)

    def form(self, body: Json) -> Form:
        """Logits where they are asked for, else their softmax."""
        return "logits" if body.get("use_activation") is False else "probabilities"

    def answer(self, model: ServedModel, form: Form, rows: Sequence[Row], opinions: Sequence[Opinion]) -> Any:
        """The numbers of every token, in vLLM's form."""
        logits = [opinion.logits_TC for opinion in opinions]
        numbers = logits if form == "logits" else [logits_TC.softmax(-1) for logits_TC in logits]
        data = [
            {"index": index, "object": "pooling", "data": numbers_TC.tolist()}
            for index, numbers_TC in enumerate(numbers)
        ]
        tokens = sum(row.tokens for row in rows)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}
        return {
            "id": f"pool-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": model.name,
            "data": data,
            "usage": usage,
        }


def _input(reader: Reader, given: Any) -> Row:
    if isinstance(given, str):
        row = reader.row_of_all(_text(given, "it"))
    else:
        row = reader.row_of_ids((), _ids(given, "it", reader))
    if not row.tokens:
        raise Bad("is empty; there is no token to score")
    return row


ROUTES: Mapping[str, Route] = {
    "/v1/token_rewards": TokenRewards(),
    "/get_reward": OpenRLHF(),
    "/remote_rm": Slime(),
    "/score_texts": LlamaFactory(),
    "/pooling": Pooling(),
}
"""Each answers POST."""


# ---- reading


def _at(place: str, read: Callable[..., Row], *arguments: Any) -> Row:
    """``read(*arguments)``, whose errors begin with the place in the request."""
    try:
        return read(*arguments)
    except TlcrError as error:
        raise Refused(400, f"{place} {error}" if isinstance(error, Bad) else f"{place}: {error}") from error


def _list(reader: Reader, body: Json, name: str) -> list[Any]:
    value = body.get(name)
    if not isinstance(value, list) or not value:
        found = "is missing" if value is None else "is empty" if value == [] else f"is a {type(value).__name__}"
        raise Refused(400, f"{name!r} {found}; wanted a list with one entry for each answer")
    reader.refuse_too_many(value)
    return value


def _ids(value: Any, name: str, reader: Reader) -> list[int]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:  # a bool is no id
        raise Bad(f"has no list of token ids under {name!r}; wanted whole numbers")
    if value and not (min(value) >= 0 and max(value) < reader.vocabulary):
        wrong = next(token for token in value if not 0 <= token < reader.vocabulary)
        raise Bad(
            f"has the id {wrong} in {name!r}, and the discriminator's vocabulary ends at {reader.vocabulary - 1}; "
            "ids of another tokenizer mean other tokens: send text, and project its rewards by their offsets"
        )
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Bad(f"has no text under {name!r}")
    if problem := unicode_problem(value):
        raise Bad(f"has a text under {name!r} that {problem}")
    return value


def _messages(reader: Reader, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise Bad("has no messages; wanted a list of {'role', 'content'}")
    if len(value) > reader.longest_row:  # rendering so many takes long; a template writes a token for each, or more
        raise Bad(
            f"has {len(value)} messages, and the discriminator reads at most {reader.longest_row} tokens; send fewer"
        )
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Bad("has a message without a 'role'; wanted {'role', 'content'}")
        _text(message.get("content"), "content")
        if problem := unicode_problem(message):
            raise Bad(f"has a text in 'messages[{number}]' that {problem}")
    return value


def _not_empty(row: Row) -> Row:
    if not row.encoded.answer_ids:
        raise Bad("has an empty answer; leave it out, there is no token to score")
    return row
