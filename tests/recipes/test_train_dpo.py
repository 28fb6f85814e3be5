"""DPO: the loss by hand, the reference's log-probabilities, and the recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.recipes.test_train_sft import PAIRS
from tlcr.config.schema import DPOConfig, RunConfig
from tlcr.models.dpo import collate_referenced, dpo_loss, outcome_loss, with_reference
from tlcr.recipes.train_dpo import train_dpo
from tlcr.text.tokenization import encode_comparisons
from tlcr.training.metrics import read_metrics
from tlcr.types import EncodedAnswer, EncodedComparison

COMPARISONS = [
    EncodedComparison(EncodedAnswer((5, 9, 17, 23, 2), 3, True), EncodedAnswer((5, 9, 17, 40, 41, 42, 2), 3, True)),
    EncodedComparison(EncodedAnswer((7, 30, 31, 32), 1, False), EncodedAnswer((7, 33, 2), 1, True)),
]


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, answer: EncodedAnswer) -> float:
    """log p(answer | prompt), one text alone, each token read one column before it."""
    logprobs = model(torch.tensor([answer.ids])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[t - 1, answer.ids[t]]) for t in range(answer.answer_start, len(answer.ids)))


@pytest.mark.parametrize("pad_token_id", [0, 2])
def test_the_loss_by_hand(tiny_causal_lm: Callable[..., PreTrainedModel], pad_token_id: int) -> None:
    model, reference = tiny_causal_lm(seed=1), tiny_causal_lm(seed=2)
    for parameter in model.parameters():
        parameter.data *= 3
    pairs = with_reference(reference, COMPARISONS, pad_token_id=pad_token_id, batch_size=2)
    parts = dpo_loss(model, collate_referenced(pairs, pad_token_id=pad_token_id), beta=0.3)
    rewards = [
        [0.3 * (log_likelihood(model, a) - log_likelihood(reference, a)) for a in (pair.chosen, pair.rejected)]
        for pair in COMPARISONS
    ]
    margins = [chosen - rejected for chosen, rejected in rewards]
    assert parts.total.item() == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins), rel=1e-4)
    assert parts.weight == 2
    found = {name: float(amount) / float(count) for name, (amount, count) in parts.statistics.items()}
    assert found == pytest.approx(
        {
            "accuracy": sum(m > 0 for m in margins) / 2,
            "margin": sum(margins) / 2,
            "reward_chosen": sum(r[0] for r in rewards) / 2,
            "reward_rejected": sum(r[1] for r in rewards) / 2,
        },
        rel=1e-3,
    )
    # an answer taken to begin one token later has another likelihood
    late = [
        replace(pair, chosen=replace(pair.chosen, answer_start=pair.chosen.answer_start + 1)) for pair in COMPARISONS
    ]
    shifted = with_reference(reference, late, pad_token_id=pad_token_id, batch_size=2)
    assert all(abs(a.ref_chosen - b.ref_chosen) > 0.5 for a, b in zip(pairs, shifted, strict=True))


@pytest.mark.parametrize("pad_token_id", [0, 2])
def test_the_loss_of_outcomes_by_hand(tiny_causal_lm: Callable[..., PreTrainedModel], pad_token_id: int) -> None:
    """Each answer by itself: the logit of being good is its log-ratio (implicit process rewards)."""
    model, reference = tiny_causal_lm(seed=1), tiny_causal_lm(seed=2)
    for parameter in model.parameters():
        parameter.data *= 3
    pairs = with_reference(reference, COMPARISONS, pad_token_id=pad_token_id, batch_size=2)
    batch = collate_referenced(pairs, pad_token_id=pad_token_id)
    parts = outcome_loss(model, batch, beta=0.3)
    total = 0.0
    for pair in COMPARISONS:
        good, bad = (
            0.3 * (log_likelihood(model, a) - log_likelihood(reference, a)) for a in (pair.chosen, pair.rejected)
        )
        total += math.log1p(math.exp(-good)) + math.log1p(math.exp(bad))
    assert parts.total.item() == pytest.approx(total, rel=1e-4) and parts.weight == 4
    assert parts.statistics.keys() == dpo_loss(model, batch, beta=0.3).statistics.keys()


def test_outcomes_move_each_answer_from_where_the_reference_has_it(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, tiny_causal_lm: Callable[..., PreTrainedModel]
) -> None:
    """A loss of outcomes starts at log 2 an answer, and ends with good answers above 0 and bad ones below."""
    dpo = DPOConfig(loss="outcomes", epochs=15, batch_size=3, learning_rate=3e-3, weight_decay=0.0, save_every=0)
    result = train_dpo(
        replace(RunConfig(), dpo=dpo),
        model=tiny_causal_lm(),
        tokenizer=tiny_tokenizer,
        train=PAIRS[:5],
        held_out=PAIRS[:5],
        folder=tmp_path / "dpo",
    )
    assert read_metrics(tmp_path / "dpo" / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), rel=1e-3)
    assert result.evaluation["reward_chosen"] > 0.3 and result.evaluation["reward_rejected"] < -0.3


def test_the_references_likelihoods_come_back_in_their_order(tiny_causal_lm: Callable[..., PreTrainedModel]) -> None:
    reference = tiny_causal_lm()
    many = [*COMPARISONS, *reversed(COMPARISONS), COMPARISONS[0]]
    for batch_size in (1, 2, 5):
        found = with_reference(reference, many, pad_token_id=0, batch_size=batch_size)
        assert [pair.comparison for pair in found] == many
        for pair in found:
            assert pair.ref_chosen == pytest.approx(log_likelihood(reference, pair.comparison.chosen), rel=1e-4)
            assert pair.ref_rejected == pytest.approx(log_likelihood(reference, pair.comparison.rejected), rel=1e-4)
    assert with_reference(reference, [], pad_token_id=0, batch_size=2) == []


def test_gradients_raise_the_chosen_answer(tiny_causal_lm: Callable[..., PreTrainedModel]) -> None:
    """At the reference every margin is 0: the loss is log 2 a pair, and one small step makes every margin positive."""
    model = tiny_causal_lm()
    batch = collate_referenced(with_reference(model, COMPARISONS, pad_token_id=0, batch_size=2), pad_token_id=0)
    parts = dpo_loss(model, batch, beta=0.1)
    assert parts.total.item() == pytest.approx(2 * math.log(2), rel=1e-4)
    parts.total.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    right, pairs = dpo_loss(model, batch, beta=0.1).statistics["accuracy"]
    assert float(right) / float(pairs) == 1


def test_training_learns_the_preferences_and_the_folder_loads_anywhere(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_causal_lm: Callable[..., PreTrainedModel],
    device: torch.device,
) -> None:
    cfg = replace(
        RunConfig(), dpo=DPOConfig(epochs=15, batch_size=3, learning_rate=3e-3, weight_decay=0.0, save_every=0)
    )
    model = tiny_causal_lm()
    result = train_dpo(
        cfg,
        model=model,
        tokenizer=tiny_tokenizer,
        train=PAIRS[:5],
        held_out=PAIRS[5:],
        folder=tmp_path / "dpo",
    )
    assert model.device == device
    rows = read_metrics(tmp_path / "dpo" / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-3)  # it starts at its own reference
    assert result.evaluation["accuracy"] == 1 and result.evaluation["margin"] > 1
    trained, start = AutoModelForCausalLM.from_pretrained(tmp_path / "dpo"), tiny_causal_lm()
    (pair,) = encode_comparisons(tiny_tokenizer, PAIRS[5:], cfg.data)
    ratio = {
        side: log_likelihood(trained, answer) - log_likelihood(start, answer)
        for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected))
    }
    margin = cfg.dpo.beta * (ratio["chosen"] - ratio["rejected"])
    assert margin == pytest.approx(result.evaluation["margin"], rel=1e-2)
