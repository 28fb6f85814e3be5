"""Chat models are asked by every engine in every command, and give the same most probable answers."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.vllm_server import VLLM, serving
from tlcr.cli import main as cli
from tlcr.config.loading import load_config
from tlcr.config.schema import EngineName, GeneratorConfig, ReviserConfig, RunConfig
from tlcr.engines.generate import Generate
from tlcr.engines.paged import Paged
from tlcr.errors import DataError
from tlcr.experiment.pipeline import stage
from tlcr.experiment.preflight import preflight
from tlcr.judging.formats import BenchmarkQuestion, write_fastchat
from tlcr.models.loading import load_causal_lm

TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
TEXTS = ("The food was good", "bad", "I would never recommend this place; the waiter was rude")


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLCR_PROGRESS", "0")


@pytest.fixture
def folder(tiny_folder: Path) -> Path:
    """A model with large weights, whose answers depend on all that it reads: the tiny tokenizer makes thousands of
    tokens of a request."""
    longer = json.loads((tiny_folder / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (tiny_folder / "config.json").write_text(json.dumps(longer))
    model = load_causal_lm(GeneratorConfig(path=str(tiny_folder)))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10 if weight.dim() > 1 else 1)
    model.save_pretrained(tiny_folder)
    return tiny_folder


def answer(model: Path, output: Path, engine: dict[str, Any]) -> Path:
    rows = [{"question_id": k, "category": "math", "turns": [text, "And?"]} for k, text in enumerate(TEXTS)]
    (output / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = ["--prompts", str(output / "question.jsonl"), "--output_dir", str(output)]
    named += ["--model.chat_template", TEMPLATE, "--temperature", "0", "--max_new_tokens", "8", *flags(engine)]
    assert cli.main(["answer", str(model), *named]) == 0
    (cache,) = output.glob("cache/*.sqlite")
    return cache


def judge(model: Path, output: Path, engine: dict[str, Any]) -> Path:
    asked = [BenchmarkQuestion(k, "math", (text,)) for k, text in enumerate(TEXTS)]
    rows = [{"question_id": q.id, "category": q.category, "turns": list(q.turns)} for q in asked]
    (output / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, said in (("ours", "good"), ("theirs", "bad")):
        write_fastchat(output / f"{name}.jsonl", asked, [(said,)] * len(asked), name)
    named = [*(str(output / f"{name}.jsonl") for name in ("ours", "theirs")), "--prompts"]
    named += [str(output / "question.jsonl"), "--backend", "local", "--model.path", str(model), "--answer_format"]
    named += ["line", "--model.chat_template", TEMPLATE, "--max_new_tokens", "8", "--output_dir", str(output)]
    cli.main(["judge", *named, *flags(engine)])  # it babbles, and no verdict can be read
    (cache,) = output.rglob("*.sqlite")
    return cache


def revise(model: Path, output: Path, engine: dict[str, Any]) -> Path:
    records = [{"prompt": f"Q{k}?", "chosen": " It was warm.", "rejected": f" {text}"} for k, text in enumerate(TEXTS)]
    (output / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings: dict[str, Any] = {"output_dir": str(output), "data.preferences": str(output / "pairs.jsonl")}
    settings |= {"reviser.backend": "local", "reviser.model.path": str(model), "reviser.max_new_tokens": 8}
    settings |= {"reviser.model.chat_template": TEMPLATE, "reviser.batch_size": 2}
    settings |= {f"reviser.{name}": value for name, value in engine.items()}
    with pytest.raises(DataError, match="none of the 3 answers is a usable revision"):
        stage(load_config(None, settings), "revisions")
    return output / "revisions" / "answers.sqlite"


def flags(engine: dict[str, Any]) -> list[str]:
    return [word for name, value in engine.items() for word in (f"--{name}", json.dumps(value).strip('"'))]


def stored(cache: Path) -> dict[str, tuple[str, str, int]]:
    """Text, end and length of each answer, by what was asked of which model."""
    with closing(sqlite3.connect(cache)) as database:
        return {key: rest for key, *rest in database.execute("SELECT key, text, finish, answer_tokens FROM answers")}


@pytest.mark.parametrize("command", [answer, judge, revise])
def test_chat_models_are_asked_by_every_engine(
    command: Callable[..., Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once also by a server, which is sent the weights of the model of this machine."""
    asked: list[str] = []
    for name, kind in (("generate", Generate), ("paged", Paged)):
        own = kind.sample
        monkeypatch.setattr(kind, "sample", lambda *a, own=own, name=name: asked.append(name) or own(*a))

    def by(name: EngineName, **settings: Any) -> dict[str, tuple[str, str, int]]:
        (tmp_path / name).mkdir()
        return stored(command(folder, tmp_path / name, {"engine": name, **settings}))

    expected = by("generate")
    assert len(expected) >= len(TEXTS) and len({text for text, *_ in expected.values()}) > 1
    assert set(asked) == {"generate"}
    asked.clear()
    assert by("paged") == expected
    assert set(asked) == {"paged"}
    if command is not answer:
        return
    asked.clear()
    fake = VLLM(load_causal_lm(GeneratorConfig(path=str(folder))))
    with serving(fake) as addresses:
        assert by("server", server=addresses) == expected
    assert not asked and len(fake.loaded) in (1, 2)  # for each turn
    assert not list(tmp_path.rglob("*server_weights"))


def test_the_doctor_looks_at_the_revisers_engine(folder: Path, tmp_path: Path) -> None:
    def found(**settings: Any) -> list[tuple[str, str]]:
        reviser = ReviserConfig(backend="local", model=GeneratorConfig(path=str(folder)), **settings)
        cfg = RunConfig(output_dir=str(tmp_path / "run"), reviser=reviser)
        return [(one.level, one.fact) for one in preflight(cfg) if one.subject == "reviser.engine"]

    assert found() == found(engine="paged") == []
    ((level, fact),) = found(engine="auto")
    assert level == "note" and fact.startswith("reviser.engine auto takes 'generate': continuous batching is slower")
    missing = ("blocked", "reviser.engine vllm needs the package vllm, and it is not installed")
    assert found(engine="vllm") == [missing]
