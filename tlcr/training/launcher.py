"""What a launcher of processes says in the environment; read without torch, which takes seconds to import.

Launchers are ``accelerate launch``, ``torchrun`` (``python -m torch.distributed.run``) and MPI's ``mpirun``.
"""

from __future__ import annotations

import os
from dataclasses import replace

from tlcr.config.schema import ShardingConfig
from tlcr.errors import ConfigError

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
SIZES_OF_A_NODE = (
    "LOCAL_WORLD_SIZE",
    "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
)
RANKS_ON_A_NODE = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")


def launched_processes() -> int:
    """How many processes a launcher started together, this one among them; 1 without a launcher."""
    size, rank = _number(SIZES), _number(RANKS)
    # A size without a rank is a variable that somebody set for another purpose: no launcher sets one alone.
    return size if size is not None and rank is not None and size > 1 else 1


def launched_rank() -> int:
    """The number of this process among those, from 0; 0 without a launcher."""
    return _number(RANKS) or 0 if launched_processes() > 1 else 0


def processes_of_a_node() -> int:
    """How many of those processes run on this machine; all of them where the launcher does not say."""
    return min(_number(SIZES_OF_A_NODE) or launched_processes(), launched_processes())


def without_launcher() -> dict[str, str]:
    """This environment without a launcher's variables, for a process that is to work alone."""
    ours = (*SIZES, *RANKS, *SIZES_OF_A_NODE, *RANKS_ON_A_NODE)
    return {name: value for name, value in os.environ.items() if name not in ours}


def requested_sharding(cfg: ShardingConfig) -> ShardingConfig:
    """``cfg``; where it asks for none and ``accelerate launch`` asks for FSDP version 2, that, as ``kind: full``.

    accelerate itself takes no notice of FSDP on CPUs, and wraps models in ``DistributedDataParallel``.

    Args:
        cfg: the run's ``sharding``.

    Returns:
        How models are cut.

    Raises:
        ConfigError: the launcher asks for DeepSpeed, Megatron or FSDP version 1.
    """
    instead = "run 'accelerate launch' without it, and set sharding.kind: full where models are to be cut"
    for variable, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if _flag(variable):
            raise ConfigError(f"the launcher asks for {name}, and tlcr cuts models by torch's fully_shard; {instead}")
    if not _flag("ACCELERATE_USE_FSDP"):
        return cfg
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ConfigError(f"the launcher asks for FSDP version {version}; add --fsdp_version 2, or {instead}")
    return cfg if cfg.kind != "none" else replace(cfg, kind="full", offload=_flag("FSDP_OFFLOAD_PARAMS"))


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "y", "yes", "t", "true", "on")


def _number(names: tuple[str, ...]) -> int | None:
    """The first of these variables that holds a whole number, as accelerate reads them."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), None)
