"""What revising would ask and cost, without asking anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tlcr.chat import AnswerStore, Question, stored
from tlcr.chat.budget import Prices
from tlcr.chat.types import BYTES_PER_TOKEN
from tlcr.config import ReviserConfig
from tlcr.data.formats import RawPreference
from tlcr.data.reviser.files import content_key
from tlcr.data.reviser.revise import chat_model, questions_of
from tlcr.errors import ConfigError

__all__ = ["Estimate", "dry_run", "estimate"]

REASONING_TOKENS = 150
"""Comparison and reason together, in an estimate of an answer's length; the revision is taken as long as the answer."""


@dataclass(frozen=True)
class Estimate:
    """Questions that are left to ask, their tokens at four bytes each, and what they cost at the prices of the config.

    ``cost_bound`` is what all of them can cost at most, one request each: a cap of that size stops nothing but retries.
    """

    answered: int
    questions: int
    prompt_tokens: int
    answer_tokens: int
    cut: int
    """Answers that are probably longer than ``max_new_tokens``, and so would be paid for and set aside."""
    cost: float | None
    cost_bound: float | None


def estimate(pairs: Sequence[RawPreference], cfg: ReviserConfig, cache: Path) -> Estimate:
    """What is left to ask of a model for these pairs, given what ``cache`` holds (which may not exist)."""
    questions = questions_of(pairs, cfg)
    if cache.exists():
        with AnswerStore(cache) as store:
            open_ = [answer is None for answer in stored(chat_model(cfg, store), questions, store)]
    else:
        open_ = [True] * len(pairs)
    left: dict[Question, RawPreference] = {
        question: pair for question, pair, is_open in zip(questions, pairs, open_, strict=True) if is_open
    }
    prompt_tokens = sum(question.prompt_tokens_estimate for question in left)
    lengths = [REASONING_TOKENS + len(pair.rejected.encode()) // BYTES_PER_TOKEN for pair in left.values()]
    answer_tokens = sum(min(cfg.max_new_tokens, length) for length in lengths)
    prices = Prices.of(cfg.endpoint)
    return Estimate(
        answered=len(pairs) - sum(open_),
        questions=len(left),
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        cut=sum(length > cfg.max_new_tokens for length in lengths),
        cost=prices.cost(prompt_tokens, answer_tokens) if prices else None,
        cost_bound=prices.cost(sum(q.prompt_tokens_bound for q in left), cfg.max_new_tokens * len(left))
        if prices
        else None,
    )


def dry_run(pairs: Sequence[RawPreference], cfg: ReviserConfig, cache: Path, *, show: int) -> str:
    """The first ``show`` requests as text, and what all of them come to. Sends and writes nothing.

    Raises ConfigError for a backend that asks nothing.
    """
    if cfg.backend not in ("endpoint", "local"):
        raise ConfigError(f"reviser.backend is {cfg.backend}, which asks nothing; a dry run is for endpoint and local")
    parts = []
    for pair, question in list(zip(pairs, questions_of(pairs, cfg), strict=True))[:show]:
        parts.append(f"======== {pair.id} ({content_key(pair.prompt, pair.rejected)[:12]})")
        parts += [f"---- {message.role}\n{message.content}" for message in question.messages]
    found = estimate(pairs, cfg, cache)
    name = cfg.endpoint.model if cfg.backend == "endpoint" else cfg.model.path
    parts.append(
        f"======== {len(pairs)} pairs, {found.answered} answered before, {found.questions} questions to {name}\n"
        f"about {found.prompt_tokens} prompt tokens and {found.answer_tokens} answer tokens, at "
        f"{BYTES_PER_TOKEN} bytes a token"
    )
    if found.cost is not None and found.cost_bound is not None:
        parts.append(f"about {found.cost:.4f} in the currency of your prices, {found.cost_bound:.4f} at most")
    elif cfg.backend == "endpoint":
        parts.append("no cost is known: set reviser.endpoint.prompt_price and answer_price, per million tokens")
    if found.cut:
        parts.append(
            f"{found.cut} answers will probably be cut off at {cfg.max_new_tokens} tokens, and set aside; raise "
            "reviser.max_new_tokens"
        )
    if cfg.attempts > 1:
        parts.append(f"up to {cfg.attempts} times that, for revisions that fail the checks (reviser.attempts)")
    return "\n".join(parts) + "\n"
