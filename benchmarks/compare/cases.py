"""Times a few cases of the tlcr that Python finds, and writes them to a file; `benchmarks.compare` starts it for each.

It is the same code for every commit, and so asks for no more than `tlcr.ops` has always promised: a case of which a
commit lacks something is a row that says what. Every result is compared with that commit's reference in float64 first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import tlcr
from benchmarks.clocks import Clocks, CPUClocks, GPUClocks
from benchmarks.ops.cases import FORWARD, PACKED, PADDED, WITH_REFERENCE, Case, Problem, Wrong, tlcr_function

CASES = (
    # Sizes at which the call costs more than the work.
    Case("fused_reward", "", (4, 64), passes=FORWARD),
    Case("fused_gae", PADDED, (4, 64), passes=FORWARD),
    Case("ppo_loss", "", (4, 64), passes=("both",)),
    Case("score_tokens", "", (4, 32_000), passes=("both",)),
    # Sizes at which the work costs more than the call.
    Case("fused_reward", "", (64, 1024), passes=FORWARD),
    Case("fused_gae", PADDED, (64, 1024), passes=FORWARD),
    Case("fused_gae", PACKED, (64, 1024), passes=FORWARD),
    Case("ppo_loss", "", (64, 1024), passes=("forward", "backward")),
    Case("score_tokens", WITH_REFERENCE, (32, 128_256), passes=("forward", "backward")),
    Case("score_tokens", WITH_REFERENCE, (32, 128_256), torch.bfloat16, passes=("both",)),
    Case("score_hidden", "", (64, 256, 16_384), passes=("both",)),
)
TURNS, CASE_SECONDS = 9, 0.5
"""Limits of each case in a process. The fastest turn counts, because disturbances only make a turn slower."""


def measure(case: Case, clocks: Clocks, device: str) -> dict[str, dict[str, Any]]:
    """Maps the name of each pass to its {"seconds"}, or to the {"reason"} why there are none."""
    names = {which: f"{str(case).removesuffix(')')}, {which})" for which in case.passes}
    try:
        problem, function = Problem(case, device), tlcr_function(case, "auto")
        problem.error(function)
    except Wrong as wrong:
        return {name: {"reason": str(wrong)} for name in names.values()}
    except (AttributeError, ImportError, NotImplementedError, TypeError) as lacking:
        return {name: {"reason": f"{type(lacking).__name__}: {lacking}"} for name in names.values()}
    works = {which: problem.work(function, which) for which in case.passes}
    timings = clocks.alternate(works)
    return {names[which]: {"seconds": min(timing[clocks.main].rounds)} for which, timing in timings.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("result", type=Path)
    parser.add_argument("--installed", type=Path, required=True, help="the folder whose tlcr is wanted")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--only", required=True)
    options = parser.parse_args()
    if not Path(tlcr.__file__).resolve().is_relative_to(options.installed.resolve()):
        raise SystemExit(f"tlcr is imported from {tlcr.__file__}, wanted the one in {options.installed}")
    torch.set_num_threads(options.threads)
    kind = GPUClocks if options.device == "cuda" else CPUClocks
    clocks = kind(rounds=TURNS, case_seconds=CASE_SECONDS)
    found: dict[str, dict[str, Any]] = {}
    for case in CASES:
        if str(case).startswith(options.only):
            found |= measure(case, clocks, options.device)
    options.result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
