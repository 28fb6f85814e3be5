"""``tlcr judge``: two models' answers compared in both orders, or one model's graded, by a language model."""

from __future__ import annotations

import json
import logging
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tlcr.chat import Answer, AnswerStore, NoAnswer, Question, ask
from tlcr.chat.build import chat_model, model_name
from tlcr.chat.estimate import estimate, rehearsal
from tlcr.config.judging import JudgeConfig
from tlcr.errors import ConfigError, DataError, EndpointError
from tlcr.evaluation.bootstrap import CONFIDENCE
from tlcr.files import atomic_write, finite, write_json, write_json_lines
from tlcr.judging.formats import (
    AnswerFile,
    Benchmark,
    BenchmarkQuestion,
    QuestionId,
    read_answers,
    read_benchmark,
    read_lines,
)
from tlcr.judging.prompt import AnswerFormat, comparison_question, grade_question
from tlcr.judging.results import Label, comparison_results, grade_results, render
from tlcr.judging.verdicts import Comparison, Grade, read_grade, read_ruling
from tlcr.text.files import parse_json, read_text

__all__ = ["Reply", "compare", "grade", "judge_command", "rehearse_judge"]

logger = logging.getLogger("tlcr")

VERDICT_TOKENS = 100
"""Of an answer of the judge, in an estimate."""


@dataclass(frozen=True)
class Reply:
    """What is judged: the replies to the turns of a question up to ``turn`` (from 0), the last of which counts.

    b: None where one model is graded.
    """

    question: BenchmarkQuestion
    turn: int
    a: tuple[str, ...]
    b: tuple[str, ...] | None


def judge_command(files: Sequence[str], cfg: JudgeConfig) -> dict[str, Any]:
    """Judge one or two files of answers; write verdicts, figures and report, print the report, return the figures.

    Raises EndpointError, with everything else kept for the next call, where requests failed through all retries and
    ``on_unanswered`` is "raise". Raises ConfigError where the results of another judge or benchmark would be replaced.
    """
    answers, benchmark, replies = _read(files, cfg)
    folder = _folder(answers, cfg)
    _refuse_others(folder, cfg, benchmark)
    if cfg.labels and len(answers) == 1:
        raise ConfigError("labels are verdicts between two models, and one file of answers is graded; drop --labels")
    labels = {source: _read_labels(source, answers) for source in cfg.labels}
    with AnswerStore(_cache(cfg)) as store:
        model = chat_model(cfg, store)
        questions = _questions(replies, cfg)
        said = ask(model, questions, store, label="judge", past_caps=cfg.on_unanswered)
        requests, cost = store.totals()
    _refuse_unanswered(said, cfg)
    judged: Sequence[Comparison | Grade]
    if len(answers) == 2:
        judged = comparisons = compare(replies, said)
        figures = comparison_results(comparisons, cfg, labels)
    else:
        judged = grades = grade(replies, said)
        figures = grade_results(grades, cfg)
    names = {f"model_{letter}": each.model_id for letter, each in zip("ab", answers, strict=False)}
    results = {
        **names,
        "judge": model_name(cfg),
        "benchmark": _shown_benchmark(benchmark),
        "settings": {
            **{name: getattr(cfg, name) for name in ("temperature", "max_new_tokens")},
            "confidence": CONFIDENCE,
            "resamples": cfg.resamples,
            "prompt": questions[0].template,
        },
        "questions": len({reply.question.id for reply in replies}),
        **figures,
        "requests": requests,
        "cost": cost,
    }
    _write_verdicts(folder / "verdicts.jsonl", names, model_name(cfg), judged, said)
    write_json(folder / "results.json", results)
    report = render(results)
    with atomic_write(folder / "report.md") as aside:
        aside.write_text(report, encoding="utf-8")
    sys.stdout.write(report)
    logger.info("wrote %s", folder)
    if not figures["judged"]:
        unanswered = [answer.reason for answer in said if isinstance(answer, NoAnswer)]
        first = f", the first without an answer because: {unanswered[0]}" if unanswered else ""
        raise DataError(
            f"not one answer of the judge could be read as a verdict{first}; {folder / 'verdicts.jsonl'} has what it "
            "said"
        )
    return results


def rehearse_judge(files: Sequence[str], cfg: JudgeConfig, *, show: int) -> None:
    """Print the first ``show`` requests, and what all of them come to. Sends and writes nothing."""
    answers, benchmark, replies = _read(files, cfg)
    _refuse_others(_folder(answers, cfg), cfg, benchmark)
    questions = _questions(replies, cfg)
    found = estimate(questions, [VERDICT_TOKENS] * len(questions), cfg, _cache(cfg))
    orders = len(questions) // len(replies)
    names = [
        f"question {reply.question.id}, turn {reply.turn + 1}" + (f", order {order + 1}" if orders > 1 else "")
        for reply in replies
        for order in range(orders)
    ]
    what = f"{len(replies)} replies" if orders == 1 else f"{len(replies)} comparisons in both orders"
    parts = rehearsal(list(zip(names, questions, strict=True))[:show], found, cfg, what=what)
    sys.stdout.write("\n".join(parts) + "\n")


