"""The one builder of accelerators: what reaches the tracker, of supervised training and of PPO, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.ppo.helpers import run_ppo, small_config
from tests.recipes.test_train_sft import PAIRS
from tlcr.config.schema import RunConfig, ShardingConfig, TrainingConfig
from tlcr.errors import ConfigError
from tlcr.ppo.run import ddp_options
from tlcr.recipes.train_sft import train_sft
from tlcr.training import accelerator as builder
from tlcr.training.accelerator import open_accelerator, without_sync
from tlcr.training.callbacks import Callback
from tlcr.training.launcher import requested_sharding
from tlcr.training.metrics import read_metrics
from tlcr.training.sharding import plan

LM = Callable[..., PreTrainedModel]
Tokenizer = PreTrainedTokenizerFast


class Recorder(GeneralTracker):
    """A tracker that keeps what it is given. Accelerate starts it in `init_trackers`, and nowhere else."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.started = self.finished = 0
        self.hyperparameters: dict[str, Any] = {}
        self.rows: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> list[tuple[int | None, dict[str, Any]]]:
        return self.rows

    def start(self) -> None:
        self.started += 1

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.hyperparameters |= values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished += 1


class Installed:
    """The tracker that the config names, as if its package were there, and the options of the accelerators made."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.options: list[dict[str, Any]] = []

    def __call__(self, **options: Any) -> Accelerator:
        self.options.append(options)
        return Accelerator(**(options | ({"log_with": self.recorder} if options["log_with"] == "tensorboard" else {})))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    made = Installed()
    monkeypatch.setattr(builder, "find_spec", lambda name: object())
    monkeypatch.setattr(builder, "Accelerator", made)
    return made


class Crash(Callback):
    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        raise OSError("the power went out")


def sft(make_lm: LM, tokenizer: Tokenizer, folder: Path, **options: Any) -> None:
    cfg = RunConfig(tracker="tensorboard", sft=TrainingConfig(epochs=1, batch_size=3, learning_rate=0.125))
    train_sft(cfg, model=make_lm(), tokenizer=tokenizer, train=PAIRS[:5], held_out=PAIRS[5:], folder=folder, **options)


def ppo(make_lm: LM, tokenizer: Tokenizer, folder: Path, **options: Any) -> None:
    cfg = replace(small_config(updates=2, gamma=0.875), tracker="tensorboard")
    run_ppo(cfg, make_lm, tokenizer, folder, evaluate=lambda *_: {"gold": 0.5}, **options)


@pytest.mark.parametrize(
    ("train", "setting", "value"), [(sft, "sft.learning_rate", 0.125), (ppo, "ppo.gamma", 0.875)], ids=["sft", "ppo"]
)
def test_the_tracker_gets_every_figure_and_the_config_and_is_finished(
    installed: Installed,
    tiny_causal_lm: LM,
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    train: Callable[..., None],
    setting: str,
    value: float,
) -> None:
    train(tiny_causal_lm, tiny_tokenizer, tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    logged = [{"step": step, **values} for step, values in installed.recorder.rows]
    assert len(rows) >= 2 and any("eval/" in key for key in rows[-1])
    assert logged == [{key: figure for key, figure in row.items() if key != "time"} for row in rows]
    assert installed.recorder.hyperparameters[setting] == value
    assert installed.recorder.hyperparameters["seed"] == 0
    assert (installed.recorder.started, installed.recorder.finished) == (1, 1)
    assert installed.options[0]["project_dir"] == str(tmp_path / "tracker")


@pytest.mark.parametrize("train", [sft, ppo])
def test_the_tracker_is_finished_where_training_fails(
    installed: Installed, tiny_causal_lm: LM, tiny_tokenizer: Tokenizer, tmp_path: Path, train: Callable[..., None]
) -> None:
    with pytest.raises(OSError, match="power"):
        train(tiny_causal_lm, tiny_tokenizer, tmp_path, callbacks=[Crash()])
    assert (installed.recorder.started, installed.recorder.finished) == (1, 1)
    assert len(installed.recorder.rows) >= 1


@pytest.mark.parametrize("train", [sft, ppo])
def test_a_tracker_that_is_not_installed_stops_every_training(
    monkeypatch: pytest.MonkeyPatch,
    tiny_causal_lm: LM,
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    train: Callable[..., None],
) -> None:
    monkeypatch.setattr(builder, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match="tensorboard is not installed: 'pip install tensorboard', or set tracker: no"
    ):
        train(tiny_causal_lm, tiny_tokenizer, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcr.training.accelerator.find_spec", lambda name: None)
    with (
        pytest.raises(ConfigError, match="wandb is not installed: 'pip install wandb'"),
        open_accelerator(replace(RunConfig(), tracker="wandb"), tmp_path),
    ):
        pass


def test_without_a_tracker_nothing_is_tracked(installed: Installed, tmp_path: Path) -> None:
    with open_accelerator(RunConfig(), tmp_path) as accelerator:
        assert accelerator.trackers == []
    assert installed.options == [
        {"mixed_precision": "no", "log_with": None, "project_dir": None, "kwargs_handlers": None}
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_an_accelerator_for_another_kind_of_parallelism_is_refused_before_a_tracker_starts(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: DistributedType
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with (
        pytest.raises(ConfigError, match=f"the accelerator is for {kind.value}, and tlcr cuts .* set sharding.kind: f"),
        open_accelerator(RunConfig(tracker="tensorboard"), tmp_path),
    ):
        pass
    assert installed.recorder.started == 0


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            "the launcher asks for DeepSpeed, and tlcr cuts .* set sharding.kind: fu",
        ),
        (
            {"ACCELERATE_USE_MEGATRON_LM": "true"},
            "the launcher asks for Megatron-LM, and tlcr .* set sharding.kind: ful",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1; add --fsdp_version 2, or run .* set sharding.kind: full"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP version 1; add --fsdp_version 2, or run"),
    ],
)
def test_what_a_launcher_asks_for_is_refused_where_tlcr_does_not_do_it(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    """On CPUs accelerate would take no notice."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), open_accelerator(RunConfig(), tmp_path):
        pass
    assert installed.options == []
    with pytest.raises(ConfigError, match=message):
        plan(ShardingConfig())


