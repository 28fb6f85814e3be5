"""Settings that nothing reads: which are found, and that no default and no setting in use is among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tlcr.config.loading import load_config
from tlcr.config.unread import OF_REWARDS, OF_RUNS, unread

SETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "reward.band": (0.5, {"reward.kind": "discrete"}),
    "reward.span_end": ("x", {"reward.kind": "spans"}),
    "reward.overlong_penalty": (2.0, {"reward.overlong_buffer": 4}),
    "reward.refresh.share": (0.25, {"reward.refresh.every": 5}),
    "reward.refresh.learning_rate": (1e-6, {"reward.refresh.every": 5}),
    "ppo.value_init": ("discriminator", {"ppo.value_model": "separate"}),
    "ppo.best_max_kl": (0.5, {"ppo.keep_best": True, "ppo.evaluate_every": 5}),
    "kl.horizon": (100, {"kl.target": 0.1}),
    "rollout.server": ("[http://localhost:1]", {"rollout.engine": "server"}),
    "rollout.server_weights": ("network", {"rollout.engine": "server", "rollout.server": "[http://localhost:1]"}),
    "rollout.max_turns": (7, {"rollout.environment": "m:f"}),
    "rollout.max_message_tokens": (7, {"rollout.environment": "m:f"}),
    "sharding.offload": (True, {"sharding.kind": "full"}),
    "sharding.replicas": (2, {"sharding.kind": "hybrid"}),
    "reviser.server": ("[http://localhost:1]", {"reviser.engine": "server"}),
}
"""For each knob a value that is not its default, and the settings with which it is read."""


def test_every_knob_of_the_tables_is_tried() -> None:
    assert SETS.keys() == {*(f"reward.{name}" for name in OF_REWARDS), *OF_RUNS}


@pytest.mark.parametrize("knob", SETS)
def test_a_knob_is_found_where_its_condition_is_missing_and_only_there(knob: str) -> None:
    value, condition = SETS[knob]
    without = {"ppo.value_model": "shared", knob: value}
    assert knob in dict(unread(load_config(None, without)))
    assert knob not in dict(unread(load_config(None, {**without, **condition})))


def test_an_arm_that_reads_it_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    arms = "arms: [{name: a, reward: {kind: continuous, band: 0.5}}, {name: b, reward: {kind: discrete, band: 0.5}}]\n"
    path.write_text(arms)
    assert not dict(unread(load_config(path)))
    path.write_text(arms.replace("discrete", "sign"))
    assert dict(unread(load_config(path))) == {"reward.band": "reward.kind: discrete"}


@pytest.mark.parametrize("path", sorted(Path("examples").rglob("config*.yaml")), ids=str)
def test_the_examples_set_nothing_in_vain(path: Path) -> None:
    assert not dict(unread(load_config(path)))


def test_no_default_is_set() -> None:
    assert not dict(unread(load_config(None)))
