"""Splits of prompts between stages and held-out data are disjoint, complete and stable; one is computed by hand."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tlcr.config.loading import load_config
from tlcr.config.schema import Arm, DataConfig, RewardConfig, RunConfig
from tlcr.data.readers import ReadResult, read_preferences
from tlcr.data.records import prompt_key
from tlcr.data.splits import STAGES, Shares, Split, in_order_of_hashes, split_held_out
from tlcr.errors import ConfigError
from tlcr.experiment.opening import open_run
from tlcr.experiment.pipeline import _shares, run, stage
from tlcr.experiment.run_folder import RunFolder, raw_preferences
from tlcr.types import PreferencePair


def pairs(*ids: object) -> list[PreferencePair]:
    return [PreferencePair(id=str(id), prompt="p", chosen="c", rejected="r") for id in ids]


def by_id(records: list[PreferencePair], share: float) -> Split[PreferencePair]:
    return split_held_out(records, share, names=[record.id for record in records])


class TestSplitHeldOut:
    def test_share_order_and_disjointness(self) -> None:
        records = pairs(*range(2000))
        split = by_id(records, 0.1)
        assert 120 <= len(split.held_out) <= 280, "200, and six standard deviations of 13.4 beside it at most"
        assert sorted([*split.train, *split.held_out], key=lambda pair: int(pair.id)) == records
        assert split.train == sorted(split.train, key=lambda pair: int(pair.id))

    def test_side_depends_on_the_name_alone(self) -> None:
        few = by_id(pairs(*range(0, 500)), 0.2).held_out
        many = by_id(pairs(*reversed(range(1000))), 0.2).held_out
        assert {pair.id for pair in few} == {pair.id for pair in many if int(pair.id) < 500}
        # SHA-256 of "0" begins 5fec.. = 0.37, of "1" 6b86.. = 0.42, of "2" d473.. = 0.83, whatever Python's hash salt.
        assert [pair.id for pair in by_id(pairs(2, 1, 0), 0.4).held_out] == ["0"]

    @pytest.mark.parametrize(
        ("ids", "share", "sizes"),
        [("xy", 0.0001, (1, 1)), ("xy", 0.9, (1, 1)), ("xy", 0.0, (2, 0)), ("", 0.5, (0, 0)), ("0", 0.5, (1, 0))],
    )
    def test_both_sides_have_one_at_least(self, ids: str, share: float, sizes: tuple[int, int]) -> None:
        split = by_id(pairs(*ids), share)
        assert (len(split.train), len(split.held_out)) == sizes

    def test_records_of_one_name_stay_together(self) -> None:
        split = split_held_out([1, 2, 3, 4, 5], 0.0001, names=["c", "d", "h", "d", "c"])
        assert (split.train, split.held_out) == ([1, 3, 5], [2, 4])


def letters(which: str) -> ReadResult[str]:
    return ReadResult("letters", "prompts", tuple(which.upper()), tuple(which))


class TestShares:
    def test_by_hand(self) -> None:
        """The SHA-256 of the letters (``printf a | sha256sum``), as fractions of 1:

                                        a    b     c    d    e    f    g    h
        bytes 8 to 15, for the stage   .98  .201  .40  .05  .09  .10  .71  .25    2:4:4 is cut at .2 and .6
        bytes 0 to 7, for held-out     .79  .24   .18  .10  .25  .15  .80  .67    below .2, in PPO the lowest
        """
        shares = Shares((2, 4, 4))
        found = {stage: shares.split(stage, letters("abcdefgh"), 0.2) for stage in STAGES}
        assert {stage: "".join(s.train) for stage, s in found.items()} == {"sft": "E", "reward": "BH", "ppo": "G"}
        assert {stage: "".join(s.held_out) for stage, s in found.items()} == {"sft": "DF", "reward": "C", "ppo": "A"}

    def test_a_source_of_ones_own_wins_over_the_hash(self) -> None:
        shares = Shares((2, 4, 4), own={"a": "reward", "d": "ppo"})
        found = {stage: "".join(shares.of(stage, letters("abcdefgh")).records) for stage in STAGES}
        assert found == {"sft": "EF", "reward": "ABCH", "ppo": "DG"}

    def test_without_shares_every_stage_sees_all_and_prompts_decide(self) -> None:
        """The fractions are those of ``test_by_hand``; the ids a, b and c would put others on the sides."""
        read = ReadResult("pairs", "preference", tuple(pairs("c", "b", "a")), ("a", "b", "c"), ("x", "y", "z"))
        for stage_ in STAGES:
            split = Shares().split(stage_, read, 0.2)
            assert [[pair.id for pair in side] for side in (split.train, split.held_out)] == [["c", "b"], ["a"]]

    @pytest.mark.parametrize("key", ["same", ""])
    def test_where_all_have_one_prompt_or_none_their_answers_decide(self, key: str) -> None:
        answers = tuple(f"answer {number}" for number in range(200))
        read = ReadResult("texts", "preference", answers, (key,) * 200, answers)
        split = Shares().split("sft", read, 0.2)
        assert 10 < len(split.held_out) < 80 and len(split.train) + len(split.held_out) == 200
        half = ReadResult("texts", "preference", answers[100:], (key,) * 100, answers[100:])
        assert set(Shares().split("sft", half, 0.2).held_out) == {a for a in split.held_out if a in answers[100:]}

    def test_an_empty_prompt_is_for_every_stage(self) -> None:
        read = ReadResult("prompts", "prompts", ("", "A"), ("", "a"), ("", ""))
        assert {stage: Shares((2, 4, 4)).of(stage, read).records for stage in STAGES} == {
            "sft": ("",),
            "reward": ("",),
            "ppo": ("", "A"),
        }

    def test_the_first_prompts_are_the_same_in_every_order(self) -> None:
        ordered = [in_order_of_hashes(letters(order)) for order in ("abcdefgh", "hgfedcba")]
        assert ordered[0] == ordered[1]
        assert "".join(ordered[0].records) == "DFCBEHAG", "their fractions rise"

    def test_a_source_too_small_for_its_share_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="tlcr"):
            assert Shares().split("sft", letters("abc"), 0.1).held_out == ["C"]
            assert "no hash of a prompt is below data.held_out (0.1)" in caplog.text
            caplog.clear()
            assert Shares().split("sft", letters("abcd"), 0.11).held_out == ["D"] and not caplog.text

    def test_sizes_disjointness_completeness_and_stability(self) -> None:
        keys = tuple(f"prompt {number}" for number in range(3000))
        whole = ReadResult("many", "prompts", tuple(range(3000)), keys)
        shares = Shares((2, 4, 4))
        parts = {stage: shares.of(stage, whole).records for stage in STAGES}
        assert sorted(number for part in parts.values() for number in part) == list(range(3000))
        for (stage_, part), expected in zip(parts.items(), (600, 1200, 1200), strict=True):
            assert abs(len(part) - expected) < 6 * 26.9, f"{stage_}: six standard deviations at most"
        # fewer data in another order, and the same proportions in other numbers
        back = ReadResult("some", "prompts", tuple(range(999, -1, -1)), keys[999::-1])
        for stage_ in STAGES:
            some = Shares((0.5, 1.0, 1.0)).of(stage_, back).records
            assert sorted(some) == [number for number in parts[stage_] if number < 1000]
        # a larger share of held-out prompts moves none from stage to stage
        assert set(shares.split("sft", whole, 0.1).held_out) < set(shares.split("sft", whole, 0.3).held_out)
        # what is held out and which stage it is for do not depend on one another
        out = split_held_out(keys, 0.1, names=keys).held_out
        assert abs(sum(shares.stage_of(key) == "sft" for key in out) / len(out) - 0.2) < 6 * 0.024

    def test_a_stage_with_a_share_of_0_gets_nothing(self) -> None:
        found = {stage: len(Shares((0, 1, 0)).of(stage, letters("abcdefgh")).records) for stage in STAGES}
        assert found == {"sft": 0, "reward": 8, "ppo": 0}


def test_a_prompt_is_known_by_its_words() -> None:
    words = "How do I bake bread? Mix flour. And then?"
    transcript = "\n\nHuman: How do I bake bread?\n\nAssistant: Mix flour.\n\nHuman: And then?\n\nAssistant:"
    turns = ("user", "How do I bake bread?"), ("assistant", "Mix flour."), ("user", "And  then?\n")
    assert prompt_key(transcript) == words
    assert prompt_key([{"role": role, "content": text} for role, text in turns]) == words
    assert prompt_key(transcript.lstrip()) == words
    assert prompt_key("The Human: a study") == "The Human: a study"
    assert prompt_key([{"role": role, "content": text, "id": text[:3], "toxic": 0.1} for role, text in turns]) == words


def test_messages_without_a_content_are_known_by_what_they_hold() -> None:
    first, second = ([{"role": "assistant", "tool_calls": [{"name": name}]}] for name in ("search", "read"))
    assert prompt_key(first) == '{"tool_calls": [{"name": "search"}]}' != prompt_key(second)
    named = [{"role": "assistant", "id": "m1", "tool_calls": [{"id": "call-1", "name": "search"}]}]
    assert prompt_key(named) == prompt_key(first), "ids, which each record may have anew, do not count"


@pytest.mark.parametrize("prompts", [5, 1])
def test_fields_that_no_template_renders_put_no_text_on_both_sides(
    prompts: int, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many prompts their words decide, of one prompt those of the answers."""
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question {number % prompts}", "id": f"m{number}"}],
            "chosen": [{"role": "assistant", "content": "Yes.", "id": f"c{number}"}],
            "rejected": [{"role": "assistant", "content": f"No {number % 5}.", "id": f"r{number}"}],
        }
        for number in range(40)
    ]
    source = tmp_path / "preferences.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    read = read_preferences(DataConfig(preferences=str(source)), tiny_tokenizer)
    split = Shares().split("reward", read, 0.1)
    train, held_out = ({(pair.prompt, pair.rejected) for pair in side} for side in (split.train, split.held_out))
    assert held_out and not train & held_out and len(split.train) + len(split.held_out) == 40


