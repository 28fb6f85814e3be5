"""The faults. Each case makes one, lets the command say what it says, takes the fault away and goes on to the end.

A case is named by its kind, stage and seed, and does the same whenever it is run again, but for the moments of signals.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.children import Child, Ended, finish
from tests.faults.runs import STAGES, TRAININGS, Bench
from tlcr.training import loop

ALL = tuple(STAGES)


@dataclass
class Outcome:
    """What came of a case.

    runs: commands that were started under the fault. met: whether it took effect before one was done. refused: the
    sentence with which the last one ended, if one did. equal: whether the result was that of the uninterrupted run in
    the end. problems: what else was wrong.
    """

    kind: str
    stage: str
    seed: int
    runs: int = 0
    met: bool = False
    refused: str | None = None
    equal: bool = False
    problems: tuple[str, ...] = ()

    @property
    def lost(self) -> bool:
        return bool(self.problems) or not self.equal


class Case:
    """One attack: its folder, and what it found so far."""

    def __init__(self, bench: Bench, outcome: Outcome, folder: Path) -> None:
        self.bench, self.outcome, self.folder = bench, outcome, folder
        self.random = random.Random(f"{outcome.kind} {outcome.stage} {outcome.seed}")
        self.command = STAGES[outcome.stage]

    def problem(self, text: str) -> None:
        self.outcome.problems = (*self.outcome.problems, text)

    def take(self, ended: Ended, *, killed: bool = False) -> None:
        """Notes how a command under a fault ended: done, refused in a sentence, killed by us, or badly."""
        self.outcome.runs += 1
        if ended.done:
            return
        self.outcome.met = True
        if ended.sentence is not None:
            self.outcome.refused = ended.sentence
        elif not (killed and ended.code < 0):
            self.problem(f"ended with {ended.code}: {ended.said.strip()[-1500:] or 'no word'}")

    def go_on(self) -> None:
        """The fault is gone: the same command has to reach the result of the uninterrupted run."""
        ended = finish(self.command, self.folder)
        if not ended.done:
            self.problem(f"does not go on ({ended.code}): {ended.said.strip()[-1500:]}")
            return
        differences = self.bench.differences(self.outcome.stage, self.folder)
        self.outcome.equal = not differences
        if differences:
            self.problem("; ".join(differences[:5]))

    def under(self, fault: Callable[[], object]) -> Ended:
        """Runs the command with a fault planted in its process."""
        return finish(self.command, self.folder, fault)


Attack = Callable[[Case], None]


# ---- signals


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


# ---- disks


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


# ---- clocks, neighbours, memory


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


# ---- damage to what is read back


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
        path.write_bytes(_damaged(before, case.random))
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


NASTY = "<script>alert('x')</script><img src=x onerror=y>"


def scripts(case: Case) -> None:
    """A text in what the report is made of is a script: in the page it has to be text, or the file is refused."""
    shutil.copytree(case.bench.finished / "run", case.folder / "run", dirs_exist_ok=True)
    names = ("analysis.json", "samples.jsonl", "done.json", "config.yaml")
    path = case.random.choice([p for p in sorted((case.folder / "run").rglob("*")) if p.name in names])
    if path.name == "config.yaml":
        path.write_text(f"# {NASTY}\n{path.read_text(encoding='utf-8')}", encoding="utf-8")
    else:
        lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
        values = [json.loads(line) for line in lines]
        keys = sorted({key for value in values for key in _keys_of_texts(value)})
        if keys:
            key = case.random.choice(keys)
            path.write_text("\n".join(json.dumps(_with_script(v, key)) for v in values), encoding="utf-8")
    ended = finish(["report", "run"], case.folder)
    case.take(ended)
    if ended.done:
        text = (case.folder / "run" / "report.html").read_text(encoding="utf-8")
        case.outcome.met = "&lt;script&gt;" in text
        if "<script" in text or "<img src=x" in text:
            case.problem(f"{path.name}: a script came into the report")
    case.outcome.equal = True


def _keys_of_texts(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {key for key, item in value.items() if isinstance(item, str) or _is_texts(item)}
        return own.union(*map(_keys_of_texts, value.values()))
    return set().union(*map(_keys_of_texts, value)) if isinstance(value, list) else set()


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _with_script(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _nasty(item) if name == key else _with_script(item, key) for name, item in value.items()}
    return [_with_script(item, key) for item in value] if isinstance(value, list) else value


def _nasty(value: Any) -> Any:
    return [NASTY + item for item in value] if _is_texts(value) else NASTY + value if isinstance(value, str) else value


def _of(files: str, path: Path) -> bool:
    checkpoint = "checkpoints" in path.parts
    return {
        "checkpoint": checkpoint,
        "safetensors": path.suffix == ".safetensors" and not checkpoint,
        "json": path.suffix in (".json", ".jsonl") and not checkpoint,
        "yaml": path.suffix == ".yaml" and not checkpoint,
        "store": path.name.startswith("answers.sqlite") and path.stat().st_size > 0,
    }[files]


def _damaged(data: bytes, rng: random.Random) -> bytes:
    changed, at = bytearray(data), rng.randrange(max(len(data), 1))
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


@dataclass(frozen=True)
class Kind:
    """A fault: how it is made, which stages it is made in, and how often for each case of the others.

    disk: whether it needs a small disk of its own. weight: cases of this kind in each round of all kinds.
    """

    attack: Attack
    stages: tuple[str, ...] = ALL
    disk: bool = False
    weight: int = 1


LATER = ALL[1:]
NETWORK = (errno.ESTALE, errno.EIO, errno.EBUSY, errno.ENOTEMPTY, errno.EACCES)

KINDS: dict[str, Kind] = {
    "SIGKILL at a random moment": Kind(signals(signal.SIGKILL), weight=5),
    "SIGTERM at a random moment": Kind(signals(signal.SIGTERM), weight=4),
    "SIGKILL at a rename or a sync": Kind(killed_at_a_call, weight=3),
    "disk full": Kind(disk_full, disk=True, weight=3),
    "no more files on the disk": Kind(no_more_files, disk=True),
    "limit on the size of files": Kind(file_size_limit),
    "read-only disk": Kind(read_only, disk=True),
    "vanished folder": Kind(vanished),
    "failing renames": Kind(failing_calls(("replace",), NETWORK), weight=2),
    "failing syncs": Kind(failing_calls(("fsync",), (errno.EIO, errno.ENOSPC))),
    "failing deletions": Kind(failing_calls(("unlink", "rmdir"), NETWORK)),
    "clock jumps": Kind(clock_jumps),
    "two commands in one folder": Kind(two_at_once),
    "out of memory": Kind(out_of_memory),
    "torn line of metrics": Kind(torn_line, TRAININGS),
    "damaged checkpoint": Kind(corrupted("checkpoint"), TRAININGS, weight=2),
    "damaged safetensors": Kind(corrupted("safetensors"), ("reward_model", "discriminator", "ppo", "evaluation")),
    "damaged JSON": Kind(corrupted("json"), LATER, weight=2),
    "damaged YAML": Kind(corrupted("yaml"), LATER),
    "scripts in what the report shows": Kind(scripts, ("evaluation",), weight=2),
    "damaged store of answers": Kind(corrupted("store"), ("revisions",)),
}


def attack(bench: Bench, kind: str, stage: str, seed: int) -> Outcome:
    """One case."""
    outcome, made = Outcome(kind, stage, seed), KINDS[kind]
    if made.disk:
        with small_disk(bench.folder / f"disk-{time.monotonic_ns()}") as disk, bench.case(stage, into=disk) as folder:
            made.attack(Case(bench, outcome, folder))
        return outcome
    with bench.case(stage) as folder:
        made.attack(Case(bench, outcome, folder))
    return outcome
