"""``tlcr score``: prints each token's reward, in colours or as JSON."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import ModelConfig
from tlcr.data.records import RawMarkedAnswer
from tlcr.data.rendering import rendered_marked_answer
from tlcr.data.turns import TurnNotes
from tlcr.errors import ConfigError, DataError, TlcrError
from tlcr.models.discriminator import load_discriminator, score_encoded
from tlcr.models.loading import load_sequence_classifier
from tlcr.models.positions import check_fits
from tlcr.models.reward_model import sequence_scores
from tlcr.models.tokenizers import load_tokenizer
from tlcr.report.colours import coloured
from tlcr.text.files import STANDARD_INPUT, open_text, parse_json, unicode_problem
from tlcr.text.padding import pad_right
from tlcr.text.tokenization import encode_answers
from tlcr.text.truncation import CutTexts
from tlcr.training.distributed import process_device
from tlcr.types import EncodedAnswer, MarkedAnswer

__all__ = ["Answer", "Limits", "ScoredAnswer", "read_answers", "score_command"]

logger = logging.getLogger("tlcr")

LIMITS = ("--max-prompt-tokens", "--max-answer-tokens")
"""The flags of prompts' and answers' limits."""

WANTED = "{'prompt': ..., 'response': ...}"
"""A record, for errors."""

UNREAD = ("system", "history", "tools", "documents", "chat_template_kwargs")
"""Columns that the readers of a run's data give to a model."""


@dataclass(frozen=True)
class Answer:
    """One answer to score. The prompt is plain text, or messages for the tokenizer's chat template."""

    prompt: str | list[dict[str, str]]
    response: str
    unread: tuple[str, ...] = ()
    """Columns of its record that a model may need and that are not read here."""


