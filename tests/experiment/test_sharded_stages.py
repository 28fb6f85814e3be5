"""A run whose models are cut into shards, on two processes: sharded_stages.py makes the checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.experiment.helpers import small_config
from tests.experiment.sharded_stages import checks
from tests.launched import Outcomes, launch
from tlcr.experiment import pipeline
from tlcr.experiment.opening import reopen_run


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return launch("tests.experiment.sharded_stages", tmp_path_factory.mktemp("stages"), processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", checks.names)
def test_two_processes(two_processes: Outcomes, name: str) -> None:
    two_processes.assert_passed(name)


def test_what_loads_no_model_needs_one_process(tmp_path: Path) -> None:
    """Labels are made, and a finished run is read, where it is convenient."""
    cfg = small_config(tmp_path / "run", **{"sharding.kind": "full"})
    pipeline.stage(cfg, "labels")
    assert (tmp_path / "run" / "labels" / "labels.jsonl").is_file()
    assert reopen_run(tmp_path / "run").sharding is None
