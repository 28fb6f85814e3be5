"""A simulated reviser: it makes minimal edits, more often to worse words, and not always correct ones.

The worse a word, the more often it is edited. So the frequencies of edits carry graded values, which no single edit
shows: a continuous reward can recover them, a thresholded one cannot.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from tlcr.data.embedded.gold import ITEM, GoldWord, gold
from tlcr.data.embedded.language import CATEGORIES, USUAL_WORDS, domain_of, lexicon, render, words_of

EDIT_RATE = 0.95
"""A word of value -b is edited with probability EDIT_RATE * b."""
MISTAKE_RATE = 0.02
"""A word that is not bad is edited with this probability."""
TASTE = 0.3
"""A replacement is drawn with weight exp(value / TASTE)."""
TRIM_RATE = 0.1
"""For every word beyond those that are asked for, the probability that the reviser cuts the answer rises by this; where
another number than the usual one is asked for, by proportionally more or less."""
EXTEND_BELOW = 12
"""An answer with fewer words, or this share of those that are asked for, may be extended by a clause ..."""
EXTEND_RATE = 0.5
"""... with this probability."""


@cache
def _replacements(category: str, domain: int, negated: bool) -> tuple[tuple[str, ...], tuple[float, ...]]:
    words = lexicon().by_category[category]
    sign = -1 if negated else 1
    weights = [round(math.exp(sign * lexicon().content[word].values[domain] / TASTE), 6) for word in words]
    return words, tuple(accumulate(weights))


def better_word(category: str, domain: int, negated: bool, rng: random.Random) -> str:
    """A word of a category; better words are more probable."""
    words, cumulative = _replacements(category, domain, negated)
    return rng.choices(words, cum_weights=cumulative)[0]


def edit_probability(word: GoldWord) -> float:
    """The probability that the reviser edits a word."""
    if word.kind in ("function", "negator"):
        return 0.0
    if word.value < 0:
        return max(MISTAKE_RATE, -EDIT_RATE * word.value)
    return MISTAKE_RATE


@dataclass
class _Item:
    """A word or mark during a revision; text None is deleted, `before` is inserted in front."""

    text: str | None
    before: str | None = None


def revise(prompt: str, response: str, rng: random.Random) -> str:
    """Edit an answer: replace, delete or negate bad words, remove or move a negator, cut or extend the end."""
    words = lexicon()
    domain = domain_of(prompt)
    scored = gold(prompt, response).words
    starts = [match.start() for match in ITEM.finditer(response)]
    items = {start: _Item(match.group()) for start, match in zip(starts, ITEM.finditer(response), strict=True)}
    last_negator: GoldWord | None = None
    for index, word in enumerate(scored):
        if word.kind == "negator":
            last_negator = word
        if rng.random() >= edit_probability(word):
            continue
        item = items[word.start]
        if word.kind == "unknown":
            item.text = better_word(rng.choice(CATEGORIES), domain, False, rng)
        elif word.negated and rng.random() < 0.25:
            assert last_negator is not None  # negated implies an earlier negator
            items[last_negator.start].text = None
            later = next(
                (w for w in scored[index + 1 :] if w.kind == "content" and not w.negated and w.value < 0), None
            )
            if later is not None and rng.random() < 0.3:
                items[later.start].before = rng.choice(words.negators)
        else:
            category = words.content[word.text].category
            choice = rng.random()
            if choice < 0.75 or word.value >= 0:
                item.text = better_word(category, domain, word.negated, rng)
            elif choice < 0.9 or word.negated:
                item.text = None
                if word.negated and last_negator is not None:
                    items[last_negator.start].text = None
            else:
                item.before = rng.choice(words.negators)
    revised = [text for start in starts for text in (items[start].before, items[start].text) if text is not None]
    changed = _change_end(revised, domain, words_of(prompt), rng)
    # white space that a policy wrote in its own way is no edit
    return response if changed == ITEM.findall(response) else render(changed)


def _change_end(items: list[str], domain: int, window: int, rng: random.Random) -> list[str]:
    """Cut a long answer at the end of a clause inside the window, or extend a short one by a clause."""
    words, longer = lexicon(), window / USUAL_WORDS
    count = sum(item not in ".," for item in items)
    if rng.random() < TRIM_RATE * (count - window) / longer:
        kept, last_end = 0, 0
        for position, item in enumerate(items):
            kept += item not in ".,"
            if item in ".," and kept <= window:
                last_end = position
        if last_end:
            return [*items[:last_end], "."]
    elif count < EXTEND_BELOW * longer and rng.random() < EXTEND_RATE:
        noun, adjective = (better_word(category, domain, False, rng) for category in ("noun", "adjective"))
        return [*items, rng.choice(words.determiners), noun, rng.choice(words.copulas), adjective, "."]
    return items
