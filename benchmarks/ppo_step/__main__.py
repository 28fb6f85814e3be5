"""Response tokens per second and peak memory of whole PPO rounds, tlcr beside TRL 1.11.0 on the same work.

    python -m benchmarks.ppo_step                                        the embedded size, random weights
    python -m benchmarks.ppo_step --shape 1b --dtype bfloat16 ...        a size of SHAPES in task.py, random weights
    python -m benchmarks.ppo_step --model FOLDER --dtype bfloat16 ...    any causal language model

Each trainer runs in a process of its own, in turn, as often as --repeats says: what disturbs the machine for a while
disturbs both. `--trl-python` names the interpreter that has TRL, if it is not this one; it needs no tlcr. What is equal
and what is counted stands in task.py. The figures are medians over the rounds of all repeats, without the first of
each; speed and memory are relative to TRL's. On a machine with a GPU both train on it, and models with random weights
are made there.

What a process has done is printed as it goes: models made, phases, rounds. One that --limit cuts off has told where
its time went, and its whole rounds count. `--profile FOLDER` profiles one more round of each side.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.ppo_step import journal
from benchmarks.ppo_step.task import PHASES, SHAPES, TRL, TRL_VERSION, Task

WIDTH = 110  # of the table where the output is no terminal
TIMED = (*PHASES, "total")
TLCR = {"separate": "tlcr", "shared": "tlcr, shared value head"}
"""The name of tlcr's side for each value model."""
ENGINES = ("generate", "static", "paged")
POLL = 0.2
"""Seconds between looks at a journal."""

Events = list[dict[str, Any]]


@dataclass(frozen=True)
class Side:
    """A trainer with its work, and how its process is started."""

    python: str
    module: str
    task: Task


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and the trainer's process ends too
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # whoever cuts this off has read what was printed
    task = Task(
        model=options.model,
        shape=options.shape,
        dtype=options.dtype,
        batch=options.batch,
        prompt_tokens=options.prompt_tokens,
        response_tokens=options.response_tokens,
        epochs=options.epochs,
        minibatch=options.minibatch or options.batch,
        micro_batch=options.micro_batch or options.minibatch or options.batch,
        engine=options.engine,
        threads=options.threads,
        rounds=options.rounds + 1,
    )
    commit = record.clean_commit() if options.json else None
    by_engine = "" if options.engine == "generate" else f", {options.engine}"
    sides = {
        TLCR[value_model] + by_engine: Side(sys.executable, "with_tlcr", replace(task, value_model=value_model))
        for value_model in (TLCR if options.value_model == "both" else [options.value_model])
    }
    if not options.no_trl:
        check_trl(options.trl_python)
        sides[TRL] = Side(options.trl_python, "with_trl", task)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    measured: dict[str, list[Events]] = {name: [] for name in sides}
    for repeat in range(options.repeats):
        for name, side in sides.items():
            console.print(f"{repeat + 1} of {options.repeats}: {name}", highlight=False)
            last = repeat == options.repeats - 1
            if options.profile and last:
                folder = options.profile.resolve() / name.replace(", ", " ").replace(" ", "-")
                side = replace(side, task=replace(side.task, profile=str(folder)))
            measured[name].append(run(side, options.limit, console))
    rows = [row(name, sides[name].task, runs) for name, runs in measured.items() if rounds_of(runs)]
    if rows:
        console.print(table(rows))
    if options.profile:
        console.print(f"profiles are in {options.profile}", highlight=False)
    lacking = [name for name, runs in measured.items() if not rounds_of(runs)]
    if commit is not None and rows:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        clocks = {"wall": "seconds that a round took, of the wall clock"}
        found = record.record("ppo_step", rows, commit=commit, clocks=clocks, device=device, threads=task.threads)
        record.write(options.json, found)
    if lacking:
        raise SystemExit(f"no whole round after the first within --limit {options.limit:g} s: {', '.join(lacking)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder of a causal language model; default: random weights of --shape")
    model.add_argument("--shape", default="embedded", choices=tuple(SHAPES), help="size of a model with random weights")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=64, help="answers per round")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--response-tokens", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4, help="passes over each round's answers")
    parser.add_argument("--minibatch", type=int, help="answers per optimiser step; default: all")
    parser.add_argument("--micro-batch", type=int, help="answers per forward pass; default: a minibatch")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each process")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each trainer")
    parser.add_argument(
        "--value-model", default="both", choices=("both", *TLCR), help="tlcr's; TRL's is always a separate one"
    )
    parser.add_argument("--engine", default="generate", choices=ENGINES, help="what samples, of tlcr")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has trl==1.11.0")
    parser.add_argument("--limit", type=float, help="seconds after which a process is cut off; default: never")
    parser.add_argument("--profile", type=Path, help="folder for a profile of one more round of each side")
    parser.add_argument("--json", type=Path, help="file for the figures; only from a clean checkout")
    return parser.parse_args()


