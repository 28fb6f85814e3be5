"""A whole run with adapters: roles in PPO, every model by an adapter, and what a run without them keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel

from tests.experiment.helpers import arm_config, small_config
from tlcr.config.schema import Arm, LoRAConfig, RewardConfig, RunConfig
from tlcr.errors import ConfigError
from tlcr.experiment.arm import _frozen, _start
from tlcr.experiment.opening import open_run
from tlcr.experiment.pipeline import run, stage
from tlcr.experiment.preflight import settings
from tlcr.models.lora.adapters import own_parameters, role_of
from tlcr.recipes.refresh_discriminator import DiscriminatorRefresh

LORA = LoRAConfig(rank=4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    cfg = small_config(tmp_path_factory.mktemp("run") / "run", **{"ppo.value_learning_rate": 1e-3})
    cfg = replace(cfg, lora=LORA, arms=(Arm("continuous"),))
    run(cfg)
    return cfg


def arm_folder(cfg: RunConfig) -> Path:
    return Path(cfg.output_dir) / "ppo" / "continuous" / "seed-0"


def test_a_run_of_the_embedded_task_with_roles_ends_with_report_and_table(finished: RunConfig) -> None:
    folder = Path(finished.output_dir)
    assert (folder / "report.html").is_file() and "continuous" in (folder / "results.md").read_text()
    before = load_file(folder / "sft" / "model.safetensors")
    adapters = {
        role: load_file(path / "adapter" / "adapter_model.safetensors")
        for role, path in {
            "discriminator": folder / "discriminator",
            "policy": arm_folder(finished) / "policy",
            "value": arm_folder(finished) / "value",
        }.items()
    }
    assert not (folder / "sft" / "adapter").exists()  # the embedded model begins with random weights
    assert all(any(w.abs().max() > 0 for key, w in a.items() if "lora_B" in key) for a in adapters.values())
    after = AutoModelForCausalLM.from_pretrained(arm_folder(finished) / "policy").state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith("_proj.weight")
    }
    AutoModelForTokenClassification.from_pretrained(folder / "discriminator")


def test_all_four_models_of_ppo_stand_on_one_copy_of_the_weights(finished: RunConfig) -> None:
    opened = open_run(finished, resume=True)
    cfg = opened.trials[0].config(finished)
    roles, frozen, reference = _frozen(opened, cfg, seed=0)
    actor_critic = _start(opened, cfg, frozen, roles)
    assert frozen.discriminator is not None and actor_critic.value_model is not None
    models: dict[str, PreTrainedModel] = {
        "policy": actor_critic.policy,
        "value": actor_critic.value_model,
        "discriminator": frozen.discriminator.model,
        "reference": reference,
    }
    for name, model in models.items():
        role = role_of(model)
        assert role is not None and role.name == name and role.roles is roles
    storages = {p.untyped_storage().data_ptr() for model in models.values() for p in model.parameters()}
    own = sum(len(own_parameters(model)) for model in models.values())
    assert len(storages) - own == len(load_file(Path(finished.output_dir) / "sft" / "model.safetensors"))


def test_before_training_the_policy_is_the_reference(finished: RunConfig) -> None:
    evaluation = json.loads((arm_folder(finished) / "evaluation.json").read_text())
    assert evaluation["before"]["kl_per_token"] == 0 != evaluation["after"]["kl_per_token"]


def test_evaluating_again_finds_what_training_found(finished: RunConfig) -> None:
    path = arm_folder(finished) / "evaluation.json"
    before = json.loads(path.read_text())
    stage(finished, "evaluate")
    assert json.loads(path.read_text()) == before


def test_what_is_done_is_skipped_and_not_mixed_with_other_adapters(finished: RunConfig) -> None:
    file = arm_folder(finished) / "policy" / "model.safetensors"
    written = file.stat().st_mtime_ns
    run(finished, resume=True)
    assert file.stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match=r"lora\.rank was 4, is 8"):
        run(replace(finished, lora=replace(LORA, rank=8)), resume=True)
    with pytest.raises(ConfigError, match=r"lora was .*no longer there"):
        run(replace(finished, lora=LoRAConfig()), resume=True)


def test_every_model_is_trained_by_an_adapter_that_is_named(tmp_path: Path, tiny_folder: Path) -> None:
    cfg = arm_config(
        tmp_path,
        tiny_folder,
        **{
            "sft.enabled": True,
            "sft.epochs": 1,
            "reward_model.epochs": 1,
            "dpo.epochs": 1,
            "reward.kind": "sequence",
            "reward.callable": None,
            "lora.rank": 4,
            "lora.roles": ["sft", "reward_model", "dpo", "policy", "value"],
        },
    )
    cfg = replace(cfg, arms=(Arm("sequence", reward=cfg.reward), Arm("dpo", reward=RewardConfig(kind="dpo"))))
    run(cfg)
    folder = Path(cfg.output_dir)
    for name in ("sft", "reward_model", "dpo", "ppo/dpo/seed-0/policy", "ppo/sequence/seed-0/value"):
        assert {"model.safetensors", "adapter"} <= {path.name for path in (folder / name).iterdir()}, name
        assert (folder / name / "adapter" / "adapter_model.safetensors").is_file()
    base = json.loads((folder / "reward_model" / "adapter" / "base.json").read_text())
    assert base["sha256"] == json.loads((folder / "dpo" / "adapter" / "base.json").read_text())["sha256"]
    assert base["path"] == str(folder / "sft")


@pytest.mark.parametrize("value_model", ["separate", "shared"])
def test_a_value_model_may_be_trained_whole_beside_the_roles(
    tmp_path: Path, tiny_folder: Path, value_model: str
) -> None:
    ppo = {"ppo.value_model": value_model, "ppo.value_learning_rate": 1e-2, "ppo.updates": 2}
    cfg = arm_config(tmp_path, tiny_folder, **{"lora.rank": 4, "lora.roles": ["policy"], **ppo})
    run(cfg)
    folder = Path(cfg.output_dir) / "ppo" / "callable" / "seed-0"
    assert (folder / "policy" / "adapter").is_dir() and not (folder / "value" / "adapter").exists()
    before = json.loads((folder / "evaluation.json").read_text())
    stage(cfg, "evaluate")
    assert json.loads((folder / "evaluation.json").read_text()) == before
    if value_model == "separate":
        value, base = (load_file(f / "model.safetensors") for f in (folder / "value", tiny_folder))
        assert any(not torch.equal(value[key], base[key]) for key in base if key in value)


def test_a_discriminator_of_another_base_is_loaded_whole(
    finished: RunConfig, tmp_path: Path, tiny_causal_lm: Callable[..., PreTrainedModel]
) -> None:
    """A run on another SFT model, with the discriminator of this one."""
    folder = Path(finished.output_dir)
    cfg = replace(
        small_config(tmp_path / "run", seed=5, **{"ppo.updates": 1}),
        lora=LORA,
        arms=(Arm("continuous"),),
        discriminator=replace(finished.discriminator, path=str(folder / "discriminator")),
    )
    run(cfg)
    opened = open_run(cfg, resume=True)
    roles, frozen, _ = _frozen(opened, opened.trials[0].config(cfg), seed=0)
    assert roles is not None and frozen.discriminator is not None
    assert role_of(frozen.discriminator.model) is None


def test_a_discriminator_that_learns_on_is_loaded_whole(finished: RunConfig) -> None:
    """As an adapter on the policy's weights it would leave its refresh the policy's adapters to train."""
    opened = open_run(finished, resume=True)
    cfg = opened.trials[0].config(finished)
    learning = replace(
        cfg,
        lora=replace(cfg.lora, roles=("policy", "value")),
        reward=replace(cfg.reward, refresh=replace(cfg.reward.refresh, every=1)),
    )
    held = {}
    for own in (cfg, learning):
        _, frozen, _ = _frozen(opened, own, seed=0)
        assert frozen.discriminator is not None
        held[own is learning] = frozen.discriminator
    assert role_of(held[False].model) is not None and role_of(held[True].model) is None
    refresh = DiscriminatorRefresh(
        learning,
        model=held[True].model,
        tokenizer=held[True].tokenizer,
        original=list,
        revise=lambda answers, updates: [None] * len(answers),
        seed=0,
    )
    trained = {id(p) for group in refresh.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in held[True].model.parameters()}


def test_without_a_rank_no_setting_of_a_run_has_changed(tmp_path: Path) -> None:
    cfg = replace(small_config(tmp_path / "run"), lora=LoRAConfig(alpha=8, roles=("sft", "policy")))
    opened = open_run(replace(cfg, model=replace(cfg.model, path="named")), resume=False)
    assert "lora" not in opened.settings("model", "data", "sft")
    assert "lora" not in opened.trial_settings(opened.trials[0])


def test_peft_is_missed_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("tlcr.distribution.install_command", lambda extra: f"pip install what {extra} needs")
    found = [f for f in settings(replace(small_config(tmp_path / "run"), lora=LORA)) if f.subject == "peft"]
    assert [(f.level, f.remedy) for f in found] == [("blocked", "pip install what lora needs, or set lora.rank: null")]
    assert not [f for f in settings(small_config(tmp_path / "run")) if f.subject == "peft"]
