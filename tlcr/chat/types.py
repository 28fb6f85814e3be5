"""Questions to a chat model, and its answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

__all__ = ["Answer", "ChatModel", "Deliver", "Message", "NoAnswer", "Question"]

BYTES_PER_TOKEN = 4
"""The usual rule of thumb for English, for estimates only; no bound uses it."""
MESSAGE_TOKENS = 16
"""More than any chat template that we know of writes around a message."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Question:
    """One request to a language model: everything that its answer depends on, except the model."""

    messages: tuple[Message, ...]
    max_new_tokens: int
    temperature: float | None
    """None: the server's default, because some models refuse the setting."""
    top_p: float = 1.0
    """Nucleus sampling: the share of probability that is kept; 1 keeps all tokens."""
    schema: Mapping[str, Any] | None = field(default=None, hash=False)
    """The JSON schema of the answer, for servers that can enforce one; its "title" names it."""
    choices: tuple[str, ...] = ()
    """The allowed answers, which a local model cannot leave. Empty: any text."""
    template: str = ""
    """Name and version of the template that made the messages."""
    attempt: int = 0
    """Number of earlier attempts: each attempt counts as a separate question."""

    def key(self, identity: Mapping[str, Any]) -> str:
        """SHA-256 of everything that the answer depends on: this question, and the ``identity`` of the model."""
        content = json.dumps({"question": asdict(self), "model": dict(identity)}, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def prompt_tokens_estimate(self) -> int:
        """About as many tokens as the messages have, without knowing the tokenizer."""
        return -(-self._bytes // BYTES_PER_TOKEN)

    @property
    def prompt_tokens_bound(self) -> int:
        """An upper bound on the billed tokens: in common tokenizers every token has at least one byte. Servers may
        count the schema as part of the prompt."""
        schema = len(json.dumps(self.schema)) if self.schema is not None else 0
        return self._bytes + schema + MESSAGE_TOKENS * len(self.messages)

    @property
    def _bytes(self) -> int:
        return sum(len(message.content.encode()) for message in self.messages)


@dataclass(frozen=True)
class Answer:
    """A model's answer.

    finish: "stop" where it is complete, "length" where ``max_new_tokens`` cut it off, "refusal" where the server
    reports that the model, or a filter, refused. Token counts are None where the server reports none.
    """

    text: str
    finish: Literal["stop", "length", "refusal"] = "stop"
    prompt_tokens: int | None = None
    answer_tokens: int | None = None


@dataclass(frozen=True)
class NoAnswer:
    """The reason for a missing answer. ``final``: the request itself is refused, so that a retry is useless."""

    reason: str
    final: bool


Deliver = Callable[[int, Answer | NoAnswer], None]


class ChatModel(Protocol):
    """The common interface of language models at an endpoint and on this machine."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """The properties and settings of the model that decide an answer, for ``Question.key``."""
        ...

    @property
    def spent(self) -> float | None:
        """Money that requests have cost so far; None where nothing is paid or no price is known."""
        ...

    def answer_all(self, questions: Sequence[Question], deliver: Deliver) -> None:
        """Ask every question and call ``deliver(index, answer)`` for each, in any order, on the calling thread.

        An answer is in the store before it is delivered. When the run is told to stop, raises KeyboardInterrupt after
        it has delivered the requests under way.
        """
        ...
