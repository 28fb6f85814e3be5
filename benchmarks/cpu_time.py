"""What the CPU benchmarks share: the processor time of rivals in alternation, and where it was measured."""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

import tlcr


class Timing(NamedTuple):
    """Processor time of one thread, in milliseconds, over the rounds."""

    median: float
    quartiles: tuple[float, float]
    rounds: list[float]


def alternate(cases: Mapping[str, Callable[[], Callable[[], object]]], rounds: int) -> dict[str, Timing]:
    """Run every case once a round, so that what slows the machine down slows all of them.

    Args:
        cases: each, called without being timed, makes ready and returns what is timed.
        rounds: how often; one more goes before, which is not counted.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, prepare in cases.items():
            timed = prepare()
            begin = time.thread_time()
            timed()
            taken[name].append(1e3 * (time.thread_time() - begin))
    return {name: _timing(values[1:]) for name, values in taken.items()}


def _timing(values: list[float]) -> Timing:
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(statistics.median(values), (lower, upper), values)


def table(title: str, entries: Iterable[Mapping[str, Any]], *, milliseconds: str, ratio: str) -> Table:
    """Each case with its rivals, tlcr first; `milliseconds` and `ratio` are formats of numbers."""
    made = Table(title=title)
    for column in ("case", "implementation"):
        made.add_column(column)
    for column in ("median ms", "quartiles", "times tlcr's", "relative error"):
        made.add_column(column, justify="right")
    for entry in entries:
        first = entry["implementation"] == "tlcr"
        if first:
            made.add_section()
        made.add_row(
            _label(entry) if first else "",
            entry["implementation"],
            format(entry["median"], milliseconds),
            " - ".join(format(quartile, milliseconds) for quartile in entry["quartiles"]),
            format(entry["ratio"], ratio),
            "" if entry["error"] is None else f"{entry['error']:.1e}",
        )
    return made


def _label(entry: Mapping[str, Any]) -> str:
    return "{}, {} x {}".format(entry["case"], *entry["shape"]) if "shape" in entry else entry["case"]


def write_json(args: argparse.Namespace, where: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Everything that was measured, to the file that --json names, if it names one."""
    if args.json is not None:
        options = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({"machine": where, "options": options, "timings": entries}, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """The processor, the versions, the commit and how tlcr was built."""
    built = tlcr.build_info()
    return {
        "processor": _first(line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if "model name" in line),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "tlcr": {fact: built[fact] for fact in ("version", "extension", "compiler", "instruction_set")},
        "commit": _commit(),
    }


def _first(found: Iterable[str]) -> str:
    return next(iter(found), platform.machine())


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def _commit() -> str | None:
    """The commit of the checkout that this file belongs to, "+" where it has changes; None where it belongs to none."""
    git = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        return None
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    return found.stdout.strip() + ("+" if changed else "")
