"""A small dialogue language: its words, their values in each context, and the distribution of answers.

The language is fixed (it does not depend on any seed); seeds choose the texts. A user turn asks about a topic, and
every topic belongs to one of three domains. An answer is a sequence of clauses of function words, fillers and content
words.
Content words carry a graded value that depends on the domain of the topic and on negation.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Literal

from tlcr.errors import ConfigError, DataError

LANGUAGE_SEED = 16574
DOMAINS = 3
TOPICS_PER_DOMAIN = 6
CONTENT_PER_CATEGORY = 45
TOPICAL_SHARE = 0.4
"""Share of content words whose value depends on the topic's domain."""
CATEGORIES = ("adjective", "verb", "noun")
Category = Literal["adjective", "verb", "noun"]

USUAL_WORDS = 20
"""Words of an answer before each further one costs, where a prompt names no other number."""
FIRST_WORDS = 8
"""Answers of the base distribution have a target length from this ..."""
LAST_WORDS = 32
"""... to this, in words, most often LIKELY_WORDS; for other lengths than the usual one all three are scaled."""
LIKELY_WORDS = 13
MISSPELT_SHARE = 0.02
"""Share of content words that a speaker misspells."""
NEGATED_SHARE = 0.3
"""Share of the places for a negator that have one."""
FRIEND_SHARE = 0.35
"""Share of content words that are a favourite follower of the content word before."""
HOME_WEIGHT = 3.0
"""How much more often a word is said about its home domain than about another."""
MOOD_TILT = 0.8
"""Every clause has a mood: a word's weight is multiplied by exp(mood * tilt * value), mood one of -2 ... 2.

It teaches a language model value and negation. A mood for the whole answer would be too easy to learn.
"""
MOODS = (-2, -1, 0, 1, 2)

ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
VOWELS = ("a", "e", "i", "o", "u")

OPENERS = ("tell me about", "what of", "say something about", "how is", "is there news of", "please describe")
TAILS = ("today", "in the north", "for a friend", "in winter", "at night", "after the feast", "by the sea", "for once")

USER = "User: "
ASSISTANT = "\nAssistant:"
ASKED_WORDS = re.compile(r" in (\d+) words\?")


@dataclass(frozen=True)
class ContentWord:
    """A word with a value in each domain, and its favourite followers in each category."""

    text: str
    category: Category
    home: int | None
    """Its home domain; None for a word with the same value in all domains."""
    values: tuple[float, ...]
    """Its value in each domain, without negation: strong .7 to 1, mild .05 to .3, or 0, of either sign."""
    friends: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Lexicon:
    """All words of the language."""

    content: dict[str, ContentWord]
    by_category: dict[str, tuple[str, ...]]
    pronouns: tuple[str, ...]
    determiners: tuple[str, ...]
    copulas: tuple[str, ...]
    connectives: tuple[str, ...]
    fillers: tuple[str, ...]
    negators: tuple[str, ...]
    topics: dict[str, int]
    """Topic to domain."""
    aspects: tuple[str, ...]
    """Neutral words of the user, between topic and tail."""

    @property
    def function_words(self) -> frozenset[str]:
        return frozenset(self.pronouns + self.determiners + self.copulas + self.connectives + self.fillers)


def _syllables(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(count))


def _graded_value(rng: random.Random) -> float:
    """Strong (.7 to 1) for half of the words, mild (.05 to .3) for three tenths, of either sign, and 0 for the rest."""
    kind = rng.random()
    if kind < 0.2:
        return 0.0
    size = rng.uniform(0.7, 1.0) if kind < 0.7 else rng.uniform(0.05, 0.3)
    return round(rng.choice((size, -size)), 2)


