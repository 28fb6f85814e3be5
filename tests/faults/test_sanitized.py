"""`make fuzz-sanitized`: a copy that is made again, and no fuzzing of kernels that no sanitizer watches."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.faults import sanitized


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[list[str], dict[str, str]]]:
    """The commands that it starts, with their environments; none is run, and each says nothing."""
    started: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        started.append((command, options.get("env", {})))
        return subprocess.CompletedProcess(command, 0, f"/lib/{command[-1].partition('=')[2]}\n", "")

    monkeypatch.setattr(sanitized, "COPY", tmp_path / "build" / "sanitized")
    monkeypatch.setattr(sanitized.subprocess, "run", run)
    return started


def test_the_copy_is_brought_up_to_date(asked: list[Any]) -> None:
    sanitized.build()
    gone, link = sanitized.COPY / "csrc" / "gone.cpp", sanitized.COPY / "tlcr" / "kernels"
    gone.touch()
    sanitized.build()
    assert link.is_symlink() and link.exists() and not gone.exists()
    assert not list(sanitized.COPY.rglob("*.so")), "a library that nothing watches"


def test_kernels_that_no_sanitizer_watches_are_not_fuzzed(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    monkeypatch.setattr(sanitized, "build", lambda: None)
    with pytest.raises(SystemExit, match="a read outside a tensor was not found"):
        sanitized.main([])
    command, environment = asked[-1]
    assert sanitized.OVERRUN in command
    assert environment["LD_PRELOAD"] == "/lib/libasan.so /lib/libstdc++.so.6"
