"""Measurements: the clocks, peak memory, and the bandwidth of copying memory; the measured code is elsewhere.

What is measured is a `Work`: a function that takes a number of calls, prepares them, which is not timed, and returns
the function that makes them. Works of one case take turns, so that a temporary slowdown affects all of them.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

Work = Callable[[int], Callable[[], object]]

TURN = 0.01
"""The least seconds of a turn. It makes as many calls as that takes: a single short call cannot be timed."""
MOST_CALLS = 1000
GRAPHS = 2**31
"""Bytes that the calls of one turn may keep ready: each backward pass holds what its forward pass saved."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 11
CASE_SECONDS = 1.5
"""After this long a case that has LEAST_ROUNDS gets no further round."""
COPY_SECONDS = 0.2
COPIED = tuple(2**power for power in range(16, 31))
"""Bytes of the buffers that are copied, 64 KiB to 1 GiB."""


class Timing(NamedTuple):
    """Seconds of one call, over the rounds; lower and upper are the quartiles."""

    median: float
    lower: float
    upper: float
    rounds: list[float]


class Trial(NamedTuple):
    """A first call."""

    peak_bytes: int
    seconds: float


Timings = dict[str, Timing]
"""Maps the name of a clock to its timing."""


def calls(function: Callable[[], object]) -> Work:
    """A work that repeats the same call."""

    def prepare(count: int) -> Callable[[], object]:
        def run() -> None:
            for _ in range(count):
                function()

        return run

    return prepare


def calls_after(first: Callable[[], Callable[[], object]]) -> Work:
    """A work of different calls: `first` prepares one call and returns it."""

    def prepare(count: int) -> Callable[[], object]:
        ready = [first() for _ in range(count)]

        def run() -> None:
            for call in ready:
                call()

        return run

    return prepare


def summary(rounds: Sequence[float]) -> Timing:
    lower, median, upper = statistics.quantiles(rounds, n=4, method="inclusive")
    return Timing(median, lower, upper, list(rounds))


