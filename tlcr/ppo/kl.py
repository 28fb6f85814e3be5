"""Estimates of the KL divergence between policy and reference, and controllers of the KL coefficient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tlcr.config.schema import KLConfig, PPOConfig
from tlcr.errors import CheckpointError, ConfigError, ShapeError, TrainingDiverged
from tlcr.types import PolicyScores

__all__ = ["AdaptiveKLController", "FixedKLController", "KLController", "build_kl_controller", "estimate_kl", "kl_of"]

# Ziegler et al. 2019, section 2.2: the error that the controller reacts to is clipped to this. Downwards to half of it
# (ours): a coefficient that fell while the policy rested below the target is too small when it moves on.
MAX_ERROR = 0.2
MAX_FALL = 0.1
# How many rounds ahead the coefficient looks, and the weight of the newest round in the growth that it expects (ours;
# docs/results/instruments.md).
LOOK_AHEAD = 8
GROWTH_WEIGHT = 0.2
# Of all answers of a run, the share over which the coefficient adapts (ours; docs/results/instruments.md).
HORIZON_SHARE = 1 / 20


def estimate_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimates KL(policy || reference) at each sampled token, in nats::

        k1 = log p(a) - log q(a)        unbiased, of either sign
        k2 = k1^2 / 2                   biased, never negative
        k3 = exp(-k1) - 1 + k1          unbiased, never negative

    Differentiable. Values at tokens that do not count are meaningless: mask them.
    Source: Schulman, "Approximating KL divergence", 2020.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy (p), in nats, of any shape.
        ref_logprobs: those of the same tokens under the reference (q), of the same shape.
        estimator: "k1", "k2" or "k3".

    Returns:
        The estimates, in the shape of the arguments.

    Raises:
        ShapeError: the shapes differ.
        ConfigError: another estimator. "full" is a sum over the vocabulary, which two log-probabilities do not
            determine; it is ``PolicyScores.kl_BT``.
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ShapeError(
            f"estimate_kl: ref_logprobs has shape {tuple(ref_logprobs.shape)}, wanted {tuple(logprobs.shape)} to match "
            "logprobs; score the same tokens under both models"
        )
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        # expm1 keeps the digits that exp(x) - 1 loses near 0, where a policy spends its first updates
        return torch.expm1(-log_ratio) + log_ratio
    raise ConfigError(
        f"estimate_kl: estimator={estimator!r}, wanted 'k1', 'k2' or 'k3'; the exact KL ('full') comes from "
        "score_rollout(exact_kl=True)"
    )


def kl_of(scores: PolicyScores, estimator: Literal["k1", "k2", "k3", "full"]) -> Tensor:
    """The KL of each action of a rollout, (B, T) nats, by any estimator; 'full' needs scores with the exact KL."""
    if estimator != "full":
        return estimate_kl(scores.logprobs_BT, scores.ref_logprobs_BT, estimator)
    if scores.kl_BT is None:
        raise ConfigError(
            "kl_of: estimator is 'full', but the scores hold no exact KL; use score_rollout(exact_kl=True)"
        )
    return scores.kl_BT


class KLController(Protocol):
    """Holds the KL coefficient, and may adapt it to the KL of each round."""

    coef: float

    def update(self, kl_per_token: float, answers: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class FixedKLController:
    """The same coefficient throughout."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl_per_token: float, answers: int) -> None:
        """Keeps the coefficient; raises TrainingDiverged where the KL is not finite."""
        _check_finite(kl_per_token, answers)

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the coefficient of a saved run; raises CheckpointError where the state holds none."""
        self.coef = _saved_coef(state)


class AdaptiveKLController:
    """Moves the coefficient so that the KL settles at a target::

        coef <- coef * (1 + clip(kl / target - 1, -0.1, 0.2) * min(answers / horizon, 1))
        coef <- max(coef, start)                                    until the KL has reached the target once
        coef <- max(coef, start * ((kl + 8 * growth) / target)^2)   where kl + 8 * growth is above the target

    `kl` and `target` are in nats per token, `horizon` in answers; `start` is the coefficient that training began with,
    and `growth` the running mean of what the KL grew by in a round, 0 where it fell. The first line is Ziegler et al.
    2019 (arXiv 1909.08593), section 2.2. Theirs has -0.2, and no min(..., 1); without it a batch of more than 5
    horizons could make the coefficient negative and pay the policy for leaving the reference.

    The others are ours, because training starts at a KL of 0, far below any target, and passes it at full speed. A
    coefficient that fell all that way would have to climb back while the policy runs past the target. And one that may
    rise by a fifth in a round at most rises too late: the policy goes on for some rounds. So the third line looks
    ahead, raises the coefficient at once, and leaves it to the first to bring it down again, slowly.
    """

    def __init__(self, coef: float, *, target: float, horizon: float) -> None:
        if coef <= 0 or target <= 0 or horizon < 1:
            raise ConfigError(
                f"AdaptiveKLController: coef={coef!r}, target={target!r}, horizon={horizon!r}; wanted coef > 0, "
                "target > 0 and horizon >= 1: a factor cannot move a coefficient away from 0"
            )
        self.coef = coef
        self.start = coef
        self.target = target
        self.horizon = horizon
        self.reached = False
        self.kl: float | None = None
        """Of the last round; None before the first."""
        self.growth = 0.0

    def update(self, kl_per_token: float, answers: int) -> None:
        """Adapts the coefficient to the KL of one round.

        Args:
            kl_per_token: mean KL of a counted token over all processes, in nats.
            answers: answers of the round over all processes.

        Raises:
            TrainingDiverged: the KL is not finite.
        """
        _check_finite(kl_per_token, answers)
        if self.kl is not None:
            self.growth += GROWTH_WEIGHT * (kl_per_token - self.kl - self.growth)
        self.kl = kl_per_token
        self.reached = self.reached or kl_per_token >= self.target
        error = min(max(kl_per_token / self.target - 1, -MAX_FALL), MAX_ERROR)
        self.coef *= 1 + error * min(answers / self.horizon, 1)
        if not self.reached:
            self.coef = max(self.coef, self.start)
        ahead = kl_per_token + LOOK_AHEAD * max(self.growth, 0.0)
        if ahead > self.target:
            self.coef = max(self.coef, self.start * (ahead / self.target) ** 2)

    def state_dict(self) -> dict[str, Any]:
        names = ("coef", "reached", "kl", "growth", "horizon")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of a saved run; raises CheckpointError where it holds no coefficient.

        The horizon is that of the run as it began: a run that is resumed with more updates keeps it. Earlier versions
        adapted from the start and saved the coefficient alone: such a run goes on adapting.

        Args:
            state: what ``state_dict`` gave.
        """
        self.coef = _saved_coef(state)
        self.reached = bool(state.get("reached", True))
        self.kl = state.get("kl")
        self.growth = float(state.get("growth", 0.0))
        self.horizon = float(state.get("horizon", self.horizon))


