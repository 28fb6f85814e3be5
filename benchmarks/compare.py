"""What a commit made slower or faster: it and another one, timed in alternation on this machine.

    python benchmarks/compare.py HEAD~1                       the last commit against the one before
    python benchmarks/compare.py v0.1.0 HEAD~3 --rounds 24    any two
    python benchmarks/compare.py HEAD --dirty                 what is not committed yet against the commit
    python benchmarks/compare.py HEAD HEAD                    how much noise there is here

Each commit is installed, with its compiled kernels where there is a compiler, into a folder of its own that is kept for
the next time. A round runs each commit once, in new processes, in turns of which is first: the ops at a few sizes
(compare_cases.py), and PPO rounds of a small model (ppo_step_tlcr.py). Both are this checkout's scripts for both
commits; what a commit lacks is a row that says so. Of every case it reports the median over the rounds of head's time
over base's, its interval by the sign test, which asks nothing of how the times are distributed, and calls what is
beyond it slower or faster with a false discovery rate over all cases.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import record
from ppo_step_task import PHASES, Task
from report_tables import duration
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import stats

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
KEPT = ROOT / "build" / "compare"
CONFIDENCE = 0.95
FALSE_DISCOVERIES = 1 - CONFIDENCE
LEAST_ROUNDS = 6
"""Of fewer the sign test has no interval of CONFIDENCE."""
PPO = "PPO round"
WIDTH = 130  # of the table where the output is no terminal


class Revision(NamedTuple):
    """What is compared: a commit, or the files of the checkout as they are."""

    name: str
    commit: str
    dirty: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.commit[:12]}{' and changes' if self.dirty else ''})"


class Comparison(NamedTuple):
    """One case over all rounds."""

    case: str
    base_seconds: float
    head_seconds: float
    ratio: float
    """Median over the rounds of head's time over base's."""
    interval: tuple[float, float]
    """Of the ratio, with CONFIDENCE."""
    beyond_noise: bool
    """By the sign test, with FALSE_DISCOVERIES over all cases."""

    @property
    def verdict(self) -> str:
        if not self.beyond_noise:
            return "within the noise"
        return "slower" if self.ratio > 1 else "faster"


Rounds = dict[str, list[float]]
"""Seconds of each case, one figure a round."""


def main() -> None:
    options = arguments()
    base, head = revisions(options.base, options.head, dirty=options.dirty)
    console = Console() if Console().is_terminal else Console(width=WIDTH)
    console.print(f"base {base}, head {head}; {record.machine(options.device, options.threads)}", highlight=False)
    with installed(base, options.folder, console) as of_base, installed(head, options.folder, console) as of_head:
        folders = {"base": of_base, "head": of_head}
        for side, folder in folders.items():
            built = "with" if compiled(folder) else "WITHOUT"
            console.print(f"{side} runs {built} compiled kernels", highlight=False)
        taken, lacking = alternate(folders, options, console)
    found = compare(taken["base"], taken["head"])
    console.print(table(found, lacking))
    if options.json:
        content = {"base": base._asdict(), "head": head._asdict(), "seconds": taken, "lacking": lacking}
        record.write(options.json, content | {"comparisons": [one._asdict() for one in found]})
    for one in found:
        if one.beyond_noise:
            console.print(f"{one.case}: {one.verdict}, {one.ratio:.3f} times base's time", highlight=False)
    too_slow = [one.case for one in found if one.beyond_noise and one.ratio > (options.fail_above or float("inf"))]
    if too_slow:
        raise SystemExit(f"more than {options.fail_above:g} times base's time: {'; '.join(too_slow)}")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a revision, as git names it")
    parser.add_argument("head", nargs="?", default="HEAD", help="another one (default: HEAD, which must be clean)")
    parser.add_argument("--dirty", action="store_true", help="as head the checkout's files as they are")
    parser.add_argument("--rounds", type=int, default=12, help=f"at least {LEAST_ROUNDS} (default: 12)")
    parser.add_argument("--only", default="", help=f"the cases whose name begins so: an op, or '{PPO}'")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--fail-above", type=float, help="exit with 1 where head takes more than so many times base's")
    parser.add_argument("--folder", type=Path, default=KEPT, help="for the installed commits (default: build/compare)")
    parser.add_argument("--json", type=Path, help="a file for the figures of all rounds")
    options = parser.parse_args(argv)
    if options.rounds < LEAST_ROUNDS:
        parser.error(
            f"--rounds is {options.rounds}, wanted at least {LEAST_ROUNDS}: fewer cannot tell noise from change"
        )
    if options.dirty and options.head != "HEAD":
        parser.error(f"--dirty takes the checkout's files as head; leave out {options.head!r}")
    return options


# ---- the two commits


def git(*arguments: str, folder: Path | None = None) -> str | None:
    """What git says, or None where it refuses."""
    done = subprocess.run(["git", "-C", folder or ROOT, *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def revisions(base: str, head: str, *, dirty: bool = False) -> tuple[Revision, Revision]:
    """Both, with their commits.

    Raises SystemExit for a revision that git does not know, and for head HEAD where files differ from it, unless
    they are asked for.
    """
    found = []
    for name in (base, head):
        commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        if commit is None:
            raise SystemExit(f"{name!r} is no revision of {ROOT}: name a commit, branch or tag; git log shows them")
        found.append(Revision(name, commit))
    changed = git("status", "--porcelain") if head == "HEAD" else ""
    if changed and not dirty:
        raise SystemExit(
            f"the checkout differs from HEAD; commit or stash these, or ask for them with --dirty:\n{changed}"
        )
    if dirty:
        found[1] = Revision("the checkout", found[1].commit, dirty=True)
    return found[0], found[1]


@contextmanager
def installed(revision: Revision, kept: Path, console: Console) -> Iterator[Path]:
    """A folder in which this revision's tlcr is installed; a commit's is kept, by what else decides how it is built."""
    built_as = os.environ.get("TLCR_BUILD", "auto")
    folder = kept / f"{revision.commit[:12]}-{sys.implementation.cache_tag}-torch{version('torch')}-{built_as}"
    if folder.is_dir() and not revision.dirty:
        yield folder
        return
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept, prefix=".partial-") as aside:
        console.print(f"[dim]building {revision}[/dim]", highlight=False)
        source, target = Path(aside, "source"), Path(aside, "installed")
        if revision.dirty:
            copy_checkout(source)
        else:
            clone = ["git", "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(source)]
            run(clone, f"cloning {revision}")
            run(
                ["git", "-C", str(source), "checkout", "--quiet", "--detach", revision.commit],
                f"checking out {revision}",
            )
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
        ]
        run([*pip, "--no-build-isolation", "--target", str(target), str(source)], f"building {revision}")
        if revision.dirty:
            yield target
            return
        target.rename(folder)
    yield folder


def copy_checkout(target: Path) -> None:
    """The files that git tracks or would: no build product and nothing else that is ignored."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard") or ""
    for name in filter(None, listed.split("\0")):
        source = ROOT / name
        if source.is_symlink() or source.exists():  # else deleted and not committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)


