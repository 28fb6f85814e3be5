"""Response tokens per second and peak memory of whole PPO rounds, tlcr beside TRL 1.11.0 on the same work.

    python -m benchmarks.ppo_step                                        the embedded size, random weights
    python -m benchmarks.ppo_step --model FOLDER --dtype bfloat16 ...    any causal language model

Each trainer runs in a process of its own, in turn, as often as --repeats says: what disturbs the machine for a while
disturbs both. `--trl-python` names the interpreter that has TRL, if it is not this one; it needs no tlcr. What is equal
and what is counted stands in task.py. The figures are medians over the rounds of all repeats, without the first of
each; speed and memory are relative to TRL's. On a machine with a GPU both train on it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.ppo_step.task import PHASES, TRL, TRL_VERSION, Task

WIDTH = 110  # of the table where the output is no terminal
TIMED = (*PHASES, "total")


def main() -> None:
    options = arguments()
    task = Task(
        model=options.model,
        dtype=options.dtype,
        batch=options.batch,
        prompt_tokens=options.prompt_tokens,
        response_tokens=options.response_tokens,
        epochs=options.epochs,
        minibatch=options.minibatch or options.batch,
        micro_batch=options.micro_batch or options.minibatch or options.batch,
        threads=options.threads,
        rounds=options.rounds + 1,
    )
    commit = record.clean_commit() if options.json else None
    check_trl(options.trl_python)
    sides = {"tlcr": (sys.executable, "with_tlcr", task)}
    if not options.no_shared:
        sides["tlcr, shared value head"] = (sys.executable, "with_tlcr", replace(task, value_model="shared"))
    sides[TRL] = (options.trl_python, "with_trl", task)
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for repeat in range(options.repeats):
        for name, (python, module, work) in sides.items():
            console.print(f"[dim]{repeat + 1} of {options.repeats}: {name}[/dim]")
            measured[name].append(run(python, module, work))
    rows = [row(name, sides[name][2], runs) for name, runs in measured.items()]
    console.print(table(rows))
    if commit is not None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        clocks = {"wall": "seconds that a round took, of the wall clock"}
        found = record.record("ppo_step", rows, commit=commit, clocks=clocks, device=device, threads=task.threads)
        record.write(options.json, found)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model; default: random weights, embedded size")
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
    parser.add_argument("--no-shared", action="store_true", help="leave out the value head on the policy's backbone")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has trl==1.11.0")
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


def run(python: str, module: str, task: Task) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        # The interpreter with TRL knows this checkout only by its path.
        path = os.pathsep.join(filter(None, (str(record.ROOT), os.environ.get("PYTHONPATH"))))
        threads = str(task.threads)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        command = [python, "-m", f"benchmarks.ppo_step.{module}", task.to_json(), str(result)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{module} failed with code {done.returncode}:\n{done.stderr[-4000:]}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def row(side: str, task: Task, runs: list[dict[str, Any]]) -> dict[str, Any]:
    rounds = [measured for one in runs for measured in one["rounds"]]
    seconds = {phase: statistics.median(measured[phase] for measured in rounds) for phase in TIMED}
    totals = sorted(measured["total"] for measured in rounds)
    return {
        "side": side,
        "task": {**asdict(task), "model": task.model and Path(task.model).name},
        "seconds": seconds,
        "total_range": [totals[0], totals[-1]],
        "rounds": len(rounds),
        "tokens_per_second": task.response_tokens_per_round / seconds["total"],
        "peak_bytes": max(one["peak_bytes"] for one in runs),
        "versions": runs[0]["versions"],
    }


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(
        title="one PPO round: seconds of its phases, medians", title_justify="left", box=SIMPLE, pad_edge=False
    )
    for name in ("", *TIMED, "tokens/s", "peak GiB", "speed", "memory"):
        made.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
    rival = next(found for found in rows if found["side"] == TRL)
    for found in rows:
        made.add_row(
            found["side"],
            *(f"{found['seconds'][phase]:.3g}" for phase in TIMED),
            f"{found['tokens_per_second']:,.0f}",
            f"{found['peak_bytes'] / 2**30:.2f}",
            f"{found['tokens_per_second'] / rival['tokens_per_second']:.2f}x",
            f"{found['peak_bytes'] / rival['peak_bytes']:.2f}x",
        )
    return made


if __name__ == "__main__":
    main()
