"""The pipeline on the embedded task, at a size that takes seconds: what it writes, skips, refuses and resumes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, get_args, get_type_hints

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.experiment.helpers import small_config, write_pairs
from tlcr.config.dropped import dropped_knobs
from tlcr.config.loading import dump_config, load_config
from tlcr.config.schema import Arm, EngineName, RewardConfig, RewardKind, RunConfig
from tlcr.config.trials import Trial, trials_of
from tlcr.errors import CheckpointError, ConfigError, TlcrError
from tlcr.evaluation.evaluate import PolicyEvaluation, evaluate_policy
from tlcr.experiment import pipeline, workers
from tlcr.experiment.opening import open_run, reopen_run
from tlcr.experiment.pipeline import analyse, analyse_edits, run, stage
from tlcr.experiment.run_folder import RunFolder, _differences
from tlcr.files import write_json
from tlcr.training.callbacks import Callback
from tlcr.training.checkpoint import as_plain
from tlcr.training.metrics import read_metrics
from tlcr.training.supervised import FitResult


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    cfg = small_config(tmp_path_factory.mktemp("run") / "run")
    run(cfg)
    return cfg


def test_a_run_leaves_models_that_load_anywhere_and_a_report(finished: RunConfig) -> None:
    folder = Path(finished.output_dir)
    AutoModelForCausalLM.from_pretrained(folder / "sft")
    AutoModelForSequenceClassification.from_pretrained(folder / "reward_model")
    discriminator = AutoModelForTokenClassification.from_pretrained(folder / "discriminator")
    assert discriminator.config.id2label == {0: "negative", 1: "positive"}
    trained = AutoModelForCausalLM.from_pretrained(folder / "ppo" / "continuous" / "seed-0" / "policy")
    start = AutoModelForCausalLM.from_pretrained(folder / "sft")
    moved = [not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters(), strict=True)]
    assert any(moved)
    assert (folder / "report.html").stat().st_size > 10_000
    results = json.loads((folder / "results.json").read_text())
    assert "continuous" in json.dumps(results) and "sequence" in json.dumps(results)


@pytest.mark.slow
def test_every_reward_trains_on_the_device_of_the_run(tmp_path: Path, device: torch.device) -> None:
    alike = ("discrete", "sign", "positive_only", "negative_only")  # other functions of the logits of "continuous"
    kinds = [kind for kind in get_args(RewardKind) if kind not in alike]
    named = {"callable": {"callable": "tests.ppo.helpers:reward_low_ids"}}
    rewards = {kind: RewardConfig(kind=kind, **named.get(kind, {})) for kind in kinds}
    cfg = small_config(tmp_path / "run", **{"ppo.updates": 1, "evaluation.prompts": 4})
    run(replace(cfg, arms=tuple(Arm(name.replace("_", "-"), reward=reward) for name, reward in rewards.items())))
    done = sorted(path.parent.parent.name for path in tmp_path.glob("run/ppo/*/seed-0/done.json"))
    assert done == sorted(name.replace("_", "-") for name in kinds)
    assert reopen_run(tmp_path / "run").device.type == device.type


def test_the_discriminator_is_analysed_on_what_it_has_not_seen(finished: RunConfig, tmp_path: Path) -> None:
    folder = Path(finished.output_dir)
    found = json.loads((folder / "analysis" / "analysis.json").read_text())
    held_out = reopen_run(folder).edits.held_out
    assert found["pairs"] == len(held_out) > 0
    assert {"revised over rejected", "chosen over rejected"} == set(found["comparisons"])
    assert "By what the edit did" in (folder / "report.html").read_text()

    # the same pairs from a file: the same figures, but calibration at the stored temperature
    lines = [json.dumps({k: getattr(e, k) for k in ("id", "prompt", "rejected", "revised")}) for e in held_out]
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"--output '.*edits.jsonl' cannot be a folder: File exists; name another"):
        analyse_edits(folder, "unread.jsonl", tmp_path / "edits.jsonl")
    page = analyse_edits(folder, str(tmp_path / "edits.jsonl"), tmp_path / "out")
    again = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert again["kinds"] == found["kinds"] and again["spill"] == found["spill"]
    assert page == tmp_path / "out" / "analysis.html" and "edits.jsonl" in page.read_text()

    # a file of preferences is in its own form, whatever the run's were in
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "ppo"))
    config = dump_config(
        replace(finished, data=replace(finished.data, preferences="hh.jsonl", preferences_format="hh"))
    )
    (tmp_path / "run" / "config.yaml").write_text(config)
    pairs = [json.dumps({"prompt": e.prompt, "chosen": e.revised, "rejected": e.rejected}) for e in held_out]
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))
    analyse_edits(
        tmp_path / "run", str(tmp_path / "edits.jsonl"), tmp_path / "out", preferences=str(tmp_path / "pairs.jsonl")
    )
    assert "chosen over rejected" in json.loads((tmp_path / "out" / "analysis.json").read_text())["comparisons"]

    # shares are of the run's own pairs; of others all are analysed, and no preferences are needed
    parted = replace(finished.data, preferences="hh.jsonl", shares=(2, 4, 4))
    (tmp_path / "run" / "config.yaml").write_text(dump_config(replace(finished, data=parted)))
    analyse_edits(tmp_path / "run", str(tmp_path / "edits.jsonl"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "analysis.json").read_text())["pairs"] == len(held_out)


def test_edits_that_the_discriminator_has_seen_are_counted(
    finished: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = reopen_run(Path(finished.output_dir)).model_folders[0]
    pairs = [*run.edits.train[:3], *run.edits.held_out]
    lines = [json.dumps({k: getattr(e, k) for k in ("id", "prompt", "rejected", "revised")}) for e in pairs]
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))
    analyse_edits(run.path, str(tmp_path / "edits.jsonl"), tmp_path / "out")
    assert f"was trained on 3 of these {len(pairs)} edits" in caplog.text


@pytest.mark.slow
def test_a_run_says_once_what_it_found_and_wrote(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tlcr")
    cfg = small_config(tmp_path / "run")
    run(cfg)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len({*said}), said
    assert sum(line.startswith("token labels: 80 pairs, ") for line in said) == 1
    wrote = [f"wrote {tmp_path / 'run' / name}" for name in ("sft", "reward_model", "discriminator")]
    policies = ["policy 1 of 2: continuous/seed-0", "policy 2 of 2: sequence/seed-0"]
    assert [line for line in said if line in (*wrote, *policies)] == [*wrote, *policies]

    caplog.clear()
    stage(replace(cfg, output_dir=str(tmp_path / "run")), "ppo", resume=True)
    folder = tmp_path / "run"
    assert f"wrote {folder / 'ppo'}; 'tlcr report {folder}' compares the policies" in caplog.messages
    assert not any(line.startswith("policy 1") for line in caplog.messages), "they are done"


def test_an_analysis_can_be_made_again(finished: RunConfig) -> None:
    path = Path(finished.output_dir) / "analysis" / "analysis.json"
    before = path.read_text()
    path.write_text("{}")
    assert analyse(Path(finished.output_dir)).name == "report.html"
    assert path.read_text() == before


def test_what_holds_no_run_cannot_be_analysed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        analyse(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(small_config(tmp_path, **{"data.held_out": 0})))
    with pytest.raises(ConfigError, match="held no edit out"):
        analyse(tmp_path)


def test_before_training_every_arm_is_the_reference(finished: RunConfig) -> None:
    for arm in ("continuous", "sequence"):
        record = json.loads((Path(finished.output_dir) / "ppo" / arm / "seed-0" / "evaluation.json").read_text())
        assert record["before"]["kl_per_token"] == pytest.approx(0.0, abs=1e-6)
        assert record["after"]["kl_per_token"] != 0
        assert record["before"]["answers"] == 6


def test_what_is_done_is_skipped_to_the_byte(finished: RunConfig) -> None:
    folder = Path(finished.output_dir)
    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".jsonl")]
    times = {path: path.stat().st_mtime_ns for path in files}
    run(finished, resume=True)
    assert {path: path.stat().st_mtime_ns for path in files} == times


def test_a_folder_with_a_run_is_not_overwritten(finished: RunConfig) -> None:
    with pytest.raises(ConfigError, match="already holds a run; pass --resume"):
        run(finished)


def test_results_of_two_configs_are_not_mixed(finished: RunConfig) -> None:
    changed = replace(finished, discriminator=replace(finished.discriminator, learning_rate=0.5))
    written = (Path(finished.output_dir) / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"discriminator\.learning_rate was 1e-05, is 0\.5"):
        run(changed, resume=True)
    # what is refused leaves the config of what the folder was made with
    assert (Path(finished.output_dir) / "config.yaml").read_text() == written


@pytest.mark.parametrize(("first", "then"), [("raise", "skip"), ("skip", "raise")])
def test_what_becomes_of_malformed_records_may_change_after_a_stage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: str, then: str
) -> None:
    """The advice of the error in a later stage, data.on_malformed=skip, was refused by those that had ended."""
    cfg = small_config(tmp_path / "run", **{"data.on_malformed": first})
    stage(cfg, "labels")
    with caplog.at_level("INFO", "tlcr"):
        stage(replace(cfg, data=replace(cfg.data, on_malformed=then)), "labels", resume=True)
    assert f"{tmp_path / 'run' / 'labels'} is done; skipped" in caplog.messages


def test_a_setting_that_is_new_since_then_is_named() -> None:
    """A folder of an older version has not every knob; that the two differ in None is not to be said."""
    then, now = {"reward": {"kind": "sign"}}, {"reward": {"kind": "sign", "compat": None}}
    assert _differences(then, now) == ["reward.compat was not there, is None"]
    assert _differences(now, then) == []
    assert _differences({"a": {"b": 1}}, {"a": {"b": 2}}) == ["a.b was 1, is 2"]
    assert _differences({"a": {"b": 1}}, {"a": {}}) == ["a.b was 1, is no longer there"]


def with_dropped_knobs(values: dict[str, Any], cls: type) -> dict[str, Any]:
    """A section as an older version wrote it: with the knobs that it had, at their defaults."""
    hints = get_type_hints(cls)
    sections = {name: hint for name, hint in hints.items() if is_dataclass(hint) and isinstance(values.get(name), dict)}
    inner = {name: with_dropped_knobs(values[name], hint) for name, hint in sections.items()}
    return {**values, **{name: gone.default for name, gone in dropped_knobs(cls).items()}, **inner}


@pytest.mark.slow
def test_a_run_of_an_older_version_goes_on_and_is_reported(finished: RunConfig, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.output_dir, tmp_path / "run"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(with_dropped_knobs(config, RunConfig)))
    aged = set()
    for name in ("done.json", "arm.json"):
        for path in folder.rglob(name):
            record = json.loads(path.read_text())
            # Each holds some sections of the config; train_ppo's own, only what no knob has been dropped of.
            config = with_dropped_knobs(record["config"], RunConfig)
            aged |= {name for name in config if config[name] != record["config"].get(name)}
            path.write_text(json.dumps({**record, "config": config}))
    assert aged == {"labels", "discriminator", "reward_model"}

    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".jsonl")]
    times = {path: path.stat().st_mtime_ns for path in files}
    cfg = load_config(folder / "config.yaml", {"output_dir": str(folder)})
    assert replace(cfg, output_dir=finished.output_dir) == finished
    run(cfg, resume=True)
    pipeline.report(folder)
    assert {path: path.stat().st_mtime_ns for path in files} == times
    assert "warn_edited_share" not in (folder / "config.yaml").read_text()


def test_a_stage_says_which_one_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run 'tlcr train sft' with this config first"):
        stage(small_config(tmp_path / "run"), "discriminator")


@pytest.mark.parametrize(
    ("name", "changes", "other"),
    [
        ("sft", {"data": {"max_answer_tokens": 12}}, r"data \(data was"),
        ("discriminator", {"labels": {"end_of_sequence": "ignore"}}, r"data \(data was"),
        ("dpo", {"model": {"dtype": "bfloat16"}}, r"origin \(origin\.dtype was"),
    ],
)
def test_an_interrupted_stage_goes_on_from_what_it_began_with(
    finished: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    changes: dict[str, dict[str, Any]],
    other: str,
) -> None:
    class Stop(Callback):
        def on_save(self, step: int, path: Path) -> None:
            raise ZeroDivisionError

    training = replace(getattr(finished, name), save_every=1)
    cfg = replace(finished, output_dir=str(tmp_path), **{name: training})
    if name != "sft":
        shutil.copytree(Path(finished.output_dir) / "sft", tmp_path / "sft")
    recipe = getattr(pipeline, f"train_{name}")
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, f"train_{name}", lambda cfg, **given: recipe(cfg, callbacks=[Stop()], **given))
        with pytest.raises(ZeroDivisionError):
            stage(cfg, name)
    written = (tmp_path / "config.yaml").read_text()
    sections = {section: replace(getattr(cfg, section), **values) for section, values in changes.items()}
    with pytest.raises(CheckpointError, match=f"belongs to a run with other {other}"):
        stage(replace(cfg, **sections), name, resume=True)
    assert (tmp_path / "config.yaml").read_text() == written
    stage(cfg, name, resume=True)


@pytest.mark.parametrize("name", ["sft", "discriminator"])
def test_a_stage_records_the_seconds_of_its_training_over_all_sittings(
    finished: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fitted = FitResult(1, {}, {}, 5000.0, stopped=False)
    found = fitted if name == "sft" else SimpleNamespace(metrics={}, fit=fitted)
    monkeypatch.setattr(pipeline, f"train_{name}", lambda cfg, **_: found)
    if name != "sft":
        shutil.copytree(Path(finished.output_dir) / "sft", tmp_path / "sft")
    stage(replace(finished, output_dir=str(tmp_path)), name)
    assert json.loads((tmp_path / name / "done.json").read_text())["seconds"] == 5000.0


def test_data_of_ones_own_must_be_named(tmp_path: Path, finished: RunConfig) -> None:
    own = replace(finished.model, path=str(Path(finished.output_dir) / "sft"))
    cfg = replace(finished, output_dir=str(tmp_path), model=own)
    with pytest.raises(ConfigError, match=r"data\.preferences is not set, and training on preferences needs it"):
        run(cfg)


def test_evaluating_again_finds_what_training_found(finished: RunConfig) -> None:
    path = Path(finished.output_dir) / "ppo" / "continuous" / "seed-0" / "evaluation.json"
    before = json.loads(path.read_text())
    stage(finished, "evaluate")
    assert json.loads(path.read_text()) == before


@pytest.mark.slow
def test_every_engine_evaluates_a_policy_alike(finished: RunConfig, tmp_path: Path) -> None:
    """With top-k 1 each takes the most probable token."""
    shutil.copytree(finished.output_dir, tmp_path / "run")
    greedy = replace(finished.rollout, top_k=1)
    few = replace(finished.evaluation, prompts=3)
    cfg = replace(finished, output_dir=str(tmp_path / "run"), arms=finished.arms[:1], evaluation=few)
    samples = tmp_path / "run" / "ppo" / "continuous" / "seed-0" / "samples.jsonl"

    def by(engine: EngineName) -> list[dict[str, Any]]:
        samples.unlink()
        stage(replace(cfg, rollout=replace(greedy, engine=engine)), "evaluate")
        return [json.loads(line) for line in samples.read_text().splitlines()]

    expected, found = by("generate"), by("paged")
    assert len({one["response"] for one in expected}) > 1
    assert [(one["when"], one["response"]) for one in found] == [(e["when"], e["response"]) for e in expected]
    assert [one["reward"] for one in found] == [pytest.approx(e["reward"], abs=1e-5) for e in expected]


def test_no_policy_is_evaluated_twice(finished: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start, after each update, and not again for evaluation.json, which holds what was logged."""
    counted: list[int] = []

    def evaluate(prompts: Sequence[str], **arguments: Any) -> PolicyEvaluation:
        counted.append(len(prompts))
        return evaluate_policy(prompts, **arguments)

    monkeypatch.setattr("tlcr.experiment.arm.evaluate_policy", evaluate)
    trained = Path(finished.output_dir)
    cfg = replace(
        finished,
        output_dir=str(tmp_path / "run"),
        model=finished.model.saved_in(trained / "sft"),
        data=replace(finished.data, preferences=str(write_pairs(tmp_path / "pairs.jsonl"))),
        sft=replace(finished.sft, enabled=False),
        discriminator=replace(finished.discriminator, path=str(trained / "discriminator")),
        ppo=replace(finished.ppo, evaluate_every=1),
        arms=(Arm("continuous"),),
    )
    run(cfg)
    folder = tmp_path / "run" / "ppo" / "continuous" / "seed-0"
    logged = [row["eval/kl_per_token"] for row in read_metrics(folder / "metrics.jsonl") if "eval/kl_per_token" in row]
    assert len(counted) == len(logged) == 3
    written = json.loads((folder / "evaluation.json").read_text())
    assert [logged[0], logged[-1]] == [written[when]["kl_per_token"] for when in ("before", "after")]
    assert len(set(logged)) == 3


