"""The knobs are a list that is kept by hand: a new one is a decision, with its reason beside it (knobs.txt).

python tests/config/test_knobs.py        rewrites the list; git diff then shows what the change does to users
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tlcr.config.judging import AnswerConfig, JudgeConfig
from tlcr.config.loading import Knob, describe_type, knobs
from tlcr.config.schema import Arm, Checked, RunConfig, knob

LIST = Path(__file__).with_name("knobs.txt")
CONFIGS = {
    "RunConfig: the pipeline": RunConfig,
    "Arm: an item of arms": Arm,
    "AnswerConfig: tlcr answer": AnswerConfig,
    "JudgeConfig: tlcr judge": JudgeConfig,
}
OLDER, OPEN = "-", "?"
WITHOUT_REASON = 248
"""Knobs that are older than the list. This number goes down where one is dropped, and never up."""
HEAD = f"""\
# Every knob that a user can set: path | default | who sees it | type | source of the default | why it is a knob.
#
# 'common' knobs are in --help, 'advanced' ones in --help-all alone. The last column says who sets it, and to what, that
# no default and no rule could know; '{OLDER}' is for knobs that are older than this list.
# After a change of a knob: python tests/config/test_knobs.py, then write the reason where it put '{OPEN}'.
# The path, default, and type of a knob are a promise to those who have it in a config: a dropped knob goes to
# tlcr/config/dropped.py.
"""

Reasons = Mapping[tuple[str, str], str]


def line(title: str, knob: Knob, reasons: Reasons) -> str:
    shown = "advanced" if knob.advanced else "common"
    # Of Arm.name, the one field that is no knob but required.
    default = "required" if knob.default is dataclasses.MISSING else json.dumps(knob.default)
    columns = [describe_type(knob.type), knob.metadata.get("source", "-"), reasons.get((title, knob.path), OPEN)]
    return " | ".join([f"{knob.path:<38}", f"{default:<16}", f"{shown:<8}", *columns])


def listing(configs: Mapping[str, type], reasons: Reasons) -> str:
    parts = [HEAD]
    for title, cls in configs.items():
        found = knobs(cls)
        advanced = sum(knob.advanced for knob in found)
        parts += [f"\n## {title}; {len(found)} knobs, {advanced} of them advanced\n"]
        parts += [f"{line(title, knob, reasons)}\n" for knob in found]
    return "".join(parts)


def reasons_in(text: str) -> dict[tuple[str, str], str]:
    reasons, title = {}, ""
    for row in text.splitlines():
        if row.startswith("## "):
            title = row[3:].partition(";")[0]
        elif row and not row.startswith("#"):
            columns = row.split(" | ", 5)
            reasons[title, columns[0].strip()] = columns[-1].strip()
    return reasons


def problems(text: str, configs: Mapping[str, type] = CONFIGS) -> list[str]:
    """How the list differs from the knobs that there are, and what it owes."""
    reasons = reasons_in(text)
    rows = difflib.ndiff(text.splitlines(), listing(configs, reasons).splitlines())
    changed = [row.rstrip() for row in rows if row.startswith(("- ", "+ "))]
    owed = [(title, path) for (title, path), why in reasons.items() if why != OLDER and len(why.split()) < 3]
    return changed + [f"{path} ({title.partition(':')[0]}) has no reason" for title, path in owed]


def test_the_list_of_knobs_is_that_of_the_config() -> None:
    found = problems(LIST.read_text(encoding="utf-8"))
    assert not found, "\n".join(["run 'python tests/config/test_knobs.py' and look at the diff:", *found])


def test_only_what_is_older_than_the_list_has_no_reason() -> None:
    reasons = reasons_in(LIST.read_text(encoding="utf-8"))
    assert list(reasons.values()).count(OLDER) == WITHOUT_REASON


@dataclass(frozen=True)
class Small(Checked):
    """Two knobs."""

    one: int = knob(1, "the first")
    two: float | None = knob(None, "the second", source="paper", advanced=True)


@dataclass(frozen=True)
class Grown(Small):
    """And a third."""

    three: bool = knob(True, "the third")


@dataclass(frozen=True)
class Moved(Small):
    """Another default."""

    one: int = knob(2, "the first")


def test_a_new_a_changed_and_a_dropped_knob_are_noticed() -> None:
    kept = {("Small", "one"): OLDER, ("Small", "two"): "for some rare tokenizers"}
    text = listing({"Small": Small}, kept)
    assert problems(text, {"Small": Small}) == []
    row = f"{'two':<38} | {'null':<16} | advanced | a number or null | paper | for some rare tokenizers"
    assert row in text.splitlines()

    added = problems(text, {"Small": Grown})
    assert [row.partition(" |")[0].strip() for row in added if row.startswith("+ ")][-1] == "+ three"
    rewritten = listing({"Small": Grown}, reasons_in(text))
    assert problems(rewritten, {"Small": Grown}) == ["three (Small) has no reason"]
    assert reasons_in(rewritten) == {**kept, ("Small", "three"): OPEN}

    assert [row[:5] for row in problems(text, {"Small": Moved})] == ["- one", "+ one"]
    assert any(row.startswith("- three") for row in problems(rewritten, {"Small": Small}))


@pytest.mark.parametrize("cls", [RunConfig, AnswerConfig, JudgeConfig])
def test_every_section_has_a_common_knob(cls: type) -> None:
    """``--help`` would show its heading over nothing."""
    sections = {knob.section for knob in knobs(cls)}
    assert {knob.section for knob in knobs(cls) if not knob.advanced} == sections


@pytest.mark.parametrize("cls", CONFIGS.values())
def test_every_knob_says_what_it_is_and_where_its_default_comes_from(cls: type) -> None:
    for each in knobs(cls):
        if cls is Arm and each.path == "name":
            continue
        assert each.metadata.get("help") and each.metadata.get("source"), each.path


if __name__ == "__main__":
    LIST.write_text(listing(CONFIGS, reasons_in(LIST.read_text(encoding="utf-8"))), encoding="utf-8")
