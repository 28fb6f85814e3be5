"""Common steps of reading a model's answers: remove thoughts, find JSON, detect refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["is_refusal", "objects_in", "with_opened_thoughts", "without_thoughts"]

_THINK, _THOUGHT = "<think>", "</think>"
"""Around the reasoning that some models write before their answer, if the server does not remove it."""
_REFUSAL = re.compile(
    r"(i'm |i am )?(very |so |really )?(sorry|afraid)\b|i (can't|cannot|can not|won't|will not|am unable|decline)\b",
    re.IGNORECASE,
)
_DECODER = json.JSONDecoder(strict=False)
"""Not strict: models write raw line breaks into JSON strings."""


def without_thoughts(text: str, *, marker: str | None = None, is_cut: bool = False) -> str:
    """The answer without the thoughts before it.

    Thoughts end with ``</think>``, and begin with ``<think>``, unless the chat template or the server has written that.
    Then a ``</think>`` may as well be one that the answer quotes. It is taken for a quotation inside of a JSON object,
    after ``marker`` and after a ``<think>``.

    Args:
        text: what the model wrote.
        marker: what thoughts without their beginning do not hold, because the answer proper follows it.
        is_cut: a limit cut the text. Then a ``<think>`` that nothing ends, outside of JSON objects, begins thoughts
            wherever it stands; in a complete text it is a quotation, unless the text begins with it.

    Returns:
        What follows the thoughts, without thoughts at a cut: nothing where they begin the text and never end.
    """
    answer = _after_thoughts(text, marker)
    if not is_cut:
        return answer
    quoted = [(start, stop) for start, stop, _ in _objects(answer)]
    begun = (found.start() for found in re.finditer(_THINK, answer) if found.start() > answer.rfind(_THOUGHT))
    return answer[: next((at for at in begun if not any(start < at < stop for start, stop in quoted)), None)]


def with_opened_thoughts(prompt: str, text: str) -> str:
    """An answer that was cut, with the ``<think>`` that its prompt ends with unless the answer ends those thoughts.

    Args:
        prompt: the text that the model was asked with.
        text: what it wrote until the limit.

    Returns:
        The text, from which ``without_thoughts`` can tell that all of it is thoughts.
    """
    return _THINK + text if prompt.rstrip().endswith(_THINK) and _THOUGHT not in text else text


def _after_thoughts(text: str, marker: str | None) -> str:
    before, end, after = text.partition(_THOUGHT)
    if text.lstrip().startswith(_THINK):
        return after
    is_quoted = _THINK in before or (marker is not None and marker in before)
    if not end or is_quoted or any(start < len(before) < stop for start, stop, _ in _objects(text)):
        return text
    return after


def objects_in(text: str) -> Iterator[Mapping[str, Any]]:
    """Every complete JSON object in the text, with any text around it (a code fence, say); no nested objects."""
    for _, _, value in _objects(text):
        yield value


def _objects(text: str) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    """Where each object begins and ends, and the object."""
    start = text.find("{")
    while start >= 0:
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):  # RecursionError: a model repeated an opening brace without end
            end = start + 1
        else:
            if isinstance(value, dict):
                yield start, end, value
        start = text.find("{", end)


def is_refusal(text: str) -> bool:
    """Whether an answer without the requested content begins like a refusal."""
    opening = without_thoughts(text).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").lstrip("\"'*#> \n")
    return _REFUSAL.match(opening) is not None
