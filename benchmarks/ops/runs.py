"""Runs the cases: checks each implementation, times them in alternation, and makes rows for a file and a table."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.clocks import Clocks, Trial, Work, bandwidth_share
from benchmarks.ops.cases import (
    FORWARD,
    PASSES,
    Case,
    Function,
    Problem,
    Wrong,
    case_row,
    tlcr_function,
    tlcr_implementations,
)
from benchmarks.ops.rivals import rivals

Row = dict[str, Any]

RESERVE = 40
"""No work is begun in the last so many seconds: work that began earlier may compile and be slow."""
COPIES = 6
"""Memory must be free for so many copies of a case's largest tensor in float32."""


@dataclass(frozen=True)
class Checked:
    """An implementation whose results and gradients were found right."""

    name: str
    function: Function
    passes: tuple[str, ...]
    error: float
    first_call: float
    """Seconds of its first call, forward and backward, with what was compiled or loaded then."""
    note: str


class Run:
    """Measures cases until the deadline.

    Args:
        clocks: of the device.
        device: "cpu" or "cuda".
        minutes: in which the run ends.
        interpreted: the GPU implementations run on the CPU.
    """

    def __init__(self, clocks: Clocks, device: str, minutes: float, *, interpreted: bool = False) -> None:
        self.clocks, self.device, self.interpreted = clocks, device, interpreted
        self.minutes, self.deadline = minutes, time.monotonic() + max(60 * minutes - RESERVE, 30 * minutes)
        self.rows: list[Row] = []
        self.copies = clocks.copy_bandwidth(device, (2**16,) if interpreted else None)

    def measure(self, case: Case) -> list[Row]:
        """The rows of one case, which are also kept.

        Raises:
            SystemExit: tlcr's own result or gradient is wrong.
        """
        begun = len(self.rows)
        reason = self._not_begun() or self._too_large(case)
        if reason is not None:
            for which in case.passes:
                self._not_run(case, which, "all", reason)
            return self.rows[begun:]
        problem = Problem(case, self.device)
        checked = list(self._checked(problem))
        for which in case.passes:
            self._time(problem, which, [one for one in checked if which in one.passes])
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return self.rows[begun:]

    def _not_begun(self) -> str | None:
        if time.monotonic() < self.deadline:
            return None
        return f"not reached within {self.minutes:g} minutes; --minutes gives more"

    def _too_large(self, case: Case) -> str | None:
        wanted, free = 4 * COPIES * case.elements, _free_memory(self.device)
        if free is None or wanted <= free:
            return None
        return f"needs about {wanted / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"

    def _checked(self, problem: Problem) -> Iterable[Checked]:
        """Those that run here and are right; the others become rows."""
        case = problem.case
        for impl, reason in tlcr_implementations(case.op, self.device, interpreted=self.interpreted):
            name = f"tlcr {impl}"
            if reason is not None:
                self._none_run(case, case.passes, name, reason)
                continue
            function, begin = tlcr_function(case, impl), time.perf_counter()
            try:
                error = problem.error(function)
            except Wrong as wrong:
                raise SystemExit(f"stopped: {name} is wrong on {case}, and so nothing is timed: {wrong}") from wrong
            yield Checked(name, function, case.passes, error, time.perf_counter() - begin, "")
        for rival in rivals(case, self.device):
            passes = tuple(which for which in case.passes if which in rival.passes)
            reason = self._not_begun()
            if case.elements > rival.most:
                reason = f"left out above {rival.most:,} elements: it would take the run's time or memory"
            if reason is not None:
                self._none_run(case, passes, rival.name, reason, rival.note)
                continue
            begin = time.perf_counter()
            try:
                function = rival.make()
                error = problem.error(function, gradients=passes != FORWARD)
            except Wrong as wrong:
                self._none_run(case, passes, rival.name, str(wrong), rival.note)
            except Exception as failure:  # noqa: BLE001  (other people's code may raise anything; the row says what)
                self._none_run(case, passes, rival.name, one_line(failure), rival.note)
            else:
                yield Checked(rival.name, function, passes, error, time.perf_counter() - begin, rival.note)

    def _time(self, problem: Problem, which: str, implementations: list[Checked]) -> None:
        case = problem.case
        if self._not_begun() is not None:
            for one in implementations:
                self._not_run(case, which, one.name, str(self._not_begun()), one.note)
            return
        works: dict[str, Work] = {}
        tried: dict[str, Trial] = {}
        for one in implementations:
            work = problem.work(one.function, which)
            try:
                tried[one.name] = self.clocks.trial(work)
            except Exception as failure:  # noqa: BLE001  (above: and a pass alone may fail, or not fit memory)
                self._not_run(case, which, one.name, one_line(failure), one.note)
            else:
                works[one.name] = work
        timings = self.clocks.alternate(works, tried)
        for one in implementations:
            if one.name not in timings:
                continue
            row = {**case_row(case, which), "implementation": one.name, "status": "measured", "reason": ""}
            seconds = timings[one.name]
            row["seconds"] = {clock: timing._asdict() for clock, timing in seconds.items()}
            row["peak_bytes"] = tried[one.name].peak_bytes
            row["bandwidth_share"] = bandwidth_share(row["bytes_moved"], seconds[self.clocks.main].median, self.copies)
            self.rows.append({**row, "error": one.error, "first_call_seconds": one.first_call, "note": one.note})

    def _none_run(self, case: Case, passes: Iterable[str], name: str, reason: str, note: str = "") -> None:
        for which in passes:
            self._not_run(case, which, name, reason, note)

    def _not_run(self, case: Case, which: str, name: str, reason: str, note: str = "") -> None:
        nothing: Row = {
            "seconds": {},
            "peak_bytes": None,
            "bandwidth_share": None,
            "error": None,
            "first_call_seconds": None,
        }
        said = {"implementation": name, "status": "not run", "reason": reason}
        self.rows.append({**case_row(case, which), **said, **nothing, "note": note})


