"""Files of benchmarks, as the tools that go with them write and read them: AlpacaEval and FastChat (MT-Bench, Vicuna).

AlpacaEval: a JSON list of {instruction, output, generator, dataset}; its prompts are the same without the output.
FastChat: JSON lines; questions {question_id, category, turns}, with reference answers in some; answers {question_id,
answer_id, model_id, choices: [{index, turns}], tstamp}.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from tlcr.errors import DataError
from tlcr.files import atomic_write, write_json
from tlcr.text.files import parse_json, read_text, unicode_problem

__all__ = [
    "AnswerFile",
    "Benchmark",
    "BenchmarkName",
    "BenchmarkQuestion",
    "QuestionId",
    "read_answers",
    "read_benchmark",
    "read_lines",
    "write_alpaca_eval",
    "write_fastchat",
]

T = TypeVar("T")
QuestionId = int | str
BenchmarkName = Literal["alpaca_eval", "mt_bench", "vicuna"]
TURNS: dict[BenchmarkName, int] = {"alpaca_eval": 1, "mt_bench": 2, "vicuna": 1}


@dataclass(frozen=True)
class BenchmarkQuestion:
    """What a user says, turn by turn.

    id: FastChat's question_id; for AlpacaEval a hash of the instruction, which is what its tool matches answers by.
    category: FastChat's category; AlpacaEval's dataset. references: a correct answer for each turn, where there is one.
    """

    id: QuestionId
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """The prompts of a benchmark."""

    name: BenchmarkName
    questions: tuple[BenchmarkQuestion, ...]


@dataclass(frozen=True)
class AnswerFile:
    """One model's answers: for each question's id, a text for each turn.

    questions: what was asked, where the file itself says so (AlpacaEval); else None.
    """

    model_id: str
    answers: Mapping[QuestionId, tuple[str, ...]]
    questions: tuple[BenchmarkQuestion, ...] | None


# ---------------------------------------------------------------------------------------------------------- reading


def read_benchmark(path: str | Path, name: Literal["auto", "alpaca_eval", "mt_bench", "vicuna"] = "auto") -> Benchmark:
    """Prompts in either format. Raises DataError for a file that is neither, or not of the benchmark that is named."""
    path = Path(path)
    if _is_list(path):
        found: BenchmarkName = "alpaca_eval"
        questions = _instructions(_json_list(path, "instruction"))
    else:
        questions = [_question(record, where) for record, where in read_lines(path)]
        found = "mt_bench" if all(len(question.turns) == 2 for question in questions) else "vicuna"
    if not questions:
        raise DataError(f"{path} holds no prompts; give AlpacaEval's JSON list or FastChat's question.jsonl")
    expected = found if name == "auto" else name
    if (expected == "alpaca_eval") != (found == "alpaca_eval"):
        kind = "a JSON list, as AlpacaEval's are" if found == "alpaca_eval" else "JSON lines, as FastChat's are"
        raise DataError(f"{path} is {kind}, and --format is {expected}; give the prompts of that, or drop --format")
    for question in questions:
        if len(question.turns) != TURNS[expected]:
            raise DataError(
                f"{path}: question {question.id} has {len(question.turns)} turns; {expected} has {TURNS[expected]}"
            )
    _refuse_repeated([question.id for question in questions], path)
    return Benchmark(expected, tuple(questions))


def read_answers(path: str | Path) -> AnswerFile:
    """One model's answers in either format; of several choices (FastChat), the first.

    Raises DataError for a file that is neither, is empty, answers a question twice, or holds answers of two models.
    """
    path = Path(path)
    questions: tuple[BenchmarkQuestion, ...] | None = None
    if _is_list(path):
        records = _json_list(path, "instruction", "output", "generator")
        questions = tuple(_instructions(records))
        models = [str(record["generator"]) for record, _ in records]
        outputs: list[tuple[str, ...]] = [(record["output"],) for record, _ in records]
        answers = [(question.id, turns) for question, turns in zip(questions, outputs, strict=True)]
    else:
        rows = [_fastchat_answer(record, where) for record, where in read_lines(path)]
        models, answers = [model for model, _, _ in rows], [(id, turns) for _, id, turns in rows]
    if not answers:
        raise DataError(f"{path} holds no answers; 'tlcr answer' writes some, as AlpacaEval and FastChat do")
    if len(set(models)) > 1:
        raise DataError(f"{path} holds answers of {', '.join(sorted(set(models)))}; give one file for each model")
    _refuse_repeated([id for id, _ in answers], path)
    return AnswerFile(models[0], dict(answers), questions)


def read_lines(path: str | Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The objects of a JSON-lines file, each with where it stands ("file:line")."""
    # Not splitlines: texts in JSON may hold line separators of Unicode.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); wanted one object a line") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: {line[:80]!r} is no JSON object; wanted one object a line")
        _require_unicode(record, f"{path}:{number}")
        yield record, f"{path}:{number}"


