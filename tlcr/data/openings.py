"""Makes edit records from a text and its edit: the prompt is their common beginning.

Corpora of edits often have no prompt: a person rewrote a whole review or comment. The first words that both texts share
serve as the prompt, and the policy continues them.
"""

from __future__ import annotations

import re


def shared_opening(first: str, second: str, *, at_most: int, at_least: int) -> str | None:
    """The first whole words that two texts share.

    Both texts continue after it with the same white space, so that both answers have the same prompt text.

    Args:
        first: one text.
        second: the other.
        at_most: maximum number of words in the opening.
        at_least: minimum number of words in the opening.

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
        at_most: maximum number of words in the opening.
        at_least: minimum number of words in the opening.

    Returns:
        The record, whose ``chosen`` is the revision too; None where the opening is too short or nothing was edited.
    """
    prompt = shared_opening(rejected, revised, at_most=at_most, at_least=at_least)
    if prompt is None or rejected == revised:
        return None
    answer = revised[len(prompt) :]
    return {"id": id, "prompt": prompt, "rejected": rejected[len(prompt) :], "revised": answer, "chosen": answer}
