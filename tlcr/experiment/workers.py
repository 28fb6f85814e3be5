"""Parallel jobs, each in its own process: a limited number at a time, and none outlives its parent."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tlcr.errors import ConfigError, TlcrError
from tlcr.training.distributed import process_count
from tlcr.training.interrupt import StopSignals
from tlcr.training.launcher import without_launcher
from tlcr.training.progress import Progress

__all__ = ["Job", "run_side_by_side"]

SECONDS_BETWEEN_LOOKS = 0.5
PLACE = "TLCR_PLACE"
"""The variable in which a job finds "k/n": of n jobs that run at a time it has the place k, from 0. A job that takes
the place of one that ended has its number."""


@dataclass(frozen=True)
class Job:
    """A command, and the folder whose log.txt its output is appended to. name: what errors call it."""

    name: str
    command: tuple[str, ...]
    folder: Path


def run_side_by_side(
    jobs: Sequence[Job],
    *,
    parallel: int,
    title: str,
    steps: int = 1,
    steps_done: Callable[[Job], int] = lambda job: 0,
) -> None:
    """Runs every job, at most `parallel` at a time, in their order. Each gets its share of this process's threads,
    and is told its place.

    title: of the progress bar. steps: number of steps of each job; steps_done: steps that a running job has finished.

    A job that saves its state when it is told to stop calls ``leave_the_terminal_to_the_parent`` first.

    If a job ends with a code other than 0, raises TlcrError with the last line of its log. Then, as on any other
    exception, the other jobs get SIGTERM and are waited for. SIGTERM and Ctrl-C here raise KeyboardInterrupt. Raises
    ConfigError under a launcher of several processes, each of which would start all jobs.
    """
    if not jobs:
        return
    if process_count() > 1:
        raise ConfigError(
            f"parallel is {parallel} under a launcher of {process_count()} processes; one or the other: set parallel "
            "to 1 to share each policy among the processes"
        )
    waiting, shown = list(jobs), 0
    running: dict[Job, subprocess.Popen[bytes]] = {}
    places: dict[Job, int] = {}
    at_a_time = min(parallel, len(jobs))
    with StopSignals() as signals, Progress(title, steps * len(jobs)) as progress, _ended(running):
        while waiting or running:
            if signals.received():
                raise KeyboardInterrupt
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                places[job] = min(set(range(at_a_time)) - {places[other] for other in running})
                running[job] = _start(job, parallel, f"{places[job]}/{at_a_time}")
            for job, worker in list(running.items()):
                code = worker.poll()
                if code is None:
                    continue
                del running[job]
                if code != 0:
                    raise _failure(job, code)
            ended = len(jobs) - len(waiting) - len(running)
            now_done = steps * ended + sum(map(steps_done, running))
            if now_done > shown:
                shown = now_done
                progress.on_step(shown, {})
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _start(job: Job, parallel: int, place: str) -> subprocess.Popen[bytes]:
    # If each job used all threads, they would wait for one another. torch's number, and not that of the cores: it
    # follows OMP_NUM_THREADS and the cores that this process may use.
    threads = max(1, torch.get_num_threads() // parallel)
    environment = {**without_launcher(), "OMP_NUM_THREADS": str(threads), "TLCR_PROGRESS": "0", PLACE: place}
    job.folder.mkdir(parents=True, exist_ok=True)
    with _log(job).open("ab") as file:
        return subprocess.Popen(job.command, env=environment, stdout=file, stderr=file)


def _log(job: Job) -> Path:
    return job.folder / "log.txt"


def _failure(job: Job, code: int) -> TlcrError:
    lines = _log(job).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = lines[-1] if lines else "no output"
    if code < 0:  # what it said last is not the reason
        name = signal.Signals(-code).name
        killer = ", which is how a system ends processes where its memory runs out" if name == "SIGKILL" else ""
        said = f"{name}{killer}; its last line was: {said}"
    return TlcrError(
        f"{job.name} ended with code {code}: {said} ({_log(job)}); the others are stopped with their state saved: mend "
        "it and pass --resume"
    )


@contextmanager
def _ended(running: Mapping[Job, subprocess.Popen[bytes]]) -> Iterator[None]:
    """Ends all running workers on exit; they save their state first."""
    try:
        yield
    finally:
        for worker in running.values():
            worker.terminate()
        try:
            for worker in running.values():
                worker.wait()
        except BaseException:  # a second Ctrl-C: nobody waits any longer
            for worker in running.values():
                worker.kill()
            raise
