"""Random rewards: the control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tlcr.errors import CheckpointError
from tlcr.rewards.sources.protocol import Stateless
from tlcr.training.distributed import process_index
from tlcr.types import RewardSignal, Rollout


class RandomSource(Stateless):
    """Uniform in [-1, 1] for every token: the control that a real reward has to beat.

    Reproducible: the numbers depend on the seed, the process and the number of earlier rollouts.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rollouts = 0

    def __call__(self, rollout: Rollout) -> RewardSignal:
        generator = np.random.default_rng((self.seed, process_index(), self.rollouts))
        self.rollouts += 1
        mask_BT = rollout.mask_BT
        dense = generator.uniform(-1.0, 1.0, size=tuple(mask_BT.shape))
        dense_BT = torch.as_tensor(dense, dtype=torch.float32, device=mask_BT.device)
        return RewardSignal(dense_BT=torch.where(mask_BT, dense_BT, 0.0))

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self.rollouts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state.get("rollouts"), int):
            raise CheckpointError(
                f"the saved random rewards hold {dict(state)!r}, wanted the number of 'rollouts'; "
                "resume with the reward config that the checkpoint was saved with"
            )
        self.rollouts = state["rollouts"]
