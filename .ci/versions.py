"""Run all tests with the lowest, or with the newest, versions that pyproject.toml allows.

Usage: python .ci/versions.py lock
       python .ci/versions.py lowest|newest [argument of pytest ...]

lock looks up the versions of both ends anew, and writes them to .ci/versions/ and into the table of
docs/installation.md. lowest and newest take those that stand there: they make an environment (.venv-lowest,
.venv-newest), compile tlcr in a copy of the sources (build/lowest, build/newest), and run the tests of that copy.
uv resolves and installs. It takes a Python of this machine, or fetches one where there is none.
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from wheels import ROOT, run, unpacked_sdist

UV = [sys.executable, "-m", "uv"]
EXTRAS = ("gguf", "lora", "openai", "serve", "tensorboard", "triton")
"""The extras that users install. What dev, docs and bench name is for this repository, which takes the newest."""


class End(NamedTuple):
    python: str
    resolution: str


ENDS = {"lowest": End("3.10", "lowest-direct"), "newest": End("3.13", "highest")}


def versions(name: str) -> Path:
    return ROOT / ".ci" / "versions" / f"{name}.txt"


def lock() -> None:
    extras = [f"--extra={extra}" for extra in EXTRAS]
    for name, end in ENDS.items():
        options = [f"--python={end.python}", f"--resolution={end.resolution}", "--python-platform=linux", "--upgrade"]
        written = ["--quiet", "--no-annotate", f"--output-file={versions(name)}"]
        written += ["--custom-compile-command=make lock"]
        run([*UV, "pip", "compile", *options, *extras, *written, "pyproject.toml"], cwd=ROOT)
    page = ROOT / "docs" / "installation.md"
    page.write_text(table_of_today(page.read_text(encoding="utf-8")), encoding="utf-8")


def table_of_today(page: str) -> str:
    """The page, with the versions of both ends in each row that has two."""
    lowest, newest = pinned("lowest"), pinned("newest")

    def row(found: re.Match[str]) -> str:
        name = found[1].lower()
        return f"| {found[1]} | {lowest[name]} | {newest[name]} |" if name in lowest else found[0]

    return re.sub(r"^\| ([\w-]+) \| [\d.]+ \| [\d.]+ \|$", row, page, flags=re.MULTILINE)


def pinned(name: str) -> dict[str, str]:
    """The version of each package of an end, without the label of a build, as in 2.15.0+cpu."""
    return dict(re.findall(r"^([\w.-]+)==([^\s;+]+)", versions(name).read_text(encoding="utf-8"), re.MULTILINE))


def test(name: str, arguments: list[str]) -> None:
    environment = ROOT / f".venv-{name}"
    python = str(environment / "bin" / "python")
    sources = copy_of_sources(name)
    wanted = os.environ.get("UV_PYTHON", ENDS[name].python)
    run([*UV, "venv", "--clear", "--seed", f"--python={wanted}", str(environment)], cwd=ROOT)
    install = ["-m", "uv", "pip", "install", f"--python={python}", f"--constraints={versions(name)}"]
    run([sys.executable, *install, "torch", "setuptools", "wheel", "ninja", "uv"], cwd=sources)
    extras = ",".join(("dev", *EXTRAS))
    # By default without CUDA, for which `make wheels` compiles; torch may come as a CUDA build all the same.
    build = os.environ.get("TLCR_BUILD", "cpu")
    run([python, *install, "--no-build-isolation", f"--editable=.[{extras}]"], cwd=sources, TLCR_BUILD=build)
    run([*UV, "pip", "freeze", f"--python={python}"], cwd=sources)
    run([python, "-m", "tlcr", "doctor"], cwd=sources)
    command = [python, "-m", "pytest", "-q", "-p", "no:benchmark", *(arguments or ["-n", "2"])]
    run(command, cwd=sources, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")


def copy_of_sources(name: str) -> Path:
    """A folder of this end's own: what is compiled in one is for one Python and one torch."""
    target = ROOT / "build" / name
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        shutil.move(unpacked_sdist(sys.executable, Path(folder)), target)
    return target


def search_path() -> str:
    """Where uv looks for a Python: pyenv's on PATH are scripts that fail for every version but the selected one."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return os.pathsep.join([*map(str, pyenv.glob("versions/*/bin")), os.environ["PATH"]])


if __name__ == "__main__":
    os.environ.setdefault("UV_PYTHON_SEARCH_PATH", search_path())
    match sys.argv[1:]:
        case ["lock"]:
            lock()
        case [("lowest" | "newest") as name, *arguments]:
            test(name, arguments)
        case _:
            sys.exit(__doc__)
