"""Compiled kernels are loaded beside the torch they were built for, and refused beside another, with the remedy."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tlcr
from tests.preloaded import run
from tlcr.errors import BackendUnavailable
from tlcr.ops import _extension, _library, _registry
from tlcr.ops._extension import LIBRARY, BuildRecord, has_code_for, library_facts, mismatch, outdated, strange
from tlcr.ops._spec import Op

PACKAGE = Path(tlcr.__file__).parent
CPU = BuildRecord("0.1.0", "cpu", "no nvcc", "2.13.0+cpu", "2.10", None, None)
CUDA = BuildRecord("0.1.0", "cuda", None, "2.11.0+cu130", "2.10", "13.0", "8.0;9.0")


@pytest.mark.parametrize(
    ("record", "torch_version", "torch_cuda"),
    [
        (CPU, "2.10.0+cpu", None),
        (CPU, "2.11.1", "13.0"),
        (CPU, "2.14.0a0+git1234", "12.8"),
        (CUDA, "2.10.1+cu130", "13.0"),
        (CUDA, "2.15.2", "13.2"),
    ],
)
def test_every_torch_from_the_oldest_on_fits(record: BuildRecord, torch_version: str, torch_cuda: str | None) -> None:
    assert mismatch(record, torch_version, torch_cuda) is None


@pytest.mark.parametrize(
    ("record", "torch_version", "torch_cuda", "said"),
    [
        (CPU, "2.9.1+cpu", None, "tlcr's compiled kernels need torch>=2.10,<3 and meet torch 2.9.1+cpu"),
        (CPU, "2.1.1", None, "need torch>=2.10,<3 and meet torch 2.1.1"),
        (CPU, "3.0.0", None, "need torch>=2.10,<3 and meet torch 3.0.0"),
        (CPU._replace(oldest_torch=None), "2.12.0", None, "need torch>=2.13.0+cpu,<3 and meet torch 2.12.0"),
        (CUDA, "2.11.0+cu126", "12.6", "were built with CUDA 13.0, and meet torch 2.11.0+cu126, for CUDA 12.6"),
        (CUDA, "2.11.0+cpu", None, "were built with CUDA 13.0, and meet torch 2.11.0+cpu, a CPU build"),
    ],
)
def test_an_older_torch_or_another_cuda_does_not(
    record: BuildRecord, torch_version: str, torch_cuda: str | None, said: str
) -> None:
    assert (mismatch(record, torch_version, torch_cuda) or "").endswith(said)


@pytest.mark.parametrize("with_cuda", [False, True])
def test_a_library_older_than_its_sources_is_outdated(tmp_path: Path, with_cuda: bool) -> None:
    library, header, kernel = (
        tmp_path / name for name in ("libtlcr.so", "csrc/kernels/arguments.h", "csrc/kernels/cuda/scoring.cu")
    )
    for path, written in ((library, 20), (header, 10), (kernel, 10)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (written, written))
    assert outdated(library, tmp_path / "csrc", with_cuda=with_cuda) is None
    os.utime(kernel, (30, 30))
    said = outdated(library, tmp_path / "csrc", with_cuda=with_cuda)
    assert said == (f"tlcr's compiled kernels are older than {kernel}, from which they are made" if with_cuda else None)
    os.utime(header, (40, 40))
    assert str(header) in (outdated(library, tmp_path / "csrc", with_cuda=with_cuda) or "")
    assert outdated(library, tmp_path / "no-checkout", with_cuda=with_cuda) is None


def test_sources_of_another_package_are_not_those_of_the_library(tmp_path: Path) -> None:
    """Some leave a folder `csrc` of theirs in site-packages, beside ours."""
    library, theirs = tmp_path / "tlcr" / "libtlcr.so", tmp_path / "csrc" / "kernels" / "attention.cu"
    for path, written in ((library, 20), (theirs, 30)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (written, written))
    assert outdated(library, tmp_path / "csrc", with_cuda=True) is None


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("8.0;8.6;8.9;9.0;10.0;12.0+PTX", (7, 5), False),
        ("8.0;8.6;8.9;9.0;10.0;12.0+PTX", (8, 0), True),
        ("8.0;8.6;8.9;9.0;10.0;12.0+PTX", (8, 7), True),
        ("8.0;8.6;8.9;9.0;10.0;12.0+PTX", (10, 3), True),
        ("8.0;8.6;8.9;9.0;10.0;12.0+PTX", (12, 1), True),
        ("8.0;8.6;8.9;9.0;10.0;12.0+PTX", (13, 0), True),
        ("8.0;8.6;8.9;9.0;10.0;12.0+PTX", (11, 0), False),
        ("8.6", (8, 0), False),
        ("8.6 9.0", (9, 0), True),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("8.0+PTX;9.0", (12, 0), True),
        ("9.0+PTX", (8, 9), False),
        ("9.0a", (9, 0), True),
        ("10.0a+PTX", (10, 3), False),
        ("10.0a+PTX", (12, 0), False),
        ("10.0f", (10, 3), True),
        ("10.0f", (12, 0), False),
        ("Hopper", (7, 5), True),
    ],
)
def test_which_gpus_run_what_was_compiled(archs: str, capability: tuple[int, int], runs: bool) -> None:
    assert has_code_for(archs, capability) == runs


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, int]]]:
    """GPUs that torch seems to see, by name and compute capability, beside kernels for 8.0 and 9.0."""
    seen: list[tuple[str, tuple[int, int]]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: seen[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: seen[index][1])
    monkeypatch.setattr(_extension, "read_record", lambda: CUDA)
    return seen


def test_a_gpu_that_cannot_run_the_kernels_is_named(gpus: list[tuple[str, tuple[int, int]]]) -> None:
    gpus.append(("NVIDIA A100", (8, 0)))
    assert _extension.gpu_problem() is None
    gpus.append(("Tesla T4", (7, 5)))
    assert (_extension.gpu_problem() or "").startswith(
        "tlcr's CUDA kernels were compiled for 8.0;9.0, and GPU 1 (Tesla T4) is of 7.5; hide it by "
        "CUDA_VISIBLE_DEVICES, or compile them for it: TORCH_CUDA_ARCH_LIST=7.5 pip install"
    )


def test_auto_takes_no_kernels_that_a_gpu_cannot_run(
    gpus: list[tuple[str, tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As is found when torch initialises CUDA, and not at import."""
    waiting: list[Callable[[], None]] = []
    monkeypatch.setattr(torch.cuda, "_lazy_call", waiting.append)
    monkeypatch.setattr(_library, "define", lambda ops: None)
    monkeypatch.setattr(_extension, "load", lambda: None)
    monkeypatch.setattr(_extension, "unavailable", lambda device_type: None)
    op = Op(
        door=tlcr.score_tokens,
        arguments=tuple,
        results=(),
        reference=lambda arguments: None,
        fake=lambda arguments: None,
        cuda=True,
    )
    gpus.append(("NVIDIA A100", (8, 0)))
    _registry.register([op])
    for capability, usable in (((8, 0), True), ((7, 5), False)):
        gpus[0] = ("GPU", capability)
        waiting[0]()
        assert (("cuda", "cuda") in op.implementations) == usable
        assert op.implementations["auto", "cuda"] is op.implementations["cuda" if usable else "reference", "cuda"]
    with pytest.raises(BackendUnavailable, match=r"impl='cuda' is unavailable: .*GPU 0 \(GPU\) is of 7\.5"):
        op("cuda", torch.device("cuda"), ())