@pytest.mark.slow
def test_runs_side_by_side_give_what_runs_in_turn_give(finished: RunConfig, tmp_path: Path) -> None:
    cfg = replace(finished, output_dir=str(tmp_path / "run"), parallel=2)
    run(cfg)
    for arm in ("continuous", "sequence"):
        ours, theirs = (
            json.loads((Path(c.output_dir) / "ppo" / arm / "seed-0" / "evaluation.json").read_text())
            for c in (cfg, finished)
        )
        assert ours["after"]["kl_per_token"] == pytest.approx(theirs["after"]["kl_per_token"], rel=1e-4, abs=1e-6)


def test_a_run_that_is_opened_again_keeps_its_config_file(finished: RunConfig, tmp_path: Path) -> None:
    """Stages may be started in it at the same time: two that wrote would pull the file from under each other."""
    cfg = replace(finished, output_dir=str(tmp_path / "run"))
    path = open_run(cfg, resume=False).path / "config.yaml"
    before = path.stat().st_ino
    open_run(load_config(path, {}), resume=True, whole=False)
    assert path.stat().st_ino == before
    open_run(replace(cfg, parallel=3), resume=True)
    assert "parallel: 3" in path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_worker_that_fails_is_named_with_its_reason(finished: RunConfig, tmp_path: Path) -> None:
    arms = (
        Arm("works"),
        Arm("breaks", reward=RewardConfig(kind="callable", callable="tests.experiment.helpers:reward_that_fails")),
    )
    cfg = replace(finished, output_dir=str(tmp_path / "run"), parallel=2, arms=arms)
    with pytest.raises(TlcrError, match=r"ppo breaks/seed-0 ended with code 2: .*no score for these answers"):
        run(cfg)


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_policies(finished: RunConfig, tmp_path: Path) -> None:
    cfg = replace(finished, output_dir=str(tmp_path / "run"), ppo=replace(finished.ppo, updates=6))
    whole = replace(cfg, output_dir=str(tmp_path / "whole"))
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(cfg))
    command = [sys.executable, "-m", "tlcr", "run", str(file), "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    metrics = Path(cfg.output_dir) / "ppo" / "continuous" / "seed-0" / "metrics.jsonl"
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and read_metrics(metrics)) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "--resume" in said.strip().splitlines()[-1]
    run(cfg, resume=True)
    run(whole)
    for arm in ("continuous", "sequence"):
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(Path(c.output_dir) / "ppo" / arm / "seed-0" / "policy")
            for c in (cfg, whole)
        )
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


