"""What setup.py decides to build from what it finds, and what it says where it cannot."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
HOME = Path("toolkit")


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module: it builds only where it is run."""
    spec = importlib.util.spec_from_file_location("tlcr_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def decide(build: ModuleType, wanted: str, torch: str | None, nvcc: str, compiler: str | None = None) -> tuple:
    """``torch`` is "2.13.0 cpu" or "2.11.0 13.0", ``nvcc`` a toolkit's version or the reason why there is none."""
    version, _, cuda = (torch or "").partition(" ")
    found = build.Torch(version, None if cuda == "cpu" else cuda) if torch else None
    toolkit = build.Toolkit(HOME, nvcc, ("8.0",)) if nvcc[0].isdigit() else nvcc
    return tuple(build.decide(wanted, found, compiler, toolkit))


@pytest.mark.parametrize(
    ("torch", "nvcc", "kind", "remark"),
    [
        (None, "13.0", None, "--no-build-isolation"),
        ("2.9.1 13.0", "13.0", None, "torch 2.9.1 lacks the headers; install torch 2.10 or later"),
        ("2.13.0 cpu", "13.0", "cpu", "torch 2.13.0 is not a CUDA build"),
        ("2.11.0 13.0", "no nvcc there", "cpu", "no nvcc there; install the CUDA toolkit 13.0, or say in CUDA_HOME"),
        ("2.11.0 13.0", "12.8", "cpu", "is of CUDA 12.8 and torch 2.11.0 of CUDA 13.0"),
        ("2.11.0 13.0", "13.2", "cuda", None),
        ("2.11.0 12.6", "12.9", "cuda", None),
    ],
)
def test_auto_builds_the_best_that_can_be_built(
    build: ModuleType, torch: str | None, nvcc: str, kind: str | None, remark: str | None
) -> None:
    found, said = decide(build, "auto", torch, nvcc)
    assert found == kind
    assert said is None if remark is None else remark in said


def test_without_a_compiler_auto_is_pure_and_says_why(build: ModuleType) -> None:
    assert decide(build, "auto", "2.11.0 13.0", "13.0", "there was no c++") == (None, "there was no c++")


def test_what_is_asked_for_is_built(build: ModuleType) -> None:
    assert decide(build, "none", "2.11.0 13.0", "13.0")[0] is None
    assert decide(build, "none", None, "none", "there was no c++")[0] is None
    assert decide(build, "cpu", "2.11.0 13.0", "13.0") == ("cpu", "it was built with TLCR_BUILD=cpu")
    assert decide(build, "cuda", "2.11.0 13.0", "13.0") == ("cuda", None)


@pytest.mark.parametrize(
    ("wanted", "torch", "nvcc", "compiler", "message"),
    [
        ("cpu", None, "13.0", None, "TLCR_BUILD=cpu cannot be done: there was no torch .* --no-build-isolation"),
        ("cpu", "2.13.0 cpu", "13.0", "no c++; install g++", "TLCR_BUILD=cpu cannot be done: .* install g"),
        ("cuda", None, "13.0", None, "TLCR_BUILD=cuda cannot be done: there was no torch"),
        (
            "cuda",
            "2.13.0 cpu",
            "13.0",
            None,
            "TLCR_BUILD=cuda cannot be done: torch 2.13.0 is not a CUDA build; ",
        ),
        (
            "cuda",
            "2.11.0 13.0",
            "no nvcc",
            None,
            "TLCR_BUILD=cuda cannot be done: no nvcc; install the CUDA toolkit ",
        ),
        ("cuda", "2.11.0 13.0", "12.9", None, "TLCR_BUILD=cuda cannot be done: the nvcc in toolkit is of CUDA 12.9"),
        ("gpu", "2.11.0 13.0", "13.0", None, "TLCR_BUILD='gpu' is unknown, choose from auto, none, cpu, cuda"),
    ],
)
def test_what_is_asked_for_and_cannot_be_is_an_error(
    build: ModuleType, wanted: str, torch: str | None, nvcc: str, compiler: str | None, message: str
) -> None:
    with pytest.raises(build.BuildError, match=f"^tlcr: {message}"):
        decide(build, wanted, torch, nvcc, compiler)


def test_the_default_architectures_are_those_that_nvcc_knows(build: ModuleType) -> None:
    of_13 = ("7.5", "8.0", "8.6", "8.7", "8.8", "8.9", "9.0", "10.0", "11.0", "10.3", "12.0", "12.1")
    assert build.arch_list(None, of_13) == "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    of_12_4 = ("5.0", "7.0", "7.5", "8.0", "8.6", "8.7", "8.9", "9.0")
    assert build.arch_list("", of_12_4) == "8.0;8.6;8.9;9.0+PTX"
    assert build.arch_list("9.0a 10.0", of_12_4) == "9.0a 10.0"
    with pytest.raises(build.BuildError, match=r"nvcc knows none of 8\.0, .* set TORCH_CUDA_ARCH_LIST"):
        build.arch_list(None, ("5.0", "7.5"))


def test_a_local_version_label_is_checked(build: ModuleType) -> None:
    assert build.local_label({}) == build.local_label({"TLCR_LOCAL_VERSION": ""}) == ""
    assert build.local_label({"TLCR_LOCAL_VERSION": "cu130.torch2.11"}) == "+cu130.torch2.11"
    for label in ("+cu130", "cu 130", "cu130.", "Cu130", "cu_130\n"):
        with pytest.raises(build.BuildError, match="is no local version label: lower-case"):
            build.local_label({"TLCR_LOCAL_VERSION": label})


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A folder that looks like a CUDA toolkit, with an nvcc that answers what setup.py asks."""
    home = tmp_path / "cuda-12.4"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    script = """#!/bin/sh
case $1 in
--version) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
--list-gpu-arch) printf "compute_80\\ncompute_90\\ncompute_100\\n" ;;
esac
"""
    (home / "bin" / "nvcc").write_text(script)
    (home / "bin" / "nvcc").chmod(0o755)
    return home


def test_the_toolkit_is_the_one_that_is_named(
    build: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert build.find_toolkit() == build.Toolkit(toolkit, "12.4", ("8.0", "9.0", "10.0"))
    monkeypatch.setenv("CUDA_HOME", str(toolkit.parent))
    assert build.find_toolkit() == (
        f"there was no CUDA toolkit (bin/nvcc and include/cuda_runtime.h) in {toolkit.parent}"
    )


def test_the_toolkit_is_found_by_its_nvcc(build: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    on_path = toolkit.parent / "links"
    on_path.mkdir()
    (on_path / "nvcc").symlink_to(toolkit / "bin" / "nvcc")
    monkeypatch.setenv("PATH", f"{on_path}{os.pathsep}{os.environ['PATH']}")
    assert build.find_toolkit().home == toolkit


def test_a_missing_torch_or_compiler_is_found_missing(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert build.find_torch() is None
    monkeypatch.setenv("CXX", "no-such-compiler -flag")
    assert build.find_compiler_problem().startswith("there was no C++ compiler 'no-such-compiler -flag'; install g++")
    monkeypatch.setenv("CXX", sys.executable)
    assert build.find_compiler_problem() is None


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("named", ["", " "])
def test_a_compiler_of_no_name_is_the_default_one(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    program(tmp_path / "c++", "echo 'c++ (GCC) 12.2.0'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CXX", named)
    assert build.find_compiler_problem() is None
    assert "CXX" not in os.environ  # where torch would look


@pytest.mark.parametrize("said", ["Ubuntu clang version 14.0.0-1ubuntu1.1", "Apple clang version 16.0.0"])
def test_clang_is_no_compiler_of_the_kernels(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    compiler = program(tmp_path / "c++", f"echo '{said}'")
    monkeypatch.setenv("CXX", f"{compiler} -pipe")
    problem = build.find_compiler_problem()
    assert problem == "clang cannot compile the kernels; name g++ in CXX"
    assert decide(build, "auto", "2.13.0 cpu", "13.0", problem) == (None, problem)
    with pytest.raises(build.BuildError, match="TLCR_BUILD=cpu cannot be done: clang cannot compile the kernels"):
        decide(build, "cpu", "2.13.0 cpu", "13.0", problem)


def test_a_compiler_that_does_not_answer_is_none(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = program(tmp_path / "c++", "echo 'no developer tools' >&2; exit 1")
    monkeypatch.setenv("CXX", str(compiler))
    wanted = f"{compiler} --version failed with status 1 (no developer tools); install g++, or name a compiler in CXX"
    assert build.find_compiler_problem() == wanted


BROKEN_NVCCS = {
    "exits": ("exit 1", "--version failed with status 1 (without a word)"),
    "exits when asked for architectures": (
        '[ "$1" = --version ] && echo "release 12.4" || { echo "nvcc fatal: unknown option" >&2; exit 1; }',
        "--list-gpu-arch failed with status 1 (nvcc fatal: unknown option)",
    ),
    "is something else": ("echo hello", "--version names no release"),
}


@pytest.mark.parametrize("broken", BROKEN_NVCCS)
@pytest.mark.parametrize(("wanted", "kind"), [("auto", "cpu"), ("none", None), ("cpu", "cpu"), ("cuda", "an error")])
def test_an_nvcc_that_does_not_answer_is_the_reason_for_no_cuda_kernels(
    build: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch, broken: str, wanted: str, kind: str | None
) -> None:
    """It is no reason to build nothing, let alone where no CUDA is wanted."""
    script, said = BROKEN_NVCCS[broken]
    nvcc = program(toolkit / "bin" / "nvcc", script)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    found = build.find_toolkit()
    assert found == f"{nvcc} {said}"
    if kind == "an error":
        with pytest.raises(build.BuildError, match=f"TLCR_BUILD=cuda cannot be done: {re.escape(found)}; install the"):
            decide(build, wanted, "2.11.0 13.0", found)
    else:
        assert decide(build, wanted, "2.11.0 13.0", found)[0] == kind


def test_an_nvcc_that_cannot_be_run_is_a_reason_too(
    build: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (toolkit / "bin" / "nvcc").chmod(0o644)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert build.find_toolkit() == f"{toolkit}/bin/nvcc --version cannot be run (Permission denied)"


def test_a_pure_build_that_is_asked_for_looks_for_nothing(checkout: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    program(tmp_path / "toolkit" / "bin" / "nvcc", "exit 1")
    (tmp_path / "toolkit" / "include").mkdir()
    (tmp_path / "toolkit" / "include" / "cuda_runtime.h").touch()
    done = build_wheel(checkout, PYTHONPATH=str(broken), TLCR_BUILD="none", CUDA_HOME=str(tmp_path / "toolkit"), CXX="")
    assert done.returncode == 0, done.stderr
    assert "because it was built with TLCR_BUILD=none" in done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build needs."""
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    for folder in ("tlcr", "csrc", "kernels"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile"):
        shutil.copy2(ROOT / file, copy)
    return copy


def build_wheel(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_torch_the_wheel_is_pure_and_says_why(checkout: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    absent.mkdir()
    (absent / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    done = build_wheel(checkout, PYTHONPATH=str(absent), TLCR_BUILD="auto", TLCR_LOCAL_VERSION="cu130.torch2.11")
    assert done.returncode == 0, done.stderr
    assert "tlcr: building a pure package, WITHOUT compiled kernels, because there was no torch" in done.stderr
    (wheel,) = (checkout / "dist").iterdir()
    assert wheel.name == "tlcr_rlhf-0.1.0+cu130.torch2.11-py3-none-any.whl"
    record = zipfile.ZipFile(wheel).read("tlcr/_build.json").decode()
    assert '"version": "0.1.0+cu130.torch2.11"' in record and '"extension": null' in record
    assert "pip hides it from a build unless it is installed first and --no-build-isolation is given" in record


STUB = """
[ "$1" = --version ] && exec echo "c++ (GCC) 12.2.0"
for word; do [ "$before" = -o ] && : > "$word"; before=$word; done
"""
"""A compiler whose results are empty files."""


def test_an_extension_that_is_built_in_place_is_one_that_tlcr_loads(checkout: Path) -> None:
    record = checkout / "tlcr" / "_build.json"
    record.write_text('{"version": "0.0.1", "extension": null}')  # of a pure build before
    compiler = program(checkout / "stub" / "g++", STUB)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout,
        env={**os.environ, "CXX": str(compiler), "TLCR_BUILD": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (checkout / "tlcr" / "libtlcr.so").exists()
    written = json.loads(record.read_text())
    assert (written["version"], written["extension"]) == ("0.1.0", "cpu")


def test_a_build_that_cannot_be_ends_with_the_reason_alone(checkout: Path) -> None:
    done = build_wheel(checkout, TLCR_BUILD="cuda", CUDA_HOME=str(checkout))
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("tlcr: TLCR_BUILD=cuda cannot be done: ")
    assert list((checkout / "dist").glob("*")) == []
