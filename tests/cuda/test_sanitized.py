"""The emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in place of compute-sanitizer."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cuda.emulated import CSRC, EMULATOR, KERNELS, compile_emulated


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH; the CUDA kernels are emulated by compiling them with it")
    path = tmp_path_factory.mktemp("sanitized") / "kernels"
    flags = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compile_emulated(
        path, [*(CSRC / "kernels" / "cuda" / name for name in KERNELS), EMULATOR / "sanitize.cpp"], flags=flags
    )
    return path


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "ASAN_OPTIONS")}
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_no_access_outside_and_no_undefined_behaviour(program: Path) -> None:
    done = run(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all kernels ran\n"


def test_an_access_outside_is_found(program: Path) -> None:
    done = run(program, "overrun")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and "scoring.cu" in done.stderr, done.stderr
