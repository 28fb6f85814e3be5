"""The gold scorer of the embedded task: the value of an answer, word by word. Training never sees it.

The value of word i of an answer, whose topic lies in domain d, is

    g_i = s_i * v(word_i, d) - late_i

v is the lexicon's graded value (0 for function words and negators, UNKNOWN_VALUE for what is no word of the language);
s_i is -1 where an odd number of negators stands before the word in its clause with no content word in between, else 1;
late_i = LATE_COST * max(0, i + 1 - w) with i counted from 0: words beyond the w-th cost more and more. w is
USUAL_WORDS, 20, unless the prompt asks for another number of words, and then the cost rises by LATE_COST * 20 / w a
word.

The score of an answer is the sum of its g_i. Stopping at once earns 0, far less than a good answer; a word whose value
is x has a positive gold only up to the (w + x / LATE_COST)-th word, so that endless answers score low too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tlcr.data.embedded.language import USUAL_WORDS, domain_of, lexicon, words_of
from tlcr.errors import DataError

LATE_COST = 0.08
UNKNOWN_VALUE = -0.5

ITEM = re.compile(r"[^\s.,]+|[.,]")
WordKind = Literal["content", "function", "negator", "unknown"]


@dataclass(frozen=True)
class GoldWord:
    """One word of an answer: its position ([start, end) in characters) and its value there."""

    text: str
    start: int
    end: int
    kind: WordKind
    negated: bool
    value: float
    """s * v: the value in context, without the cost of coming late."""
    late: float
    """The cost of coming late, 0 or more."""

    @property
    def gold(self) -> float:
        return self.value - self.late


@dataclass(frozen=True)
class GoldScore:
    """The gold of an answer: the sum over its words, and the words."""

    total: float
    words: tuple[GoldWord, ...]

    @property
    def per_word(self) -> float:
        """Mean gold of a word; 0 for an empty answer."""
        return self.total / len(self.words) if self.words else 0.0


def gold(prompt: str, response: str) -> GoldScore:
    """Score one answer. Raises DataError where the prompt names no topic of the language."""
    words = lexicon()
    domain, window = domain_of(prompt), words_of(prompt)
    late_cost = LATE_COST * (USUAL_WORDS / window)
    function_words, negators = words.function_words, frozenset(words.negators)
    # A connective begins a clause, as a punctuation mark does; negation ends at both.
    boundaries = frozenset(words.connectives) | {".", ","}
    scored: list[GoldWord] = []
    negated = False
    for match in ITEM.finditer(response):
        text = match.group()
        if text in boundaries:
            negated = False
        if text in ".,":
            continue
        kind: WordKind = "function"
        value, flipped = 0.0, False
        if text in words.content:
            kind, flipped = "content", negated
            value = words.content[text].values[domain] * (-1 if negated else 1)
            negated = False
        elif text in negators:
            kind = "negator"
            negated = not negated
        elif text not in function_words:
            kind, value = "unknown", UNKNOWN_VALUE
        late = late_cost * max(0, len(scored) + 1 - window)
        scored.append(GoldWord(text, match.start(), match.end(), kind, flipped, value, late))
    return GoldScore(sum(word.gold for word in scored), tuple(scored))


def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The embedded task's own scorer, `EvaluationConfig.scorer`: the total of each answer.

    Raises DataError where the two lists differ in length, or a prompt names no topic of the language.
    """
    if len(prompts) != len(responses):
        raise DataError(f"{len(prompts)} prompts came with {len(responses)} responses; give one response a prompt")
    return [gold(prompt, response).total for prompt, response in zip(prompts, responses, strict=True)]
