"""A model's answers to the prompts of a benchmark, turn by turn, written as the benchmark's own tool reads them."""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tlcr.chat import Answer, AnswerStore, ChatModel, Message, NoAnswer, Question, ask
from tlcr.chat.build import chat_model, model_name
from tlcr.config.judging import AnswerConfig
from tlcr.errors import ConfigError, DataError, EndpointError
from tlcr.files import write_json
from tlcr.judging.formats import (
    Benchmark,
    BenchmarkName,
    BenchmarkQuestion,
    read_benchmark,
    write_alpaca_eval,
    write_fastchat,
)
from tlcr.text.files import parse_json, read_text

__all__ = ["AnswerStatistics", "answer_benchmark", "answer_command", "temperature_of"]

logger = logging.getLogger("tlcr")

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""By category, in MT-Bench and Vicuna alike; source: FastChat, ``llm_judge/common.py``, ``temperature_config``."""
OTHER_TEMPERATURE = 0.7
"""Of other categories (FastChat, ``gen_model_answer.py``), and of AlpacaEval (its configs of models run here)."""
MAX_NEW_TOKENS: dict[BenchmarkName, int] = {"alpaca_eval": 2048, "mt_bench": 1024, "vicuna": 1024}
"""Sources: the same two files, and alpaca_eval's ``models_configs`` (of alpaca-7b, llama-2-7b-chat-hf, vicuna-7b)."""


@dataclass(frozen=True)
class AnswerStatistics:
    """What became of all answers, turns counted one by one."""

    model_id: str
    benchmark: BenchmarkName
    questions: int
    answers: int
    cut: int
    """Answers that the length limit cut off; they are in the files as far as they go."""
    empty: int
    """Answers without a text, those that were not to be had among them; they are in the files as empty texts."""
    declined: int
    """Answers that were not to be had: no room in the model's context, a content filter, or no first turn."""
    refused: int
    """Answers that the server marked as a refusal; their text is in the files."""
    tokens_mean: float | None
    """Tokens of an answer, where the model counts them."""

    def summary(self) -> str:
        """One line for people."""
        parts = [f"{self.questions} questions, {self.answers} answers of {self.model_id}"]
        if self.tokens_mean is not None:
            parts.append(f"{self.tokens_mean:.0f} tokens on average")
        parts += [f"{getattr(self, name)} {name}" for name in ("cut", "empty", "declined", "refused")]
        return ", ".join(parts)


def temperature_of(question: BenchmarkQuestion, benchmark: BenchmarkName, chosen: float | None) -> float:
    """``chosen``, or the benchmark's own where that is None."""
    if chosen is not None:
        return chosen
    return OTHER_TEMPERATURE if benchmark == "alpaca_eval" else TEMPERATURES.get(question.category, OTHER_TEMPERATURE)


def answer_benchmark(
    benchmark: Benchmark, cfg: AnswerConfig, model: ChatModel, store: AnswerStore
) -> list[list[Answer | NoAnswer]]:
    """For each question, the model's answer to each turn. What is in ``store`` is not asked again.

    A later turn sees the texts of the earlier ones, without white space around them, as FastChat has it. Where a turn
    got no answer, later ones are not asked.
    """
    answers: list[list[Answer | NoAnswer]] = [[] for _ in benchmark.questions]
    turns = max(len(question.turns) for question in benchmark.questions)
    for turn in range(turns):
        rows = [
            row
            for row, question in enumerate(benchmark.questions)
            if turn < len(question.turns) and all(isinstance(answer, Answer) for answer in answers[row])
        ]
        questions = [_chat_question(benchmark, benchmark.questions[row], answers[row], cfg) for row in rows]
        label = f"answer {benchmark.name}" + (f", turn {turn + 1}" if turns > 1 else "")
        for row, answer in zip(rows, ask(model, questions, store, label=label), strict=True):
            answers[row].append(answer)
    for question, given in zip(benchmark.questions, answers, strict=True):
        given += [NoAnswer("an earlier turn got no answer", final=True)] * (len(question.turns) - len(given))
    return answers


def _chat_question(
    benchmark: Benchmark, question: BenchmarkQuestion, before: Sequence[Answer | NoAnswer], cfg: AnswerConfig
) -> Question:
    messages = []
    for turn, text in enumerate(question.turns[: len(before) + 1]):
        messages.append(Message("user", text))
        if turn < len(before):
            messages.append(Message("assistant", _text_of(before[turn])))
    return Question(
        messages=tuple(messages),
        max_new_tokens=cfg.max_new_tokens or MAX_NEW_TOKENS[benchmark.name],
        temperature=temperature_of(question, benchmark.name, cfg.temperature),
        top_p=cfg.top_p,
        attempt=cfg.seed,
    )


def _text_of(answer: Answer | NoAnswer) -> str:
    return answer.text.strip() if isinstance(answer, Answer) else ""


