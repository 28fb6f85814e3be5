"""Damage to what is read back: torn lines of metrics, and bytes of every kind of file."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

from tests.faults.case import Attack, Case
from tests.faults.children import finish
from tlcr.training import loop


def stop_after_saves(number: int) -> Callable[[], None]:
    """A fault that kills the process once it has saved so many checkpoints."""

    def plant() -> None:
        real, saves = loop.TrainingLoop.save, [0]

        def save(self: loop.TrainingLoop) -> Path:
            path = real(self)
            saves[0] += 1
            if saves[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return path

        loop.TrainingLoop.save = save  # type: ignore[method-assign]

    return plant


def torn_line(case: Case) -> None:
    """A kill left the line after the last checkpoint cut short, or a crash of the machine left zeros in its place."""
    case.under(stop_after_saves(2))
    for path in (case.folder / "run").rglob("metrics.jsonl"):
        if (path.parent / "checkpoints").exists():
            line = path.read_bytes().splitlines()[-1]
            cut = case.random.randint(1, len(line))
            with path.open("ab") as file:
                file.write(case.random.choice((line[:cut], line[:cut] + bytes(len(line) - cut), bytes(cut))))
            case.outcome.met = True
    case.take(case.under(lambda: None))
    case.go_on()


def corrupted(files: str) -> Attack:
    """A file that is read back is damaged: a bit, a byte, a cut, zeros, other text. The result is equal, or the damage
    is named; with the file as it was, the run goes on."""

    def attack(case: Case) -> None:
        if files == "checkpoint":
            case.under(stop_after_saves(2))
        if files == "store":  # the answers are there, and what was made of them is not
            finish(case.command, case.folder)
            for made in ("done.json", "revisions.jsonl", "set_aside.jsonl"):
                (case.folder / "run" / "revisions" / made).unlink()
        there = [path for path in sorted((case.folder / "run").rglob("*")) if path.is_file() and _of(files, path)]
        if not there:
            case.go_on()
            return
        path = case.random.choice(there)
        before = path.read_bytes()
        path.write_bytes(_damaged(before, case.random, b"revised" if files == "store" else b""))
        case.outcome.met = path.read_bytes() != before
        ended = case.under(lambda: None)
        name = path.relative_to(case.folder).as_posix()
        if ended.done:
            differences = case.bench.differences(case.outcome.stage, case.folder)
            differences = [line for line in differences if not line.startswith(name.removeprefix("run/"))]
            if differences:
                case.problem(f"{name} was damaged without a word: {'; '.join(differences[:5])}")
            case.outcome.equal = not differences
            case.take(ended)
            return
        case.take(ended)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(before)
        case.go_on()

    return attack


def _of(files: str, path: Path) -> bool:
    checkpoint = "checkpoints" in path.parts
    return {
        "checkpoint": checkpoint,
        "safetensors": path.suffix == ".safetensors" and not checkpoint,
        "json": path.suffix in (".json", ".jsonl") and not checkpoint,
        "yaml": path.suffix == ".yaml" and not checkpoint,
        "store": path.name.startswith("answers.sqlite") and path.stat().st_size > 0,
    }[files]


def _damaged(data: bytes, rng: random.Random, near: bytes = b"") -> bytes:
    """near: in three of four cases the damage is at these bytes, where there are some. Most pages of a store of so few
    answers are empty, or read by nothing."""
    changed, at = bytearray(data), rng.randrange(max(len(data), 1))
    places = [place for place in range(len(data)) if data.startswith(near, place)] if near else []
    if places and rng.random() < 0.75:
        at = rng.choice(places) + rng.randrange(60)
    way = rng.choice(("bit", "byte", "cut", "zeros", "text", "empty"))
    if way == "bit" and data:
        changed[at] ^= 1 << rng.randrange(8)
    elif way == "byte" and data:
        changed[at] = rng.randrange(256)
    elif way == "cut":
        del changed[at:]
    elif way == "zeros":
        changed[at : at + 512] = bytes(len(changed[at : at + 512]))
    elif way == "text":
        changed[at:at] = rng.choice((b"null", b"[[[[", b'"', b"\xff\xfe", b"1e999", b"{}"))
    else:
        changed.clear()
    return bytes(changed)
