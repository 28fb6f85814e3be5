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


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A reward server that knows the golden answers."""
    from served import golden_server

    with golden_server() as running:
        yield running


@pytest.fixture
def address(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """That server is the one that the environment names, and is asked once."""
    from tlcr.hosts.remote import TRIES, URL

    monkeypatch.setenv(URL, server.url)
    monkeypatch.setenv(TRIES, "1")


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
