"""Records measurements in a file, with the machine, commit and versions that produced them.

A result is worth keeping where anybody can repeat it: `clean_commit` refuses, before anything is timed, a checkout that
is not at a commit, or code that is not the checkout's. Needs the standard library, torch and the checkout.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
BUILD_FACTS = ("extension", "compiler", "instruction_set", "torch", "cuda", "arch_list")


def largest(errors: Iterable[float]) -> float:
    """The largest error; NaN where one is NaN, which `max` passes over. A bound is then held by ``error <= bound``."""
    found = list(errors)
    return next((error for error in found if math.isnan(error)), max(found, default=0.0))


def clean_commit(root: Path = ROOT) -> str:
    """The 40 hex digits of the commit that `root` is at. Results of other runs may lie there uncommitted.

    Raises:
        SystemExit: there is no commit, files differ from it, or the tlcr that Python imports is not the one of `root`.
    """
    import tlcr

    imported = Path(tlcr.__file__).resolve().parent.parent
    if imported != root:
        raise SystemExit(
            f"not recorded: tlcr is imported from {imported}, not from the checkout {root} whose commit would be "
            f"named; run with PYTHONPATH={root}, or install that checkout"
        )
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        raise SystemExit(
            f"not recorded: {root} is no git checkout with a commit; clone the repository, or leave out --json"
        )
    changed = _git(root, "status", "--porcelain", "--", ".", f":(exclude){RESULTS}")
    if changed is None:
        raise SystemExit(f"not recorded: git cannot say whether {root} is clean; leave out --json")
    if changed:
        raise SystemExit(
            f"not recorded: the checkout differs from commit {commit[:12]}; commit or stash these, "
            f"or leave out --json:\n{changed}"
        )
    return commit


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def record(
    kind: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    commit: str,
    clocks: Mapping[str, str],
    device: str = "cpu",
    threads: int | None = None,
    packages: Iterable[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """A result file's content: the facts, then `more`, then the rows.

    Args:
        kind: "ops" or "ppo_step".
        rows: what was measured.
        commit: from `clean_commit`, asked before the first measurement.
        clocks: name of each clock that the rows use, and what it measures.
        device: "cpu" or "cuda".
        threads: that computed; None: as many as torch has in this process.
        packages: rivals whose versions belong to the result.
        more: further entries of the file.
    """
    return {
        "schema": SCHEMA,
        "kind": kind,
        "command": command(sys.argv),
        "machine": machine(device, threads),
        "versions": versions(packages),
        "build": build(),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "clocks": dict(clocks),
        **more,
        "rows": list(rows),
    }


def command(argv: Sequence[str]) -> str:
    """The command line from the root of a checkout; of a path elsewhere only the last part, which others can use.

    Args:
        argv: the file of the module that runs, which Python puts there for `python -m` too, and then the arguments.
    """

    def plain(argument: str) -> str:
        path = Path(argument)
        if not path.is_absolute():
            return argument
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

    script = Path(argv[0]).resolve()
    program = [plain(str(script))]
    if script.is_relative_to(ROOT) and script.suffix == ".py":
        parts = script.relative_to(ROOT).with_suffix("").parts
        program = ["-m", ".".join(parts[:-1] if parts[-1] == "__main__" else parts)]
    return shlex.join(["python", *program, *map(plain, argv[1:])])


def machine(device: str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """The hardware that computed: a GPU where `device` is "cuda", else the processor."""
    threads = torch.get_num_threads() if threads is None else threads
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "device": "cuda",
            "name": gpu.name,
            "threads": threads,
            "cores": gpu.multi_processor_count,
            "last_level_cache_bytes": gpu.L2_cache_size,
            "memory_bytes": gpu.total_memory,
            "capability": f"{gpu.major}.{gpu.minor}",
        }
    return {
        "device": "cpu",
        "name": _processor(),
        "threads": threads,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "last_level_cache_bytes": _last_level_cache(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _last_level_cache() -> int | None:
    """Bytes, as Linux reports them (a virtual machine's may belong to its host's other guests too); None elsewhere."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")
    found = {int((cache / "level").read_text()): (cache / "size").read_text().strip() for cache in caches}
    if not found:
        return None
    size = found[max(found)]
    unit = {"K": 2**10, "M": 2**20}.get(size[-1], 1)
    return int(size.rstrip("KM")) * unit


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Of Python, torch, triton, tlcr and `packages`, those that are installed; tlcr may run from a bare checkout."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package, known_as in (("triton", "triton"), ("tlcr", "tlcr-rlhf"), *((name, name) for name in packages)):
        try:
            found[package] = version(known_as)
        except PackageNotFoundError:
            if package == "tlcr":
                found[package] = "a checkout, not installed"
    return found


def build() -> dict[str, Any]:
    """How the compiled kernels in use were built; without any, only None."""
    from tlcr.ops import build_info

    facts = build_info()
    return {fact: facts[fact] for fact in BUILD_FACTS}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON to a temporary file, then rename it: an interrupted run leaves the old file intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(path)
