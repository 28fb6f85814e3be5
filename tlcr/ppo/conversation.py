"""Conversations: an environment turns an answer into the next message, which the policy answers too, and so on.

    prompt   answer 1   message 1   answer 2   ...   answer n
             actions    read only   actions          actions

A message is text that no action emitted: what a tool gave back, what a user said next, the score of a game. Its tokens
stand in the row, and every model reads them; they earn nothing, and nothing is trained on them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from tlcr.config.functions import ENVIRONMENT_KEYWORDS, failure
from tlcr.config.schema import RolloutConfig
from tlcr.errors import DataError
from tlcr.text.tokenization import decode_text

__all__ = ["Conversation", "Environment", "Turn", "converse"]

logger = logging.getLogger(__name__)


class Environment(Protocol):
    """What answers the policy. A function with these keywords is one."""

    def __call__(self, *, prompts: list[str], turns: list[list[str]]) -> Sequence[str | None]:
        """The next message of each conversation that can go on: whose newest answer ended by the policy's own choice.

        It is called once for each round of answers. For repeatable runs it depends on its arguments alone.

        Args:
            prompts: complete texts, one for each conversation.
            turns: answer, message, answer and so on, up to the newest answer, without special tokens.

        Returns:
            For each, the complete text between the end of that answer and the next one, with what the chat template
            puts there, such as the end of a turn and the header of the next; None where the conversation is over.
        """
        ...


class Turn(NamedTuple):
    """An answer, cut after its end of sequence."""

    ids: list[int]
    ended: bool
    logprobs: list[float]
    """Of each id, nats; empty where none were asked for."""


@dataclass
class Conversation:
    """What stands behind a prompt: token ids, which of them are actions, and the log-probabilities of those."""

    ids: list[int] = field(default_factory=list)
    acted: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    ended: bool = False

    def add_answer(self, turn: Turn, text: str) -> None:
        self._add(turn.ids, text, acted=True)
        self.logprobs += turn.logprobs
        self.ended = turn.ended

    def add_message(self, ids: Sequence[int], text: str) -> None:
        self._add(ids, text, acted=False)

    def _add(self, ids: Sequence[int], text: str, *, acted: bool) -> None:
        self.ids += ids
        self.acted += [acted] * len(ids)
        self.texts.append(text)


def converse(
    prompts: Sequence[str],
    prompt_ids: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    cfg: RolloutConfig,
    *,
    sample: Callable[[Sequence[Sequence[int]]], list[Turn]],
    environment: Environment | None,
) -> list[Conversation]:
    """Answers every prompt, and every message of the environment.

    A conversation ends with an answer: where the environment says so, after ``cfg.max_turns`` answers, where an answer
    was cut at the length limit, or where the next message is longer than ``cfg.max_message_tokens``.

    Args:
        prompts: complete texts.
        prompt_ids: the ids that the policy is given of each.
        tokenizer: the policy's.
        cfg: the limits.
        sample: one answer for each row of ids.
        environment: writes the messages; None: there are none.

    Returns:
        One conversation for each prompt.

    Raises:
        DataError: the environment raises, or returns something else than a text or None for each conversation.
    """
    conversations = [Conversation() for _ in prompts]
    rows = list(range(len(prompts)))
    for number in range(1, cfg.max_turns + 1):
        contexts = [[*prompt_ids[row], *conversations[row].ids] for row in rows]
        for row, context, turn in zip(rows, contexts, sample(contexts), strict=True):
            conversations[row].add_answer(turn, decode_text(tokenizer, turn.ids, context=context))
        rows = [row for row in rows if conversations[row].ended]
        if environment is None or number == cfg.max_turns or not rows:
            break
        messages = _ask(environment, [prompts[row] for row in rows], [conversations[row].texts for row in rows])
        going_on = []
        for row, message in zip(rows, messages, strict=True):
            if message is not None and (ids := _read(message, tokenizer, cfg)):
                conversations[row].add_message(ids, message)
                going_on.append(row)
        rows = going_on
        if not rows:
            break
    return conversations


def _ask(environment: Environment, prompts: list[str], turns: list[list[str]]) -> list[str | None]:
    try:
        # it may write into what it is given
        given = environment(prompts=list(prompts), turns=[list(texts) for texts in turns])
    except (Exception, SystemExit) as error:  # sys.exit() of a function would end the run with its code, 0 say
        raise DataError(
            f"the environment raised {failure(error)}; it is called with the keywords {', '.join(ENVIRONMENT_KEYWORDS)}"
        ) from error
    wanted = "it must return a list with a text, or None, for each conversation"
    if not isinstance(given, (list, tuple)) or len(given) != len(prompts):
        count = f" of {len(given)}" if isinstance(given, (list, tuple)) else ""
        raise DataError(
            f"the environment returned a {type(given).__name__}{count} for {len(prompts)} conversations; {wanted}"
        )
    for message in given:
        if message is not None and (not isinstance(message, str) or not message):
            raise DataError(f"the environment returned {message!r} as a message; {wanted}")
    return list(given)


def _read(message: str, tokenizer: PreTrainedTokenizerBase, cfg: RolloutConfig) -> list[int]:
    """The ids of a message; none where it is too long."""
    ids: list[int] = tokenizer(message, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise DataError(f"the environment's message {message!r} has no token; return None to end a conversation")
    if len(ids) <= cfg.max_message_tokens:
        return ids
    _say_too_long(cfg.max_message_tokens)
    return []


@cache
def _say_too_long(limit: int) -> None:
    """Once."""
    logger.warning(
        "the environment wrote a message of more tokens than rollout.max_message_tokens = %d: such conversations end "
        "before it",
        limit,
    )
