"""The bounds of pyproject.toml, the versions that are run and those in the documents are the same."""

from __future__ import annotations

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = spec_from_file_location("ci_versions", ROOT / ".ci" / "versions.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.path.insert(0, str(ROOT / ".ci"))  # where a script finds the modules beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / ".ci"))
    return module


def array(name: str) -> str:
    """An array of pyproject.toml. (tomllib came with Python 3.11.)"""
    found = re.search(rf"^{name} = \[(.*?)\]$", PYPROJECT, re.MULTILINE | re.DOTALL)
    assert found is not None, name
    return found[1]


def declared(script: ModuleType) -> list[Requirement]:
    """What tlcr and its extras for users need."""
    arrays = [array(name) for name in ("dependencies", *script.EXTRAS)]
    return [Requirement(text) for held in arrays for text in re.findall(r'"([^"]+)"', held)]


def test_the_lowest_versions_that_are_run_are_the_lower_bounds(script: ModuleType) -> None:
    pins = script.pinned("lowest")
    for requirement in declared(script):
        (bound,) = (Version(part.version) for part in requirement.specifier if part.operator in (">=", "=="))
        found = Version(pins[canonicalize_name(requirement.name)])
        assert found == bound, f"{requirement}: after a change of bounds: make lock"
    (python,) = re.findall(r'^requires-python = ">=([\d.]+)"$', PYPROJECT, re.MULTILINE)
    assert script.ENDS["lowest"].python == python


def test_one_library_serves_every_torch_that_is_allowed(script: ModuleType) -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    (oldest,) = re.findall(r"^OLDEST_TORCH = \((\d+), (\d+)\)$", setup, re.MULTILINE)
    assert Version(".".join(oldest)) <= Version(script.pinned("lowest")["torch"])


def test_the_newest_versions_that_are_run_are_allowed(script: ModuleType) -> None:
    pins = script.pinned("newest")
    for requirement in declared(script):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_every_requirement_of_users_has_both_bounds(script: ModuleType) -> None:
    for requirement in declared(script):
        operators = {part.operator for part in requirement.specifier}
        assert operators == {">=", "<"} or requirement.name == "packaging", requirement  # of years, without a promise


def test_the_documents_name_the_versions_that_are_run(script: ModuleType) -> None:
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    named = {canonicalize_name(name): (low, new) for name, low, new in rows}
    assert named.pop("python") == (script.ENDS["lowest"].python, script.ENDS["newest"].python)
    lowest, newest = script.pinned("lowest"), script.pinned("newest")
    names = {canonicalize_name(requirement.name) for requirement in declared(script)}
    assert named == {name: (lowest[name], newest[name]) for name in names}, "make lock fills in the rows that are there"


def test_the_table_gets_the_versions_of_the_day(script: ModuleType) -> None:
    pins = script.pinned("lowest"), script.pinned("newest")
    old = "| a | b |\n| Python | 3.10 | 3.13 |\n| PyYAML | 1.0 | 2 |\n| torch 2.11 | why |\n"
    wanted = old.replace("| 1.0 | 2 |", f"| {pins[0]['pyyaml']} | {pins[1]['pyyaml']} |")
    assert script.table_of_today(old) == wanted
