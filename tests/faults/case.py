"""One attack: what it is called, what it found so far, and how the command goes on once the fault is gone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.children import Ended, finish
from tests.faults.runs import STAGES, Bench


@dataclass
class Outcome:
    """What came of a case.

    runs: commands that were started under the fault. met: whether it took effect before one was done. refused: the
    sentence with which the last one ended, if one did. equal: whether the result was that of the uninterrupted run in
    the end. problems: what else was wrong.
    """

    kind: str
    stage: str
    seed: int
    runs: int = 0
    met: bool = False
    refused: str | None = None
    equal: bool = False
    problems: tuple[str, ...] = ()

    @property
    def lost(self) -> bool:
        return bool(self.problems) or not self.equal


class Case:
    """One attack: its folder, and what it found so far."""

    def __init__(self, bench: Bench, outcome: Outcome, folder: Path) -> None:
        self.bench, self.outcome, self.folder = bench, outcome, folder
        self.random = random.Random(f"{outcome.kind} {outcome.stage} {outcome.seed}")
        self.command = STAGES[outcome.stage]

    def problem(self, text: str) -> None:
        self.outcome.problems = (*self.outcome.problems, text)

    def take(self, ended: Ended, *, killed: bool = False) -> None:
        """Notes how a command under a fault ended: done, refused in a sentence, killed by us, or badly."""
        self.outcome.runs += 1
        if ended.done:
            return
        self.outcome.met = True
        if ended.sentence is not None:
            self.outcome.refused = ended.sentence
        elif not (killed and ended.code < 0):
            self.problem(f"ended with {ended.code}: {ended.said.strip()[-1500:] or 'no word'}")

    def go_on(self) -> None:
        """The fault is gone: the same command has to reach the result of the uninterrupted run."""
        ended = finish(self.command, self.folder)
        if not ended.done:
            self.problem(f"does not go on ({ended.code}): {ended.said.strip()[-1500:]}")
            return
        differences = self.bench.differences(self.outcome.stage, self.folder)
        self.outcome.equal = not differences
        if differences:
            self.problem("; ".join(differences[:5]))

    def under(self, fault: Callable[[], object]) -> Ended:
        """Runs the command with a fault planted in its process."""
        return finish(self.command, self.folder, fault)


Attack = Callable[[Case], None]
