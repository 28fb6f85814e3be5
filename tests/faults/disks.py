"""Faults of disks: full, read-only, gone, or with calls that fail as those of a network file system do."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.case import Attack, Case
from tests.faults.children import Child, finish


def failing_calls(names: tuple[str, ...], errors: tuple[int, ...]) -> Attack:
    """Calls of the system that fail, once and again from then on, as those of a network file system or a dying disk."""

    def attack(case: Case) -> None:
        name, number = case.random.choice(names), case.random.randint(1, 15)
        code, lasting = case.random.choice(errors), case.random.random() < 0.5

        def plant() -> None:
            real, calls = getattr(os, name), [0]

            def call(*arguments: Any, **named: Any) -> Any:
                calls[0] += 1
                if calls[0] == number or (lasting and calls[0] > number):
                    raise OSError(code, os.strerror(code), *(a for a in arguments[:1] if isinstance(a, str)))
                return real(*arguments, **named)

            setattr(os, name, call)

        case.take(case.under(plant))
        case.go_on()

    return attack


def file_size_limit(case: Case) -> None:
    """No file may grow beyond a random size, which every file system may refuse as it refuses a full disk."""
    limit = int(10 ** case.random.uniform(2, 6))

    def plant() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    case.take(case.under(plant))
    case.go_on()


def can_mount() -> bool:
    """Whether this process may have disks of its own."""
    if shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as path:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "none", path], capture_output=True).returncode == 0
        if mounted:
            subprocess.run(["umount", path], check=True)
        return mounted


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A disk of 64 MiB at ``path``."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)
        path.rmdir()


def remount(path: Path, options: str) -> bool:
    """Changes a small disk. Returns whether the system did."""
    return subprocess.run(["mount", "-o", f"remount,{options}", path], capture_output=True).returncode == 0


def disk_full(case: Case) -> None:
    """A real file system with room for some pages more than what is there: the disk is full at another write for
    every number of pages. Then it grows."""
    room = int(case.random.uniform(0, 1) ** 2 * 1500)
    there = os.statvfs(case.folder)
    taken = there.f_blocks - there.f_bfree
    remount(case.folder, f"size={(taken + room) * there.f_bsize}")
    case.take(case.under(lambda: None))
    remount(case.folder, "size=64m")
    case.go_on()


def no_more_files(case: Case) -> None:
    """A file system that has room, but for some more files only."""
    there = os.statvfs(case.folder)
    remount(case.folder, f"nr_inodes={there.f_files - there.f_ffree + case.random.randint(1, 40)}")
    case.take(case.under(lambda: None))
    remount(case.folder, "nr_inodes=100000")
    case.go_on()


def read_only(case: Case) -> None:
    """The disk becomes read-only, before the command or while it works."""
    child: Child | None = None
    if case.random.random() < 0.5:
        remount(case.folder, "ro")
        ended = finish(case.command, case.folder.parent, lambda: os.chdir(case.folder))
    else:
        child = Child(case.command, case.folder.parent, lambda: os.chdir(case.folder))
        time.sleep(case.random.uniform(0.02, case.bench.seconds[case.outcome.stage]))
        for _ in range(2000):  # not while a file is open to be written
            if remount(case.folder, "ro"):
                break
        ended = child.ended()
    case.take(ended)
    remount(case.folder, "rw")
    case.go_on()


def vanished(case: Case) -> None:
    """The run's folder goes, as a disk that is unplugged; then it is there again."""
    child = Child(case.command, case.folder)
    time.sleep(case.random.uniform(0.02, case.bench.seconds[case.outcome.stage]))
    folder, away = case.folder / "run", case.folder / "away"
    if folder.exists():
        os.rename(folder, away)
    case.take(child.ended())
    if away.exists():
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(away, folder)
    case.go_on()
