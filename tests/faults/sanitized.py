"""The ops under AddressSanitizer and UndefinedBehaviorSanitizer: ``python -m tests.faults.sanitized --minutes 5``.

Compiles tlcr's library with both in a copy of the sources (build/sanitized, some minutes the first time), and has the
fuzzer call every op there with arguments that mostly do not fit. A read outside a tensor ends the process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPY = ROOT / "build" / "sanitized"
OVERRUN = """
import torch, tlcr
short = torch.ones(64, 64)
short.untyped_storage().resize_(16)
tlcr.ops.gated_silu(short, short, impl="cpp")
"""
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1"


def build() -> None:
    """Brings the copy up to date; only what changed is compiled."""
    COPY.mkdir(parents=True, exist_ok=True)
    for name in ("csrc", "kernels", "tests", "tlcr", ".ci"):
        shutil.rmtree(COPY / name, ignore_errors=True)
        shutil.copytree(
            ROOT / name,
            COPY / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.json"),
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md"):
        shutil.copy2(ROOT / name, COPY)
    compiler = COPY / "sanitizing-c++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" {FLAGS}\n', encoding="utf-8")
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "TLCR_BUILD": "cpu"}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=COPY, env=environment, check=True)


def _library(name: str) -> str:
    """The compiler's."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.sanitized", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", default="1")
    parser.add_argument("--seed", default="0")
    asked = parser.parse_args(arguments)
    build()
    # The first looks for the function that throws exceptions when it is loaded, and Python does not load the second.
    preloaded = [_library("libasan.so"), _library("libstdc++.so.6")]
    environment = os.environ | {
        "PYTHONPATH": str(COPY),
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python itself leaves memory behind
    }
    # Without kernels the fuzzer would go on: an op that says that it has none has refused its input in a sentence.
    overrun = subprocess.run([sys.executable, "-c", OVERRUN], cwd=COPY, env=environment, capture_output=True, text=True)
    if "ERROR: AddressSanitizer: " not in overrun.stderr:
        sys.exit(f"{overrun.stderr}\na read outside a tensor was not found, wanted kernels of {COPY} that are watched")
    fuzz = [sys.executable, "-m", "tests.faults.fuzz", "--only", "arguments of the ops"]
    return subprocess.run(
        [*fuzz, "--minutes", asked.minutes, "--seed", asked.seed], cwd=COPY, env=environment
    ).returncode


if __name__ == "__main__":
    raise SystemExit(main())
