"""Opening the folder of a run: what a start writes there, and whose it may be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.experiment.helpers import arm_config, small_config
from tlcr.config.schema import RunConfig
from tlcr.errors import CheckpointError, ConfigError
from tlcr.experiment.opening import config_kept_if_refused, open_run, reopen_run
from tlcr.files import write_json


def test_a_run_that_is_there_is_continued_on_request_only(tmp_path: Path) -> None:
    cfg = small_config(tmp_path / "run")
    assert open_run(cfg, resume=False).resume is False
    assert open_run(cfg, resume=False).resume is False  # a config alone: the run before it failed at once
    write_json(tmp_path / "run" / "sft" / "done.json", {})
    with pytest.raises(ConfigError, match="already holds a run; pass --resume to continue it"):
        open_run(cfg, resume=False)
    assert open_run(cfg, resume=True).resume is True
    assert open_run(cfg, resume=False, whole=False).models == tmp_path / "run"  # one stage shares the folder


def test_a_moved_folder_is_reopened_where_it_lies(tmp_path: Path) -> None:
    open_run(small_config(tmp_path / "there", **{"data.embedded_pairs": 30}), resume=False)
    (tmp_path / "there").rename(tmp_path / "here")
    run = reopen_run(tmp_path / "here")
    assert run.cfg.output_dir == str(tmp_path / "here") == str(run.path) == str(run.models)
    assert run.cfg.data.embedded_pairs == 30 and run.resume
    with pytest.raises(ConfigError, match=r"holds no run \(no config.yaml\)"):
        reopen_run(tmp_path / "there")


@pytest.mark.parametrize("changed", ["ppo/a/seed-0/metrics.jsonl", "ppo/a/seed-0/arm.json", "labels/done.json"])
def test_a_command_that_fails_leaves_the_config_of_what_is_there(tmp_path: Path, changed: str) -> None:
    """The old one where it changed nothing, its own where it did: a step that was taken, a record that is new."""
    cfg = small_config(tmp_path / "run")
    path = open_run(cfg, resume=False).path / "config.yaml"
    write_json(tmp_path / "run" / "sft" / "done.json", {})
    before, other = path.read_text(), replace(cfg, parallel=3)

    def fail(*files: str, by: RunConfig = other) -> str:
        with pytest.raises(CheckpointError, match="why"), config_kept_if_refused(other):
            open_run(by, resume=True, whole=False)
            assert path.read_text() != before
            for name in files:
                write_json(tmp_path / "run" / name, {})
            raise CheckpointError("why")
        return path.read_text()

    assert fail() == before
    assert fail("shares/done.json", "ppo/a/seed-0/log.txt") == before
    assert "parallel: 4" in fail(by=replace(cfg, parallel=4))  # of another command in the folder
    path.write_text(before)
    assert "parallel: 3" in fail(changed)


def test_a_link_that_leads_nowhere_does_not_end_a_command(tmp_path: Path) -> None:
    cfg = small_config(tmp_path / "run")
    open_run(cfg, resume=False)
    (tmp_path / "run" / "metrics.jsonl").symlink_to("gone")
    with config_kept_if_refused(cfg):
        open_run(cfg, resume=True)


def test_data_that_changed_in_place_are_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No setting shows them: stages that are done keep what they learnt, and others would read the new records."""
    source, folder = tmp_path / "pairs.jsonl", tmp_path / ".hidden" / "edits"
    folder.mkdir(parents=True)
    for path in (source, folder / "a.jsonl"):
        path.write_text('{"prompt": "a"}\n', encoding="utf-8")
    before = small_config(tmp_path / "run")
    cfg = replace(before, data=replace(before.data, preferences=str(source)))
    open_run(cfg, resume=False)
    source.write_text('{"prompt": "A"}\n', encoding="utf-8")
    open_run(cfg, resume=True)  # mended before anything learnt from it
    (tmp_path / "run" / "sft").mkdir()
    write_json(tmp_path / "run" / "sft" / "done.json", {})
    with_edits = replace(cfg, data=replace(cfg.data, edits=str(folder)))
    for again in (cfg, with_edits, with_edits, cfg):
        open_run(again, resume=True)
    assert "is not what it was" not in caplog.text
    (folder / "README.md").write_text("no record", encoding="utf-8")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "of_a_tool.json").write_text("{}", encoding="utf-8")
    (folder / "folder.json").mkdir()
    open_run(with_edits, resume=True)
    (folder / "a.jsonl").write_text('{"prompt": "b"}\n', encoding="utf-8")
    open_run(cfg, resume=True)
    assert "is not what it was" not in caplog.text  # it does not read them
    for _ in range(2):
        open_run(with_edits, resume=True)
    assert (
        caplog.text.count(f"{folder} is not what it was when the run in {cfg.output_dir} began with it") == 1
    )  # said once
    caplog.clear()
    source.write_text('{"prompt": "a"}\n' * 2, encoding="utf-8")
    open_run(cfg, resume=True)
    assert f"{source} is not what it was" in caplog.text


def test_other_weights_under_the_same_path_are_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, cfg = tmp_path / "model", arm_config(tmp_path, tmp_path / "model")
    model.mkdir(exist_ok=True)
    weights = model / "model.safetensors"
    weights.write_bytes(b"weights" * 100_000)
    open_run(cfg, resume=False)
    open_run(cfg, resume=True)
    assert "is not what it was" not in caplog.text
    weights.write_bytes(b"wEights" * 100_000)
    open_run(cfg, resume=True)
    assert f"{model} is not what it was when the run in {cfg.output_dir} began (model.safetensors)" in caplog.text
    caplog.clear()
    weights.unlink()
    open_run(cfg, resume=True)
    assert "(model.safetensors)" in caplog.text
