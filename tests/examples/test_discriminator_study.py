"""The study of discriminators: its measures by hand, its table, and that what is done is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.discriminator_study import measures, study
from tests.data.test_labels import LETTERS, label
from tlcr.config.schema import DataConfig
from tlcr.data import embedded
from tlcr.errors import ConfigError
from tlcr.text.tokenization import character_spans, encode_answers
from tlcr.types import PreferencePair

STUDY = {
    "output_dir": "set below",
    "config": "examples/quickstart.yaml",
    "overrides": {"data.embedded_pairs": 60, "sft.epochs": 1, "discriminator.epochs": 1},
    "seeds": [0],
    "grids": [{"pairs": [20]}],
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, "output_dir": str(folder / "out"), **changes}, sort_keys=False))
    return path


# ---- measures


def test_a_word_s_rewards_are_those_of_its_own_tokens() -> None:
    # " ab c": tokens " a" "b" " c", the words "ab" at [1, 3) and "c" at [4, 5)
    spans, rewards = [(0, 2), (2, 3), (3, 5), (5, 5)], [0.1, 0.2, 0.3, 0.9]
    assert measures.rewards_of_word(1, 3, spans, rewards) == [0.1, 0.2]
    assert measures.rewards_of_word(4, 5, spans, rewards) == [0.3]


def embedded_held_out(number: int = 40) -> measures.HeldOut:
    tokenizer = embedded.build_tokenizer(0)
    preferences, _ = embedded.generate_pairs(number, seed=3)
    return measures.HeldOut(
        tokenizer, DataConfig(max_prompt_tokens=48, max_answer_tokens=99), [], [], preferences, True
    )


def golden(held_out: measures.HeldOut) -> list[list[float]]:
    """Each token's reward is the gold of the word that it belongs to; 0 for marks and the end."""
    encoded = encode_answers(
        held_out.tokenizer, *zip(*held_out.answers, strict=True), max_prompt_tokens=48, max_answer_tokens=99
    )
    rewards = []
    for (prompt, answer), row in zip(held_out.answers, encoded, strict=True):
        spans = character_spans(held_out.tokenizer, row.answer_ids, context=row.ids[: row.answer_start])
        by_character = dict.fromkeys(range(len(answer)), 0.0)
        for word in embedded.gold(prompt, answer).words:
            by_character |= dict.fromkeys(range(word.start, word.end), word.gold)
        rewards.append([by_character[end - 1] if end > start else 0.0 for start, end in spans])
    return rewards


def test_a_reward_that_is_gold_correlates_perfectly_and_one_token_beside_it_does_not() -> None:
    held_out = embedded_held_out()
    rewards = golden(held_out)
    found = measures.measures(held_out, [], rewards)
    # a mean of three equal rewards is not that reward to the last bit, and then no tie any more
    assert found["gold_words"] == pytest.approx(1.0, abs=1e-4) and found["gold_content"] == pytest.approx(1.0, abs=1e-4)
    assert found["gold_answers"] > 0.9 and found["preference_accuracy"] > 0.6
    beside = measures.measures(held_out, [], [[row[-1], *row[:-1]] for row in rewards])
    assert beside["gold_words"] < 0.5 and beside["gold_content"] < 0.5


def test_the_length_correlation_sees_that_long_answers_are_paid_less() -> None:
    held_out = replace(embedded_held_out(2), has_gold=False)
    found = measures.measures(held_out, [], [[0.5], [0.1, 0.1], [0.0, 0.0, 0.0], [-0.1] * 4])
    assert found == {"preference_accuracy": 1.0, "length_correlation": pytest.approx(-1.0)}


def test_the_token_alone_is_its_mean_label_in_training() -> None:
    """b was taken away once and kept once on either side of the second pair: (-1 + 0 + 0) / 3."""
    training = [label("ab", "ac"), label("bd", "bd")]
    pairs = [label("xb", "xc")]
    held_out = measures.HeldOut(
        LETTERS,
        DataConfig(),
        pairs,
        pairs,
        [PreferencePair("1", "p", chosen="c", rejected="b")],
        has_gold=False,
    )
    found = measures.of_token_alone(training, held_out)
    assert found["mean_reward_negative"] == pytest.approx(-1 / 3, abs=1e-5)
    assert found["mean_reward_positive"] == pytest.approx(1.0, abs=1e-5)
    assert found["mean_reward_neutral"] == 0.0  # x never occurred, the end was never edited
    assert (found["preference_accuracy"], found["training_pairs"]) == (1.0, 2)


# ---- what the file says


def test_every_cell_once_named_by_what_differs(tmp_path: Path) -> None:
    grids = [
        {"discriminator.targets": ["soft", "hard"], "discriminator.bidirectional_layers": [0, 1]},
        {"pairs": [None, 20], "discriminator.targets": ["hard"]},
    ]
    found = study.read_study(write(tmp_path, grids=grids))
    assert [cell.name for cell in found.cells] == [
        "as-configured",
        "bidirectional_layers-1",
        "targets-hard",
        "bidirectional_layers-1+targets-hard",
        "targets-hard+pairs-20",
    ]
    assert found.cells[-1].pairs == 20 and found.cells[-1].overrides == {"discriminator.targets": "hard"}
    assert found.run_config(3, found.cells[-1].overrides).discriminator.targets == "hard"
    assert found.run_config(3).seed == 3


