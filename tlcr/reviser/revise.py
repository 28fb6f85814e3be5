"""The reviser: rejected answers to minimally edited ones, checked, counted and written for the labels to read."""

from __future__ import annotations

import json
import logging
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from tlcr.chat import AnswerStore, Question, ask
from tlcr.chat.build import chat_model
from tlcr.config.schema import DataConfig, ReviserConfig
from tlcr.data.records import TextPreference
from tlcr.errors import ConfigError, DataError, EndpointError
from tlcr.files import atomic_write
from tlcr.reviser.checks import OUTCOMES, CheckedRevision, Outcome, check_answer
from tlcr.reviser.files import match_files
from tlcr.reviser.prompt import VERSION, AnswerFormat, revision_question

__all__ = ["ReviserStatistics", "check_answered", "questions_of", "revise", "write_revisions"]

logger = logging.getLogger("tlcr")


@dataclass(frozen=True)
class ReviserStatistics:
    """What became of all pairs."""

    pairs: int
    outcomes: dict[Outcome, int]
    """Pairs by what became of them; every outcome is there."""
    kept: int
    changed_share_mean: float
    """Mean share of changed words in what is kept, 0 where nothing is."""
    changed_share_median: float
    requests: int
    """Requests that were sent in the life of the cache, and what they cost; 0 where nothing is asked for or paid."""
    cost: float
    template: str

    def summary(self) -> str:
        """One line for people."""
        others = ", ".join(f"{count} {name}" for name, count in self.outcomes.items() if count and name != "revised")
        return (
            f"{self.pairs} pairs, {self.outcomes['revised']} revised ({self.changed_share_median:.0%} of the words "
            f"changed, at the median){'; ' + others if others else ''}"
            + (f"; {self.requests} requests, cost {self.cost:.4f}" if self.requests else "")
        )


def revise(
    pairs: Sequence[TextPreference], cfg: ReviserConfig, data: DataConfig, cache: Path
) -> tuple[list[CheckedRevision], ReviserStatistics]:
    """What becomes of each pair's rejected answer.

    Args:
        pairs: the preferences.
        cfg: who revises, and what counts as a minimal edit.
        data: how files of revisions are read.
        cache: keeps the answers of models. What was answered before, in a run that was killed too, is not asked again.

    Returns:
        The revisions in the order of the pairs, and their statistics.

    Raises:
        ConfigError: ``cfg.backend`` is "none", or the cache is in use.
        DataError: files that match no pair.
        EndpointError: see ``tlcr.chat.endpoint.Endpoint``.
        BudgetExhausted: see ``tlcr.chat.endpoint.Endpoint``. Where ``cfg.on_unanswered`` is "skip", a cap leaves the
            pairs that it stopped unanswered.
    """
    if cfg.backend == "none":
        raise ConfigError(
            "reviser.backend is none; set it to endpoint, local or files, and see docs/reviser.md for what each needs"
        )
    if cfg.backend == "files":
        checked = match_files(pairs, str(cfg.files), data, max_changed=cfg.max_changed)
        return checked, _statistics(checked, cfg, (0, 0.0))
    with AnswerStore(cache) as store:
        model = chat_model(cfg, store)
        checked = [CheckedRevision("unanswered")] * len(pairs)
        waiting = list(range(len(pairs)))
        for attempt in range(cfg.attempts):
            questions = questions_of([pairs[row] for row in waiting], cfg, attempt=attempt)
            label = "revise" if attempt == 0 else f"revise, attempt {attempt + 1}"
            answers = ask(model, questions, store, label=label, past_caps=cfg.on_unanswered)
            for row, answer in zip(waiting, answers, strict=True):
                checked[row] = check_answer(pairs[row], answer, max_changed=cfg.max_changed)
            settled = {*_kept(cfg), "declined", "unanswered"}
            waiting = [row for row in waiting if checked[row].outcome not in settled]
        return checked, _statistics(checked, cfg, store.totals())


def _kept(cfg: ReviserConfig) -> tuple[Outcome, ...]:
    """Outcomes that enter the training data."""
    return ("revised", "unchanged") if cfg.keep_unchanged else ("revised",)


def questions_of(pairs: Sequence[TextPreference], cfg: ReviserConfig, *, attempt: int = 0) -> list[Question]:
    """The request for each pair."""
    return [
        revision_question(
            pair,
            _answer_format(cfg),
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            attempt=attempt,
        )
        for pair in pairs
    ]


def check_answered(checked: Sequence[CheckedRevision], cfg: ReviserConfig) -> None:
    """Raises EndpointError where pairs are unanswered and ``on_unanswered`` is "raise"."""
    unanswered = [found for found in checked if found.outcome == "unanswered"]
    if unanswered and cfg.on_unanswered == "raise":
        raise EndpointError(
            f"{len(unanswered)} of {len(checked)} pairs got no answer, the first because: {unanswered[0].detail}. Run "
            "the same command again ('tlcr run' with --resume) to ask for these alone, or set "
            "reviser.on_unanswered=skip to go on without them"
        )


def write_revisions(
    folder: Path, pairs: Sequence[TextPreference], checked: Sequence[CheckedRevision], cfg: ReviserConfig
) -> Path:
    """Writes ``revisions.jsonl``, which ``read_edits`` reads, and ``set_aside.jsonl``, with the reason for each; and
    returns the path of the first.

    Raises EndpointError where pairs are unanswered and ``on_unanswered`` is "raise", once both files are written, and
    DataError where there is no revision at all.
    """
    path = folder / "revisions.jsonl"
    kept = _kept(cfg)
    with _lines(path) as revisions, _lines(folder / "set_aside.jsonl") as set_aside:
        for pair, found in zip(pairs, checked, strict=True):
            file = revisions if found.outcome in kept else set_aside
            record = {name: value for name, value in asdict(pair).items() if name != "template"}
            file.write(json.dumps({**record, **pair.template, **asdict(found)}, ensure_ascii=False) + "\n")
    counts = Counter(found.outcome for found in checked)
    check_answered(checked, cfg)
    if not any(counts[name] for name in kept):
        why = next((f", one because: {found.detail}" for found in checked if found.detail), "")
        raise DataError(
            f"none of the {len(checked)} answers is a usable revision "
            f"({', '.join(f'{count} {name}' for name, count in counts.items())}{why}); {folder / 'set_aside.jsonl'} "
            "has them with the reasons"
        )
    return path


@contextmanager
def _lines(path: Path) -> Iterator[TextIO]:
    with atomic_write(path) as aside, aside.open("w", encoding="utf-8") as file:
        yield file


def _answer_format(cfg: ReviserConfig) -> AnswerFormat:
    if cfg.answer_format == "auto":
        return "json" if cfg.backend == "endpoint" else "marker"
    return cfg.answer_format


def _statistics(checked: Sequence[CheckedRevision], cfg: ReviserConfig, totals: tuple[int, float]) -> ReviserStatistics:
    counts = Counter(found.outcome for found in checked)
    shares = [found.changed_share or 0.0 for found in checked if found.outcome in _kept(cfg)]
    found = ReviserStatistics(
        pairs=len(checked),
        outcomes={name: counts[name] for name in OUTCOMES},
        kept=len(shares),
        changed_share_mean=statistics.fmean(shares) if shares else 0.0,
        changed_share_median=statistics.median(shares) if shares else 0.0,
        requests=totals[0],
        cost=totals[1],
        template=VERSION,
    )
    logger.info("revisions: %s", found.summary())
    return found
