"""Processes side by side: how many at a time, with how many threads, and what becomes of the others when one fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from tlcr.errors import ConfigError, TlcrError
from tlcr.experiment import workers
from tlcr.experiment.workers import Job, run_side_by_side


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SECONDS_BETWEEN_LOOKS", 0.02)


@pytest.fixture
def job(tmp_path: Path) -> Callable[[str, str], Job]:
    """A job that runs lines of Python in the test's folder."""

    def make(name: str, code: str) -> Job:
        code = f"import os, json, pathlib, signal, time\nhere = pathlib.Path({str(tmp_path)!r})\n{code}"
        return Job(name, (sys.executable, "-S", "-c", code), tmp_path / name)

    return make


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("of_torch", "parallel", "threads"), [(8, 2, "4"), (7, 2, "3"), (8, 8, "1"), (1, 2, "1")])
def test_every_job_gets_its_share_of_the_threads(
    job: Callable[[str, str], Job],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of_torch: int,
    parallel: int,
    threads: str,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: of_torch)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setenv("KEPT", "as it was")
    code = "print(json.dumps([os.environ[name] for name in ('OMP_NUM_THREADS', 'TLCR_PROGRESS', 'KEPT')]))"
    run_side_by_side([job("one", code), job("two", code)], parallel=parallel, title="test")
    for name in ("one", "two"):
        assert json.loads(read(tmp_path / name / "log.txt")) == [threads, "0", "as it was"]


def test_never_more_than_parallel_at_a_time_and_in_order(job: Callable[[str, str], Job], tmp_path: Path) -> None:
    """Each of five writes how many are at work when it begins; the first two wait for one another."""
    code = (
        "name = {name!r}\n"
        "(here / (name + '.began')).touch()\n"
        "began, ended = (len(list(here.glob(files))) for files in ('*.began', '*.ended'))\n"
        "(here / (name + '.count')).write_text(str(began - ended))\n"
        "while name in 'ab' and not ((here / 'a.began').exists() and (here / 'b.began').exists()): time.sleep(0.01)\n"
        "(here / (name + '.ended')).touch()\n"
    )
    done: list[Job] = []
    jobs = [job(name, code.format(name=name)) for name in "abcde"]
    run_side_by_side(jobs, parallel=2, title="test", steps=3, steps_done=lambda j: done.append(j) or 0)
    began = sorted(tmp_path.glob("*.began"), key=lambda path: path.stat().st_mtime_ns)
    assert {path.stem for path in began[:2]} == {"a", "b"} and len(began) == 5
    counts = [int(read(path)) for path in tmp_path.glob("*.count")]
    assert max(counts) <= 2 and len(counts) == 5
    assert set(done) <= set(jobs)


def test_one_at_a_time_is_one_after_another(job: Callable[[str, str], Job], tmp_path: Path) -> None:
    code = "f = (here / 'order').open('a'); f.write({name!r}); f.close()"
    run_side_by_side([job(name, code.format(name=name)) for name in "cab"], parallel=1, title="test")
    assert read(tmp_path / "order") == "cab"


def test_a_job_takes_the_place_of_one_that_ended(job: Callable[[str, str], Job], tmp_path: Path) -> None:
    """Two of three run at a time; the second waits until the third is there."""
    write = "(here / ({name!r} + '.place')).write_text(os.environ['TLCR_PLACE'])"
    waits = "\nwhile not (here / 'c.place').exists(): time.sleep(0.01)"
    jobs = [job(name, write.format(name=name) + (waits if name == "b" else "")) for name in "abc"]
    run_side_by_side(jobs, parallel=2, title="test")
    assert [read(tmp_path / f"{name}.place") for name in "abc"] == ["0/2", "1/2", "0/2"]
    run_side_by_side([job("alone", write.format(name="alone"))], parallel=2, title="test")
    assert read(tmp_path / "alone.place") == "0/1"