# ---- a run's data


def transcript(number: int, answer: str) -> str:
    return f"\n\nHuman: What is {number}?\n\nAssistant: {answer}"


def write(path: Path, records: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def settings(folder: Path, **changes: object) -> dict[str, Any]:
    """200 comparisons, two of each prompt."""
    records = [{"chosen": transcript(k // 2, f"Yes {k}."), "rejected": transcript(k // 2, "No.")} for k in range(200)]
    values = {
        "output_dir": str(folder / "run"),
        "model.path": "unused",
        "data.preferences": write(folder / "hh.jsonl", records),
        "data.shares": [2, 4, 4],
        "evaluation.prompts": 1000,
    }
    return {**values, **{name.replace("__", "."): value for name, value in changes.items()}}


def opened(tokenizer: PreTrainedTokenizerFast, cfg: RunConfig) -> RunFolder:
    run_folder = open_run(cfg, resume=False, whole=False)
    run_folder.__dict__["tokenizer"] = tokenizer
    return run_folder


def edit_of(number: int) -> dict[str, str]:
    """As a file of edits has it: without the empty lines at the front, and before "Assistant:"."""
    return {"prompt": f"Human: What is {number}?", "rejected": "No.", "revised": "No, thanks."}


def numbers(prompts: Iterable[str]) -> set[int]:
    return {int(re.findall(r"\d+", prompt)[-1]) for prompt in prompts}


def seen(run_folder: RunFolder, *, edits: bool) -> dict[tuple[str, str], set[int]]:
    """The prompts, by their numbers, that each stage trains on and is evaluated on."""
    found = {}
    for side in ("train", "held_out"):
        reward = [run_folder.preferences("reward"), *([run_folder.edits] if edits else [])]
        found["sft", side] = numbers(pair.prompt for pair in getattr(run_folder.preferences("sft"), side))
        found["reward", side] = numbers(pair.prompt for split in reward for pair in getattr(split, side))
        found["ppo", side] = numbers(getattr(run_folder.prompts, side))
    return found


SOURCES: dict[str, tuple[range, range]] = {
    "preferences alone": (range(0), range(0)),
    "own edits": (range(30), range(0)),
    "own prompts": (range(0), range(20, 60)),
    "both, which overlap": (range(30), range(20, 60)),
}


@pytest.mark.parametrize("sources", SOURCES)
def test_no_prompt_is_seen_by_two_stages(sources: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    of_edits, of_prompts = SOURCES[sources]
    own: dict[str, object] = {}
    if of_edits:
        own["data__edits"] = write(tmp_path / "edits.jsonl", map(edit_of, of_edits))
    if of_prompts:
        own["data__prompts"] = write(tmp_path / "prompts.jsonl", ({"prompt": f"What is {k}?"} for k in of_prompts))
    run_folder = opened(tiny_tokenizer, load_config(None, settings(tmp_path, **own)))
    found = seen(run_folder, edits=bool(of_edits))
    assert all(found.values())
    for one, other in combinations(found, 2):
        assert not found[one] & found[other], (one, other)
    if of_edits:
        assert {*of_edits} <= found["reward", "train"] | found["reward", "held_out"]
    if of_prompts:
        assert found["ppo", "train"] | found["ppo", "held_out"] == {*of_prompts} - {*of_edits}
    else:
        assert set.union(*found.values()) == {*range(100)}


def test_the_reviser_is_asked_for_the_share_of_reward_learning_alone(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    cfg = load_config(None, settings(tmp_path))
    asked = raw_preferences(cfg)
    found = seen(opened(tiny_tokenizer, cfg), edits=False)
    assert numbers(str(pair.prompt) for pair in asked) == found["reward", "train"] | found["reward", "held_out"]
    assert len(asked) == 2 * len({pair.prompt for pair in asked})


def test_every_recipe_gets_its_own_share(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, set[int]] = {}

    def recipe(name: str) -> Any:
        def train(cfg: RunConfig, *, train: list, held_out: list, **_: Any) -> Any:
            given[name] = numbers(getattr(pair, "pair", pair).prompt for pair in [*train, *held_out])
            return SimpleNamespace(metrics={}, evaluation={}, seconds=1.0)

        return train

    monkeypatch.setattr("tlcr.experiment.run_folder.load_tokenizer", lambda cfg: tiny_tokenizer)
    monkeypatch.setattr("tlcr.experiment.pipeline.load_causal_lm", lambda cfg, **_: None)
    monkeypatch.setattr("tlcr.experiment.pipeline.require", lambda *_, **__: None)  # the model is never asked for
    for name in ("sft", "reward_model", "dpo"):
        monkeypatch.setattr(f"tlcr.experiment.pipeline.train_{name}", recipe(name))
    cfg = load_config(None, settings(tmp_path))
    for name in ("sft", "reward_model", "dpo"):
        stage(cfg, name)
    found = seen(opened(tiny_tokenizer, cfg), edits=False)
    assert given["sft"] == found["sft", "train"] | found["sft", "held_out"]
    assert given["reward_model"] == given["dpo"] == found["reward", "train"] | found["reward", "held_out"]


def test_who_gets_how_many_is_said_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    edits = write(tmp_path / "edits.jsonl", map(edit_of, range(30)))
    cfg = load_config(None, settings(tmp_path, data__edits=edits))
    run_folder = open_run(cfg, resume=False)
    with caplog.at_level(logging.INFO):
        _shares(run_folder, ["sft", "reward", "ppo"])
    kept = json.loads((tmp_path / "run" / "shares" / "statistics.json").read_text(encoding="utf-8"))
    stages = kept["stages"]
    assert (kept["shares"], kept["prompts"]) == ([2, 4, 4], 100)
    assert stages["reward"]["edits"] == {
        "records": 30,
        "prompts": 30,
        "held_out": stages["reward"]["edits"]["held_out"],
    }
    parts = [stages["sft"]["preferences"], stages["reward"]["preferences"], stages["ppo"]["prompts"]]
    assert sum(part["prompts"] for part in parts) == 100 and sum(part["records"] for part in parts) == 200
    assert all(0 < part["held_out"] < part["prompts"] for part in parts)
    first = parts[0]
    line = f"100 prompts, parted 2:4:4: sft {first['prompts']} of the preferences ({first['prompts']}.0%, "
    assert any(message.startswith(line) for message in caplog.messages)


@pytest.mark.parametrize("shares", [[2, 4, 4], []])
def test_conversations_beside_a_prompt_are_known_by_all_their_turns(
    shares: list[int], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PPO was given the first turn alone, whose hash put it on the side of prompts that SFT was trained on."""
    monkeypatch.setattr(
        tiny_tokenizer, "chat_template", "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )

    def conversation(number: int, answer: str) -> list[dict[str, str]]:
        texts = f"Hello {number}", "Hello.", f"What is {number}?", answer
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=True)]

    pairs = (
        {"prompt": f"Hello {k}", "chosen": conversation(k, "Yes."), "rejected": conversation(k, "No.")}
        for k in range(200)
    )
    own = write(tmp_path / "conversations.jsonl", pairs)
    changes = {"data__preferences": own, "data__shares": shares, "data__held_out": 0.2}
    run_folder = opened(tiny_tokenizer, load_config(None, settings(tmp_path, **changes)))
    found = seen(run_folder, edits=False)
    assert found["ppo", "held_out"] and not found["ppo", "held_out"] & found["sft", "train"]
    texts = {pair.prompt for stage_ in STAGES for pair in run_folder.preferences(stage_).train}
    assert set(run_folder.prompts.train) <= texts
    if shares:
        (part,) = run_folder.share_statistics().stages["ppo"].values()
        assert (part.prompts - part.held_out, part.held_out) == (
            len(found["ppo", "train"]),
            len(found["ppo", "held_out"]),
        )


def test_what_is_counted_is_what_the_stages_get(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    run_folder = opened(tiny_tokenizer, load_config(None, settings(tmp_path)))
    counted, found = run_folder.share_statistics().stages, seen(run_folder, edits=False)
    for name, sources in counted.items():
        (part,) = sources.values()
        assert (part.prompts - part.held_out, part.held_out) == (
            len(found[name, "train"]),
            len(found[name, "held_out"]),
        )


@pytest.mark.parametrize(
    ("shares", "arm", "missing"),
    [([0, 5, 5], "continuous", "sft"), ([5, 0, 5], "continuous", "reward"), ([5, 5, 0], "random", "ppo")],
)
def test_a_run_says_at_once_that_a_share_is_empty(
    shares: list[int], arm: Any, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tlcr.experiment.pipeline.require", lambda *_, **__: None)  # neither model nor revisions exist
    cfg = replace(
        load_config(None, settings(tmp_path, data__shares=shares, reviser__backend="files", reviser__files="unread")),
        arms=(Arm(arm, RewardConfig(kind=arm)),),
    )
    with pytest.raises(
        ConfigError, match=rf"data\.shares \[.*\] leave {missing} nothing to train on .*raise its number"
    ):
        run(cfg)


def test_a_share_of_0_is_no_error_where_nothing_needs_it(tmp_path: Path) -> None:
    run_folder = open_run(
        load_config(None, settings(tmp_path, data__shares=[0, 0, 1], sft__enabled=False)), resume=False
    )
    no_judge = replace(run_folder.cfg, arms=(Arm("random", RewardConfig(kind="random")),))
    run_folder = replace(run_folder, cfg=no_judge)
    assert run_folder.data_wanted == ["ppo"]
    _shares(run_folder, run_folder.data_wanted)


def test_a_stage_alone_says_so_too(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    run_folder = opened(tiny_tokenizer, load_config(None, settings(tmp_path, data__shares=[0, 5, 5])))
    with pytest.raises(ConfigError, match=r"leave sft nothing to train on in .*hh\.jsonl"):
        run_folder.preferences("sft")


@pytest.mark.parametrize("shares", [[2, 4], [2, 4, -1], [0, 0, 0]])
def test_shares_are_three_numbers(shares: list[float], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wants three numbers"):
        load_config(None, settings(tmp_path, data__shares=shares))


def test_shares_are_of_preferences_that_are_named() -> None:
    with pytest.raises(ConfigError, match=r"part the prompts of data\.preferences, which is not set"):
        load_config(None, {"data.shares": [2, 4, 4]})
