"""Models that are read straight into shards, on two processes: sharded_loading.py makes the checks."""

from __future__ import annotations

import sys

import pytest

from tests.launched import Outcomes, launch
from tests.models.sharded_loading import checks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads how much memory a process had from /proc"),
]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    with pytest.MonkeyPatch.context() as patch:
        # else glibc keeps what layers are gathered into, and a process seems to hold them all
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "100000")
        return launch("tests.models.sharded_loading", tmp_path_factory.mktemp("loading"), processes=2)


@pytest.mark.parametrize("name", checks.names)
def test_two_processes(two_processes: Outcomes, name: str) -> None:
    two_processes.assert_passed(name)
