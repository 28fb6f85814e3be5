"""A machine that has a GPU as far as Python can tell: pytest, where `torch.cuda` is there and its device is a stand-in.

    python -m tests.gpu.stand_in LIBRARY PYTEST_ARGUMENTS...

`stand_in.cpp` says what the device is. It shows that no tensor is left on the CPU beside a model on the device, and
nothing of what a GPU computes: every operator runs on the CPU, those of tlcr by their C++ kernels or specifications.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")


def compile_library(output: Path) -> None:
    """The stand-in for the torch that is installed; nothing is optimised, because compiling takes most of the time."""
    import torch
    from torch.utils.cpp_extension import include_paths

    libraries = Path(torch.__file__).parent / "lib"
    headers = [f"-isystem{path}" for path in include_paths()]
    linked = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", "-Wall", "-Werror", *headers, str(SOURCE), *linked]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    done = subprocess.run([*command, abi, "-o", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def install(library: Path) -> None:
    """Loads the stand-in, and torch after it, with what `torch.cuda` says of a machine with one GPU."""
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import torch

    # Neither a kernel of Triton nor its interpreter can run on this device.
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *of: None if name == "triton" else find(name, *of)

    said = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_name": "a stand-in for a GPU",
        "get_device_capability": (9, 0),
        "mem_get_info": (2**33, 2**34),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        # There is nothing to wait for, to seed or to free.
        **dict.fromkeys(("_lazy_init", "set_device", "synchronize", "manual_seed", "manual_seed_all"), None),
        **dict.fromkeys(("empty_cache", "reset_peak_memory_stats"), None),
    }
    for name, answer in said.items():
        setattr(torch.cuda, name, answering(answer))
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)


def answering(answer: object) -> Callable[..., object]:
    return lambda *_, **__: answer  # a function for each name: torch keeps what it knows of them by identity


if __name__ == "__main__":
    install(Path(sys.argv[1]))
    import pytest

    sys.exit(pytest.main(sys.argv[2:]))
