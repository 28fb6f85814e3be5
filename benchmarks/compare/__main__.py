"""What a commit made slower or faster: it and another one, timed in alternation on this machine.

    python -m benchmarks.compare HEAD~1                       the last commit against the one before
    python -m benchmarks.compare v0.1.0 HEAD~3 --rounds 24    any two
    python -m benchmarks.compare HEAD --dirty                 what is not committed yet against the commit
    python -m benchmarks.compare HEAD HEAD                    how much noise there is here

Each commit is installed, with its compiled kernels where there is a compiler, into a folder of its own that is kept for
the next time. A round runs each commit once, in new processes, in turns of which is first: the ops at a few sizes
(`cases`), and PPO rounds of a small model (`benchmarks.ppo_step.with_tlcr`). Both are this checkout's code for both
commits; what a commit lacks is a row that says so. Of every case it reports the median over the rounds of head's time
over base's, its interval by the sign test, which asks nothing of how the times are distributed, and calls what is
beyond it slower or faster with a false discovery rate over all cases.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.compare.commits import compiled, installed, revisions
from benchmarks.compare.ratios import CONFIDENCE, LEAST_ROUNDS, Comparison, compare
from benchmarks.compare.rounds import PPO, alternate
from benchmarks.report.tables import duration

KEPT = record.ROOT / "build" / "compare"
WIDTH = 130  # of the table where the output is no terminal


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
    options.folder = options.folder.resolve()  # the rounds run in folders of their own
    if options.rounds < LEAST_ROUNDS:
        parser.error(
            f"--rounds is {options.rounds}, wanted at least {LEAST_ROUNDS}: fewer cannot tell noise from change"
        )
    if options.dirty and options.head != "HEAD":
        parser.error(f"--dirty takes the checkout's files as head; leave out {options.head!r}")
    return options


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
