"""What PPO takes on each of two processes. Started by test_simulation, which compares it with the estimate."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tests.experiment.measured import PPO, config, peak_of_ppo
from tests.launched import Checks
from tlcr.training.distributed import process_index

SMALL = {"model.dtype": "bfloat16", "model.gradient_checkpointing": True}
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "shards": {"sharding.kind": "full"},
    "small shards": {"sharding.kind": "full", **SMALL},
    "small shards in pieces": {"sharding.kind": "full", **SMALL, "ppo.micro_batch_size": 2},
}
checks = Checks()


def peaks(folder: Path) -> None:
    for name, changes in WAYS.items():
        cfg = config(folder, {**PPO, **changes})
        found = peak_of_ppo(cfg, AutoTokenizer.from_pretrained(folder), folder / name)
        (folder / f"{name}-{process_index()}.json").write_text(json.dumps(found), encoding="utf-8")


checks(peaks)

if __name__ == "__main__":
    checks.run(Path(sys.argv[1]))
