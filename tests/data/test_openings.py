"""Edit records are made from two whole texts; the prompt is their shared opening."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tlcr.data.openings import edit_record, shared_opening
from tlcr.files import write_json_lines


@pytest.mark.parametrize(
    ("first", "second", "opening"),
    [
        ("a b c d", "a b c e", "a b c"),
        ("a b c", "a b c", None),
        ("a b c d", "a b cd", None),
        ("a b  c d", "a b c d", None),
        ("a b c\nd", "a b c d", None),
        ("a b c d e f", "a b c d e g", "a b c d"),
    ],
)
def test_opening_is_of_whole_words_that_both_go_on_from_alike(first: str, second: str, opening: str | None) -> None:
    assert shared_opening(first, second, at_most=4, at_least=3) == opening


def test_prompt_and_answers_are_the_texts_again(tmp_path: Path) -> None:
    record = edit_record("7", "he is a very bad man", "he is a good man", at_most=8, at_least=2)
    assert record == {
        "id": "7",
        "prompt": "he is a",
        "rejected": " very bad man",
        "revised": " good man",
        "chosen": " good man",
    }
    write_json_lines(tmp_path / "out.jsonl", [record, record])
    written = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in written] == [record, record]


@pytest.mark.parametrize(
    ("rejected", "revised"), [("the same text", "the same text"), ("one thing", "another thing"), ("one two", "")]
)
def test_texts_without_an_edit_or_an_opening_make_no_record(rejected: str, revised: str) -> None:
    assert edit_record("7", rejected, revised, at_most=8, at_least=1) is None
