"""Result files of the benchmarks with made-up figures, in the schema that the benchmarks write."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLOCKS = {
    "cpu": {"processor": "processor time of the thread that calls", "wall": "time on the wall"},
    "cuda": {
        "amortised": "wall time of many calls in a row, over their number",
        "call": "wall time of one call and a wait for the device",
        "device": "time between two events on the device",
    },
}
SMALL_OPS = ("fused_gae", "fused_reward", "ppo_loss")
SHAPES = {"small": [(b, 1024) for b in (16, 64, 256, 1024)] + [(64, t) for t in (256, 512, 2048, 4096)]}
SCORED = [(n, 32_000) for n in (32, 64, 128, 256)] + [(64, v) for v in (50_257, 128_256, 151_936)]

Cost = Callable[[Mapping[str, int]], float]
"""Seconds of tlcr at a shape."""


def about(kind: str, device: str = "cpu") -> dict[str, Any]:
    """The head of a result file."""
    gpu = device == "cuda"
    return {
        "schema": 1,
        "kind": kind,
        "command": f"python -m benchmarks.{kind} --made-up",
        "machine": {
            "device": device,
            "name": "Made-up GPU" if gpu else "Made-up processor",
            "threads": 1,
            "cores": 2,
            "last_level_cache_bytes": 32 * 2**20,
            "memory_bytes": 16 * 2**30,
            "capability": "9.0" if gpu else "AVX512",
        },
        "versions": {"python": "3.11.7", "torch": "2.13.0", "triton": None, "tlcr": "0.1.0"},
        "build": {"extension": "cpu", "compiler": "gcc 12.2.0"},
        "commit": COMMIT,
        "date": "2026-11-23",
    }


def row(op: str, shape: Mapping[str, int], implementation: str, seconds: float, **changes: Any) -> dict[str, Any]:
    """A measured row whose rounds lie within two hundredths of the median."""
    device = changes.pop("device", "cpu")
    moved = changes.pop("bytes_moved", 4 * 3 * math.prod(shape.values()))
    made = {
        "op": op,
        "case": "",
        "pass": "forward",
        "shape": dict(shape),
        "dtype": "float32",
        "implementation": implementation,
        "status": "measured",
        "reason": "",
        "seconds": {
            clock: {"median": seconds, "lower": 0.98 * seconds, "upper": 1.02 * seconds, "rounds": [seconds] * 3}
            for clock in CLOCKS[device]
        },
        "peak_bytes": 4 * math.prod(shape.values()),
        "bytes_moved": moved,
        "bytes_formula": "3 s B T",
        "bandwidth_share": moved / seconds / 1e10,
        "error": 2e-7,
    }
    return made | changes


def not_run(op: str, shape: Mapping[str, int], implementation: str, reason: str, **changes: Any) -> dict[str, Any]:
    nothing = {"status": "not run", "reason": reason, "seconds": {}, "peak_bytes": None, "bandwidth_share": None}
    return row(op, shape, implementation, 1.0, error=None, **changes) | nothing


def linear(shape: Mapping[str, int]) -> float:
    """A microsecond for the call, and 0.8 of a copy at 10 GB/s."""
    return 1e-6 + 12 * math.prod(shape.values()) / 0.8e10


def ops_result(device: str = "cpu", cost: Cost = linear, rows: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Every op at several sizes beside rivals that are slower by fixed factors; `rows` come last."""
    made: list[dict[str, Any]] = []
    ours = "tlcr triton" if device == "cuda" else "tlcr cpp"
    for op in SMALL_OPS:
        rivals = {"eager torch": 30.0, "torch.compile": 4.0} | (
            {"TRL": 45.0, "verl's loop": 60.0} if "gae" in op else {}
        )
        for b, t in SHAPES["small"]:
            shape = {"B": b, "T": t}
            for direction in ("forward", "backward") if op == "ppo_loss" else ("forward",):
                for name, factor in ({ours: 1.0} | rivals).items():
                    peak = int(4 * b * t * (0 if name == ours else factor / 4))
                    more = {"pass": direction, "device": device, "peak_bytes": peak}
                    made.append(row(op, shape, name, factor * cost(shape), **more))
    for case in ("log-probability and entropy", "with reference and KL"):
        for n, v in SCORED:
            for direction in ("forward", "backward", "both"):
                for name, factor in {ours: 1.0, "eager torch": 9.0, "torch.compile": 3.0, "Liger": 0.9}.items():
                    times = {"forward": 1.0, "backward": 1.5, "both": 2.5}[direction]
                    shape, moved = {"N": n, "V": v}, int(4 * n * v * (1 + ("KL" in case)) * times)
                    more = {"case": case, "pass": direction, "device": device, "bytes_moved": moved}
                    made.append(row("score_tokens", shape, name, factor * times * cost(shape), **more))
    missing = not_run("fused_gae", {"B": 64, "T": 1024}, "torchrl", "No module named 'torchrl'")
    sizes = [2**power for power in range(14, 30, 2)]
    bandwidth = [{"bytes": size, "bytes_per_second": 4e10 if size < 2**24 else 1e10} for size in sizes]
    return about("ops", device) | {
        "clocks": CLOCKS[device],
        "copy_bandwidth": bandwidth,
        "rows": [*made, missing, *rows],
    }


def ppo_result(model: str | None = None, dtype: str = "float32", faster: float = 2.5) -> dict[str, Any]:
    """tlcr, its shared value head and TRL, which is `faster` times as slow."""
    task = {
        "model": model,
        "dtype": dtype,
        "batch": 64,
        "prompt_tokens": 16,
        "response_tokens": 32,
        "epochs": 4,
        "minibatch": 64,
        "micro_batch": 64,
        "threads": 2,
        "rounds": 6,
    }
    rows = []
    for side, slower, memory in (
        ("tlcr", 1.0, 0.55),
        ("tlcr, shared value head", 0.6, 0.4),
        ("TRL 1.11.0", faster, 1.0),
    ):
        phases = {"rollout": 0.2, "score": 0.06, "reward": 0.03, "update": 0.4}
        seconds = {phase: value * slower for phase, value in phases.items()}
        total = sum(seconds.values()) * 1.02
        rows.append(
            {
                "side": side,
                "task": task | {"value_model": "shared" if "shared" in side else "separate"},
                "seconds": seconds | {"total": total},
                "total_range": [0.95 * total, 1.1 * total],
                "rounds": 10,
                "tokens_per_second": 64 * 32 / total,
                "peak_bytes": int(memory * 2**30),
                "versions": {"torch": "2.13.0"},
            }
        )
    return about("ppo_step") | {"rows": rows}


def write(folder: Path, **results: Mapping[str, Any]) -> Path:
    """The results as files of these names in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return folder
