"""A game of two turns in the embedded language: a user who asks again, about what the answer was worth least for.

config.yaml names both functions. The environment is `ask_again`; `score` is the gold of the whole conversation.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tlcr.data.embedded.gold import gold
from tlcr.data.embedded.language import ASSISTANT, OPENERS, TAILS, USER, lexicon


def ask_again(*, prompts: list[str], turns: list[list[str]]) -> list[str | None]:
    """The user's second question; none after the second answer, nor after an answer without a word.

    Its topic lies in the domain in which the first answer would have earned least. The rest of it is drawn by the text
    of the conversation, so that the same answer always gets the same question.

    Args:
        prompts: the first questions.
        turns: what was said since, in turns.

    Returns:
        What stands between the two answers.
    """
    return [
        _question(prompt, texts[0]) if len(texts) == 1 and texts[0].split() else None
        for prompt, texts in zip(prompts, turns, strict=True)
    ]


def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The gold of both answers together, each to its own question.

    Args:
        prompts: the first questions.
        responses: first answer, second question and second answer, as one text.

    Returns:
        One number for each conversation.
    """
    return [sum(gold_of_turns(prompt, response)) for prompt, response in zip(prompts, responses, strict=True)]


def gold_of_turns(prompt: str, response: str) -> list[float]:
    """The gold of the first answer, and of the second where there is one."""
    place = response.find("\n" + USER)
    while place >= 0:
        first, rest = response[:place], response[place:]
        question = _question(prompt, first)
        if rest.startswith(question):  # and not words of the policy that look like a question
            return [gold(prompt, first).total, gold(question, rest.removeprefix(question)).total]
        place = response.find("\n" + USER, place + 1)
    return [gold(prompt, response).total]


def _question(prompt: str, answer: str) -> str:
    words, rng = lexicon(), random.Random(f"{prompt} {answer}")
    by_domain: dict[int, list[str]] = {}
    for topic, domain in words.topics.items():
        by_domain.setdefault(domain, []).append(topic)

    def asked(topic: str) -> str:
        return f"\n{USER}{' '.join((opener, topic, aspect, tail))}?{ASSISTANT}"

    opener, aspect, tail = rng.choice(OPENERS), rng.choice(words.aspects), rng.choice(TAILS)
    worst = min(by_domain, key=lambda domain: gold(asked(by_domain[domain][0]), answer).total)
    return asked(rng.choice(by_domain[worst]))
