"""Metrics and calibration of a discriminator.

Everything here takes logits and labels of counted tokens (`TokenPredictions`); no model runs.

Calibration concerns the meaning of the reward. The confidence of a token is s = (reward + 1) / 2, which is p(positive)
for two classes, and its target is (label + 1) / 2: 1 for positive, 0.5 for neutral, 0 for negative. A discriminator is
calibrated where E[target | s] = s, that is, where the reward is the mean label of the tokens that get the same score
(ours; it is what the soft targets of the paper aim at). It is measured over the tokens that the loss was trained on:
all counted ones, or for hard targets the edited ones, where s means P(positive | edited).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor
from torch.nn.functional import log_softmax

from tlcr import ops
from tlcr.errors import DataError
from tlcr.models.discriminator import Targets, TokenPredictions, is_trained_on, target_distribution

__all__ = [
    "Calibration",
    "DiscriminatorEvaluation",
    "ReliabilityBin",
    "can_cross_fit",
    "cross_fitted_confidence",
    "evaluate_predictions",
    "expected_calibration_error",
    "fit_temperature",
    "pairwise_accuracy",
    "plot_reliability",
    "reliability_bins",
    "token_rewards",
]

BINS = 15
_TEMPERATURES = (0.05, 20.0)


def token_rewards(logits_NC: Tensor, temperature: float) -> Tensor:
    """p(positive) - p(negative) of every token, (N,) in [-1, 1]: the reward PPO would pay, unscaled and unclipped."""
    everything = torch.ones(1, len(logits_NC), dtype=torch.bool)
    return ops.fused_reward(logits_NC[None], everything, temperature=temperature)[0]


# ---- calibration


@dataclass(frozen=True)
class Calibration:
    """A temperature, what it did to the loss on the tokens it was fitted on, and how many those were.

    ``at_bound`` says that no temperature between the bounds is best: the logits mislead (upper), or separate the labels
    perfectly (lower). Where no temperature is better than 1, it stays 1.
    """

    temperature: float
    nll_before: float
    nll_after: float
    tokens: int
    at_bound: bool


def fit_temperature(predictions: TokenPredictions, targets: Targets) -> Calibration:
    """The temperature that minimises the training loss on held-out tokens (Guo et al. 2017, with soft targets)::

        T = argmin over [0.05, 20] of  mean_n - sum_c q_nc log softmax(logits_n / T)_c

    over the tokens that enter the training loss, each weighing the same. It is convex in 1 / T, so there is one
    minimum.

    Args:
        predictions: logits and labels of held-out tokens.
        targets: which tokens enter the training loss.

    Returns:
        The temperature, and the loss before and after.

    Raises:
        DataError: there is no such token.
    """
    used = is_trained_on(predictions.labels_N, targets)
    logits_NC = predictions.logits_NC[used].double()
    if len(logits_NC) == 0:
        raise DataError(
            "there is no held-out token to fit the temperature on; hold out more edits (data.held_out), or set "
            "discriminator.calibrate to false"
        )
    targets_NC = target_distribution(predictions.labels_N[used], logits_NC.shape[-1]).double()

    def nll(log_temperature: float) -> float:
        return float(-(targets_NC * log_softmax(logits_NC / math.exp(log_temperature), dim=-1)).sum(dim=-1).mean())

    ends = [math.log(bound) for bound in _TEMPERATURES]
    inside = minimize_scalar(nll, bounds=ends, method="bounded", options={"xatol": 1e-6})
    # in this order, so that of equals 1 wins over an end, and an end over a point of the plain before it
    best = min((0.0, *ends, float(inside.x)), key=lambda log_temperature: round(nll(log_temperature), 9))
    return Calibration(math.exp(best), nll(0.0), nll(best), len(logits_NC), best in ends)


def can_cross_fit(predictions: TokenPredictions, targets: Targets) -> bool:
    """Whether both halves of the pairs, those of even and those of odd number, have a token to fit a temperature on."""
    odd_N, used_N = _is_of_odd_pair(predictions), is_trained_on(predictions.labels_N, targets)
    return bool((used_N & odd_N).any() and (used_N & ~odd_N).any())


def _is_of_odd_pair(predictions: TokenPredictions) -> Tensor:
    return (predictions.answer_N // 2) % 2 == 1


def cross_fitted_confidence(predictions: TokenPredictions, targets: Targets) -> Tensor:
    """The confidence of every token at the temperature fitted on the other half of the pairs.

    So that calibration is not measured on what it was fitted on. The halves are the pairs of even and of odd number.

    Args:
        predictions: logits and labels of held-out tokens.
        targets: which tokens enter the training loss.

    Returns:
        (N,) probabilities.

    Raises:
        DataError: a half has nothing to fit on.
    """
    odd_N = _is_of_odd_pair(predictions)
    confidence_N = torch.empty(len(odd_N))
    for half_N in (odd_N, ~odd_N):
        other = TokenPredictions(*(field[~half_N] for field in vars(predictions).values()))
        temperature = fit_temperature(other, targets).temperature
        confidence_N[half_N] = (token_rewards(predictions.logits_NC[half_N], temperature) + 1) / 2
    return confidence_N


@dataclass(frozen=True)
class ReliabilityBin:
    """The tokens whose confidence lies in [lower, upper): their mean confidence and mean target; None where empty."""

    lower: float
    upper: float
    tokens: int
    confidence: float | None
    target: float | None


def reliability_bins(confidence_N: Tensor, target_N: Tensor, bins: int = BINS) -> list[ReliabilityBin]:
    """Tokens sorted by confidence into `bins` intervals of equal width; confidence 1 belongs to the last."""
    index_N = (confidence_N * bins).long().clamp(0, bins - 1)
    result = []
    for i in range(bins):
        inside = index_N == i
        tokens = int(inside.sum())
        means = [float(x[inside].double().mean()) if tokens else None for x in (confidence_N, target_N)]
        result.append(ReliabilityBin(i / bins, (i + 1) / bins, tokens, *means))
    return result


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float | None:
    """sum over bins of (share of tokens) * |mean confidence - mean target|; None without tokens."""
    total = sum(b.tokens for b in bins)
    if total == 0:
        return None
    return sum(b.tokens / total * abs(b.confidence - b.target) for b in bins if b.tokens)  # type: ignore[operator]


def plot_reliability(curves: Mapping[str, Sequence[ReliabilityBin]], path: Path) -> None:
    """Mean target against mean confidence for each named list of bins, with the tokens per bin below, as a PNG file."""
    figure = Figure(figsize=(5, 6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    above.plot([0, 1], [0, 1], linestyle="--", color="0.6", label="calibrated")
    for i, (name, bins) in enumerate(curves.items()):
        filled = [b for b in bins if b.tokens]
        above.plot([b.confidence for b in filled], [b.target for b in filled], marker="o", label=name)
        width = (bins[0].upper - bins[0].lower) / len(curves)
        below.bar([b.lower + i * width for b in bins], [b.tokens for b in bins], width, align="edge", label=name)
    above.set(ylabel="mean target (positive 1, neutral 0.5, negative 0)", ylim=(0, 1))
    above.legend(loc="best")  # of the default, the same, matplotlib warns on a slow machine
    below.set(xlabel="confidence, (reward + 1) / 2", ylabel="tokens", xlim=(0, 1), yscale="symlog")
    figure.savefig(path, format="png", dpi=120)


# ---- evaluation


def pairwise_accuracy(better: Sequence[float], worse: Sequence[float]) -> float | None:
    """The share of pairs whose better answer has the higher score, a tie counting half; None without pairs."""
    if not better:
        return None
    return sum((b > w) + 0.5 * (b == w) for b, w in zip(better, worse, strict=True)) / len(better)


@dataclass(frozen=True)
class DiscriminatorEvaluation:
    """What `evaluate_predictions` found: numbers, why some are missing, and the reliability bins for the report.

    metrics: see `evaluate_predictions`; None where a number is not defined, with the reason in `undefined`.
    reliability: bins at temperature 1 ("before") and, where it was calibrated, cross-fitted ("after").
    """

    metrics: dict[str, float | None]
    undefined: dict[str, str]
    reliability: dict[str, list[ReliabilityBin]]

    @property
    def defined(self) -> dict[str, float]:
        """The metrics that have a value."""
        return {name: value for name, value in self.metrics.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        return asdict(self)


def evaluate_predictions(
    predictions: TokenPredictions, *, temperature: float, targets: Targets, calibrated: bool
) -> DiscriminatorEvaluation:
    """Token metrics of held-out pairs, with rewards taken at ``temperature``.

    - auc_positive_negative, f1, accuracy_positive, accuracy_negative: among edited tokens; a token is called positive
      where its reward is above 0 and negative where it is below. f1 is that of the positive class.
    - auc_negative_rest, auc_positive_rest: among all tokens, whether the reward finds the negative (positive) ones.
    - pairwise_accuracy: share of pairs whose revised answer has the higher mean reward; ties count half.
    - mean_reward_negative, _neutral, _positive: mean reward of the tokens with that label.
    - nll: the training loss per token. ece_before and, where ``calibrated``, ece_after: expected calibration error (15
      bins) at temperature 1 and at a temperature fitted on the other half of the pairs.
    - tokens, edited_share: what it was measured on.

    Args:
        predictions: logits and labels of held-out tokens.
        temperature: divides the logits.
        targets: which tokens enter the training loss.
        calibrated: whether a temperature was fitted.

    Returns:
        The figures.
    """
    labels_N, rewards_N = predictions.labels_N, token_rewards(predictions.logits_NC, temperature)
    edited_N = labels_N != 0
    metrics: dict[str, float | None] = {
        "tokens": float(len(labels_N)),
        "edited_share": float(edited_N.double().mean()) if len(labels_N) else None,
    }
    undefined = {} if len(labels_N) else {"edited_share": "there are no tokens"}

    def ranked(name: str, is_target_N: Tensor, score_N: Tensor, meaning: str) -> None:
        if is_target_N.any() and not is_target_N.all():
            metrics[name] = float(roc_auc_score(is_target_N.numpy(), score_N.numpy()))
        else:
            metrics[name], undefined[name] = None, f"it needs both {meaning}"

    def mean(name: str, value_N: Tensor, meaning: str) -> None:
        if len(value_N):
            metrics[name] = float(value_N.double().mean())
        else:
            metrics[name], undefined[name] = None, f"there are no {meaning}"

    ranked(
        "auc_positive_negative",
        labels_N[edited_N] > 0,
        rewards_N[edited_N],
        "positive and negative tokens",
    )
    ranked("auc_negative_rest", labels_N < 0, -rewards_N, "negative and other tokens")
    ranked("auc_positive_rest", labels_N > 0, rewards_N, "positive and other tokens")
    if (labels_N > 0).any():
        truth, called = labels_N[edited_N] > 0, rewards_N[edited_N] > 0
        metrics["f1"] = float(f1_score(truth.numpy(), called.numpy()))
    else:
        metrics["f1"], undefined["f1"] = None, "there are no positive tokens"
    mean("accuracy_positive", rewards_N[labels_N > 0] > 0, "positive tokens")
    mean("accuracy_negative", rewards_N[labels_N < 0] < 0, "negative tokens")
    for label, name in ((-1, "negative"), (0, "neutral"), (1, "positive")):
        mean(f"mean_reward_{name}", rewards_N[labels_N == label], f"{name} tokens")

    metrics["pairwise_accuracy"] = pairwise_accuracy(*_mean_rewards(predictions.answer_N, rewards_N))
    if metrics["pairwise_accuracy"] is None:
        undefined["pairwise_accuracy"] = "there is no pair with counted tokens on both sides"

    used_N = is_trained_on(labels_N, targets)
    target_N = (labels_N.float() + 1) / 2
    targets_NC = target_distribution(labels_N, predictions.logits_NC.shape[-1])
    nll_N = -(targets_NC * log_softmax(predictions.logits_NC / temperature, dim=-1)).sum(dim=-1)
    mean("nll", nll_N[used_N], "tokens that the loss counts")
    confidence_N = (token_rewards(predictions.logits_NC, 1.0) + 1) / 2
    reliability = {"before": reliability_bins(confidence_N[used_N], target_N[used_N])}
    if calibrated and can_cross_fit(predictions, targets):
        after_N = cross_fitted_confidence(predictions, targets)
        reliability["after"] = reliability_bins(after_N[used_N], target_N[used_N])
    elif calibrated:
        metrics["ece_after"], undefined["ece_after"] = None, "it needs two held-out pairs with tokens"
    for name, bins in reliability.items():
        metrics[f"ece_{name}"] = expected_calibration_error(bins)
        if metrics[f"ece_{name}"] is None:
            undefined[f"ece_{name}"] = "there are no tokens that the loss counts"
    return DiscriminatorEvaluation(metrics, undefined, reliability)


def _mean_rewards(answer_N: Tensor, rewards_N: Tensor) -> tuple[list[float], list[float]]:
    """The mean reward of each pair's revised answers, and of its rejected ones, for pairs that have tokens of both."""
    answers = int(answer_N.max()) // 2 * 2 + 2 if len(answer_N) else 0
    tokens = torch.bincount(answer_N, minlength=answers)
    means = torch.bincount(answer_N, weights=rewards_N.double(), minlength=answers) / tokens
    both = (tokens[0::2] > 0) & (tokens[1::2] > 0)
    return means[1::2][both].tolist(), means[0::2][both].tolist()
