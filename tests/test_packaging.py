"""What people download: the sdist holds the whole repository, the wheel the whole package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "from setuptools import build_meta; build_meta.build_sdist('dist'); build_meta.build_wheel('dist')"
NOT_FOR_PEOPLE_WHO_BUILD = {".gitignore"}


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of tracked files")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name for name in names.split("\0") if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def dist(tracked: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both archives, built from a copy of the tracked files by the interpreter at hand."""
    copy = tmp_path_factory.mktemp("copy")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return copy / "dist"


def test_the_sdist_holds_every_tracked_file(dist: Path, tracked: set[str]) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    assert tracked - held == NOT_FOR_PEOPLE_WHO_BUILD & tracked


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(dist: Path, tracked: set[str]) -> None:
    (archive,) = dist.glob("*.whl")
    held = set(zipfile.ZipFile(archive).namelist())
    package = {name for name in tracked if name.startswith("tlcr/")}
    assert "tlcr/py.typed" in package
    assert {name for name in held if ".dist-info/" not in name} == package
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)


def test_the_build_does_not_ask_for_torch(dist: Path) -> None:
    """An isolated build would compile against another torch than the one that runs."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    requires = pyproject.partition("[build-system]")[2].partition("build-backend")[0]
    assert '"setuptools>=77"' in requires and '"torch' not in requires
    (archive,) = dist.glob("*.whl")
    metadata = zipfile.ZipFile(archive).read(
        next(n for n in zipfile.ZipFile(archive).namelist() if n.endswith("METADATA"))
    )
    assert b"Requires-Dist: torch" in metadata
    assert b"License-Expression: Apache-2.0" in metadata