@cache
def lexicon() -> Lexicon:
    """The words of the language, the same in every process and version of Python."""
    rng = random.Random(LANGUAGE_SEED)
    taken: set[str] = set(" ".join(OPENERS + TAILS).split())

    def new_word(lengths: Sequence[int]) -> str:
        while True:
            word = _syllables(rng, rng.choice(lengths))
            if word not in taken and len(word) > 1:
                taken.add(word)
                return word

    def new_words(count: int, lengths: Sequence[int]) -> tuple[str, ...]:
        return tuple(new_word(lengths) for _ in range(count))

    pronouns, determiners, copulas = new_words(5, (1,)), new_words(4, (1,)), new_words(2, (1,))
    connectives, fillers, negators = new_words(5, (1, 2)), new_words(8, (2,)), new_words(2, (1,))
    topics = {new_word((2,)): domain for domain in range(DOMAINS) for _ in range(TOPICS_PER_DOMAIN)}
    aspects = new_words(16, (2,))
    by_category = {category: new_words(CONTENT_PER_CATEGORY, (2, 2, 2, 3)) for category in CATEGORIES}
    content = {}
    for category, words in by_category.items():
        for word in words:
            value = _graded_value(rng)
            home = rng.randrange(DOMAINS) if rng.random() < TOPICAL_SHARE else None
            # Outside its home domain a word has value 0 or the opposite value.
            away = rng.choice((0.0, 0.0 - value))
            values = tuple(value if home in (None, domain) else away for domain in range(DOMAINS))
            friends = {kind: tuple(rng.sample(by_category[kind], 6)) for kind in CATEGORIES}
            content[word] = ContentWord(word, category, home, values, friends)  # type: ignore[arg-type]
    return Lexicon(
        content, by_category, pronouns, determiners, copulas, connectives, fillers, negators, topics, aspects
    )


@cache
def content_weights(category: str, domain: int, mood: int, negated: bool) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The words of a category with cumulative weights, for a speaker in a mood about a domain.

    Under a negator the mood is reversed: a speaker in a good mood negates bad words.
    """
    # Weights are rounded, so that a different last bit of exp on another machine cannot change the text.
    words = lexicon().by_category[category]
    weights = []
    for word in words:
        entry = lexicon().content[word]
        home = HOME_WEIGHT if entry.home == domain else 1.0
        weights.append(
            round(home * 2.718281828 ** ((-mood if negated else mood) * MOOD_TILT * entry.values[domain]), 6)
        )
    return words, tuple(accumulate(weights))


def misspell(word: str, rng: random.Random) -> str:
    """Change one vowel, so that the result is no word of the language."""
    known = known_words()
    places = [i for i, letter in enumerate(word) if letter in VOWELS]
    while True:
        place = rng.choice(places)
        wrong = word[:place] + rng.choice(VOWELS) + word[place + 1 :]
        if wrong not in known:
            return wrong
        if all(word[:i] + v + word[i + 1 :] in known for i in places for v in VOWELS):
            return word + "x"


@cache
def known_words() -> frozenset[str]:
    """Every word of the language that may stand in an answer."""
    words = lexicon()
    return words.function_words | frozenset(words.content) | frozenset(words.negators)


def _clause(rng: random.Random, domain: int, mood: int, previous: str | None) -> Iterator[str]:
    """One clause: pronoun verb determiner noun, noun verb, noun copula adjective, or filler pronoun verb adjective."""
    words = lexicon()
    negated = False

    def say(category: str) -> str:
        nonlocal previous, negated
        if previous is not None and rng.random() < FRIEND_SHARE:
            word = rng.choice(words.content[previous].friends[category])
        else:
            options, cumulative = content_weights(category, domain, mood, negated)
            word = rng.choices(options, cum_weights=cumulative)[0]
        previous, negated = word, False
        return misspell(word, rng) if rng.random() < MISSPELT_SHARE else word

    def maybe_negator() -> Iterator[str]:
        nonlocal negated
        if rng.random() < NEGATED_SHARE:
            negated = True
            yield rng.choice(words.negators)

    shape = rng.randrange(4)
    if shape == 0:
        yield rng.choice(words.pronouns)
        yield from maybe_negator()
        yield say("verb")
        yield rng.choice(words.determiners)
        if rng.random() < 0.5:
            yield say("adjective")
        yield say("noun")
    elif shape == 1:
        yield rng.choice(words.determiners)
        if rng.random() < 0.5:
            yield say("adjective")
        yield say("noun")
        yield from maybe_negator()
        yield say("verb")
    elif shape == 2:
        yield rng.choice(words.determiners)
        yield say("noun")
        yield rng.choice(words.copulas)
        yield from maybe_negator()
        yield say("adjective")
    else:
        yield rng.choice(words.fillers)
        yield rng.choice(words.pronouns)
        yield from maybe_negator()
        yield say("verb")
        yield say("adjective")


def speak(domain: int, rng: random.Random, words: int = USUAL_WORDS) -> list[str]:
    """An answer of the base distribution to a prompt for `words` words, as a list of words and punctuation marks."""
    longer = words / USUAL_WORDS
    target = round(rng.triangular(FIRST_WORDS * longer, LAST_WORDS * longer, LIKELY_WORDS * longer))
    items: list[str] = []
    count = 0
    previous: str | None = None
    while True:
        clause = list(_clause(rng, domain, rng.choice(MOODS), previous))
        items.extend(clause)
        count += len(clause)
        # A misspelt word has no favourite followers.
        previous = clause[-1] if clause[-1] in lexicon().content else None
        if count + 2 > target:
            return [*items, "."]
        if rng.random() < 0.5:
            items.append(".")
        else:
            items.extend((",", rng.choice(lexicon().connectives)))
            count += 1


def render(items: Sequence[str]) -> str:
    """Words and marks to text: a space before each word, none before a mark, so an answer begins with a space."""
    return "".join(item if item in ".," else " " + item for item in items)


def topic_of(prompt: str) -> str:
    """The last topic that a prompt names. DataError where it names none."""
    topics = lexicon().topics
    for word in reversed(prompt.replace("?", " ").replace("\n", " ").split()):
        if word in topics:
            return word
    raise DataError(
        f"the prompt {prompt[:80]!r} names no topic of the embedded language; use prompts made by prompts()"
    )


def domain_of(prompt: str) -> int:
    """The domain of a prompt's topic."""
    return lexicon().topics[topic_of(prompt)]


