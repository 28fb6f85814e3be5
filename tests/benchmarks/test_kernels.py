"""benchmarks.kernels: what is compared with what, and errors that are no numbers."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernels
from benchmarks.compare import commits, rounds
from tlcr import ops


def found(impl: str, seconds: float) -> dict[str, Any]:
    copy = {"seconds": 1e-3, "bytes": 1e6}
    return {"copy": copy, "fused_gae 3 x 40": {"seconds": seconds, "bytes": 1e6, "error": 0.0, "impl": impl}}


def test_different_implementations_are_not_compared() -> None:
    """An older commit without compiled kernels ran plain torch beside today's CUDA."""
    lines = kernels.table({"60e69f4": [found("torch", 1e-2)], "here": [found("cuda", 1e-3)]}).splitlines()
    assert "60e69f4" in lines[0] and " us " in lines[1]
    assert lines[2].startswith("fused_gae 3 x 40 ") and " us " not in lines[2]
    assert lines[2].endswith("not compared: 60e69f4 by torch, here by cuda")
    lines = kernels.table({"60e69f4": [found("cuda", 1e-2)], "here": [found("cuda", 1e-3)]}).splitlines()
    assert lines[2].count(" us ") == 2


def test_a_commit_is_built_and_measured_with_its_own_tlcr_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[Any, ...]] = []

    @contextmanager
    def installed(revision: commits.Revision, kept: Path, console: object) -> Iterator[Path]:
        assert (revision.name, kept) == ("HEAD", kernels.ROOT / "build" / "compare")
        yield tmp_path / "built"

    def start(module: str, *arguments: object, installed: Path, threads: int) -> subprocess.CompletedProcess[str]:
        started.append((module, arguments, installed))
        return subprocess.CompletedProcess([], 0, json.dumps(found("cuda", 1e-3)), "")

    monkeypatch.setattr(commits, "installed", installed)
    monkeypatch.setattr(rounds, "start", start)
    measured = kernels.compared("HEAD", interpret=True)
    assert {name: len(those) for name, those in measured.items()} == {"HEAD": 2, "here": 2}
    arguments = ("--worker", "--interpret")
    places = [tmp_path / "built", kernels.ROOT] * 2
    assert started == [("benchmarks.kernels", arguments, place) for place in places]


def test_a_process_that_fails_ends_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "start", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "wrong result"))
    with pytest.raises(SystemExit, match=r"(?s)timing the kernels of here failed with code 1:.*wrong result"):
        kernels.compared(None, interpret=True)


@pytest.mark.parametrize("place", [0, 1])
def test_a_result_that_is_no_number_is_wrong(place: int) -> None:
    got = [torch.ones(2), torch.ones(2)]
    got[place] = torch.tensor([1.0, math.nan])
    error = kernels._error(tuple(got), (torch.ones(2), torch.ones(2)))
    assert math.isnan(error)
    assert kernels._error(torch.tensor([1.0, 1.5]), torch.tensor([1.0, 2.0])) == 0.25


def test_every_case_is_of_an_op_that_is_known() -> None:
    known = {(status.op, status.device): status.auto for status in ops.available()}
    for case in kernels.cases("cpu", tiny=True):
        assert kernels._taken(case.op, "auto", "cpu") == known[case.op, "cpu"]
        assert kernels._taken(case.op, "triton", "cpu") == "triton"
