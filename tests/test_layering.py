"""The one-way rule of docs/architecture.md, read from the imports: values flow down the stages, imports point up."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tlcr"

TOOLS, MODELS, STAGES, RECIPES, PIPELINE, COMMANDS = range(6)
LAYER_NAMES = ("tools", "models", "stages", "recipes", "pipeline", "commands")

# A new module is added to its layer here; "data" and "ops" stand for all that is in those folders.
LAYERS = {
    TOOLS: (
        "attention bidirectional bootstrap callbacks chat checkpoint config config_loading distributed errors "
        "interrupt kl layers metrics microbatches models ops optim padding progress supervised tokenization "
        "trials types"
    ),
    MODELS: "actor_critic discriminator dpo reward_model sft",
    STAGES: (
        "advantages data discriminator_analysis discriminator_metrics evaluate judging labels reward reward_sources "
        "rollout span_metrics update"
    ),
    RECIPES: (
        "analyse_discriminator ppo_metrics ppo_run train_discriminator train_dpo train_ppo train_reward_model train_sft"
    ),
    PIPELINE: "analysis_page arm figures judges pipeline report results run_folder",
    COMMANDS: "__init__ __main__ cli cli_parsers doctor evaluate_tokens memory score",
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names.split()}

# Within these layers modules may build on one another; stages and the models that they ask know nothing of each other.
OPEN_LAYERS = {TOOLS, RECIPES, PIPELINE, COMMANDS}

Graph = Mapping[str, frozenset[str]]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported(tree: ast.Module, *, at_import_only: bool) -> Iterator[str]:
    """Dotted names that a module imports; without those inside functions and TYPE_CHECKING blocks if so asked."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if at_import_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if at_import_only and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))


def read_graph(*, at_import_only: bool = False) -> tuple[Graph, Graph]:
    """For every module: the modules of tlcr that it imports, and the other top-level packages."""
    files = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    own, foreign = {}, {}
    for name, path in files.items():
        names = list(imported(ast.parse(path.read_text(encoding="utf-8")), at_import_only=at_import_only))
        inside, outside = set(), set()
        for dotted in names:
            top, _, rest = dotted.partition(".")
            if top != "tlcr":
                outside.add(top)
                continue
            # "tlcr.a.b.name": the longest part of it that is a module
            parts = rest.split(".")
            found = next((m for n in range(len(parts), 0, -1) if (m := ".".join(parts[:n])) in files), "__init__")
            inside.add(found)
        own[name], foreign[name] = frozenset(inside - {name}), frozenset(outside)
    return own, foreign


def family(module: str) -> str:
    return module.partition(".")[0]


def violations(graph: Graph) -> list[str]:
    """Every import that does not point to a lower layer."""
    found = []
    for module, imports in graph.items():
        for other in sorted(imports):
            here, there = LAYER_OF[family(module)], LAYER_OF[family(other)]
            if family(module) == family(other) or there < here or (there == here and here in OPEN_LAYERS):
                continue
            # cli asks for tlcr.__version__; nobody else may go through the public names
            if (module, other) == ("cli", "__init__"):
                continue
            found.append(f"{module} ({LAYER_NAMES[here]}) imports {other} ({LAYER_NAMES[there]})")
    return found


def reachable(graph: Graph, start: str) -> set[str]:
    seen, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting.extend(graph.get(module, ()))
    return seen


@pytest.fixture(scope="module")
def graph() -> Graph:
    return read_graph()[0]


def test_every_module_has_its_layer(graph: Graph) -> None:
    assert {family(module) for module in graph} <= set(LAYER_OF), "add the new module to LAYERS above"
    assert {name for name in LAYER_OF if name not in {family(module) for module in graph}} == set()


def test_imports_point_to_lower_layers_only(graph: Graph) -> None:
    assert violations(graph) == []


@pytest.mark.parametrize(
    ("module", "other"),
    [("update", "reward"), ("reward", "data.readers"), ("ops.reference", "config"), ("labels", "train_sft")],
)
def test_the_rule_can_fail(graph: Graph, module: str, other: str) -> None:
    assert other not in graph[module]
    bent = {**graph, module: graph[module] | {other}}
    caught = violations(bent) or [name for name in reachable(bent, module) if name == "config"]
    assert caught


def test_no_module_imports_itself_through_others() -> None:
    graph = read_graph(at_import_only=True)[0]
    for module, imports in graph.items():
        if module not in ("__init__", "ops"):  # these two collect what their own submodules define
            assert not any(module in reachable(graph, other) for other in imports), module


@pytest.mark.parametrize(
    ("module", "blind_to"),
    [
        ("reward", {"tokenization", "data", "discriminator", "reward_sources", "actor_critic"}),
        ("advantages", {"tokenization", "data", "discriminator", "reward", "reward_sources"}),
        ("update", {"tokenization", "data", "discriminator", "reward", "reward_sources", "reward_model"}),
        ("labels", {"models", "discriminator", "actor_critic"}),
        ("ops", {"config", "types", "tokenization", "models"}),
        ("types", {"ops", "config"}),
    ],
)
def test_a_stage_cannot_even_reach_what_it_is_blind_to(graph: Graph, module: str, blind_to: set[str]) -> None:
    starts = [name for name in graph if family(name) == module]
    reached = {family(name) for start in starts for name in reachable(graph, start)}
    assert reached & blind_to == set()


def test_only_the_ops_know_their_implementations() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("ops", "kernels"):
            continue
        text = path.read_text(encoding="utf-8")
        for name in ("torch.ops.tlcr", "tlcr._C", "tlcr.kernels", "from tlcr import _C", "import kernels"):
            assert name not in text, f"{path.name} mentions {name}; go through tlcr.ops"


def test_others_enter_the_ops_by_the_door() -> None:
    """`tlcr.ops` and the types it returns; not its modules."""
    for module, imports in read_graph()[0].items():
        if family(module) != "ops":
            inner = {name for name in imports if name.startswith("ops.")}
            assert inner <= {"ops.types"}, module


def test_the_command_line_is_parsed_without_heavy_imports() -> None:
    own, foreign = read_graph(at_import_only=True)
    light = {"jsonargparse", "yaml", "tlcr", *sys.stdlib_module_names}
    for start in ("cli", "__main__", "config", "config_loading", "errors", "__init__"):
        for module in reachable(own, start):
            assert foreign[module] <= light, (
                f"{start} reaches {module}, which imports {sorted(foreign[module] - light)}"
            )
