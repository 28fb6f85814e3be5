"""The Q model's recipe: it learns preferences, and writes a folder that loads anywhere and pays tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from tests.recipes.test_train_sft import PAIRS
from tlcr.config.schema import QModelConfig, RunConfig
from tlcr.models.reward_model import prefix_scores
from tlcr.recipes.train_q_model import train_q_model
from tlcr.text.tokenization import encode_comparisons


def test_training_learns_the_preferences_and_the_folder_loads_anywhere(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, tiny_causal_lm: Callable[..., PreTrainedModel]
) -> None:
    q_model = QModelConfig(epochs=15, batch_size=3, learning_rate=3e-3, weight_decay=0.0, save_every=0)
    cfg = replace(RunConfig(), q_model=q_model)
    result = train_q_model(
        cfg,
        backbone=tiny_causal_lm(),
        tokenizer=tiny_tokenizer,
        train=PAIRS[:5],
        held_out=PAIRS[5:],
        folder=tmp_path / "q_model",
    )
    assert result.evaluation["accuracy"] == 1 and result.evaluation["margin"] > 0.3
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "q_model")
    (pair,) = encode_comparisons(tiny_tokenizer, PAIRS[5:], cfg.data)
    means = []
    for answer in (pair.chosen, pair.rejected):
        ids_BL = torch.tensor([answer.ids])
        means.append(
            float(prefix_scores(trained, ids_BL, torch.ones_like(ids_BL).bool())[0, answer.answer_start :].mean())
        )
    assert q_model.beta * (means[0] - means[1]) == pytest.approx(result.evaluation["margin"], rel=1e-2)
