"""What four processes check of two replicas of two shards each. Started by tests/ppo/test_sharding.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from tests.launched import Checks
from tests.ppo.sharded import Case, assert_same, models, sharded, update
from tlcr.config.schema import ShardingConfig
from tlcr.errors import ConfigError
from tlcr.training.sharding import local, plan

checks = Checks()
OPTIONS = {"kind": "hybrid", "replicas": 2}


@checks
def an_update_is_that_of_one_process(_: Path) -> None:
    """Gradients are summed over all processes, and the squares of a norm over those that share a model."""
    for case in (Case(), Case("shared", tied=True, chunk=3, exact_kl=True)):
        pair = sharded(case, **OPTIONS)
        ours = update(*pair, case, alone=False)
        assert all(p.placements == (Replicate(), Shard(0)) for p in pair[0].parameters())
        assert_same(ours, update(*models(case), case, alone=True), case)


@checks
def bfloat16_gradients_are_alike(_: Path) -> None:
    case = Case()
    ours = update(*sharded(case, torch.bfloat16, **OPTIONS), case, alone=False)
    assert_same(ours, update(*models(case, torch.bfloat16), case, alone=True), case, rtol=0.05)


@checks
def each_process_holds_its_half(_: Path) -> None:
    root, whole = sharded(Case(), **OPTIONS)[0], models(Case())[0]
    assert sum(local(p).numel() for p in root.parameters()) < 0.6 * sum(p.numel() for p in whole.parameters())


@checks
def groups_are_equal_and_of_two_at_least(_: Path) -> None:
    for replicas in (3, 4):
        with pytest.raises(ConfigError, match=f"in equal groups .* sharding.replicas is {replicas}; set"):
            plan(ShardingConfig(kind="hybrid", replicas=replicas))
    with pytest.raises(ConfigError, match=r"sharding.replicas is the number of nodes, 1; set"):
        plan(ShardingConfig(kind="hybrid"))


if __name__ == "__main__":
    checks.run(Path(sys.argv[1]))
