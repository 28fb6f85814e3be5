"""From what a judge said to a verdict, and from the verdicts of both orders to the outcome of a comparison."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from tlcr.chat import Answer, NoAnswer
from tlcr.chat.reading import is_refusal, objects_in, without_thoughts
from tlcr.judging.formats import QuestionId

__all__ = ["FAILURES", "Comparison", "Failure", "Grade", "Ruling", "Winner", "read_grade", "read_ruling"]

Failure = Literal["refusal", "truncated", "unreadable", "declined", "unanswered"]
FAILURES: tuple[Failure, ...] = get_args(Failure)
Ruling = Literal["first", "second", "tie"]
Winner = Literal["model_a", "model_b", "tie"]

_WINNER = r"\W*(first|second|tie)\b\W*"
_GRADE = r"\W*(\d+(?:\.\d+)?)(?:\W*/\s*10)?\W*"
_LINE = r"^\W*(?:final\s+)?{name}\b{value}$"
_FLAGS = re.IGNORECASE | re.MULTILINE


@dataclass(frozen=True)
class Comparison:
    """Two models' replies to one turn of a question, judged in both orders.

    turn: from 1. ruling_ab: of the judge who was shown model_a's reply first; ruling_ba: the other way round, and also
    in terms of what stood first. lengths: characters of the two replies.
    """

    question_id: QuestionId
    category: str
    turn: int
    length_a: int
    length_b: int
    ruling_ab: Ruling | Failure
    ruling_ba: Ruling | Failure

    @property
    def winners(self) -> tuple[Winner, Winner] | None:
        """Whom each order says is better; None where one of the two could not be read."""
        if self.ruling_ab in FAILURES or self.ruling_ba in FAILURES:
            return None
        ab: dict[str, Winner] = {"first": "model_a", "second": "model_b", "tie": "tie"}
        ba: dict[str, Winner] = {"first": "model_b", "second": "model_a", "tie": "tie"}
        return ab[self.ruling_ab], ba[self.ruling_ba]

    @property
    def winner(self) -> Winner | None:
        """On whom both orders agree; "tie" where they do not. None where one of the two could not be read."""
        if self.winners is None:
            return None
        return self.winners[0] if self.winners[0] == self.winners[1] else "tie"


@dataclass(frozen=True)
class Grade:
    """One reply's grade, from 1 to 10, or why there is none."""

    question_id: QuestionId
    category: str
    turn: int
    length: int
    grade: float | Failure


def read_ruling(answer: Answer | NoAnswer) -> Ruling | Failure:
    """What a judge ruled, or why nothing can be read.

    Read are JSON objects with a "winner", else lines "Verdict: ...", else an answer of that one word. An answer with
    verdicts that contradict each other is unreadable.
    """
    found = _verdicts(answer, "winner", "verdict", _WINNER)
    rulings: dict[str, Ruling] = {"first": "first", "second": "second", "tie": "tie"}
    if len(found) == 1 and (said := next(iter(found))) in rulings:
        return rulings[said]
    return _failure(answer, found)


def read_grade(answer: Answer | NoAnswer) -> float | Failure:
    """The grade from 1 to 10 that a judge gave, or why there is none; found as ``read_ruling`` finds a ruling."""
    found = _verdicts(answer, "grade", "grade", _GRADE)
    if len(found) == 1 and re.fullmatch(r"\d+(\.\d+)?", said := next(iter(found))) and 1 <= float(said) <= 10:
        return float(said)
    return _failure(answer, found)


def _verdicts(answer: Answer | NoAnswer, field: str, word: str, value: str) -> set[str]:
    """The different verdicts in an answer, as it writes them."""
    if isinstance(answer, NoAnswer) or answer.finish == "refusal":
        return set()
    text = without_thoughts(answer.text, is_cut=answer.finish == "length")
    found = [str(item[field]) for item in objects_in(text) if field in item]
    found = found or re.findall(_LINE.format(name=word, value=value), text, _FLAGS)
    found = found or re.findall(rf"\A{value}\Z", text, _FLAGS)
    return {said.strip().lower() for said in found}


def _failure(answer: Answer | NoAnswer, found: set[str]) -> Failure:
    if isinstance(answer, NoAnswer):
        return "declined" if answer.final else "unanswered"
    if answer.finish == "refusal":
        return "refusal"
    if found:
        return "unreadable"
    if answer.finish == "length":
        return "truncated"
    return "refusal" if is_refusal(answer.text) else "unreadable"
