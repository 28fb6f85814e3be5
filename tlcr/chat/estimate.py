"""Estimates the remaining questions and their cost, without asking any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tlcr.chat.ask import stored
from tlcr.chat.budget import Prices
from tlcr.chat.build import ChatConfig, chat_model, model_name
from tlcr.chat.store import AnswerStore
from tlcr.chat.types import BYTES_PER_TOKEN, Question

__all__ = ["Estimate", "estimate", "rehearsal"]


@dataclass(frozen=True)
class Estimate:
    """The remaining questions, their tokens at four bytes each, and their cost at the prices of the config.

    ``cost_bound`` is their maximum cost with one request each: a cap of that size can stop only retries.
    """

    answered: int
    questions: int
    prompt_tokens: int
    answer_tokens: int
    cut: int
    """Answers that are probably longer than ``max_new_tokens``: they would be paid for and set aside."""
    cost: float | None
    cost_bound: float | None


def estimate(questions: Sequence[Question], lengths: Sequence[int], cfg: ChatConfig, cache: Path) -> Estimate:
    """The estimate for the questions that are not in ``cache``, which need not exist.

    lengths: probable number of tokens of the answer to each question.
    """
    if cache.exists():
        with AnswerStore(cache) as store:
            is_open = [answer is None for answer in stored(chat_model(cfg, store), questions, store)]
    else:
        is_open = [True] * len(questions)
    left = {question: length for question, length, here in zip(questions, lengths, is_open, strict=True) if here}
    prompt_tokens = sum(question.prompt_tokens_estimate for question in left)
    answer_tokens = sum(min(question.max_new_tokens, length) for question, length in left.items())
    prices = Prices.of(cfg.endpoint)
    return Estimate(
        answered=len(questions) - sum(is_open),
        questions=len(left),
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        cut=sum(length > question.max_new_tokens for question, length in left.items()),
        cost=prices.cost(prompt_tokens, answer_tokens) if prices else None,
        cost_bound=prices.cost(sum(q.prompt_tokens_bound for q in left), sum(q.max_new_tokens for q in left))
        if prices
        else None,
    )


def rehearsal(shown: Sequence[tuple[str, Question]], found: Estimate, cfg: ChatConfig, *, what: str) -> list[str]:
    """Text for a dry run: the requests of ``shown``, each under its name, and the totals of all questions.

    what: number and kind of the items, such as "8 pairs".
    """
    parts = []
    for name, question in shown:
        parts.append(f"======== {name}")
        parts += [f"---- {message.role}\n{message.content}" for message in question.messages]
    parts.append(
        f"======== {what}, {found.answered} answered before, {found.questions} questions to {model_name(cfg)}\n"
        f"about {found.prompt_tokens} prompt tokens and {found.answer_tokens} answer tokens, at "
        f"{BYTES_PER_TOKEN} bytes a token"
    )
    if found.cost is not None and found.cost_bound is not None:
        parts.append(f"about {found.cost:.4f} in the currency of your prices, {found.cost_bound:.4f} at most")
    elif cfg.backend == "endpoint":
        parts.append("no cost is known: set the endpoint's prompt_price and answer_price, per million tokens")
    return parts
