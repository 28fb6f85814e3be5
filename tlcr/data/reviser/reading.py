"""From what a reviser said to a revision: as JSON, or behind the marker line of the published data."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tlcr.data.formats import REVISION_MARKER

__all__ = ["Revision", "is_refusal", "read_revision"]

_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
"""What reasoning models write before their answer, where the server leaves it in."""
_REFUSAL = re.compile(
    r"(i'm |i am )?(very |so |really )?(sorry|afraid)\b|i (can't|cannot|can not|won't|will not|am unable|decline)\b",
    re.IGNORECASE,
)
_DECODER = json.JSONDecoder(strict=False)
"""Not strict: models do write raw line breaks into JSON strings."""


@dataclass(frozen=True)
class Revision:
    """A rejected answer as the reviser rewrote it, and what it said about it."""

    revised: str
    comparison: str = ""
    reason: str = ""


def read_revision(text: str) -> Revision | None:
    """The revision in an answer; None where there is none to be found.

    JSON: the last object in the text with a text under "revised", whatever stands around it (a code fence, say).
    Otherwise the marker: what follows its last occurrence, as the reader of the published data takes it, and as reason
    what stands before. An object without its closing brace is none: half a revision would be labelled as deletions.
    """
    text = _THOUGHTS.sub("", text)
    found = _last_object(text)
    if found is not None:
        return found
    before, marker, after = text.rpartition(REVISION_MARKER.rstrip())
    return Revision(revised=after, reason=before.strip()) if marker else None


def is_refusal(text: str) -> bool:
    """Whether an answer without a revision opens like a refusal to revise."""
    opening = _THOUGHTS.sub("", text).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").lstrip("\"'*#> \n")
    return _REFUSAL.match(opening) is not None


def _last_object(text: str) -> Revision | None:
    found, start = None, text.find("{")
    while start >= 0:
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):  # the second, where a model repeats an opening brace for ever
            end = start + 1
        else:
            if isinstance(value, dict) and isinstance(value.get("revised"), str):
                found = Revision(value["revised"], *(_text(value.get(name)) for name in ("comparison", "reason")))
        start = text.find("{", end)
    return found


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""
