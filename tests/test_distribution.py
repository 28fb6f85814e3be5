"""The name that pip knows tlcr by, and the commands that install what is missing."""

import re
import shlex
import subprocess
import sys
from importlib.metadata import distributions, version
from pathlib import Path

import pytest

import tlcr
from tlcr.distribution import DISTRIBUTION, install_command, installed_version, requirements

ROOT = Path(__file__).parents[1]


def test_the_version_is_that_of_the_distribution() -> None:
    assert tlcr.__version__ == installed_version() == version("tlcr-rlhf")


def test_requirements_of_an_extra_are_those_that_only_it_needs() -> None:
    always, openai = ({one.name for one in requirements(extra)} for extra in ("", "openai"))
    assert {"torch", "transformers", "accelerate"} <= always
    assert openai == {"openai", "tenacity", "aiolimiter"}


def test_the_command_names_packages_with_the_versions_that_fit() -> None:
    words = shlex.split(install_command("openai"))
    assert words[:2] == ["pip", "install"]
    assert [re.split(r"[<>=]", word)[0] for word in words[2:]] == ["openai", "tenacity", "aiolimiter"]
    assert all("<" in word and ">=" in word for word in words[2:])


def test_nothing_tells_people_to_install_a_package_of_others() -> None:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode != 0:
        pytest.skip("not a git checkout: there is no list of tracked files")
    wrong = re.compile(r"(?<![\w-])tlcr\[|pip install (-\S+ )*['\"]?tlcr(?![\w_-])")
    assert wrong.search("pip install 'tlcr[openai]'") and wrong.search("pip install -U tlcr")
    found = []
    for name in names.stdout.split():
        path = ROOT / name
        if path.suffix in (".md", ".py", ".toml", ".yaml", ".yml") and path != Path(__file__) and path.exists():
            found += [(name, line) for line in path.read_text(encoding="utf-8").splitlines() if wrong.search(line)]
    assert found == []


@pytest.mark.slow
def test_type_checkers_find_an_editable_installation(tmp_path: Path) -> None:
    origin = next((one.read_text("direct_url.json") for one in distributions(name=DISTRIBUTION)), None)
    if origin is None or '"editable": true' not in origin:
        pytest.skip("tlcr is not installed as an editable package here")
    pytest.importorskip("mypy", reason="the type checker is an extra: dev")
    script = tmp_path / "uses.py"
    script.write_text("import tlcr\nreveal_type(tlcr.__all__)\ntlcr.fused_gae(1)\n", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), "--follow-imports", "silent", str(script)]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert "import-not-found" not in said and "import-untyped" not in said, said
    assert re.search(r'Revealed type is "[\w.]*list\[[\w.]*str\]"', said), said
    assert 'Missing positional argument "values"' in said, said
