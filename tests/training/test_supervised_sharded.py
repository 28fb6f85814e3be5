"""Supervised training on shards, on two processes, which are started once: supervised_sharded.py makes the checks."""

from __future__ import annotations

import pytest

from tests.launched import Outcomes, launch
from tests.training.supervised_sharded import checks


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return launch("tests.training.supervised_sharded", tmp_path_factory.mktemp("supervised"), processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", checks.names)
def test_two_processes(two_processes: Outcomes, name: str) -> None:
    two_processes.assert_passed(name)
