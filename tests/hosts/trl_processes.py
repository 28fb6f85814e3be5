"""One of two processes that share the golden answers, three each: one group is on both. Prints what was misplaced."""

from __future__ import annotations

import sys
from pathlib import Path

from golden import GoldenScorer, load
from trl_models import golden_trainer, misplaced, tokenizer

from tlcr.hosts.trl import TokenReward


def main(folder: str) -> None:
    for shift in (0, 1):
        reward = TokenReward(GoldenScorer(shift), tokenizer())
        trainer = golden_trainer(Path(folder), reward, per_device_train_batch_size=3)
        trainer.train()
        process = trainer.accelerator.process_index
        wrong = misplaced(trainer.given, load()["hosts"]["trl"]["advantages_BT"])
        here = [number for number in wrong if number // 3 == process]
        assert len(wrong) - len(here) == 3, wrong  # the other process has them
        sys.stdout.write(f"process {process} with a shift of {shift} misplaced {here}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
