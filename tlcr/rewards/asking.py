"""Asks a reward source, on every process at once."""

from __future__ import annotations

from torch import Tensor

from tlcr.config.schema import RewardConfig
from tlcr.rewards.composition import check_kl, check_signal
from tlcr.rewards.sources.protocol import RewardSource, models_of
from tlcr.training.distributed import on_all_processes
from tlcr.training.sharding import gathered
from tlcr.types import RewardSignal, Rollout


def ask_source(
    source: RewardSource, rollout: Rollout, cfg: RewardConfig, *, kl_BT: Tensor | None = None
) -> RewardSignal:
    """The source's signal for this process's answers, which ``compose_rewards`` takes, beside a KL that it subtracts.

    Every process calls it. An error that the answers of one process cause is raised on all: where centring sums over
    processes, the others would wait for it.

    Args:
        source: the source.
        rollout: this process's answers.
        cfg: what the signal is composed by.
        kl_BT: the KL that is subtracted, (B, T) in nats; None where none is.

    Returns:
        The signal.

    Raises:
        ConfigError: as ``compose_rewards`` does, here and below.
        DataError: the signal is not finite, or the source fails.
        ShapeError: tensors do not fit.
        TrainingDiverged: the KL is not finite.
    """

    def ask() -> RewardSignal:
        if kl_BT is not None:
            check_kl(kl_BT, rollout.mask_BT)
        signal = source(rollout)
        check_signal(signal, rollout.mask_BT, cfg)
        return signal

    with gathered(*models_of(source)):
        return on_all_processes(ask)
