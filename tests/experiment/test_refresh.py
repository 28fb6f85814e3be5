"""An arm whose discriminator learns from the policy's answers: resumed, evaluated again, by a model, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.experiment.helpers import small_config
from tlcr.config.loading import load_config
from tlcr.config.schema import Arm, RefreshConfig, RewardConfig, RunConfig
from tlcr.errors import ConfigError, EndpointError
from tlcr.experiment import refresh as module
from tlcr.experiment.frozen_models import FrozenModels
from tlcr.experiment.opening import open_run
from tlcr.experiment.pipeline import run, stage
from tlcr.experiment.preflight import settings
from tlcr.recipes import train_ppo
from tlcr.training.metrics import read_metrics

FOLDER = Path("ppo") / "self-training" / "seed-0"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    cfg = small_config(
        tmp_path_factory.mktemp("run") / "run", **{"ppo.updates": 4, "discriminator.learning_rate": 0.02}
    )
    arm = Arm("self-training", reward=RewardConfig(refresh=RefreshConfig(every=1)))
    run(cfg := replace(cfg, arms=(arm,)))
    return cfg


def weights(cfg: RunConfig, *parts: str) -> dict[str, torch.Tensor]:
    return load_file(Path(cfg.output_dir).joinpath(*parts) / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_discriminator_moves_in_ppo_and_the_first_one_stays(finished: RunConfig) -> None:
    first, last = weights(finished, "discriminator"), weights(finished, str(FOLDER), "discriminator")
    assert first.keys() == last.keys() and not equal(first, last)
    rows = read_metrics(Path(finished.output_dir) / FOLDER / "metrics.jsonl")
    assert [row["step"] for row in rows if "refresh/pairs" in row] == [1, 2, 3]
    assert all(row["refresh/pairs"] == 4 and row["refresh/loss"] > 0 for row in rows if "refresh/pairs" in row)
    assert ["time/refresh_s" in row for row in rows if row["step"]] == [True, True, True, False]


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(
    finished: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off in the third round, after two refreshes, each of which changed what the next round is paid."""
    cfg = replace(finished, output_dir=str(tmp_path / "run"))
    shutil.copytree(finished.output_dir, cfg.output_dir, ignore=shutil.ignore_patterns("ppo"))
    rounds: list[int] = []

    def fails(*given: Any) -> dict[str, float]:
        rounds.append(1)
        if len(rounds) == 3:
            raise OSError("the power went out")
        return metrics(*given)

    metrics = train_ppo.update_metrics
    with monkeypatch.context() as patch:
        patch.setattr(train_ppo, "update_metrics", fails)
        with pytest.raises(OSError, match="the power went out"):
            run(cfg, resume=True)
    run(cfg, resume=True)
    for part in ("policy", "value", "discriminator"):
        assert equal(weights(cfg, str(FOLDER), part), weights(finished, str(FOLDER), part)), part


def test_evaluating_again_pays_by_the_discriminator_of_the_end(finished: RunConfig) -> None:
    file = Path(finished.output_dir) / FOLDER / "evaluation.json"
    found = json.loads(file.read_text())
    stage(finished, "evaluate", resume=True)
    assert json.loads(file.read_text()) == found
    assert found["after"]["proxy_per_token"] != found["before"]["proxy_per_token"]


# ---- a model as reviser


@pytest.fixture
def server() -> Iterator[Any]:
    pytest.importorskip("openai", reason="the endpoint is an extra")
    from tests.chat.chat_server import ChatServer, serving

    with serving(ChatServer()) as started:
        yield started


def by_endpoint(server: Any, folder: Path) -> dict[str, Any]:
    """A refresh after each update, revised by the model of the server."""
    return {
        "output_dir": str(folder / "run"),
        "data.preferences": str(folder / "pairs.jsonl"),
        "reward.refresh.every": 1,
        "reviser.backend": "endpoint",
        "reviser.endpoint.model": "m",
        "reviser.endpoint.base_url": server.address,
    }