def answer_command(cfg: AnswerConfig) -> Path:
    """``tlcr answer``: asks, writes the file for the benchmark's tool and ``statistics`` beside it, returns its path.

    Raises EndpointError, with everything else kept for the next call, where requests failed through all retries.
    """
    if cfg.prompts is None:
        raise ConfigError("there are no prompts to answer; name the benchmark's file with --prompts")
    benchmark = read_benchmark(cfg.prompts, cfg.format)
    benchmark = replace(benchmark, questions=benchmark.questions[: cfg.limit])
    model_id = cfg.model_id or _name_of_a_model(model_name(cfg))
    if not model_id or "/" in model_id or model_id.startswith("."):
        given = f"--model_id is {model_id!r}" if cfg.model_id else f"{model_name(cfg)!r} gives no name; set --model_id"
        raise ConfigError(f"{given}; it names a file: use letters, digits, '.', '_' and '-'")
    path, statistics_path = _paths(Path(cfg.output_dir), benchmark.name, model_id)
    _refuse_another_model(path, statistics_path, model_name(cfg))
    with AnswerStore(Path(cfg.output_dir) / "cache" / f"{benchmark.name}-{model_id}.sqlite") as store:
        answers = answer_benchmark(benchmark, cfg, chat_model(cfg, store), store)
    failed = [answer for given in answers for answer in given if isinstance(answer, NoAnswer) and not answer.final]
    if failed:
        raise EndpointError(
            f"{len(failed)} prompts got no answer, the first because: {failed[0].reason}. Run the same command again "
            "to ask for these alone"
        )
    outputs = [[_text_of(answer) for answer in given] for given in answers]
    if benchmark.name == "alpaca_eval":
        write_alpaca_eval(path, benchmark.questions, outputs, model_id)
    else:
        write_fastchat(path, benchmark.questions, outputs, model_id)
    found = _statistics(model_id, benchmark, answers)
    write_json(statistics_path, asdict(found) | {"settings": _settings(cfg, benchmark)})
    logger.info("%s", found.summary())
    if found.cut:
        limit = cfg.max_new_tokens or MAX_NEW_TOKENS[benchmark.name]
        logger.warning("%d answers were cut off at %d tokens; raise --max_new_tokens", found.cut, limit)
    logger.info("wrote %s", path)
    return path


def _name_of_a_model(path: str) -> str:
    """The last part of a name, or of a folder however it is written."""
    return Path(os.path.abspath(path) if Path(path).is_dir() else path).name


def _paths(output_dir: Path, benchmark: BenchmarkName, model_id: str) -> tuple[Path, Path]:
    """Of the answers and of their statistics; FastChat takes every .jsonl of its folder for a model's answers."""
    if benchmark == "alpaca_eval":
        folder = output_dir / "alpaca_eval" / model_id
        return folder / "model_outputs.json", folder / "statistics.json"
    folder = output_dir / "data" / {"mt_bench": "mt_bench", "vicuna": "vicuna_bench"}[benchmark]
    return folder / "model_answer" / f"{model_id}.jsonl", folder / "statistics" / f"{model_id}.json"


def _refuse_another_model(path: Path, statistics_path: Path, model: str) -> None:
    """Many models have a folder of the same name: that of every policy is called "policy"."""
    if not statistics_path.exists():
        return
    try:
        before = Path(parse_json(read_text(statistics_path))["settings"]["model"])
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{statistics_path} is not what tlcr answer writes ({error!r}); delete it") from error
    if before.resolve() != Path(model).resolve():  # one folder may be written in several ways
        raise ConfigError(
            f"{path} holds answers of {before}, and those of {model} would replace them; name this model with "
            "--model_id, or another --output_dir"
        )


def _settings(cfg: AnswerConfig, benchmark: Benchmark) -> dict[str, object]:
    temperatures = {
        question.category: temperature_of(question, benchmark.name, cfg.temperature) for question in benchmark.questions
    }
    return {
        "model": model_name(cfg),
        "temperature": temperatures,
        "top_p": cfg.top_p,
        "max_new_tokens": cfg.max_new_tokens or MAX_NEW_TOKENS[benchmark.name],
        "seed": cfg.seed,
    }


def _statistics(
    model_id: str, benchmark: Benchmark, answers: Sequence[Sequence[Answer | NoAnswer]]
) -> AnswerStatistics:
    every = [answer for given in answers for answer in given]
    given = [answer for answer in every if isinstance(answer, Answer)]
    lengths = [answer.answer_tokens for answer in given if answer.answer_tokens is not None]
    return AnswerStatistics(
        model_id=model_id,
        benchmark=benchmark.name,
        questions=len(benchmark.questions),
        answers=len(every),
        cut=sum(answer.finish == "length" for answer in given),
        empty=sum(not _text_of(answer) for answer in every),
        declined=len(every) - len(given),
        refused=sum(answer.finish == "refusal" for answer in given),
        tokens_mean=statistics.fmean(lengths) if lengths else None,
    )
