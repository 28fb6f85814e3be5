"""The one-way rule: folders are the layers. The contracts stand in pyproject.toml; import-linter reads the imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tlcr"

Graph = Mapping[str, frozenset[str]]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names that importing a module imports: without those inside functions and TYPE_CHECKING blocks."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))


def read_graph() -> tuple[Graph, Graph]:
    """For every module: the modules of tlcr that importing it imports, and the other top-level packages."""
    files = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    own, foreign = {}, {}
    for name, path in files.items():
        inside, outside = set(), set()
        for dotted in imported(ast.parse(path.read_text(encoding="utf-8"))):
            top, _, rest = dotted.partition(".")
            if top != "tlcr":
                outside.add(top)
                continue
            # "tlcr.a.b.name": the longest part of it that is a module
            parts = rest.split(".")
            inside.add(next((m for n in range(len(parts), 0, -1) if (m := ".".join(parts[:n])) in files), "__init__"))
        own[name], foreign[name] = frozenset(inside - {name}), frozenset(outside)
    return own, foreign


def reachable(graph: Graph, start: str) -> set[str]:
    seen, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting.extend(graph.get(module, ()))
    return seen


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """The contracts of a checkout, held against the tlcr that stands in it."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    return subprocess.run([*command, "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_contracts_are_kept() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for path in PACKAGE.rglob("*.py"):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    return tmp_path


def test_every_contract_can_be_broken(copy: Path) -> None:
    """One upward import for each contract; the last module stands in no layer."""
    for module, other in {
        "rewards/composition": "tlcr.rewards.sources.build",
        "ppo/update": "tlcr.ppo.rollout",
        "ppo/advantages": "tlcr.models.discriminator",
        "ops/gae": "tlcr.config.schema",
        "types": "tlcr.errors",
        "recipes/train_sft": "tlcr.recipes.train_dpo",
        "training/optim": "tlcr.cli.main",
        "stray": "tlcr.errors",
    }.items():
        path = (copy / "tlcr" / module).with_suffix(".py")
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(f"{text}\n\ndef bent():\n    import {other}\n", encoding="utf-8")
    said = re.sub(r"\x1b\[[\d;]*m", "", lint_imports(copy).stdout)  # import-linter 2.6 colours what no terminal reads
    contracts = re.findall(r'^name = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1:]
    assert len(contracts) >= 6
    for contract in contracts:
        assert f"{contract} BROKEN" in said, contract
    assert "stray" in said


def test_no_module_imports_itself_through_others() -> None:
    graph = read_graph()[0]
    for module, imports in graph.items():
        if module not in ("__init__", "ops"):  # these two collect what their own submodules define
            assert not any(module in reachable(graph, other) for other in imports), module


def test_every_folder_says_what_lives_in_it() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, path
        assert path.parent.parent != PACKAGE or len(docstring.splitlines()) >= 2, f"{path}: say also what it may touch"


def test_only_the_ops_know_their_implementations() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("ops", "kernels"):
            continue
        text = path.read_text(encoding="utf-8")
        for name in ("torch.ops.tlcr", "tlcr._C", "tlcr.kernels", "from tlcr import _C", "import kernels"):
            assert name not in text, f"{path.name} mentions {name}; go through tlcr.ops"


def test_others_enter_the_ops_by_the_door() -> None:
    """`tlcr.ops`, the types it returns and the memory it takes; not its other modules."""
    for module, imports in read_graph()[0].items():
        if module.partition(".")[0] != "ops":
            inner = {name for name in imports if name.startswith("ops.")}
            assert inner <= {"ops.types", "ops.scratch"}, module


def test_the_command_line_is_parsed_without_heavy_imports() -> None:
    own, foreign = read_graph()
    light = {"jsonargparse", "yaml", "tlcr", *sys.stdlib_module_names}
    starts = ("cli.main", "__main__", "config.schema", "config.loading", "errors", "__init__", "experiment.preflight")
    for start in starts:
        reached = reachable(own, start)
        packages = {name.rpartition(".")[0] for name in reached} & own.keys()  # which Python imports on the way
        for module in reached | packages:
            assert foreign[module] <= light, (
                f"{start} reaches {module}, which imports {sorted(foreign[module] - light)}"
            )
