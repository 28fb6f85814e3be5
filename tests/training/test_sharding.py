"""Sharded models on two processes, which are started once: tests/training/sharded.py makes the checks."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from tests.launched import Outcomes, launch
from tests.training.sharded import checks
from tlcr.config.schema import ShardingConfig
from tlcr.errors import ConfigError
from tlcr.models import discriminator, dpo
from tlcr.training import sharding
from tlcr.training.sharding import plan
from tlcr.types import EncodedAnswer, EncodedComparison, LabelledAnswer, LabelledPair


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return launch("tests.training.sharded", tmp_path_factory.mktemp("sharded"), processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", checks.names)
def test_two_processes(two_processes: Outcomes, name: str) -> None:
    two_processes.assert_passed(name)


def test_one_process_has_nothing_to_share() -> None:
    assert plan(ShardingConfig()) is None
    with pytest.raises(ConfigError, match="there is one process; start several"):
        plan(ShardingConfig(kind="full"))


def test_inputs_belong_where_shards_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloaded shards lie on the CPU, and a forward pass gathers them on the process's device."""
    model = nn.Linear(1, 1)
    assert sharding.device_of(model) == torch.device("cpu")
    monkeypatch.setattr(sharding, "has_shards", lambda of: of is model)
    monkeypatch.setattr(sharding, "process_device", lambda: torch.device("meta"))
    assert sharding.device_of(model) == torch.device("meta")
    assert sharding.device_of(nn.Linear(1, 1)) == torch.device("cpu")


ROW = EncodedAnswer((5, 6, 7), 1, complete=True)
SIDE = LabelledAnswer("rejected", ROW, (-1, 0), (True, True))
ROOM: dict[str, Any] = {"pad_token_id": 0, "batch_size": 1}
READERS: dict[str, tuple[ModuleType, str, Callable[[nn.Module], object]]] = {
    "DPO": (
        dpo,
        "_answer_totals",
        lambda model: dpo.with_reference(model, [EncodedComparison(ROW, ROW)], **ROOM),
    ),
    "opinions": (discriminator, "classify", lambda model: discriminator.token_opinions(model, [ROW], **ROOM)),
    "predictions": (
        discriminator,
        "classify",
        lambda model: discriminator.predict_tokens(model, [LabelledPair("a", SIDE, SIDE)], **ROOM),
    ),
}


class Asked(Exception):
    """The model was asked."""


@pytest.mark.parametrize("name", READERS)
def test_stages_send_their_inputs_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, asks, read = READERS[name]
    devices = []

    def asked(_: nn.Module, *inputs: Any) -> None:
        tensors = inputs[0].values() if isinstance(inputs[0], dict) else inputs
        devices.extend(tensor.device for tensor in tensors)
        raise Asked

    monkeypatch.setattr(module, asks, asked)
    monkeypatch.setattr(module, "device_of", lambda _: torch.device("meta"))
    with pytest.raises(Asked):
        read(nn.Linear(1, 1))
    assert devices and set(devices) == {torch.device("meta")}
