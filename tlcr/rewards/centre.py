"""What is subtracted from the reward of every token, so that a token of average reward earns nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from tlcr.config.schema import RewardConfig
from tlcr.errors import CheckpointError, ConfigError

__all__ = ["Centre", "RunningLine", "RunningMean", "build_centre"]

CENTRE_DECAY = 0.5
"""Weight of a round relative to the next one (ours). The mean must follow a policy that improves: otherwise every token
is paid the difference, and answers grow to the length limit (docs/embedded_task.md)."""


class Centre(Protocol):
    """What is subtracted from the reward of every token, learned from the rewards of the rounds so far."""

    def update(self, values_BT: Tensor, mask_BT: Tensor) -> None: ...

    def at(self, mask_BT: Tensor) -> Tensor: ...

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: Mapping[str, float]) -> None: ...


class _RunningSums:
    """Named sums in which every update reduces the weight of earlier values: total <- decay * total + new.

    `reduce` sums a tensor over all processes, so that every process holds the same sums; it is called once for every
    update, even if nothing counts.
    """

    NAMES: tuple[str, ...]

    def __init__(self, decay: float = CENTRE_DECAY, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        if not 0 < decay <= 1:
            raise ConfigError(f"{type(self).__name__}: decay is {decay!r}; it must be greater than 0 and at most 1")
        self.decay = decay
        self.reduce = reduce
        self.sums = dict.fromkeys(self.NAMES, 0.0)

    def _add(self, *of_batch: Tensor) -> None:
        stacked = torch.stack([x.double() for x in of_batch])
        if self.reduce is not None:
            stacked = self.reduce(stacked)
        for name, new in zip(self.NAMES, stacked.tolist(), strict=True):
            self.sums[name] = self.decay * self.sums[name] + new

    def state_dict(self) -> dict[str, float]:
        return dict(self.sums)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Takes the sums of a saved run; raises CheckpointError where they are missing or not finite."""
        for name in self.NAMES:
            if not isinstance(state.get(name), (int, float)) or not math.isfinite(state[name]):
                raise CheckpointError(
                    f"the saved centre of the reward holds {dict(state)!r}, wanted a finite '{name}'; "
                    "resume from another checkpoint"
                )
        self.sums = {name: float(state[name]) for name in self.NAMES}


class RunningMean(_RunningSums):
    """The running mean of a token's reward, ``reward.centre: true``.

    mean = total / count, both sums with the weight of earlier rounds reduced; decay 1 is the plain mean of all values.
    The mean is 0 until a value counts.
    """

    NAMES = ("total", "count")

    @property
    def mean(self) -> float:
        return self.sums["total"] / self.sums["count"] if self.sums["count"] else 0.0

    def update(self, values_BT: Tensor, mask_BT: Tensor) -> None:
        """Adds the values, of any float dtype, where the mask is True. Both (B, T)."""
        self._add(torch.where(mask_BT, values_BT.double(), 0.0).sum(), mask_BT.sum())

    def at(self, mask_BT: Tensor) -> Tensor:
        """The mean at every token, float64 (B, T), 0 where the mask is False."""
        return torch.where(
            mask_BT, torch.full(mask_BT.shape, self.mean, dtype=torch.float64, device=mask_BT.device), 0.0
        )


class RunningLine(_RunningSums):
    """The running mean of a token's reward by its place in the answer, ``reward.centre: position`` (ours)::

        x_t = log(1 + t), t = 0 at the answer's first counted token
        slope = (n * sum xy - sum x * sum y) / (n * sum xx - (sum x)^2)        intercept = (sum y - slope * sum x) / n

    the least-squares line through the rewards y of all counted tokens, with the weight of earlier rounds reduced. In
    the mean over tokens it subtracts what RunningMean does. Where rewards rise or fall along an answer it leaves later
    tokens as near to 0 as early ones, so that going on pays no more than what came before. The slope is 0 where all
    tokens stand at one place, and the line is 0 until a value counts.
    """

    NAMES = ("count", "x", "y", "xx", "xy")

    @property
    def slope(self) -> float:
        sums = self.sums
        spread = sums["count"] * sums["xx"] - sums["x"] ** 2
        # a difference that comes from rounding alone is no spread
        if spread <= 1e-12 * sums["count"] * sums["xx"]:
            return 0.0
        return (sums["count"] * sums["xy"] - sums["x"] * sums["y"]) / spread

    @property
    def intercept(self) -> float:
        return (self.sums["y"] - self.slope * self.sums["x"]) / self.sums["count"] if self.sums["count"] else 0.0

    def update(self, values_BT: Tensor, mask_BT: Tensor) -> None:
        """Adds the values, of any float dtype, where the mask is True. Both (B, T)."""
        x_BT, y_BT = _log_places(mask_BT), torch.where(mask_BT, values_BT.double(), 0.0)
        self._add(mask_BT.sum(), x_BT.sum(), y_BT.sum(), x_BT.square().sum(), (x_BT * y_BT).sum())

    def at(self, mask_BT: Tensor) -> Tensor:
        """The line at the place of every token, float64 (B, T), 0 where the mask is False."""
        return torch.where(mask_BT, self.intercept + self.slope * _log_places(mask_BT), 0.0)


def build_centre(cfg: RewardConfig, reduce: Callable[[Tensor], Tensor] | None = None) -> Centre | None:
    """What ``cfg.centre`` asks for; None where rewards are not centred.

    Args:
        cfg: the reward.
        reduce: sums a tensor over all processes. None: this process alone.

    Returns:
        A centre that has seen nothing yet.
    """
    if not cfg.centre:
        return None
    return RunningLine(reduce=reduce) if cfg.centre == "position" else RunningMean(reduce=reduce)


def _log_places(mask_BT: Tensor) -> Tensor:
    """log(1 + t) of each counted token, t counting from 0 in its row; 0 where not counted."""
    return torch.where(mask_BT, mask_BT.cumsum(dim=1).double().clamp(min=1).log(), 0.0)
