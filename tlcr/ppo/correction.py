"""Answers that were not drawn from the policy as the trainer computes it: how far they are from it, and the weights
that correct for it.

An engine of its own computes other log-probabilities from the same weights, and top-p and top-k draw from another
distribution altogether. The trainer's log-probabilities from before the update, log pi, and those that the tokens were
drawn with, log q, give each token the importance weight

    w = pi(a | s) / q(a | s) = exp(log pi - log q).

Its policy loss is multiplied by w. The clipped loss is linear in the advantage for w >= 0, with dual clip too, so the
advantage is multiplied instead. Returns, values, the KL and the entropy are not weighted.

Under truncated sampling q = pi / Z, where Z is the probability of the tokens that were kept, so w = Z: what remains is
that the tokens left out are never drawn, an error of the order of 1 - Z.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from tlcr.config.schema import RolloutConfig
from tlcr.training.distributed import is_main_process, largest_of_processes, sum_over_processes
from tlcr.types import Advantages, PolicyScores, Rollout

__all__ = ["EFFECTIVE_SHARE", "Correction", "importance_weights"]

logger = logging.getLogger(__name__)

EFFECTIVE_SHARE = 0.5
"""An effective sample size below this share of the tokens is said, once a run (ours): other arithmetic alone costs a
few per cent in bfloat16, and stale weights or log-probabilities of other tokens nearly all."""


def importance_weights(log_ratios_BT: Tensor, cfg: RolloutConfig) -> Tensor:
    """The weight of every action, corrected as ``cfg.correction`` says.

    "truncate": min(w, ``correction_max``) (Ionides 2008; for an engine's answers Yao et al. 2025). "mask": w within
    (``correction_min``, ``correction_max``), 0 outside. "none": 1.

    Args:
        log_ratios_BT: log w = log pi - log q, (B, T).
        cfg: the correction and its bounds.

    Returns:
        The weights, (B, T), of the same dtype.
    """
    if cfg.correction == "none":
        return torch.ones_like(log_ratios_BT)
    weights_BT = log_ratios_BT.exp()
    if cfg.correction == "truncate":
        return weights_BT.clamp(max=cfg.correction_max)
    inside_BT = (weights_BT > cfg.correction_min) & (weights_BT < cfg.correction_max)
    return torch.where(inside_BT, weights_BT, 0.0)


class Correction:
    """Weighs the advantages of a run's rounds, measures the weights, and says once where they tell of a fault."""

    def __init__(self, cfg: RolloutConfig) -> None:
        self._cfg, self._said = cfg, False

    def __call__(
        self, rollout: Rollout, scores: PolicyScores, advantages: Advantages
    ) -> tuple[Advantages, dict[str, float]]:
        """Every process must call it.

        Args:
            rollout: the answers of this process, with the log-probabilities that they were drawn with, or without.
            scores: the trainer's log-probabilities of them, before the update.
            advantages: whitened or not.

        Returns:
            Advantages for the policy's loss, and the figures of docs/metrics.md that begin with ``mismatch/``. Without
            the engine's log-probabilities these are the advantages that were given, and no figures.
        """
        if rollout.engine_logprobs_BT is None:
            return advantages, {}
        mask_BT = rollout.mask_BT
        log_ratios_BT = torch.where(mask_BT, scores.logprobs_BT - rollout.engine_logprobs_BT, 0.0)
        weights_BT = importance_weights(log_ratios_BT, self._cfg)
        figures = _figures(log_ratios_BT, weights_BT, mask_BT, corrects=self._cfg.correction != "none")
        if not (self._said or figures["mismatch/effective_share"] >= EFFECTIVE_SHARE):
            self._said = True
            if is_main_process():
                logger.warning("%s", self._note(figures))
        if self._cfg.correction == "none":
            return advantages, figures
        weighted_BT = torch.where(mask_BT, advantages.advantages_BT * weights_BT, 0.0)
        return Advantages(weighted_BT, advantages.returns_BT), figures

    def _note(self, figures: dict[str, float]) -> str:
        return (
            f"the answers of rollout.engine {self._cfg.engine!r} do not fit the policy: their importance weights leave "
            f"an effective sample size of {figures['mismatch/effective_share']:.1%} of the tokens, below "
            f"{EFFECTIVE_SHARE:.0%} (mean log weight {figures['mismatch/log_weight']:+.3g}, largest weight "
            f"{figures['mismatch/weight_max']:.3g}); see that the engine has the policy's weights and reports "
            "log-probabilities at rollout.temperature, widen rollout.top_p and rollout.top_k, or set "
            "rollout.engine: generate"
        )


def _figures(log_ratios_BT: Tensor, weights_BT: Tensor, mask_BT: Tensor, *, corrects: bool) -> dict[str, float]:
    log_w_N, applied_N = log_ratios_BT[mask_BT].double(), weights_BT[mask_BT]
    smallest = torch.full((1,), -torch.inf, dtype=torch.float64, device=log_w_N.device)
    largest = largest_of_processes(torch.cat([log_w_N, smallest]).max())
    scaled_N = (log_w_N - largest).exp()  # squares of large weights would overflow
    cut_N = applied_N != log_ratios_BT[mask_BT].exp() if corrects else torch.zeros_like(log_w_N)
    sums = torch.stack(
        [
            torch.ones_like(log_w_N).sum(),
            log_w_N.sum(),
            (log_w_N.expm1() - log_w_N).sum(),
            cut_N.double().sum(),
            scaled_N.sum(),
            scaled_N.square().sum(),
        ]
    )
    tokens, log_w, k3, cut, total, squares = sum_over_processes(sums).tolist()
    tokens = max(tokens, 1.0)
    return {
        "mismatch/log_weight": log_w / tokens,
        "mismatch/kl": k3 / tokens,
        "mismatch/weight_max": float(largest.exp()),
        "mismatch/cut_share": cut / tokens,
        "mismatch/effective_share": total**2 / squares / tokens if squares else 0.0,
    }
