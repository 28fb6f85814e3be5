"""Faults of the processes that train several policies side by side."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.faults.case import Case
from tests.faults.children import Child
from tlcr.experiment import workers


def stopped(case: Case) -> None:
    """One worker gets SIGKILL, as from a system whose memory runs out, or SIGTERM; or their parent gets SIGTERM."""
    number = case.random.choice((signal.SIGKILL, signal.SIGTERM))
    moment = case.random.uniform(0, 0.8) * case.bench.seconds[case.outcome.stage]
    child, began = Child(case.command, case.folder), time.monotonic()
    while not _workers(child.pid) and time.monotonic() - began < 60:
        time.sleep(0.01)
    time.sleep(moment)
    there = _workers(child.pid)
    to_a_worker = bool(there) and case.random.random() < 0.8
    if to_a_worker:
        os.kill(case.random.choice(there), number)
    else:
        child.send(signal.SIGTERM)
    case.take(child.ended(), killed=not to_a_worker)  # the parent ends at once where it comes before its workers
    case.go_on()


def out_of_memory(case: Case) -> None:
    """Each worker may take so many bytes: it fails while it imports, while it trains, or not at all."""
    limit = int(case.random.uniform(0.3, 3.5) * 2**30)

    def start(*arguments: Any, **named: Any) -> Any:
        def bound() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

        return subprocess.Popen(*arguments, preexec_fn=bound, **named)

    def plant() -> None:
        workers.subprocess = SimpleNamespace(Popen=start)  # type: ignore[attr-defined]

    case.take(case.under(plant))
    case.go_on()


def _workers(pid: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()))
    except OSError:
        return []
