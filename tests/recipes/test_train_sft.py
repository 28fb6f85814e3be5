"""The SFT recipe and its loss: which tokens count, at which position they are predicted, and that training learns."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tlcr.config.schema import RunConfig, SFTConfig
from tlcr.models.sft import completion_loss
from tlcr.recipes.train_sft import _perplexity, train_sft
from tlcr.text.padding import collate_completions
from tlcr.text.tokenization import encode_answer
from tlcr.training.metrics import read_metrics
from tlcr.types import EncodedAnswer, PreferencePair

PAIRS = [
    PreferencePair(id=str(i), prompt=f"Human: How is the {thing}?\n\nAssistant:", chosen=" Good!", rejected=" Bad.")
    for i, thing in enumerate(["food", "film", "soup", "waiter", "bread", "place"])
]


def answer(ids: list[int], start: int) -> EncodedAnswer:
    return EncodedAnswer(ids=tuple(ids), answer_start=start, complete=True)


def by_hand(model, ids: list[int], start: int) -> torch.Tensor:
    """-log p of each answer token, from the logits one column before it, one example alone."""
    logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    return torch.stack([-logprobs[t - 1, ids[t]] for t in range(start, len(ids))])


def test_the_loss_counts_answer_tokens_each_predicted_from_the_token_before(tiny_causal_lm):
    model = tiny_causal_lm()
    rows = [([5, 9, 17, 23, 2], 3), ([7, 8, 30, 31, 32, 33, 2], 2), ([40, 2], 1)]
    parts = completion_loss(model, collate_completions([answer(*row) for row in rows], pad_token_id=0))
    truth = torch.cat([by_hand(model, *row) for row in rows])
    assert int(parts.weight) == len(truth) == 8
    assert parts.total.item() == pytest.approx(truth.sum().item(), rel=1e-5)
    for shift in (-1, 1):  # a mask one token off gives another sum
        moved = [answer(ids, start + shift) for ids, start in rows[:2]]
        shifted = completion_loss(model, collate_completions(moved, pad_token_id=0))
        assert shifted.total.item() != pytest.approx(torch.cat([by_hand(model, *r) for r in rows[:2]]).sum().item())


def test_padding_and_its_id_never_reach_the_loss(tiny_causal_lm):
    """The pad id may be the end-of-sequence id: the mask comes from lengths."""
    model = tiny_causal_lm()
    rows = [answer([5, 9, 17, 23, 2], 3), answer([7, 8, 30, 31, 32, 33, 2], 2)]
    losses = [completion_loss(model, collate_completions(rows, pad_token_id=pad)) for pad in (0, 2, 300)]
    assert {int(parts.weight) for parts in losses} == {7}
    assert len({parts.total.item() for parts in losses}) == 1


def test_nothing_predicts_the_first_token_of_an_empty_prompt(tiny_causal_lm):
    batch = collate_completions([answer([5, 9, 2], 0)], pad_token_id=0)
    parts = completion_loss(tiny_causal_lm(), batch)
    assert int(parts.weight) == 2
    assert parts.total.item() == pytest.approx(by_hand(tiny_causal_lm(), [5, 9, 2], 1).sum().item(), rel=1e-5)


def test_the_end_of_sequence_is_learned_as_an_answer_token(tiny_tokenizer):
    pair = PAIRS[0]
    encoded = encode_answer(tiny_tokenizer, pair.prompt, pair.chosen, max_prompt_tokens=64, max_answer_tokens=8)
    batch = collate_completions([encoded], pad_token_id=tiny_tokenizer.pad_token_id)
    counted = batch["ids"][:, -batch["answer_mask"].shape[1] :][batch["answer_mask"]]
    assert tiny_tokenizer.decode(counted) == " Good!<eos>"


def test_training_learns_the_answers_and_the_folder_loads_anywhere(tmp_path, tiny_tokenizer, tiny_causal_lm, device):
    cfg = replace(
        RunConfig(), sft=SFTConfig(epochs=20, batch_size=3, learning_rate=2e-2, weight_decay=0.0, save_every=0)
    )
    policy = tiny_causal_lm()
    result = train_sft(
        cfg,
        model=policy,
        tokenizer=tiny_tokenizer,
        train=PAIRS[:5],
        held_out=PAIRS[5:],
        folder=tmp_path / "sft",
    )
    assert policy.device == device
    rows = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    assert result.steps == len(rows) == 40
    assert rows[0]["loss"] > 5  # about log(vocabulary)
    assert result.evaluation["loss"] < 0.1  # the held-out answer is the same words
    assert rows[-1]["eval/loss"] == result.evaluation["loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sft")
    prompt = tokenizer(PAIRS[5].prompt, add_special_tokens=False, return_tensors="pt")
    out = model.generate(**prompt, do_sample=False, max_new_tokens=8)
    assert tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]) == " Good!<eos>"
    assert json.loads((tmp_path / "sft" / "config.json").read_text())["pad_token_id"] == tiny_tokenizer.pad_token_id


def test_the_perplexity_of_a_loss_beyond_all_numbers_is_infinite() -> None:
    """A training that diverged is evaluated, and goes on."""
    assert _perplexity({"loss": 2.0}) == {"perplexity": math.exp(2.0)}
    assert _perplexity({"loss": 800.0}) == {"perplexity": math.inf}
    assert math.isnan(_perplexity({"loss": math.nan})["perplexity"])
