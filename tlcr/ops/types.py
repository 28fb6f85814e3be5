"""What the ops return."""

from enum import IntEnum
from typing import NamedTuple

from torch import Tensor

__all__ = ["PPOLoss", "TokenLabel", "TokenScores"]


class TokenLabel(IntEnum):
    """The label that an edit gives one token."""

    NEGATIVE = -1
    """Deleted or substituted in the rejected answer."""
    NEUTRAL = 0
    """Kept by the edit."""
    POSITIVE = 1
    """Added or substituted in the revised answer."""


class TokenScores(NamedTuple):
    """Scores of given tokens under a policy and, optionally, a reference.

    Every field has the shape of `token_ids` and is float32, or float64 for float64 input. All are in nats.
    """

    logprobs: Tensor
    """log p(token), differentiable."""
    entropy: Tensor
    """Entropy of p over the whole vocabulary, differentiable."""
    ref_logprobs: Tensor | None = None
    """log q(token) under the reference, a constant; None without a reference."""
    kl: Tensor | None = None
    """KL(p || q) over the whole vocabulary, differentiable in p; None without a reference."""


class PPOLoss(NamedTuple):
    """The loss of one batch and its statistics: scalar tensors on the device of the inputs.

    Only `loss` carries a gradient. All means follow `aggregate` and `denominator`, so that with a global denominator
    the statistics of the parts of a batch add up to those of the whole. A statistic whose input was not given is 0.
    """

    loss: Tensor
    """policy + value_coef * value - entropy_coef * entropy + kl_coef * kl."""
    policy: Tensor
    """Mean clipped policy loss."""
    value: Tensor
    """Mean clipped value loss."""
    entropy: Tensor
    """Mean entropy, nats."""
    kl: Tensor
    """Mean of `kl`, nats."""
    clip_fraction: Tensor
    """Mean share of tokens whose policy loss is the clipped one."""
    value_clip_fraction: Tensor
    """Mean share of tokens whose value loss is the clipped one."""
    approx_kl: Tensor
    """Mean of r - 1 - log r, the k3 estimate of KL(old policy || policy), nats."""
    ratio_max: Tensor
    """Largest probability ratio r of a counted token; 0 where nothing counts."""
