"""What a judge said, read; and two orders made one outcome."""

from __future__ import annotations

from typing import Any

import pytest

from tlcr.chat import Answer, NoAnswer
from tlcr.judging.verdicts import Comparison, read_grade, read_ruling

ORDER = ("first", "second", "tie")


@pytest.mark.parametrize(
    ("text", "ruling"),
    [
        ('{"comparison": "first is longer", "winner": "second"}', "second"),
        ('Here:\n```json\n{"comparison": "a {b}", "winner": "Tie"}\n```', "tie"),
        ('<think>{"winner": "second"}\nVerdict: second</think>\n{"winner": "first"}', "first"),
        # thoughts that the chat template began
        ("Let me think.\n</think>\n\nfirst", "first"),
        ("Maybe\nVerdict: first\nNo.</think>\n\nIt lies.\nVerdict: second", "second"),
        ('Maybe {"winner": "first"}\n</think>\n{"winner": "second"}', "second"),
        ('{"comparison": "the second shows its </think>", "winner": "first"}', "first"),
        ("Verdict: first\nThe second shows its <think> and </think>.", "first"),
        ("Both are fine.\n**Verdict:** first.", "first"),
        ("It fails.\nFinal verdict: Second", "second"),
        ("VERDICT - tie", "tie"),
        ("First", "first"),
        ('"second".', "second"),
        ("Verdict: first\nOnce more.\nVerdict: first", "first"),
        # nothing, or not one thing
        ("The first one is better.", "unreadable"),
        ("Verdict: first or second", "unreadable"),
        ("Verdict: first, second, tie", "unreadable"),
        ("Verdict: the first reply misses the point", "unreadable"),
        ("Verdict: first\nVerdict: second", "unreadable"),
        ('{"winner": "first"} {"winner": "tie"}', "unreadable"),
        ('{"winner": "first reply"}', "unreadable"),
        ('{"winner": 1}', "unreadable"),
        ('{"comparison": "cut in the mid', "unreadable"),
        ("", "unreadable"),
        ("I'm sorry, but I can't compare these.", "refusal"),
        # a verdict outweighs how the answer opens, and JSON outweighs lines
        ("I'm sorry to say that both fail.\nVerdict: tie", "tie"),
        ('Verdict: first\n{"winner": "second"}', "second"),
    ],
)
def test_a_ruling_is_read_where_there_is_one(text: str, ruling: str) -> None:
    assert read_ruling(Answer(text)) == ruling


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ('{"comparison": "", "grade": 7}', 7.0),
        ('{"grade": "8"}', 8.0),
        ('{"grade": 7.5}', 7.5),
        ("Good.\nGrade: 10", 10.0),
        ("Grade: **6**/10", 6.0),
        ("**Grade: 6 / 10**", 6.0),
        ("9", 9.0),
        ("Grade: 0", "unreadable"),
        ("Grade: 11", "unreadable"),
        ('{"grade": true}', "unreadable"),
        ("A 7 from me", "unreadable"),
        ("Grade: 3\nGrade: 4", "unreadable"),
    ],
)
def test_a_grade_is_read_where_there_is_one(text: str, grade: Any) -> None:
    assert read_grade(Answer(text)) == grade


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (NoAnswer("too long", final=True), "declined"),
        (NoAnswer("time-out", final=False), "unanswered"),
        (Answer("Verdict: first", finish="refusal"), "refusal"),
        (Answer("The first is", finish="length"), "truncated"),
        (Answer('{"winner": "fir', finish="length"), "truncated"),
        (Answer("<think>\nVerdict: first\nGrade: 5\nBut wait", finish="length"), "truncated"),
        (Answer("Verdict: first\nGrade: 5\nOr\n</think>\n\nThe", finish="length"), "truncated"),
        (Answer("Okay.\n<think>\nVerdict: first\nGrade: 5\nBut wait", finish="length"), "truncated"),
        (Answer('Okay <think>\n{"winner": "first", "grade": 5}\nBut', finish="length"), "truncated"),
        (Answer("<think></think>\n<think>\nVerdict: first\nGrade: 5\nBut", finish="length"), "truncated"),
    ],
)
def test_why_there_is_no_verdict(answer: Answer | NoAnswer, failure: str) -> None:
    assert read_ruling(answer) == read_grade(answer) == failure


def test_a_verdict_that_was_given_before_the_cut_counts() -> None:
    assert read_ruling(Answer("Verdict: first\n\nLet me explain", finish="length")) == "first"
    assert read_ruling(Answer("Verdict: first\nVerdict: second\nVer", finish="length")) == "unreadable"
    assert read_ruling(Answer("Verdict: first\n<think>\nVerdict: second\nNo", finish="length")) == "first"
    shown = '{"comparison": "the second leaves its <think> open", "winner": "first"}\nLet me'
    assert read_ruling(Answer(shown, finish="length")) == "first"
    assert read_ruling(Answer("The second leaves its <think> open.\nVerdict: first")) == "first"


@pytest.mark.parametrize("ab", ORDER)
@pytest.mark.parametrize("ba", ORDER)
def test_both_orders_must_agree_on_a_winner(ab: Any, ba: Any) -> None:
    """ab: model_a's reply stood first. Only (first, second) is a win of model_a, only (second, first) of model_b."""
    comparison = Comparison(1, "math", 1, 10, 20, ab, ba)
    expected = {("first", "second"): "model_a", ("second", "first"): "model_b"}
    assert comparison.winner == expected.get((ab, ba), "tie")


@pytest.mark.parametrize(("ab", "ba"), [("first", "refusal"), ("unreadable", "second"), ("truncated", "declined")])
def test_an_order_that_cannot_be_read_leaves_no_winner(ab: Any, ba: Any) -> None:
    comparison = Comparison(1, "math", 1, 10, 20, ab, ba)
    assert comparison.winner is None and comparison.winners is None
