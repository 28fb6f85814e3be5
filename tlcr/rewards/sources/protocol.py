"""What a reward source is to the rest of tlcr."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from tlcr.errors import CheckpointError
from tlcr.types import RewardSignal, Rollout


class RewardSource(Protocol):
    """Says what the answers of a rollout earn. Any object with these three methods is one."""

    def __call__(self, rollout: Rollout) -> RewardSignal:
        """What this process's answers earn, for each token or for each whole answer."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the source remembers from one rollout to the next, as JSON can hold it; a part of every checkpoint."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        ...


class Stateless:
    """Half of a `RewardSource`, for those that keep nothing from one rollout to the next."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise CheckpointError(
                f"the saved reward source holds {sorted(state)}, but {type(self).__name__} has no state; "
                "resume with the reward config that the checkpoint was saved with"
            )
