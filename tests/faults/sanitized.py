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
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1"


def build() -> None:
    """Brings the copy up to date; only what changed is compiled."""
    for name in ("csrc", "kernels", "tests", "tlcr", ".ci"):
        shutil.copytree(
            ROOT / name,
            COPY / name,
            dirs_exist_ok=True,
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.sanitized", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", default="1")
    parser.add_argument("--seed", default="0")
    asked = parser.parse_args(arguments)
    COPY.mkdir(parents=True, exist_ok=True)
    build()
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {
        "PYTHONPATH": str(COPY),
        "LD_PRELOAD": found.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python itself leaves memory behind
    }
    # Without kernels the fuzzer would go on: an op that says that it has none has refused its input in a sentence.
    loaded = "from tlcr.ops._extension import unavailable; raise SystemExit(unavailable('cpu'))"
    subprocess.run([sys.executable, "-c", loaded], cwd=COPY, env=environment, check=True)
    fuzz = [sys.executable, "-m", "tests.faults.fuzz", "--only", "arguments of the ops"]
    return subprocess.run(
        [*fuzz, "--minutes", asked.minutes, "--seed", asked.seed], cwd=COPY, env=environment
    ).returncode


if __name__ == "__main__":
    raise SystemExit(main())
