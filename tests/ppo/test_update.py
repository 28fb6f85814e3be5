"""One PPO update: the loss and its gradient against plain loops in float64, its order, its limits and its guards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from tests.ppo.helpers import (
    ANSWER_IDS,
    PROMPT_IDS,
    GradientRecorder,
    double_actor_critic,
    known_rollout,
    known_update,
)
from tlcr.config.schema import KLConfig, PPOConfig
from tlcr.errors import TrainingDiverged
from tlcr.models.actor_critic import ActorCritic
from tlcr.ppo.rollout import seeded_generator
from tlcr.ppo.scores import score_rollout
from tlcr.ppo.update import UpdateStatistics, ppo_update
from tlcr.training.optim import build_optimizer
from tlcr.types import Advantages, PolicyScores, Rollout

LM = Callable[..., PreTrainedModel]
TEMPERATURE = 0.7
ONE_STEP = {"batch_size": 8, "minibatch_size": 8, "epochs": 1, "max_grad_norm": 1e9}


def update(
    actor_critic: ActorCritic,
    optimizer: torch.optim.Optimizer,
    scores: PolicyScores,
    advantages: Advantages,
    *,
    rollout: Rollout | None = None,
    kl: KLConfig | None = None,
    reference: PreTrainedModel | None = None,
    value_only: bool = False,
    **ppo: Any,
) -> UpdateStatistics:
    return ppo_update(
        actor_critic,
        optimizer,
        known_rollout() if rollout is None else rollout,
        scores,
        advantages,
        PPOConfig(**(ONE_STEP | ppo)),
        kl or KLConfig(),
        kl_coef=0.3,
        temperature=TEMPERATURE,
        reference=actor_critic.policy if reference is None else reference,
        accelerator=Accelerator(),
        generator=seeded_generator("test", 0),
        value_only=value_only,
    )


def plain_loss(
    actor_critic: ActorCritic,
    scores: PolicyScores,
    advantages: Advantages,
    *,
    aggregate: str = "token",
    entropy_coef: float = 0.0,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float = math.inf,
    value_clip: float = 0.2,
    kl_of: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
    reference: PreTrainedModel | None = None,
) -> Tensor:
    """The definition: one unpadded prefix at a time, nothing shared with the code under test."""
    assert actor_critic.value_model is not None
    row_losses = []
    for b, (prompt, answer) in enumerate(zip(PROMPT_IDS, ANSWER_IDS, strict=True)):
        losses = []
        for t, token in enumerate(answer):
            prefix = torch.tensor([prompt + answer[:t]])
            logp_V = (actor_critic.policy(prefix).logits[0, -1] / TEMPERATURE).log_softmax(-1)
            value = actor_critic.value_model(prefix).logits[0, -1, 0]
            advantage, target = advantages.advantages_BT[b, t], advantages.returns_BT[b, t]
            old_value = scores.values_BT[b, t]
            ratio = (logp_V[token] - scores.logprobs_BT[b, t]).exp()
            policy = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip[0], 1 + clip[1]))
            if advantage < 0 and dual_clip < math.inf:
                policy = torch.min(policy, -dual_clip * advantage)
            near = old_value + (value - old_value).clamp(-value_clip, value_clip)
            loss = policy + 0.5 * 0.5 * torch.max((value - target) ** 2, (near - target) ** 2)
            loss = loss + entropy_coef * (logp_V.exp() * logp_V).sum()
            if kl_of is not None:
                assert reference is not None
                with torch.no_grad():
                    logq_V = (reference(prefix).logits[0, -1] / TEMPERATURE).log_softmax(-1)
                ref_logprob = scores.ref_logprobs_BT[b, t]
                loss = loss + 0.3 * kl_of(logp_V[token], ref_logprob, logp_V, logq_V, torch.tensor(token))
            losses.append(loss)
        row_losses.append(torch.stack(losses))
    if aggregate == "sequence":
        return torch.stack([row.mean() for row in row_losses]).mean()
    return torch.cat(row_losses).mean()


KL_BY_HAND = {
    "k2": lambda logp, logq, *_: 0.5 * (logp - logq) ** 2,
    "k3": lambda logp, logq, *_: (logq - logp).exp() - 1 + (logp - logq),
    "full": lambda _p, _q, logp_V, logq_V, _t: (logp_V.exp() * (logp_V - logq_V)).sum(),
}


def assert_same_gradients(recorder: GradientRecorder, actor_critic: ActorCritic, loss: Tensor) -> None:
    expected = torch.autograd.grad(loss, list(actor_critic.parameters()))
    (found,) = recorder.steps
    assert any(g.abs().max() > 1e-3 for g in expected)
    for found_g, expected_g in zip(found, expected, strict=True):
        torch.testing.assert_close(found_g, expected_g, rtol=1e-9, atol=1e-12)


# ---- the loss


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_loss_and_gradient_are_the_definitions(tiny_gpt2: LM, aggregate: str) -> None:
    actor_critic = double_actor_critic(tiny_gpt2)
    scores, advantages = known_update(known_rollout())
    recorder = GradientRecorder(actor_critic)
    statistics = update(
        actor_critic, recorder, scores, advantages, aggregate=aggregate, entropy_coef=0.1, micro_batch_size=3
    )
    loss = plain_loss(actor_critic, scores, advantages, aggregate=aggregate, entropy_coef=0.1)
    assert statistics.loss == pytest.approx(loss.item(), rel=1e-12)
    assert_same_gradients(recorder, actor_critic, loss)


def test_every_bound_is_the_one_of_its_name(tiny_gpt2: LM) -> None:
    """The four bounds are four numbers, each of which some token meets."""
    actor_critic = double_actor_critic(tiny_gpt2)
    scores, advantages = known_update(known_rollout())
    recorder = GradientRecorder(actor_critic)
    options = {"clip": 0.1, "clip_high": 0.05, "dual_clip": 1.15, "value_clip": 0.4}
    statistics = update(actor_critic, recorder, scores, advantages, **options)
    bounds: dict[str, Any] = {"clip": (0.1, 0.05), "dual_clip": 1.15, "value_clip": 0.4}
    loss = plain_loss(actor_critic, scores, advantages, **bounds)
    assert statistics.loss == pytest.approx(loss.item(), rel=1e-12)
    assert_same_gradients(recorder, actor_critic, loss)
    for name, other in {"clip": (0.1, 0.1), "dual_clip": math.inf, "value_clip": 0.2}.items():
        without = plain_loss(actor_critic, scores, advantages, **{**bounds, name: other})
        assert abs(without.item() - loss.item()) > 1e-6, name
    without = plain_loss(actor_critic, scores, advantages, **{**bounds, "clip": (0.2, 0.05)})
    assert abs(without.item() - loss.item()) > 1e-6


@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
def test_kl_in_the_loss_is_the_definition(tiny_gpt2: LM, estimator: Any) -> None:
    actor_critic, reference = double_actor_critic(tiny_gpt2), tiny_gpt2(seed=9).double()
    scores, advantages = known_update(known_rollout())
    recorder = GradientRecorder(actor_critic)
    kl = KLConfig(placement="loss", estimator=estimator)
    statistics = update(actor_critic, recorder, scores, advantages, kl=kl, reference=reference, micro_batch_size=3)
    loss = plain_loss(actor_critic, scores, advantages, kl_of=KL_BY_HAND[estimator], reference=reference)
    assert statistics.loss == pytest.approx(loss.item(), rel=1e-12) and statistics.kl > 0
    assert_same_gradients(recorder, actor_critic, loss)
    assert all(p.grad is None for p in reference.parameters())


def test_a_launchers_accumulation_of_gradients_divides_nothing(tiny_gpt2: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for steps in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        actor_critic = double_actor_critic(tiny_gpt2)
        found.append(update(actor_critic, GradientRecorder(actor_critic), *known_update(known_rollout())))
    assert found[0] == found[1]


@pytest.mark.parametrize("late", ["logprobs_BT", "values_BT", "advantages_BT", "returns_BT"])
def test_an_input_one_token_late_would_be_noticed(tiny_gpt2: LM, late: str) -> None:
    actor_critic = double_actor_critic(tiny_gpt2)
    scores, advantages = known_update(known_rollout())
    loss = plain_loss(actor_critic, scores, advantages).item()

    def shifted(x: Any) -> Any:
        return replace(x, **{late: getattr(x, late).nan_to_num().roll(1, dims=1)}) if hasattr(x, late) else x

    found = update(actor_critic, GradientRecorder(actor_critic), shifted(scores), shifted(advantages)).loss
    assert abs(found - loss) > 1e-3


# ---- the order of things


def test_each_pass_takes_every_row_once_in_a_new_order(tiny_gpt2: LM) -> None:
    actor_critic, seen = double_actor_critic(tiny_gpt2), []
    rollout = known_rollout()
    rows = {tuple(p + a): i for i, (p, a) in enumerate(zip(PROMPT_IDS, ANSWER_IDS, strict=True))}

    def note(_module: torch.nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        ids_BL, mask_BL, _ = inputs
        seen.append([rows[tuple(ids_L[mask_L].tolist())] for ids_L, mask_L in zip(ids_BL, mask_BL, strict=True)])

    actor_critic.register_forward_pre_hook(note)
    recorder = GradientRecorder(actor_critic)
    statistics = update(actor_critic, recorder, *known_update(rollout), minibatch_size=4, micro_batch_size=2, epochs=3)
    assert statistics.optimizer_steps == len(recorder.steps) == 6
    assert [len(batch) for batch in seen] == [2] * 12
    passes = [[row for batch in seen[i : i + 4] for row in batch] for i in (0, 4, 8)]
    assert all(sorted(rows_seen) == list(range(8)) for rows_seen in passes)
    assert len({tuple(sorted(p[:4])) for p in passes}) > 1


def test_a_step_has_the_gradient_of_its_own_minibatch_alone(tiny_gpt2: LM) -> None:
    """Rows weigh alike ("sequence"), and nothing moves: the mean over a pass's minibatches is the gradient of all."""

    def steps(minibatch_size: int, epochs: int) -> list[list[Tensor | None]]:
        actor_critic = double_actor_critic(tiny_gpt2)
        recorder = GradientRecorder(actor_critic)
        options: dict[str, Any] = {"minibatch_size": minibatch_size, "epochs": epochs, "aggregate": "sequence"}
        update(actor_critic, recorder, *known_update(known_rollout()), micro_batch_size=3, **options)
        return recorder.steps

    (whole,) = steps(8, 1)
    parts = steps(2, 2)
    assert len(parts) == 8
    for one_pass in (parts[:4], parts[4:]):
        for expected, *found in zip(whole, *one_pass, strict=True):
            assert expected is not None
            torch.testing.assert_close(torch.stack(found).mean(0), expected, rtol=1e-8, atol=1e-11)


