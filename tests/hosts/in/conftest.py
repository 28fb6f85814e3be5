"""For tests inside a trainer's environment, which has neither tlcr's dependencies nor the fixtures of ``tests``."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
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
def start_ray() -> Iterator[Callable[..., None]]:
    """Starts Ray with ``num_cpus`` logical CPUs and connects to it; the rest are options of ``ray.init``."""
    import ray

    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path: sockets stand in it
    names = ("port", "metrics-export-port", "runtime-env-agent-port")
    names += ("dashboard-agent-grpc-port", "dashboard-agent-listen-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [sys.executable, str(Path(__file__).with_name("ray_start.py")), "start", "--head", "--block"]
    command += ["--disable-usage-stats", "--include-dashboard=false", f"--temp-dir={folder}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    started: list[subprocess.Popen[bytes]] = []
    log = folder / "start.log"

    def start(num_cpus: int, **options: Any) -> None:
        settings = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with log.open("w") as out:
            process = subprocess.Popen([*command, f"--num-cpus={num_cpus}"], stdout=out, stderr=out, env=settings)
        started.append(process)
        deadline = time.monotonic() + 300
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        ray.init(address=f"{ray.util.get_node_ip_address()}:{ports['port']}", **options)

    yield start
    ray.shutdown()
    for process in started:
        process.terminate()
        process.wait(120)
    shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with ExitStack() as held:
        taken = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in taken]