def test_version_2_of_a_launchers_fsdp_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    none, hybrid = ShardingConfig(), ShardingConfig(kind="hybrid", replicas=2)
    assert requested_sharding(none) == none
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert requested_sharding(none) == ShardingConfig(kind="full")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert requested_sharding(none) == ShardingConfig(kind="full", offload=True)
    assert requested_sharding(hybrid) == hybrid
    with pytest.raises(ConfigError, match=r"sharding.kind is 'full', .* and there is one process"):
        plan(none)


@pytest.mark.parametrize(
    ("changes", "partial"),
    [({}, False), ({"value_warmup_updates": 1}, True), ({"value_coef": 0.0}, True)],
    ids=["both", "warm-up", "policy only"],
)
def test_ppo_looks_for_unused_parameters_only_where_a_network_sits_out(
    installed: Installed,
    tiny_causal_lm: LM,
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    changes: dict[str, Any],
    partial: bool,
) -> None:
    cfg = small_config(updates=1, **changes)
    run_ppo(cfg, tiny_causal_lm, tiny_tokenizer, tmp_path)
    assert installed.options[0]["kwargs_handlers"] == [ddp_options(cfg.ppo)]
    assert ddp_options(cfg.ppo) == DistributedDataParallelKwargs(
        find_unused_parameters=partial, broadcast_buffers=False
    )


@pytest.mark.parametrize("around", [False, True])
def test_shards_are_never_asked_to_wait_with_their_gradients(around: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `accelerate launch --use_fsdp` on GPUs, accelerate asks what it is given to wait, whatever that is."""
    model = nn.Linear(1, 1)
    asked: list[nn.Module] = []

    class Fsdp:
        @contextmanager
        def no_sync(self, module: nn.Module) -> Iterator[None]:
            asked.append(module)
            yield

    module, inner = (nn.Sequential(model), model) if around else (model, None)
    for shards in (True, False):
        monkeypatch.setattr(builder, "is_sharded", lambda of, shards=shards: shards and of is model)
        with without_sync(Fsdp(), module, inner):  # type: ignore[arg-type]
            assert asked == ([] if shards else [module])
