"""The reward server of a process: how it is named, asked in the background, and compared with the policy's tokens."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from tests.hosts.golden import GoldenScorer, load
from tlcr.errors import HostError
from tlcr.hosts.client import RewardClient
from tlcr.hosts.contract import Item
from tlcr.hosts.payment import mean_at_end, numbered
from tlcr.hosts.remote import TEMPERATURE, TOKEN, TRIES, URL, rewards_of, scorer_at

GOLDEN = load()
ITEMS = [Item(one["prompt_ids"], one["response_ids"], one["mask"]) for one in GOLDEN["items"]]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (URL, TOKEN, TEMPERATURE, TRIES):
        monkeypatch.delenv(name, raising=False)


class Tokenizer:
    """A copy for each call, as Ray makes them."""

    name_or_path, vocab_size = "policy", 50


class Compared(GoldenScorer):
    def __init__(self, is_other: bool = False) -> None:
        super().__init__()
        self.is_other, self.compared = is_other, 0

    def check_tokenizer(self, tokenizer: Any) -> None:
        self.compared += 1
        if self.is_other:
            raise HostError("another tokenizer")


class Wrong(GoldenScorer):
    def token_rewards(self, items: Sequence[Any]) -> list[list[float]]:
        return [row[:-1] for row in super().token_rewards(items)]


def test_an_address_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match=r"set its.url or TLCR_REWARD_URL in the environment"):
        scorer_at(named_by="its.url")
    monkeypatch.setenv(URL, "http://127.0.0.1:1")
    assert isinstance(scorer_at(), RewardClient) and scorer_at() is scorer_at("http://127.0.0.1:1")
    assert scorer_at("http://127.0.0.1:2").url == "http://127.0.0.1:2"  # the trainer's config comes first


def test_variables_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL, "http://127.0.0.1:3")
    monkeypatch.setenv(TRIES, "2")
    assert scorer_at().tries == 2
    monkeypatch.setenv(TEMPERATURE, "warm")
    with pytest.raises(HostError, match="TLCR_REWARD_TEMPERATURE is 'warm'; wanted a finite number"):
        scorer_at()


def test_answers_without_tokens_are_not_sent() -> None:
    scorer = GoldenScorer()
    found = asyncio.run(rewards_of(scorer, ITEMS))
    assert found == [one["rewards"] for one in GOLDEN["items"]]
    assert asyncio.run(rewards_of(scorer, [ITEMS[3]])) == [[]] and scorer.asked == 1


def test_what_comes_back_is_checked() -> None:
    with pytest.raises(HostError, match="5 tokens and 4 rewards"):
        asyncio.run(rewards_of(Wrong(), ITEMS))


def test_a_tokenizer_is_compared_once() -> None:
    scorer = Compared()
    for _ in range(3):
        asyncio.run(rewards_of(scorer, ITEMS, Tokenizer()))
    assert scorer.compared == 1
    other = Compared(is_other=True)
    for _ in range(2):
        with pytest.raises(HostError, match="another tokenizer"):
            asyncio.run(rewards_of(other, ITEMS, Tokenizer()))
    assert other.compared == 2 and other.asked == 0


def test_the_mean_stands_at_the_last_counted_token() -> None:
    assert mean_at_end([0.5, 0.25, 9.0, 0.75, 9.0], [1, 1, 0, 1, 0]) == [0, 0, 0, 0.5, 0]
    assert mean_at_end([0.5], [0]) == [0.0] and mean_at_end([], []) == []


def test_prompts_are_numbered_by_their_names() -> None:
    assert numbered(["b", "a", "b", "c"]) == [0, 1, 0, 2]


@pytest.mark.skipif("verl" in sys.modules, reason="verl is here")
def test_a_plugin_that_cannot_register_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """verl swallows what a plugin raises; without verl the plugin cannot register."""
    with caplog.at_level(logging.ERROR), pytest.raises(HostError):
        import tlcr.hosts.verl_plugin  # noqa: F401
    assert "tlcr is not registered with verl: verl is not installed" in caplog.text
