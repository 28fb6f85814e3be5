"""The steps in the order of importance: what each runs, on a GPU or in small on a CPU, and what the table says of it.

A new check of GPUs is one more step here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

BUILD = "build"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
LAST_LINE = r"^\s*(\S.*?)\s*$"
PYTEST = r"^(?:=+ )?((?:\d+ \w+(?:, )?)+ in [\d.]+s.*?)(?: =+)?$"
SANITIZER = r"^=+ (ERROR SUMMARY: .*|RACECHECK SUMMARY: .*)$"
OPS = r"^(\d+ measured.*)$"
HOST = r"^\s*(ppo_loss, forward and backward .*?)\s*$"
PPO = r"^\s*(tlcr\b.*?)\s*$"
BUILDING = 240
"""Seconds in which the extension must be compiled."""
MEASURED = "60e69f4"
"""The commit that docs/kernels.md has figures of: its kernels are measured in turns with those of today."""
TRAINER = ("tests/training", "tests/recipes", "tests/experiment", "tests/cli/test_score.py")


@dataclass(frozen=True)
class Step:
    """One process of the run."""

    name: str
    command: tuple[str, ...]
    limit: int
    """Seconds after which it is cut off."""
    says: str = LAST_LINE
    """A regular expression; what its group found last in the output is what the table says."""
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None
    """What it needs and this machine lacks; it does not run then."""
    shown: bool = False
    """Whether its output is figures, to be shown whole."""


def steps(device: str, results: Path | None) -> tuple[Step, ...]:
    """The steps of a device.

    Args:
        device: "cuda", or "cpu" for the same path in small.
        results: folder for the files of figures; None where nothing is to be kept.

    Returns:
        Every step, in order.
    """
    small = device == "cpu"
    patience = 5 if small else 1  # a limit is for a GPU machine that is paid by the minute, not for a slow processor
    name = _file_name(device)
    memcheck, *other_tools = (_sanitizer(tool, device) for tool in TOOLS)

    def keep(kind: str) -> tuple[str, ...]:
        return () if results is None else ("--json", str(results / f"{kind}_{name}.json"))

    ops = ("--short", "--device", device, "--minutes", "2" if small else "1.5", *keep("ops"))
    ppo = ("--batch", "4", "--prompt-tokens", "8", "--response-tokens", "8", "--epochs", "1", "--rounds", "1")
    if not small:
        ppo = ("--shape", "1b", "--dtype", "bfloat16", "--prompt-tokens", "128", "--response-tokens", "128")
        ppo += ("--epochs", "2", "--minibatch", "32", "--micro-batch", "16", "--rounds", "2")
    if small or not importlib.util.find_spec("trl"):
        ppo += ("--no-trl",)
    ppo += ("--repeats", "1", "--limit", str(70 * patience), *keep("ppo_step"))
    kernels = ("--interpret",) if small else ("--base", MEASURED)
    host = ("--device", device, "--rounds", "3" if small else "101")
    hidden = ("--device", device)
    if small:
        hidden += ("--shape", "256", "32", "512", "--chunks", "64", "--seconds", "0.1")
    ops_tests = ("tests/ops/test_door.py",) if small else ("tests/ops",)
    trainer_tests = ("-k", "[cpu]", "tests/recipes/test_train_sft.py") if small else ("-m", "gpu", *TRAINER)
    return (
        _build(device),
        Step("tests of the ops", _pytest(*ops_tests), limit=150 * patience, says=PYTEST),
        memcheck,
        Step("ops, timed", _module("benchmarks.ops", *ops), limit=100 * patience, says=OPS, shown=True),
        Step("PPO round", _module("benchmarks.ppo_step", *ppo), limit=150 * patience, says=PPO, shown=True),
        Step("tests of the trainer", _pytest(*trainer_tests), limit=90 * patience, says=PYTEST),
        Step(
            "kernels alone",
            _module("benchmarks.kernels", *kernels),
            limit=90 * patience if small else 90 + BUILDING,  # the commit is built first
            environment=_for_this_gpu(device),
            shown=True,
        ),
        Step("host time", _module("benchmarks.host_time", *host), limit=30 * patience, says=HOST, shown=True),
        Step("score_hidden", _module("benchmarks.score_hidden", *hidden), limit=60 * patience, shown=True),
        *other_tools,
    )


def _build(device: str) -> Step:
    """What is installed and fits, or the extension compiled here for this GPU."""
    from tlcr.ops import build_info

    info = build_info()
    if info["problem"] is None and info["extension"] in (("cuda",) if device == "cuda" else ("cpu", "cuda")):
        told = f"print('taken as it is: compiled by {info['compiler']} for torch {info['torch']}')"
        return Step(BUILD, (sys.executable, "-c", told), limit=30)
    environment = {"TLCR_BUILD": "cuda" if device == "cuda" else "cpu"} | _for_this_gpu(device)
    return Step(BUILD, _module("benchmarks.gpu.build", device), limit=BUILDING, environment=environment)


def _for_this_gpu(device: str) -> dict[str, str]:
    """The environment in which nothing is compiled for other GPUs."""
    if device != "cuda":
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}


def _pytest(*arguments: str) -> tuple[str, ...]:
    beside = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    options = ("-q", "-p", "no:benchmark", "-p", "no:cacheprovider", *beside)
    return _module("pytest", *options, *arguments)


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *arguments)


def _sanitizer(tool: str, device: str) -> Step:
    program = _compute_sanitizer()
    calls = _module("tests.ops.every_op", "--device", device)
    watched = (program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *calls)
    missing = None
    if program is None:
        missing = "no compute-sanitizer on PATH or in CUDA_HOME/bin"
    elif device == "cpu":
        missing = "no GPU"
    # An access outside a tensor stays inside the memory that torch keeps, unless each tensor has memory of its own.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, watched, limit=60, says=SANITIZER, environment=environment, missing=missing)


def _compute_sanitizer() -> str | None:
    homes = filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"))
    path = os.pathsep.join([os.environ.get("PATH", ""), *(str(Path(home) / "bin") for home in homes)])
    return shutil.which("compute-sanitizer", path=path)


def _file_name(device: str) -> str:
    """The device's name as a part of a file's."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu-in-small"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