def build_kl_controller(cfg: KLConfig, ppo: PPOConfig) -> KLController:
    """The controller that `cfg` describes: adaptive where it names a target, else fixed.

    Without `cfg.horizon` a run may move the coefficient as far with few updates as with many: the horizon is the
    answers of HORIZON_SHARE of the run, and at least one batch.

    Args:
        cfg: coefficient, target and horizon.
        ppo: its updates and batches say how many answers the run has.

    Returns:
        A controller that has seen no round yet.
    """
    if cfg.target is None:
        return FixedKLController(cfg.coef)
    horizon = cfg.horizon or ppo.batch_size * max(ppo.updates * HORIZON_SHARE, 1)
    return AdaptiveKLController(cfg.coef, target=cfg.target, horizon=horizon)


def _check_finite(kl_per_token: float, answers: int) -> None:
    if not math.isfinite(kl_per_token):
        raise TrainingDiverged(
            f"the KL to the reference is {kl_per_token} nats per token over {answers} answers, wanted a finite number; "
            "lower ppo.learning_rate, raise kl.coef, or resume from an earlier checkpoint"
        )


def _saved_coef(state: Mapping[str, Any]) -> float:
    coef = state.get("coef")
    if not isinstance(coef, (int, float)) or not math.isfinite(coef) or coef < 0:
        raise CheckpointError(
            f"the saved KL controller holds {dict(state)!r}, wanted a 'coef' of at least 0; "
            "resume from another checkpoint"
        )
    return float(coef)
