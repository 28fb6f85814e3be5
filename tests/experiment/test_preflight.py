"""What is found before a run beyond tests/cli/test_doctor_faults.py: stages, processes, folders, notes."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.experiment.helpers import arm_config, small_config
from tlcr.config.loading import dump_config, load_config
from tlcr.config.schema import ModelConfig, RefreshConfig, RewardConfig, RunConfig
from tlcr.config.stages import stages_of
from tlcr.errors import ConfigError
from tlcr.experiment import contents
from tlcr.experiment.contents import FIRST_RECORDS
from tlcr.experiment.opening import open_run
from tlcr.experiment.pipeline import run, stage
from tlcr.experiment.preflight import Finding, foreign_config, holds_a_run, preflight, refuse, require, settings
from tlcr.models.loading import load_sequence_classifier
from tlcr.models.saving import save_model


def blocked(found: list[Finding]) -> dict[str, str]:
    return {finding.subject: str(finding) for finding in found if finding.level == "blocked"}


def at_once(cfg: RunConfig, *stages: str) -> dict[str, str]:
    return blocked(list(settings(cfg, stages or None)))


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, ("sft", "labels", "discriminator", "analysis", "ppo")),
        ({"reward.kind": "sequence", "sft.enabled": False}, ("reward_model", "ppo")),
        ({"reward.kind": "dpo", "dpo.path": "x"}, ("sft", "ppo")),
        (
            {"reviser.backend": "files", "reviser.files": "x"},
            ("revisions", "sft", "labels", "discriminator", "analysis", "ppo"),
        ),
    ],
)
def test_the_stages_of_a_config(values: dict[str, object], wanted: tuple[str, ...]) -> None:
    assert stages_of(load_config(None, values)) == wanted


@pytest.mark.parametrize(
    "refused",
    [
        ["run", "--data.edits", "no.jsonl"],
        ["run", "--reward.kind", "callable", "--reward.callable", "no_module:f"],
        ["run", "--sft.enabled", "false"],
        ["run", "--ppo.minibatch_size", "7"],
        ["run", "--model.path", "./no/folder"],
        ["run", "--reward.knd", "sequence"],
        ["run", "--ppo.updates", "0"],
        ["train", "ppo"],
        ["revise", "--reviser.backend", "files", "--reviser.files", "no.jsonl"],
        ["label", "--reviser.backend", "files", "--reviser.files", "no.jsonl"],
        ["evaluate-tokens", "--spans", "no.jsonl"],
    ],
    ids=" ".join,
)
def test_a_config_is_refused_before_the_large_packages_are_imported(refused: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom tlcr.cli.main import main\nassert main(sys.argv[1:]) == 2\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'accelerate', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *refused], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("tlcr: error: ")
    assert list(tmp_path.iterdir()) == []


def test_doctor_needs_no_model_library_where_nothing_is_named(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom tlcr.cli.main import main\nassert main(['doctor']) == 0\n"
        "heavy = {'transformers', 'datasets', 'accelerate', 'pyarrow'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Memory of one process" not in done.stdout


def test_all_that_blocks_is_said_in_one_error(tmp_path: Path) -> None:
    cfg = load_config(None, {"output_dir": str(tmp_path), "sft.enabled": False, "data.edits": "no.jsonl"})
    with pytest.raises(ConfigError, match=r"^2 things stand in the way: \(1\) sft\.enabled is .*; \(2\) data\.edits: "):
        refuse(settings(cfg))
    refuse([Finding("note", "a", "b"), Finding("warning", "c", "d")])


def test_a_run_that_is_refused_leaves_nothing_and_the_next_try_needs_no_resume(tmp_path: Path) -> None:
    cfg = small_config(tmp_path / "run")
    with pytest.raises(ConfigError, match="no_module"):
        run(replace(cfg, arms=(), reward=replace(cfg.reward, kind="callable", callable="no_module:f")))
    assert not (tmp_path / "run").exists()


def test_a_config_alone_is_no_run(tmp_path: Path) -> None:
    assert not holds_a_run(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(RunConfig()))
    (tmp_path / "sft").mkdir()
    assert not holds_a_run(tmp_path)
    (tmp_path / "sft" / "metrics.jsonl").touch()
    assert holds_a_run(tmp_path)
    cfg = load_config(None, {"output_dir": str(tmp_path)})
    assert "already holds a run" in blocked(list(settings(cfg, resume=False)))["output_dir"]
    assert not at_once(cfg)
    assert [finding.level for finding in settings(cfg) if finding.subject == "output_dir"] == ["note"]
    assert not list(settings(cfg, resume=True))


@pytest.mark.parametrize("resume", [False, True])
def test_a_config_that_no_run_wrote_is_not_replaced(tmp_path: Path, resume: bool) -> None:
    """It is where its author wrote why each value is what it is: 'output_dir: .' beside it lost that."""
    (tmp_path / "config.yaml").write_text("# why\nseed: 3\n")
    (tmp_path / "edits.jsonl").touch()
    (tmp_path / "earlier" / "labels").mkdir(parents=True)  # a run of the same project
    (tmp_path / "earlier" / "labels" / "done.json").touch()
    cfg = small_config(tmp_path)
    for refused in (lambda: run(cfg, resume=resume), lambda: stage(cfg, "labels", resume=resume)):
        with pytest.raises(ConfigError, match=r"holds a config\.yaml that no run wrote"):
            refused()
    with pytest.raises(ConfigError, match="give that file another name"):
        open_run(cfg, resume=resume, whole=False)
    assert (tmp_path / "config.yaml").read_text() == "# why\nseed: 3\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "earlier", "edits.jsonl"]


def test_a_config_that_tlcr_wrote_is_that_of_a_run(tmp_path: Path) -> None:
    """By --print-config, in another folder, or by a version that wrote no started.json."""
    cfg = small_config(tmp_path)
    text = dump_config(cfg)
    for written in (text, text.replace("warn", "warned"), text.replace("seed: 0", "seed: 7")):
        (tmp_path / "config.yaml").write_text(written)
        assert foreign_config(tmp_path) is None
    (tmp_path / "config.yaml").write_text(text + "# mine\n")
    assert "that no run wrote" in str(foreign_config(tmp_path))
    (tmp_path / "started.json").touch()
    assert foreign_config(tmp_path) is None


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/proc/tlcr", r"/proc/tlcr cannot be made: \w+"),
        ("a" * 300, r"cannot be made: a{40}\.\.\. is longer than 255 bytes"),
        ("/".join(["a" * 200] * 19), r"cannot be made: its path has 3\d{3} bytes, which leaves too few"),
    ],
)
def test_a_folder_that_nobody_can_make_is_refused_before_anything_is_trained(
    path: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for found in (
        at_once(load_config(None, {"output_dir": path})),
        at_once(load_config(None, {"output_dir": path}), "sft"),
    ):
        assert re.search(reason + ".*; name another output_dir$", found["output_dir"])
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_goes_on_where_its_sources_are_gone(tmp_path: Path, tiny_folder: Path) -> None:
    cfg = arm_config(tmp_path, tiny_folder)
    (tmp_path / "pairs.jsonl").unlink()
    assert set(at_once(cfg)) == {"data.preferences"}
    arm = tmp_path / "run" / "ppo" / "callable" / "seed-0"
    arm.mkdir(parents=True)
    (arm / "arm.json").touch()
    assert preflight(cfg, resume=True) == []


def test_a_stage_needs_those_before_it(tmp_path: Path) -> None:
    cfg = load_config(None, {"output_dir": str(tmp_path), "reward.kind": "sequence", "reward.sequence_coef": 0.0})
    assert set(at_once(cfg, "ppo")) == {"sft", "reward_model"}
    assert set(at_once(cfg, "labels")) == set()
    assert set(at_once(cfg, "sft", "reward_model", "ppo")) == set()
    revised = replace(cfg, reviser=replace(cfg.reviser, backend="files", files="x.jsonl"))
    assert "run 'tlcr revise' with this config first" in at_once(revised, "labels")["revisions"]
    assert "revisions" not in at_once(revised, "ppo")
    refreshing = replace(revised, reward=RewardConfig(refresh=RefreshConfig(every=1)))
    assert "revisions" in at_once(replace(refreshing, discriminator=replace(cfg.discriminator, path="d")), "ppo")
    with pytest.raises(ConfigError, match="run 'tlcr train sft' with this config first"):
        stage(cfg, "ppo")


def test_ppo_names_both_sources_of_its_prompts(tmp_path: Path) -> None:
    cfg = load_config(None, {"output_dir": str(tmp_path), "model.path": "owner/name", "reward.kind": "random"})
    assert at_once(replace(cfg, sft=replace(cfg.sft, enabled=False))) == {
        "data.prompts": "neither data.prompts nor data.preferences is set, and PPO needs one of them; name a file, a "
        "folder or a hub dataset (docs/data.md shows the formats), or switch that stage off"
    }


def test_a_launcher_of_several_processes_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"output_dir": str(tmp_path), "ppo.minibatch_size": 32, "parallel": 2, "seeds": [0, 1]}
    cfg = load_config(None, values)
    assert at_once(cfg) == {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert set(at_once(cfg)) == {"ppo.batch_size", "parallel"}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert set(at_once(replace(cfg, parallel=1))) == set()
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("{}\n")
    revised = replace(cfg, parallel=1, reviser=replace(cfg.reviser, backend="files", files=str(pairs)))
    assert "run 'tlcr revise' with this config first, without the launcher" in at_once(revised)["reviser"]


def test_adapters_train_under_a_launcher_that_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    assert "sharding.kind" not in at_once(load_config(None, {"output_dir": str(tmp_path), "lora.rank": 4}))


def test_a_token_classifier_cannot_be_calibrated_on_nothing(tmp_path: Path) -> None:
    cfg = load_config(None, {"output_dir": str(tmp_path), "data.held_out": 0.0})
    assert "discriminator.calibrate is on, but no pair is held out" in at_once(cfg)["data.held_out"]
    assert at_once(cfg, "sft") == {}


def test_a_policy_that_is_never_trained_is_a_warning(tmp_path: Path) -> None:
    values = {"output_dir": str(tmp_path / "run"), "ppo.updates": 5}
    (finding,) = (f for f in preflight(load_config(None, {**values, "ppo.value_warmup_updates": 5})) if f.level != "ok")
    assert finding.level == "warning" and "the policy is never trained" in str(finding)
    assert not [f for f in preflight(load_config(None, {**values, "ppo.value_warmup_updates": 4})) if f.level != "ok"]


def test_a_setting_that_nothing_reads_is_a_warning_of_the_stages_that_would(tmp_path: Path) -> None:
    cfg = load_config(None, {"output_dir": str(tmp_path / "run"), "ppo.best_max_kl": 0.5, "sharding.offload": True})
    warned = {f.subject: f for f in preflight(cfg) if f.level == "warning"}
    assert warned.keys() == {"ppo.best_max_kl", "sharding.offload"}
    assert "nothing reads it without ppo.keep_best" in str(warned["ppo.best_max_kl"])
    assert [f.subject for f in preflight(cfg, ["sft"]) if f.level == "warning"] == ["sharding.offload"]


def test_more_prompts_than_the_embedded_language_has(tmp_path: Path) -> None:
    cfg = load_config(None, {"output_dir": str(tmp_path), "evaluation.prompts": 1_000_000})
    assert "ask for at most" in blocked(preflight(cfg))["evaluation.prompts"]


def test_the_disk_needs_room_for_the_checkpoints_of_the_runs_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needed(**values: object) -> float:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 0))
        found = preflight(
            load_config(None, {"output_dir": str(tmp_path / "run"), "ppo.value_model": "shared", **values})
        )
        (fact,) = (finding.fact for finding in found if finding.subject == "disk")
        return float(re.findall(r"PPO may take ([0-9.]+) MiB", fact)[0])

    one, many = needed(), needed(seeds=list(range(100)))
    checkpoints_of_one = (
        one * 9 / 10
    )  # 3 checkpoints, each of weights and two moments; the models that remain are one tenth
    assert many == pytest.approx(checkpoints_of_one + 100 * one / 10, rel=0.1), "finished runs keep no checkpoints"
    assert needed(seeds=list(range(100)), parallel=2) == pytest.approx(many + checkpoints_of_one, rel=0.1)
    stopped = {"ppo.save_every": 0}  # one checkpoint, should the run be stopped
    assert needed(**stopped) == pytest.approx(checkpoints_of_one / 3 + one / 10, rel=0.1)
    assert needed(**{"ppo.save_every": 201}) == needed(**stopped)
    best = {"ppo.keep_best": True, "ppo.evaluate_every": 9}  # a policy more, and another while a better one is written
    assert needed(**stopped, **best) == pytest.approx(needed(**stopped) + 2 * one / 10, rel=0.1)


def test_the_defaults_run(tmp_path: Path) -> None:
    """Answers of the default length fit the embedded model: at 256 positions they stopped the run after SFT."""
    assert blocked(preflight(load_config(None, {"output_dir": str(tmp_path)}))) == {}


def test_a_reviser_s_own_model_is_looked_at(tmp_path: Path) -> None:
    cfg = load_config(
        None, {"output_dir": str(tmp_path), "reviser.backend": "local", "reviser.model.path": str(tmp_path)}
    )
    assert "cannot load a" in blocked(preflight(cfg))["reviser.model.path"]


def test_what_readers_note_is_noted_once(tmp_path: Path, tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Before the run for doctor, and by the stage that reads in a run."""
    cfg = arm_config(tmp_path, tiny_folder)
    records = [{"prompt": "How are you", "chosen": "well", "rejected": f"bad{n}"} for n in range(6)]
    Path(str(cfg.data.preferences)).write_text("".join(json.dumps(record) + "\n" for record in records))
    caplog.set_level(logging.INFO, "tlcr")
    notes = [finding for finding in preflight(cfg) if finding.subject == "data.preferences"]
    assert any("run on inside the prompt's last word" in note.fact for note in notes)
    assert {note.level for note in notes} == {"note"}
    require(cfg)
    assert caplog.messages == []


