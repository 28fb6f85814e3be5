"""All that is asked of a machine with a GPU about PPO rounds, the most important first, within a number of minutes.

    python -m benchmarks.ppo_step.cases --out FOLDER --minutes 12            on a GPU
    python -m benchmarks.ppo_step.cases --out FOLDER --minutes 12 --small    the same commands in small, for a CPU

Each case is a command of its own with a limit of its own. Its output is printed as it comes and kept in FOLDER, with a
profile of one round; where the checkout is at a commit, so are its figures as a file for `benchmarks/results`. A case
that the minutes left do not hold is not begun. Nothing is downloaded, and TRL is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import record
from benchmarks.ppo_step.task import TRL_VERSION

LEAST = 20
"""Seconds that must be left for a case to begin, where its limit is longer."""
ROUND = ("--prompt-tokens", "128", "--response-tokens", "128", "--epochs", "2", "--minibatch", "32")
SMALL = ("--batch", "4", "--prompt-tokens", "8", "--response-tokens", "8", "--epochs", "1", "--threads", "1")


@dataclass(frozen=True)
class Case:
    """A command after `python -m`, and the seconds after which it is cut off."""

    name: str
    command: tuple[str, ...]
    limit: int


def cases(*, small: bool, trl: str | None) -> Iterator[Case]:
    """The cases in their order.

    Args:
        small: models of the embedded task's size and short answers.
        trl: the interpreter that has TRL; None: there is none.
    """

    def ppo(name: str, limit: int, processes: int, *options: str, shape: str = "1b", micro_batch: int = 16) -> Case:
        size = SMALL if small else ("--shape", shape, "--dtype", "bfloat16", *ROUND, "--micro-batch", str(micro_batch))
        one = ("--rounds", "1" if small else "2", "--repeats", "1", "--limit", str(limit))
        return Case(name, ("benchmarks.ppo_step", *size, *one, *options), processes * limit + LEAST)

    with_trl = ("--no-trl",) if trl is None else ("--trl-python", trl)
    yield ppo("1b_separate", 90, 1 if trl is None else 2, "--value-model", "separate", *with_trl)
    yield ppo("1b_shared", 75, 1, "--value-model", "shared", "--no-trl")
    rollout = (
        "--prompts",
        "4",
        "--batch",
        "2",
        "--longest",
        "8",
        "--mean",
        "16",
        "--turns",
        "1",
        "--shape",
        "embedded",
    )
    if not small:
        rollout = ("--shape", "1b", "--dtype", "bfloat16", "--prompts", "128", "--batch", "64", "--turns", "2")
    yield Case("1b_rollout", ("benchmarks.rollout", *rollout, "--engines", "generate", "static", "paged"), 150)
    yield ppo("1b_shared_static", 90, 1, "--value-model", "shared", "--engine", "static", "--no-trl")
    yield ppo("1b_shared_paged", 75, 1, "--value-model", "shared", "--engine", "paged", "--no-trl")
    yield ppo("135m", 60, 2 if trl is None else 3, *with_trl, shape="135m", micro_batch=32)


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    trl = options.trl_python if has_trl(options.trl_python) else None
    say(f"TRL {TRL_VERSION}: {'by ' + trl if trl else 'not installed, left out'}")
    recorded = clean()
    end = time.monotonic() + 60 * options.minutes
    told = []
    for case in cases(small=options.small, trl=trl):
        left = end - time.monotonic()
        if left < min(case.limit, LEAST):
            told.append((case.name, "not begun: no time left"))
            continue
        command = list(case.command)
        if case.command[0] == "benchmarks.ppo_step":
            command += ["--profile", str(options.out / f"{case.name}_profile")]
            command += ["--json", str(options.out / f"ppo_step_{case.name}.json")] if recorded else []
        began = time.monotonic()
        said = run(case.name, command, min(case.limit, left), options.out / f"{case.name}.txt")
        told.append((case.name, f"{said}, {time.monotonic() - began:.0f} s"))
    for name, said in told:
        say(f"{name:20s} {said}")
    if any(said.startswith("failed") for _, said in told):
        raise SystemExit(1)


def run(name: str, command: list[str], limit: float, output: Path) -> str:
    """Runs a case, and prints and keeps what it says; returns how it ended."""
    say(f"\n== {name}: python -m {' '.join(command)}")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        start_new_session=True,
    )
    cut_off = threading.Event()

    def cut() -> None:
        cut_off.set()
        os.killpg(process.pid, signal.SIGTERM)

    timer = threading.Timer(limit, cut)
    timer.start()
    assert process.stdout is not None
    with process.stdout as said, output.open("w", encoding="utf-8") as kept:
        for line in said:
            say(line.rstrip("\n"))
            kept.write(line)
            kept.flush()
    code = process.wait()
    timer.cancel()
    if cut_off.is_set():
        return "cut off"
    return "done" if code == 0 else f"failed with code {code}"


def clean() -> bool:
    """Whether the figures belong to a commit, and so can be kept for `benchmarks/results`."""
    try:
        record.clean_commit()
    except SystemExit as refused:
        say(str(refused))
        return False
    return True


def has_trl(python: str) -> bool:
    asked = [python, "-c", "from importlib.metadata import version; print(version('trl'))"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.strip() == TRL_VERSION


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what the cases say, and their profiles")
    parser.add_argument("--minutes", type=float, default=12, help="for all cases together")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has trl==1.11.0")
    parser.add_argument("--small", action="store_true", help="the same commands in small, for a machine without a GPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
