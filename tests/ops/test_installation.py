"""The installation that is tested is the one that was meant, and its compiled code is for the GPUs that it names."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

import tlcr

EXPECTED = os.environ.get("TLCR_EXPECTED")
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key


@pytest.mark.skipif(EXPECTED is None, reason="TLCR_EXPECTED is not set: any installation will do")
def test_this_is_the_installation_that_was_meant() -> None:
    info = tlcr.build_info()
    assert (info["extension"] or "none", info["problem"]) == (EXPECTED, None)
    assert Path(tlcr.__file__).parent.parent == Path(os.environ["PYTHONPATH"])
    assert info["version"] == tlcr.__version__
    on_cpu = {status.auto for status in tlcr.ops.available() if status.device == "cpu"}
    assert on_cpu == ({"reference"} if EXPECTED == "none" else {"cpp"})


@pytest.mark.skipif(tlcr.build_info()["extension"] != "cuda", reason="not a CUDA build")
class TestCUDABuild:
    def test_every_operator_has_a_kernel_for_the_cpu_and_where_it_says_so_one_for_gpus(self) -> None:
        """Whether or not there is a GPU here."""
        assert [op.name for op in tlcr.ops.OPS if op.on_gpu == "reference"] == []
        on_cpu = [operator.name for op in tlcr.ops.OPS for operator in op.cpp_operators]
        on_gpus = [operator.name for op in tlcr.ops.OPS if op.on_gpu != "reference" for operator in op.operators]
        assert [name for name in on_cpu if not has_kernel(f"tlcr::{name}", "CPU")] == []
        assert [name for name in on_gpus if not has_kernel(f"tlcr::{name}", "CUDA")] == []

    def test_the_library_holds_code_for_every_architecture_of_its_record(self) -> None:
        triton = importlib.util.find_spec("triton")
        assert triton is not None and triton.origin is not None, "a CUDA build of torch comes with triton"
        tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        library = Path(tlcr.__file__).with_name("libtlcr.so")
        listed = {
            kind: subprocess.run([tool, option, library], capture_output=True, text=True, check=True).stdout
            for kind, option in (("code", "--list-elf"), ("ptx", "--list-ptx"))
        }
        for arch in re.split(r"[ ;]", tlcr.build_info()["arch_list"]):
            number = arch.removesuffix("+PTX").replace(".", "")
            assert f".sm_{number}." in listed["code"]
            assert (f".sm_{number}." in listed["ptx"]) == arch.endswith("+PTX")