def run(command: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{what} failed with code {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")


def compiled(folder: Path) -> bool:
    return any(folder.glob("tlcr/_C*.so"))


# ---- the rounds


def alternate(
    folders: Mapping[str, Path], options: argparse.Namespace, console: Console
) -> tuple[dict[str, Rounds], dict[str, dict[str, str]]]:
    """Of each side the seconds of every case, and of cases that a side lacks the side and the reason.

    A round more than asked for goes before, which is not counted: it fills the system's caches of files, and shows
    what there is. Ctrl-C ends the rounds, and what was counted is reported where that is enough.
    """
    taken: dict[str, Rounds] = {side: {} for side in folders}
    lacking: dict[str, dict[str, str]] = {}
    begin = time.monotonic()
    for number in range(options.rounds + 1):
        in_turn = list(folders) if number % 2 else list(folders)[::-1]
        try:
            measured = {side: one_round(folders[side], options) for side in in_turn}
        except KeyboardInterrupt:
            if number <= LEAST_ROUNDS:
                raise
            console.print(f"[dim]interrupted: {number - 1} of {options.rounds} rounds[/dim]")
            break
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
    kept = [case for case in taken["base"] if case not in lacking]
    return {side: {case: found[case] for case in kept} for side, found in taken.items()}, lacking


def one_round(installed: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each case's {"seconds"}, or {"reason"} why it did not run."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(installed),
        "OMP_NUM_THREADS": str(options.threads),
        "HF_HUB_OFFLINE": "1",
    }
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        if not options.only.startswith(PPO):
            given = ["--installed", installed, "--device", options.device, "--threads", options.threads]
            command = [sys.executable, HERE / "compare_cases.py", result, *given, "--only", options.only]
            run(list(map(str, command)), f"timing the ops of {installed.name}", environment)
            found |= json.loads(result.read_text(encoding="utf-8"))
        if PPO.startswith(options.only) or options.only.startswith(PPO):
            found |= ppo_round(result, options.threads, environment)
    return found


def ppo_round(result: Path, threads: int, environment: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The median round of a small model, and its phases."""
    task = Task(batch=16, prompt_tokens=8, response_tokens=16, epochs=2, minibatch=16, micro_batch=16, threads=threads)
    command = [sys.executable, str(HERE / "ppo_step_tlcr.py"), task.to_json(), str(result)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {PPO: {"reason": said[-1]}}
    rounds = json.loads(result.read_text(encoding="utf-8"))["rounds"]
    names = {"total": PPO} | {phase: f"{PPO}, {phase}" for phase in PHASES}
    return {name: {"seconds": statistics.median(one[phase] for one in rounds)} for phase, name in names.items()}


# ---- what they say


def compare(base: Mapping[str, Sequence[float]], head: Mapping[str, Sequence[float]]) -> list[Comparison]:
    """The figures of both sides, paired by round.

    The sign test on the logarithms of the ratios, whose interval lies between two of them; beyond the noise is what
    Benjamini and Hochberg's procedure leaves over all cases.
    """
    if not base:
        return []
    logs = {case: np.log(np.divide(head[case], seconds)) for case, seconds in base.items()}
    tests = {case: stats.quantile_test(values, q=0.0, p=0.5) for case, values in logs.items()}
    adjusted = stats.false_discovery_control([test.pvalue for test in tests.values()])
    found = []
    for (case, test), p in zip(tests.items(), adjusted, strict=True):
        interval = test.confidence_interval(CONFIDENCE)
        found.append(
            Comparison(
                case,
                float(np.median(base[case])),
                float(np.median(head[case])),
                float(np.exp(np.median(logs[case]))),
                (float(np.exp(interval.low)), float(np.exp(interval.high))),
                bool(p <= FALSE_DISCOVERIES),
            )
        )
    return found


def table(found: Sequence[Comparison], lacking: Mapping[str, Mapping[str, str]]) -> Table:
    made = Table(
        title="head against base, medians over the rounds", title_justify="left", box=box.SIMPLE, pad_edge=False
    )
    made.add_column("case", overflow="fold")
    for name in ("base", "head", "head / base", f"{CONFIDENCE:.0%} interval"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("", overflow="fold")
    for one in found:
        low, high = one.interval
        seconds = duration(one.base_seconds), duration(one.head_seconds)
        made.add_row(one.case, *seconds, f"{one.ratio:.3f}", f"{low:.3f} to {high:.3f}", one.verdict)
    for case, reasons in lacking.items():
        said = "; ".join(f"{side} did not run it: {reason}" for side, reason in reasons.items())
        made.add_row(case, "", "", "", "", said)
    return made


if __name__ == "__main__":
    main()
