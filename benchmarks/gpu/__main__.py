"""Builds tlcr on a machine with a GPU, tests and sanitizes it there, and measures it: one table, within 10 minutes.

    make gpu                                    sets up .venv, then runs this
    python -m benchmarks.gpu                    with what is installed, without a network
    python -m benchmarks.gpu --only memcheck    one step, or several; --list names them
    python -m benchmarks.gpu --device cpu       the path of every step at tiny sizes, without a GPU

The steps come in the order of importance. Each is a process with a time limit of its own. One that fails or is cut off
does not stop those after it, and the exit status is 1. What a step prints is in OUT/logs, the table in
OUT/summary.json, written anew after each step, and the figures in OUT/results, as files fit for benchmarks/results.
Figures are kept only of a clean checkout at a commit. Run from the root of the checkout, whose tlcr is the one that is
tested.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import record
from benchmarks.gpu.process import Status, run
from benchmarks.gpu.steps import Step, steps

WIDTH = 120  # of the table where the output is no terminal
LEAST = 5.0
"""A step is not begun where fewer seconds are left."""
COLOURS = {Status.PASSED: "green", Status.NOT_HERE: "yellow"}


@dataclass(frozen=True)
class Row:
    """How a step ended."""

    step: Step
    status: Status
    seconds: float
    said: str

    @property
    def good(self) -> bool:
        return self.status in COLOURS


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --device cpu takes the path of every step without one")
    begun, out = time.monotonic(), options.out.resolve()
    commit, why_not = _commit()
    chosen = steps(options.device, out / "results" if commit else None)
    unknown = set(options.only) - {step.name for step in chosen}
    if options.list or unknown:
        names = ", ".join(repr(step.name) for step in chosen)
        raise SystemExit(f"unknown steps {sorted(unknown)}; the steps are {names}" if unknown else names)
    say(console, f"{record.machine(options.device)['name']}; {_words(record.versions())}; {commit or why_not}")
    rows: list[Row] = []
    for step in chosen:
        if options.only and step.name not in options.only:
            continue
        left = 60 * options.minutes - (time.monotonic() - begun)
        rows.append(_take(step, left, out, console))
        write_summary(out / "summary.json", rows, commit or why_not, options.device)
    console.print(table(rows))
    say(console, f"{(time.monotonic() - begun) / 60:.1f} minutes; logs, summary and results are in {options.out}")
    return 0 if all(row.good for row in rows) else 1


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, no sanitizer")
    parser.add_argument("--minutes", type=float, default=10.0, help="in which the run ends (default: 10)")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="these steps")
    parser.add_argument("--list", action="store_true", help="the names of the steps, and nothing else")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder (default: build/gpu)")
    return parser.parse_args(argv)


def _commit() -> tuple[str | None, str]:
    """The commit of a clean checkout, or why there is none."""
    try:
        return record.clean_commit(), ""
    except SystemExit as refused:
        return None, f"no figures are kept: {refused}"


def _take(step: Step, left: float, out: Path, console: Console) -> Row:
    if step.missing is not None:
        row = Row(step, Status.NOT_HERE, 0.0, step.missing)
    elif left < LEAST:
        row = Row(step, Status.NOT_REACHED, 0.0, "no time was left; --minutes gives more")
    else:
        environment = {"PYTHONPATH": str(record.ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        log = out / "logs" / f"{step.name.replace(' ', '-').replace(',', '')}.log"
        ended = run(
            step.command,
            limit=min(step.limit, left),
            log=log,
            cwd=record.ROOT,
            environment={**environment, **step.environment},
        )
        if step.shown:
            say(console, ended.output.rstrip())
        row = Row(step, ended.status, ended.seconds, _said(step, ended.output))
    say(console, f"{row.status.value:>11}  {row.seconds:5.0f} s  {step.name}: {row.said}")
    return row


def _said(step: Step, output: str) -> str:
    """What the step says of itself, else its last line."""
    for pattern in (step.says, r"^\s*(\S.*?)\s*$"):
        found = re.findall(pattern, output, re.MULTILINE)
        if found:
            return str(found[-1])
    return "it printed nothing"


def write_summary(path: Path, rows: Sequence[Row], commit: str, device: str) -> None:
    told = [
        {
            "step": row.step.name,
            "status": row.status.value,
            "seconds": round(row.seconds, 1),
            "limit": row.step.limit,
            "said": row.said,
            "command": _plain(row.step.command),
            "environment": dict(row.step.environment),
        }
        for row in rows
    ]
    content = record.record("gpu", told, commit=commit, device=device, clocks={"wall": "seconds that a step took"})
    record.write(path, content)


def _plain(command: Sequence[str]) -> str:
    """A command as one types it at the root of a checkout: of paths of this machine only the last part."""
    names = ("python" if part == sys.executable else part for part in command)
    return shlex.join(Path(part).name if Path(part).is_absolute() else part for part in names)


def table(rows: Sequence[Row]) -> Table:
    made = Table("step", "", "seconds", "what it says", box=SIMPLE)
    made.columns[2].justify = "right"
    for row in rows:
        colour = COLOURS.get(row.status, "red")
        said = escape(row.said)
        made.add_row(row.step.name, f"[{colour}]{row.status.value}[/{colour}]", f"{row.seconds:.0f}", said)
    return made


def say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _words(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


if __name__ == "__main__":
    sys.exit(main())