def _is_list(path: Path) -> bool:
    return read_text(path).lstrip()[:1] == "["


def _json_list(path: Path, *wanted: str) -> list[tuple[Mapping[str, Any], str]]:
    try:
        records = parse_json(read_text(path))
    except ValueError as error:
        raise DataError(f"{path} begins like a JSON list and is none ({error})") from error
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{path}, item {index}: {str(record)[:80]!r} is no object; wanted {', '.join(wanted)}")
        _require_unicode(record, f"{path}, item {index}")
        for name in wanted:
            _field(record, name, lambda value: isinstance(value, str), "a text", f"{path}, item {index}")
        if record.get("input"):
            raise DataError(f"{path}, item {index}: there is an 'input' beside the instruction; make them one text")
    return [(record, f"{path}, item {index}") for index, record in enumerate(records)]


def _require_unicode(record: Mapping[str, Any], where: str) -> None:
    for name, value in record.items():
        if problem := unicode_problem(value):
            raise DataError(f"{where}: {name!r} {problem}; mend the program that cut the text")


def _instructions(records: Sequence[tuple[Mapping[str, Any], str]]) -> list[BenchmarkQuestion]:
    """An instruction that stands there twice is two questions."""
    seen: Counter[str] = Counter()
    questions = []
    for record, _ in records:
        digest = hashlib.sha256(record["instruction"].encode()).hexdigest()[:16]
        seen[digest] += 1
        id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        questions.append(BenchmarkQuestion(id, str(record.get("dataset") or "all"), (record["instruction"],)))
    return questions


def _question(record: Mapping[str, Any], where: str) -> BenchmarkQuestion:
    references = record.get("reference") or ()
    if not _are_texts(references):
        raise DataError(f"{where}: 'reference' is {references!r:.80}; it must be a list of texts, one for each turn")
    return BenchmarkQuestion(
        _field(record, "question_id", lambda value: isinstance(value, (int, str)), "a number or a text", where),
        str(record.get("category") or "all"),
        tuple(_field(record, "turns", _are_texts, "a list of texts", where)),
        tuple(references),
    )


def _fastchat_answer(record: Mapping[str, Any], where: str) -> tuple[str, QuestionId, tuple[str, ...]]:
    id = _field(record, "question_id", lambda value: isinstance(value, (int, str)), "a number or a text", where)
    model = _field(record, "model_id", lambda value: isinstance(value, str), "a text", where)
    choices = _field(record, "choices", lambda value: isinstance(value, list) and bool(value), "a list", where)
    first = choices[0] if isinstance(choices[0], dict) else {}
    return model, id, tuple(_field(first, "turns", _are_texts, "a list of texts", f"{where}, first choice"))


def _field(record: Mapping[str, Any], name: str, holds: Callable[[Any], bool], wanted: str, where: str) -> Any:
    value = record.get(name)
    if not holds(value):
        raise DataError(f"{where}: {name!r} is {value!r:.80}; it must be {wanted}")
    return value


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _refuse_repeated(ids: Sequence[QuestionId], path: Path) -> None:
    twice = [id for id, count in Counter(ids).items() if count > 1]
    if twice:
        raise DataError(f"{path} has question {twice[0]} twice; keep one")


# ---------------------------------------------------------------------------------------------------------- writing


def write_alpaca_eval(
    path: Path, questions: Sequence[BenchmarkQuestion], outputs: Sequence[Sequence[str]], model_id: str
) -> None:
    """``model_outputs.json``, as ``alpaca_eval --model_outputs`` reads it."""
    records = [
        {"instruction": question.turns[0], "output": turns[0], "generator": model_id, "dataset": question.category}
        for question, turns in zip(questions, outputs, strict=True)
    ]
    write_json(path, records)


def write_fastchat(
    path: Path, questions: Sequence[BenchmarkQuestion], outputs: Sequence[Sequence[str]], model_id: str
) -> None:
    """``model_answer/<model_id>.jsonl``, as FastChat's ``gen_judgment`` reads it, in the order of the question ids."""
    rows = sorted(zip(questions, outputs, strict=True), key=lambda row: (str(type(row[0].id)), row[0].id))
    with atomic_write(path) as aside, aside.open("w", encoding="utf-8") as file:
        for question, turns in rows:
            content = json.dumps([model_id, question.id, *turns], ensure_ascii=False)
            record = {
                "question_id": question.id,
                "answer_id": hashlib.sha256(content.encode()).hexdigest()[:22],  # FastChat's are as long, and random
                "model_id": model_id,
                "choices": [{"index": 0, "turns": list(turns)}],
                "tstamp": time.time(),
            }
            file.write(json.dumps(record) + "\n")
