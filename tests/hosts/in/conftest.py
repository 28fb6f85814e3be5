"""For tests inside a trainer's environment, which has neither tlcr's dependencies nor the fixtures of ``tests``."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]  # golden, page, served, stubs

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
def start_ray(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Starts Ray with ``num_cpus`` logical CPUs and connects to it; the rest are options of ``ray.init``.

    Ports are chosen here: else Ray gives its agents 15 s to start and say theirs, and dies where a busy machine takes
    longer (ray-project/ray#65983).
    """
    import ray

    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    names = ("port", "dashboard-agent-grpc-port", "dashboard-agent-listen-port", "runtime-env-agent-port")
    ports = dict(zip((*names, "metrics-export-port"), free_ports(5), strict=True))
    started: list[subprocess.Popen[bytes]] = []
    log = tmp_path / "ray.log"

    def start(num_cpus: int, **options: Any) -> None:
        chosen = [f"--{name}={port}" for name, port in ports.items()]
        with log.open("w") as out:
            words = [*command, *chosen, f"--num-cpus={num_cpus}"]
            process = subprocess.Popen(words, stdout=out, stderr=out, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        started.append(process)
        deadline = time.monotonic() + 300
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        ray.init(address=f"127.0.0.1:{ports['port']}", **options)

    yield start
    ray.shutdown()
    for process in started:
        process.terminate()
        process.wait(120)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with ExitStack() as held:
        taken = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in taken]
