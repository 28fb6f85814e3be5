"""The documents tell the truth: commands exist, code runs, paths and names are there, YAML loads."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
from packaging.requirements import Requirement

from tlcr.cli import main as cli
from tlcr.cli.parsers import build_parser
from tlcr.config.argument_parser import flags_of
from tlcr.config.judging import JudgeConfig
from tlcr.config.loading import knobs, load_command_config, load_config
from tlcr.config.schema import RewardKind, RunConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OF_TLCR = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "results").glob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
]
OF_TRAINERS = sorted((ROOT / "docs" / "hosts").glob("*.md"))
"""Their YAML, their knobs and their commands are a trainer's: tests/hosts/in/ looks them up there."""
PAGES = [*OF_TLCR, *OF_TRAINERS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def title(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(text) if found == language]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def commands(text: str) -> Iterator[list[str]]:
    """Command lines of bash blocks, and inline code that starts with make, tlcr, accelerate or python."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:make|tlcr|accelerate|python) [^`]+)`", prose(text))
    for line in lines:
        words = shlex.split(line, comments=True)
        if ">" in words:
            del words[words.index(">") :]
        if words:
            yield words


def make_targets() -> set[str]:
    phony = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    return set(phony[1].split())


RUN_VARIABLES = {"ACCELERATE_USE_CPU", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS"}
"""Variables of accelerate, torch and OpenMP that documents set for a run."""


def of_torch() -> tuple[str, ...]:
    """The libraries that `make wheels` has auditwheel leave out of a wheel."""
    found = re.search(r"^OF_TORCH = (.*)$", (ROOT / ".ci/wheels.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    names: tuple[str, ...] = ast.literal_eval(found[1])
    return names


def check_command(words: list[str]) -> None:
    """Raises AssertionError for a command that this repository does not know."""
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= make_targets(), words
    elif words[0] == "tlcr":
        check_tlcr(words[1:])
    elif words[:2] == ["accelerate", "launch"] or words[:3] == ["python", "-m", "torch.distributed.run"]:
        launched = len(words) - words[::-1].index("-m")
        assert words[launched] == "tlcr" or is_module(words[launched]), words
        if words[launched] == "tlcr":
            check_tlcr(words[launched + 1 :])
    elif words[:3] == ["python", "-m", "pytest"]:
        for word in words[3:]:
            assert not word.startswith("tests") or (ROOT / word).exists(), words
    elif words[0] in ("python", "python3") and words[1] == "-m":
        assert is_module(words[2]) or words[2].partition(".")[0] in TRAINERS, words
        check_names(words[3:])
    elif words[:2] == ["swift", "rlhf"]:
        check_names(words[2:])
    elif words[0] == "echo":
        (line,) = ast.parse(words[1]).body
        assert isinstance(line, ast.Import) and [is_module(name.name) for name in line.names] == [True], words
    elif words[0] == "export":
        assert words[1].partition("=")[0] in variables_of_rewards(), words
    elif words[0].startswith("--"):  # flags to be added to a trainer's own command
        check_names(words)
    elif words[0] in ("python", "sbatch"):
        assert (ROOT / words[1]).is_file(), words
    elif words[0] == "pip":
        check_pip(words[1], words[2:])
    elif words[:2] == ["auditwheel", "repair"]:
        assert words[2:-1] == [word for name in of_torch() for word in ("--exclude", name)], words
    elif words[0] == "cp":
        assert (ROOT / words[1]).is_file(), words
    elif words[:2] == ["git", "clone"]:
        assert words[2].startswith("https://"), words
    elif words[0] in ("source", "pre-commit"):
        assert words[1:] == ({"source": [".venv/bin/activate"], "pre-commit": ["install"]}[words[0]]), words
    elif "=" in words[0]:
        assert words[0].partition("=")[0] in {*build_variables(), *RUN_VARIABLES}, words
        check_command(words[1:])
    else:
        raise AssertionError(f"a document names a command that nobody checks: {shlex.join(words)}")


TRAINERS = {"openrlhf", "skyrl", "verl"}


def check_names(words: list[str]) -> None:
    """Raises AssertionError for a module or function of tlcr that a trainer is to import and that is not there."""
    for name in re.findall(r"(?:^|=)(tlcr\.[\w.]+)$", "\n".join(words), re.MULTILINE):
        assert is_module(name) or name.rpartition(".")[2] in names_of(name.rpartition(".")[0]), words


def names_of(module: str) -> set[str]:
    """What a module defines, read and not imported: its trainer is not here."""
    path = (ROOT / module.replace(".", "/")).with_suffix(".py")
    body = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
    return {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}


def variables_of_rewards() -> set[str]:
    from tlcr.hosts import remote

    return {remote.URL, remote.TOKEN, remote.TEMPERATURE, remote.TRIES}


def is_module(name: str) -> bool:
    """Whether `python -m` runs it from the root of the checkout: a file, or a package with a `__main__`."""
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


PIPS_PARSER = """
import sys
from pip._internal.commands import create_command
print(*create_command(sys.argv[1]).parser.parse_args(sys.argv[2:])[1], sep="\\n")
"""


def check_pip(command: str, arguments: list[str]) -> None:
    """By pip's own parser, in a process of its own; what is installed is the checkout or looks like a package."""
    parse = [sys.executable, "-c", PIPS_PARSER, command, *arguments]
    done = subprocess.run(parse, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"pip {command} {shlex.join(arguments)}: {done.stderr}"
    for name in done.stdout.split():
        assert re.fullmatch(r"\.(\[\w+\])?|\S+\.whl(\[\w+\])?", name) or Requirement(name), arguments


def build_variables() -> set[str]:
    """The variables that setup.py reads, as its docstring lists them."""
    docstring = ast.get_docstring(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))) or ""
    listed = docstring.partition("Environment variables")[2]
    return {name for line in listed.splitlines() for name in re.findall(r"\b[A-Z]+(?:_[A-Z]+)*\b", line[:26])}


