"""The emulated kernels, compiled once per run of the tests, whatever the number of pytest's processes."""

import fcntl
import shutil
from pathlib import Path

import pytest

from tests.cuda.emulated import CSRC, EMULATOR, KERNELS, EmulatedKernels, compile_emulated


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH; the CUDA kernels are emulated by compiling them with it")
    own = tmp_path_factory.getbasetemp()
    folder = own if worker_id == "master" else own.parent
    path = folder / "emulated_kernels.so"
    with open(folder / "emulated_kernels.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            sources = [*(CSRC / "kernels" / "cuda" / name for name in KERNELS), EMULATOR / "entry.cpp"]
            compile_emulated(path, sources, flags=["-shared", "-fPIC"])
    return path


@pytest.fixture
def kernels(library: Path) -> EmulatedKernels:
    kernels = EmulatedKernels(library)
    kernels.set_order(0)
    return kernels
