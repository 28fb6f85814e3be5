"""The edit codes of the published TLCR data: checks them, and compares our labels with them.

``rejected_token_edit`` and ``modified_token_edit`` hold one code for each token of an answer that was tokenised alone,
without special tokens, by the authors' tokenizer: U unchanged, S substituted, D deleted (rejected side), A added
(revised side). Labels are for tokens in context and for the tokenizer in use, so they are computed anew. Where the
codes fit the tokenizer in use, they show whether our edit script equals the published one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tlcr import ops
from tlcr.ops import TokenLabel

__all__ = ["check_edit_codes", "compare_edit_codes"]

SIDES = (("rejected_token_edit", "USD"), ("modified_token_edit", "USA"))
COMPARED = 1000
"""Maximum number of records compared: enough for an estimate, and little work beside the labelling."""


def check_edit_codes(values: Mapping[str, Any]) -> str | None:
    """What is wrong with a record's edit codes; None for a record whose codes are sound or that has none.

    Both sides of one edit script have the same unchanged and the same substituted tokens, so once deletions and
    additions are left out, the two lists are equal.
    """
    if all(values.get(name) is None for name, _ in SIDES):
        return None
    kept = []
    for name, known in SIDES:
        codes = values.get(name)
        if not isinstance(codes, list) or any(code not in tuple(known) for code in codes):
            return f"field {name!r} is not a list of the edit codes {', '.join(known)}"
        kept.append([code for code in codes if code in "US"])
    if kept[0] != kept[1]:
        return "rejected_token_edit and modified_token_edit are not two sides of one edit: their U and S differ"
    return None


def compare_edit_codes(
    answers: Sequence[tuple[str, str, Mapping[str, Any]]], tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """One line on the agreement of the codes of (rejected text, revised text, record) with ours; None without codes."""
    coded = [answer for answer in answers if answer[2].get(SIDES[0][0]) is not None][:COMPARED]
    if not coded:
        return None
    texts = [rejected for rejected, _, _ in coded] + [revised for _, revised, _ in coded]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    fitting = agreeing = tokens = 0
    for (_, _, record), rejected_ids, revised_ids in zip(coded, ids[: len(coded)], ids[len(coded) :], strict=True):
        rejected_codes, revised_codes = (record[name] for name, _ in SIDES)
        if (len(rejected_codes), len(revised_codes)) != (len(rejected_ids), len(revised_ids)):
            continue
        fitting += 1
        rejected_labels, revised_labels = ops.token_labels(rejected_ids, revised_ids)
        for code, label in zip(rejected_codes + revised_codes, rejected_labels + revised_labels, strict=True):
            tokens += 1
            agreeing += (code == "U") == (label == TokenLabel.NEUTRAL)
    if not fitting:
        return (
            f"edit codes: none of {len(coded)} records has as many codes as this tokenizer makes tokens; they were "
            "made with another one, and the labels are computed afresh"
        )
    return (
        f"edit codes: {fitting} of {len(coded)} records have as many codes as this tokenizer makes tokens, and there "
        f"{agreeing / tokens:.1%} of the codes agree with the labels computed here"
    )
