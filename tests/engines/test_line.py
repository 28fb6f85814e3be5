"""Weights over the network: by the worker's end itself, behind the routes of a vLLM that is none."""

from __future__ import annotations

import importlib
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.engines.helpers import worst
from tests.engines.test_server import adapted, engine, model, move, sample, warnings_of
from tests.engines.vllm_server import TRANSFER, VLLM
from tests.http_server import Reply
from tlcr.engines import line
from tlcr.engines import server as module
from tlcr.engines.line import Line, _wait
from tlcr.errors import BackendUnavailable, HostError, HostWarning
from tlcr.hosts import guard

S, U = TypeVar("S"), TypeVar("U")


class Base(Generic[S, U]):
    """vLLM's WeightTransferEngine, as far as its backends use it (0.32.0)."""

    init_info_cls: Any
    update_info_cls: Any

    def __init__(self, model: Any) -> None:
        self.model, self.model_config, self.device = model, None, torch.device("cpu")
        self.parallel_config = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        return self.init_info_cls(**init_dict)

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        return self.update_info_cls(**update_dict)

    def init_transfer_engine(self, init_info: S) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def receive_weights(self, update_info: U) -> None: ...

    def finish_weight_update(self) -> None: ...

    def shutdown(self) -> None: ...


class Registry:
    _registry: dict[str, Any]

    def register_engine(self, name: str, module_path_or_cls: Any, class_name: str | None = None) -> None:
        self._registry[name] = module_path_or_cls


def stand_in_for_vllm(monkeypatch: pytest.MonkeyPatch, version: str = "0.32.0") -> tuple[Registry, list[str]]:
    """What the worker's module imports: it is not imported yet. Its backends, and the calls of its reloading."""
    registry, calls = Registry(), []
    registry._registry = {}

    def initialize_layerwise_reload(model: Any) -> None:
        calls.append("begin")

    contents: dict[str, dict[str, Any]] = {
        "vllm.distributed.weight_transfer.base": {
            "WeightTransferEngine": Base,
            "WeightTransferInitInfo": object,
            "WeightTransferUpdateInfo": object,
        },
        "vllm.distributed.weight_transfer.factory": {"WeightTransferEngineFactory": registry},
        "vllm.model_executor.model_loader.reload": {
            "initialize_layerwise_reload": initialize_layerwise_reload,
            "finalize_layerwise_reload": lambda *_: calls.append("end"),
        },
    }
    for name, names in contents.items():
        stand_in = ModuleType(name)
        vars(stand_in).update(names)
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr(guard, "version", {"vllm": version}.__getitem__)
    monkeypatch.delitem(sys.modules, "tlcr.hosts.vllm_weights", raising=False)
    return registry, calls


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The worker's module, as a worker imports it."""
    registry, calls = stand_in_for_vllm(monkeypatch)
    found = importlib.import_module("tlcr.hosts.vllm_weights")
    assert registry._registry == {"tlcr": found.Receiver}
    vars(found)["calls"] = calls
    yield found
    monkeypatch.delitem(sys.modules, "tlcr.hosts.vllm_weights")


def test_an_older_vllm_is_refused_as_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_vllm(monkeypatch, "0.31.0")
    with pytest.raises(HostError, match=r"tlcr works with vLLM >=0\.32\.0,<=0\.32\.0 and 0\.31\.0 is installed"):
        importlib.import_module("tlcr.hosts.vllm_weights")


