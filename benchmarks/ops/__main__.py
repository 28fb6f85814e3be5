"""Every op against what else computes it: time by several clocks, peak memory, and the share of the copy bandwidth.

    python -m benchmarks.ops                                            one thread of the CPU
    python -m benchmarks.ops --device cuda --json benchmarks/results/ops_h100.json
    python -m benchmarks.ops --only fused_gae --minutes 2               some ops
    python -m benchmarks.ops --short                                    each op at one size, beside plain torch
    python -m benchmarks.ops --interpret                                a GPU run's path at tiny sizes, without a GPU

Run from the root of a checkout, whose tlcr is the one that is measured. Needs an installed torch, for GPUs also triton,
and no network. Each rival that is installed takes part;
one that is not, or cannot run, is a row that says why. Before anything is timed its results and gradients are compared
with tlcr's specification in float64: a rival that is wrong is not timed, and if tlcr is wrong the run stops. Cases come
in the order of importance; what --minutes leaves no time for is a row that says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    # torch, triton or tlcr reads these variables when it is imported.
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler says at every peak that it began
    with tempfile.TemporaryDirectory() as compiled:
        # Elsewhere torch.compile might find what it compiled for another ATEN_CPU_CAPABILITY, and run it, with wrong
        # results.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """All cases of the device, printed as they come, and written if --json names a file."""
    import torch

    from benchmarks import record
    from benchmarks.clocks import Clocks, CPUClocks, GPUClocks, InterpretedClocks
    from benchmarks.ops.cases import cpu_cases, gpu_cases, interpreted_cases, once, short_cases
    from benchmarks.ops.rivals import PACKAGES
    from benchmarks.ops.runs import Run, table

    commit = record.clean_commit() if options.json else None
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU; --interpret shows the path of a GPU run without one")
    torch.set_num_threads(options.threads)
    clocks: Clocks
    if options.interpret:
        clocks, cases = InterpretedClocks(rounds=2, case_seconds=0), interpreted_cases()
    elif options.device == "cuda":
        clocks, cases = GPUClocks(), gpu_cases()
    else:
        clocks, cases = CPUClocks(), cpu_cases()
    if options.short:
        cases = short_cases(options.device)
    for facts in (record.machine(options.device), record.versions(PACKAGES), record.build(), clocks.descriptions):
        say(f"{facts}\n")
    begin = time.monotonic()
    run = Run(clocks, options.device, options.minutes, interpreted=options.interpret)
    for case in once(cases):
        if case.op.startswith(options.only):
            say(table(run.measure(case), clocks.main))
    measured = sum(row["status"] == "measured" for row in run.rows)
    minutes = (time.monotonic() - begin) / 60
    say(f"\n{measured} measured, {len(run.rows) - measured} not run; {minutes:.1f} minutes\n")
    if not measured:
        raise SystemExit("nothing was measured; the rows say why")
    if commit is not None:
        content = record.record(
            "ops",
            run.rows,
            commit=commit,
            device=options.device,
            clocks=clocks.descriptions,
            packages=PACKAGES,
            copy_bandwidth=run.copies,
            peak_memory=clocks.peak_description,
            interpreted=options.interpret,
        )
        record.write(options.json, content)
        say(f"\nwritten to {options.json}\n")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="in which the run ends (default: 8)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--only", default="", help="the ops whose name begins so")
    parser.add_argument(
        "--interpret", action="store_true", help="Triton's interpreter, tiny sizes; says nothing of speed"
    )
    parser.add_argument("--short", action="store_true", help="each op at one size, beside plain torch alone")
    parser.add_argument("--json", type=Path, help="a file for the results; wants a clean checkout at a commit")
    options = parser.parse_args(argv)
    if options.interpret and options.device == "cuda":
        parser.error("--interpret runs on the CPU; leave out --device cuda")
    if options.interpret and options.short:
        parser.error("--interpret has sizes of its own; leave out --short")
    return options


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
