"""Simulated comparisons and revisions of the embedded task."""

from __future__ import annotations

import math
import random

from tlcr.data.embedded.gold import gold
from tlcr.data.embedded.language import domain_of, render, sample_prompt, speak
from tlcr.data.embedded.reviser import revise
from tlcr.types import EditPair, PreferencePair

PREFERENCE_TEMPERATURE = 1.0
"""P(first preferred) = sigmoid((gold of first - gold of second) / this)."""


def generate_pairs(n: int, seed: int) -> tuple[list[PreferencePair], list[EditPair]]:
    """`n` comparisons of two base answers to a training prompt, and the revision of each one's rejected answer.

    Preferences follow Bradley-Terry on the gold totals. The two lists have the same order and ids. The first k of n
    pairs are the k pairs that the same seed gives for n = k.
    """
    rng = random.Random(f"pairs {seed}")
    preferences, edits = [], []
    for index in range(n):
        prompt = sample_prompt(rng, "train")
        domain = domain_of(prompt)
        first, second = render(speak(domain, rng)), render(speak(domain, rng))
        margin = (gold(prompt, first).total - gold(prompt, second).total) / PREFERENCE_TEMPERATURE
        if rng.random() >= 1 / (1 + math.exp(-margin)):
            first, second = second, first
        name = f"embedded-{seed}-{index}"
        preferences.append(PreferencePair(id=name, prompt=prompt, chosen=first, rejected=second))
        edits.append(
            EditPair(id=name, prompt=prompt, rejected=second, revised=revise(prompt, second, rng), chosen=first)
        )
    return preferences, edits
