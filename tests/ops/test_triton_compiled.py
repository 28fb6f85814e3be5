"""Triton's kernels as a GPU would get them: compiled for named targets, which needs no GPU.

Triton decides once per process whether it compiles or interprets, so each test asks a process of its own.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def compiling(code: str) -> Any:
    """What `code` leaves in `answer`, run where kernels compile."""
    imports = "import json, torch\nfrom benchmarks.kernel_resources import calls, compiling, read, resources\n"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", f"{imports}{code}\nprint(json.dumps(answer))"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Loads and stores of 16 bytes, and others, in the program of a thread: what moves 8 neighbouring tokens of each tensor
# (of rewards 4 in float32, whose masks are 4 bytes), and beside it numbers of a row, a tile or a program.
MOVED = {
    ("float32", "fused_reward, 2 classes", "reward_kernel"): (4, 3),
    ("bfloat16", "fused_reward, 2 classes", "reward_kernel"): (13, 1),
    ("float32", "fused_gae, padded", "gae_kernel"): (8, 4),
    ("bfloat16", "fused_gae, padded", "gae_kernel"): (6, 4),
    ("float32", "fused_gae, padded", "whiten_kernel"): (9, 48),
    ("float32", "fused_gae, shared out", "maps_kernel"): (4, 3),
    ("float32", "fused_gae, shared out", "shared_kernel"): (8, 36),
    ("float32", "ppo_loss, token", "sums_kernel"): (16, 10),
    ("bfloat16", "ppo_loss, token", "sums_kernel"): (8, 10),
    ("float32", "ppo_loss, token", "gradients_kernel"): (20, 3),
    ("bfloat16", "ppo_loss, token", "gradients_kernel"): (10, 3),
}


@pytest.mark.parametrize("target", [80, 90, 100])
def test_no_kernel_spills_and_rows_are_moved_by_16_bytes(target: int) -> None:
    rows = compiling(f"answer = [one._asdict() for one in resources(({target},))]")
    kernels = {"reward_kernel", "adamw_kernel", "counts_kernel", "sums_kernel", "finish_kernel", "gradients_kernel"}
    kernels |= {"gae_kernel", "maps_kernel", "shared_kernel", "merge_kernel", "whiten_kernel"}
    kernels |= {"rms_norm_kernel", "rms_norm_x_kernel", "rms_norm_weight_kernel"}
    kernels |= {"gated_silu_kernel", "gated_silu_backward_kernel"}
    assert {row["kernel"] for row in rows} == kernels
    assert [row for row in rows if row["spilled"] != 0] == []
    assert all(16 <= row["registers"] < 255 for row in rows)
    assert all(row["programs"] * row["warps"] >= 8 for row in rows)
    found = {(row["dtype"], row["call"], row["kernel"]): (row["wide"], row["narrow"]) for row in rows if row["aligned"]}
    assert {key: found.get(key) for key in MOVED} == MOVED


def test_a_spill_would_be_seen() -> None:
    code = """
answer = []
for _, call in calls(torch.float32):
    with compiling(90, maxnreg=24) as compiled:
        call()
    answer += [read(kernel, "", 90).spilled for kernel in compiled if kernel.name == "_gae_kernel"]
"""
    assert all(spilled > 0 for spilled in compiling(code))


def test_offsets_of_packed_sequences_are_asserted_on_the_device() -> None:
    code = """
answer = {}
for name, call in calls(torch.float32):
    with compiling(90) as compiled:
        call()
    for kernel in compiled:
        if kernel.name == "_gae_kernel":
            answer[name] = "__assertfail" in kernel.asm["ptx"]
"""
    assert compiling(code) == {"fused_gae, padded": False, "fused_gae, packed": True}


def test_a_new_size_compiles_nothing() -> None:
    # All that Triton specialises on: 1, multiples of 16, and what takes more than 32 bits.
    code = """
answer = {}
for batch, length in ((2, 5), (1, 1), (2, 16), (16, 1), (7, 1000), (3, 4096), (2, 2**31), (2**31, 2), (1, 2**33)):
    hashes = set()
    for _, call in calls(torch.bfloat16, batch, length):
        with compiling(90) as compiled:
            call()
        hashes.update(kernel.hash for kernel in compiled)
    answer[f"{batch} x {length}"] = sorted(hashes)
"""
    compiled = compiling(code)
    assert len(compiled) == 9
    first = compiled["2 x 5"]
    assert len(first) >= 9
    for shape, hashes in compiled.items():
        assert hashes == first, shape


def test_numbers_reach_a_kernel_in_full_precision() -> None:
    # Triton passes Python's numbers as float32 unless told otherwise; nor may one pass through float32 later.
    code = """
answer = []
for _, call in calls(torch.float64):
    with compiling(90) as compiled:
        call()
    for kernel in compiled:
        numbers = {name: kind for name, kind in kernel.src.signature.items() if kind in ("fp32", "fp64")}
        answer.append((kernel.name, numbers, kernel.asm["ptx"]))
"""
    seen = set()
    for kernel, numbers, ptx in compiling(code):
        seen |= numbers.keys()
        assert "fp32" not in numbers.values(), kernel
        if kernel != "_adamw_kernel":  # whose state is float32
            assert re.findall(r"cvt\S*\.f32\.f64|cvt\S*\.f64\.f32", ptx) == [], kernel
        assert ".f64" in ptx
    assert seen >= {"gamma", "lam", "temperature", "scale", "clip", "band", "low", "high", "denominator", "floor"}
    assert seen >= {"kl_coef", "value_coef", "entropy_coef", "dual_clip", "value_clip"}


@pytest.mark.parametrize("target", [80, 90, 100])
def test_the_optimiser_moves_16_bytes_at_a_time(target: int) -> None:
    # Per thread 8 weights: three tensors of 2 bytes are read by one access each and two of 4 bytes by two.
    code = f"""
answer = []
for name, call in calls(torch.bfloat16):
    if name == "adamw_step":
        with compiling({target}) as compiled:
            call()
        (kernel,) = compiled
        answer = [kernel.metadata.shared, kernel.asm["ptx"]]
"""
    shared, ptx = compiling(code)
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 7
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == 6
    assert shared == 0 and "bar.sync" not in ptx
    # What is left are the table and the loop over what is not whole or not aligned, a weight to each thread.
    assert len(re.findall(r"st\.global\.b", ptx)) == 4


def test_the_listing_is_for_people() -> None:
    arguments = ["--targets", "90", "--dtypes", "float32"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_resources", *arguments],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"triton \d+\.\d+\.\d+", lines[0])
    assert lines[1].split()[-5:] == ["target", "warps", "registers", "spilled", "shared"]
    assert [line.split()[-5] for line in lines[2:]] == ["sm_90"] * (len(lines) - 2)
    assert any(line.startswith("gae_kernel") for line in lines)
