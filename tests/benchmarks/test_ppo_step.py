"""PPO rounds beside TRL: what stops a run before anything is timed, and what the interpreter with TRL has to have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ppo_step import __main__ as command
from benchmarks.ppo_step.task import TRL, TRL_VERSION

ROOT = Path(__file__).parents[2]


def interpreter(folder: Path, version: str | None) -> str:
    """This Python, with a distribution of TRL that has this version and nothing else in it, or without packages."""
    site = folder / "site"
    if version is not None:
        (site / f"trl-{version}.dist-info").mkdir(parents=True)
        (site / f"trl-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: trl\nVersion: {version}\n"
        )
    option = "-S" if version is None else ""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" {option} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("version", [None, "0.9.6"])
def test_a_wrong_trl_is_refused_before_anything_is_timed(
    version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = interpreter(tmp_path, version)
    monkeypatch.setattr(command, "run", lambda *_: pytest.fail("was timed"))
    monkeypatch.setattr(sys, "argv", ["ppo_step", "--trl-python", python])
    said = rf"has TRL {version or 'none'}, wanted 1\.11\.0: .*pip install trl==1\.11\.0.*--trl-python"
    with pytest.raises(SystemExit, match=said):
        command.main()


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--trl-python .*nowhere cannot be run: .*No such file"):
        command.check_trl(str(tmp_path / "nowhere"))


def test_the_trl_that_is_compared_with_is_let_through(tmp_path: Path) -> None:
    command.check_trl(interpreter(tmp_path, TRL_VERSION))
    assert TRL == "TRL 1.11.0"


def test_the_side_of_trl_needs_no_tlcr(tmp_path: Path) -> None:
    """All that its process imports before TRL itself, with a TRL that ends the process and without any tlcr."""
    (tmp_path / "trl.py").write_text("raise SystemExit('reached TRL')\n")
    code = (
        "import runpy, sys; sys.modules['tlcr'] = None; "
        "runpy.run_module('benchmarks.ppo_step.with_trl', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stderr.strip() == "reached TRL"
