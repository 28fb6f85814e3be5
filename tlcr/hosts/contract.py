"""What goes into every trainer: token ids in, exactly as many rewards out, 0 where a token does not count.

The reward of token t is p(positive) - p(negative) of the discriminator's logits at the token itself, at its calibrated
temperature. Index t is the response token t, an end of sequence that was sampled among them. A list is as long as the
ids of its answer, whatever ended it; a mask never shortens it. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Protocol

from tlcr.errors import HostError

__all__ = ["Account", "Item", "Scorer", "checked", "project"]

Span = tuple[int, int]
"""The characters [start, end) of an answer."""


@dataclass(frozen=True)
class Item:
    """One answer to score, as the policy sampled it.

    Raises HostError where the mask is not as long as the answer, and where an id is no integer of 0 or more.

    Attributes:
        prompt_ids: everything that the policy read before its first token.
        response_ids: what it sampled, and between that what tools said; the end of sequence is in it if it was sampled.
        mask: 1 where a token counts, 0 where it does not (tools, padding); None: all count.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    mask: Sequence[bool | int] | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and len(self.mask) != len(self.response_ids):
            raise HostError(
                f"an answer has {len(self.response_ids)} tokens and its mask {len(self.mask)}; give one 0 or 1 for "
                "every id of the answer"
            )
        for name, ids in (("prompt_ids", self.prompt_ids), ("response_ids", self.response_ids)):
            for position, token in enumerate(ids):
                if not _is_id(token):
                    raise HostError(
                        f"{name}[{position}] is {token!r}; wanted the ids of tokens, integers from 0 on, without the "
                        "fill of padding"
                    )

    @property
    def counted(self) -> list[bool]:
        """True where a token of the answer counts."""
        return [True] * len(self.response_ids) if self.mask is None else [bool(counts) for counts in self.mask]


def _is_id(token: object) -> bool:
    try:
        return not isinstance(token, (bool, str)) and token.__index__() >= 0  # type: ignore[attr-defined]
    except AttributeError:
        return False


class Scorer(Protocol):
    """Whatever gives rewards for tokens: a discriminator on this machine, or a server that holds one."""

    def token_rewards(self, items: Sequence[Item]) -> list[list[float]]:
        """One list for each item, in their order, with one reward for each of its ``response_ids``; see ``checked``."""
        ...


def checked(rewards: Sequence[Sequence[float]], items: Sequence[Item]) -> list[list[float]]:
    """The rewards of some answers, after a look at every number; a trainer gets nothing else.

    Args:
        rewards: one list for each item, one number for each token of its answer. What stands where the mask is 0, NaN
            included, is not looked at.
        items: what was scored.

    Returns:
        The same as floats, exactly 0 where a token does not count.

    Raises:
        HostError: there are more or fewer lists than items, a list is none or not as long as its answer, or a reward
            that counts is not a finite number in [-1, 1].
    """
    if len(rewards) != len(items):
        raise HostError(
            f"{len(items)} answers were scored and {len(rewards)} lists of rewards came back; a scorer returns one "
            "list for each answer, in their order"
        )
    return [_checked_answer(number, row, item) for number, (row, item) in enumerate(zip(rewards, items, strict=True))]


def _checked_answer(number: int, row: Sequence[float], item: Item) -> list[float]:
    if not isinstance(row, Sized) or isinstance(row, (str, bytes, Mapping)):
        raise HostError(
            f"the rewards of answer {number} are a {type(row).__name__}; a scorer returns a list of numbers for each "
            "answer"
        )
    if len(row) != len(item.response_ids):
        raise HostError(
            f"answer {number} has {len(item.response_ids)} tokens and {len(row)} rewards; score the ids that the "
            "policy sampled, not text that is tokenised again"
        )
    result = []
    for position, (reward, counts) in enumerate(zip(row, item.counted, strict=True)):
        try:
            value = float(reward) if counts else 0.0
        except (TypeError, ValueError, OverflowError) as error:
            raise HostError(
                f"the reward of token {position} of answer {number} is a {type(reward).__name__}; wanted a number"
            ) from error
        if not -1 <= value <= 1:  # NaN fails too
            raise HostError(
                f"the reward of token {position} of answer {number} is {value}; wanted a finite number in [-1, 1]. NaN "
                "and infinity come from a discriminator whose weights are broken, larger numbers from one that is none "
                "(raw logits, or a reward model)"
            )
        result.append(value)
    return result


