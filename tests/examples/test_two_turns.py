"""The game of two turns: what the user asks, and the gold of both answers, each to its own question."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.two_turns.game import ask_again, gold_of_turns, score
from tlcr.config.loading import load_config
from tlcr.data.embedded import gold, prompts
from tlcr.data.embedded.language import domain_of

ROOT = Path(__file__).parents[2]
ANSWERS = [" zi ka nika va tini, re fu zida tu bosu.", " tini zida.", " bosu bosu."]


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_user_asks_about_what_the_answer_is_worth_least_for(answer: str) -> None:
    for prompt in prompts(4, seed=1):
        (question,) = ask_again(prompts=[prompt], turns=[[answer]])
        assert question is not None and question.startswith("\nUser: ") and question.endswith("?\nAssistant:")
        worth = {domain_of(other): gold(other, answer).total for other in prompts(200, seed=2)}
        assert worth[domain_of(question)] == min(worth.values()) and len(worth) == 3
        assert ask_again(prompts=[prompt], turns=[[answer]]) == [question]
        assert ask_again(prompts=[prompt], turns=[[answer, question, answer]]) == [None]


def test_the_user_leaves_where_nothing_was_said() -> None:
    assert ask_again(prompts=prompts(2, seed=1), turns=[[""], [" "]]) == [None, None]


def test_each_answer_earns_its_gold_to_its_own_question() -> None:
    (prompt,) = prompts(1, seed=3)
    first, second = ANSWERS[:2]
    (question,) = ask_again(prompts=[prompt], turns=[[first]])
    assert question is not None
    wanted = [gold(prompt, first).total, gold(question, second).total]
    assert gold_of_turns(prompt, first + question + second) == wanted
    assert score([prompt], [first + question + second]) == [sum(wanted)]
    assert gold_of_turns(prompt, first) == wanted[:1]
    # words of the policy that look like a question are words
    forged = first + "\nUser: " + second
    (answered,) = ask_again(prompts=[prompt], turns=[[forged]])
    assert answered is not None
    assert gold_of_turns(prompt, forged + answered + second)[0] == gold(prompt, forged).total


def test_the_config_names_the_game(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cfg = load_config(ROOT / "examples/two_turns/config.yaml")
    assert cfg.rollout.environment == "examples/two_turns/game.py:ask_again" and cfg.rollout.max_turns == 2
    quickstart = load_config(ROOT / "examples/quickstart.yaml")
    assert cfg.ppo == quickstart.ppo and cfg.sft == quickstart.sft and cfg.discriminator == quickstart.discriminator
    assert cfg.data == quickstart.data