@pytest.mark.parametrize("sft", [True, False])
def test_ends_at_which_rollouts_do_not_stop_are_said_once_in_a_run(
    tmp_path: Path, tiny_folder: Path, caplog: pytest.LogCaptureFixture, sft: bool
) -> None:
    """With SFT, PPO starts from a folder that names one end alone, so that only the start of the run knows others."""
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    changes = {"sft.enabled": sft, "sft.epochs": 1, "ppo.updates": 1}
    caplog.set_level(logging.INFO, "tlcr")
    run(arm_config(tmp_path, model, **changes))
    assert sum("also ends answers with" in message for message in caplog.messages) == 1


def test_records_that_are_skipped_are_counted(tmp_path: Path, tiny_folder: Path) -> None:
    cfg = arm_config(tmp_path, tiny_folder)
    path = Path(str(cfg.data.preferences))
    path.write_text(path.read_text() + '\n{"prompt": 3, "chosen": "a", "rejected": "b"}\n')
    assert "; 1 of 41 records of" in blocked(preflight(cfg))["data.preferences"]
    skipping = replace(cfg, data=replace(cfg.data, on_malformed="skip"))
    (found,) = [finding for finding in preflight(skipping) if finding.level == "warning"]
    assert found.fact.startswith("1 of the first 41 records are malformed and skipped: pairs.jsonl, record 41")


