"""What greets a developer: one list of versions, the same checks everywhere, a citation and a changelog that fit."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import tlcr

ROOT = Path(__file__).parents[2]
CPP = {".cpp", ".cu", ".cuh", ".h", ".inl"}


def load_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def value(pyproject: str, name: str) -> str:
    found = re.search(rf'^{name} = "(.*)"$', pyproject, re.MULTILINE)
    assert found is not None, name
    return found[1]


def dev(pyproject: str) -> dict[str, str]:
    """The packages of the extra dev, with the versions that it allows. (tomllib came with Python 3.11.)"""
    listed = re.search(r"^dev = \[(.*?)^\]", pyproject, re.MULTILINE | re.DOTALL)
    assert listed is not None
    found = map(Requirement, re.findall(r'^    "([^"]+)"', listed[1], re.MULTILINE))
    return {requirement.name: str(requirement.specifier) for requirement in found}


def target(name: str) -> list[str]:
    """The commands of a target of the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    rule = re.search(rf"^{name}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    assert rule is not None, name
    return rule[1].split("\n\t")


def tools(text: str) -> set[str]:
    return set(re.findall(r"(?:\$\(BIN\)|\.venv/bin)/([\w-]+)", text)) - {"python"}


def test_what_lint_and_the_hooks_run_is_installed_by_the_extra_dev_and_by_nothing_else(pyproject: str) -> None:
    hooks = load_yaml(".pre-commit-config.yaml")["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"], "another source would be a second list of versions"
    entries = "\n".join(hook["entry"] for hook in hooks[0]["hooks"])
    linted = tools("\n".join(target("lint")))
    assert linted == {"ruff", "lint-imports", "mypy", "clang-format"}
    assert tools(entries) == linted - {"mypy"}
    packages = {"import-linter" if tool == "lint-imports" else tool for tool in linted}
    assert packages | {"clang-tidy", "pre-commit"} <= set(dev(pyproject))
    assert "$(BIN)/python .ci/tidy.py" in "\n".join(target("lint"))


def test_the_formatter_and_the_checker_of_cpp_are_pinned_to_one_version(pyproject: str) -> None:
    """Another version formats otherwise, and `make lint` would fail on untouched files."""
    found = dev(pyproject)
    assert found["clang-format"] == found["clang-tidy"]
    assert re.fullmatch(r"==\d+\.\d+\.\d+", found["clang-format"])


def test_the_hook_formats_the_files_that_lint_checks() -> None:
    (hook,) = (h for h in load_yaml(".pre-commit-config.yaml")["repos"][0]["hooks"] if h["id"] == "clang-format")
    folders = [ROOT / name for name in ("csrc", "tests/cuda/emulator", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in CPP]
    assert len(files) > 30
    for path in files:
        assert re.search(hook["files"], path.relative_to(ROOT).as_posix()), path
    listed = re.search(r"^CPP := \$\(shell find (.*)\)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert listed is not None
    names = set(re.findall(r"-name '\*(\.\w+)'", listed[1]))
    assert names == CPP and listed[1].startswith("csrc tests/cuda/emulator .ci ")


def test_every_check_that_is_off_says_why() -> None:
    text = (ROOT / ".clang-tidy").read_text(encoding="utf-8")
    checks = re.split(r"[,\s]+", yaml.safe_load(text)["Checks"].strip())
    off = {name.removeprefix("-") for name in checks if name.startswith("-") and name != "-*"}
    reasons = dict(re.findall(r"^# ([a-z][\w.-]+-[\w.-]+)\s{2,}(\S.*)$", text, re.MULTILINE))
    assert set(reasons) == off and off


@pytest.mark.skipif(shutil.which("clang-tidy", path=str(Path(sys.executable).parent)) is None, reason="no clang-tidy")
def test_tidy_finds_a_fault_and_passes_a_file_without(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in (".ci", "csrc/kernels"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / ".clang-tidy", copy)
    file = copy / "csrc/kernels/cpu/dispatch.cpp"

    def tidy() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(copy / ".ci/tidy.py"), str(file)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert tidy().returncode == 0
    file.write_text(file.read_text() + "\nint half(long x) { int y = x; return y; }\n")
    done = tidy()
    assert done.returncode == 1 and "bugprone-narrowing-conversions" in done.stdout


def test_the_workflow_runs_what_a_developer_runs() -> None:
    workflow = load_yaml(".github/workflows/ci.yml")
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key `on` as true
    (job,) = workflow["jobs"].values()
    steps = job["steps"]
    assert [step["run"] for step in steps if step.get("run", "").startswith(".ci/")] == [".ci/run"]
    run = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert re.findall(r"^make (.+)$", run, re.MULTILINE) == [
        *("test || make test-again", "test-slow || make test-again"),
        *(
            "fuzz",
            "results-check",
            "lint",
            "audit AUDIT=--without-an-answer-too",
            "hosts HOST=trl",
            "gpu-in-small",
            "wheels",
        ),
    ]


TOY = {
    "test_dies.py": "import os\n\ndef test_dies():\n    if os.environ.get('BUSY'): os._exit(9)\n",
    "test_races.py": "import os\n\ndef test_races():\n    assert not os.environ.get('BUSY')\n",
    "test_wrong.py": "def test_wrong():\n    assert False\n",
}
"""A test that ends its process among others, one that fails among others, and one that is wrong."""
ONE = ["-p", "xdist", "-n", "1"]
"""A worker."""


@pytest.mark.parametrize(
    ("files", "workers", "again"),
    [
        (["test_dies.py", "test_wrong.py"], [*ONE, "--max-worker-restart", "0"], pytest.ExitCode.USAGE_ERROR),
        (["test_races.py"], ONE, pytest.ExitCode.OK),
        (["test_races.py", "test_wrong.py"], [], pytest.ExitCode.TESTS_FAILED),
        (["test_races.py", "test_wrong.py"], ["-x"], pytest.ExitCode.USAGE_ERROR),
    ],
)
def test_what_failed_runs_again_alone_only_where_all_else_ran(
    files: list[str], workers: list[str], again: int, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).write_text(TOY[name], encoding="utf-8")
    command = target("test-again")[0].split()
    assert command[:2] == ["$(PYTEST)", "--last-failed"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    outside |= {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def ended(*options: str, **environment: str) -> int:
        run = [sys.executable, "-m", "pytest", "-p", "tests.whole", "--rootdir", str(tmp_path), *options]
        return subprocess.run(run, cwd=tmp_path, env=outside | environment, timeout=300).returncode

    assert ended(*workers, BUSY="1") not in (pytest.ExitCode.OK, pytest.ExitCode.USAGE_ERROR)
    assert ended(*command[1:]) == again


def test_the_weekly_workflow_runs_both_ends_of_the_versions() -> None:
    workflow = load_yaml(".github/workflows/versions.yml")
    assert set(workflow[True]) == {"schedule", "workflow_dispatch"}
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make lock", "make ${{ matrix.end }}"]
    assert {entry["end"] for entry in job["strategy"]["matrix"]["include"]} == {"lowest", "newest"}


def test_the_weekly_audit_asks_for_the_versions_of_the_day() -> None:
    (job,) = load_yaml(".github/workflows/audit.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [
        *("make lock", "make audit AUDIT=--without-an-answer-too")
    ]
    rule = re.search(r"^audit:.*\n\t(.+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert rule is not None and rule[1] == "$(BIN)/python .ci/audit.py $(AUDIT)"


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """.ci/audit.py, for two versions."""
    monkeypatch.syspath_prepend(ROOT / ".ci")
    module = importlib.import_module("audit")
    (tmp_path / "newest.txt").write_text("# a comment\na==1\nb==2\n", encoding="utf-8")
    monkeypatch.setattr(module, "VERSIONS", tmp_path / "newest.txt")
    return module


CLEAN = [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "version": "2", "vulns": []}]
KNOWN = [{"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"], "description": "holes"}]}]
SKIPPED = [{"name": "a", "version": "1", "skip_reason": "not found"}, *CLEAN[1:]]


@pytest.mark.parametrize(
    ("pypi", "osv", "code", "lenient", "sentence"),
    [
        ((CLEAN, ""), ([], "no network"), 0, 0, "none of 2 versions has a known vulnerability"),
        ((SKIPPED, ""), (CLEAN, ""), 0, 0, "pypi answered for 1 of 2 versions: not found"),
        ((SKIPPED, ""), ([], "no network"), 2, 0, "NOT AUDITED: 1 of 2 versions, such as a==1"),
        (([], "no network"), ([], "no network"), 2, 0, "osv answered for 0 of 2 versions: no network"),
        (([], "no network"), (KNOWN, ""), 1, 1, "FOUND PYSEC-1 in b 2, mended in 2.1: holes"),
    ],
)
def test_a_known_vulnerability_fails_and_a_network_that_is_down_does_not(
    pypi: Any, osv: Any, code: int, lenient: int, sentence: str, audit: Any, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(audit, "asked", lambda service, _: {"pypi": pypi, "osv": osv}[service])
    assert audit.main([]) == code
    assert sentence in capsys.readouterr().out
    assert audit.main(["--without-an-answer-too"]) == lenient


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").iterdir()), ids=lambda path: path.name)
def test_an_action_is_named_by_its_commit(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        if "uses:" in line:
            assert re.search(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_the_forms_of_issues_are_complete(name: str) -> None:
    form = load_yaml(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= set(form)
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids))
    assert all(part["attributes"]["label"] for part in form["body"])


def test_the_citation_is_of_this_version_and_of_the_paper(pyproject: str) -> None:
    citation = load_yaml("CITATION.cff")
    assert citation["version"] == value(pyproject, "version") == tlcr.__version__.partition("+")[0]
    assert (citation["cff-version"], citation["title"], citation["license"]) == (
        *("1.2.0", "tlcr", value(pyproject, "license")),
    )
    (paper,) = citation["references"]
    assert paper["url"].endswith("/2407.16574") and len(paper["authors"]) == 10


def test_the_changelog_has_a_section_for_this_version_below_what_is_to_come(pyproject: str) -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1].split()[0] == value(pyproject, "version")
    assert all(re.match(r"\d+\.\d+\.\d+( |$)", heading) for heading in headings[1:])
