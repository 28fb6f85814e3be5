"""PPO runs at a time with servers: each has some of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engines.vllm_server import VLLM, serving
from tests.experiment.helpers import small_config
from tlcr.config.schema import Arm
from tlcr.data import embedded
from tlcr.experiment.pipeline import run
from tlcr.training.metrics import read_metrics


@pytest.mark.slow
def test_runs_at_a_time_have_servers_of_their_own(tmp_path: Path) -> None:
    """Three trials, two at a time, on three servers: a server takes the weights of one trial after another, and the
    answers that a trial trains on have the log-probabilities of its own policy."""
    servers = [VLLM(embedded.build_model(embedded.build_tokenizer(0), seed)) for seed in range(3)]
    with serving(*servers) as addresses:
        settings = {"rollout.engine": "server", "rollout.server": addresses, "evaluation.prompts": 4}
        cfg = small_config(tmp_path / "run", **settings, **{"seeds": [0, 1, 2], "parallel": 2, "ppo.updates": 2})
        run(replace(cfg, arms=(Arm("continuous"),)))
    trials = [
        {folder.split("/seed-")[1].split("/")[0] for folder in server.loaded if "/seed-" in folder}
        for server in servers
    ]
    assert all(trials) and trials[0] == trials[2]  # of one place: the first and the third address
    assert trials[0] | trials[1] == {"0", "1", "2"} and not trials[0] & trials[1]
    paths = list(tmp_path.glob("run/ppo/continuous/seed-*/metrics.jsonl"))
    gaps = [row["mismatch/log_weight"] for path in paths for row in read_metrics(path) if "mismatch/log_weight" in row]
    assert len(paths) == 3 and len(gaps) == 6 and max(map(abs, gaps)) < 1e-4