built_parser = functools.cache(build_parser)
"""Making the parsers takes longer than all that is asked of them here."""


@pytest.fixture(autouse=True)
def parsers_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "build_parser", built_parser)


def check_tlcr(arguments: list[str]) -> None:
    if arguments[-1] in ("--help", "--help-all"):
        assert arguments[0] in cli.HANDLERS, arguments
        assert arguments[-1] in flags_of(built_parser()[1][arguments[0]]), arguments
        arguments = arguments[:-1]
        if len(arguments) == 1:
            return
    try:
        cli._parse(arguments)
    except cli.ConfigError as error:
        raise AssertionError(f"tlcr {shlex.join(arguments)}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_command_exists(page: Path) -> None:
    found = list(commands(page.read_text(encoding="utf-8")))
    for words in found:
        check_command(words)
    if title(page) == "README.md":
        assert ["make", "quickstart"] in found and ["make", "test"] in found
        assert {words[1] for words in found if words[0] == "tlcr"} >= {"run", "train", "score", "report", "doctor"}


@pytest.mark.parametrize(
    "line",
    [
        *(
            "make quickstrat",
            "tlcr rn a.yaml",
            "tlcr run a.yaml --ppo.update 3",
            "tlcr report --help-all",
            "accelerate launch -m tlrc run",
            "ACCELERATE_USE_CPU=true python -m torch.distributed.run --nproc_per_node 2 -m tlcr rn a.yaml",
            "rm x",
            "python -m examples.no_study",
            "python -m benchmarks",  # a package that is not run
            "python -m benchmarks.report.templates",
            "python benchmarks/ops.py",
            "python -m pytest tests/reward",
            "cp examples/no_config.yaml mine.yaml",
        ),
        *("pip instal torch", "pip install --no-isolation .", "TLCR_BILD=cpu pip wheel ."),
        *("python -m skyrl.main trainer.override_entrypoint=tlcr.hosts.skirl", "export TLCR_REWARD_URI=http://a"),
        *("--custom-rm-path tlcr.hosts.slime.rewards", "echo 'import tlcr.hosts.swiftly' > plugin.py"),
    ],
)
def test_a_wrong_command_would_be_caught(line: str) -> None:
    with pytest.raises(AssertionError):
        check_command(shlex.split(line))


def test_a_wrong_command_within_a_sentence_would_be_caught() -> None:
    (words,) = commands("`python -m\nbenchmarks.nothing --json x.json` measures it.")
    with pytest.raises(AssertionError, match=r"benchmarks\.nothing"):
        check_command(words)


def test_every_benchmark_that_sources_and_rules_name_exists() -> None:
    files = [ROOT / "Makefile", ROOT / "pyproject.toml"]
    files += [path for folder in ("benchmarks", "tlcr", "examples") for path in (ROOT / folder).rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    named = set(re.findall(r"-m (benchmarks\.\w[.\w]*)", text))
    assert len(named) >= 7
    assert [name for name in named if not is_module(name)] == []
    assert [path for path in re.findall(r"python (benchmarks/\w\S*)", text) if not (ROOT / path).is_file()] == []


def test_the_page_on_installing_names_every_variable_of_the_build() -> None:
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE))
    source = (ROOT / "setup.py").read_text(encoding="utf-8")
    read = set(re.findall(r"environ(?:ment)?\.get\(\"(\w+)\"", source)) - {"CUDA_PATH"}  # which older toolkits set
    assert listed == build_variables() == read | {"MAX_JOBS"}  # which torch reads


