"""Faults of a moment: signals, two commands at once, a clock that jumps, memory that runs out, power that is cut."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from tests.faults.case import Attack, Case
from tests.faults.children import Child


def signals(number: signal.Signals) -> Attack:
    def attack(case: Case) -> None:
        """Up to three times at random moments, then to the end."""
        for _ in range(case.random.randint(1, 3)):
            child = Child(case.command, case.folder)
            time.sleep(case.random.uniform(0.02, case.bench.seconds[case.outcome.stage]))
            child.send(number)
            case.take(child.ended(), killed=True)
        case.go_on()

    return attack


def killed_at_a_call(case: Case) -> None:
    """SIGKILL right before or after a rename or a sync: the seams of every write."""
    name = case.random.choice(("replace", "fsync"))
    number, after = case.random.randint(1, 12), case.random.random() < 0.5

    def plant() -> None:
        real, calls = getattr(os, name), [0]

        def call(*arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments)
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, name, call)

    case.take(case.under(plant), killed=True)
    case.go_on()


def clock_jumps(case: Case) -> None:
    """The clock of the machine jumps by up to ten years, each time that it is read; and the command is stopped once."""
    number = case.random.choice((signal.SIGTERM, signal.SIGKILL))

    def plant() -> None:
        real, jumps = time.time, random.Random(case.outcome.seed)
        time.time = lambda: real() + jumps.uniform(-3e8, 3e8)

    child = Child(case.command, case.folder, plant)
    time.sleep(case.random.uniform(0.02, 1.2 * case.bench.seconds[case.outcome.stage]))
    child.send(number)
    case.take(child.ended(), killed=True)
    case.take(case.under(plant))
    case.outcome.met = True
    case.go_on()


def two_at_once(case: Case) -> None:
    """The same command twice in one folder."""
    first = Child(case.command, case.folder)
    time.sleep(case.random.uniform(0, 0.7) * case.bench.seconds[case.outcome.stage])
    second = Child(case.command, case.folder)
    ends = [first.ended(), second.ended()]
    for ended in ends:
        case.take(ended)
    if not any(ended.done for ended in ends):
        case.problem("neither of the two did its work")
    case.go_on()


def out_of_memory(case: Case) -> None:
    """The process may take half a MiB to 128 MiB more than it has when it begins."""
    more = int(2 ** case.random.uniform(19, 27))

    def plant() -> None:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    case.take(case.under(plant))
    case.go_on()


def power_cut(case: Case) -> None:
    """The machine stops at a rename or a sync, and what was not synced by then is zeros, as some file systems leave it.

    SQLite syncs by itself, where this does not see it: its file is left alone.
    """
    kept = case.folder / "synced"
    kept.mkdir()
    name, number = case.random.choice(("replace", "fsync")), case.random.randint(1, 14)
    before = _contents(case.folder / "run")

    def plant() -> None:
        sync = os.fsync

        def fsync(handle: int) -> None:
            sync(handle)
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            if path.is_file():
                shutil.copy(path, kept / str(os.fstat(handle).st_ino))

        os.fsync = fsync
        real, calls = getattr(os, name), [0]

        def call(*arguments: Any) -> Any:
            result = real(*arguments)
            calls[0] += 1
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, name, call)

    case.take(case.under(plant), killed=True)
    if case.outcome.met:
        for path, data in _contents(case.folder / "run").items():
            if before.get(path) != data and not path.name.startswith("answers.sqlite"):
                synced = kept / str(path.stat().st_ino)
                safe = synced.read_bytes() if synced.exists() else before.get(path, b"")
                path.write_bytes(safe[: len(data)] + bytes(max(0, len(data) - len(safe))))
    shutil.rmtree(kept)
    case.go_on()


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