def test_progress_counts_ended_jobs_whole_and_running_ones_by_their_steps(
    job: Callable[[str, str], Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second job ends after it was seen with two of its five steps behind it."""
    shown: list[int] = []

    class Bar(workers.Progress):
        def on_step(self, step: int, metrics: object) -> None:
            shown.append(step)

    monkeypatch.setattr(workers, "Progress", Bar)

    def steps_done(running: Job) -> int:
        if running.name == "second":
            (tmp_path / "seen").touch()
            return 2
        return 0

    jobs = [job("first", ""), job("second", "while not (here / 'seen').exists(): time.sleep(0.01)")]
    run_side_by_side(jobs, parallel=1, title="test", steps=5, steps_done=steps_done)
    assert shown == [5, 7, 10]


def test_a_job_that_fails_ends_the_others_and_is_named_with_its_last_line(
    job: Callable[[str, str], Job], tmp_path: Path
) -> None:
    """The long one is told to end, saves its state and is waited for; the third never begins."""
    long = (
        "def end(*_):\n    time.sleep(0.2); (here / 'saved').touch(); os._exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n(here / 'ready').touch()\ntime.sleep(60)"
    )
    fails = (
        "while not (here / 'ready').exists(): time.sleep(0.01)\n"
        "print('about to')\nraise SystemExit('the reason')  # to stderr, with code 1"
    )
    jobs = [job("long", long), job("fails", fails), job("third", "(here / 'third').touch()")]
    with pytest.raises(TlcrError, match=r"^fails ended with code 1: the reason \(.*fails/log\.txt\); .*--resume"):
        run_side_by_side(jobs, parallel=2, title="test")
    assert (tmp_path / "saved").exists() and not (tmp_path / "third").exists()
    assert read(tmp_path / "fails" / "log.txt").splitlines()[-1] == "the reason"


def test_an_exception_here_leaves_no_process_behind(job: Callable[[str, str], Job], tmp_path: Path) -> None:
    def interrupted(_: Job) -> int:
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    long = "(here / 'p').write_text(str(os.getpid())); (here / 'p').rename(here / 'pid'); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side([job("long", long)], parallel=2, title="test", steps_done=interrupted)
    with pytest.raises(ProcessLookupError):
        os.kill(int(read(tmp_path / "pid")), 0)


def test_a_signal_that_ends_this_process_ends_its_jobs_first(job: Callable[[str, str], Job], tmp_path: Path) -> None:
    """SIGTERM, as of `kill` and of schedulers, did not run any clean-up: the jobs went on alone."""

    def told_to_end(_: Job) -> int:
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM had its usual effect"))
    long = "(here / 'p').write_text(str(os.getpid())); (here / 'p').rename(here / 'pid'); time.sleep(60)"
    try:
        with pytest.raises(KeyboardInterrupt):
            run_side_by_side([job("long", long)], parallel=2, title="test", steps_done=told_to_end)
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(read(tmp_path / "pid")), 0)


PARENT = """
import signal, sys
from pathlib import Path
from tlcr.experiment import workers
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup, or in the background
signal.signal(signal.SIGINT, signal.default_int_handler)
workers.SECONDS_BETWEEN_LOOKS = 0.02
workers.run_side_by_side([workers.Job("saving", (sys.executable, "-c", sys.argv[1]), Path(sys.argv[2]))],
                         parallel=2, title="test")
"""
TRAINS = """
import os, pathlib, time
from tlcr.training.interrupt import StopSignals, leave_the_terminal_to_the_parent
leave_the_terminal_to_the_parent()
here = pathlib.Path({folder!r})
with StopSignals() as signals:
    (here / "p").write_text(str(os.getpid()))
    (here / "p").rename(here / "pid")
    while not signals.received():
        time.sleep(0.01)
    time.sleep({step})  # the end of its step, and the writing of its state
    (here / "saved").touch()
"""


@contextmanager
def parent_of_a_worker(folder: Path, *, step: float) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose worker is in a step of so many seconds, both in a group of their own."""
    code = TRAINS.format(folder=str(folder), step=step)
    arguments = [sys.executable, "-c", PARENT, code, str(folder / "job")]
    parent = subprocess.Popen(arguments, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        while not (folder / "pid").exists():
            assert parent.poll() is None
            time.sleep(0.01)
        yield parent
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_a_terminal_sends_to_all_leaves_workers_time_to_save(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C, or its end. Workers got it, and their parent's SIGTERM after it, which ended them in mid-step."""
    with parent_of_a_worker(tmp_path, step=0.5) as parent:
        os.killpg(parent.pid, number)
        assert parent.wait(timeout=60) != 0
        assert (tmp_path / "saved").exists()


def test_a_second_ctrl_c_ends_the_workers_too(tmp_path: Path) -> None:
    with parent_of_a_worker(tmp_path, step=600) as parent:
        os.killpg(parent.pid, signal.SIGINT)
        for _ in range(300):  # from the second on it has its usual effect
            if parent.poll() is not None:
                break
            time.sleep(0.2)
            os.killpg(parent.pid, signal.SIGINT)
        assert parent.poll() is not None
        worker = int(read(tmp_path / "pid"))
        for _ in range(500):
            if not Path(f"/proc/{worker}").exists() or " Z " in Path(f"/proc/{worker}/stat").read_text():
                break
            time.sleep(0.02)
        else:
            pytest.fail("the worker goes on alone")
    assert not (tmp_path / "saved").exists()


def test_a_job_that_says_nothing_and_a_log_that_goes_on(job: Callable[[str, str], Job], tmp_path: Path) -> None:
    with pytest.raises(TlcrError, match="silent ended with code 3: no output"):
        run_side_by_side([job("silent", "raise SystemExit(3)")], parallel=2, title="test")
    for _ in range(2):
        run_side_by_side([job("again", "print('once')")], parallel=2, title="test")
    assert read(tmp_path / "again" / "log.txt") == "once\nonce\n"


def test_no_job_is_no_work_and_a_launcher_is_refused(
    job: Callable[[str, str], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "process_count", lambda: 4)
    run_side_by_side([], parallel=2, title="test")
    with pytest.raises(ConfigError, match=r"parallel is 2 under a launcher of 4 processes; .*set parallel to 1"):
        run_side_by_side([job("one", "")], parallel=2, title="test")


def test_a_worker_that_the_system_killed_is_said_to_be_killed(job: Callable[[str, str], Job]) -> None:
    """What it said last is not why it ended."""
    killed = job("killed", "print('all is well', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(
        TlcrError,
        match=r"SIGKILL, which is how a system ends processes where its memory runs out; its "
        r"last line was: all is well",
    ):
        run_side_by_side([killed], parallel=1, title="test")
