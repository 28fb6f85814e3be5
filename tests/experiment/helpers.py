"""Small runs for the tests of the experiment: of the whole pipeline, and of one arm on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tlcr.config.loading import load_config
from tlcr.config.schema import Arm, RewardConfig, RunConfig
from tlcr.data import embedded
from tlcr.experiment.opening import open_run
from tlcr.experiment.run_folder import RunFolder


def small_config(folder: Path, **changes: object) -> RunConfig:
    values = {
        "output_dir": str(folder),
        "data.embedded_pairs": 80,
        "data.max_prompt_tokens": 48,
        "data.max_answer_tokens": 48,
        "sft.epochs": 1,
        "sft.learning_rate": 3e-3,
        "reward_model.epochs": 1,
        "discriminator.epochs": 1,
        "rollout.max_new_tokens": 12,
        "ppo.updates": 2,
        "ppo.batch_size": 4,
        "ppo.minibatch_size": 4,
        "ppo.learning_rate": 1e-3,
        "ppo.save_every": 1,
        "evaluation.prompts": 6,
        "evaluation.samples": 2,
        **changes,
    }
    arms = (
        Arm("continuous"),
        Arm("sequence", reward=RewardConfig(kind="sequence")),
    )
    return replace(load_config(None, values), arms=arms)


def write_pairs(path: Path) -> Path:
    pairs = embedded.generate_pairs(40, seed=0)[0]
    lines = [json.dumps({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}) for p in pairs]
    path.write_text("\n".join(lines))
    return path


def arm_config(folder: Path, model: Path, **changes: object) -> RunConfig:
    """A run without SFT on a model and pairs of its own, whose reward asks no model: 1 for every id below 60."""
    values: dict[str, object] = {
        "output_dir": str(folder / "run"),
        "model.path": str(model),
        "sft.enabled": False,
        "data.preferences": str(write_pairs(folder / "pairs.jsonl")),
        "data.held_out": 0.4,
        "data.max_prompt_tokens": 32,
        "reward.kind": "callable",
        "reward.callable": "tests.ppo.helpers:reward_low_ids",
        "kl.coef": 0.5,
        "rollout.max_new_tokens": 6,
        "rollout.batch_size": 4,
        "ppo.updates": 1,
        "ppo.batch_size": 4,
        "ppo.minibatch_size": 4,
        "ppo.learning_rate": 1e-3,
        "evaluation.prompts": 6,
        "evaluation.samples": 2,
        **changes,
    }
    return load_config(None, values)


def arm_run(folder: Path, model: Path, **changes: object) -> RunFolder:
    return open_run(arm_config(folder, model, **changes), resume=False)


def count_letters(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A scorer: an answer is worth the characters it has."""
    return [float(len(response)) for response in responses]


def reward_that_fails(**_: object) -> list[float]:
    """A reward that can be imported and called, and that fails on the first answers."""
    raise RuntimeError("no score for these answers")