def test_the_generator_alone_decides_the_order_and_the_model_is_left_ready_to_evaluate(tiny_gpt2: LM) -> None:
    def first_step(global_seed: int) -> Tensor:
        torch.manual_seed(global_seed)
        actor_critic = double_actor_critic(tiny_gpt2)
        recorder = GradientRecorder(actor_critic)
        update(actor_critic, recorder, *known_update(known_rollout()), minibatch_size=2)
        assert not actor_critic.training and not actor_critic.policy.training
        assert all(p.grad is None for p in actor_critic.parameters())
        gradient = recorder.steps[0][0]
        assert gradient is not None
        return gradient

    assert torch.equal(first_step(0), first_step(1))


def test_statistics_are_means_over_the_steps_and_the_largest_ratio_of_all(tiny_gpt2: LM) -> None:
    """Eight steps of one row, from which nothing moves; with "sequence" each row weighs alike."""
    actor_critic = double_actor_critic(tiny_gpt2)
    recorder = GradientRecorder(actor_critic)
    scores, advantages = known_update(known_rollout())
    whole = update(actor_critic, recorder, scores, advantages, aggregate="sequence")
    recorder.steps.clear()
    parts = update(actor_critic, recorder, scores, advantages, aggregate="sequence", minibatch_size=1)
    assert parts.optimizer_steps == len(recorder.steps) == 8
    for name in ("loss", "policy_loss", "value_loss", "entropy", "clip_fraction", "value_clip_fraction", "approx_kl"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-9), name
    count = len(actor_critic.policy_parameters())
    for name, share in (("policy_grad_norm", slice(0, count)), ("value_grad_norm", slice(count, None))):
        norms = [torch.stack([g.norm() for g in step[share] if g is not None]).norm() for step in recorder.steps]
        assert getattr(parts, name) == pytest.approx(float(torch.stack(norms).mean()), rel=1e-6), name


