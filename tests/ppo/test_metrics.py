"""The figures of a round, each by hand on three small answers, one of them empty."""

from __future__ import annotations

import statistics
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from tlcr.ppo import metrics
from tlcr.ppo.metrics import Stopwatch, rollout_metrics, update_metrics
from tlcr.ppo.update import UpdateStatistics
from tlcr.types import Advantages, PolicyScores, Rewards, Rollout

# Three tokens, one token, none: 4 tokens in 2 answers. The first answer ended; the empty one says so too, and does not
# count.
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
ENDED = torch.tensor([True, False, True])


def at_tokens(*values: float) -> Tensor:
    """(3, 4) with these at the four tokens, and NaN where nothing counts."""
    figures = torch.full(MASK.shape, torch.nan, dtype=torch.float64)
    figures[MASK] = torch.tensor(values, dtype=torch.float64)
    return figures


def rollout() -> Rollout:
    ids = torch.zeros(MASK.shape, dtype=torch.long)
    return Rollout(("a", "b", "c"), ("x", "y", ""), ids[:, :1], MASK[:, :1], ids, MASK, ENDED)


def figures_of(estimator: Any, exact_kl: Tensor | None = None) -> dict[str, float]:
    scores = PolicyScores(
        logprobs_BT=at_tokens(-1.0, -2.0, -3.0, -4.0),
        ref_logprobs_BT=at_tokens(-1.5, -1.0, -5.0, -4.0),  # k1 is 0.5, -1, 2 and 0
        values_BT=at_tokens(1.0, 2.0, 3.0, 6.0),
        entropy_BT=at_tokens(0.1, 0.2, 0.3, 0.4),
        kl_BT=exact_kl,
    )
    rewards = Rewards(torch.where(MASK, at_tokens(1.0, 0.0, 3.0, -2.0), 0.0), {})
    advantages = Advantages(at_tokens(9.0, 9.0, 9.0, 9.0), at_tokens(5.0, 1.0, 1.0, 1.0))
    return rollout_metrics(rollout(), scores, rewards, advantages, estimator, gamma=0.5)


def test_figures_are_sums_over_tokens_or_answers_and_never_of_padding() -> None:
    found = figures_of("k2")
    wanted = {
        "kl/per_token": 1.5 / 4,
        "kl/per_answer": 1.5 / 2,
        "kl/estimate": (0.25 + 1 + 4) / 2 / 4,
        "policy/entropy": 1.0 / 4,
        "value/mean": 12 / 4,
        "value/mean_return": 8 / 4,
        "length/mean": 4 / 2,
        "length/ended_share": 1 / 2,
        "length/tokens": 4,
        "reward/mean_token": 2 / 4,
        "reward/mean_return": 2 / 2,
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)


def test_the_values_are_held_against_what_they_regress_to_and_against_what_was_paid() -> None:
    """Values 1, 2, 3 and 6. Returns of 5, 1, 1, 1 leave 4, -1, -2, -5. With a discount of a half the rewards 1, 0, 3
    and -2, of an answer that ended and one that was cut, are worth 1.75, 1.5, 3 and -2, and leave 0.75, -0.5, 0, -8."""
    found = figures_of("k1")
    against = {"": ([5, 1, 1, 1], [4, -1, -2, -5]), "_mc": ([1.75, 1.5, 3, -2], [0.75, -0.5, 0, -8])}
    for ending, (returns, residuals) in against.items():
        wanted = 1 - statistics.pvariance(residuals) / statistics.pvariance(returns)
        assert found[f"value/explained_variance{ending}"] == pytest.approx(wanted)


def test_perfect_values_explain_all_and_equal_returns_leave_nothing_to_explain() -> None:
    paid = Rewards(torch.where(MASK, at_tokens(1.0, 0.0, 3.0, -2.0), 0.0), {})
    returns_BT = metrics.monte_carlo_returns(paid, MASK, gamma=1.0)
    torch.testing.assert_close(returns_BT, torch.where(MASK, at_tokens(4.0, 3.0, 3.0, -2.0), 0.0))
    assert metrics.explained_variance(returns_BT, returns_BT, MASK) == 1.0
    shifted_BT = torch.where(MASK, returns_BT + 7, torch.nan)  # a constant is no error, and padding is nothing
    assert metrics.explained_variance(shifted_BT, returns_BT, MASK) == pytest.approx(1.0)
    one_late_BT = returns_BT.roll(1, dims=1)
    assert metrics.explained_variance(one_late_BT, returns_BT, MASK) < 0.9
    assert metrics.explained_variance(returns_BT, torch.ones(MASK.shape), MASK) == 0.0


def test_the_exact_kl_is_measured_where_it_was_computed_and_the_estimate_stays_the_one_paid_for() -> None:
    found = figures_of("k1", exact_kl=at_tokens(0.5, 0.5, 0.5, 2.5))
    assert (found["kl/per_token"], found["kl/per_answer"], found["kl/estimate"]) == pytest.approx((1.0, 2.0, 1.5 / 4))
    assert figures_of("full", exact_kl=at_tokens(0.5, 0.5, 0.5, 2.5))["kl/estimate"] == pytest.approx(1.0)


def test_figures_are_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process with the same answers leaves every mean and doubles the tokens."""
    alone = figures_of("k1")
    monkeypatch.setattr(metrics, "sum_over_processes", lambda values: 2 * values)
    both = figures_of("k1")
    assert both.pop("length/tokens") == 2 * alone.pop("length/tokens")
    assert both == pytest.approx(alone)
    monkeypatch.setattr(metrics, "sum_over_processes", lambda values: 0 * values)
    assert set(figures_of("k1").values()) == {0.0}  # no token anywhere


def test_every_statistic_of_the_update_is_logged_under_its_own_name() -> None:
    names = [field.name for field in fields(UpdateStatistics)]
    statistics = UpdateStatistics(**{name: float(index) for index, name in enumerate(names)})  # type: ignore[arg-type]
    logged = {
        "policy/loss": "policy_loss",
        "policy/clip_fraction": "clip_fraction",
        "policy/approx_kl": "approx_kl",
        "policy/ratio_max": "ratio_max",
        "policy/grad_norm": "policy_grad_norm",
        "value/loss": "value_loss",
        "value/clip_fraction": "value_clip_fraction",
        "value/grad_norm": "value_grad_norm",
        "kl/loss": "kl",
        "update/loss": "loss",
        "update/optimizer_steps": "optimizer_steps",
        "update/stopped_early": "stopped_early",
    }
    assert update_metrics(statistics) == {key: float(names.index(name)) for key, name in logged.items()}


def test_seconds_are_those_of_each_phase_and_are_told_as_it_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger=metrics.__name__)
    clock = iter([10.0, 11.0, 14.0, 14.5, 16.0, 20.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    with watch.phase("rollout"):
        pass
    assert [record.getMessage() for record in caplog.records] == ["rollout took 3.000 s"]
    with watch.phase("update"):
        pass
    wanted = {"time/rollout_s": 3.0, "time/update_s": 1.5, "time/total_s": 10.0, "time/tokens_per_s": 5.0}
    assert watch.metrics(50) == wanted
