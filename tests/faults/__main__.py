"""Attacks a tiny run with faults, and prints what came of them: ``python -m tests.faults --runs 200 --seed 0``.

Each case is a kind of fault, a stage and a seed; ``--only`` names kinds by a part of their name. Exit code 1 where
something was lost, or ended in a traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

KEY = "sk-planted-key-of-the-faults"
os.environ |= {"ACCELERATE_USE_CPU": "true", "TLCR_PROGRESS": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OPENAI_API_KEY": KEY}

from tests.faults.case import Outcome  # noqa: E402
from tests.faults.cases import KINDS, attack  # noqa: E402
from tests.faults.disks import can_mount  # noqa: E402
from tests.faults.planted import PLANTED  # noqa: E402
from tests.faults.runs import ALL, STAGES, Bench, bench, leaks  # noqa: E402

ECHO = "server that repeats its key"


def schedule(seed: int, only: Sequence[str], disks: bool) -> Iterator[tuple[str, str, int]]:
    """Kinds, stages and seeds without end: each kind as often as its weight says, its stages in turn."""
    kinds = [
        name
        for name, kind in KINDS.items()
        if (disks or not kind.disk) and (not only or any(part in name for part in only))
    ]
    counts = dict.fromkeys(kinds, 0)
    while True:
        for name in kinds:
            for _ in range(KINDS[name].weight):
                stages = KINDS[name].stages
                yield name, stages[counts[name] % len(stages)], seed + counts[name] // len(stages)
                counts[name] += 1


def table(outcomes: Sequence[Outcome]) -> str:
    """As docs/reliability.md has it."""
    head = ("fault", "cases", "runs under it", "met", "one sentence", "equal", "lost")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in [ECHO, *KINDS, "all"]:
        of = [outcome for outcome in outcomes if name in (outcome.kind, "all")]
        if of:
            met, refused, equal, lost = (
                sum(map(bool, one)) for one in zip(*((o.met, o.refused, o.equal, o.lost) for o in of), strict=True)
            )
            lines.append(f"| {name} | {len(of)} | {sum(o.runs for o in of)} | {met} | {refused} | {equal} | {lost} |")
    return "\n".join(lines)


def _secrets(made: Bench) -> Outcome:
    """Whether the uninterrupted run kept or showed the key, which its server repeats in refusals."""
    outcome = Outcome(ECHO, "all", 0, met="[hidden]" in _aside(made), equal=True)
    found = leaks(made.folder, KEY) + ["the output"] * (KEY in made.said)
    outcome.problems = tuple(f"the key stands in {name}" for name in found)
    return outcome


def _aside(made: Bench) -> str:
    return (made.finished / "run" / "revisions" / "set_aside.jsonl").read_text(encoding="utf-8")


def _tell(outcome: Outcome, output: Path | None) -> None:
    if outcome.lost:
        named = f"{outcome.kind}, {outcome.stage}, seed {outcome.seed}"
        sys.stderr.write(f"LOST {named}: {' // '.join(outcome.problems)}\n")
        sys.stderr.flush()
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200, help="cases")
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each kind and stage")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no case after so many")
    parser.add_argument("--only", action="append", default=[], help="kinds with this in their name")
    parser.add_argument("--stage", help="this stage alone")
    parser.add_argument("--output", type=Path, help="every case as a line of JSON, added to this file")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--plant", choices=list(PLANTED), help="leave this out of tlcr: the harness has to find it")
    asked = parser.parse_args(arguments)
    if asked.plant == "key":
        PLANTED[asked.plant]()
    disks = can_mount()
    if not disks:
        sys.stderr.write("no disks of one's own can be mounted here: the kinds that need one are left out\n")
    began, outcomes = time.monotonic(), []
    attacked = {stage for _, stage, _ in islice(schedule(asked.seed, asked.only, disks), asked.runs)}
    stages = [stage for stage in STAGES if stage in attacked or stage in ALL]
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder, bench(Path(folder), stages) as made:
        outcomes.append(_secrets(made))
        if asked.plant is not None:
            PLANTED[asked.plant]()
        for name, stage, seed in schedule(asked.seed, asked.only, disks):
            if len(outcomes) > asked.runs or time.monotonic() - began > 60 * asked.minutes:
                break
            if asked.stage not in (None, stage):
                continue
            outcomes.append(attack(made, name, stage, seed))
            _tell(outcomes[-1], asked.output)
    _tell(outcomes[0], asked.output)
    cpu = sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    sys.stdout.write(f"{table(outcomes)}\n\nseed {asked.seed}, {cpu / 60:.1f} minutes of CPU time\n")
    return int(any(outcome.lost for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
