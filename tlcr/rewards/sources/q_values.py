"""A token-level Q function as a source: the value of each action."""

from __future__ import annotations

import torch

from tlcr.models.probes import require_decoder
from tlcr.models.reward_model import prefix_scores
from tlcr.rewards.sources.frozen_model import FrozenModel, read
from tlcr.rewards.sources.protocol import Stateless
from tlcr.types import RewardSignal, Rollout


class QSource(Stateless):
    """r_t = beta Z(s_t, a_t), in the log-odds of a comparison, (B, T).

    Z is read at token t, which the model has seen. It is a value of the action up to a number that no comparison
    tells: `reward.centre` or a value model takes it away. Source: Q-RM (Chen et al. 2025, arXiv 2505.23363). Its
    released code pays Z over its standard deviation in the batch, and takes it for the return: with an arm's `gamma` of
    0 the advantage of an action is r_t - V(s_t), as there. beta: `q_model.beta`, by which `reward.scale` is multiplied.

    Raises ConfigError where the model is no decoder.
    """

    def __init__(self, frozen: FrozenModel, beta: float) -> None:
        require_decoder(frozen.model, "reward.kind 'q'")
        self.frozen, self.beta, self.models = frozen, beta, (frozen.model,)

    def __call__(self, rollout: Rollout) -> RewardSignal:
        frozen, reading = self.frozen, read(self.frozen, rollout)
        values_BL = prefix_scores(
            frozen.model, reading.ids_BL, reading.mask_BL, micro_batch_size=frozen.micro_batch_size
        )
        credit_BL = torch.where(reading.answer_BL, self.beta * values_BL, 0.0)
        return RewardSignal(dense_BT=reading.credit(credit_BL, rollout).to(rollout.mask_BT.device))
