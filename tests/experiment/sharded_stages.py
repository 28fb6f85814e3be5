"""What two processes check of a run whose models are cut into shards, together. Started by test_sharded_stages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from tests.experiment.helpers import small_config
from tests.launched import Checks
from tlcr.experiment import pipeline
from tlcr.training.distributed import is_main_process
from tlcr.training.metrics import read_metrics

checks = Checks()
STAGES = ("sft", "reward_model", "dpo", "labels", "discriminator", "analysis")
TRAINED = ("sft", "reward_model", "dpo", "discriminator")


def run(folder: Path, **changes: object) -> Path:
    saves = {f"{name}.save_every": 2 for name in TRAINED}
    cfg = small_config(folder, **{"dpo.epochs": 1, **saves, **changes})
    for name in STAGES:
        pipeline.stage(cfg, name, resume=True)
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


if __name__ == "__main__":
    checks.run(Path(sys.argv[1]))
