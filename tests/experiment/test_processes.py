"""Two processes that the README's line starts: they share a run, end together with one message, and go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.experiment.helpers import arm_config
from tests.experiment.watched import FOLDER
from tlcr.config.loading import dump_config, load_config
from tlcr.config.schema import RunConfig
from tlcr.errors import ConfigError
from tlcr.experiment import pipeline
from tlcr.models.saving import save_model
from tlcr.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PROCESSES, BATCH, PROMPTS, UPDATES = 2, 4, 6, 3
EVALUATION, ROUND = PROMPTS // PROCESSES, BATCH // PROCESSES
"""Answers for which one process asks at a time."""


class Launched:
    """What `tlcr run` on two processes said, how it ended, and what each process asked the reward."""

    def __init__(self, folder: Path, config: Path, attempt: int, *flags: str) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
        environment = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        environment |= {"TLCR_PROGRESS": "0", FOLDER: str(folder), "ATTEMPT": str(attempt)}
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "tlcr", "run", str(config), *flags],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        self.code, self.text = done.returncode, done.stdout + done.stderr
        self.said = [line for line in self.text.splitlines() if line.startswith("tlcr: ")]
        self.errors = [line for line in self.said if line.startswith("tlcr: error: ")]
        self.asked: list[list[list[str]]] = []
        for rank in range(PROCESSES):
            calls = folder / f"calls-{attempt}-{rank}.jsonl"
            self.asked.append([json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else [])


@pytest.mark.slow
def test_two_processes_share_a_run_fail_as_one_and_resume(
    tmp_path: Path, tiny_causal_lm: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    save_model(tiny_causal_lm(seed=1), tiny_tokenizer, tmp_path / "model")
    changes = {"reward.callable": "tests.experiment.watched:reward", "ppo.updates": UPDATES, "ppo.save_every": 1}
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(arm_config(tmp_path, tmp_path / "model", **changes)), encoding="utf-8")
    metrics = tmp_path / "run" / "ppo" / "callable" / "seed-0" / "metrics.jsonl"

    # 1. a new folder; in the second round the reward of one process raises
    (tmp_path / "fail-1").write_text(json.dumps({"rank": 1, "calls": 3, "how": "raise"}))
    first = Launched(tmp_path, config, 1)
    assert first.code != 0
    assert len(first.errors) == 1 and "raised LookupError: no answer like this" in first.errors[0], first.text
    assert first.text.count("Traceback (most recent call last)") == 1, first.text  # the launcher's
    assert [[len(prompts) for prompts in calls] for calls in first.asked] == [[EVALUATION, ROUND, ROUND]] * PROCESSES
    evaluated = [prompt for calls in first.asked for prompt in calls[0]]
    assert len(evaluated) == PROMPTS
    assert sum("2 processes share the work" in line for line in first.said) == 1
    assert len(first.said) == len(set(first.said)), first.text  # each note once
    assert [row["step"] for row in read_metrics(metrics)] == [0, 1]

    # 2. resumed: the other process is killed in the last round
    (tmp_path / "fail-2").write_text(json.dumps({"rank": 0, "calls": 3, "how": "kill"}))
    second = Launched(tmp_path, config, 2, "--resume")
    assert second.code != 0
    assert len(second.errors) == 1 and "ended without a word" in second.errors[0], second.text
    assert second.text.count("Traceback (most recent call last)") == 1, second.text
    assert [row["step"] for row in read_metrics(metrics)] == [0, 1, 2]

    # 3. resumed again, it ends: every round once, by both
    third = Launched(tmp_path, config, 3, "--resume")
    assert (third.code, third.errors) == (0, []), third.text
    assert [row["step"] for row in read_metrics(metrics)] == list(range(UPDATES + 1))
    limit = BATCH * load_config(config, {}).rollout.max_new_tokens
    assert all(BATCH <= row["length/tokens"] <= limit for row in read_metrics(metrics)[1:])
    done = json.loads((metrics.parent / "done.json").read_text())
    assert done["machine"]["processes"] == PROCESSES


@pytest.mark.slow
def test_two_processes_share_the_models_of_a_run_too(
    tmp_path: Path, tiny_causal_lm: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Prompts of the evaluation in batches of two: the processes have three and two of them."""
    save_model(tiny_causal_lm(seed=1), tiny_tokenizer, tmp_path / "model")
    changes = {
        "reward.callable": "tests.experiment.watched:reward",
        "sharding.kind": "full",
        "ppo.updates": 2,
        "ppo.save_every": 0,
        "ppo.evaluate_every": 1,
        "evaluation.prompts": 5,
        "rollout.batch_size": 2,
    }
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(arm_config(tmp_path, tmp_path / "model", **changes)), encoding="utf-8")
    folder = tmp_path / "run" / "ppo" / "callable" / "seed-0"

    # 1. one process is killed while the other waits in a collective: in the first round, after the evaluation
    (tmp_path / "fail-1").write_text(json.dumps({"rank": 1, "calls": 3, "how": "kill"}))
    first = Launched(tmp_path, config, 1)
    assert first.code != 0
    assert len(first.errors) == 1 and "ended without a word" in first.errors[0], first.text

    # 2. started again, it ends: the process with fewer prompts asked as often, and what it asked beyond does not count
    second = Launched(tmp_path, config, 2, "--resume")
    assert (second.code, second.errors) == (0, []), second.text
    asked = [[len(prompts) for prompts in calls] for calls in second.asked]
    assert asked == [[2, 1, ROUND, 2, 1, ROUND, 2, 1], [2, 1, ROUND, 2, 1, ROUND, 2, 1]]
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["before"]["answers"] == evaluation["after"]["answers"] == 5
    trained, start = (AutoModelForCausalLM.from_pretrained(path) for path in (folder / "policy", tmp_path / "model"))
    changed = [not torch.equal(*pair) for pair in zip(trained.parameters(), start.parameters(), strict=True)]
    assert type(trained) is type(start) and all(changed)


