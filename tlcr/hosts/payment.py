"""Small parts that adaptors share: who is compared with whom, and a mean in the place of a sum."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

__all__ = ["mean_at_end", "numbered", "summing"]


def numbered(prompts: Iterable[Hashable]) -> list[int]:
    """Groups as ``group_reward_to_go`` takes them, from what a trainer calls its prompts.

    Args:
        prompts: for each answer the name of its prompt.

    Returns:
        For each answer a number, equal where the names are, counted from 0 in the order of their first answers.
    """
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]


def mean_at_end(rewards: Sequence[float], mask: Sequence[bool | int]) -> list[float]:
    """The mean of an answer's rewards at its last counted token, 0 elsewhere.

    For estimators that add an answer's rewards up and give all its tokens one number: the sum of n rewards pays an
    answer for its length, their mean does not.

    Args:
        rewards: one for each token.
        mask: 1 where a token counts.

    Returns:
        One for each token; all 0 where none counts.
    """
    counted = [position for position, counts in enumerate(mask) if counts]
    paid = [0.0] * len(rewards)
    if counted:
        paid[counted[-1]] = sum(rewards[position] for position in counted) / len(counted)
    return paid


def summing(host: str, estimator: str, remedy: str) -> str:
    """The warning for an estimator that makes one number of an answer's rewards.

    Args:
        host: the trainer.
        estimator: its name there.
        remedy: which estimators keep them, and how to pay the mean.

    Returns:
        A sentence.
    """
    return (
        f"{host}'s estimator {estimator!r} adds the rewards of an answer's tokens up and gives all of them that one "
        f"number, which pays for length; {remedy}"
    )
