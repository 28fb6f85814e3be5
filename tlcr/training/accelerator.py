"""The only place that makes an accelerator, which joins the processes of a training and its tracker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn

from tlcr.config.schema import RunConfig, ShardingConfig
from tlcr.errors import ConfigError
from tlcr.training.checkpoint import as_plain
from tlcr.training.launcher import requested_sharding
from tlcr.training.sharding import is_sharded

PROJECT = "tlcr"
"""The project name that trackers get."""
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def without_sync(
    accelerator: Accelerator, module: nn.Module, model: nn.Module | None = None
) -> AbstractContextManager[None]:
    """Backward passes inside sum no gradients over processes: a later one does, for all of them.

    Shards do so after every pass. Else each process would keep whole gradients, and under a launcher that says FSDP
    accelerate would ask modules that are none of FSDP's to wait.

    Args:
        accelerator: of the training.
        module: what the training calls, a model that accelerate prepared, or one with shards.
        model: the model in it, where ``module`` is only a loss around it.

    Returns:
        The context.
    """
    if is_sharded(module if model is None else model):
        return nullcontext()
    return accelerator.no_sync(module)


@contextmanager
def open_accelerator(
    cfg: RunConfig, folder: str | Path, *, ddp: DistributedDataParallelKwargs | None = None
) -> Iterator[Accelerator]:
    """An accelerator without autocast, whose tracker (``cfg.tracker``) runs until the block ends, even by an error.

    The tracker gets the config as hyperparameters, nested settings under dotted names (``ppo.gamma``), and whatever
    ``MetricsLog`` logs. A tracker that keeps files keeps them in ``<folder>/tracker``.

    Args:
        cfg: the run's config.
        folder: the folder of the stage that is trained.
        ddp: options of ``DistributedDataParallel``, for a model of which some parameters get no gradient in some steps.

    Yields:
        The accelerator, placed on this process's device.

    Raises:
        ConfigError: the tracker's package is not installed, or the launcher asks for another kind of parallelism.
    """
    tracked = cfg.tracker != "none"
    if tracked and find_spec(cfg.tracker) is None:
        raise ConfigError(f"tracker: {cfg.tracker} is not installed: 'pip install {cfg.tracker}', or set tracker: none")
    requested_sharding(cfg.sharding)  # refuses what tlcr does not do before accelerate tries to do it
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=cfg.tracker if tracked else None,
        project_dir=str(Path(folder) / "tracker") if tracked else None,
        kwargs_handlers=None if ddp is None else [ddp],
    )
    check_parallelism(accelerator)
    if tracked:
        accelerator.init_trackers(PROJECT, config=_hyperparameters(as_plain(cfg)))
    try:
        yield accelerator
    finally:
        for tracker in accelerator.trackers:  # not end_training: it would end the process group
            tracker.finish()


def check_parallelism(accelerator: Accelerator) -> None:
    """Raises ConfigError where an accelerator is for DeepSpeed, Megatron or FSDP, unless a launcher asks for FSDP 2."""
    kind = accelerator.distributed_type
    if kind in SUPPORTED or (kind == DistributedType.FSDP and requested_sharding(ShardingConfig()).kind == "full"):
        return
    raise ConfigError(
        f"the accelerator is for {kind.value}, and tlcr cuts models by torch's fully_shard; make it without, and set "
        "sharding.kind: full where models are to be cut"
    )


def _hyperparameters(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, for trackers that show a table."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _hyperparameters(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