def check_trl(python: str) -> None:
    """Raises SystemExit, before anything is timed, where `python` has no TRL of the version that is compared with."""
    asked = [python, "-c", "from importlib.metadata import version; print(version('trl'))"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SystemExit(f"--trl-python {python} cannot be run: {error}") from error
    found = done.stdout.strip() if done.returncode == 0 else "none"
    if found != TRL_VERSION:
        raise SystemExit(
            f"{python} has TRL {found}, wanted {TRL_VERSION}: {python} -m pip install trl=={TRL_VERSION}, or name "
            "another interpreter, which has it, with --trl-python"
        )


def run(side: Side, limit: float | None, console: Console) -> Events:
    """Runs one process to its end or its limit, and prints what its journal says as it goes.

    Raises:
        SystemExit: the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        written, errors = Path(folder, "journal.jsonl"), Path(folder, "stderr.txt")
        # The interpreter with TRL knows this checkout only by its path.
        path = os.pathsep.join(filter(None, (str(record.ROOT), os.environ.get("PYTHONPATH"))))
        threads = str(side.task.threads)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        command = [side.python, "-m", f"benchmarks.ppo_step.{side.module}", side.task.to_json(), str(written)]
        shown, began = 0, time.time()
        with errors.open("w", encoding="utf-8") as stderr:
            # In the group of this process: whoever kills that reaches the trainer too.
            process = subprocess.Popen(command, env=environment, stdout=stderr, stderr=stderr, text=True)
            try:
                while process.poll() is None and (limit is None or time.time() - began < limit):
                    shown = show(journal.read(written), shown, began, console)
                    time.sleep(POLL)
            finally:
                cut_off = process.poll() is None
                if cut_off:
                    process.kill()
                    process.wait()
        events = journal.read(written)
        show(events, shown, began, console)
        if cut_off:
            after = time.time() - (events[-1]["at"] if events else began)
            console.print(f"  cut off after {limit:g} s, {after:.1f} s after the last line", highlight=False)
        elif process.returncode != 0:
            said = errors.read_text(encoding="utf-8", errors="replace")[-4000:]
            raise SystemExit(f"{side.module} failed with code {process.returncode}:\n{said}")
        return events


def show(events: Events, shown: int, began: float, console: Console) -> int:
    """Prints the events from number `shown` on; returns the number of those that are printed."""
    for event in events[shown:]:
        if event["event"] == "imported":
            text = "imports"
        elif event["event"] == "made":
            text = f"{event['what']}: {event['seconds']:.3g} s"
        elif event["event"] == "phase":
            text = f"round {event['round']}, {event['phase']}: {event['seconds']:.3g} s"
        elif event["event"] == "round":
            peak = event["peak_bytes"] / 2**30
            text = f"round {event['round']}: {event['seconds']['total']:.3g} s, peak {peak:.2f} GiB"
        else:
            continue
        console.print(f"  {event['at'] - began:7.1f} s  {text}", highlight=False)
    return len(events)


def rounds_of(runs: Sequence[Events]) -> list[dict[str, float]]:
    """The counted rounds of all processes of a side."""
    return [measured for events in runs for measured in journal.counted_rounds(events)]


def row(side: str, task: Task, runs: Sequence[Events]) -> dict[str, Any]:
    rounds = rounds_of(runs)
    seconds = {phase: statistics.median(measured[phase] for measured in rounds) for phase in TIMED}
    totals = sorted(measured["total"] for measured in rounds)
    name = Path(task.model).name if task.model else None if task.shape == "embedded" else f"{task.shape}, random"
    return {
        "side": side,
        "task": {**asdict(task), "model": name},
        "seconds": seconds,
        "total_range": [totals[0], totals[-1]],
        "rounds": len(rounds),
        "tokens_per_second": task.response_tokens_per_round / seconds["total"],
        "peak_bytes": max(event["peak_bytes"] for events in runs for event in events if event["event"] == "round"),
        "versions": next((event["versions"] for events in runs for event in events if event["event"] == "end"), {}),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(
        title="one PPO round: seconds of its phases, medians", title_justify="left", box=SIMPLE, pad_edge=False
    )
    for name in ("", *TIMED, "tokens/s", "peak GiB", "speed", "memory"):
        made.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
    rival = next((found for found in rows if found["side"] == TRL), None)
    for found in rows:
        made.add_row(
            found["side"],
            *(f"{found['seconds'][phase]:.3g}" for phase in TIMED),
            f"{found['tokens_per_second']:,.0f}",
            f"{found['peak_bytes'] / 2**30:.2f}",
            "" if rival is None else f"{found['tokens_per_second'] / rival['tokens_per_second']:.2f}x",
            "" if rival is None else f"{found['peak_bytes'] / rival['peak_bytes']:.2f}x",
        )
    return made


if __name__ == "__main__":
    main()
