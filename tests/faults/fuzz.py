"""Fuzzes every reader: ``python -m tests.faults.fuzz --minutes 1 --seed 0``.

Hypothesis draws inputs for each target in turn, with a new seed each round, until the time is up, or for ``--rounds``
rounds, which draw the same inputs on a slow machine as on a fast one. A find is shrunk and
printed with its target and seed. Exit code 1 where there was one.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "ACCELERATE_USE_CPU": "true",
}

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.faults.targets import TARGETS
from tlcr.errors import TlcrError

LONGEST = 600
"""Seconds for one input, of a clock that also runs while others compute. A template takes up to 11 s of CPU time."""
EXAMPLES = 100
"""Inputs of a target in each round."""


class Hangs(BaseException):
    """An input took more than ``LONGEST``."""


def _hangs(number: int, frame: FrameType | None) -> NoReturn:
    raise Hangs(f"it took more than {LONGEST} s")


def attempt(target: Callable[[Any], None], draw: Callable[[Any], Any]) -> bool:
    """One input. Returns whether it was accepted; raises what is a find."""
    before = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(LONGEST)
    try:
        target(draw)
    except TlcrError as error:
        said = str(error)
        assert said.strip(), f"{type(error).__name__} says nothing"
        assert len(said) < 20_000, f"{type(error).__name__} of {len(said)} characters"
        return False
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return True


def round_of(name: str, number: int, examples: int, counts: Counter[str]) -> str | None:
    """``examples`` inputs of a target with one seed; returns a find, shrunk, or None."""
    target = TARGETS[name]

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def inputs(data: st.DataObject) -> None:
        counts[name] += 1
        counts[f"{name}: accepted"] += attempt(target, data.draw)

    try:
        inputs()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "\n".join(map(_find, getattr(error, "exceptions", [error])))  # hypothesis groups several
    return None


def _find(error: BaseException) -> str:
    own = [one for one in traceback.extract_tb(error.__traceback__) if "hypothesis" not in one.filename]
    where = "".join(traceback.format_list(own[-6:]))
    notes = "\n".join(getattr(error, "__notes__", []))
    return f"{where}{type(error).__name__}: {str(error)[:1000]}\n{notes[:3000]}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As docs/reliability.md has it."""
    lines = ["| target | inputs | accepted | CPU seconds | finds |", "|---|---|---|---|---|"]
    return "\n".join(
        lines
        + [f"| {r['target']} | {r['inputs']} | {r['accepted']} | {r['seconds']:.0f} | {r['finds']} |" for r in rows]
    )


def _cpu() -> float:
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, help="as many, whatever the time")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--only", action="append", default=[], help="targets with this in their name")
    parser.add_argument("--output", type=Path, help="the table's rows as lines of JSON, added to this file")
    asked = parser.parse_args(arguments)
    faulthandler.enable()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    names = [name for name in TARGETS if not asked.only or any(part in name for part in asked.only)]
    counts: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    finds: Counter[str] = Counter()
    until, number = time.monotonic() + 60 * asked.minutes, asked.seed
    over = (lambda: number - asked.seed >= asked.rounds) if asked.rounds else (lambda: time.monotonic() > until)
    while not over():
        for name in names:
            began = _cpu()
            found = round_of(name, number, EXAMPLES, counts)
            seconds[name] += _cpu() - began  # type: ignore[assignment]
            if found is not None:
                finds[name] += 1
                sys.stderr.write(f"FOUND by {name}, seed {number}:\n{found}\n")
                sys.stderr.flush()
            if not asked.rounds and over():
                break
        number += 1
    rows = [
        {
            "target": name,
            "inputs": counts[name],
            "accepted": counts[f"{name}: accepted"],
            "seconds": float(seconds[name]),
            "finds": finds[name],
            "seeds": [asked.seed, number],
        }
        for name in names
    ]
    if asked.output is not None:
        with asked.output.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    sys.stdout.write(f"{table(rows)}\n\nseeds {asked.seed} to {number - 1}, {_cpu() / 60:.1f} minutes of CPU time\n")
    return int(bool(finds))


if __name__ == "__main__":
    raise SystemExit(main())
