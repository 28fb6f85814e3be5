"""The CPU kernels of every instruction set: each is compiled for its own and no other, and passes the tests."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.preloaded import run as in_fresh_process
from tlcr.ops import build_info

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "kernels" / "cpu"
# The widest registers that the code may name, and has to.
REGISTERS = {"baseline": "xmm", "avx2": "ymm", "avx512": "zmm"}

built = pytest.mark.skipif(build_info()["instruction_set"] is None, reason="the C++ kernels are not built here")
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")


def run(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The kernels compiled for each instruction set, without optimisation: nothing is inlined away that need not be."""
    compiler = shutil.which("c++")
    if compiler is None or shutil.which("nm") is None or shutil.which("objdump") is None:
        pytest.skip("wants c++, nm and objdump")
    folder = tmp_path_factory.mktemp("objects")
    for name in REGISTERS:
        flags = ("-std=c++17", "-O0", "-fPIC", "-Wall", "-Werror")
        run(compiler, *flags, "-c", SOURCES / f"{name}.cpp", "-o", folder / f"{name}.o")
    return {name: folder / f"{name}.o" for name in REGISTERS}


@pytest.mark.slow
@x86
def test_nothing_is_shared_between_instruction_sets(objects: dict[str, Path]) -> None:
    """A weak symbol would be one function for all three: whichever the linker meets first, perhaps AVX-512's."""
    for name, path in objects.items():
        lines = run("nm", "--demangle", "--defined-only", "--extern-only", path).splitlines()
        symbols = [
            line.split(maxsplit=2)[1:] for line in lines if "__gxx_personality" not in line
        ]  # a pointer, not code
        assert symbols == [["D", f"tlcr::cpu::{name}::table"]]


@x86
def test_each_is_compiled_for_its_own_registers(objects: dict[str, Path]) -> None:
    wider = list(REGISTERS.values())
    for name, path in objects.items():
        named = set(re.findall(r"%([xyz]mm)\d", run("objdump", "--disassemble", path)))
        assert REGISTERS[name] in named
        assert not named & set(wider[wider.index(REGISTERS[name]) + 1 :])


@built
@x86
@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2"])
def test_the_ops_on_a_lesser_instruction_set(instruction_set: str) -> None:
    """The tests of the ops once more, as on an older processor."""
    capability = {"baseline": "default", "avx2": "avx2"}[instruction_set]
    say = "import tlcr; print(tlcr.build_info()['instruction_set'])"
    assert run(sys.executable, "-c", say, ATEN_CPU_CAPABILITY=capability).strip() == instruction_set
    files = [
        f"tests/ops/test_{name}.py"
        for name in (
            *("fused_reward", "fused_gae", "ppo_loss", "score_tokens", "scoring_rows"),
            *("adamw_step", "layer_ops"),
        )
    ]
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "cpp", "-m", "not slow")
    passed = run(sys.executable, "-m", "pytest", *options, *files, ATEN_CPU_CAPABILITY=capability)
    assert re.search(r"\d{3,} passed", passed) and "failed" not in passed


SCORE_ON_THREADS = """
import hashlib, json, time
import torch
from tlcr import ops

logits, ref_logits = torch.randn(2, 64, 100_003)
token_ids = torch.randint(100_003, (64,))
logits.requires_grad_()
for threads in (1, 2):
    torch.set_num_threads(threads)
    elsewhere = everywhere = 0.0
    for _ in range(8):
        begin, begin_here = time.process_time(), time.thread_time()
        scores = ops.score_tokens(logits, token_ids, ref_logits=ref_logits, impl="cpp")
        everywhere += time.process_time() - begin
        elsewhere += time.process_time() - begin - (time.thread_time() - begin_here)
    (grad,) = torch.autograd.grad(scores.logprobs.sum() + scores.entropy.sum() + scores.kl.sum(), logits)
    digest = hashlib.sha256()
    for tensor in (*scores, grad):
        digest.update(tensor.detach().numpy().tobytes())
    print(json.dumps({"share_of_others": elsewhere / everywhere, "bits": digest.hexdigest()}))
"""


@built
def test_threads_share_the_rows_and_change_no_bit() -> None:
    done = in_fresh_process(SCORE_ON_THREADS, Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    one, two = map(json.loads, done.stdout.splitlines())
    assert one["bits"] == two["bits"]
    # Two threads have half of the rows each.
    assert one["share_of_others"] < 0.1 and two["share_of_others"] > 0.25
