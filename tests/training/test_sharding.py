"""Sharded models on two processes, which are started once: tests/training/sharded.py makes the checks."""

from __future__ import annotations

import pytest

from tests.launched import Outcomes, launch
from tests.training.sharded import checks
from tlcr.config.schema import ShardingConfig
from tlcr.errors import ConfigError
from tlcr.training.sharding import plan


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return launch("tests.training.sharded", tmp_path_factory.mktemp("sharded"), processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", checks.names)
def test_two_processes(two_processes: Outcomes, name: str) -> None:
    two_processes.assert_passed(name)


def test_one_process_has_nothing_to_share() -> None:
    assert plan(ShardingConfig()) is None
    with pytest.raises(ConfigError, match="there is one process; start several"):
        plan(ShardingConfig(kind="full"))
