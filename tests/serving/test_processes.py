"""``tlcr serve`` as its own process: started, stopped, killed; one worker and several."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tlcr.cli import main as cli
from tlcr.errors import HostError
from tlcr.hosts.client import RewardClient
from tlcr.hosts.contract import Item
from tlcr.serving import processes
from tlcr.serving.settings import ServerSettings


@contextmanager
def served(discriminator: Path, *flags: str, workers: int = 1) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, once it answers, and its address."""
    command = [sys.executable, "-m", "tlcr", "serve", "--discriminator", str(discriminator), "--port", "0", *flags]
    if workers > 1:
        command += ["--workers", str(workers)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said: list[str] = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"on (http://127\.0\.0\.1:\d+)", line):
                break
        else:
            raise AssertionError("".join(said))
        threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True).start()
        wait_for(found[1])
        process.said = said  # type: ignore[attr-defined]
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(180)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        with process.stderr:  # the thread has read all of it, but where a worker outlives its parent
            pass


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The living workers; one that was killed stays a zombie until its parent looks."""
    found = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            found += [child] if "spawn_main" in " ".join(child.cmdline()) else []
    return found


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 240
    while True:
        try:
            with urllib.request.urlopen(url + "/health", timeout=90):
                return
        except OSError:
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.1)


def figures(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url + "/metrics", timeout=60) as response:
        lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@pytest.mark.slow
def test_a_signal_to_stop_lets_accepted_requests_end(discriminator: Path) -> None:
    """The request waits for company when the signal comes; the command ends when it is answered."""
    with served(discriminator, "--window-ms", "2000") as (process, url):
        client = RewardClient(url, tries=1)
        client.info()
        found: list[Any] = []
        asking: list[threading.Thread] = []
        while figures(url)["tlcr_queue_tokens"] == 0:
            if not asking or not asking[-1].is_alive():  # a busy machine may have looked too late
                asking.append(threading.Thread(target=lambda: found.append(client.token_rewards([Item([5], [6, 7])]))))
                asking[-1].start()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        asking[-1].join(60)
        assert len(found) == len(asking) and len(found[-1][0]) == 2
        assert process.wait(180) in (0, -signal.SIGTERM)
        with pytest.raises(HostError, match="cannot be reached"):
            client.token_rewards([Item([5], [6])])


@pytest.mark.slow  # three processes import torch
def test_a_killed_worker_loses_nothing_silently(discriminator: Path) -> None:
    """Clients ask without pause while workers are killed: every answer is there and right, and the rest are errors."""
    items = [Item([5, 6, k], [7, k, 9]) for k in range(10, 40)]
    with served(discriminator, workers=2) as (process, url):
        wanted = RewardClient(url).token_rewards(items)
        lost: list[str] = []
        answers: list[tuple[int, list[float]]] = []
        over = threading.Event()

        def ask(part: int, tries: int) -> None:
            client = RewardClient(url, tries=tries)
            while not over.is_set():
                number = (part * 7 + len(answers)) % len(items)
                try:
                    answers.append((number, client.token_rewards([items[number]])[0]))
                except HostError as error:
                    lost.append(str(error))

        threads = [threading.Thread(target=ask, args=(part, 1 if part < 4 else 8)) for part in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(2):
            victim = workers_of(process)[-1]
            victim.send_signal(signal.SIGKILL)
            before, deadline = len(answers), time.monotonic() + 240
            while len(answers) < before + 50 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert len(answers) >= before + 50, "the other worker does not go on"
        time.sleep(1)
        over.set()
        for thread in threads:
            thread.join(90)
        for number, found in answers:
            assert found == pytest.approx(wanted[number], abs=2e-6)
        assert all("cannot be reached" in message for message in lost)  # by clients that try once
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:  # a new worker stands in its place
            alive = workers_of(process)
            if len(alive) == 2 and victim.pid not in {child.pid for child in alive}:
                break
            time.sleep(0.1)
        assert RewardClient(url).token_rewards(items) == [pytest.approx(row, abs=2e-6) for row in wanted]
        counted = figures(url)
        assert counted["tlcr_answers_total"] >= len(answers) + 2 * len(items)  # both workers', and the killed one's
        assert counted["tlcr_queue_tokens"] == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(180) == 0
    assert psutil.wait_procs(alive, timeout=60)[1] == []


@pytest.mark.slow  # three processes import torch
def test_workers_end_with_their_parent(discriminator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with served(discriminator, workers=2) as (process, _):
        assert len(list(tmp_path.glob("tlcr-serve-*"))) == 1
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=180)
        assert alive == []
        assert list(tmp_path.glob("tlcr-serve-*")) == []


@pytest.mark.slow  # two processes import torch
def test_workers_that_cannot_start_say_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    command = [sys.executable, "-m", "tlcr", "serve", "--discriminator", str(tmp_path), "--port", "0", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("tlcr: error: "), done.stderr
    assert str(tmp_path) in done.stderr.splitlines()[-1]


def test_a_worker_that_fails_in_any_way_stops_all(
    discriminator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one more model that a GPU has no memory for: uvicorn would start workers anew for ever."""
    stopped: list[tuple[int, int]] = []

    def load(*unused: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(processes, "_end_with_parent", lambda folder: None)
    monkeypatch.setattr(processes, "_app", load)
    monkeypatch.setattr(processes.os, "kill", lambda *given: stopped.append(given))
    with pytest.raises(SystemExit) as ended:
        processes._app_of_worker(ServerSettings(discriminator=str(discriminator), workers=2), None, str(tmp_path))
    assert ended.value.code == 3 and stopped == [(os.getppid(), signal.SIGTERM)]
    assert (tmp_path / processes.FAILED).read_text(encoding="utf-8") == (
        f"a worker of {str(discriminator)!r} cannot start: OutOfMemoryError: CUDA out of memory"
    )


def test_what_cannot_be_served_is_one_sentence(
    discriminator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flags, sentence in (
            (["--discriminator", str(discriminator), "--port", port], f"cannot listen on 127.0.0.1:{port}"),
            (["--discriminator", str(tmp_path / "absent"), "--port", "0"], "absent"),
            (["--port", "0"], "no discriminator is named"),
            (["--discriminator", "d", "--workers", "0"], "--workers is 0; it must be at least 1"),
            (["--discriminator", "d", "--token-file", str(tmp_path / "no")], "--token-file"),
        ):
            assert cli.main(["serve", *flags]) == 2
            said = capsys.readouterr().err.splitlines()[-1]
            assert said.startswith("tlcr: error: ") and sentence in said
    config = json.loads((discriminator / "config.json").read_text(encoding="utf-8"))
    for part in discriminator.iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    config["id2label"], config["label2id"] = {"0": "positive", "1": "negative"}, {"positive": 0, "negative": 1}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert cli.main(["serve", "--discriminator", str(tmp_path), "--port", "0"]) == 2
    assert "has the labels [positive, negative]" in capsys.readouterr().err


def test_listening_to_all_without_a_token_warns(
    discriminator: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import uvicorn

    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    assert cli.main(["serve", "--discriminator", str(discriminator), "--host", "0.0.0.0", "--port", "0"]) == 0
    assert "asks for no token" in caplog.text
    caplog.clear()
    monkeypatch.setenv("TLCR_SERVE_TOKEN", "x")
    assert cli.main(["serve", "--discriminator", str(discriminator), "--host", "0.0.0.0", "--port", "0"]) == 0
    assert "asks for no token" not in caplog.text
