"""A sharded run of which one process is killed, or that goes on after it. test_sharding starts this twice.

The second start also makes the run that nothing interrupts, and compares.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from tests.launched import Checks
from tests.ppo.helpers import run_ppo
from tests.ppo.sharded import StopOneProcess, a_tokenizer, assert_equal_ends, ended_as, run_config, run_lm
from tlcr.training.distributed import barrier

checks = Checks()


@checks
def it_goes_on_bit_for_bit(folder: Path) -> None:
    tokenizer, cfg, out = a_tokenizer(folder), run_config(), folder / "killed"
    if not out.is_dir():
        barrier()
        run_ppo(cfg, run_lm, tokenizer, out, callbacks=[StopOneProcess(3, signal.SIGKILL)])
    resumed, _ = run_ppo(cfg, run_lm, tokenizer, out, resume=True)
    straight, _ = run_ppo(cfg, run_lm, tokenizer, folder / "straight")
    barrier()
    assert_equal_ends(ended_as(resumed, out), ended_as(straight, folder / "straight"))


if __name__ == "__main__":
    checks.run(Path(sys.argv[1]))
