"""Every metric of the discriminator against numbers worked by hand, and calibration against a known temperature."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tlcr.errors import DataError
from tlcr.evaluation.discriminator_metrics import (
    cross_fitted_confidence,
    evaluate_predictions,
    expected_calibration_error,
    fit_temperature,
    pairwise_accuracy,
    plot_reliability,
    reliability_bins,
    token_rewards,
)
from tlcr.models.discriminator import TokenPredictions


def two_classes(p_positive: list[float]) -> Tensor:
    p = torch.tensor(p_positive, dtype=torch.float64)
    return torch.stack([1 - p, p], dim=-1).log().float()


def predictions(p_positive: list[float], labels: list[int], answers: list[int] | None = None) -> TokenPredictions:
    return TokenPredictions(two_classes(p_positive), torch.tensor(labels), torch.tensor(answers or [0] * len(labels)))


# Two pairs. Rejected answers 0 and 2, revised answers 1 and 3.
EXAMPLE = predictions(
    p_positive=[0.2, 0.6, 0.5, 0.9, 0.4, 0.55, 0.1, 0.7],
    labels=[-1, -1, 0, 1, 1, 0, -1, 1],
    answers=[0, 0, 0, 1, 1, 2, 2, 3],
)


def evaluate(p: TokenPredictions, **changes: object) -> dict[str, float | None]:
    options: dict = {"temperature": 1.0, "targets": "soft", "calibrated": False, **changes}
    return evaluate_predictions(p, **options).metrics


def test_token_metrics_worked_by_hand() -> None:
    metrics = evaluate(EXAMPLE)
    assert metrics["tokens"] == 8
    assert metrics["edited_share"] == 6 / 8
    # positives .9 .4 .7, negatives .2 .6 .1: of 9 pairs only (.4, .6) is in the wrong order
    assert metrics["auc_positive_negative"] == pytest.approx(8 / 9)
    # negatives .2 .6 .1 against .5 .9 .4 .55 .7: .6 is above .5, .4 and .55, so 3 of 15 are wrong
    assert metrics["auc_negative_rest"] == pytest.approx(12 / 15)
    # positives .9 .4 .7 against .2 .6 .5 .55 .1: .4 is below .6, .5 and .55
    assert metrics["auc_positive_rest"] == pytest.approx(12 / 15)
    # called positive among edited: .6 (wrong), .9, .7; missed: .4
    assert metrics["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics["accuracy_positive"] == pytest.approx(2 / 3)
    assert metrics["accuracy_negative"] == pytest.approx(2 / 3)
    assert metrics["mean_reward_negative"] == pytest.approx(2 * 0.9 / 3 - 1, abs=1e-6)
    assert metrics["mean_reward_neutral"] == pytest.approx(2 * 1.05 / 2 - 1, abs=1e-6)
    assert metrics["mean_reward_positive"] == pytest.approx(2 * 2.0 / 3 - 1, abs=1e-6)
    # means: rejected 1.3/3 < revised .65; rejected .325 < revised .7
    assert metrics["pairwise_accuracy"] == 1.0
    nll = [-math.log(x) for x in (0.8, 0.4, 0.5, 0.9, 0.4, 1, 0.9, 0.7)]
    nll[5] = -(math.log(0.55) + math.log(0.45)) / 2
    assert metrics["nll"] == pytest.approx(sum(nll) / 8, rel=1e-5)


def test_labels_shifted_by_one_token_give_other_numbers() -> None:
    shifted = TokenPredictions(EXAMPLE.logits_NC, EXAMPLE.labels_N.roll(1), EXAMPLE.answer_N)
    right, wrong = evaluate(EXAMPLE), evaluate(shifted)
    for name in ("auc_positive_negative", "auc_negative_rest", "auc_positive_rest", "f1", "nll", "ece_before"):
        assert right[name] != pytest.approx(wrong[name])


def test_pairs_are_compared_by_their_mean_token() -> None:
    # the rejected answer of pair 0 has the higher sum and the lower mean; pair 1 is the wrong way round
    p = predictions([0.6, 0.6, 0.6, 0.7, 0.8, 0.3], [0] * 6, [0, 0, 0, 1, 2, 3])
    assert evaluate(p)["pairwise_accuracy"] == 0.5
    assert pairwise_accuracy([1.0, 2.0, 3.0], [0.0, 2.0, 4.0]) == 0.5
    assert pairwise_accuracy([], []) is None
    # a side without counted tokens leaves its pair out
    assert evaluate(predictions([0.6, 0.7, 0.9], [0] * 3, [0, 1, 2]))["pairwise_accuracy"] == 1.0


def test_three_class_rewards_are_p_positive_minus_p_negative() -> None:
    logits = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]]).log()
    assert token_rewards(logits, 1.0).tolist() == pytest.approx([0.3, -0.6], abs=1e-6)


def test_reliability_worked_by_hand() -> None:
    confidence = torch.tensor([0.0, 0.1, 0.3, 0.35, 1.0])
    target = torch.tensor([0.0, 0.5, 0.5, 1.0, 0.5])
    bins = reliability_bins(confidence, target, bins=4)
    assert [b.tokens for b in bins] == [2, 2, 0, 1]
    assert [b.confidence for b in bins] == [pytest.approx(0.05), pytest.approx(0.325), None, 1.0]
    assert [b.target for b in bins] == [0.25, 0.75, None, 0.5]
    assert (bins[1].lower, bins[1].upper) == (0.25, 0.5)
    assert expected_calibration_error(bins) == pytest.approx((2 * 0.2 + 2 * 0.425 + 0.5) / 5)
    assert expected_calibration_error(reliability_bins(confidence[:0], target[:0])) is None


def test_calibration_error_counts_what_the_targets_count() -> None:
    # neutral tokens at .5 are calibrated against soft targets; hard ones do not look at them
    p = predictions([0.5, 0.5, 0.9, 0.1], [0, 0, 1, -1])
    assert evaluate(p)["ece_before"] == pytest.approx(0.05, abs=1e-6)
    assert evaluate(p, targets="hard")["ece_before"] == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize(
    ("labels", "missing"),
    [
        ([1, 1], {"auc_positive_negative", "auc_positive_rest", "auc_negative_rest", "accuracy_negative"}),
        ([-1, -1], {"auc_positive_negative", "auc_positive_rest", "auc_negative_rest", "f1", "accuracy_positive"}),
        ([0, 0], {"auc_positive_negative", "auc_positive_rest", "auc_negative_rest", "f1", "accuracy_negative"}),
    ],
)
def test_one_class_only_leaves_metrics_undefined_with_a_reason(labels: list[int], missing: set[str]) -> None:
    found = evaluate_predictions(predictions([0.3, 0.6], labels), temperature=1.0, targets="hard", calibrated=True)
    assert missing <= found.undefined.keys()
    assert all(found.metrics[name] is None for name in found.undefined)
    assert all(math.isfinite(value) for value in found.defined.values())
    assert json.loads(json.dumps(found.to_json()))["undefined"]["auc_positive_negative"].startswith("it needs both")


def test_no_tokens_at_all() -> None:
    empty = TokenPredictions(torch.empty(0, 2), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))
    found = evaluate_predictions(empty, temperature=1.0, targets="soft", calibrated=True)
    assert found.defined == {"tokens": 0.0}
    assert found.metrics.keys() - {"tokens"} == found.undefined.keys()


# ---- temperature


def calibrated_predictions(factor: float, neutral: int = 0) -> TokenPredictions:
    """At each of nine confidences as many positive tokens as it says, with the logits blown up by ``factor``."""
    p, labels = [], []
    for tenth in range(1, 10):
        positive = tenth * 10
        p += [tenth / 10] * 100
        labels += [1] * positive + [-1] * (100 - positive)
    p += [0.5] * neutral
    labels += [0] * neutral
    answers = torch.arange(len(p)) % 8
    return TokenPredictions(two_classes(p) * factor, torch.tensor(labels), answers)


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("targets", ["soft", "hard"])
def test_a_known_temperature_is_recovered(factor: float, targets: str) -> None:
    p = calibrated_predictions(factor, neutral=50)
    found = fit_temperature(p, targets)  # type: ignore[arg-type]
    assert found.temperature == pytest.approx(factor, rel=1e-4)
    assert found.tokens == (950 if targets == "soft" else 900)
    assert not found.at_bound
    assert found.nll_after <= found.nll_before + 1e-12
    metrics = evaluate(p, temperature=found.temperature, targets=targets, calibrated=True)
    assert metrics["ece_after"] < 0.06  # type: ignore[operator]
    if factor != 1.0:
        assert metrics["ece_before"] > 0.1  # type: ignore[operator]


def test_three_class_temperature_is_recovered() -> None:
    distributions = [[0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]]
    logits, labels = [], []
    for distribution in distributions:
        for label, share in zip((-1, 0, 1), distribution, strict=True):
            logits += [distribution] * round(share * 10)
            labels += [label] * round(share * 10)
    p = TokenPredictions(torch.tensor(logits).log() * 2.5, torch.tensor(labels), torch.zeros(len(labels)).long())
    assert fit_temperature(p, "three_class").temperature == pytest.approx(2.5, rel=1e-4)


def test_neutral_targets_call_for_a_higher_temperature() -> None:
    p = calibrated_predictions(1.0)
    neutral = TokenPredictions(p.logits_NC, torch.zeros_like(p.labels_N), p.answer_N)
    both = TokenPredictions(*(torch.cat([getattr(x, f) for x in (p, neutral)]) for f in vars(p)))
    assert fit_temperature(both, "soft").temperature > 1.3
    assert fit_temperature(both, "hard").temperature == pytest.approx(1.0, rel=1e-4)


def test_where_there_is_no_best_temperature_it_ends_at_a_bound() -> None:
    everything = fit_temperature(predictions([0.9, 0.1], [1, -1]), "soft")
    assert everything.at_bound and everything.temperature == pytest.approx(0.05)
    misleading = fit_temperature(predictions([0.9, 0.1], [-1, 1]), "soft")
    assert misleading.at_bound and misleading.temperature == pytest.approx(20)
    untrained = fit_temperature(predictions([0.5, 0.5], [-1, 1]), "soft")
    assert not untrained.at_bound and untrained.temperature == 1


def test_no_token_to_fit_on_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"data\.held_out.*discriminator\.calibrate"):
        fit_temperature(predictions([0.9, 0.1], [0, 0]), "hard")


def test_cross_fitting_uses_the_other_half_of_the_pairs() -> None:
    # even pairs (answers 0, 1) are right at temperature 3, odd ones (answers 2, 3) at temperature 1
    even, odd = calibrated_predictions(3.0), calibrated_predictions(1.0)
    p = TokenPredictions(
        torch.cat([even.logits_NC, odd.logits_NC]),
        torch.cat([even.labels_N, odd.labels_N]),
        torch.cat([even.answer_N % 2, odd.answer_N % 2 + 2]),
    )
    confidence = cross_fitted_confidence(p, "soft")
    n = len(even.labels_N)
    torch.testing.assert_close(confidence[:n], (token_rewards(even.logits_NC, 1.0) + 1) / 2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(confidence[n:], (token_rewards(odd.logits_NC, 3.0) + 1) / 2, rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError):
        cross_fitted_confidence(even_only := TokenPredictions(*(x[:n] for x in vars(p).values())), "soft")
    found = evaluate_predictions(even_only, temperature=3.0, targets="soft", calibrated=True)
    assert "ece_after" in found.undefined and found.metrics["ece_after"] is None


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    found = evaluate_predictions(calibrated_predictions(3.0), temperature=3.0, targets="soft", calibrated=True)
    assert set(found.reliability) == {"before", "after"} and len(found.reliability["after"]) == 15
    plot_reliability(found.reliability, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
