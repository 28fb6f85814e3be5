"""Files are written whole or not at all, whatever fails."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tlcr.errors import CheckpointError
from tlcr.files import atomic_write, write_json


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """A real failure of the operating system: no file of this process may grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_write_aside_replaces_files_and_folders_whole(tmp_path: Path) -> None:
    for version in ("old", "new"):
        with atomic_write(tmp_path / "file.txt") as aside:
            aside.write_text(version)
        with atomic_write(tmp_path / "folder") as aside:
            aside.mkdir()
            (aside / version).touch()
    assert (tmp_path / "file.txt").read_text() == "new"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "folder"]


def test_what_fails_half_way_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "file.txt") as aside:
        aside.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "file.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
    with (
        files_limited_to(10),
        pytest.raises(CheckpointError, match="File too large"),
        atomic_write(tmp_path / "file.txt") as aside,
    ):
        aside.write_text("x" * 100)
    assert (tmp_path / "file.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.svg").write_text("mine")
    (tmp_path / "link").symlink_to("figures")
    for name in ("figures", "link"):
        with pytest.raises(CheckpointError, match="Is a directory"), atomic_write(tmp_path / name) as aside:
            aside.write_text("a figure")
    assert (tmp_path / "link" / "mine.svg").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "link"]


def test_json_keeps_floats_and_writes_null_for_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 0.1 + 0.2, "nan": float("nan"), "list": [float("inf"), 1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 0.1 + 0.2, "nan": None, "list": [None, 1]}


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system, where the second of two renames fails."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    untouched = pytest.raises(CheckpointError, match="Stale file handle; what was there before is untouched")
    with untouched, atomic_write(tmp_path / "model") as aside:
        aside.mkdir()
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_deleted_is_said_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def rmtree(path: Path, **_: object) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    (tmp_path / "model").mkdir()
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with atomic_write(tmp_path / "model") as aside:
        aside.mkdir()
        (aside / "weights").write_text("new")
    assert (tmp_path / "model" / "weights").read_text() == "new"
    assert ".old-model cannot be deleted (Directory not empty)" in caplog.text
