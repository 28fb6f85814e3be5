"""Is it a minimal edit? What became of each pair, in one word.

A revision that is another answer would label nearly every token as wrong or right; one that changes nothing labels
none. Both teach the discriminator something false, so they are set aside, and counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from rapidfuzz.distance import Levenshtein

from tlcr.chat import Answer, NoAnswer
from tlcr.chat.reading import is_refusal
from tlcr.data.records import TextPreference
from tlcr.reviser.reading import Revision, read_revision

__all__ = ["OUTCOMES", "CheckedRevision", "Outcome", "changed_share", "check_answer", "check_revision"]

Outcome = Literal[
    "revised",
    "unchanged",
    "empty",
    "copied",
    "rewritten",
    "refusal",
    "truncated",
    "unreadable",
    "declined",
    "unanswered",
    "missing",
]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

COPIED = 0.1
"""A revision that differs from the chosen answer in no more of the words is a copy of it ..."""
NEAR = 0.3
"""... unless the chosen answer is itself that near to the rejected one: then a copy is the minimal edit."""

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaa7f"
    "\u3040-\u30ff\uff66-\uff9f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Characters of scripts that are written without spaces: Thai, Lao, Burmese, Khmer and Tai; kana and Han."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


@dataclass(frozen=True)
class CheckedRevision:
    """What became of a pair; ``revised`` is set where there is a revision, whether or not it passed."""

    outcome: Outcome
    detail: str = ""
    revised: str | None = None
    comparison: str = ""
    reason: str = ""
    changed_share: float | None = None


def changed_share(before: str, after: str) -> float:
    """Share of words changed: Levenshtein distance over words and marks, divided by the longer side's; in [0, 1].

    Of scripts that are written without spaces each character is a word.
    """
    return float(Levenshtein.normalized_distance(_WORD.findall(before), _WORD.findall(after)))


def check_answer(pair: TextPreference, answer: Answer | NoAnswer, *, max_changed: float) -> CheckedRevision:
    """What a model's answer, or the lack of one, means for the pair."""
    if isinstance(answer, NoAnswer):
        return CheckedRevision("declined" if answer.final else "unanswered", answer.reason)
    if answer.finish == "refusal":
        return CheckedRevision("refusal", answer.text)
    if answer.finish == "length":
        return CheckedRevision(
            "truncated", f"cut off after {answer.answer_tokens} tokens; raise reviser.max_new_tokens"
        )
    revision = read_revision(answer.text)
    if revision is None:
        return CheckedRevision("refusal" if is_refusal(answer.text) else "unreadable", answer.text)
    return check_revision(pair, revision, max_changed=max_changed)


def check_revision(pair: TextPreference, revision: Revision, *, max_changed: float) -> CheckedRevision:
    """Whether a revision is a minimal edit. White space at both ends is always the rejected answer's own: models drop
    it, and a lost leading space would make the first token another one."""
    body = revision.revised.strip()
    if not body:
        return CheckedRevision("empty", "the revision is blank", None, revision.comparison, revision.reason)
    share = changed_share(pair.rejected, body)
    outcome: Outcome = "revised"
    detail = ""
    if body.split() == pair.rejected.split():
        outcome = "unchanged"
    elif changed_share(pair.chosen, body) <= COPIED and changed_share(pair.chosen, pair.rejected) > NEAR:
        outcome, detail = "copied", "the revision is the chosen answer"
    elif share > max_changed:
        outcome, detail = "rewritten", f"{share:.0%} of the words changed; reviser.max_changed is {max_changed:.0%}"
    revised = pair.rejected if outcome == "unchanged" else _in_place_of(pair.rejected, body)
    return CheckedRevision(outcome, detail, revised, revision.comparison, revision.reason, round(share, 4))


def _in_place_of(rejected: str, body: str) -> str:
    lead = rejected[: len(rejected) - len(rejected.lstrip())]
    tail = rejected[len(rejected.rstrip()) :]
    return lead + body + tail
