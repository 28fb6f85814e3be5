"""The figures of a round, each by hand on three small answers, one of them empty."""

from __future__ import annotations

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
    return rollout_metrics(rollout(), scores, rewards, advantages, estimator)


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
        "value/explained_variance": "explained_variance",
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