def test_make_has_a_rule_for_every_target() -> None:
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert make_targets() == rules >= {"quickstart", "test", "lint", "format", "bench", "bench-report", "bench-compare"}


def test_the_python_of_the_readme_runs_and_learns() -> None:
    (snippet,) = blocks(README, "python")
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["logits"].grad.abs().sum() > 0
    assert names["values"].grad.abs().sum() > 0
    assert (names["rewards"][~names["mask"]] == 0).all()


def test_the_site_says_what_the_readme_says() -> None:
    page, loop = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("quickstart.md", "own_loop.md"))
    table = blocks(page, "text")
    assert table and set(table) <= set(blocks(README, "text"))
    assert blocks(loop, "python") == blocks(README, "python")


def test_the_json_of_the_readme_is_read_as_records(tmp_path: Path) -> None:
    import json

    records = [json.loads(block) for block in blocks(README, "json")]
    assert [set(record) for record in records] == [{"prompt", "chosen", "rejected"}, {"prompt", "rejected", "revised"}]


@pytest.mark.parametrize("page", OF_TRAINERS, ids=title)
def test_every_python_of_a_trainers_page_imports_what_is_there(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        imports = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
        ours = [node for node in imports if node.module is not None and node.module.startswith("tlcr.")]
        assert ours
        for node in ours:
            assert {name.name for name in node.names} <= names_of(str(node.module)), ast.unparse(node)


@pytest.mark.parametrize("page", OF_TLCR, ids=title)
def test_every_yaml_loads(page: Path, tmp_path: Path) -> None:
    for index, block in enumerate(blocks(page.read_text(encoding="utf-8"), "yaml")):
        path = tmp_path / f"{index}.yaml"
        path.write_text(block, encoding="utf-8")
        if page.name == "judging.md":
            assert load_command_config(JudgeConfig(), path) != JudgeConfig()
        else:
            assert load_config(path) != RunConfig()


# a study is no config, but names one: tests/examples/test_discriminator_study.py reads it
CONFIGS = sorted(path for path in (ROOT / "examples").rglob("*.yaml") if path.name != "study.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_example_loads(path: Path) -> None:
    assert load_config(path) != RunConfig()


def test_the_judge_s_prompt_on_its_page_is_the_one_that_is_asked() -> None:
    from tlcr.judging.formats import BenchmarkQuestion
    from tlcr.judging.prompt import comparison_question

    question = BenchmarkQuestion(1, "any", ("{request}",))
    asked = comparison_question(question, 0, ["{reply}"], ["{reply}"], "json", max_new_tokens=1, temperature=0.0)
    page = (ROOT / "docs" / "judging.md").read_text(encoding="utf-8")
    assert blocks(page, "text") == [asked.messages[0].content + "\n"]


def unknown_knobs(text: str) -> set[str]:
    """What inline code calls `section.knob` and the config does not have; a file's name is no knob."""
    known = {knob.path for knob in knobs(RunConfig)}
    sections = {path.partition(".")[0] for path in known if "." in path}
    files = {"html", "json", "jsonl", "md", "py", "yaml"}
    named = re.findall(r"`(?:--)?(\w+)\.(\w+(?:\.\w+)*)[^`]*`", prose(text))
    return {f"{section}.{name}" for section, name in named if section in sections and name not in files} - known


@pytest.mark.parametrize("page", OF_TLCR, ids=title)
def test_every_knob_that_is_named_exists(page: Path) -> None:
    assert unknown_knobs(page.read_text(encoding="utf-8")) == set()


def test_an_unknown_knob_would_be_caught() -> None:
    assert unknown_knobs("Set `ppo.update: 3`, `--kl.coef 1` or `reward.py`.") == {"ppo.update"}


def map_paths() -> list[str]:
    """The paths of the README's map, folders with a slash at the end."""
    section = README.partition("## Map")[2].partition("\n## ")[0]
    (tree,) = blocks(section, "text")
    paths, folders = [], [""]
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, meaning = line.strip().partition(" ")
        path = folders[depth] + name
        if name.endswith("/"):
            folders[depth + 1 :] = [path]
        assert meaning.strip() or path in ("tlcr/", "docs/"), f"{path} has no meaning"
        paths.append(path)
    return paths


def test_every_path_of_the_map_exists() -> None:
    for path in map_paths():
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


def test_the_map_names_every_room_and_page() -> None:
    listed = map_paths()
    modules = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "tlcr").glob("*.py") if not path.name.startswith("__")
    }
    folders = {f"tlcr/{path.parent.name}/" for path in (ROOT / "tlcr").glob("*/__init__.py")}
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert modules | folders | pages <= set(listed)
    assert len(listed) == len(set(listed))
    names = ("credentials", "distribution", "errors", "files", "gloo", "types")
    roots = {f"tlcr/{name}.py" for name in names}
    assert modules == roots, "what stands at the root of the package is known to every folder; give the module one"


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_path_in_the_prose_exists(page: Path) -> None:
    text = prose(page.read_text(encoding="utf-8"))
    for path in re.findall(r"`((?:tlcr|docs|tests|examples|benchmarks|csrc|kernels)/[\w./-]*)`", text):
        is_figure = page in OF_TRAINERS and path.startswith("tlcr/")  # of a trainer's log
        assert "NAME" in path or "FAMILY" in path or is_figure or (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose(page.read_text(encoding="utf-8"))):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_example_has_a_line_in_the_list_of_examples() -> None:
    listed = set(
        re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", (ROOT / "examples/README.md").read_text("utf-8"), re.MULTILINE)
    )
    folders = {f"{path.name}/README.md" for path in (ROOT / "examples").iterdir() if path.is_dir()} - {
        "__pycache__/README.md"
    }
    assert listed >= folders | {path.name for path in (ROOT / "examples").glob("*.yaml")}


