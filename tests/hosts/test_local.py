"""A discriminator on this machine pays each token where it stands, whatever shares its batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForTokenClassification, PreTrainedModel, PreTrainedTokenizerFast

from tlcr.errors import ConfigError, HostError
from tlcr.hosts.contract import Item
from tlcr.hosts.local import LocalScorer
from tlcr.models.inspection import THREE_CLASSES, TWO_CLASSES

PROMPT = [5, 11, 7]
ITEMS = [
    Item(PROMPT, [12, 30, 17, 25, 2]),
    Item([9, 4, 4, 13, 21, 6], [22, 35, 41, 42, 16, 2], [1, 1, 0, 0, 1, 1]),
    Item([8], []),
    Item([], [40]),
    Item([8], [44, 0, 23]),
]


def saved(folder: Path, causal: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, classes: dict[int, str]) -> Path:
    config = causal.config
    config.id2label, config.label2id = classes, {label: i for i, label in classes.items()}
    config.tlcr_temperature = 1.7
    model = LlamaForTokenClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=[TWO_CLASSES, THREE_CLASSES], ids=["two", "three"])
def folder(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny_causal_lm: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    return saved(tmp_path / "discriminator", tiny_causal_lm(), tiny_tokenizer, dict(request.param))


def by_hand(folder: Path, item: Item) -> list[float]:
    """One row without padding, in float64, read at the token's own column."""
    model = LlamaForTokenClassification.from_pretrained(folder).double().eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*item.prompt_ids, *item.response_ids]])).logits[0] / 1.7
    p = logits.softmax(-1)[len(item.prompt_ids) :]
    rewards = (p[:, -1] - p[:, 0]).tolist()
    return [value if counts else 0.0 for value, counts in zip(rewards, item.counted, strict=True)]


@pytest.mark.parametrize("batch_tokens", [1, 20, 16384])
def test_every_token_has_its_own_reward(folder: Path, batch_tokens: int) -> None:
    rewards = LocalScorer(folder, batch_tokens=batch_tokens).token_rewards(ITEMS)
    for item, row in zip(ITEMS, rewards, strict=True):
        assert row == pytest.approx(by_hand(folder, item) if item.response_ids else [], abs=1e-6)
        assert all(value == 0 for value, counts in zip(row, item.counted, strict=True) if not counts)
    assert any(abs(value) > 1e-4 for value in rewards[0])
    assert LocalScorer(folder).token_rewards([]) == []


def test_an_id_of_another_vocabulary_is_refused(folder: Path) -> None:
    scorer = LocalScorer(folder)
    with pytest.raises(HostError, match=r"answer 1 has the token id 100000, and the discriminator .* has \d+ tokens"):
        scorer.token_rewards([ITEMS[0], Item([1], [100000])])


def test_a_row_that_is_too_long_is_refused(folder: Path) -> None:
    with pytest.raises(HostError, match=r"answer 0 has 257 tokens with its prompt, .* at most 256"):
        LocalScorer(folder).token_rewards([Item([5] * 250, [6] * 7)])


def test_logits_that_are_no_numbers_are_refused(folder: Path) -> None:
    scorer = LocalScorer(folder)
    with torch.no_grad():
        scorer.model.get_submodule("score").weight.fill_(float("nan"))
    with pytest.raises(HostError, match="reward of token 0 of answer 0 is nan"):
        scorer.token_rewards(ITEMS[:1])


def test_the_ids_of_another_tokenizer_are_refused(folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    scorer = LocalScorer(folder)
    scorer.check_tokenizer(tiny_tokenizer)
    other = copy.deepcopy(tiny_tokenizer)
    other.eos_token = "<bos>"
    with pytest.raises(HostError, match="would mean other tokens"):
        scorer.check_tokenizer(other)


def test_labels_of_something_else_are_refused(
    tmp_path: Path, tiny_causal_lm: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = saved(tmp_path / "other", tiny_causal_lm(), tiny_tokenizer, {0: "positive", 1: "negative"})
    with pytest.raises(ConfigError, match="label"):
        LocalScorer(folder)