def compare(replies: Sequence[Reply], said: Sequence[Answer | NoAnswer]) -> list[Comparison]:
    """The outcome of each comparison, from the judge's answers to both orders, a's reply first and then b's."""
    return [
        Comparison(
            reply.question.id,
            reply.question.category,
            reply.turn + 1,
            len(reply.a[reply.turn].strip()),
            len(reply.b[reply.turn].strip()) if reply.b is not None else 0,
            read_ruling(ab),
            read_ruling(ba),
        )
        for reply, ab, ba in zip(replies, said[::2], said[1::2], strict=True)
    ]


def grade(replies: Sequence[Reply], said: Sequence[Answer | NoAnswer]) -> list[Grade]:
    """The grade of each reply."""
    return [
        Grade(
            reply.question.id,
            reply.question.category,
            reply.turn + 1,
            len(reply.a[reply.turn].strip()),
            read_grade(answer),
        )
        for reply, answer in zip(replies, said, strict=True)
    ]


def _questions(replies: Sequence[Reply], cfg: JudgeConfig) -> list[Question]:
    """What the judge is asked: of each comparison both orders, one after the other."""
    answer_format: AnswerFormat = "line" if cfg.backend == "local" else "json"
    if cfg.answer_format != "auto":
        answer_format = cfg.answer_format
    settings: dict[str, Any] = {"max_new_tokens": cfg.max_new_tokens, "temperature": cfg.temperature}
    questions = []
    for reply in replies:
        shown = (reply.question, reply.turn)
        if reply.b is None:
            questions.append(grade_question(*shown, reply.a, answer_format, **settings))
        else:
            questions.append(comparison_question(*shown, reply.a, reply.b, answer_format, **settings))
            questions.append(comparison_question(*shown, reply.b, reply.a, answer_format, **settings))
    return questions


# ------------------------------------------------------------------------------------------------------------ files


def _folder(answers: Sequence[AnswerFile], cfg: JudgeConfig) -> Path:
    return Path(cfg.output_dir) / "--".join(_file_name(each.model_id) for each in answers)


def _shown_benchmark(benchmark: Benchmark) -> str:
    """Its name, and a checksum of its questions: any file of questions with one turn is of Vicuna's kind."""
    asked = [[question.id, list(question.turns)] for question in benchmark.questions]
    return f"{benchmark.name} {zlib.crc32(json.dumps(asked).encode()):08x}"


def _refuse_others(folder: Path, cfg: JudgeConfig, benchmark: Benchmark) -> None:
    """Two models have one folder, whoever judges them, and by whichever questions."""
    path, verdicts = folder / "results.json", folder / "verdicts.jsonl"
    judge, asked = model_name(cfg), _shown_benchmark(benchmark)
    if any(Path(source).resolve() == verdicts.resolve() for source in cfg.labels):
        raise ConfigError(
            f"labels name {verdicts}, which this command replaces: it would be compared with itself. Name another "
            "--output_dir, or a copy of the file"
        )
    if not path.exists():
        return
    try:
        before = parse_json(read_text(path))
        said_by, of = Path(before["judge"]), before.get("benchmark", asked)  # an earlier version did not record it
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not what tlcr judge writes ({error!r}); delete it") from error
    if said_by.resolve() != Path(judge).resolve() or of != asked:  # one folder may be written in several ways
        raise ConfigError(
            f"{folder} has what {said_by} said of {of}, and what {judge} says of {asked} would replace it; name "
            "another --output_dir"
        )


def _read(files: Sequence[str], cfg: JudgeConfig) -> tuple[list[AnswerFile], Benchmark, list[Reply]]:
    """The files of answers, the benchmark, and what is judged: every turn of the questions that all files answer."""
    answers = [read_answers(file) for file in files]
    if len(answers) == 2 and answers[0].model_id == answers[1].model_id:
        raise ConfigError(
            f"both {files[0]} and {files[1]} are answers of {answers[0].model_id!r}; give one another name "
            "(tlcr answer --model_id) to tell them apart"
        )
    benchmark = _asked(files, answers, cfg)
    questions = benchmark.questions
    common = [question for question in questions if all(question.id in each.answers for each in answers)]
    if not common:
        raise DataError(f"{' and '.join(files)} answer none of the same questions; give answers to one benchmark")
    left_out = len({question.id for question in questions}.union(*(each.answers for each in answers))) - len(common)
    if left_out:
        logger.warning("%d questions are not answered in every file, and are not judged", left_out)
    replies = []
    for question in common[: cfg.limit]:
        texts = [each.answers[question.id] for each in answers]
        for file, given in zip(files, texts, strict=True):
            if len(given) != len(question.turns):
                raise DataError(
                    f"{file} answers question {question.id} in {len(given)} turns, and it has {len(question.turns)}"
                )
        b = texts[1] if len(texts) == 2 else None
        replies += [Reply(question, turn, texts[0], b) for turn in range(len(question.turns))]
    return answers, benchmark, replies