def test_the_study_of_the_repository_is_one() -> None:
    found = study.read_study(Path(study.__file__).with_name("study.yaml"))
    assert len(found.seeds) >= 5 and found.cells[0].name == "as-configured"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grids": [{"ppo.clip": [0.1]}]}, "a grid varies ppo.clip"),
        ({"grids": [{"pairs": 20}]}, "pairs is 20 in a grid; wanted a list"),
        ({"grids": []}, r"grids is \[\]; wanted a list of at least one"),
        ({"grids": None}, "grids is None; wanted a list"),
        ({"grids": ["pairs"]}, "a grid is 'pairs'; wanted knobs"),
        ({"typo": 1}, "wanted output_dir, config"),
    ],
)
def test_a_file_that_cannot_be_a_study(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        study.read_study(write(tmp_path, **changes))


def test_a_value_out_of_bounds_stops_before_anything_is_trained(tmp_path: Path) -> None:
    path = write(tmp_path, grids=[{"discriminator.epochs": [1, 0]}])
    with pytest.raises(ConfigError, match="epochs is 0"):
        _ = study.read_study(path).cells
    assert study.main([str(path)]) == 2


# ---- the table


@pytest.fixture
def measured(tmp_path: Path) -> Callable[..., study.Study]:
    """A study whose measures were written by hand: {cell: {seed: gold_content}}."""

    def make(values: dict[str, dict[int, float]]) -> study.Study:
        found = study.read_study(write(tmp_path, seeds=[0, 1], grids=[{"pairs": [None, 20]}]))
        for cell, by_seed in values.items():
            for seed, value in by_seed.items():
                folder = tmp_path / "out" / f"seed-{seed}" / "cells" / cell
                folder.mkdir(parents=True)
                own = {"gold_content": value, "training_pairs": 54}
                (folder / study.MEASURED).write_text(json.dumps({"metrics": own}))
                if cell != study.TOKEN_ALONE:
                    (folder / "done.json").write_text(json.dumps({"metrics": {"ece_after": None}}))
        return found

    return make


def test_differences_are_taken_within_a_seed(measured: Callable[..., study.Study]) -> None:
    found = measured({"token-alone": {0: 0.2, 1: 0.3}, "as-configured": {0: 0.6, 1: 0.8}, "pairs-20": {0: 0.5, 1: 0.7}})
    alone, whole, few = study.collect(found)
    assert [row["cell"] for row in (alone, whole, few)] == ["token-alone", "as-configured", "pairs-20"]
    assert whole["measures"]["gold_content"]["mean"] == pytest.approx(0.7)
    assert whole["difference"]["gold_content"] is None
    # the two seeds differ by .2, the cells by .1 in both: a paired difference has no spread
    assert few["difference"]["gold_content"]["difference"] == pytest.approx(-0.1)
    assert few["difference"]["gold_content"]["sd"] == pytest.approx(0.0, abs=1e-12)
    assert few["measures"]["gold_content"]["sd"] > 0.1
    study.write_results(found)
    table = (Path(found.output_dir) / "results.md").read_text()
    assert "| as-configured | 0.700 ± 1.271 |" in table  # 12.706 standard errors of .1
    assert (Path(found.output_dir) / "gold_content.svg").read_text().startswith("<svg")


def test_what_is_not_done_is_not_in_the_table(measured: Callable[..., study.Study]) -> None:
    found = measured({"token-alone": {0: 0.2}, "as-configured": {0: 0.6}})
    assert [row["cell"] for row in study.collect(found)] == ["token-alone", "as-configured"]
    assert study.collect(found)[1]["seeds"] == [0]


# ---- all of it


@pytest.mark.slow
def test_a_study_goes_on_where_it_was(tmp_path: Path) -> None:
    assert study.main([str(write(tmp_path))]) == 0
    cells = tmp_path / "out" / "seed-0" / "cells"
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert len(kept) == 2  # the SFT model and one discriminator
    first = (cells / "pairs-20" / study.MEASURED).read_text()

    # a cell that was interrupted before its end, and a grid that was added
    (cells / "pairs-20" / study.MEASURED).unlink()
    grown = write(tmp_path, grids=[{"pairs": [20]}, {"discriminator.bidirectional_layers": [2]}])
    assert study.main([str(grown)]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = json.loads((cells / "pairs-20" / study.MEASURED).read_text())
    assert again["metrics"] == json.loads(first)["metrics"]
    rows = {row["cell"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())}
    assert list(rows) == ["token-alone", "pairs-20", "bidirectional_layers-2"]
    # who sees only what came before cannot know of the edit to come; who sees the whole answer can
    assert abs(rows["pairs-20"]["measures"]["spill_before"]["mean"]) < 1e-6
    assert "gold_content" in rows["bidirectional_layers-2"]["measures"]


def test_a_seed_that_the_study_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its models would be trained, and stand in no table."""
    assert study.main([str(write(tmp_path)), "--seeds", "9"]) == 2
    assert "--seeds names [9]; the study has 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_more_pairs_than_there_are_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, grids=[{"pairs": [1000]}], overrides={**STUDY["overrides"], "sft.enabled": True})  # type: ignore[dict-item]
    assert study.main([str(path)]) == 2
    assert "asks for 1000 of" in capsys.readouterr().err
