"""The comparison of engines goes on where it was cut: no copy is half, and no cost is that of a part."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "quickstart_engines.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; its neighbours, of which one is named vllm, are forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location("quickstart_engines", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in {"vllm", "engines"} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "base" / "sft").mkdir(parents=True)
    (tmp_path / "base" / "sft" / "weights").write_text("whole")
    return tmp_path


def test_a_copy_has_its_name_once_it_is_whole(script: ModuleType, output: Path) -> None:
    (output / "paged.part" / "sft").mkdir(parents=True)
    (output / "paged.part" / "sft" / "weights").write_text("ha")

    def cut(part: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        script.copied(output / "base", output / "paged", cut)
    assert not (output / "paged").exists() and (output / "paged.part").exists()
    script.copied(output / "base", output / "paged")
    assert (output / "paged" / "sft" / "weights").read_text() == "whole"
    assert not (output / "paged.part").exists()


def test_a_training_that_was_cut_begins_anew(script: ModuleType, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its row had the cost of what remained."""
    for seed, name in ((0, "evaluation.json"), (1, "checkpoint")):
        script.policy(output / "paged", seed).mkdir(parents=True)
        (script.policy(output / "paged", seed) / name).touch()
    found: list[list[str]] = []

    def tell(python: str, command: str, folder: Path, seeds: list[int], knobs: list[str]) -> None:
        found.append(sorted(path.name for path in (folder / "ppo" / "continuous").glob("*/*")))

    monkeypatch.setattr(script, "tell", tell)
    script.train("paged", sys.executable, output, [0, 1], "")
    assert found == [["evaluation.json"]]
    (row,) = map(json.loads, (output / "costs.jsonl").read_text().splitlines())
    assert (row["way"], row["seed"]) == ("paged", 1)


def test_seeds_that_were_added_are_evaluated_too(
    script: ModuleType, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(script, "tell", lambda python, command, folder, seeds, knobs: asked.append(seeds))
    for seeds in ([0], [0], [0, 1]):
        for seed in seeds:
            script.policy(output / "paged", seed).mkdir(parents=True, exist_ok=True)
            (script.policy(output / "paged", seed) / "evaluation.json").touch()
        script.evaluate(output / "paged", seeds)
    assert asked == [[0], [0, 1]]
    assert (script.policy(output / "paged-by-generate", 1) / "evaluation.json").exists()