@dataclass(frozen=True)
class Limits:
    """Length limits of prompt and answer, and the batch size."""

    batch_size: int
    max_prompt_tokens: int
    max_answer_tokens: int


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer with one score, and with a reward in [-1, 1] for each token where a discriminator scored it."""

    answer: Answer
    score: float
    tokens: tuple[str, ...] = ()
    rewards: tuple[float, ...] = ()

    def as_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {"prompt": self.answer.prompt, "response": self.answer.response, "score": self.score}
        if self.tokens:
            record |= {"tokens": list(self.tokens), "rewards": list(self.rewards)}
        return record


def score_command(
    *,
    file: str | None,
    prompt: str,
    response: str | None,
    discriminator: str | None,
    reward_model: str | None,
    as_json: bool,
    limits: Limits,
) -> None:
    """Read the answers, score them in batches as they come, and write each one out."""
    if (discriminator is None) == (reward_model is None):
        raise ConfigError("name one model to score with: --discriminator FOLDER or --reward-model FOLDER")
    if response is not None and file is not None:
        raise ConfigError(f"both FILE {file} and --response are given; give one of them")
    if response is None and prompt:
        raise ConfigError("--prompt is given without --response; add it, or put both into a file")
    if response is None and file is None and sys.stdin.isatty():
        raise ConfigError("nothing to score; give --response TEXT, a FILE, or JSON lines on standard input")
    answers: Iterable[Answer] = (
        [Answer(prompt, response)] if response is not None else read_answers(file or STANDARD_INPUT)
    )
    if discriminator is not None:
        scored = _by_discriminator(discriminator, answers, limits)
    else:
        scored = _by_reward_model(str(reward_model), answers, limits)
    console = Console(highlight=False, soft_wrap=True)
    for item in scored:
        if not math.isfinite(item.score):
            raise DataError(
                f"{(discriminator or reward_model)!r} gives the answer {item.answer.response[:80]!r} the score "
                f"{item.score}; its weights hold numbers that are not finite, or are too large to compute with"
            )
        if as_json:
            sys.stdout.write(json.dumps(item.as_json(), ensure_ascii=False) + "\n")
            sys.stdout.flush()
        else:
            _show(item, console)


def read_answers(file: str) -> Iterator[Answer]:
    """The records of a JSONL file, or of standard input for "-". Raises DataError with the line of a bad one, or where
    there is none."""
    where, empty = "standard input" if file == STANDARD_INPUT else file, True
    with open_text(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                empty = False
                yield _answer(line, f"{where}:{number}")
    if empty:
        raise DataError(f"{where} has no records; wanted one object a line, {WANTED}")


def _answer(line: str, where: str) -> Answer:
    try:
        record = parse_json(line)
    except json.JSONDecodeError as error:  # the line in its text is that of a single line, always 1
        raise DataError(f"{where}: not JSON ({error.msg}, column {error.colno}); wanted one object a line") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); wanted one object a line") from error
    if not isinstance(record, dict) or not isinstance(record.get("response"), str):
        raise DataError(f"{where}: no text under 'response'; wanted {WANTED}")
    if "prompt" not in record:
        raise DataError(f"{where}: no 'prompt'; wanted {WANTED}, with '' for a text without a prompt")
    prompt, response = record["prompt"], record["response"]
    if not isinstance(prompt, str) and not _are_messages(prompt):
        raise DataError(f"{where}: 'prompt' is neither text nor a list of {{'role', 'content'}} messages")
    for name, value in (("prompt", prompt), ("response", response)):
        if problem := unicode_problem(value):
            raise DataError(f"{where}: {name!r} {problem}; mend the program that cut the text, or leave the record out")
    return Answer(prompt, response, tuple(name for name in UNREAD if record.get(name)))


def _are_messages(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in prompt
    )


def _batches(
    answers: Iterable[Answer], limits: Limits, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[Answer], list[EncodedAnswer]]]:
    """Answers as given and as the model's tokens, rendered as in its training data; what was put right is logged.

    An answer that cannot be read, or that is too long for the model, ends them, after those before it.
    """
    turns = TurnNotes(tokenizer)
    read = turns.counting(rendered_marked_answer)
    iterator = iter(answers)
    count, unread = 0, Counter[str]()
    error: TlcrError | None = None
    while error is None:
        batch: list[Answer] = []
        rendered: list[MarkedAnswer] = []
        try:
            for answer in islice(iterator, limits.batch_size):
                rendered.append(read(RawMarkedAnswer("", answer.prompt, answer.response, ())))
                batch.append(answer)
        except TlcrError as caught:
            error = caught
        encoded = _encode(tokenizer, rendered, limits)
        fitting = 0
        try:
            for answer, row in zip(batch, encoded, strict=True):
                check_fits(model, len(row.ids), f"the answer {answer.response[:80]!r} with its prompt", LIMITS)
                fitting += 1
        except TlcrError as caught:
            error = caught
        if fitting == 0:
            break
        count += fitting
        unread.update(name for answer in batch[:fitting] for name in answer.unread)
        yield batch[:fitting], encoded[:fitting]
    for note in turns.notes():
        logger.warning("%s", note)
    for name, having in unread.items():
        logger.warning(
            "%d of %d records have %r, which tlcr score does not read: the model did not see it; write what it should "
            "see into 'prompt'",
            having,
            count,
            name,
        )
    if error is not None:
        raise error


def _by_discriminator(folder: str, answers: Iterable[Answer], limits: Limits) -> Iterator[ScoredAnswer]:
    model, tokenizer = load_discriminator(folder, ModelConfig(path=folder), device=process_device())
    cuts = CutTexts(limits, names=LIMITS)
    for batch, encoded in _batches(answers, limits, model, tokenizer):
        scores = score_encoded(model, tokenizer, encoded, batch_size=limits.batch_size)
        for answer, score in zip(batch, scores, strict=True):
            cuts.add(_shown_prompt(answer), score)
            yield ScoredAnswer(answer, score.mean_reward, score.pieces, score.rewards)
    cuts.report("score")


def _by_reward_model(folder: str, answers: Iterable[Answer], limits: Limits) -> Iterator[ScoredAnswer]:
    cfg = ModelConfig(path=folder)
    model, tokenizer = load_sequence_classifier(folder, cfg, device=process_device()), load_tokenizer(cfg)
    cuts = CutTexts(limits, names=LIMITS)
    for batch, encoded in _batches(answers, limits, model, tokenizer):
        ids_BL, mask_BL = pad_right([row.ids for row in encoded], tokenizer.pad_token_id)
        scores_B = sequence_scores(model, ids_BL.to(model.device), mask_BL.to(model.device))
        for answer, row, score in zip(batch, encoded, scores_B.tolist(), strict=True):
            cuts.add(_shown_prompt(answer), row)
            yield ScoredAnswer(answer, score)
    cuts.report("score")


def _encode(tokenizer: PreTrainedTokenizerBase, batch: Sequence[MarkedAnswer], limits: Limits) -> list[EncodedAnswer]:
    return encode_answers(
        tokenizer,
        [answer.prompt for answer in batch],
        [answer.response for answer in batch],
        max_prompt_tokens=limits.max_prompt_tokens,
        max_answer_tokens=limits.max_answer_tokens,
    )


def _shown_prompt(answer: Answer) -> str:
    prompt = answer.prompt
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _show(item: ScoredAnswer, console: Console) -> None:
    shown = _shown_prompt(item.answer)
    if shown:
        console.print(f"[dim]{escape(shown)}[/dim]")
    if not item.tokens:
        console.print(f"{escape(item.answer.response)}\n[bold]score {item.score:+.3f}[/bold]\n")
        return
    console.print(coloured(item.tokens, item.rewards))
    worst, best = (pick(range(len(item.tokens)), key=item.rewards.__getitem__) for pick in (min, max))
    console.print(
        f"[bold]mean {item.score:+.3f}[/bold] over {len(item.tokens)} tokens; "
        f"lowest {item.rewards[worst]:+.2f} {escape(repr(item.tokens[worst]))}, "
        f"highest {item.rewards[best]:+.2f} {escape(repr(item.tokens[best]))}\n"
    )
