"""The harness of faults in small, and that it finds: each fault that is planted in tlcr is a loss in its report.

All of it in processes of its own, because it forks, which torch allows only before it has trained.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the revisions come from an endpoint, which is an extra")

ROOT = Path(__file__).parents[2]


def faults(output: Path, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, outcomes and messages of ``python -m tests.faults``."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--output", str(output), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    return done.returncode, [json.loads(line) for line in lines], done.stdout + done.stderr


@pytest.mark.slow
def test_nothing_is_lost_by_any_kind_of_fault(tmp_path: Path) -> None:
    """One case of each kind, and some more: `make faults` runs hundreds."""
    code, outcomes, said = faults(tmp_path / "found.jsonl", "--runs", "36")
    assert [outcome for outcome in outcomes if outcome["problems"] or not outcome["equal"]] == []
    assert code == 0 and len(outcomes) == 37, said
    assert sum(outcome["met"] for outcome in outcomes) > 15


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "arguments", "lost"),
    [
        # this seed strikes in the middle of done.json
        ("rename", ("--only", "a sync", "--stage", "labels", "--seed", "290", "--runs", "1"), "cannot be read"),
        ("flush", ("--only", "torn line", "--stage", "sft", "--runs", "1"), "metrics.jsonl differs"),
        # this seed cuts the power right after done.json has its name
        ("sync", ("--only", "power cut", "--stage", "labels", "--seed", "3", "--runs", "1"), "cannot be read"),
        # this seed plants the script where the processor is named
        ("escape", ("--only", "scripts", "--seed", "13", "--runs", "1"), "a script came into the report"),
        ("key", ("--runs", "0"), "the key stands in"),
    ],
)
def test_a_fault_that_is_planted_is_found(plant: str, arguments: tuple[str, ...], lost: str, tmp_path: Path) -> None:
    code, outcomes, said = faults(tmp_path / "found.jsonl", "--plant", plant, *arguments)
    assert code == 1, said
    assert any(lost in problem for outcome in outcomes for problem in outcome["problems"]), said
