"""What people download: the sdist holds the whole repository, the wheel the whole package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD_SDIST = "from setuptools import build_meta; build_meta.build_sdist('dist')"
BUILD_WHEEL = "from setuptools import build_meta; build_meta.build_wheel('dist')"
NOT_FOR_PEOPLE_WHO_BUILD = {".gitignore"}


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of tracked files")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name for name in names.split("\0") if name and os.path.lexists(ROOT / name)}


@pytest.fixture(scope="module")
def dist(tracked: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both archives, built from a copy of the tracked files by the interpreter at hand."""
    copy = tmp_path_factory.mktemp("copy")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    build(copy, BUILD_SDIST)
    build(copy, BUILD_WHEEL)
    return copy / "dist"


def build(folder: Path, code: str, **variables: str) -> None:
    """A pure build: what goes into an archive does not depend on a compiler."""
    environment = {**os.environ, "TLCR_BUILD": "none", **variables}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_sdist_holds_every_tracked_file(dist: Path, tracked: set[str]) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    assert tracked - held == NOT_FOR_PEOPLE_WHO_BUILD & tracked


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(dist: Path, tracked: set[str]) -> None:
    (archive,) = dist.glob("*.whl")
    held = set(zipfile.ZipFile(archive).namelist())
    package = {name for name in tracked if name.startswith("tlcr/")} - {"tlcr/kernels"}
    package |= {"tlcr/_build.json"} | {f"tlcr/{name}" for name in tracked if name.startswith("kernels/")}
    assert "tlcr/py.typed" in package
    assert {name for name in held if ".dist-info/" not in name} == package
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)


def test_a_wheel_built_from_the_sdist_is_the_same(dist: Path, tmp_path: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")  # as pip does, which refuses links that lead out of the archive
    (unpacked,) = tmp_path.iterdir()
    build(unpacked, BUILD_WHEEL)
    (ours,), (theirs,) = dist.glob("*.whl"), (unpacked / "dist").glob("*.whl")
    assert contents(ours) == contents(theirs)
    build(unpacked, BUILD_WHEEL, TLCR_LOCAL_VERSION="cu130")
    assert [wheel.name for wheel in (unpacked / "dist").glob("*+cu130*")] == ["tlcr_rlhf-0.1.0+cu130-py3-none-any.whl"]


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
