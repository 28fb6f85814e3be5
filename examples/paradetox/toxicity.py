"""An independent measure of toxicity, for `evaluation.scorer`: the linear model that alt-profanity-check carries.

It was trained on 200,000 other labelled texts and has no weights in common with the discriminator. Both corpora are of
comments from the web, so a sentence may be in both; the rewrites and their labels are not. `pip install
alt-profanity-check` (MIT, Python 3.11), which loads its own model and wants one version of scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence

from profanity_check import predict_prob


def civility(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """1 less the probability that the answer without its prompt is offensive: 0 toxic, 1 civil (also if empty)."""
    return [1.0 - float(probability) for probability in predict_prob(list(responses))]
