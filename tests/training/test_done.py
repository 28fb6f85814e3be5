"""Records of trainings that ended: what they hold, and when they are no reason to train again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tlcr.config.schema import KLConfig, RunConfig
from tlcr.errors import CheckpointError
from tlcr.training.done import decisive, done_config, is_done, mark_done


def test_a_stage_is_done_with_its_config_and_its_checkpoints_go(tmp_path):
    assert not is_done(tmp_path, RunConfig())
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    mark_done(tmp_path, config=RunConfig(), metrics={"loss": 0.1, "auc": float("nan")}, seconds=2.5)
    assert is_done(tmp_path, RunConfig())
    assert not is_done(tmp_path, RunConfig(seed=1))
    record = json.loads((tmp_path / "done.json").read_text())
    assert (record["metrics"], record["seconds"]) == ({"loss": 0.1, "auc": None}, 2.5)
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["threads"] == torch.get_num_threads() and record["machine"]["processes"] == 1
    assert record["machine"]["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert [path.name for path in tmp_path.iterdir()] == ["done.json"]
    (tmp_path / "done.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"done\.json cannot be read"):
        is_done(tmp_path, RunConfig())


def test_a_knob_that_came_later_is_no_reason_to_train_again(tmp_path):
    settings = {"seed": 3, "data": RunConfig().data}
    mark_done(tmp_path, config=settings, metrics={}, seconds=1.0)
    record = json.loads((tmp_path / "done.json").read_text())
    for knob in ("shares", "held_out"):
        del record["config"]["data"][knob]
    (tmp_path / "done.json").write_text(json.dumps(record))
    assert is_done(tmp_path, settings)
    assert done_config(tmp_path, settings) == decisive(settings)
    assert not is_done(tmp_path, settings | {"data": replace(RunConfig().data, held_out=0.2)})
    assert not is_done(tmp_path, settings | {"data": replace(RunConfig().data, limit=5)})

    record["config"]["data"]["knob_of_the_past"] = 1
    (tmp_path / "done.json").write_text(json.dumps(record))
    assert not is_done(tmp_path, settings)


def test_a_path_that_was_noted_as_it_was_given_is_no_reason_to_train_again(tmp_path, monkeypatch):
    """Earlier versions noted a source of data in the user's home with its ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {"data": replace(RunConfig().data, preferences="~/pairs.jsonl")}
    mark_done(tmp_path, config=settings, metrics={}, seconds=1.0)
    record = json.loads((tmp_path / "done.json").read_text())
    assert record["config"]["data"]["preferences"] == str(tmp_path / "pairs.jsonl")
    record["config"]["data"]["preferences"] = "~/pairs.jsonl"
    (tmp_path / "done.json").write_text(json.dumps(record))
    assert is_done(tmp_path, settings)
    assert not is_done(tmp_path, {"data": replace(RunConfig().data, preferences="pairs.jsonl")})


def test_a_knob_that_was_dropped_is_no_reason_to_train_again_where_it_had_its_default(tmp_path):
    settings = {"labels": RunConfig().labels, "reviser": {"model": RunConfig().reviser.model}, "sft": RunConfig().sft}
    mark_done(tmp_path, config=settings, metrics={}, seconds=1.0)
    record = json.loads((tmp_path / "done.json").read_text())
    record["config"]["labels"]["warn_edited_share"] = 0.6
    record["config"]["reviser"]["model"]["gradient_checkpointing"] = False
    (tmp_path / "done.json").write_text(json.dumps(record))
    assert is_done(tmp_path, settings)
    assert not is_done(tmp_path, settings | {"sft": replace(RunConfig().sft, enabled=False)})

    record["config"]["labels"]["warn_edited_share"] = 0.7
    (tmp_path / "done.json").write_text(json.dumps(record))
    assert not is_done(tmp_path, settings)


@pytest.mark.parametrize(("target", "done"), [(None, True), (0.5, False)])
def test_an_old_default_is_no_reason_to_train_again_where_it_did_nothing(tmp_path, target, done):
    settings = {"kl": KLConfig(target=target)}
    mark_done(tmp_path, config=settings, metrics={}, seconds=1.0)
    record = json.loads((tmp_path / "done.json").read_text())
    record["config"]["kl"]["horizon"] = 10_000
    (tmp_path / "done.json").write_text(json.dumps(record))
    assert is_done(tmp_path, settings) == done
    assert not is_done(tmp_path, {"kl": KLConfig(target=target, coef=0.7)})
