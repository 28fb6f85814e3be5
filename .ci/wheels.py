"""Build the pure, the CPU and the CUDA wheel from one sdist, install each alone, and run the tests of the ops on it.

Usage: python .ci/wheels.py PYTHON OTHER_PYTHON

The CPU wheel is compiled once, by the first, and tested beside both, which are two versions of Python and of torch. The
second has a CUDA build of torch, for which nvcc is needed. A GPU is not, and where there is one, the same tests run on
it. Both have what the tests need, and the first has auditwheel.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCH_LIST = "8.0;9.0;10.0"  # fewer than a release has, because compiling takes most of the time
TESTS_OF_SOURCES = ("test_instruction_sets.py", "test_triton_compiled.py", "test_score_hidden_memory.py")
"""Tests that compile, or that need benchmarks/; make test has run them."""
OF_CUDA = ("tests/ops/test_installation.py", "tests/ops/test_extension.py", "tests/ops/test_operators.py")
OF_TORCH = ("libtorch*.so", "libc10*.so", "libcudart.so.*")
"""Libraries that come with torch. A wheel must not hold another copy."""


def main(python: str, other_python: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = unpacked_sdist(python, work)
        pure = wheel(python, source, work / "none", TLCR_BUILD="none")
        cpu = wheel(python, source, work / "cpu", TLCR_BUILD="cpu", TLCR_LOCAL_VERSION="cpu")
        cuda = wheel(
            *(other_python, source, work / "cuda"),
            TLCR_BUILD="cuda",
            TLCR_LOCAL_VERSION="cuda",
            TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST", ARCH_LIST),
        )
        if len({metadata(path) for path in (pure, cpu, cuda)}) != 1:
            sys.exit("the metadata of the wheels differ in more than the version")
        cpu, cuda = manylinux(python, cpu), manylinux(python, cuda)
        for path in (pure, cpu, cuda):
            show(path)
        run_tests(python, "none", pure, source, work / "installed-none")
        for user in (python, other_python):
            run_tests(user, "cpu", cpu, source, work / f"installed-cpu-{versions(user)}")
        # The kernels for the CPU are those of the other wheel.
        run_tests(other_python, "cuda", cuda, source, work / "installed-cuda", OF_CUDA)


def versions(python: str) -> str:
    """Those of a Python and of its torch, which a name of a folder can hold."""
    code = "import sys, torch; print(sys.version.split()[0], torch.__version__, sep='-torch')"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def unpacked_sdist(python: str, work: Path) -> Path:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(work)!r})"
    run([python, "-c", code], cwd=ROOT, log=work / "log", TLCR_BUILD="none")
    (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(work / "sdist", filter="data")
    (source,) = (work / "sdist").iterdir()
    return source


def wheel(python: str, source: Path, folder: Path, **environment: str) -> Path:
    """Build a wheel in its own copy of the sources, so that no build finds files of another."""
    shutil.copytree(source, folder / "source", symlinks=True)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    run([python, "-c", code], cwd=folder / "source", log=folder / "log", **environment)
    (path,) = folder.glob("*.whl")
    return path


def manylinux(python: str, path: Path) -> Path:
    """The wheel under the tag of the oldest systems whose libraries it can use; an error if it needs others."""
    folder = path.parent / "manylinux"
    excluded = [f"--exclude={pattern}" for pattern in OF_TORCH]
    command = [python, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", str(folder), str(path)]
    run(command, cwd=path.parent, log=path.parent / "log")
    (repaired,) = folder.glob("*.whl")
    return repaired


def show(path: Path) -> None:
    """The wheel with its size, its libraries with theirs, and its licence."""
    sys.stdout.write(f"{path.name}, {path.stat().st_size / 2**20:.1f} MiB\n")
    with zipfile.ZipFile(path) as archive:
        held = archive.infolist()
        for file in held:
            if ".so" in file.filename:
                sys.stdout.write(f"    {file.filename}, {file.file_size / 2**20:.1f} MiB\n")
    if not any(file.filename.endswith(".dist-info/licenses/LICENSE") for file in held):
        sys.exit(f"{path.name} has no licence")
    libraries = {file.filename for file in held if ".so" in file.filename}
    if path.name.endswith("-none-any.whl") != (libraries == set()) or libraries - {"tlcr/libtlcr.so"}:
        sys.exit(f"{path.name} holds other libraries than its own: {sorted(libraries)}")


def metadata(path: Path) -> bytes:
    """What a wheel says of itself, but for its version: it must not depend on what was compiled."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).splitlines()
    return b"\n".join(line for line in lines if not line.startswith(b"Version: "))


def run_tests(
    python: str, kind: str, path: Path, source: Path, folder: Path, tests: tuple[str, ...] = ("tests/ops",)
) -> None:
    """Run the tests, and of a pure wheel the doctor, in a folder where only the installed tlcr can be imported."""
    sys.stdout.write(f"\n{path.name} beside {versions(python)}\n")
    site = str(folder / "site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", site]
    run([*install, str(path)], cwd=folder.parent)
    shutil.copytree(source / "tests", folder / "tests")
    shutil.copy(source / "pyproject.toml", folder)
    for name in TESTS_OF_SOURCES:
        (folder / "tests" / "ops" / name).unlink()
    if kind == "none":  # the doctor simulates a run, by the specifications here
        doctor = [python, "-m", "tlcr", "doctor", "--output_dir", str(folder / "run")]
        run(doctor, cwd=folder, log=folder / "log", PYTHONPATH=site, OMP_NUM_THREADS="1")
    run(
        [python, "-m", "pytest", "-q", "-n", "2", "-p", "no:benchmark", "-p", "no:cacheprovider", *tests],
        cwd=folder,
        PYTHONPATH=site,
        TLCR_EXPECTED=kind,
        OMP_NUM_THREADS="1",
    )


def run(command: list[str], *, cwd: Path, log: Path | None = None, **environment: str) -> None:
    """Run a Python with its ninja on PATH, and end where it fails; with ``log`` the output is shown only then."""
    shown = " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)])
    sys.stdout.write(f"\n$ {shown}\n")
    sys.stdout.flush()
    started = time.monotonic()
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PATH": f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}", **environment},
        stdout=log.open("w") if log else None,
        stderr=subprocess.STDOUT if log else None,
    )
    if done.returncode != 0:
        sys.stdout.write(log.read_text(errors="replace") if log else "")
        sys.exit(f"failed with {done.returncode}: {shown}")
    sys.stdout.write(f"{time.monotonic() - started:.0f} s\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
