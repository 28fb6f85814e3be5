"""From what a reviser said to a revision: as JSON, or behind the marker line of the published data."""

from __future__ import annotations

from dataclasses import dataclass

from tlcr.chat.reading import objects_in, without_thoughts
from tlcr.data.formats import REVISION_MARKER
from tlcr.text.files import unicode_problem

__all__ = ["Revision", "read_revision"]


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
    Nor is one with half of a surrogate pair, which can be neither written nor tokenised.
    """
    marker = REVISION_MARKER.rstrip()
    text = without_thoughts(text, marker=marker)
    found = [value for value in objects_in(text) if isinstance(value.get("revised"), str)]
    if found:
        last = found[-1]
        if unicode_problem(last["revised"]) is not None:
            return None
        return Revision(last["revised"], *(_text(last.get(name)) for name in ("comparison", "reason")))
    if marker not in text:
        return None
    before, _, after = text.rpartition(marker)
    return Revision(revised=after, reason=before.strip())


def _text(value: object) -> str:
    """What is only shown keeps a question mark for half of a surrogate pair."""
    return value.strip().encode(errors="replace").decode() if isinstance(value, str) else ""