def test_a_model_is_asked_with_the_chosen_answer_to_the_prompt_and_never_twice(server: Any, tmp_path: Path) -> None:
    records = [
        {"prompt": f"How was the {word}?", "chosen": f" I liked the {word} very much.", "rejected": " It was cold."}
        for word in ("soup", "tea", "bread", "film", "song", "cake")
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cfg = load_config(None, by_endpoint(server, tmp_path))
    opened = open_run(cfg, resume=False)
    prompt = opened.prompts.train[0]
    (word,) = (w for w in ("soup", "tea", "bread", "film", "song", "cake") if w in prompt)
    revise = module._by_a_model(opened, cfg, tmp_path / "trial")
    asked = [(prompt, f" The {word} was bad but the {word} is what it is."), (prompt, "  ")]
    edit, of_nothing = revise(asked, 5)
    assert edit is not None and of_nothing is None
    assert (edit.prompt, edit.rejected) == asked[0]
    assert edit.revised == f" The {word} was good but the {word} is what it is."
    sent = len(server.requests)
    assert sent == 1 and f"I liked the {word} very much." in json.dumps(server.requests[0])
    assert revise(asked, 5) == [edit, None] and len(server.requests) == sent
    assert (tmp_path / "trial" / "refresh" / "answers.sqlite").is_file()


def test_an_id_of_two_records_is_refused(server: Any, tmp_path: Path) -> None:
    """The reviser would be shown the chosen answer to another prompt."""
    records = [
        {"id": "1", "prompt": f"How was the {word}?", "chosen": f" I liked the {word}.", "rejected": " It was cold."}
        for word in ("soup", "tea")
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    values = by_endpoint(server, tmp_path) | {"data.held_out": 0.0}
    opened = open_run(load_config(None, values), resume=False)
    with pytest.raises(ConfigError, match="1 ids belong to several unlike records, such as '1'"):
        module._by_a_model(opened, opened.cfg, tmp_path / "trial")
    assert not server.requests


def test_answers_that_got_no_revision_stop_the_run_unless_it_is_told_to_skip_them(server: Any, tmp_path: Path) -> None:
    from tests.chat.chat_server import Reply

    pair = {"prompt": "How was the tea?", "chosen": " I liked the tea.", "rejected": " It was cold."}
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps(pair) + "\n" + json.dumps({**pair, "prompt": "And the soup?"}) + "\n"
    )
    values = by_endpoint(server, tmp_path) | {"data.held_out": 0.0, "reviser.endpoint.retries": 0}
    server.behave = lambda *_: Reply({"error": {"message": "oops"}}, 500)
    opened = open_run(load_config(None, values), resume=False)
    asked = [(opened.prompts.train[0], " The tea was bad.")]
    with pytest.raises(EndpointError, match=r"1 of 1 pairs got no answer.*oops"):
        module._by_a_model(opened, opened.cfg, tmp_path / "trial")(asked, 5)
    skipping = replace(opened.cfg, reviser=replace(opened.cfg.reviser, on_unanswered="skip"))
    assert module._by_a_model(opened, skipping, tmp_path / "trial")(asked, 5) == [None]


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward.kind": "random"}, r"kind 'random' reads no discriminator; set refresh\.every: 0"),
        ({"data.preferences": "p.jsonl", "data.edits": "e.jsonl"}, r"reviser\.backend is 'none'; set it to endpoint"),
        (
            {"model.path": "m", "reviser.backend": "local", "reviser.model.path": "r"},
            r"data\.preferences is not set; name preferences",
        ),
        (
            {
                "data.preferences": "p.jsonl",
                "data.prompts": "q.jsonl",
                "reviser.backend": "local",
                "reviser.model.path": "r",
            },
            r"data\.prompts 'q\.jsonl' have not; drop data\.prompts",
        ),
        ({"sharding.kind": "full"}, r"sharding\.kind 'full' does not leave"),
        ({"lora.rank": 4}, r"lora\.roles \('policy', 'value', 'discriminator'\) does not leave"),
        ({"ppo.keep_best": True, "ppo.evaluate_every": 5}, r"ppo\.keep_best compares the own rewards"),
        ({"rollout.environment": "m:f"}, r"rollout\.environment 'm:f' does not leave"),
    ],
)
def test_what_cannot_be_refreshed_is_refused_with_the_config(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, {"reward.refresh.every": 5, **changes})


def test_several_processes_are_refused_before_and_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(None, {"output_dir": str(tmp_path), "reward.refresh.every": 5, "ppo.minibatch_size": 32})
    assert not [found for found in settings(cfg) if found.subject == "reward.refresh.every"]
    monkeypatch.setattr(module, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="a launcher started 2; run without the launcher"):
        module.refresh_of(open_run(cfg, resume=False), cfg, FrozenModels(), 0, tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (found,) = [found for found in settings(cfg) if found.subject == "reward.refresh.every"]
    assert found.level == "blocked" and "in one process" in found.fact
