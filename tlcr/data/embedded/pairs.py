"""Simulated comparisons and revisions of the embedded task."""

from __future__ import annotations

import math
import random

from tlcr.data.embedded.gold import gold
from tlcr.data.embedded.language import USUAL_WORDS, domain_of, render, sample_prompt, speak
from tlcr.data.embedded.reviser import revise
from tlcr.types import EditPair, PreferencePair

PREFERENCE_TEMPERATURE = 1.0
"""P(first preferred) = sigmoid((gold of first - gold of second) / this).

For answers of another length it is multiplied by the square root of how much longer they are, as the deviation of a sum
of independent words is: preferences are as often right.
"""


def generate_pairs(n: int, seed: int, words: int = USUAL_WORDS) -> tuple[list[PreferencePair], list[EditPair]]:
    """`n` comparisons of two base answers to a training prompt, and the revision of each one's rejected answer.

    Prompts ask for `words` words, and answers are as much longer than the usual ones.

    Preferences follow Bradley-Terry on the gold totals. The two lists have the same order and ids. The first k of n
    pairs are the k pairs that the same seed gives for n = k.
    """
    rng = random.Random(f"pairs {seed}")
    temperature = PREFERENCE_TEMPERATURE * math.sqrt(words / USUAL_WORDS)
    preferences, edits = [], []
    for index in range(n):
        prompt = sample_prompt(rng, "train", words)
        domain = domain_of(prompt)
        first, second = render(speak(domain, rng, words)), render(speak(domain, rng, words))
        margin = (gold(prompt, first).total - gold(prompt, second).total) / temperature
        if rng.random() >= 1 / (1 + math.exp(-margin)):
            first, second = second, first
        name = f"embedded-{seed}-{index}"
        preferences.append(PreferencePair(id=name, prompt=prompt, chosen=first, rejected=second))
        edits.append(
            EditPair(id=name, prompt=prompt, rejected=second, revised=revise(prompt, second, rng), chosen=first)
        )
    return preferences, edits
