"""What two processes with sharded models check of a server's answers. Started by tests/ppo/test_sharding.py."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.utils import broadcast_object_list

from tests.engines.vllm_server import VLLM, serving
from tests.launched import Checks
from tests.ppo.helpers import StopAt, Stopped, run_ppo, without_times
from tests.ppo.sharded import a_tokenizer, run_config, run_lm
from tlcr.config.schema import RunConfig
from tlcr.training.distributed import barrier, is_main_process
from tlcr.training.metrics import read_metrics

checks = Checks()


def config(address: str, ahead: int) -> RunConfig:
    cfg = run_config(updates=3, save_every=1, epochs=1)
    return replace(cfg, rollout=replace(cfg.rollout, engine="server", server=(address,), ahead=ahead))


def figures(folder: Path) -> list[dict[str, float]]:
    return [without_times(row) for row in read_metrics(folder / "metrics.jsonl")]


@checks
def a_server_answers_by_the_weights_of_all_shards(folder: Path) -> None:
    """On time by those of the round; one off by those before, and a run that was cut goes on with both batches."""
    tokenizer, server = a_tokenizer(folder), VLLM(run_lm(5))
    with serving(server) as addresses:
        known = [addresses[0] if is_main_process() else ""]
        broadcast_object_list(known)
        run_ppo(config(known[0], 0), run_lm, tokenizer, folder / "on-time")
        run_ppo(config(known[0], 1), run_lm, tokenizer, folder / "ahead")
        with pytest.raises(Stopped):
            run_ppo(config(known[0], 1), run_lm, tokenizer, folder / "cut", callbacks=[StopAt(1)])
        barrier()
        run_ppo(config(known[0], 1), run_lm, tokenizer, folder / "cut", resume=True)
        barrier()
    assert all(abs(row["mismatch/log_weight"]) < 1e-5 for row in figures(folder / "on-time"))
    late = [row["mismatch/kl"] for row in figures(folder / "ahead")]
    assert max(late[:2]) < 1e-8 and late[2] > 1e-6, late  # the first update trains the value model alone
    assert figures(folder / "cut") == figures(folder / "ahead")


if __name__ == "__main__":
    checks.run(Path(sys.argv[1]))
