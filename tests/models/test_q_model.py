"""The token-level Q function: its loss by hand, which tokens the mean is over, and what no comparison tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from tlcr.config.schema import ModelConfig
from tlcr.models.heads import classification_head
from tlcr.models.loading import load_sequence_classifier
from tlcr.models.q_model import collate_answers, q_loss
from tlcr.types import EncodedAnswer, EncodedComparison

COMPARISONS = [
    EncodedComparison(EncodedAnswer((5, 9, 17, 23, 2), 3, True), EncodedAnswer((5, 9, 17, 40, 41, 42, 2), 3, True)),
    EncodedComparison(EncodedAnswer((30, 31, 32), 0, False), EncodedAnswer((7, 33, 2), 1, True)),
]
BETA, MARGIN = 0.5, 1.5


@pytest.fixture
def scorer(tiny_causal_lm: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    model = load_sequence_classifier(tiny_causal_lm(), ModelConfig())
    torch.nn.init.normal_(classification_head(model).weight, std=3.0)
    return model


@torch.no_grad()
def values(model: PreTrainedModel, answer: EncodedAnswer) -> list[float]:
    """Z of each token of one answer, each read off the text that ends with it."""
    ends = range(answer.answer_start + 1, len(answer.ids) + 1)
    hidden = [model.base_model(torch.tensor([answer.ids[:end]])).last_hidden_state[0, -1] for end in ends]
    return [float(classification_head(model)(h)) for h in hidden]


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


@pytest.mark.parametrize("pad_token_id", [0, 2])
def test_the_loss_by_hand(scorer: PreTrainedModel, pad_token_id: int) -> None:
    """The second prompt is empty: its first token counts too. The end of sequence does, also where it pads."""
    parts = q_loss(scorer, collate_answers(COMPARISONS, pad_token_id=pad_token_id), beta=BETA, margin=MARGIN)
    differences = [BETA * (mean(values(scorer, c.chosen)) - mean(values(scorer, c.rejected))) for c in COMPARISONS]
    truth = sum(math.log1p(math.exp(MARGIN - d)) for d in differences)
    assert parts.total.item() == pytest.approx(truth, rel=1e-4) and parts.weight == 2
    found = {name: float(amount) / float(count) for name, (amount, count) in parts.statistics.items()}
    assert found == pytest.approx(
        {"accuracy": mean([d > 0 for d in differences]), "margin": mean(differences)}, rel=1e-3
    )
    # an answer taken to begin one token sooner or later has another mean
    for shift in (-1, 1):
        moved = [
            replace(c, chosen=replace(c.chosen, answer_start=c.chosen.answer_start + shift)) for c in COMPARISONS[:1]
        ]
        other = q_loss(scorer, collate_answers(moved, pad_token_id=pad_token_id), beta=BETA, margin=MARGIN)
        own = q_loss(scorer, collate_answers(COMPARISONS[:1], pad_token_id=pad_token_id), beta=BETA, margin=MARGIN)
        assert abs(other.total.item() / own.total.item() - 1) > 0.05


def test_the_mask_is_true_at_answers_alone() -> None:
    batch = collate_answers(COMPARISONS, pad_token_id=2)
    assert batch["answer_mask"].int().tolist() == [
        [0, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1],
        [0, 1, 1, 0, 0, 0, 0],
    ]


def test_a_number_added_to_every_value_changes_no_loss(scorer: PreTrainedModel) -> None:
    """So nothing but a baseline can say what a token's value is worth: `reward.centre`, or a value model."""
    batch = collate_answers(COMPARISONS, pad_token_id=0)
    before = q_loss(scorer, batch, beta=BETA, margin=MARGIN).total.item()
    head = classification_head(scorer)
    head.bias = torch.nn.Parameter(torch.tensor([7.0]))
    assert q_loss(scorer, batch, beta=BETA, margin=MARGIN).total.item() == pytest.approx(before, rel=1e-5)
