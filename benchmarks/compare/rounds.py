"""Runs the rounds: the processes of both commits in turn, with this checkout's cases and the commit's tlcr."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.compare.ratios import LEAST_ROUNDS
from benchmarks.ppo_step import journal
from benchmarks.ppo_step.task import PHASES, Task
from benchmarks.record import ROOT
from benchmarks.report.tables import duration

PPO = "PPO round"

Rounds = dict[str, list[float]]
"""Maps each case to its seconds, one number for each round."""


def alternate(
    folders: Mapping[str, Path], options: argparse.Namespace, console: Console
) -> tuple[dict[str, Rounds], dict[str, dict[str, str]]]:
    """The seconds of every case for each side; for cases that a side cannot run, the side and the reason.

    One more round runs first and is not counted: it fills the system's file caches and shows which cases run. Ctrl-C
    ends the rounds, and the counted rounds are reported if there are enough.
    """
    taken: dict[str, Rounds] = {side: {} for side in folders}
    lacking: dict[str, dict[str, str]] = {}
    begin, counted = time.monotonic(), 0
    for number in range(options.rounds + 1):
        in_turn = list(folders) if number % 2 else list(folders)[::-1]
        try:
            measured = {side: one_round(folders[side], options) for side in in_turn}
        except KeyboardInterrupt:
            if number <= LEAST_ROUNDS:
                raise
            console.print(f"[dim]interrupted: {number - 1} of {options.rounds} rounds[/dim]")
            break
        counted = number
        for side, found in measured.items():
            for case, result in found.items():
                if "reason" in result:
                    lacking.setdefault(case, {})[side] = result["reason"]
                elif number:
                    taken[side].setdefault(case, []).append(result["seconds"])
        if number == options.rounds:
            break
        left = (time.monotonic() - begin) / (number + 1) * (options.rounds - number)
        console.print(
            f"[dim]round {number} of {options.rounds} done, about {duration(left, 2)} left[/dim]", highlight=False
        )
    # a PPO round that a side lacks, or failed in once, lacks its phases too, which no reason names
    kept = [
        case
        for case, seconds in taken["base"].items()
        if case not in lacking and all(len(found.get(case, ())) == len(seconds) == counted for found in taken.values())
    ]
    return {side: {case: found[case] for case in kept} for side, found in taken.items()}, lacking


def one_round(installed: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each case's {"seconds"}, or {"reason"} why it did not run."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        if not options.only.startswith(PPO):
            given = ["--installed", installed, "--device", options.device, "--threads", options.threads]
            given += ["--only", options.only]
            done = start("benchmarks.compare.cases", result, *given, installed=installed, threads=options.threads)
            if done.returncode != 0:
                said = (done.stdout + done.stderr)[-4000:]
                raise SystemExit(f"timing the ops of {installed.name} failed with code {done.returncode}:\n{said}")
            found |= json.loads(result.read_text(encoding="utf-8"))
        if PPO.startswith(options.only) or options.only.startswith(PPO):
            found |= ppo_round(result, options.threads, installed)
    return found


def start(module: str, *arguments: object, installed: Path, threads: int) -> subprocess.CompletedProcess[str]:
    """Run a module of these benchmarks with the installed tlcr.

    `python -m` searches the current folder first, and so it is the installed one: at the root of the checkout it would
    find the checkout's tlcr.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (installed, ROOT))),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "benchmarks.compare.process", installed, module, *arguments]
    return subprocess.run(
        list(map(str, command)), env=environment, cwd=installed, capture_output=True, text=True, check=False
    )


def ppo_round(result: Path, threads: int, installed: Path) -> dict[str, dict[str, Any]]:
    """The seconds of a median PPO round of a small model, and of its phases."""
    result = result.with_name("journal.jsonl")
    task = Task(batch=16, prompt_tokens=8, response_tokens=16, epochs=2, minibatch=16, micro_batch=16, threads=threads)
    done = start("benchmarks.ppo_step.with_tlcr", task.to_json(), result, installed=installed, threads=threads)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {PPO: {"reason": said[-1]}}
    rounds = journal.counted_rounds(journal.read(result))
    names = {"total": PPO} | {phase: f"{PPO}, {phase}" for phase in PHASES}
    return {name: {"seconds": statistics.median(one[phase] for one in rounds)} for phase, name in names.items()}
