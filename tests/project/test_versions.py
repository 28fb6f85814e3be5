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


def pinned(script: ModuleType, name: str) -> dict[str, Version]:
    lines = script.versions(name).read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in pins}


def test_the_lowest_versions_that_are_run_are_the_lower_bounds(script: ModuleType) -> None:
    pins = pinned(script, "lowest")
    for requirement in declared(script):
        (bound,) = (Version(part.version) for part in requirement.specifier if part.operator in (">=", "=="))
        assert pins[canonicalize_name(requirement.name)] == bound, f"{requirement}: after a change of bounds: make lock"
    (python,) = re.findall(r'^requires-python = ">=([\d.]+)"$', PYPROJECT, re.MULTILINE)
    assert script.ENDS["lowest"].python == python


def test_the_newest_versions_that_are_run_are_allowed(script: ModuleType) -> None:
    pins = pinned(script, "newest")
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
    lowest, newest = pinned(script, "lowest"), pinned(script, "newest")
    names = {canonicalize_name(requirement.name) for requirement in declared(script)}
    assert named == {name: (str(lowest[name]), str(newest[name])) for name in names}
