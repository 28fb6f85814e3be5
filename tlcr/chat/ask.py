"""Asks questions: a question whose answer is in the store is not asked again, and equal questions are asked once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from tlcr.chat.store import AnswerStore
from tlcr.chat.types import Answer, ChatModel, NoAnswer, Question
from tlcr.errors import BudgetExhausted
from tlcr.training.progress import Progress

__all__ = ["ask", "stored"]

logger = logging.getLogger("tlcr")


def ask(
    model: ChatModel,
    questions: Sequence[Question],
    store: AnswerStore,
    *,
    label: str,
    past_caps: Literal["raise", "skip"] = "raise",
) -> list[Answer | NoAnswer]:
    """The answer to each question, from the store or from the model, with a progress bar named ``label``.

    The bar shows the time left and, where prices are known, the cost so far and an estimate of the remaining cost.
    Raises what ``model.answer_all`` raises; a second call continues where the first stopped. With ``past_caps``
    "skip", a reached cap is not an error: the remaining questions get no answer.
    """
    keys = [question.key(model.identity) for question in questions]
    before = dict(zip(keys, stored(model, questions, store), strict=True))
    found: dict[str, Answer | NoAnswer] = {key: answer for key, answer in before.items() if answer is not None}
    missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in found}
    if missing:
        waiting, first, spent = list(missing), len(found), model.spent
        with Progress(label, total=len(before), done=first) as progress:

            def hear(index: int, answer: Answer | NoAnswer) -> None:
                found[waiting[index]] = answer
                progress.on_step(len(found), _figures(model.spent, spent, len(found) - first, len(waiting)))

            try:
                model.answer_all(list(missing.values()), hear)
            except BudgetExhausted as error:
                if past_caps == "raise":
                    raise
                logger.warning("%s", error)
                return [found.get(key, NoAnswer(str(error), final=False)) for key in keys]
    return [found[key] for key in keys]


def stored(model: ChatModel, questions: Sequence[Question], store: AnswerStore) -> list[Answer | None]:
    """The stored answer to each question; None where there is none. Asks nothing."""
    return [store.get(question.key(model.identity)) for question in questions]


def _figures(spent: float | None, before: float | None, done: int, asked: int) -> dict[str, float]:
    if spent is None or before is None:
        return {}
    return {"spent": spent, "to_spend": (spent - before) / done * (asked - done)}
