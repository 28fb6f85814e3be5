"""Repairs records that other programs damaged, before a format reads them.

It handles conversations stored as strings, Windows line ends, answers that repeat their prompt, and columns that
nothing reads. Each kind is counted and reported once, with an example, so that no change is silent. Source: ours.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tlcr.data.sources import Row

__all__ = ["columns_left_out", "repaired", "shown"]

INPUTS = (
    *("image", "images", "video", "videos", "audio", "audios", "media"),
    *("context", "instruction", "input", "messages", "conversation", "conversations"),
)
"""Names under which data sets hold what a model reads beside the prompt, or in its place."""

SHOWN = 40
"""Characters of an example."""


def repaired(rows: Sequence[Row], answers: Collection[str]) -> tuple[list[Row], tuple[str, ...]]:
    """The repaired rows, and a note for each kind of repair.

    Args:
        rows: the rows as read; rows with a problem are not changed.
        answers: the columns that may hold answers.

    Returns:
        The rows, in their order, and the notes.
    """
    notes = []
    for what, repair in (
        ("hold a conversation as a string, which is read as its messages", _unpacked),
        (r"have Windows line ends (\r\n), which are read as \n", _with_plain_line_ends),
    ):
        changed = [row if row.problem else replace(row, values=_each(row.values, repair)) for row in rows]
        notes += _note(rows, changed, what)
        rows = changed
    bare = [row if row.problem else replace(row, values=_without_prompt(row.values, answers)) for row in rows]
    # A short prompt may begin an answer by chance, so prompts are removed only if all records repeat them.
    if all(new.values != old.values for old, new in zip(rows, bare, strict=True) if not old.problem):
        notes += _note(rows, bare, "repeat the prompt at the beginning of their answers, where it is taken off")
        rows = bare
    return list(rows), tuple(notes)


def columns_left_out(rows: Sequence[Row], read: Collection[str], known: Collection[str] = ()) -> tuple[str, ...]:
    """A note on columns that a model may need and that no format reads.

    Args:
        rows: the records.
        read: the columns that their format reads.
        known: further columns that a model may need: those that other formats read.

    Returns:
        One note that names the columns of `INPUTS` and of `known`, and those that hold conversations, images, sounds
        or videos; none without such columns. Other columns (sources, margins, ratings) are left out without a note.
    """
    found: dict[str, Any] = {}
    for row in rows:
        for name, value in row.values.items():
            if name in read or name in found or not value:
                continue
            if name in INPUTS or name in known or _is_media(value) or _is_conversation(value):
                found[name] = value
    if not found:
        return ()
    name, value = next(iter(found.items()))
    return (f"columns that are not read: {', '.join(found)} (the first holds {shown(value)})",)


def _is_media(value: Any) -> bool:
    """Whether a value is an image, a sound or a video as `datasets` stores it, or a list of these."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and bool(first) and set(first) <= {"bytes", "path"}


def _is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, whatever their fields are called."""
    first = value[0] if isinstance(value, list) and value else None
    return (
        isinstance(first, dict) and bool({"role", "from"} & first.keys()) and bool({"content", "value"} & first.keys())
    )


def _each(values: Mapping[str, Any], repair: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: repair(value) for name, value in values.items()}


def _note(before: Sequence[Row], after: Sequence[Row], what: str) -> list[str]:
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if old.values != new.values]
    if not pairs:
        return []
    old, new = pairs[0]
    name = next(name for name in old.values if old.values[name] != new.values[name])
    example = f"{name} of record {old.number} is {shown(old.values[name])}"
    return [f"{len(pairs)} of {len(before)} records {what} ({example})"]


def shown(value: object) -> str:
    """A value for a note, cut to `SHOWN` characters."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _unpacked(value: Any) -> Any:
    """The messages in a text that is JSON or a Python literal; any other value is unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith("[") or "role" not in value:
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(value.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # TypeError: a list as a key
            continue
        if isinstance(found, list) and found and all(isinstance(m, dict) and "role" in m for m in found):
            return found
    return value


def _with_plain_line_ends(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\r\n", "\n")
    if isinstance(value, list):
        return [_with_plain_line_ends(item) for item in value]
    if isinstance(value, dict):
        return _each(value, _with_plain_line_ends)
    return value


def _without_prompt(values: Mapping[str, Any], answers: Collection[str]) -> Mapping[str, Any]:
    """The values with the prompt removed from the answers; unchanged unless all answers begin with it."""
    prompt = values.get("prompt")
    found = {name: values[name] for name in answers if values.get(name) is not None}
    if not isinstance(prompt, str) or not prompt.strip() or not found:
        return values
    for text in found.values():
        if not isinstance(text, str) or not text.lstrip().startswith(prompt.strip()) or text.strip() == prompt.strip():
            return values
    # the whole prompt where they have it whole: what it ends with would stand twice else
    if all(text.startswith(prompt) for text in found.values()):
        return {**values, **{name: text[len(prompt) :] for name, text in found.items()}}
    return {**values, **{name: text.lstrip()[len(prompt.strip()) :] for name, text in found.items()}}
