"""The interface of reward sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from tlcr.errors import CheckpointError
from tlcr.types import RewardSignal, Rollout


class RewardSource(Protocol):
    """Gives the rewards of a rollout's answers. Any object with these three methods is a reward source."""

    def __call__(self, rollout: Rollout) -> RewardSignal:
        """The rewards of this process's answers, for each token or for each whole answer."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The source's state between rollouts, as JSON can hold it; a part of every checkpoint."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        ...


def models_of(source: RewardSource) -> tuple[nn.Module, ...]:
    """The models that a source asks: its attribute ``models``, where it has one.

    Whoever asks a source holds sharded models of it ``gathered`` meanwhile. A source may then call any part of them, as
    often as its own answers need.

    Args:
        source: any source.

    Returns:
        The models; none where the source says nothing of them.
    """
    return tuple(getattr(source, "models", ()))


class Stateless:
    """The state methods of a `RewardSource` that has no state."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise CheckpointError(
                f"the saved reward source holds {sorted(state)}, but {type(self).__name__} has no state; "
                "resume with the reward config that the checkpoint was saved with"
            )