class InThisProcess:
    """Stands for a worker process: its command runs here and now, which spares the imports."""

    started: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, command: tuple[str, ...], *, env: Mapping[str, str], **_: object) -> None:
        assert command[:3] == (sys.executable, "-m", "tlcr.experiment.pipeline")
        self.started.append((command[4], command[5]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(workers.PLACE, env[workers.PLACE])
            self.code = pipeline._worker(*command[3:])

    def poll(self) -> int:
        return self.code


def test_workers_do_what_their_run_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another command in the folder, as an evaluation with other settings, writes its config there."""
    asked: list[tuple[str, int]] = []
    files: set[Path] = set()

    def train(run: RunFolder, trial: Trial) -> None:
        asked.append((trial.arm.name, run.cfg.rollout.max_new_tokens))

    class Worker(InThisProcess):
        def __init__(self, command: tuple[str, ...], **given: Any) -> None:
            files.add(Path(command[3]))
            open_run(replace(cfg, rollout=replace(cfg.rollout, max_new_tokens=128)), resume=True, whole=False)
            super().__init__(command, **given)

    monkeypatch.setattr(workers.subprocess, "Popen", Worker)
    monkeypatch.setattr(InThisProcess, "started", [])
    monkeypatch.setattr(pipeline, "train_arm", train)
    cfg = replace(small_config(tmp_path / "run"), parallel=2)
    for model in ("sft", "reward_model", "discriminator"):
        write_json(tmp_path / "run" / model / "done.json", {})
    stage(cfg, "ppo")
    assert asked == [("continuous", 12), ("sequence", 12)]
    assert load_config(tmp_path / "run" / "config.yaml").rollout.max_new_tokens == 128
    assert not any(path.exists() for path in files)


@pytest.mark.slow
def test_a_grid_shares_the_models_of_a_seed(
    finished: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seeds with models of their own, two coefficients; then a third coefficient, which repeats nothing."""
    monkeypatch.setattr(workers.subprocess, "Popen", InThisProcess)
    monkeypatch.setattr(InThisProcess, "started", [])
    cfg = replace(
        finished,
        output_dir=str(tmp_path / "run"),
        parallel=2,
        seeds=(0, 3),
        models_per_seed=True,
        ppo=replace(finished.ppo, updates=1),
        kl_coefs=(0.5, 0.05),
        arms=(Arm("continuous"), Arm("random", RewardConfig(kind="random"), kl_coefs=(0.1,))),
    )
    folder = run(cfg)
    trials = ["continuous/kl-0.5", "random", "continuous/kl-0.05"]
    ppo = [("ppo", f"{trial}/seed-{seed}") for seed in (0, 3) for trial in trials]
    assert InThisProcess.started == [("models", "0"), ("models", "3"), *ppo]
    assert not (folder / "sft").exists() and not (folder / "models" / "seed-3" / "reward_model").exists()
    first, second = (AutoModelForCausalLM.from_pretrained(folder / "models" / f"seed-{s}" / "sft") for s in (0, 3))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))

    def evaluation(trial: str, seed: int) -> dict:
        return json.loads((folder / "ppo" / trial / f"seed-{seed}" / "evaluation.json").read_text())

    # the arms and coefficients of a seed start from one model, and those of another seed from another
    before = {seed: [evaluation(trial, seed)["before"]["gold_per_token"] for trial in trials] for seed in (0, 3)}
    assert len(set(before[0])) == len(set(before[3])) == 1 and before[0] != before[3]
    settings = json.loads((folder / "ppo" / "continuous" / "kl-0.05" / "seed-3" / "arm.json").read_text())["config"]
    assert (settings["seed"], settings["ppo_seed"], settings["kl"]["coef"]) == (3, 3, 0.05)
    rows = [(row["name"], row["kl_coef"]) for row in json.loads((folder / "results.json").read_text())["arms"]]
    assert rows == [("continuous", 0.05), ("continuous", 0.5), ("random", None)]

    InThisProcess.started.clear()
    run(replace(cfg, kl_coefs=(0.5, 0.05, 0.2)), resume=True)
    assert InThisProcess.started[2:] == [("ppo", f"continuous/kl-0.2/seed-{seed}") for seed in (0, 3)]
    assert "| continuous | 0.2 |" in (folder / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("stage_of", ["ppo", "evaluate"])
def test_every_trial_is_trained_and_evaluated_with_the_models_of_its_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage_of: str
) -> None:
    """One after another too, where no worker opens the run anew."""
    asked: list[tuple[int, str, int]] = []

    def ask(run: RunFolder, trial: Trial) -> None:
        asked.append((run.cfg.seed, run.models.name, trial.seed))

    monkeypatch.setattr(pipeline, "train_arm", ask)
    monkeypatch.setattr(pipeline, "evaluate_arm", ask)
    monkeypatch.setattr(pipeline, "report", lambda folder: folder)
    for seed, model in itertools.product((4, 3), ("sft", "reward_model", "discriminator")):
        write_json(tmp_path / "run" / "models" / f"seed-{seed}" / model / "done.json", {})
    cfg = replace(small_config(tmp_path / "run"), seeds=(4, 3), models_per_seed=True)
    for trial in trials_of(cfg):
        write_json(tmp_path / "run" / "ppo" / trial.folder / "done.json", {})
    stage(cfg, stage_of)
    assert asked == [(seed, f"seed-{seed}", seed) for seed in (4, 4, 3, 3)]


