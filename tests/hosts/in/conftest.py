"""For tests inside a trainer's environment, which has neither tlcr's dependencies nor the fixtures of ``tests``."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]  # golden, served, stubs

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # Ray would write a token into the home folder
os.environ.setdefault("RAY_worker_register_timeout_seconds", "300")
os.environ.setdefault("RAY_agent_register_timeout_ms", "300000")


@pytest.fixture
def start_ray() -> Iterator[Callable[..., None]]:
    """``ray.init`` that is tried again: Ray gives its processes seconds to start, which a busy machine may not keep."""
    import ray

    def start(**options: Any) -> None:
        for attempt in range(4):
            try:
                ray.init(include_dashboard=False, **options)
                return
            except Exception:
                ray.shutdown()
                if attempt == 3:
                    raise

    yield start
    ray.shutdown()
