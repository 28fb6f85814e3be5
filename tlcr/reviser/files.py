"""Revisions that someone else made, matched with the pairs that they belong to by content, not by position."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace

from tlcr.config.schema import DataConfig
from tlcr.data.readers import read_raw_edits
from tlcr.data.records import Context, TextPreference, message_words
from tlcr.errors import DataError
from tlcr.reviser.checks import CheckedRevision, check_revision
from tlcr.reviser.reading import Revision

__all__ = ["content_key", "match_files"]


def content_key(prompt: Context, rejected: str) -> str:
    """SHA-256 of a prompt and its rejected answer, both without regard to white space.

    The chosen answer is not in it, since files of edits need not have it; nor are roles, since files name them
    differently, and fields beside a message's content, such as an id, since files need not keep them.
    """
    turns = [prompt] if isinstance(prompt, str) else [message_words(message) for message in prompt]
    content = json.dumps([text.split() for text in (*turns, rejected)], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def match_files(
    pairs: Iterable[TextPreference], source: str, data: DataConfig, *, max_changed: float
) -> list[CheckedRevision]:
    """What the revisions of ``source`` (a file, folder or hub dataset, in a format of ``read_edits``) say of each pair.

    A pair without one is "missing". Where two revise the same, the later one counts. Raises DataError where no pair
    has one: the files then belong to other preferences.
    """
    edits = read_raw_edits(replace(data, edits=source, edits_format="auto", limit=None)).records
    revised: Mapping[str, str] = {
        content_key(edit.prompt, edit.rejected): edit.revised
        for edit in edits
        if isinstance(edit.rejected, str) and isinstance(edit.revised, str)
    }
    checked = []
    for pair in pairs:
        text = revised.get(content_key(pair.prompt, pair.rejected))
        if text is None:
            checked.append(CheckedRevision("missing", f"no record of {source} has this prompt and rejected answer"))
        else:
            checked.append(check_revision(pair, Revision(text), max_changed=max_changed))
    if all(found.outcome == "missing" for found in checked):
        raise DataError(
            f"none of the {len(edits)} revisions in {source} belongs to a pair of data.preferences; their 'prompt' and "
            "'rejected' must be those of the preferences, white space aside"
        )
    return checked