# ---- what several processes cannot share


@pytest.mark.parametrize(
    ("changes", "stage", "message"),
    [
        ({"ppo.minibatch_size": 4, "ppo.batch_size": 4}, None, "make the batch a multiple of the minibatch, and the m"),
        ({"ppo.minibatch_size": 4, "ppo.batch_size": 4}, "ppo", "and the minibatch a multiple of the processes"),
        (
            {"parallel": 2, "seeds": [0, 1]},
            None,
            "parallel is 2 under a launcher of 3 processes, and a run takes one or the other",
        ),
        (
            {"parallel": 2, "seeds": [0, 1], "models_per_seed": True},
            None,
            "parallel is 2 under a launcher of 3 processes, and a run takes one or the other",
        ),
        ({"reviser.backend": "local", "reviser.model.path": "x"}, None, "run 'tlcr revise' with this config first"),
        ({"sharding.kind": "hybrid", "sharding.replicas": 2}, None, "hybrid wants 3 processes in equal groups of two"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, object], stage: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tlcr.experiment.preflight.launched_processes", lambda: 3)
    values = {"output_dir": str(tmp_path / "run"), "ppo.batch_size": 6, "ppo.minibatch_size": 6, **changes}
    cfg = load_config(None, values)
    with pytest.raises(ConfigError, match=message):
        pipeline.run(cfg) if stage is None else pipeline.stage(cfg, stage)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "changes", "message"),
    [
        ({}, {"sharding.kind": "full"}, "and there is one process; start several"),
        ({}, {"sharding.kind": "full", "parallel": 2, "seeds": [0, 1]}, "and there is one process; start several"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "the launcher asks for FSDP version 1; add --fsdp_version 2, or run"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "the launcher asks for DeepSpeed, and tlcr cuts models by torch's"),
    ],
)
def test_sharding_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    changes: dict[str, object],
    message: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    cfg = load_config(None, {"output_dir": str(tmp_path / "run"), **changes})
    for stage in (None, "ppo", "sft"):
        with pytest.raises(ConfigError, match=message):
            pipeline.run(cfg) if stage is None else pipeline.stage(cfg, stage)
    assert not (tmp_path / "run").exists()


def test_a_stage_minds_only_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFT on three processes is no matter of PPO's minibatches, nor of how many policies train at a time."""
    monkeypatch.setattr("tlcr.experiment.preflight.launched_processes", lambda: 3)
    trained: list[RunConfig] = []
    monkeypatch.setitem(pipeline.MODEL_STAGES, "sft", lambda run: trained.append(run.cfg))
    monkeypatch.setattr("tlcr.experiment.workers.process_count", lambda: 3)
    cfg = load_config(
        None,
        {"output_dir": str(tmp_path), "ppo.minibatch_size": 4, "ppo.batch_size": 4, "parallel": 2, "seeds": [0, 1]},
    )
    pipeline.stage(cfg, "sft")
    assert trained == [cfg]