def test_every_reward_is_on_its_page_and_all_but_a_function_of_one_s_own_in_the_comparison() -> None:
    kinds = set(get_args(RewardKind))
    rows = re.findall(r"^\|( `[^|]+)\|", (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {kind for row in rows for kind in re.findall(r"`(\w+)`", row)} >= kinds
    assert {arm.reward.kind for arm in load_config(ROOT / "examples/reward_comparison.yaml").arms} == kinds - {
        "callable"
    }


def test_the_changelog_says_where_each_module_has_gone() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = [re.findall(r"`(tlcr\.[\w.]+)`", row) for row in re.findall(r"^\| `tlcr\..*\|$", text, re.MULTILINE)]
    assert len(rows) > 20
    for row in rows:
        *old, new = row
        if "the same names" not in text.partition(f"`{old[0]}`")[2].partition("\n")[0]:
            assert find_spec(new) is not None, new
        else:
            assert all(find_spec(f"{new}.{name.rpartition('.')[2]}") for name in old), row


def test_every_public_name_in_the_prose_exists() -> None:
    import tlcr

    names = {name for page in PAGES for name in re.findall(r"\btlcr\.(?:ops\.)?(\w+)\(", page.read_text("utf-8"))}
    assert names
    for name in names:
        assert hasattr(tlcr, name) or hasattr(tlcr.ops, name), name


def too_wide(text: str) -> list[str]:
    """Lines of more than 120 columns, but for tables, links, fenced text and what is one unbreakable word."""
    lines = prose(text).splitlines()
    return [line for line in lines if len(line) > 120 and not line.startswith("|") and "](http" not in line]


# benchmarks.md is written by benchmarks/report.py
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "benchmarks.md"], ids=title)
def test_lines_are_at_most_120_wide(page: Path) -> None:
    assert too_wide(page.read_text(encoding="utf-8")) == []