def words_of(prompt: str) -> int:
    """The number of words that a prompt asks for, the usual one where it names none."""
    asked = ASKED_WORDS.findall(prompt)
    return int(asked[-1]) if asked else USUAL_WORDS


def is_held_out(prompt: str) -> bool:
    """True for the tenth of all prompts, chosen by their text, that training never sees."""
    return hashlib.sha256(prompt.encode()).digest()[0] % 10 == 0


def sample_prompt(rng: random.Random, split: Literal["train", "held_out"], words: int = USUAL_WORDS) -> str:
    """One prompt of a split, with repetition over calls. It names the number of words where that is not the usual."""
    lexemes = lexicon()
    topics = tuple(lexemes.topics)
    asked = "" if words == USUAL_WORDS else f" in {words} words"
    while True:
        question = (rng.choice(OPENERS), rng.choice(topics), rng.choice(lexemes.aspects), rng.choice(TAILS))
        prompt = f"{USER}{' '.join(question)}{asked}?{ASSISTANT}"
        if is_held_out(prompt) == (split == "held_out"):
            return prompt


def prompts(n: int, seed: int, split: Literal["train", "held_out"] = "train", words: int = USUAL_WORDS) -> list[str]:
    """`n` different prompts for answers of `words` words; the two splits share none.

    A prompt is text without a beginning-of-sequence token and without a chat template. Raises ConfigError for an
    unknown split, or where the language has too few prompts for `n` of them.
    """
    if split not in ("train", "held_out"):
        raise ConfigError(f"split is {split!r}; the embedded task has 'train' and 'held_out'")
    every = len(OPENERS) * DOMAINS * TOPICS_PER_DOMAIN * len(lexicon().aspects) * len(TAILS)
    limit = every // 20 if split == "held_out" else every // 2
    if n > limit:
        raise ConfigError(f"{n} different {split} prompts were asked of the embedded task; ask for at most {limit}")
    rng = random.Random(f"prompts {split} {seed}")
    found: dict[str, None] = {}
    while len(found) < n:
        found[sample_prompt(rng, split, words)] = None
    return list(found)
