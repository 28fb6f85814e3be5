"""Common steps of reading a model's answers: remove thoughts, find JSON, detect refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["is_refusal", "objects_in", "without_thoughts"]

_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
"""The reasoning that some models write before their answer, if the server does not remove it."""
_REFUSAL = re.compile(
    r"(i'm |i am )?(very |so |really )?(sorry|afraid)\b|i (can't|cannot|can not|won't|will not|am unable|decline)\b",
    re.IGNORECASE,
)
_DECODER = json.JSONDecoder(strict=False)
"""Not strict: models write raw line breaks into JSON strings."""


def without_thoughts(text: str) -> str:
    """The answer without a ``<think>`` ... ``</think>`` part at its beginning."""
    return _THOUGHTS.sub("", text)


def objects_in(text: str) -> Iterator[Mapping[str, Any]]:
    """Every complete JSON object in the text, with any text around it (a code fence, say); no nested objects."""
    start = text.find("{")
    while start >= 0:
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):  # RecursionError: a model repeated an opening brace without end
            end = start + 1
        else:
            if isinstance(value, dict):
                yield value
        start = text.find("{", end)


def is_refusal(text: str) -> bool:
    """Whether an answer without the requested content begins like a refusal."""
    opening = without_thoughts(text).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").lstrip("\"'*#> \n")
    return _REFUSAL.match(opening) is not None
