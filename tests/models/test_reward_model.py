"""The Bradley-Terry reward model: where the score is read, the loss by hand, and the recipe."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.recipes.test_train_sft import PAIRS
from tlcr.config.schema import ModelConfig, RewardModelConfig, RunConfig
from tlcr.models.heads import classification_head
from tlcr.models.loading import load_sequence_classifier
from tlcr.models.reward_model import bradley_terry_loss, collate_comparisons, sequence_scores
from tlcr.models.tokenizers import load_tokenizer
from tlcr.recipes.train_reward_model import train_reward_model
from tlcr.text.padding import pad_right
from tlcr.types import EncodedAnswer, EncodedComparison

ROWS = [[5, 9, 17, 23, 2], [7, 8, 30, 31, 32, 33, 2], [40, 41]]


@pytest.fixture(params=["tiny_causal_lm", "tiny_gpt2"])
def scorer(request):
    """A reward model with a head that is not zero."""
    model = load_sequence_classifier(request.getfixturevalue(request.param)(), ModelConfig())
    torch.nn.init.normal_(classification_head(model).weight)
    return model


def alone(model, row: list[int], at: int = -1) -> float:
    """The score of one row by itself, read at position ``at``."""
    hidden = model.base_model(torch.tensor([row])).last_hidden_state
    return classification_head(model)(hidden[0, at]).item()


def test_the_score_is_read_at_the_last_counted_token_whatever_the_padding(scorer):
    truth = torch.tensor([alone(scorer, row) for row in ROWS])
    ids_BL, mask_BL = pad_right(ROWS, pad_token_id=2)  # the padding id is the end-of-sequence id
    torch.testing.assert_close(sequence_scores(scorer, ids_BL, mask_BL), truth, rtol=1e-4, atol=1e-5)
    left_ids = torch.tensor([[0] * (7 - len(row)) + row for row in ROWS])
    left_mask = torch.tensor([[False] * (7 - len(row)) + [True] * len(row) for row in ROWS])
    torch.testing.assert_close(sequence_scores(scorer, left_ids, left_mask), truth, rtol=1e-4, atol=1e-5)
    both = torch.nn.functional.pad(left_ids, (0, 3), value=2), torch.nn.functional.pad(left_mask, (0, 3))
    torch.testing.assert_close(sequence_scores(scorer, *both, micro_batch_size=2), truth, rtol=1e-4, atol=1e-5)
    one_early = torch.tensor([alone(scorer, row, at=-2) for row in ROWS])
    assert (truth - one_early).abs().min() > 1e-2  # so a shift by one could not have passed


def test_a_row_with_nothing_counted_scores_zero(scorer):
    ids_BL, mask_BL = pad_right(ROWS, pad_token_id=0)
    mask_BL[1] = False
    scores_B = sequence_scores(scorer, ids_BL, mask_BL)
    assert scores_B[1] == 0
    assert scores_B[0] != 0


def comparison(chosen: list[int], rejected: list[int]) -> EncodedComparison:
    return EncodedComparison(*(EncodedAnswer(tuple(ids), 1, True) for ids in (chosen, rejected)))


def test_the_loss_is_the_negative_log_likelihood_of_the_choices(scorer):
    comparisons = [comparison(ROWS[0], ROWS[1]), comparison(ROWS[2], ROWS[0]), comparison(ROWS[1], ROWS[2])]
    parts = bradley_terry_loss(scorer, collate_comparisons(comparisons, pad_token_id=0))
    margins = [alone(scorer, list(c.chosen.ids)) - alone(scorer, list(c.rejected.ids)) for c in comparisons]
    assert parts.total.item() == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins), rel=1e-4)
    assert parts.weight == 3
    right, pairs = parts.statistics["accuracy"]
    assert float(right) == sum(m > 0 for m in margins)
    assert pairs == 3


def test_a_new_model_starts_at_even_odds(tiny_causal_lm):
    model = load_sequence_classifier(tiny_causal_lm(), ModelConfig())
    parts = bradley_terry_loss(model, collate_comparisons([comparison(ROWS[0], ROWS[1])], pad_token_id=0))
    assert parts.total.item() == pytest.approx(math.log(2))
    assert float(parts.statistics["accuracy"][0]) == 0.5  # a tie is half right


def test_the_recipe_learns_the_comparison_and_leaves_its_source_alone(tmp_path, tiny_tokenizer, tiny_causal_lm):
    cfg = replace(RunConfig(), reward_model=RewardModelConfig(epochs=8, batch_size=3, learning_rate=5e-3, save_every=0))
    source = tiny_causal_lm()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    result = train_reward_model(
        cfg,
        backbone=source,
        tokenizer=tiny_tokenizer,
        train=PAIRS[:5],
        held_out=PAIRS[5:],
        folder=tmp_path / "reward_model",
    )
    assert result.evaluation["accuracy"] == 1
    assert result.evaluation["loss"] < 0.1
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())

    from_disk = ModelConfig(path=str(tmp_path / "reward_model"))
    model, tokenizer = load_sequence_classifier(from_disk.path, from_disk), load_tokenizer(from_disk)
    texts = [PAIRS[5].prompt + answer + tokenizer.eos_token for answer in (PAIRS[5].chosen, PAIRS[5].rejected)]
    ids_BL, mask_BL = pad_right(tokenizer(texts, add_special_tokens=False)["input_ids"], tokenizer.pad_token_id)
    chosen, rejected = sequence_scores(model, ids_BL, mask_BL).tolist()
    assert chosen - rejected == pytest.approx(result.evaluation["margin"], rel=1e-4)