def test_a_wide_line_would_be_caught() -> None:
    wide = "word " * 30
    assert too_wide(f"{wide}\n| {wide} |\n```text\n{wide}\n```\n") == [wide]


# No build asks another site whether a page is there: what can be checked without a network is the form.
EXTERNAL = re.compile(r"https://arxiv\.org/abs/\d{4}\.\d{5}")


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_to_other_sites_are_to_papers(page: Path) -> None:
    for link in re.findall(r"\]\((\w+://[^)]*)\)", page.read_text(encoding="utf-8")):
        assert EXTERNAL.fullmatch(link), link


DOCS = ROOT / "docs"
REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))


def listed_pages(page: str) -> Iterator[str]:
    """The pages that a page's tables of contents name, and all that those name, as paths in docs/ without .md."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for body in re.findall(r"^```{toctree}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for name in body.split("\n"):
            if name and not name.startswith(":"):
                path = (Path(page).parent / name).as_posix()
                yield path
                yield from listed_pages(path)


def test_the_site_lists_every_page_once() -> None:
    listed = ["index", *listed_pages("index")]
    assert sorted(listed) == sorted(path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md"))


def test_the_reference_has_every_public_name() -> None:
    import tlcr

    described = set(re.findall(r"^\.\. auto(?:function|class):: tlcr\.(\w+)$", REFERENCE, re.MULTILINE))
    assert described == set(tlcr.__all__) - {"__version__", "ops"}
    of_ops = set(re.findall(r"^\.\. auto(?:function|class):: tlcr\.ops\.(\w+)$", REFERENCE, re.MULTILINE))
    assert described | of_ops >= set(tlcr.ops.__all__)


def test_the_reference_has_every_adaptor() -> None:
    described = set(re.findall(r"^\.\. automodule:: tlcr\.hosts\.(\w+)$", REFERENCE, re.MULTILINE))
    modules = {path.stem for path in (ROOT / "tlcr" / "hosts").glob("*.py")} - {"__init__", "verl_plugin"}
    assert described == modules  # the plugin has no names: verl imports it


def without_sections(tree: ast.AST, prefix: str = "") -> Iterator[str]:
    """Public functions with arguments whose docstring has more than one line, and no section that names them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from without_sections(node, f"{prefix}{node.name}.")
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith("_"):
            continue
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        docstring = ast.get_docstring(node) or ""
        if "\n" in docstring and set(names) - {"self", "cls"} and "\nArgs:\n" not in docstring:
            yield prefix + node.name


# pydoclint, a part of make docs, then holds the sections to the signature.
@pytest.mark.parametrize("module", sorted(re.findall(r"automodule:: tlcr\.([\w.]+)", REFERENCE)))
def test_what_the_reference_describes_names_its_arguments(module: str) -> None:
    base = ROOT / "tlcr" / module.replace(".", "/")
    files = sorted(base.glob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    assert files
    for path in files:
        assert list(without_sections(ast.parse(path.read_text(encoding="utf-8")))) == [], path


def test_a_docstring_without_sections_would_be_caught() -> None:
    docstrings = {"f": "One.\n\n    a: two.", "g": "One.\n\n    Args:\n        a: two.\n    ", "h": "One."}
    source = "".join(f'def {name}(a):\n    """{docstring}"""\n\n' for name, docstring in docstrings.items())
    assert list(without_sections(ast.parse(source))) == ["f"]
