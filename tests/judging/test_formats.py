"""Files of AlpacaEval and FastChat: read as their tools write them, written as their tools read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tlcr.errors import DataError
from tlcr.judging.formats import BenchmarkQuestion, read_answers, read_benchmark, write_alpaca_eval, write_fastchat

SHARED = Path(__file__).parents[3] / "shared" / "data"


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def question(id: int, turns: list[str], **more: Any) -> dict[str, Any]:
    return {"question_id": id, "category": "math", "turns": turns, **more}


def test_questions_of_fastchat_with_their_references(tmp_path: Path) -> None:
    path = lines(tmp_path / "q.jsonl", question(3, ["one", "two"], reference=["1", "2"]), question(4, ["a", "b"]))
    found = read_benchmark(path)
    assert found.name == "mt_bench"
    assert found.questions == (
        BenchmarkQuestion(3, "math", ("one", "two"), ("1", "2")),
        BenchmarkQuestion(4, "math", ("a", "b")),
    )
    assert read_benchmark(lines(tmp_path / "v.jsonl", question(1, ["x"]))).name == "vicuna"


def test_a_line_separator_of_unicode_within_a_text_ends_no_record(tmp_path: Path) -> None:
    path = lines(tmp_path / "q.jsonl", question(1, ["before\u2028after\x85end"]))
    assert read_benchmark(path).questions[0].turns == ("before\u2028after\x85end",)


def test_instructions_of_alpaca_eval_are_known_by_their_text(tmp_path: Path) -> None:
    records = [{"instruction": text, "dataset": "koala", "output": "theirs"} for text in ("why?", "how?", "why?")]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.json").write_text(json.dumps(records[::-1]))
    there, back = (read_benchmark(tmp_path / name) for name in ("a.json", "b.json"))
    assert there.name == "alpaca_eval" and {question.category for question in there.questions} == {"koala"}
    ids = [question.id for question in there.questions]
    assert len(set(ids)) == 3 and str(ids[2]) == f"{ids[0]}-2"
    assert {question.id: question.turns for question in there.questions} == {
        question.id: question.turns for question in back.questions
    }


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    questions = [BenchmarkQuestion(id, "stem", (f"q{id}", "and?")) for id in (10, 9)]
    path = tmp_path / "model_answer" / "m.jsonl"
    write_fastchat(path, questions, [("ten", "ja\u2028é"), ("nine", "")], "m")
    assert read_answers(path).answers == {10: ("ten", "ja\u2028é"), 9: ("nine", "")}
    records = [json.loads(line) for line in path.read_text("ascii").splitlines()]
    assert [record["question_id"] for record in records] == [9, 10]
    assert all(set(r) == {"question_id", "answer_id", "model_id", "choices", "tstamp"} for r in records)
    assert records[0]["choices"] == [{"index": 0, "turns": ["nine", ""]}]
    assert len({record["answer_id"] for record in records}) == 2 and len(records[0]["answer_id"]) == 22

    questions = [BenchmarkQuestion("x", "koala", ("why?",)), BenchmarkQuestion("y", "oasst", ("why?",))]
    path = tmp_path / "model_outputs.json"
    write_alpaca_eval(path, questions, [("so",), ("é",)], "m")
    assert json.loads(path.read_text()) == [
        {"instruction": "why?", "output": "so", "generator": "m", "dataset": "koala"},
        {"instruction": "why?", "output": "é", "generator": "m", "dataset": "oasst"},
    ]
    found = read_answers(path)
    assert found.model_id == "m" and list(found.answers.values()) == [("so",), ("é",)]
    assert found.questions is not None and [q.category for q in found.questions] == ["koala", "oasst"]


def test_of_several_choices_the_first_is_read(tmp_path: Path) -> None:
    choices = [{"index": 0, "turns": ["a", "b"]}, {"index": 1, "turns": ["c", "d"]}]
    path = lines(tmp_path / "m.jsonl", {"question_id": 1, "model_id": "m", "choices": choices})
    assert read_answers(path).answers == {1: ("a", "b")}


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ('{"question_id": 1, "turns": ["a"]}', "alpaca_eval", "is JSON lines"),
        ('[{"instruction": "a"}]', "vicuna", "is a JSON list"),
        ('{"question_id": 1, "turns": ["a"]}', "mt_bench", "question 1 has 1 turns; mt_bench has 2"),
        ('{"question_id": 1, "turns": ["a", "b"]}\n{"question_id": 2, "turns": ["a"]}', "auto", "has 2 turns; vicuna"),
        ('{"question_id": 1, "turns": ["a"]}\n{"question_id": 1, "turns": ["b"]}', "auto", "question 1 twice"),
        ('{"question_id": 1, "turns": "a"}', "auto", ":1: 'turns' is 'a'; it must be a list of texts"),
        ('{"question_id": null, "turns": ["a"]}', "auto", "'question_id' is None"),
        ('{"question_id": 1, "turns": ["a"], "reference": "x"}', "auto", "'reference' is 'x'"),
        ('\n{"question_id": 1', "auto", ":2: not JSON"),
        ("3", "auto", "is no JSON object"),
        ('[{"instruction": 3}]', "auto", "item 0: 'instruction' is 3; it must be a text"),
        ('[{"instruction": "a", "input": "b"}]', "auto", "there is an 'input'"),
        ("[1]", "auto", "item 0: '1' is no object"),
        ("[{]", "auto", "begins like a JSON list and is none"),
        ("[]", "auto", "holds no prompts"),
        ("", "auto", "holds no prompts"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(content: str, name: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text(content)
    with pytest.raises(DataError) as raised:
        read_benchmark(tmp_path / "prompts", name)
    assert message in str(raised.value) and "prompts" in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"instruction": "a", "output": "b"}]', "'generator' is None"),
        ("[]", "holds no answers"),
        ('{"question_id": 1, "model_id": "m", "choices": []}', "'choices' is []"),
        ('{"question_id": 1, "model_id": "m", "choices": [{"turns": [1]}]}', "first choice: 'turns' is [1]"),
        (
            '[{"instruction": "a", "output": "b", "generator": "m"}, '
            '{"instruction": "c", "output": "b", "generator": "n"}]',
            "holds answers of m, n",
        ),
    ],
)
def test_answers_that_cannot_be_used_are_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "answers").write_text(content)
    with pytest.raises(DataError) as raised:
        read_answers(tmp_path / "answers")
    assert message in str(raised.value)
    with pytest.raises(DataError, match="absent cannot be read: No such file"):
        read_answers(tmp_path / "absent")


@pytest.mark.parametrize(("file", "name", "turns"), [("mt_bench", "mt_bench", 2), ("vicuna_bench", "vicuna", 1)])
def test_the_published_questions_are_read(file: str, name: str, turns: int) -> None:
    path = SHARED / f"{file}_questions.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is not in ../shared/data")
    found = read_benchmark(path)
    assert (found.name, len(found.questions)) == (name, 80)
    assert {len(question.turns) for question in found.questions} == {turns}
