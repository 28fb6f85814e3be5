"""The kernels' own time on a GPU, of this checkout and of an older commit in turns: what the work of an op takes on the
device, without the host, as a share of a copy's speed.

    python -m benchmarks.kernels                                      # this checkout
    python -m benchmarks.kernels --base 60e69f4 --json FILE           # and a commit, two rounds of each
    python -m benchmarks.kernels --interpret --base HEAD~1            # the path at tiny sizes, without a GPU

Every commit is measured by processes of its own, which take turns, with the kernels compiled: a commit is built first,
into build/compare, as `benchmarks.compare` does. Of a case that "auto" gives to different implementations of the two no
times are shown. A call is captured once as a CUDA graph; each replay follows a write of 128 MiB, so that no input is in
the cache, and is timed by events. Results are compared with the specification first. The bytes are those that the op
must move (`bytes` below), with every token counted.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 2
REPEATS = 15
FLUSHED = 2**27
LARGEST_ERROR = 1e-4
GAE_SHAPES = (
    (8192, 4096),
    (1024, 32768),
    (65536, 128),
    (8192, 512),
    (262144, 64),
    (64, 32768),
    (8, 131072),
    (64, 1024),
)


class Case(NamedTuple):
    """One op at one size."""

    name: str
    bytes: int
    call: Callable[[str], Any]
    """The results with an implementation, "auto" or "reference"."""

    @property
    def op(self) -> str:
        return self.name.removeprefix("linear, then ").partition(" ")[0].rstrip(",")


def cases(device: str, tiny: bool) -> Iterator[Case]:
    """The cases of the op benchmark's kernels, at the sizes where a GPU had told most."""
    import torch

    import tlcr

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    # An odd length: rows that begin anywhere.
    for batch, length in ((3, 40), (2, 33)) if tiny else (*GAE_SHAPES, (8192, 4095)):
        r, v = numbers(batch, length), numbers(batch, length)
        full = torch.ones(batch, length, dtype=torch.bool, device=device)
        for whiten in (False, True):

            def gae(impl: str, r: Any = r, v: Any = v, full: Any = full, whiten: bool = whiten) -> Any:
                return tlcr.fused_gae(r, v, full, whiten=whiten, impl=impl)

            name = f"fused_gae{', whitened' * whiten} {batch} x {length}"
            yield Case(name, (26 if whiten else 17) * batch * length, gae)

    batch, length = (3, 40) if tiny else (8192, 4096)
    full = torch.ones(batch, length, dtype=torch.bool, device=device)
    kl, terminal = numbers(batch, length), numbers(batch)
    for dtype in (torch.float32, torch.bfloat16):
        logits = numbers(batch, length, 2, dtype=dtype)
        for last in (None, terminal):

            def reward(impl: str, logits: Any = logits, last: Any = last) -> Any:
                return tlcr.fused_reward(logits, full, kl=kl, kl_coef=0.1, terminal=last, clip=0.9, impl=impl)

            name = f"fused_reward{', terminal' * (last is not None)} {batch} x {length} {str(dtype)[6:]}"
            yield Case(name, (2 * logits.element_size() + 9) * batch * length, reward)

    x = [0.1 * numbers(batch, length) for _ in range(6)]
    trained = [tensor.requires_grad_() for tensor in x[:2]]

    def loss(impl: str, aggregate: str) -> Any:
        kept = {"values": trained[1], "old_values": x[4], "returns": x[5]}
        return tlcr.ppo_loss(trained[0], x[2], x[3], full, **kept, aggregate=aggregate, impl=impl)

    for aggregate in ("token", "sequence"):

        def forward(impl: str, aggregate: str = aggregate) -> Any:
            with torch.no_grad():
                return loss(impl, aggregate)

        yield Case(f"ppo_loss, forward, {aggregate} {batch} x {length}", 25 * batch * length, forward)

    def both(impl: str) -> Any:
        return torch.autograd.grad(loss(impl, "token").loss, trained)

    yield Case(f"ppo_loss, forward and backward {batch} x {length}", 58 * batch * length, both)

    shape = (2, 8, 64) if tiny else (64, 1024, 4096)
    hidden, weight = numbers(*shape, dtype=torch.bfloat16), numbers(2, shape[2], dtype=torch.bfloat16)
    counts = torch.ones(shape[:2], dtype=torch.bool, device=device)
    size = hidden.numel() * 2 + counts.numel() * 5
    name = " x ".join(map(str, shape))
    yield Case(
        f"reward_from_hidden {name}", size, lambda impl: tlcr.reward_from_hidden(hidden, weight, counts, impl=impl)
    )

    def in_two_steps(impl: str) -> Any:
        return tlcr.fused_reward(torch.nn.functional.linear(hidden, weight), counts, impl=impl)

    yield Case(f"linear, then fused_reward {name}", size, in_two_steps)