class Clocks(ABC):
    """The clocks of one kind of device. `descriptions` says of each what it measures; `main` is the one for shares of
    the copy bandwidth."""

    descriptions: ClassVar[Mapping[str, str]]
    main: ClassVar[str]
    peak_description: ClassVar[str]

    def __init__(self, *, rounds: int = MOST_ROUNDS, case_seconds: float = CASE_SECONDS) -> None:
        self.rounds, self.case_seconds = rounds, case_seconds

    @abstractmethod
    def turn(self, work: Work, count: int) -> dict[str, float]:
        """Seconds of one call by every clock."""

    @abstractmethod
    def peak(self, work: Work) -> int:
        """The most bytes that one call allocates, its results included, beyond those before it was prepared."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""

    def alternate(
        self, works: Mapping[str, Work], tried: Mapping[str, Trial] | None = None, *, seconds: float | None = None
    ) -> dict[str, Timings]:
        """Each work's timings, from as many rounds as fit some seconds, at least LEAST_ROUNDS.

        Args:
            works: what takes turns.
            tried: what a first call of each needed; None: not called yet.
            seconds: None: `case_seconds`.
        """
        enough = self.case_seconds if seconds is None else seconds
        counts = {name: self._calls_of_a_turn(work, (tried or {}).get(name)) for name, work in works.items()}
        taken: dict[str, dict[str, list[float]]] = {name: {clock: [] for clock in self.descriptions} for name in works}
        begin = time.monotonic()
        for done in itertools.count():
            if done >= self.rounds or (done >= LEAST_ROUNDS and time.monotonic() - begin > enough):
                break
            for name, work in works.items():
                for clock, one_call in self.turn(work, counts[name]).items():
                    taken[name][clock].append(one_call)
        return {name: {clock: summary(values) for clock, values in found.items()} for name, found in taken.items()}

    def trial(self, work: Work) -> Trial:
        """Make a first call and measure its peak memory, which makes the call slower than usual."""
        begin = time.perf_counter()
        peak = self.peak(work)
        self.synchronize()
        return Trial(peak, time.perf_counter() - begin)

    def _calls_of_a_turn(self, work: Work, tried: Trial | None) -> int:
        """1 if the trial was slow; else as many as fill a turn by the time of one more call, within bounds.

        The faster of two, because a call that was interrupted would make turns of a single call, which a short one does
        not warm up.
        """
        if tried is not None and tried.seconds > 100 * TURN:
            return 1
        seconds = []
        for _ in range(2):
            run = work(1)
            begin = time.perf_counter()
            run()
            self.synchronize()
            seconds.append(time.perf_counter() - begin)
        fill = math.ceil(TURN / max(min(seconds), 1e-9))
        return max(1, min(fill, MOST_CALLS, GRAPHS // max(tried.peak_bytes if tried else 0, 1)))

    def copy_bandwidth(self, device: str, sizes: Sequence[int] | None = None) -> list[dict[str, float]]:
        """Bytes read and written by copying one buffer to another, and bytes per second by the main clock.

        sizes: bytes of a buffer; None: COPIED.
        """
        found = []
        for size in COPIED if sizes is None else sizes:
            source = torch.zeros(size, dtype=torch.uint8, device=device)
            target = torch.zeros_like(source)
            work = calls(functools.partial(target.copy_, source))
            timing = self.alternate({"copy": work}, seconds=COPY_SECONDS)["copy"][self.main]
            found.append({"bytes": 2 * size, "bytes_per_second": 2 * size / timing.median})
        return found


class CPUClocks(Clocks):
    """Processor time, which other programs disturb least, and wall-clock time."""

    descriptions: ClassVar = {
        "processor": "processor time of the calling thread for one call, from turns of many calls; caches as the calls "
        "before left them",
        "wall": "wall-clock time of the same calls",
    }
    main = "processor"
    peak_description = (
        "the running sum of what torch's CPU allocator gave and took back during one call, as torch.profiler records "
        "it; scratch memory that libraries such as oneDNN take elsewhere is not in it"
    )

    def synchronize(self) -> None:
        """Nothing to wait for: a call returns when its work is done."""

    def turn(self, work: Work, count: int) -> dict[str, float]:
        run = work(count)
        wall, processor = time.perf_counter(), time.thread_time()
        run()
        processor, wall = time.thread_time() - processor, time.perf_counter() - wall
        return {"processor": processor / count, "wall": wall / count}

    def peak(self, work: Work) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as ready:
            run = work(1)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as called:
            run()
        held = sum(allocations(ready))
        return max(held, *(held + above for above in itertools.accumulate(allocations(called), initial=0)))


def allocations(recorded: profile) -> list[int]:
    """Bytes that were allocated, or freed where negative, in their order."""
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    found: Iterable[Any] = recorded.profiler.kineto_results.events()
    events = [event for event in found if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


class GPUClocks(Clocks):
    """The whole call, many calls in flight, and the device alone."""

    descriptions: ClassVar = {
        "call": "wall-clock time of one call and the wait for its end: Python, launch and kernels",
        "amortised": "wall-clock time of many calls and one wait for their end, over their number: what is slower of "
        "host and device",
        "device": "CUDA events around one call; a write of twice the L2 cache runs before it, which empties the cache "
        "and gives the host time to launch (what it has not launched by then is counted as well)",
    }
    main = "device"
    peak_description = "torch.cuda.max_memory_allocated during one call, above what was allocated before"

    def __init__(self, *, rounds: int = MOST_ROUNDS, case_seconds: float = CASE_SECONDS) -> None:
        super().__init__(rounds=rounds, case_seconds=case_seconds)
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flushed = torch.empty(max(2 * l2_bytes, 2**26), dtype=torch.uint8, device="cuda")

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def turn(self, work: Work, count: int) -> dict[str, float]:
        return {**_wall(self, work, count), "device": self._device(work(1))}

    def _device(self, run: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.flushed.zero_()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def peak(self, work: Work) -> int:
        before = torch.cuda.memory_allocated()
        run = work(1)
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before


class InterpretedClocks(CPUClocks):
    """The GPU's clocks that work without one, to run the same code. They time Triton's interpreter."""

    descriptions: ClassVar = {
        clock: f"{GPUClocks.descriptions[clock]}. Kernels ran under Triton's interpreter on a CPU: nothing about a GPU "
        "follows from this figure"
        for clock in ("call", "amortised")
    }
    main = "call"

    def turn(self, work: Work, count: int) -> dict[str, float]:
        return _wall(self, work, count)


def _wall(clocks: Clocks, work: Work, count: int) -> dict[str, float]:
    found = {}
    for clock, number in (("call", 1), ("amortised", count)):
        run = work(number)
        clocks.synchronize()
        begin = time.perf_counter()
        run()
        clocks.synchronize()
        found[clock] = (time.perf_counter() - begin) / number
    return found


def bandwidth_share(bytes_moved: int, seconds: float, copies: Sequence[Mapping[str, Any]]) -> float:
    """Bytes per second of a call, divided by those of the copy that is nearest to it in size."""
    nearest = min(copies, key=lambda copy: abs(math.log(copy["bytes"] / max(bytes_moved, 1))))
    return float(bytes_moved / seconds / nearest["bytes_per_second"])