def test_the_first_records_say_nothing_of_edits_that_come_later(tmp_path: Path, tiny_folder: Path) -> None:
    same = {"prompt": "How", "rejected": " bad", "revised": " bad"}
    rows = [{**same, "revised": 5}, *[same] * FIRST_RECORDS, {**same, "revised": " good"}]
    edits = tmp_path / "edits.jsonl"
    edits.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model.path": str(tiny_folder), "data.edits": str(edits), "data.on_malformed": "skip"}
    cfg = load_config(None, {"output_dir": str(tmp_path / "run"), **values})
    assert blocked(preflight(cfg, ["labels"])) == {}
    edits.write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
    assert "none of the 8 pairs" in blocked(preflight(cfg, ["labels"]))["data.edits"]


def test_texts_that_may_be_longer_than_the_positions_are_a_warning(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_causal_lm: Callable[..., PreTrainedModel],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "model"
    tiny_causal_lm(max_position_embeddings=256).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    cfg = arm_config(tmp_path, folder)
    (found,) = [finding for finding in preflight(cfg) if finding.level == "warning"]
    assert "each as long as the config allows, has 288 tokens, and the model reads at most 256" in found.fact
    require(cfg)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert found.fact in caplog.text


def test_texts_longer_than_a_reward_model_reads_are_found_before_the_run(
    tmp_path: Path,
    tiny_folder: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_causal_lm: Callable[..., PreTrainedModel],
) -> None:
    """PPO met them in its first rollout, after SFT was paid for: an error of torch's about sizes, or nothing at all."""
    scorer = load_sequence_classifier(tiny_causal_lm(max_position_embeddings=12), ModelConfig())
    save_model(scorer, tiny_tokenizer, tmp_path / "scorer")
    changes = {"reward.kind": "sequence", "reward.callable": None, "reward_model.path": str(tmp_path / "scorer")}
    cfg = arm_config(tmp_path, tiny_folder, **changes)
    assert "reads at most 12" in blocked(preflight(cfg))["reward_model.path"]
    assert not blocked(preflight(replace(cfg, data=replace(cfg.data, max_prompt_tokens=6))))


def test_the_positions_that_a_model_of_roberta_s_kind_keeps_for_padding_are_not_counted(
    tmp_path: Path, tiny_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """It has 20 rows of positions and reads 19 tokens: its padding is token 0, and its positions count from 1."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(tiny_tokenizer)}
    config = AutoConfig.for_model("roberta", max_position_embeddings=20, num_labels=1, **sizes, **special)
    save_model(AutoModelForSequenceClassification.from_config(config), tiny_tokenizer, tmp_path / "scorer")
    changes = {"reward.kind": "sequence", "reward.callable": None, "reward_model.path": str(tmp_path / "scorer")}
    cfg = arm_config(tmp_path, tiny_folder, **changes)
    for prompt, fits in ((19 - cfg.rollout.max_new_tokens, True), (20 - cfg.rollout.max_new_tokens, False)):
        found = blocked(preflight(replace(cfg, data=replace(cfg.data, max_prompt_tokens=prompt))))
        assert ("reads at most 19" in found.get("reward_model.path", "")) is not fits


def test_a_finding_splits_an_error_where_its_remedy_begins() -> None:
    found = Finding.of("data.edits", ConfigError("it has no rows; or none\n that count; write it again"))
    assert (found.fact, found.remedy) == ("it has no rows; or none that count", "write it again")
    assert str(found) == "data.edits: it has no rows; or none that count; write it again"
    assert Finding.of("x", ConfigError("broken")) == Finding("blocked", "x", "broken")


def test_a_policy_of_which_no_classifier_can_be_made_is_found_before_sft() -> None:
    with torch.device("meta"):
        emu = AutoModelForCausalLM.from_config(AutoConfig.for_model("emu3"))
    (finding,) = contents._classifiers(["sft", "discriminator"], emu)
    assert (finding.level, finding.subject) == ("blocked", "model.path")
    assert finding.fact.startswith("no TokenClassification class can be made for Emu3ForCausalLM")
    assert finding.remedy == "use a decoder that transformers has, such as Llama or Qwen"
    assert list(contents._classifiers(["sft", "ppo"], emu)) == []
