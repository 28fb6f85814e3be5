"""The KL estimators against hand-worked values and exact sums, and the controllers against Ziegler et al.'s rule."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tlcr.config.schema import KLConfig, PPOConfig
from tlcr.errors import CheckpointError, ConfigError, ShapeError, TrainingDiverged
from tlcr.ppo.kl import AdaptiveKLController, FixedKLController, KLController, build_kl_controller, estimate_kl

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "worked"),
    [
        ("k1", [math.log(2.5), math.log(1.5), -math.log(3)]),
        ("k2", [math.log(2.5) ** 2 / 2, math.log(1.5) ** 2 / 2, math.log(3) ** 2 / 2]),
        ("k3", [0.4 - 1 + math.log(2.5), 1 / 1.5 - 1 + math.log(1.5), 3 - 1 - math.log(3)]),
    ],
)
def test_estimators_are_the_formulas(estimator: str, worked: list[float]) -> None:
    estimate = estimate_kl(P.log(), Q.log(), estimator)
    torch.testing.assert_close(estimate, torch.tensor(worked, dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_for_kl_of_policy_from_reference(estimator: str) -> None:
    exact = (P * (P / Q).log()).sum()
    torch.testing.assert_close((P * estimate_kl(P.log(), Q.log(), estimator)).sum(), exact)
    assert not math.isclose((P * estimate_kl(Q.log(), P.log(), estimator)).sum(), exact, rel_tol=0.1)


def test_k3_keeps_its_digits_near_zero() -> None:
    near = torch.tensor([1e-4])
    torch.testing.assert_close(estimate_kl(near, torch.zeros(1), "k3"), near.square() / 2, rtol=2e-3, atol=0)


def test_the_gradient_of_k2_is_the_log_ratio() -> None:
    logprobs = P.log().requires_grad_()
    estimate_kl(logprobs, Q.log(), "k2").sum().backward()
    torch.testing.assert_close(logprobs.grad, (P / Q).log())


def test_estimators_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ShapeError, match=r"ref_logprobs has shape \(2,\), wanted \(3,\)"):
        estimate_kl(P.log(), Q.log()[:2], "k1")
    with pytest.raises(ConfigError, match=r"estimator='full', wanted 'k1', 'k2' or 'k3'"):
        estimate_kl(P.log(), Q.log(), "full")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kl", "answers", "factor"),
    [
        (0.11, 100, 1 + 0.1 * 100 / 1000),  # within the clip
        (0.5, 100, 1 + 0.2 * 100 / 1000),  # far above: clipped
        (0.0, 100, 1 - 0.1 * 100 / 1000),  # far below: clipped to half as much
        (-0.3, 100, 1 - 0.1 * 100 / 1000),  # k1 may be negative
        (0.0, 6000, 1 - 0.1),  # a batch of six horizons must not turn the price negative
    ],
)
def test_the_adaptive_controller_follows_its_rule(kl: float, answers: int, factor: float) -> None:
    controller = AdaptiveKLController(0.4, target=0.1, horizon=1000)
    controller.load_state_dict({"coef": 16.0})  # well above its start, so that this rule alone moves it
    controller.update(kl, answers)
    assert controller.coef == pytest.approx(16.0 * factor, rel=1e-12)


def test_the_price_rises_at_once_where_the_kl_will_soon_be_above_the_target_and_falls_slowly() -> None:
    """0.02, 0.05 and 0.08: a round adds 0.03, of which the mean is 0.2 * 0.03 = 0.006 and then 0.006 + 0.2 * (0.03 -
    0.006) = 0.0108. 8 rounds more are 0.098 and 0.1664 nats, the second above 0.1: 1.664^2 of the start. A KL of 0
    after it takes away a tenth."""
    controller = AdaptiveKLController(0.4, target=0.1, horizon=1000)
    coefs = []
    for kl in (0.02, 0.05, 0.08, 0.0):
        controller.update(kl, 1000)
        coefs.append(controller.coef)
    assert coefs == pytest.approx([0.4, 0.4, 0.4 * 1.664**2, 0.4 * 1.664**2 * 0.9])
    assert not controller.reached
    above = AdaptiveKLController(0.4, target=0.1, horizon=1e12)
    above.update(0.3, 1)
    assert above.coef == pytest.approx(0.4 * 9)


def test_the_adaptive_controller_settles_at_its_target() -> None:
    controller, kl = AdaptiveKLController(0.01, target=0.1, horizon=1000), 0.0
    for _ in range(4000):
        kl += 0.1 * (0.02 / controller.coef - kl)  # a policy whose KL falls, in some rounds, as its price rises
        controller.update(kl, 50)
    assert kl == pytest.approx(0.1, rel=1e-2)


def run_away(controller: KLController, rounds: int) -> list[float]:
    """A policy that moves on with momentum, towards a distance that falls with the price: what PPO does on the embedded
    task, where a price of 0.1 leads to some 1.3 nats and half of that is passed at full speed."""
    distance, speed, kls = 0.0, 0.0, []
    for _ in range(rounds):
        kls.append(distance**2)
        end = 1.15 * (controller.coef / 0.1) ** -0.7
        controller.update(kls[-1], 32)
        speed = 0.5 * speed + 0.5 * 0.032 * max(-1.0, min(1.0, (end - distance) / 0.3))
        distance += speed
    return kls


def test_the_kl_does_not_run_past_its_target() -> None:
    assert max(run_away(FixedKLController(0.1), 40)) > 0.85
    adaptive = build_kl_controller(KLConfig(target=0.5), PPOConfig(updates=40, batch_size=32))
    kls = run_away(adaptive, 40)
    assert max(kls) < 0.62 and all(0.35 < kl < 0.6 for kl in kls[-15:])


def test_the_price_does_not_fall_below_its_start_before_the_target_was_reached_once() -> None:
    controller = AdaptiveKLController(0.4, target=0.1, horizon=1000)
    for kl in (-0.001, 0.0, 0.001, 0.002):
        controller.update(kl, 1000)
        assert controller.coef == 0.4
    controller.update(0.1, 1000)
    assert controller.reached
    while controller.coef > 0.4:
        controller.update(0.0, 1000)
    assert controller.coef < 0.4  # from then on it moves both ways


@pytest.mark.parametrize(("kl", "falls"), [(0.1, True), (0.05, False)], ids=["reached", "not reached"])
def test_a_resumed_controller_knows_whether_the_target_was_reached(kl: float, falls: bool) -> None:
    controller = AdaptiveKLController(0.4, target=0.1, horizon=100)
    controller.update(kl, 64)
    resumed = AdaptiveKLController(0.4, target=0.1, horizon=100)
    resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    resumed.update(0.0, 64)
    assert (resumed.coef < 0.4) == falls


def test_a_run_that_is_resumed_with_more_updates_keeps_its_horizon() -> None:
    first, longer = (build_kl_controller(KLConfig(target=0.2), PPOConfig(updates=n, batch_size=8)) for n in (200, 400))
    assert isinstance(first, AdaptiveKLController) and isinstance(longer, AdaptiveKLController)
    assert longer.horizon == 2 * first.horizon
    longer.load_state_dict(first.state_dict())
    assert longer.horizon == first.horizon == 80


def test_what_an_earlier_version_saved_goes_on_adapting() -> None:
    controller = AdaptiveKLController(9.0, target=0.1, horizon=100)
    controller.load_state_dict({"coef": 0.4})
    controller.update(0.05, 100)
    assert controller.coef == pytest.approx(0.4 * 0.9)


@pytest.mark.parametrize(
    ("updates", "batch", "horizon"), [(40, 32, 64), (200, 128, 1280), (10, 32, 32)], ids=["short", "long", "one batch"]
)
def test_the_horizon_is_a_twentieth_of_the_run(updates: int, batch: int, horizon: int) -> None:
    controller = build_kl_controller(KLConfig(target=0.2), PPOConfig(updates=updates, batch_size=batch))
    assert isinstance(controller, AdaptiveKLController) and controller.horizon == horizon
    controller.load_state_dict(controller.state_dict() | {"coef": 1e6})
    for _ in range(updates):
        controller.update(9.0, batch)
    if updates > 20:  # and a run may move the price as far with few updates as with many
        assert math.log(controller.coef / 1e6) == pytest.approx(4, abs=0.2)


def test_controllers_resume_where_they_stopped() -> None:
    controller = AdaptiveKLController(0.4, target=0.1, horizon=100)
    for kl in (0.05, 0.2):
        controller.update(kl, 64)
    resumed = AdaptiveKLController(0.4, target=0.1, horizon=100)
    resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert resumed.coef == controller.coef
    controller.update(0.25, 64)
    resumed.update(0.25, 64)
    assert resumed.coef == controller.coef != 0.4
    with pytest.raises(CheckpointError, match="wanted a 'coef' of at least 0"):
        resumed.load_state_dict({})


@pytest.mark.parametrize("cfg", [KLConfig(), KLConfig(target=0.1)])
def test_no_controller_takes_nan_for_a_kl(cfg: KLConfig) -> None:
    with pytest.raises(TrainingDiverged, match=r"nan nats per token over 8 answers"):
        build_kl_controller(cfg, PPOConfig()).update(math.nan, 8)


def test_the_config_chooses_the_controller() -> None:
    fixed = build_kl_controller(KLConfig(coef=0.3), PPOConfig())
    fixed.update(100.0, 1000)
    assert isinstance(fixed, FixedKLController) and fixed.coef == 0.3
    adaptive = build_kl_controller(KLConfig(coef=0.3, target=0.2, horizon=7), PPOConfig())
    assert isinstance(adaptive, AdaptiveKLController)
    assert (adaptive.coef, adaptive.target, adaptive.horizon) == (0.3, 0.2, 7)
    with pytest.raises(ConfigError, match="coef > 0"):
        AdaptiveKLController(0.0, target=0.1, horizon=10)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"estimator": "full"}, "does not depend on the action"),
        ({"estimator": "k1", "placement": "loss"}, "gradient of log p - log q is zero on average"),
        ({"target": 0.1, "coef": 0.0}, "leave 0 at 0"),
    ],
)
def test_settings_that_would_hold_nothing_back_are_refused(options: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        KLConfig(**options)


def test_the_full_kl_may_stand_in_the_loss() -> None:
    assert KLConfig(estimator="full", placement="loss").estimator == "full"
