"""The values that flow between the stages, in the order in which they arise.

Axes (a suffix of every tensor's name): B batch, P prompt, T response, L = P + T, V vocabulary, C classes.
Index t of every (B, T) value belongs to the action that emitted response token t; the end-of-sequence token is an
action like any other. Every mask is True where a position counts, and comes from lengths, never from ids.

A prompt's text is complete: the chat template is applied and the beginning-of-sequence token is in it where the model
wants one. Everything is tokenised with ``add_special_tokens=False``, so that no token can be added twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class PreferencePair:
    """One comparison: of two answers to a prompt, the one that people preferred and the one they did not."""

    id: str
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class EditPair:
    """A rejected answer and its minimal revision, the raw material of token labels (paper, section 3.1)."""

    id: str
    prompt: str
    rejected: str
    revised: str
    chosen: str | None = None


@dataclass(frozen=True)
class ErrorSpan:
    """The characters [start, end) of an answer, which a person marked as an error of the kind `label`."""

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class MarkedAnswer:
    """An answer and the errors that a person marked in it, to hold token rewards against."""

    id: str
    prompt: str
    response: str
    spans: tuple[ErrorSpan, ...]


@dataclass(frozen=True)
class EncodedAnswer:
    """Prompt and answer tokenised together; ``ids[answer_start:]`` is the answer.

    ``complete`` says that the answer ends with the end-of-sequence token; False means it was cut at the limit.
    ``prompt_cut`` and ``answer_cut`` are the numbers of tokens that limits cut, from the prompt's beginning and the
    answer's end.
    """

    ids: tuple[int, ...]
    answer_start: int
    complete: bool
    prompt_cut: int = 0
    answer_cut: int = 0

    @property
    def answer_ids(self) -> tuple[int, ...]:
        return self.ids[self.answer_start :]


@dataclass(frozen=True)
class EncodedComparison:
    """A preference pair, tokenised."""

    chosen: EncodedAnswer
    rejected: EncodedAnswer

    @property
    def length(self) -> int:
        return max(len(self.chosen.ids), len(self.rejected.ids))


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer with one label (a ``TokenLabel`` value) and one ``counted`` flag per answer token."""

    side: Literal["rejected", "revised"]
    encoded: EncodedAnswer
    labels: tuple[int, ...]
    counted: tuple[bool, ...]


@dataclass(frozen=True)
class LabelledPair:
    """Both sides of one edit, labelled; the discriminator weighs the two sides alike."""

    id: str
    rejected: LabelledAnswer
    revised: LabelledAnswer


@dataclass(frozen=True)
class Rollout:
    """Sampled answers: prompts padded on the left, responses on the right, so that every response starts in column P.

    ``ended_B`` is True where the policy chose to stop (its last counted token is the end of sequence) and False where
    the length limit cut it off. ``engine_logprobs_BT`` are the log-probabilities that the tokens were drawn with,
    (B, T) float32, nats, in a distribution that is not the trainer's; None where it is.

    In a conversation a row is answer, message, answer, and so on; it ends with an answer. ``mask_BT`` is True at the
    tokens of answers, which are actions, and ``messages_BT`` at those of messages, which an environment wrote: models
    read them, and they earn nothing and are not trained on. None where there are no messages.
    """

    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    prompt_ids_BP: Tensor
    prompt_mask_BP: Tensor
    response_ids_BT: Tensor
    mask_BT: Tensor
    ended_B: Tensor
    engine_logprobs_BT: Tensor | None = None
    messages_BT: Tensor | None = None

    @property
    def read_BT(self) -> Tensor:
        """(B, T) bool: the tokens that models read, of answers and messages."""
        return self.mask_BT if self.messages_BT is None else self.mask_BT | self.messages_BT

    @property
    def ids_BL(self) -> Tensor:
        return torch.cat([self.prompt_ids_BP, self.response_ids_BT], dim=1)

    @property
    def attention_mask_BL(self) -> Tensor:
        return torch.cat([self.prompt_mask_BP, self.read_BT], dim=1)


@dataclass(frozen=True)
class PolicyScores:
    """What the policy, the reference and the value model say of a rollout, before any update on it.

    ``kl_BT`` is the exact KL(policy || reference) over the vocabulary, present only where it was asked for.
    """

    logprobs_BT: Tensor
    ref_logprobs_BT: Tensor
    values_BT: Tensor
    entropy_BT: Tensor
    kl_BT: Tensor | None = None


@dataclass(frozen=True)
class RewardSignal:
    """What one reward source says of a rollout. At least one field is set; those that are set are added up.

    logits_BTC: a discriminator's logits at each response token, [negative, positive] or [negative, neutral, positive].
    dense_BT: a reward for each response token. terminal_B: a score for the whole answer, paid at its last token.
    sequence_B: a second such score, the sequence reward model's, weighted by ``reward.sequence_coef`` of its own.
    spans_BT: beside logits, the number of the span that each response token belongs to, from 0 to T - 1.
    """

    logits_BTC: Tensor | None = None
    dense_BT: Tensor | None = None
    terminal_B: Tensor | None = None
    sequence_B: Tensor | None = None
    spans_BT: Tensor | None = None


@dataclass(frozen=True)
class Rewards:
    """The reward of every action, and where it came from.

    ``parts`` holds each term's contribution, (B, T), summing to ``rewards_BT``: dense, terminal, kl, length.
    """

    rewards_BT: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Advantages:
    """Generalised advantage estimates and the returns that the value model regresses to."""

    advantages_BT: Tensor
    returns_BT: Tensor