@pytest.mark.parametrize(
    ("module", "name", "instead", "problem"),
    [
        ("vllm.model_executor.model_loader.reload", "initialize_layerwise_reload", None, "is not there"),
        ("vllm.distributed.weight_transfer.base", "WeightTransferEngine.receive_weights", None, "is not there"),
        (
            "vllm.distributed.weight_transfer.base",
            "WeightTransferEngine.finish_weight_update",
            lambda self, version: None,
            r"takes \(self, version\) and not \(self\)",
        ),
    ],
)
def test_a_newer_vllm_that_lacks_a_name_is_refused_as_it_starts(
    module: str, name: str, instead: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_vllm(monkeypatch, "0.40.0")
    place, _, last = name.rpartition(".")
    holder = getattr(sys.modules[module], place) if place else sys.modules[module]
    if instead is None:
        monkeypatch.delattr(holder, last)
    else:
        monkeypatch.setattr(holder, last, instead)
    with pytest.raises(HostError, match=rf"in vLLM 0\.40\.0 .*{last} {problem}"):
        importlib.import_module("tlcr.hosts.vllm_weights")


def test_a_newer_vllm_that_has_every_name_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_vllm(monkeypatch, "0.40.0")
    with pytest.warns(HostWarning, match=r"0\.40\.0 is newer"):
        importlib.import_module("tlcr.hosts.vllm_weights")


class Loading:
    """A worker's model."""

    def __init__(self, server: VLLM) -> None:
        self.server = server

    @torch.no_grad()
    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        own = self.server.model.state_dict()
        for name, tensor in tensors:
            assert own[name].dtype == tensor.dtype
            own[name].copy_(tensor)


def connected(weights: ModuleType, policy: PreTrainedModel, **settings: Any) -> VLLM:
    server = VLLM(policy, **settings)
    server.receiver = weights.Receiver(Loading(server))
    return server


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_go_over_the_network_and_touch_no_disk(
    dtype: torch.dtype, weights: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several messages, to a server beside one that reads files."""
    monkeypatch.setattr(module, "FILE_BYTES", 20_000)
    policy, servers = model().to(dtype), [connected(weights, model(seed).to(dtype)) for seed in (5, 6)]
    written: list[Path] = []
    monkeypatch.setattr(module, "save_file", lambda _, path, **__: written.append(path))
    with engine(policy, *servers, folder=tmp_path / "weights", server_weights="network", server_timeout=30.0) as built:
        for number in (1, 2):
            move(policy)
            built.refresh()
            for server in servers:
                own = server.model.state_dict()
                assert all(torch.equal(own[name], weight) for name, weight in policy.state_dict().items())
                assert server.version.endswith(f"-{number}") and not server.loaded
        assert worst(policy, sample(built)) < (1e-5 if dtype == torch.float32 else 0.1)
    paths = [path for path, _ in servers[0].requests]
    assert paths.count("/init_weight_transfer_engine") == 2 and paths.count("/update_weights") > 2 * 2
    first = paths.index("/update_weights")
    last = paths.index("/finish_weight_update", first)
    assert paths[first - 1] == "/start_weight_update" and paths[last + 1] == "/reset_prefix_cache"
    assert set(paths[first:last]) == {"/update_weights"} and not written
    # of two servers; what an update that failed left behind is put away before each
    assert weights.calls == ["end", "begin", "end", "begin", "end", "end"] * 2


def test_a_run_and_its_evaluation_take_turns(weights: ModuleType) -> None:
    """As where a run evaluates on its way, with the same servers: each joins the servers anew."""
    policies, server = [model(), model(7)], connected(weights, model(5))
    how = {"server_weights": "network", "server_timeout": 30.0}
    with engine(policies[0], server, **how) as training, engine(policies[1], server, **how) as evaluation:
        for _ in range(2):
            for policy, built in zip(policies, (training, evaluation), strict=True):
                move(policy)
                built.refresh()
                assert worst(policy, sample(built)) < 1e-5


def test_an_update_that_another_trainer_left_open_is_ended(weights: ModuleType) -> None:
    policy, server = model(), connected(weights, model(5))
    server.updating = True
    with engine(policy, server, server_weights="network", server_timeout=30.0) as built:
        built.refresh()
        assert worst(policy, sample(built)) < 1e-5


def test_files_are_the_default(weights: ModuleType) -> None:
    server = connected(weights, model(5))
    with engine(model(), server) as built:
        built.refresh()
    assert len(server.loaded) == 1 and not {path for path, _ in server.requests} & TRANSFER.keys()


def test_an_adapter_goes_alone_after_what_it_stands_on(weights: ModuleType) -> None:
    policy, server = adapted(), connected(weights, model(5), lora=True)
    with engine(policy, server, server_weights="network", server_timeout=30.0) as built:
        for _ in range(2):
            move(policy)
            built.refresh()
            assert worst(policy, sample(built)) < 1e-4 < worst(model(), sample(built))
    assert len(server.asked("/update_weights")) == 1 and not server.loaded


@pytest.mark.parametrize("fault", ["refuses", "breaks off", "does not join", "is too old", "says nonsense"])
def test_a_server_that_stops_taking_weights_is_left_out_at_once(
    fault: str, weights: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    """Long before any time limit."""

    def behave(server: VLLM, path: str, request: dict[str, Any]) -> Reply | None:
        if path == "/init_weight_transfer_engine" and fault == "does not join":
            return Reply({"error": {"message": "Weight transfer not configured"}}, 500)
        if path == "/get_world_size" and fault == "says nonsense":
            return Reply({"world_size": "many"})
        if path == "/get_world_size" and fault == "is too old":
            return Reply({"detail": "Not Found"}, 404)
        if path == "/update_weights" and fault == "refuses":
            return Reply({"error": {"message": "out of memory"}}, 500)
        if path == "/update_weights" and fault == "breaks off":
            server.receiver.group = None
            return Reply({"error": {"message": "no such weight"}}, 400)
        return None

    policy, good = model(), connected(weights, model(5))
    bad = connected(weights, model(6))
    bad.fault = behave
    with engine(policy, good, bad, server_weights="network", server_timeout=30.0) as built:
        built.refresh()
        assert worst(policy, sample(built)) < 1e-5
    (said,) = warnings_of(caplog)
    wanted = {
        "refuses": "out of memory",
        "breaks off": "no such weight",
        "does not join": "start it with --weight-transfer-config .*Weight transfer not configured",
        "is too old": "has no route /get_world_size",
        "says nonsense": "takes no weights over the network; start it with .* 'many'",
    }
    assert bad.address in said and re.search(wanted[fault], said), said
    assert "\n" not in said and said.endswith("; 1 are left")


def test_a_server_that_takes_other_weights_is_noticed(weights: ModuleType) -> None:
    """Here it keeps its own: what came over the network is checked as what came in files is."""
    server = connected(weights, model(5))
    server.receiver.model = SimpleNamespace(load_weights=lambda tensors: [*tensors])
    lone = engine(model(), server, server_weights="network", server_timeout=30.0)
    with lone as built, pytest.raises(BackendUnavailable, match="policy's weights"):
        built.refresh()


@pytest.mark.parametrize("fault", [True, False])
def test_nobody_waits_for_a_group_to_go(fault: bool, weights: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gloo group that has begun to send what nobody takes goes only with its time limit: not in this thread."""
    gone: list[threading.Thread] = []

    class Group:
        """Of the trainer."""

        def __init__(self, group: Any) -> None:
            self.broadcast = group.broadcast

        def __del__(self) -> None:
            gone.append(threading.current_thread())

    join = line.joined
    monkeypatch.setattr(line, "joined", lambda *arguments: Group(join(*arguments)))
    policy, server = model(), connected(weights, model(5))
    built = engine(policy, server, server_weights="network", server_timeout=30.0)
    with built as engine_of_one:
        engine_of_one.refresh()
        if fault:
            server.fault = lambda _, path, __: Reply({"error": {}}, 500) if path == "/update_weights" else None
            move(policy)
            with pytest.raises(BackendUnavailable):
                engine_of_one.refresh()
    began = time.monotonic()
    while len(gone) < 1 + fault and time.monotonic() - began < 60:
        time.sleep(0.01)
    assert len(gone) == 1 + fault and threading.main_thread() not in gone


def test_nobody_waits_beyond_the_limit_nor_for_a_request_that_failed() -> None:
    with pytest.raises(RuntimeError, match=r"nothing came within 0.05 s"):
        _wait(lambda: False, Future(), timedelta(seconds=0.05))
    failed: Future[Any] = Future()
    failed.set_exception(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        _wait(lambda: False, failed, timedelta(seconds=60))


def test_the_trainer_waits_where_the_server_sees_it() -> None:
    with engine(model(), VLLM(model())) as built:
        info = Line(built._clients[0].address, 3, 5.0).info
    assert info["host"] == "127.0.0.1" and info["size"] == 4 and info["port"] > 0
