"""The kinds of faults, the stages that each is made in, and one case of one.

A case is named by its kind, stage and seed, and does the same whenever it is run again, but for the moments of signals.
"""

from __future__ import annotations

import errno
import signal
import time
from dataclasses import dataclass

from tests.faults import damage, disks, moments, pages, workers
from tests.faults.case import Attack, Case, Outcome
from tests.faults.runs import ALL, TRAININGS, WORKERS, Bench


@dataclass(frozen=True)
class Kind:
    """A fault: how it is made, which stages it is made in, and how often for each case of the others.

    disk: whether it needs a small disk of its own. weight: cases of this kind in each round of all kinds.
    """

    attack: Attack
    stages: tuple[str, ...] = ALL
    disk: bool = False
    weight: int = 1


LATER = ALL[1:]
NETWORK = (errno.ESTALE, errno.EIO, errno.EBUSY, errno.ENOTEMPTY, errno.EACCES)

KINDS: dict[str, Kind] = {
    "SIGKILL at a random moment": Kind(moments.signals(signal.SIGKILL), weight=5),
    "SIGTERM at a random moment": Kind(moments.signals(signal.SIGTERM), weight=4),
    "SIGKILL at a rename or a sync": Kind(moments.killed_at_a_call, weight=3),
    "disk full": Kind(disks.disk_full, disk=True, weight=3),
    "no more files on the disk": Kind(disks.no_more_files, disk=True),
    "limit on the size of files": Kind(disks.file_size_limit),
    "read-only disk": Kind(disks.read_only, disk=True),
    "vanished folder": Kind(disks.vanished),
    "failing renames": Kind(disks.failing_calls(("replace",), NETWORK), weight=2),
    "failing syncs": Kind(disks.failing_calls(("fsync",), (errno.EIO, errno.ENOSPC))),
    "failing deletions": Kind(disks.failing_calls(("unlink", "rmdir"), NETWORK)),
    "clock jumps": Kind(moments.clock_jumps),
    "two commands in one folder": Kind(moments.two_at_once),
    "power cut": Kind(moments.power_cut, ALL, weight=2),
    "out of memory": Kind(moments.out_of_memory),
    "worker out of memory": Kind(workers.out_of_memory, WORKERS),
    "worker or its parent stopped": Kind(workers.stopped, WORKERS),
    "torn line of metrics": Kind(damage.torn_line, TRAININGS),
    "damaged checkpoint": Kind(damage.corrupted("checkpoint"), TRAININGS, weight=2),
    "damaged safetensors": Kind(
        damage.corrupted("safetensors"), ("reward_model", "discriminator", "ppo", "evaluation", "analysis")
    ),
    "damaged JSON": Kind(damage.corrupted("json"), LATER, weight=2),
    "damaged YAML": Kind(damage.corrupted("yaml"), LATER),
    "scripts in what the report shows": Kind(pages.scripts, ("report",), weight=2),
    "damaged store of answers": Kind(damage.corrupted("store"), ("revisions",)),
}


def attack(bench: Bench, kind: str, stage: str, seed: int) -> Outcome:
    """One case."""
    outcome, made = Outcome(kind, stage, seed), KINDS[kind]
    if made.disk:
        with (
            disks.small_disk(bench.folder / f"disk-{time.monotonic_ns()}") as disk,
            bench.case(stage, into=disk) as folder,
        ):
            made.attack(Case(bench, outcome, folder))
        return outcome
    with bench.case(stage) as folder:
        made.attack(Case(bench, outcome, folder))
    return outcome
