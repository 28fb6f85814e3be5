"""Build the pure, the CPU and the CUDA wheel from one sdist, install each alone, and run the tests of the ops on it.

Usage: python .ci/wheels.py PYTHON CUDA_PYTHON

The second has a CUDA build of torch and what the tests need. nvcc is needed; a GPU is not, and where there is one, the
same tests run on it too.
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
# They compile, or measure with what is in benchmarks/; make test has run them.
TESTS_OF_SOURCES = ("test_instruction_sets.py", "test_triton_compiled.py", "test_score_hidden_memory.py")


def main(python: str, cuda_python: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = unpacked_sdist(python, work)
        wheels = {
            "none": wheel(python, source, work / "none", TLCR_BUILD="none"),
            "cpu": wheel(python, source, work / "cpu", TLCR_BUILD="cpu", TLCR_LOCAL_VERSION="cpu"),
            "cuda": wheel(
                *(cuda_python, source, work / "cuda"),
                TLCR_BUILD="cuda",
                TLCR_LOCAL_VERSION="cuda",
                TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST", ARCH_LIST),
            ),
        }
        if len({metadata(path) for path in wheels.values()}) != 1:
            sys.exit("the metadata of the wheels differ in more than the version")
        for kind, path in wheels.items():
            run_tests(cuda_python if kind == "cuda" else python, kind, path, source, work / f"installed-{kind}")


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
    command = [python, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), "."]
    run([*command, "--verbose"], cwd=folder / "source", log=folder / "log", **environment)
    (path,) = folder.glob(f"tlcr_rlhf-*{environment.get('TLCR_LOCAL_VERSION', '')}-*.whl")
    sys.stdout.write(f"{path.name}, {path.stat().st_size / 2**20:.1f} MiB\n")
    return path


def metadata(path: Path) -> bytes:
    """What a wheel says of itself, but for its version: it must not depend on what was compiled."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).splitlines()
    return b"\n".join(line for line in lines if not line.startswith(b"Version: "))


def run_tests(python: str, kind: str, path: Path, source: Path, folder: Path) -> None:
    """Run the tests in a separate folder, where only the installed tlcr can be imported."""
    site = str(folder / "site")
    run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, str(path)], cwd=folder.parent)
    shutil.copytree(source / "tests", folder / "tests")
    shutil.copy(source / "pyproject.toml", folder)
    for name in TESTS_OF_SOURCES:
        (folder / "tests" / "ops" / name).unlink()
    run(
        [python, "-m", "pytest", "-q", "-n", "2", "-p", "no:benchmark", "-p", "no:cacheprovider", "tests/ops"],
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
