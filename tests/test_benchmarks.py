"""The benchmarks: what they refuse to time or to keep, and that what they write is what they measured."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def record() -> Iterator[ModuleType]:
    """Scripts of a folder import one another by bare names."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("record")
    sys.path.remove(str(ROOT / "benchmarks"))


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one commit, which Python imports a tlcr from."""
    import tlcr

    folder = (tmp_path / "checkout").resolve()
    (folder / "tlcr").mkdir(parents=True)
    (folder / "tlcr" / "__init__.py").write_text("")
    monkeypatch.setattr(tlcr, "__file__", str(folder / "tlcr" / "__init__.py"))
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_the_commit_of_a_clean_checkout(record: ModuleType, checkout: Path) -> None:
    assert record.clean_commit(checkout) == git(checkout, "rev-parse", "HEAD")


def test_a_changed_file_is_refused_and_named(record: ModuleType, checkout: Path) -> None:
    (checkout / "tlcr" / "__init__.py").write_text("changed = True\n")
    with pytest.raises(SystemExit, match=r"differs from commit .*commit or stash[\s\S]*tlcr/__init__.py"):
        record.clean_commit(checkout)


def test_an_untracked_file_is_refused_unless_it_is_a_result(record: ModuleType, checkout: Path) -> None:
    results = checkout / record.RESULTS
    results.mkdir(parents=True)
    (results / "ops.json").write_text("{}")
    record.clean_commit(checkout)
    (checkout / "tlcr" / "new.py").write_text("")
    with pytest.raises(SystemExit, match=r"new\.py"):
        record.clean_commit(checkout)


def test_no_commit_is_refused(record: ModuleType, checkout: Path) -> None:
    git(checkout, "update-ref", "-d", "HEAD")
    with pytest.raises(SystemExit, match="no git checkout with a commit"):
        record.clean_commit(checkout)


def test_code_from_elsewhere_is_refused(
    record: ModuleType, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tlcr.__file__", str(tmp_path / "elsewhere" / "tlcr" / "__init__.py"))
    with pytest.raises(SystemExit, match=r"imported from .*elsewhere.*PYTHONPATH"):
        record.clean_commit(checkout)


def test_a_record_holds_the_facts_and_nothing_of_this_machine_s_paths(
    record: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ROOT / "benchmarks" / "ops.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--json", str(tmp_path / "x.json"), "--python", "/opt/x/python"])
    made = record.record("ops", [{"op": "x"}], commit="0" * 40, clocks={"wall": "time"}, packages=["nowhere"], more=1)
    assert made["command"] == "python benchmarks/ops.py --json x.json --python python"
    assert set(made["versions"]) >= {"python", "torch", "tlcr"} and "nowhere" not in made["versions"]
    assert made["machine"]["threads"] == torch.get_num_threads() and made["machine"]["memory_bytes"] > 2**30
    assert made["machine"]["last_level_cache_bytes"] is None or made["machine"]["last_level_cache_bytes"] >= 2**18
    assert set(made["build"]) == set(record.BUILD_FACTS) and made["more"] == 1
    assert str(ROOT) not in json.dumps(made) and str(tmp_path) not in json.dumps(made)
    record.write(tmp_path / "results" / "x.json", made)
    assert json.loads((tmp_path / "results" / "x.json").read_text()) == made


def test_a_write_that_fails_leaves_what_was_there(record: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("before")
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.write(path, {"x": float("nan")})
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
