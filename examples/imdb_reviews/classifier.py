"""A second independent measure of sentiment: logistic regression on the words of reviews that no reward was trained on.

It learns from the dev table's pairs (held_out.jsonl of prepare.py), both texts of each, at the first call; the rewards
learn from the training table. Half of the texts are edits of the other half, so it cannot use the topic of a film.

    python -m examples.imdb_reviews.classifier

prints how often it is right: on pairs of the dev table that it did not learn from, and on the training table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline

DEV = Path("runs/imdb_data/held_out.jsonl")
TRAIN = Path("runs/imdb_data/edits.jsonl")
"""Only to measure its accuracy."""


def positive(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The probability that the answer without its prompt is from a positive review."""
    return [float(p) for p in trained(DEV).predict_proba(list(responses))[:, 1]]


def texts_of(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts of records of prepare.py, without their prompts; whether each is positive; and the record it is of."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    texts = [record[side] for record in records for side in ("rejected", "revised")]
    return texts, np.tile([0, 1], len(records)), np.repeat(np.arange(len(records)), 2)


def untrained() -> Pipeline:
    return make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10.0))


@cache
def trained(path: Path) -> Pipeline:
    texts, labels, _ = texts_of(path)
    return untrained().fit(texts, labels)


def main() -> None:
    texts, labels, records = texts_of(DEV)
    unseen = cross_val_score(untrained(), texts, labels, groups=records, cv=GroupKFold(5)).mean()
    texts, labels, _ = texts_of(TRAIN)
    start = [" ".join(text.split()[:24]) for text in texts]
    sys.stdout.write(
        f"accuracy on unseen pairs of {DEV}: {unseen:.3f}\n"
        f"on {TRAIN}: {trained(DEV).score(texts, labels):.3f}; on their first 24 words: "
        f"{trained(DEV).score(start, labels):.3f}\n"
    )


if __name__ == "__main__":
    main()