def _asked(files: Sequence[str], answers: Sequence[AnswerFile], cfg: JudgeConfig) -> Benchmark:
    if all(each.questions is None for each in answers):
        if cfg.prompts is None:
            raise ConfigError(f"{files[0]} does not say what was asked; name the benchmark's question.jsonl: --prompts")
        return read_benchmark(cfg.prompts)
    for file, each in zip(files, answers, strict=True):
        if each.questions is None:
            raise DataError(f"{file} is in FastChat's format and the other file in AlpacaEval's; give two of a kind")
    if cfg.prompts is not None:
        raise ConfigError(f"{files[0]} says itself what was asked; drop --prompts, which FastChat's files need")
    return Benchmark("alpaca_eval", answers[0].questions or ())


def _read_labels(source: str, answers: Sequence[AnswerFile]) -> list[Label]:
    """Verdicts as in our ``verdicts.jsonl`` or the published human judgments of MT-Bench: question_id, turn, model_a,
    model_b, winner. Those between other models, and those without a winner, are left out; sides may be swapped."""
    pair = [each.model_id for each in answers]
    labels: list[Label] = []
    for record, where in read_lines(source):
        missing = [name for name in ("question_id", "model_a", "model_b", "winner") if name not in record]
        if missing:
            raise DataError(f"{where}: no {', '.join(missing)}; wanted question_id, turn, model_a, model_b, winner")
        winner = record["winner"]
        if winner not in ("model_a", "model_b", "tie", None):
            raise DataError(f"{where}: 'winner' is {winner!r}; it must be model_a, model_b or tie")
        sides = [record["model_a"], record["model_b"]]
        if winner is None or sorted(map(str, sides)) != sorted(pair):
            continue
        if sides != pair and winner != "tie":
            winner = "model_a" if winner == "model_b" else "model_b"
        labels.append((_question_id(record, where), _turn(record, where), winner))
    if not labels:
        raise DataError(f"{source} has no verdict between {' and '.join(pair)}; check its model_a and model_b")
    return labels


def _question_id(record: Mapping[str, Any], where: str) -> QuestionId:
    found = record["question_id"]
    if isinstance(found, float) and found.is_integer():
        return int(found)  # as tables write whole numbers in a column with gaps
    if isinstance(found, bool) or not isinstance(found, (int, str)):
        raise DataError(f"{where}: 'question_id' is {found!r:.80}; it must be a whole number or a text")
    return found


def _turn(record: Mapping[str, Any], where: str) -> int:
    """From 1, which is also that of a record without one."""
    found = record.get("turn")
    if found is None:
        return 1
    if isinstance(found, str) and found.strip().isdecimal():
        return int(found)  # as from a table of texts
    if isinstance(found, bool) or not isinstance(found, (int, float)) or found != found // 1:
        raise DataError(f"{where}: 'turn' is {found!r:.80}; it must be a whole number, 1 for the first turn")
    return int(found)


def _write_verdicts(
    path: Path,
    names: Mapping[str, str],
    judge: str,
    judged: Sequence[Comparison | Grade],
    said: Sequence[Answer | NoAnswer],
) -> None:
    """One line for each comparison or grade, with what the judge said."""
    texts = [answer.text if isinstance(answer, Answer) else answer.reason for answer in said]
    each = len(said) // len(judged)
    records = []
    for index, found in enumerate(judged):
        record: dict[str, Any] = {**names, **asdict(found), "judge": judge}
        if isinstance(found, Comparison):
            record["winner"] = found.winner
        record["said"] = texts[index * each : (index + 1) * each]
        records.append(finite(record))
    write_json_lines(path, records)


def _refuse_unanswered(said: Sequence[Answer | NoAnswer], cfg: JudgeConfig) -> None:
    failed = [answer for answer in said if isinstance(answer, NoAnswer) and not answer.final]
    if failed and cfg.on_unanswered == "raise":
        raise EndpointError(
            f"{len(failed)} of {len(said)} requests got no answer, the first because: {failed[0].reason}. Run the same "
            "command again to ask for these alone, or set --on_unanswered=skip to go on without them"
        )


def _cache(cfg: JudgeConfig) -> Path:
    return Path(cfg.output_dir) / "answers.sqlite"


def _file_name(model_id: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in model_id)