def measure(interpret: bool) -> dict[str, dict[str, Any]]:
    """Seconds, bytes and implementation of every case in this process."""
    import torch

    device = "cpu" if interpret else "cuda"
    torch.manual_seed(0)
    source = torch.empty(2**16 if interpret else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _seconds(functools.partial(target.copy_, source), device)
    found = {"copy": {"seconds": seconds, "bytes": 2.0 * source.numel()}}
    del source, target
    for case in cases(device, interpret):
        impl = "triton" if interpret and "hidden" not in case.name and "linear" not in case.name else "auto"
        error = _error(case.call(impl), case.call("reference"))
        if not error <= LARGEST_ERROR * (100 if "linear" in case.name else 1):
            raise SystemExit(f"{case.name}: wrong result, relative error {error:.1e} against the specification")
        seconds = _seconds(functools.partial(case.call, impl), device)
        taken = _taken(case.op, impl, device)
        found[case.name] = {"seconds": seconds, "bytes": float(case.bytes), "error": error, "impl": taken}
    return found


def _taken(op: str, impl: str, device: str) -> str:
    """The implementation that runs."""
    from tlcr import ops

    autos = {(status.op, status.device): status.auto for status in ops.available()}
    return autos[op, device] if impl == "auto" else impl


def _error(got: Any, wanted: Any) -> float:
    """The largest error of any result, relative to its largest value."""
    from benchmarks.record import largest

    pairs = zip(got, wanted, strict=True) if isinstance(got, tuple) else [(got, wanted)]
    return largest(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs if a is not None)


def _seconds(call: Callable[[], object], device: str) -> float:
    """Median seconds of a call: of its graph on the device; under the interpreter of one call, which says nothing."""
    import torch

    if device == "cpu":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device=device)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    rounds = []
    for _ in range(REPEATS):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        rounds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(rounds)


def compared(base: str | None, interpret: bool) -> dict[str, list[dict[str, Any]]]:
    """What the processes of each commit found, in turns."""
    from rich.console import Console

    from benchmarks.compare.commits import installed, revisions
    from benchmarks.compare.rounds import start

    with ExitStack() as stack:
        sources = {"here": ROOT}
        if base is not None:
            revision, _ = revisions(base, "HEAD", dirty=True)
            kept = ROOT / "build" / "compare"
            sources = {base: stack.enter_context(installed(revision, kept, Console(stderr=True))), **sources}
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in sources}
        for _ in range(ROUNDS if base is not None else 1):
            for name, source in sources.items():
                # This file, whatever the commit, on the tlcr of that commit.
                given = ["--worker", *["--interpret"] * interpret]
                done = start("benchmarks.kernels", *given, installed=source, threads=1)
                if done.returncode != 0:
                    raise SystemExit(f"timing the kernels of {name} failed with code {done.returncode}:\n{done.stderr}")
                rounds[name].append(json.loads(done.stdout))
    return rounds


def table(rounds: dict[str, list[dict[str, Any]]]) -> str:
    """One line a case: microseconds, and the share of the copy's speed, of each commit; none of these where the commits
    ran different implementations, which says nothing of a kernel."""
    lines = ["{:<56}".format("") + "".join(f"{name:>24}" for name in rounds)]
    for case in next(iter(rounds.values()))[0]:
        line = f"{case:<56}"
        impls = {name: found[0][case].get("impl") for name, found in rounds.items()}
        if len(set(impls.values())) > 1:
            lines.append(line + "  not compared: " + ", ".join(f"{name} by {impl}" for name, impl in impls.items()))
            continue
        for found in rounds.values():
            seconds = statistics.median(one[case]["seconds"] for one in found)
            copy = statistics.median(one["copy"]["bytes"] / one["copy"]["seconds"] for one in found)
            line += f"{1e6 * seconds:>14.1f} us {found[0][case]['bytes'] / seconds / copy:>6.2f}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a commit that is measured beside this checkout")
    parser.add_argument("--json", type=Path, help="where all rounds are written")
    parser.add_argument("--interpret", action="store_true", help="tiny sizes under Triton's interpreter, without a GPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    if options.worker:
        json.dump(measure(options.interpret), sys.stdout)
        return
    rounds = compared(options.base, options.interpret)
    sys.stdout.write(table(rounds))
    if options.json is not None:
        options.json.write_text(json.dumps(rounds, indent=1) + "\n")


if __name__ == "__main__":
    main()
