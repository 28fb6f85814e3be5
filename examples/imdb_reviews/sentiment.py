"""An independent measure of sentiment, for `evaluation.scorer`: VADER (Hutto and Gilbert 2014), a lexicon with rules.

It shares nothing with the discriminator: no training data, no weights. `pip install vaderSentiment`.
"""

from __future__ import annotations

from collections.abc import Sequence

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_analyzer = SentimentIntensityAnalyzer()


def compound(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """VADER's compound score of each answer without its prompt, from -1 (bad) to 1 (good)."""
    return [float(_analyzer.polarity_scores(response)["compound"]) for response in responses]