@pytest.fixture
def installation(tmp_path: Path) -> Path:
    """A copy of the package that no pip knows, without its extension."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    shutil.copytree(PACKAGE, tmp_path / "tlcr", ignore=ignored, ignore_dangling_symlinks=True)
    return tmp_path


def record(installation: Path, **facts: str | None) -> None:
    built = {**CPU._asdict(), **facts}
    (installation / "tlcr" / "_build.json").write_text(json.dumps(built), encoding="utf-8")


USE = """
import sys, torch, tlcr, tlcr.errors
rewards, values = torch.ones(1, 2), torch.zeros(1, 2)
print(tlcr.fused_gae(rewards, values)[1])
print(tlcr.build_info())
try:
    tlcr.fused_gae(rewards, values, impl="cpp")
except tlcr.errors.BackendUnavailable as error:
    print(error)
print("loaded", torch.ops.loaded_libraries)
"""


def test_an_extension_for_another_torch_is_said_at_import_and_not_loaded(installation: Path) -> None:
    record(installation, oldest_torch="2.99")
    done = run(USE, installation)
    assert done.returncode == 0, done.stderr
    said = f"tlcr's compiled kernels need torch>=2.99,<3 and meet torch {torch.__version__}; to mend it: pip"
    assert done.stderr.count(f"ExtensionWarning: {said}") == 1
    assert "tensor([[1.9500, 1.0000]])" in done.stdout
    assert f"impl='cpp' is unavailable: {said}" in done.stdout
    assert "loaded set()" in done.stdout
    assert "'extension': 'cpu'" in done.stdout and "'problem': \"tlcr's compiled kernels need" in done.stdout


def test_a_library_that_cannot_be_loaded_is_said_with_the_remedy(installation: Path) -> None:
    record(installation)
    library = installation / "tlcr" / "libtlcr.so"
    for reason in (f"{library.parent} has no {library.name}", f"{library}: "):
        done = run(USE, installation)
        assert done.returncode == 0, done.stderr
        assert f"ExtensionWarning: tlcr's compiled kernels cannot be loaded: {reason}" in done.stderr
        assert "; to mend it: pip install --no-build-isolation" in done.stderr
        library.write_text("not a library")


def test_who_turns_warnings_into_errors_gets_one_at_the_ops_and_not_at_tlcr(installation: Path) -> None:
    record(installation, oldest_torch="2.99")
    assert run("import tlcr", installation, "error").returncode == 0
    done = run("import tlcr.ops", installation, "error:RuntimeWarning")
    assert done.returncode == 1
    assert "tlcr.errors.ExtensionWarning: tlcr's compiled kernels need torch>=2.99" in done.stderr


def test_a_pure_installation_is_silent_and_says_why_when_asked(installation: Path) -> None:
    record(installation, extension=None, torch=None, remark="there was no torch")
    done = run(USE, installation, "error:RuntimeWarning")
    assert done.returncode == 0, done.stderr
    assert "is unavailable: tlcr has no compiled kernels here: there was no torch; to build them: pip" in done.stdout
    assert "'problem': None, 'rebuild': 'pip install --no-build-isolation" in done.stdout
    (installation / "tlcr" / "_build.json").unlink()
    assert "it runs from its sources, which were never built" in run(USE, installation).stdout


class Distribution:
    def __init__(self, direct_url: dict | None) -> None:
        self.direct_url = direct_url

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.direct_url is None else json.dumps(self.direct_url)


@pytest.mark.parametrize(
    ("direct_url", "ending"),
    [
        (None, "--no-binary tlcr-rlhf tlcr-rlhf"),
        ({"url": "file:///a/tlcr.whl", "archive_info": {}}, "--no-binary tlcr-rlhf tlcr-rlhf"),
        ({"url": "file:///a%20b/tlcr", "dir_info": {}}, "--no-binary tlcr-rlhf '/a b/tlcr'"),
        ({"url": "file:///a/tlcr", "dir_info": {"editable": True}}, "--no-deps --editable /a/tlcr"),
    ],
)
def test_the_remedy_builds_what_was_installed(
    direct_url: dict | None, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_extension, "distribution", lambda _: Distribution(direct_url))
    assert _extension._rebuild().startswith("pip install --no-build-isolation --no-deps")
    assert _extension._rebuild().endswith(ending)


compiled = pytest.mark.skipif(_extension.unavailable("cpu") is not None, reason="no C++ kernels here")


@compiled
def test_the_library_is_what_its_record_says() -> None:
    itself, info = library_facts(), tlcr.build_info()
    assert re.match(r"\d+\.\d+\.\d+", info["torch"])[0] == itself["torch"]
    assert info["cuda"] == itself["cuda"]
    assert (info["extension"] == "cuda") == (info["cuda"] is not None) == (info["arch_list"] is not None)
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    assert info["problem"] is None and info["version"] == tlcr.__version__


@compiled
def test_the_library_knows_no_python_and_of_torch_only_the_stable_functions() -> None:
    """Those are of C, so that their names are not mangled; torch's functions of C++ change from version to version."""
    if shutil.which("nm") is None:
        pytest.skip("wants nm")
    listed = subprocess.run(["nm", "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True)
    wanted = {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()}
    assert "torch_call_dispatcher" in wanted
    assert [name for name in wanted if re.match("_?Py|_ZNK?(2at|3c10|5torch|6caffe2)", name)] == []


@compiled
@pytest.mark.parametrize(("limit", "taken"), [("default", "baseline"), ("avx2", "avx2")])
def test_the_kernels_are_limited_as_those_of_torch_are(limit: str, taken: str) -> None:
    code = "import torch, tlcr; print(torch.backends.cpu.get_cpu_capability(), tlcr.build_info()['instruction_set'])"
    done = subprocess.run(  # and not as the others: torch reads the limit when it is imported
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        env={**os.environ, "ATEN_CPU_CAPABILITY": limit},
        capture_output=True,
        text=True,
        timeout=120,
    )
    capability, instruction_set = done.stdout.split()
    assert instruction_set == {"DEFAULT": "baseline", "AVX2": "avx2"}[capability], done.stderr
    assert capability.lower() in (limit, "default")


@compiled
def test_an_operator_that_takes_other_types_than_its_schema_is_not_called() -> None:
    operators = library_facts()["operators"]
    assert {operator.name for op in tlcr.ops.OPS for operator in op.cpp_operators if op.cpp} == set(operators)
    assert strange(operators) is None
    for other in ("Tensor Tensor Optional[Tensor] float Optional[float] -> Tensor", "-> Tensor"):
        said = strange(operators | {"fused_gae": other}) or ""
        assert said.startswith("tlcr's compiled kernels are of another version: fused_gae is ")
        assert f" {other}, not Tensor Tensor Optional[Tensor] float float bool" in said


@compiled
def test_an_error_of_torch_inside_an_operator_reaches_python() -> None:
    """The stable ABI passes no exceptions: a failure that was not looked at would go on with what there is not."""
    with pytest.raises(RuntimeError, match=r"tlcr|memory|shape|size"):
        torch.ops.tlcr.score_hidden(
            *(torch.randn(3, 4), torch.randn(5, 6), torch.arange(3)), *(None,) * 4, 1.0, None, 256
        )


@compiled
def test_the_kernels_use_the_threads_of_torch() -> None:
    """And only those: threads beyond the first are started by the first call that has work for them."""
    code = """
import os, torch, tlcr
logits, ids = torch.zeros(1, 1000).expand(512, -1), torch.zeros(512, dtype=torch.long)
before = len(os.listdir("/proc/self/task"))
for threads in (1, 3):
    torch.set_num_threads(threads)
    tlcr.score_tokens(logits, ids, impl="cpp")
    print(len(os.listdir("/proc/self/task")) - before)
"""
    done = run(code, PACKAGE.parent)
    assert (done.returncode, done.stdout.split()) == (0, ["0", "2"]), done.stderr
