"""What the repository tracks: nothing of the machine it was written on, and nothing that a build leaves behind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Roots of absolute paths that name one machine. The pieces are joined, so that this file does not match itself.
MACHINE_PATH = re.compile(
    r"(?<![\w.$~>)}*/-])/(?:" + "|".join(("work", "tmp", "home", "root", "Users", "mnt")) + r")/[\w.-]"
)
LEFTOVERS = (".so", ".pyc", ".safetensors", ".egg-info", ".whl", ".jsonl.gz")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout (an sdist, say): there is no list of tracked files")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in names.split("\0") if name]
    assert len(files) > 30
    return [file for file in files if file.is_file()]  # tlcr/kernels is a link to a folder


def test_no_tracked_file_names_a_path_of_one_machine(tracked: list[Path]) -> None:
    found = []
    for file in tracked:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # an image
        lines = enumerate(text.splitlines(), start=1)
        found += [
            f"{file.relative_to(ROOT)}:{number}: {line.strip()}" for number, line in lines if MACHINE_PATH.search(line)
        ]
    assert found == []


@pytest.mark.parametrize("root", ["work", "tmp", "home"])
def test_the_search_finds_such_paths_and_only_such(root: str) -> None:
    for line in (f"/{root}/x", f'open("/{root}/main/a.py")', f"path=/{root}/a", f"see `/{root}/a`"):
        assert MACHINE_PATH.search(line), line
    for line in (f"runs/{root}/x", f"../{root}/x", f"https://example.org/{root}/x", f"reward/{root}", f"a /{root} b"):
        assert not MACHINE_PATH.search(line), line


def test_no_build_product_or_weight_is_tracked(tracked: list[Path]) -> None:
    assert [str(file.relative_to(ROOT)) for file in tracked if str(file).endswith(LEFTOVERS)] == []


def test_no_tracked_file_is_large(tracked: list[Path]) -> None:
    assert [str(file.relative_to(ROOT)) for file in tracked if file.stat().st_size > 2**20] == []


@pytest.mark.slow
def test_the_folder_of_kernels_is_not_taken_for_hugging_face_s_package(tmp_path: Path) -> None:
    """`kernels` is also a package that transformers looks for, and the root of the repository is often on the path."""

    def said(folder: Path, code: str) -> str:
        command = [sys.executable, "-c", f"import sys; {code}"]
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=120).stdout

    code = (
        "import transformers.integrations.hub_kernels, tlcr, transformers; "
        "from transformers.utils import is_kernels_available; sys.stdout.write(str(is_kernels_available()))"
    )
    assert said(ROOT, code) == said(tmp_path, code)
    (tmp_path / "kernels.py").touch()
    code = f"sys.path.append({str(tmp_path)!r}); import kernels; sys.stdout.write(kernels.__file__)"
    assert said(ROOT, code) == str(tmp_path / "kernels.py")