def test_the_largest_ratio_is_that_of_all_steps(tiny_gpt2: LM) -> None:
    """It is a token of row 0 or of row 1, and only one of them can be the row of the last step."""
    actor_critic = double_actor_critic(tiny_gpt2)
    recorder = GradientRecorder(actor_critic)
    for row in (0, 1):
        scores, advantages = known_update(known_rollout())
        scores.logprobs_BT[row, 0] -= 2
        whole, parts = (update(actor_critic, recorder, scores, advantages, minibatch_size=n) for n in (8, 1))
        assert parts.ratio_max == pytest.approx(whole.ratio_max) and whole.ratio_max > 3


def test_limits_are_where_they_are_said_to_be(tiny_gpt2: LM) -> None:
    actor_critic = double_actor_critic(tiny_gpt2)
    recorder = GradientRecorder(actor_critic)
    scores, advantages = known_update(known_rollout())

    def once(**limits: float) -> UpdateStatistics:
        return update(actor_critic, recorder, scores, advantages, **limits)

    free = once()
    assert free.approx_kl > 1e-3 and free.ratio_max > 1.1
    assert not once(target_kl=1.001 * free.approx_kl).stopped_early
    assert once(target_kl=0.999 * free.approx_kl).stopped_early
    once(max_ratio=1.001 * free.ratio_max)
    with pytest.raises(TrainingDiverged, match="times as probable"):
        once(max_ratio=0.999 * free.ratio_max)


