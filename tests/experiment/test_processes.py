"""Two processes that the README's line starts: they share a run, end together with one message, and go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.experiment.helpers import arm_config
from tests.experiment.watched import FOLDER
from tlcr.config.loading import dump_config, load_config
from tlcr.config.schema import RunConfig
from tlcr.errors import ConfigError
from tlcr.experiment import pipeline
from tlcr.models.loading import save_model
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
