"""What nvcc makes of the kernels: registers, no spill, no local memory, 16-byte accesses. It needs no GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cuda.emulated import CSRC, KERNELS

pytestmark = pytest.mark.slow

TARGETS = ("80", "90", "100")
# A kernel's name within its mangled one, and the first letters of its template arguments.
NAME = re.compile(r"(score_backward_kernel|score_kernel|hidden_reward_kernel)I(f|d|6__half|13__nv_bfloat16)(\w*?)EEv")
# Every combination of type (backward also half precision from float), threads per row (or alignment) and number of
# tensors (or classes).
COUNT = {"score_kernel": 16, "score_backward_kernel": 24, "hidden_reward_kernel": 16}


class Resources(NamedTuple):
    kernel: str
    element: str
    arguments: str
    target: str
    registers: int
    stack: int
    spills: int


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, in CUDA_HOME, or among those that Triton brings."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    triton = importlib.util.find_spec("triton")
    bundled = triton and triton.origin and str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for folder in (None, *(f"{home}/bin" for home in homes if home), bundled):
        found = shutil.which(name) if folder is None else shutil.which(name, path=folder)
        if found:
            return found
    return None


def read_report(report: str) -> Iterator[Resources]:
    """What `-Xptxas -v` says, three lines of interest to a kernel."""
    entries = re.split(r"^ptxas info\s+: Compiling entry function ", report, flags=re.MULTILINE)[1:]
    for entry in entries:
        head = re.match(r"'(\w+)' for 'sm_(\d+)'", entry)
        assert head, f"an entry function whose name and target are not where they were: {entry[:200]}"
        name = NAME.search(head[1])
        assert name, f"a kernel that this test does not know: {head[1]}"
        stack, stores, loads = (
            int(re.search(rf"(\d+) bytes {what}", entry)[1])  # type: ignore[index]
            for what in ("stack frame", "spill stores", "spill loads")
        )
        registers = int(re.search(r"Used (\d+) registers", entry)[1])  # type: ignore[index]
        yield Resources(name[1], name[2], name[3], head[2], registers, stack, stores + loads)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Resources], list[Path]]:
    nvcc = tool("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH and not in CUDA_HOME; it compiles the CUDA kernels, and needs no GPU for that")
    targets = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS]
    resources, binaries = [], []
    for name in KERNELS:
        binary = tmp_path_factory.getbasetemp() / f"{name}.fatbin"
        command = [nvcc, "-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", *targets, "-fatbin", "-o", str(binary)]
        done = subprocess.run([*command, str(CSRC / "kernels" / "cuda" / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr.lower(), done.stderr
        resources += read_report(done.stdout + done.stderr)
        binaries.append(binary)
    return resources, binaries


def test_every_kernel_is_compiled_for_every_target(compiled: tuple[list[Resources], list[Path]]) -> None:
    resources, _ = compiled
    for target in TARGETS:
        for kernel, count in COUNT.items():
            found = [r for r in resources if (r.kernel, r.target) == (kernel, target)]
            assert len({(r.element, r.arguments) for r in found}) == len(found) == count, f"{kernel} for sm_{target}"


def test_no_kernel_spills(compiled: tuple[list[Resources], list[Path]]) -> None:
    resources, _ = compiled
    assert resources
    assert [r for r in resources if r.stack or r.spills] == []


def test_registers_leave_room_for_enough_warps(compiled: tuple[list[Resources], list[Path]]) -> None:
    """24 warps of a multiprocessor's 64, from 65536 registers; double is there to be right, not fast."""
    resources, _ = compiled
    assert [r for r in resources if r.element != "d" and r.registers > 80] == []
    assert max(r.registers for r in resources) <= 255


def test_the_instructions_are_those_that_were_meant(compiled: tuple[list[Resources], list[Path]]) -> None:
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("cuobjdump is not on PATH, not in CUDA_HOME and not in triton; it reads the machine code")
    seen = 0
    for binary in compiled[1]:
        done = subprocess.run([cuobjdump, "-sass", str(binary)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for function in re.split(r"^\s*Function : ", done.stdout, flags=re.MULTILINE)[1:]:
            name = NAME.search(function)
            assert name, function[:200]
            kernel, element, arguments = name.groups()
            seen += 1
            assert not re.search(r"\b(LDL|STL)\b", function), f"{name[0]} uses local memory"
            by_packs = kernel != "hidden_reward_kernel" or arguments.endswith("Lb1E")
            assert bool(re.search(r"\bLDG\.E[.\w]*\.128\b", function)) == by_packs, f"{name[0]}: 16-byte loads"
            if kernel == "score_backward_kernel":
                narrows = element == "f" and not arguments.startswith("f")  # four results of 2 bytes
                width = 64 if narrows else 128
                assert re.search(rf"\bSTG\.E[.\w]*\.{width}\b", function), f"{name[0]}: {width}-bit stores"
            if kernel != "hidden_reward_kernel" and element != "d":
                assert "MUFU.EX2" in function, name[0]
    assert seen == len(TARGETS) * sum(COUNT.values())