@dataclass
class Account:
    """What a batch of answers was paid, under the names of PPO's metrics.

    Attributes:
        answers: the number of answers, those without a counted token included.
        tokens: the counted tokens.
        masked_paid: tokens that do not count and have a reward; anything but 0 is an error of the adaptor.
    """

    answers: int = 0
    tokens: int = 0
    masked_paid: int = 0
    _nonzero: int = field(default=0, repr=False)
    _sum: float = field(default=0.0, repr=False)
    _sum_abs: float = field(default=0.0, repr=False)
    _sum_of_means: float = field(default=0.0, repr=False)

    def add(self, rewards: Sequence[Sequence[float]], masks: Sequence[Sequence[bool | int]]) -> Account:
        """Counts answers in.

        Args:
            rewards: a list for each answer, as they reach the trainer.
            masks: of the same shape, 1 where a token counts.

        Returns:
            The account itself.
        """
        for row, mask in zip(rewards, masks, strict=True):
            counted = [value for value, counts in zip(row, mask, strict=True) if counts]
            self.answers += 1
            self.tokens += len(counted)
            self.masked_paid += sum(value != 0 for value, counts in zip(row, mask, strict=True) if not counts)
            self._nonzero += sum(value != 0 for value in counted)
            self._sum += math.fsum(counted)
            self._sum_abs += math.fsum(map(abs, counted))
            self._sum_of_means += math.fsum(counted) / max(len(counted), 1)
        return self

    def figures(self) -> dict[str, float]:
        """The figures so far, as ``docs/metrics.md`` defines them; all 0 where nothing was counted."""
        tokens, answers = max(self.tokens, 1), max(self.answers, 1)
        return {
            "reward/mean_token": self._sum / tokens,
            "reward/mean_abs_token": self._sum_abs / tokens,
            "reward/nonzero_share": self._nonzero / tokens,
            "reward/mean_return": self._sum / answers,
            "reward/mean_answer": self._sum_of_means / answers,
            "reward/masked_paid": float(self.masked_paid),
            "length/mean": self.tokens / answers,
        }


def project(rewards: Sequence[float], offsets: Sequence[Span], other_offsets: Sequence[Span]) -> list[float]:
    """Rewards of the discriminator's tokens, for the tokens of another tokenizer that wrote the same text::

        r'_t = sum_j w_tj r_j / sum_j w_tj,      w_tj = |[s_t, e_t) and [s_j, e_j)| in characters

    A token without characters takes the reward of a token of the discriminator that has none either and stands at the
    same place, which is how one end of sequence is paid as the other; it gets 0 where there is none, and so does a
    token whose characters no token of the discriminator wrote. A token of the discriminator may be longer than one of
    the other tokenizer: a reward may depend on up to one such token of the future. Source: ours, as
    ``DiscriminatorSource`` has it.

    Args:
        rewards: one for each token of the discriminator.
        offsets: the characters [start, end) of the answer that each of these tokens wrote, in their order.
        other_offsets: the same for the tokens that are to be paid.

    Returns:
        One reward for each of ``other_offsets``.

    Raises:
        HostError: a reward or a span is missing, spans go backwards, or the two do not end at the same character, as
            where one counts from the prompt's beginning and the other from the answer's.
    """
    if len(rewards) != len(offsets):
        raise HostError(f"{len(rewards)} rewards came with {len(offsets)} character spans; wanted one span a reward")
    for name, spans in (("offsets", offsets), ("other_offsets", other_offsets)):
        last = (0, 0)
        for span in spans:
            if span[1] < span[0] or span[0] < last[0] or span[1] < last[1]:
                raise HostError(f"{name} has {tuple(span)} after {last}; wanted [start, end) in the order of the text")
            last = (span[0], span[1])
    ends = [max((end for _, end in spans), default=0) for spans in (offsets, other_offsets)]
    if ends[0] != ends[1]:
        raise HostError(
            f"the discriminator's tokens end at character {ends[0]} and the policy's at {ends[1]}; both must count "
            "from the first character of the same answer"
        )
    return _projected(rewards, offsets, other_offsets)


def _projected(rewards: Sequence[float], offsets: Sequence[Span], other_offsets: Sequence[Span]) -> list[float]:
    result, first = [], 0
    for start, end in other_offsets:
        while first < len(offsets) and offsets[first][1] < start:
            first += 1  # it wrote nothing from here on
        total, weight, j = 0.0, 0, first
        while j < len(offsets) and offsets[j][0] <= end:
            alike = start == end == offsets[j][0] == offsets[j][1]
            shared = 1 if alike else max(min(end, offsets[j][1]) - max(start, offsets[j][0]), 0)
            total, weight, j = total + shared * rewards[j], weight + shared, j + 1
        result.append(total / weight if weight else 0.0)
    return result
