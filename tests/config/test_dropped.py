"""Knobs of older versions: passed over at the defaults that they had, refused with what to do at any other value."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tlcr.config.dropped import DROPPED, dropped_knobs, dropped_paths, without_dropped
from tlcr.config.judging import AnswerConfig, JudgeConfig
from tlcr.config.loading import dump_config, knobs, load_command_config, load_config
from tlcr.config.schema import EndpointConfig, GeneratorConfig, ModelConfig, RunConfig, SFTConfig
from tlcr.errors import ConfigError


def test_every_dropped_knob_says_what_to_do_and_is_a_knob_no_more() -> None:
    for cls, names in DROPPED.items():
        assert not set(names) & {f.name for f in dataclasses.fields(cls)}
        assert all(len(gone.instead.split()) > 5 for gone in names.values())


def test_a_class_that_has_the_knob_still_keeps_it() -> None:
    assert set(dropped_knobs(GeneratorConfig)) == {"gradient_checkpointing"}
    assert dropped_knobs(ModelConfig) == dropped_knobs(SFTConfig) == {}


def test_they_are_found_in_every_section() -> None:
    assert set(dropped_paths(RunConfig)) == {
        "reviser.model.gradient_checkpointing",
        "reviser.endpoint.json_schema",
        "labels.warn_edited_share",
        "reward_model.enabled",
        "discriminator.enabled",
        "q_model.enabled",
        "dpo.enabled",
    }
    own = {"endpoint.json_schema", "model.gradient_checkpointing"}
    assert set(dropped_paths(AnswerConfig)) == own
    assert set(dropped_paths(JudgeConfig)) == own | {"confidence", "seed", "cache"}
    for cls in (RunConfig, AnswerConfig, JudgeConfig):
        assert not set(dropped_paths(cls)) & {knob.path for knob in knobs(cls)}


OLD = """\
seed: 4
labels:
  end_of_sequence: boundary
  warn_edited_share: 0.6
sft: {enabled: false}
dpo: {enabled: true, beta: 0.2}
reviser:
  model: {gradient_checkpointing: false}
  endpoint: {json_schema: auto}
"""


def test_at_their_defaults_they_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(OLD, encoding="utf-8")
    cfg = load_config(path, {"discriminator.enabled": True})
    assert (cfg.seed, cfg.labels.end_of_sequence, cfg.sft.enabled, cfg.dpo.beta) == (4, "boundary", False, 0.2)
    for path_of_knob in dropped_paths(RunConfig):
        assert path_of_knob.rpartition(".")[2] not in dump_config(cfg) or path_of_knob.endswith(
            ("enabled", "gradient_checkpointing")  # which SFT and the model to train have
        )
    path.write_text("confidence: 0.95\nseed: 0\ncache: null\nlimit: 3\n", encoding="utf-8")
    assert load_command_config(JudgeConfig(), path) == JudgeConfig(limit=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "labels:\n  warn_edited_share: 0.3\n",
            ":2: labels.warn_edited_share is 0.3, and tlcr has no such knob any more: the warning comes above 60%",
        ),
        ("discriminator: {enabled: false}\n", ":1: discriminator.enabled is false, and tlcr has no such knob any more"),
        ("reviser: {endpoint: {json_schema: never}}\n", "set answer_format to marker (reviser) or line (judge)"),
        ("labels: {warn_edited_share: null}\n", "labels.warn_edited_share is null, and"),
        ("labels: {warn_edited_shar: 0.6}\n", "unknown key labels.warn_edited_shar"),
        ("labels: {warn_edited_share: 0.6, warn_edited_share: 0.6}\n", "labels.warn_edited_share stands twice"),
    ],
)
def test_at_another_value_the_error_says_what_holds_now(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)


def test_an_override_is_treated_alike() -> None:
    with pytest.raises(ConfigError, match=r"^dpo\.enabled is false, and tlcr has no such knob any more: this model is"):
        load_config(None, {"dpo.enabled": False})


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"model": "m", "json_schema": "auto"}, {"model": "m"}),
        ({"model": "m", "json_schema": "never"}, {"model": "m", "json_schema": "never"}),
        ({"knob_of_another": 1}, {"knob_of_another": 1}),
    ],
)
def test_a_record_loses_them_where_they_had_their_defaults(values: dict[str, Any], kept: dict[str, Any]) -> None:
    assert without_dropped(EndpointConfig, values) == kept
