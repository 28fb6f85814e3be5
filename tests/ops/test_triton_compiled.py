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

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.slow,
]


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


# Loads and stores of 16 bytes, and all others, in the program of a thread. The others are its masks where these are
# fewer than 16, and numbers of a row, a tile or a program.
LONG, FEW = "1024 x 4096", "8 x 131072"
MOVED = {
    ("reward_kernel", "fused_reward, 2 classes", LONG, "float32"): (4, 3),
    ("reward_kernel", "fused_reward, 2 classes", LONG, "bfloat16"): (12, 1),
    ("gae_kernel", "fused_gae, padded", LONG, "float32"): (8, 4),
    ("gae_kernel", "fused_gae, padded", LONG, "bfloat16"): (6, 4),
    ("whiten_kernel", "fused_gae, padded", LONG, "float32"): (9, 48),
    ("maps_kernel", "fused_gae, padded", FEW, "float32"): (4, 3),
    ("shared_kernel", "fused_gae, padded", FEW, "float32"): (8, 36),
    ("sums_kernel", "ppo_loss, token", LONG, "float32"): (16, 10),
    ("sums_kernel", "ppo_loss, token", LONG, "bfloat16"): (8, 10),
    ("gradients_kernel", "ppo_loss, token", LONG, "float32"): (20, 3),
    ("gradients_kernel", "ppo_loss, token", LONG, "bfloat16"): (10, 3),
    ("rms_norm_kernel", "rms_norm", LONG, "float32"): (8, 1),
    ("rms_norm_kernel", "rms_norm", LONG, "bfloat16"): (4, 1),
    ("rms_norm_x_kernel", "rms_norm", LONG, "float32"): (14, 1),
    ("rms_norm_x_kernel", "rms_norm", LONG, "bfloat16"): (7, 1),
    ("rms_norm_weight_kernel", "rms_norm", LONG, "float32"): (6, 1),
    ("rms_norm_weight_kernel", "rms_norm", LONG, "bfloat16"): (4, 1),
    ("gated_silu_kernel", "gated_silu", LONG, "float32"): (6, 0),
    ("gated_silu_kernel", "gated_silu", LONG, "bfloat16"): (3, 0),
    ("gated_silu_backward_kernel", "gated_silu", LONG, "float32"): (10, 0),
    ("gated_silu_backward_kernel", "gated_silu", LONG, "bfloat16"): (5, 0),
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
    found = {tuple(row[key] for key in ("kernel", "call", "shape", "dtype")): row for row in rows}
    assert {key: (found[key]["wide"], found[key]["narrow"]) for key in MOVED} == MOVED


def test_a_spill_would_be_seen() -> None:
    code = """
answer = []
for _, call in calls(torch.float32):
    with compiling(90, maxnreg=24) as compiled:
        call()
    answer += [read(kernel, ("", "", ""), 90).spilled for kernel in compiled if kernel.name == "_gae_kernel"]
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


def test_a_new_size_of_the_same_tile_compiles_at_most_twice() -> None:
    # All that Triton specialises on: 1, multiples of 16, and what takes more than 32 bits.
    code = """
answer = {}
for batch, length in ((2, 1001), (1, 999), (16, 1000), (2, 1008), (7, 1024), (2**22, 1000)):
    for _, call in calls(torch.bfloat16, batch, length):
        with compiling(90) as compiled:
            call()
        for kernel in compiled:
            answer.setdefault(kernel.name, set()).add(kernel.hash)
answer = {name: len(hashes) for name, hashes in answer.items()}
"""
    # Padded, and packed in tiles of two lengths; 2 and 3 classes; all tokens in one row and each row by itself.
    once = {"_adamw_kernel": 1, "_merge_kernel": 1, "_finish_kernel": 2}
    twice = {"_reward_kernel": 4, "_gae_kernel": 4, "_whiten_kernel": 4, "_counts_kernel": 2, "_sums_kernel": 4}
    twice |= {"_gradients_kernel": 2, "_rms_norm_kernel": 2, "_rms_norm_x_kernel": 2, "_rms_norm_weight_kernel": 2}
    twice |= {"_gated_silu_kernel": 2, "_gated_silu_backward_kernel": 2}
    assert compiling(code) == once | twice


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
            assert ".f64" in ptx or kernel == "_counts_kernel", kernel  # which has no numbers but integers
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
    assert lines[1].split()[-8:-3] == ["target", "warps", "registers", "spilled", "shared"]
    assert [line.split()[-8] for line in lines[2:]] == ["sm_90"] * (len(lines) - 2)
    assert any(line.startswith("gae_kernel") for line in lines)
