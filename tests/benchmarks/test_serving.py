"""The benchmark of the server: nothing that failed counts as served, and no error is passed over."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import serving
from benchmarks.record import largest
from tlcr.errors import HostError

SCRIPT = Path(__file__).parents[2] / ".ci" / "vllm.py"


def test_the_largest_error_is_nan_where_one_is() -> None:
    for errors in ([math.nan, 0.1], [0.1, math.nan], [0.1, math.nan, 0.2]):
        assert math.isnan(largest(errors)) and not largest(errors) <= 1
    assert largest(iter([0.1, 0.3, 0.2])) == 0.3 and largest([]) == 0.0


def test_a_client_that_fails_ends_the_benchmark() -> None:
    done: list[int] = []

    def work(part: int) -> None:
        if part == 1:
            raise HostError("the server answers 500")
        done.append(part)

    with pytest.raises(HostError, match="answers 500"):
        serving.together(work, range(3))
    assert sorted(done) == [0, 2]


def test_tokens_that_were_not_served_have_no_rate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Failing:
        def __init__(self, url: str) -> None:
            pass

        def token_rewards(self, request: object) -> None:
            raise HostError("the server answers 500")

    class Model:
        def opinions(self, rows: object) -> None:
            pass

    @contextmanager
    def served(*_: object) -> Iterator[tuple[str, psutil.Process]]:
        yield "http://localhost:1", psutil.Process()

    monkeypatch.setattr(serving, "served", served)
    monkeypatch.setattr(serving, "RewardClient", Failing)
    model: Any = Model()
    with pytest.raises(HostError, match="answers 500"):
        serving.throughput(tmp_path, model)


def test_the_server_has_one_thread_as_what_it_is_compared_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, str] = {}

    def started(command: list[str], *, env: dict[str, str], **_: object) -> None:
        given.update(env)
        raise InterruptedError

    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(serving.subprocess, "Popen", started)
    with pytest.raises(InterruptedError), serving.served(tmp_path):
        pass
    assert given["OMP_NUM_THREADS"] == "1" and given["PATH"] == os.environ["PATH"]


def test_rewards_that_are_no_numbers_are_not_the_discriminators(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("served_by_vllm", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    class Local:
        def __init__(self, folder: Path) -> None:
            pass

        def token_rewards(self, items: object) -> list[list[float]]:
            return [[0.5, math.nan]]

    monkeypatch.setattr(script, "installed", lambda: "vllm")
    monkeypatch.setattr(script, "answers", lambda *_: ({"version": "0"}, [[0.5, 0.5]]))
    monkeypatch.setattr(script, "LocalScorer", Local)
    monkeypatch.setattr(script.recorded, "save", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["vllm.py", "a kind"])
    with pytest.raises(SystemExit, match="rewards are not the discriminator's"):
        script.main()
    assert "largest difference of a reward nan" in capsys.readouterr().out