def test_gradients_of_each_network_are_clipped_by_their_own_norm(tiny_gpt2: LM) -> None:
    actor_critic = double_actor_critic(tiny_gpt2)
    scores, advantages = known_update(known_rollout())
    recorder = GradientRecorder(actor_critic)
    statistics = update(actor_critic, recorder, scores, advantages, max_grad_norm=1e-3)
    (found,) = recorder.steps
    count = len(actor_critic.policy_parameters())
    for grads in (found[:count], found[count:]):
        assert torch.stack([g.norm() for g in grads if g is not None]).norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert statistics.policy_grad_norm > 1e-2 and statistics.value_grad_norm > 1e-2


def on_policy(actor_critic: ActorCritic) -> PolicyScores:
    return score_rollout(
        actor_critic, actor_critic.policy, known_rollout(), temperature=TEMPERATURE, micro_batch_size=3, exact_kl=False
    )


def test_the_first_ratio_is_one(tiny_gpt2: LM) -> None:
    actor_critic = double_actor_critic(tiny_gpt2)
    scores = on_policy(actor_critic)
    _, advantages = known_update(known_rollout())
    statistics = update(actor_critic, GradientRecorder(actor_critic), scores, advantages)
    assert statistics.ratio_max == pytest.approx(1.0, abs=1e-12) and statistics.approx_kl == pytest.approx(0, abs=1e-12)
    assert statistics.clip_fraction == 0


def test_passes_end_once_the_policy_has_moved_too_far(tiny_gpt2: LM) -> None:
    def train(target_kl: float | None) -> tuple[UpdateStatistics, ActorCritic]:
        actor_critic = double_actor_critic(tiny_gpt2)
        _, advantages = known_update(known_rollout())
        optimizer = torch.optim.SGD(actor_critic.parameters(), lr=1.0)
        options = {"minibatch_size": 4, "epochs": 5, "target_kl": target_kl}
        return update(actor_critic, optimizer, on_policy(actor_critic), advantages, **options), actor_critic

    free, _ = train(None)
    assert free.optimizer_steps == 10 and not free.stopped_early and free.approx_kl > 1e-3
    held, _ = train(1e-3)
    assert held.stopped_early and 1 <= held.optimizer_steps < 10


def test_a_minibatch_that_stops_the_passes_takes_no_step(tiny_gpt2: LM) -> None:
    actor_critic = double_actor_critic(tiny_gpt2)
    recorder = GradientRecorder(actor_critic)
    statistics = update(actor_critic, recorder, *known_update(known_rollout()), target_kl=1e-9, epochs=4)
    assert statistics.stopped_early and statistics.optimizer_steps == 0 and not recorder.steps


# ---- warm-up and value terms


