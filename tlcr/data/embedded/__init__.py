"""The embedded task: a dialogue language with known token values, so that the first run needs no network and no GPU.

docs/embedded_task.md describes it in words and formulas.
"""

from tlcr.data.embedded.gold import GoldScore, GoldWord, gold, score
from tlcr.data.embedded.language import prompts
from tlcr.data.embedded.model import build_model, build_tokenizer
from tlcr.data.embedded.pairs import generate_pairs
from tlcr.data.embedded.reviser import revise

__all__ = [
    "GoldScore",
    "GoldWord",
    "build_model",
    "build_tokenizer",
    "generate_pairs",
    "gold",
    "prompts",
    "revise",
    "score",
]