def test_what_is_not_trained_yet_is_not_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(pipeline, "evaluate_arm", lambda run, trial: asked.append(trial.arm.name))
    monkeypatch.setattr(pipeline, "report", lambda folder: folder)
    for model in ("sft", "reward_model", "discriminator"):
        write_json(tmp_path / "run" / model / "done.json", {})
    cfg = small_config(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"ppo holds no finished stage; run 'tlcr train ppo'"):
        stage(cfg, "evaluate")
    write_json(tmp_path / "run" / "ppo" / "sequence" / "seed-0" / "done.json", {})
    with caplog.at_level("INFO"):
        stage(cfg, "evaluate")
    assert asked == ["sequence"] and "continuous/seed-0 is not trained yet, and is not evaluated" in caplog.text


def test_every_rival_is_an_arm(finished: RunConfig, tmp_path: Path) -> None:
    """With the models of the run before, but for DPO's, which no arm of it needed."""
    trained, pairs = Path(finished.output_dir), write_pairs(tmp_path / "pairs.jsonl")
    rewards = {
        "spans": RewardConfig(kind="spans"),
        "rto": RewardConfig(kind="dpo", sequence_coef=1.0),
        "abc": RewardConfig(kind="attention", scale=0.5, sequence_coef=0.5),
        "official": RewardConfig(compat="tlcr-official"),
    }
    cfg = replace(
        finished,
        output_dir=str(tmp_path / "run"),
        model=finished.model.saved_in(trained / "sft"),
        data=replace(finished.data, preferences=str(pairs), edits=str(tmp_path / "unread")),
        sft=replace(finished.sft, enabled=False),
        reward_model=replace(finished.reward_model, path=str(trained / "reward_model")),
        discriminator=replace(finished.discriminator, path=str(trained / "discriminator")),
        dpo=replace(finished.dpo, learning_rate=1e-3, batch_size=8),
        arms=tuple(Arm(name, reward) for name, reward in rewards.items()),
    )
    run(cfg)
    assert (tmp_path / "run" / "dpo" / "done.json").is_file() and not (tmp_path / "run" / "reward_model").exists()
    for name in rewards:
        folder = tmp_path / "run" / "ppo" / name / "seed-0"
        last = read_metrics(folder / "metrics.jsonl")[-1]
        assert last["reward/mean_abs_token"] > 0 and last["reward/share_kl"] > 0
        assert (last["reward/share_terminal"] > 0) == (name in ("rto", "abc"))
        assert last["reward/share_dense"] > 0


def test_a_stage_that_is_asked_for_runs_though_no_arm_needs_it(tmp_path: Path) -> None:
    cfg = replace(small_config(tmp_path / "run"), arms=())
    stage(cfg, "sft")
    stage(cfg, "reward_model")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "reward_model")


def test_the_written_config_is_the_run(finished: RunConfig) -> None:
    assert as_plain(load_config(str(Path(finished.output_dir) / "config.yaml"), {})) == as_plain(finished)