@pytest.mark.parametrize("shared", [True, False])
def test_while_values_warm_up_the_policy_stays_to_the_last_bit(tiny_gpt2: LM, shared: bool) -> None:
    actor_critic = double_actor_critic(tiny_gpt2)
    if shared:
        actor_critic = ActorCritic(actor_critic.policy, None)
    before = [p.clone() for p in actor_critic.policy_parameters()]
    value_before = [p.clone() for p in actor_critic.value_parameters()]
    groups = [{"params": actor_critic.parameters(), "lr": 1e-2, "weight_decay": 0.1}]
    scores, advantages = known_update(known_rollout())
    statistics = update(actor_critic, build_optimizer(groups), scores, advantages, value_only=True, micro_batch_size=3)
    assert all(torch.equal(p, q) for p, q in zip(before, actor_critic.policy_parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(value_before, actor_critic.value_parameters(), strict=True))
    assert statistics.policy_grad_norm == 0 and statistics.ratio_max == 1 and statistics.value_loss > 0


def test_without_weight_on_values_the_value_model_stays(tiny_gpt2: LM) -> None:
    actor_critic = double_actor_critic(tiny_gpt2)
    recorder = GradientRecorder(actor_critic)
    statistics = update(actor_critic, recorder, *known_update(known_rollout()), value_coef=0.0)
    (found,) = recorder.steps
    count = len(actor_critic.policy_parameters())
    assert all(g is None for g in found[count:]) and any(g is not None for g in found[:count])
    assert statistics.value_loss == 0


def test_while_values_warm_up_the_loss_is_theirs_alone(tiny_gpt2: LM) -> None:
    """No bonus for entropy, and no price of KL, of which the policy's log-probs would be wanted."""
    for estimator in ("k2", "full"):
        actor_critic = double_actor_critic(tiny_gpt2)
        kl = KLConfig(placement="loss", estimator=estimator)  # type: ignore[arg-type]
        statistics = update(
            actor_critic,
            GradientRecorder(actor_critic),
            *known_update(known_rollout()),
            kl=kl,
            value_only=True,
            entropy_coef=0.1,
            value_coef=0.7,
        )
        # the policy is the old one: its part is the mean of -A, and nothing else is added
        mask_BT = known_rollout().mask_BT
        policy = -known_update(known_rollout())[1].advantages_BT[mask_BT].mean().item()
        assert statistics.kl == 0 and statistics.policy_loss == pytest.approx(policy)
        assert statistics.loss == pytest.approx(statistics.policy_loss + 0.7 * statistics.value_loss)


# ---- guards


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("advantages_BT", math.nan, "the loss is nan.*lower ppo.learning_rate"),
        ("returns_BT", math.inf, "the loss is (inf|nan).*lower ppo.learning_rate"),
        ("logprobs_BT", -60.0, r"times as probable as when it was sampled, more than ppo.max_ratio = 10000"),
    ],
)
def test_lost_numbers_stop_the_update_before_its_step(tiny_gpt2: LM, what: str, value: float, message: str) -> None:
    actor_critic = double_actor_critic(tiny_gpt2)
    scores, advantages = known_update(known_rollout())
    broken = getattr(scores if hasattr(scores, what) else advantages, what)
    broken[2, 1] = value
    recorder = GradientRecorder(actor_critic)
    with pytest.raises(TrainingDiverged, match=message):
        update(actor_critic, recorder, scores, advantages, micro_batch_size=3)
    assert not recorder.steps


def test_what_stands_at_padding_never_matters(tiny_gpt2: LM) -> None:
    actor_critic = double_actor_critic(tiny_gpt2)
    scores, advantages = known_update(known_rollout())
    assert scores.logprobs_BT.isnan().any() and advantages.advantages_BT.isnan().any()
    statistics = update(actor_critic, GradientRecorder(actor_critic), scores, advantages)
    assert all(math.isfinite(value) for value in vars(statistics).values())


def test_bfloat16_models_take_steps(tiny_gpt2: LM) -> None:
    actor_critic = double_actor_critic(tiny_gpt2).bfloat16()
    scores, advantages = known_update(known_rollout())
    optimizer = build_optimizer([{"params": actor_critic.parameters(), "lr": 1e-5, "weight_decay": 0.0}])
    before = [p.clone() for p in actor_critic.parameters()]
    for _ in range(3):
        statistics = update(actor_critic, optimizer, scores, advantages)
    assert math.isfinite(statistics.loss)
    assert any(not torch.equal(p, q) for p, q in zip(before, actor_critic.parameters(), strict=True))
