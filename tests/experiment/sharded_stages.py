"""What two processes check of a run whose models are cut into shards, together. Started by test_sharded_stages."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from tests.experiment.helpers import small_config
from tests.launched import Checks
from tlcr.config.schema import Arm, RewardConfig, RunConfig
from tlcr.config.trials import trials_of
from tlcr.experiment import arm, pipeline
from tlcr.training.distributed import barrier, is_main_process
from tlcr.training.metrics import read_metrics

checks = Checks()
STAGES = ("sft", "reward_model", "dpo", "labels", "discriminator", "analysis")
TRAINED = ("sft", "reward_model", "dpo", "discriminator")


def config(folder: Path, **changes: object) -> RunConfig:
    saves = {f"{name}.save_every": 2 for name in TRAINED}
    cfg = small_config(folder, **{"dpo.epochs": 1, "ppo.updates": 1, **saves, **changes})
    return replace(cfg, arms=(*cfg.arms, Arm("dpo", reward=RewardConfig(kind="dpo"))))


def run(folder: Path, **changes: object) -> Path:
    for name in STAGES:
        pipeline.stage(config(folder, **changes), name, resume=True)
    return folder


def figures(folder: Path, name: str) -> list[dict[str, float]]:
    rows = read_metrics(folder / name / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("time")} for row in rows]


@checks
def every_stage_before_ppo_gives_what_it_gives_with_whole_models(folder: Path) -> None:
    """From the embedded task's model, which is made; the stages after SFT read their model from its folder."""
    whole, cut = run(folder / "whole"), run(folder / "cut", **{"sharding.kind": "full"})
    for name in TRAINED:
        ours, theirs = figures(cut, name), figures(whole, name)
        assert len(ours) > 1
        for row, truth in zip(ours, theirs, strict=True):
            assert row.keys() == truth.keys()
            # in float32: margins, and who wins a pair by 1e-6, may be those of rounding
            for key in {"loss", "grad_norm", "learning_rate", "eval/loss", "eval/nll"} & truth.keys():
                assert row[key] == pytest.approx(truth[key], rel=1e-4), (name, key)
        assert sorted(p.name for p in (cut / name).iterdir()) == sorted(p.name for p in (whole / name).iterdir())
    ours, theirs = (json.loads((path / "analysis" / "analysis.json").read_text()) for path in (cut, whole))
    assert ours["tokens"] == theirs["tokens"] > 100
    if is_main_process():
        AutoModelForCausalLM.from_pretrained(cut / "dpo")
        AutoModelForTokenClassification.from_pretrained(cut / "discriminator")


@checks
def dpo_learns_by_an_adapter_in_shards(folder: Path) -> None:
    """The adapter stands on the model before it is cut, as in the other stages."""
    lora = {"lora.rank": 4, "lora.roles": ["dpo"]}
    places = {kind: folder / f"dpo-{kind}" for kind in ("none", "full")}
    if is_main_process():
        for place in places.values():
            shutil.copytree(folder / "whole", place, ignore=shutil.ignore_patterns("dpo"))
    barrier()
    for kind, place in places.items():
        pipeline.stage(config(place, **{"sharding.kind": kind, **lora}), "dpo", resume=True)
    ours, theirs = (figures(place, "dpo") for place in places.values())
    assert ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for row, truth in zip(ours, theirs, strict=True):
        assert row["loss"] == pytest.approx(truth["loss"], rel=1e-4)


@checks
def ppo_takes_the_same_round_and_reads_what_is_frozen_into_shards(folder: Path) -> None:
    """From the same earlier stages. No model has weights before it is cut."""
    places = {kind: folder / f"ppo-{kind}" for kind in ("none", "full")}
    if is_main_process():
        for place in places.values():
            shutil.copytree(folder / "whole", place)
    barrier()
    unread: dict[str, list[str]] = {}
    cut = arm._shard
    for kind, place in places.items():
        unread[kind] = found = []

        def watched(cfg: RunConfig, *roots: nn.Module, found: list[str] = found) -> None:
            found += [type(root).__name__ for root in roots if all(p.is_meta for p in root.parameters())]
            cut(cfg, *roots)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arm, "_shard", watched)
            pipeline.stage(config(place, **{"sharding.kind": kind}), "ppo", resume=True)
        barrier()
    trained, judges = ("ActorCritic", "LlamaForCausalLM"), ("TokenClassification", "SequenceClassification")
    found = [[*trained, judge] for judge in (*(f"LlamaFor{kind}" for kind in judges), "LlamaForCausalLM")]
    assert unread == {"none": [], "full": [name for names in found for name in names]}
    trials = trials_of(config(folder))
    assert len(trials) == 3
    for trial in trials:
        ours, theirs = (figures(places[kind] / "ppo", trial.folder) for kind in ("full", "none"))
        assert len(ours) == len(theirs) == 2
        for row, truth in zip(ours, theirs, strict=True):
            assert row == pytest.approx(truth, rel=1e-3, abs=1e-4), trial.folder


if __name__ == "__main__":
    checks.run(Path(sys.argv[1]))