def one_line(error: BaseException) -> str:
    """An exception as a row gives it, without the paths of this machine."""
    said = " ".join(str(error).split())
    for path in (*sys.path, str(Path.home())):
        if len(path) > 1:
            said = said.replace(path, "...")
    return f"{type(error).__name__}: {said[:200]}" if said else type(error).__name__


def _free_memory(device: str) -> int | None:
    """Bytes that can be had; None where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    facts = Path("/proc/meminfo")
    if not facts.exists():
        return None
    (line,) = (line for line in facts.read_text(encoding="utf-8").splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def table(rows: list[Row], main: str) -> str:
    """The rows of one case as plain text: by pass what was measured, tlcr first and the rest with its ratio to that."""
    lines = []
    first: Row | None = None
    for row in sorted(rows, key=lambda row: (PASSES.index(row["pass"]), row["status"] != "measured")):
        if first is None or first["pass"] != row["pass"]:
            size = " x ".join(f"{axis}={size}" for axis, size in row["shape"].items())
            name = f"{row['op']}, {row['case']}" if row["case"] else row["op"]
            lines.append(f"\n{name}, {row['pass']}, {size}, {row['dtype']}: {row['bytes_moved'] / 1e6:,.3g} MB")
            first = row
        if row["status"] != "measured":
            lines.append(f"    {row['implementation']:<34} not run: {row['reason']}")
            continue
        ratio = row["seconds"][main]["median"] / first["seconds"][main]["median"]
        times = "  ".join(
            f"{clock} {1e3 * timing['median']:>9.4g} ({1e3 * timing['lower']:.4g}-{1e3 * timing['upper']:.4g})"
            for clock, timing in row["seconds"].items()
        )
        lines.append(
            f"    {row['implementation']:<34} {times} ms  {ratio:>7.3g}x  copy {row['bandwidth_share']:>6.1%}  "
            f"peak {row['peak_bytes'] / 2**20:,.4g} MiB  error {row['error']:.0e}"
            f"{'  (' + row['note'] + ')' if row['note'] else ''}"
        )
    return "\n".join(lines) + "\n"
