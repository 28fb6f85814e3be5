"""The trainer on a device that is not the CPU, on a machine without a GPU: no tensor is left behind on the CPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.stand_in import compile_library

ROOT = Path(__file__).parents[2]
if torch.version.cuda is not None:
    pytest.skip("this torch has CUDA of its own", allow_module_level=True)
if shutil.which("g++") is None:
    pytest.skip("g++ is not on PATH; it compiles the stand-in for a GPU", allow_module_level=True)

FILES = (
    "tests/training/test_checkpoint.py",
    "tests/recipes/test_train_ppo.py",
    "tests/experiment/test_pipeline.py",
)
WHAT_A_GPU_REFUSES = """
import pytest, torch

def test_devices_do_not_mix():
    there, here = torch.randn(3, 4, device="cuda", requires_grad=True), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        there + here
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.nn.functional.embedding(here[0].long(), there)
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        there.detach().numpy()
    loss = (there * here.to(there.device)).softmax(-1)[:, torch.tensor([1, 2])].sum() + torch.tensor(1.0)
    loss.backward()
    assert there.grad is not None and there.grad.device == loss.device == torch.device("cuda", 0)
    torch.testing.assert_close(loss.cpu(), (there.cpu() * here).softmax(-1)[:, 1:3].sum() + 1)

def test_views_and_changes_in_place_share_memory():
    whole = torch.zeros(2, 3, device="cuda")
    whole.t()[1].fill_(2)
    whole.view(6)[4:].add_(1)
    torch.add(whole, 1, out=(out := torch.empty(0, device="cuda")))
    assert whole.tolist() == [[0, 2, 0], [0, 3, 1]] and out.tolist() == [[1, 3, 1], [1, 4, 2]]
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stand_in") / "gpu.so"
    compile_library(path)
    return path


def on_the_stand_in(library: Path, *arguments: str) -> str:
    """What pytest ended with, run where the stand-in is the GPU."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.gpu.stand_in", str(library), "-q", "-p", "no:benchmark", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_it_refuses_what_a_gpu_refuses(library: Path, tmp_path: Path) -> None:
    tests = tmp_path / "test_refused.py"
    tests.write_text(WHAT_A_GPU_REFUSES)
    assert "2 passed" in on_the_stand_in(library, "-c", os.devnull, str(tests))


@pytest.mark.slow
def test_the_trainers_tests_pass_on_a_device_that_is_not_the_cpu(library: Path) -> None:
    said = on_the_stand_in(
        library, "-m", "gpu", *FILES, "-k", "every_reward or other_settings or bfloat16 or random_state"
    )
    assert re.match(r"7 passed, \d+ deselected", said), said
