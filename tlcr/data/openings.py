"""Edit records out of two texts of which one is an edit of the other: the prompt is how both begin.

Corpora of edits often have no prompt: a person rewrote a whole review or comment. Their first words in common serve as
one, and the policy continues them.
"""

from __future__ import annotations

import re


def shared_opening(first: str, second: str, *, at_most: int, at_least: int) -> str | None:
    """The first whole words that two texts share.

    Both texts go on after it, and with the same white space, so that the prompt is the same text before either answer.

    Args:
        first: one text.
        second: the other.
        at_most: words of the opening at most.
        at_least: words of the opening at least.

    Returns:
        The opening; None where it would be shorter than ``at_least`` words.
    """
    opening = None
    for number, word in enumerate(re.finditer(r"\S+", first), start=1):
        following = first[word.end() : word.end() + 1]
        if number > at_most or not following.isspace() or not second.startswith(first[: word.end() + 1]):
            break
        opening = first[: word.end()] if number >= at_least else None
    return opening


def edit_record(id: str, rejected: str, revised: str, *, at_most: int, at_least: int) -> dict[str, str] | None:
    """A record of the formats `edits` and `preference` (docs/data.md), whose answers follow the ``shared_opening``.

    Args:
        id: the record's name.
        rejected: the whole text before the edit.
        revised: the whole text after it.
        at_most: words of the opening at most.
        at_least: words of the opening at least.

    Returns:
        The record, whose ``chosen`` is the revision too; None where the opening is too short or nothing was edited.
    """
    prompt = shared_opening(rejected, revised, at_most=at_most, at_least=at_least)
    if prompt is None or rejected == revised:
        return None
    answer = revised[len(prompt) :]
    return {"id": id, "prompt": prompt, "rejected": rejected[len(prompt) :], "revised": answer, "chosen": answer}
