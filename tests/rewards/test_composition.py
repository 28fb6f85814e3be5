"""Composition of rewards: every kind by hand, the parts, the positions, the account of them, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tlcr import ops
from tlcr.config.schema import RewardConfig
from tlcr.errors import CheckpointError, ConfigError, DataError, ShapeError, TrainingDiverged
from tlcr.rewards import composition
from tlcr.rewards.centre import Centre, RunningLine, RunningMean, build_centre
from tlcr.rewards.composition import PARTS, compose_rewards, reward_accounting
from tlcr.types import Rewards, RewardSignal

# Three answers: 4 tokens that end, 3 tokens with a masked one inside and cut off, none at all. False: not counted.
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
ENDED = torch.tensor([True, False, False])
# p(positive) at the counted tokens, so that d = 2 p - 1 is what the comments say
P = torch.tensor([[0.9, 0.55, 0.2, 0.5, 0.7], [0.65, 0.8, 0.1, 0.4, 0.6], [0.9, 0.9, 0.9, 0.9, 0.9]])
D = torch.tensor([[0.8, 0.1, -0.6, 0.0, 0.0], [0.3, 0.0, -0.8, -0.2, 0.0], [0.0] * 5])
LAST = torch.tensor([[0, 0, 0, 1, 0], [0, 0, 0, 1, 0], [0] * 5], dtype=torch.bool)
KL = torch.tensor([[0.1, -0.2, 0.3, 0.4, math.nan], [0.5, math.nan, 0.0, 1.0, 9.0], [9.0] * 5])


def logits_of(p: Tensor, temperature: float = 1.0) -> Tensor:
    """[negative, positive] logits whose softmax at that temperature is [1 - p, p], and NaN where nothing counts."""
    logits = torch.stack([torch.zeros_like(p), p.logit()], dim=-1) * temperature
    return torch.where(MASK.unsqueeze(-1), logits, math.nan)


def compose(
    signal: RewardSignal,
    mask: Tensor = MASK,
    *,
    ended: Tensor = ENDED,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    temperature: float = 1.0,
    centre: Centre | None = None,
    max_tokens: int | None = None,
    **options: object,
) -> Rewards:
    """`compose_rewards` with its defaults; centring is on where a centre is given."""
    cfg = RewardConfig(
        centre="position" if isinstance(centre, RunningLine) else centre is not None,
        **options,  # type: ignore[arg-type]
    )
    return compose_rewards(
        signal,
        mask,
        ended_B=ended,
        kl_BT=kl,
        kl_coef=kl_coef,
        cfg=cfg,
        temperature=temperature,
        centre=centre,
        max_tokens=max_tokens,
    )


LOGITS = RewardSignal(logits_BTC=logits_of(P))
CALLABLE = {"kind": "callable", "callable": "m:f"}
SCORES = torch.tensor([2.0, -3.0, 1.0])


@pytest.mark.parametrize(
    ("kind", "worked"),
    [
        ("continuous", D),
        ("discrete", [[1, 0, -1, 0, 0], [1, 0, -1, 0, 0], [0] * 5]),  # |d| <= 0.25 pays nothing
        ("sign", [[1, 1, -1, 0, 0], [1, 0, -1, -1, 0], [0] * 5]),
        ("positive_only", [[0.8, 0.1, 0, 0, 0], [0.3, 0, 0, 0, 0], [0] * 5]),
        ("negative_only", [[0, 0, -0.6, 0, 0], [0, 0, -0.8, -0.2, 0], [0] * 5]),
        ("sum_at_end", [[0, 0, 0, 0.3, 0], [0, 0, 0, -0.7, 0], [0] * 5]),
    ],
)
def test_what_each_kind_of_a_discriminator_pays(kind: str, worked: object) -> None:
    rewards = compose(LOGITS, kind=kind, band=0.25).rewards_BT
    assert rewards.dtype == torch.float32
    torch.testing.assert_close(rewards, torch.as_tensor(worked, dtype=torch.float32), rtol=0, atol=1e-6)


def test_a_reward_one_token_late_would_be_caught() -> None:
    late = RewardSignal(logits_BTC=logits_of(P.roll(1, dims=1)))
    assert not torch.allclose(compose(late).rewards_BT, D, atol=0.05)


def test_the_sequence_score_is_paid_at_the_last_counted_token_only() -> None:
    rewards = compose(RewardSignal(terminal_B=torch.tensor([2.0, -3.0, math.nan])), kind="sequence", scale=0.5)
    worked = torch.tensor([[0, 0, 0, 1.0, 0], [0, 0, 0, -1.5, 0], [0] * 5])
    torch.testing.assert_close(rewards.rewards_BT, worked)
    assert set(rewards.parts) == {"terminal"}


def test_three_classes_pay_positive_less_negative() -> None:
    logits = torch.log(torch.tensor([[[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]]))
    rewards = compose(RewardSignal(logits_BTC=logits), torch.ones(1, 2, dtype=torch.bool), ended=torch.tensor([True]))
    torch.testing.assert_close(rewards.rewards_BT, torch.tensor([[0.3, -0.5]]))


def test_temperature_scale_and_clip_act_in_that_order() -> None:
    signal = RewardSignal(logits_BTC=logits_of(P, temperature=2.0))
    rewards = compose(signal, temperature=2.0, scale=3.0, clip=1.5).rewards_BT
    torch.testing.assert_close(rewards, (3 * D).clamp(-1.5, 1.5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["random", "q", "callable"])
def test_dense_numbers_are_scaled_and_clipped(kind: str) -> None:
    dense = torch.tensor([[1.0, -2.0, 3.0, 0.5, math.nan], [4.0, math.inf, -1.0, 1.0, 0], [math.nan] * 5])
    options = {"kind": kind, "callable": "m:f" if kind == "callable" else None, "scale": 2.0}
    rewards = compose(RewardSignal(dense_BT=dense), **options)
    worked = torch.tensor([[2.0, -4.0, 5.0, 1.0, 0], [5.0, 0, -2.0, 2.0, 0], [0] * 5])
    torch.testing.assert_close(rewards.rewards_BT, worked)


def test_a_callable_may_set_several_fields_and_they_add_up() -> None:
    signal = RewardSignal(
        logits_BTC=logits_of(P), dense_BT=torch.ones(3, 5), terminal_B=torch.tensor([10.0, 20.0, 30.0])
    )
    rewards = compose(signal, kind="callable", callable="m:f").rewards_BT
    worked = torch.where(MASK, D + 1, 0.0) + torch.tensor([[0, 0, 0, 10.0, 0], [0, 0, 0, 20.0, 0], [0] * 5])
    torch.testing.assert_close(rewards, worked)


def test_the_sequence_model_adds_its_weighted_score_to_another_kind() -> None:
    signal = replace(LOGITS, sequence_B=torch.tensor([2.0, 4.0, 8.0]))
    rewards = compose(signal, sequence_coef=0.5, scale=3.0, clip=None)
    torch.testing.assert_close(rewards.parts["terminal"], LAST * torch.tensor([[1.0], [2.0], [4.0]]))
    torch.testing.assert_close(rewards.rewards_BT, 3 * D + rewards.parts["terminal"])


def test_what_is_paid_at_the_end_has_a_bound_of_its_own() -> None:
    """The score is scaled, then bounded; token rewards have another bound, and KL none."""
    signal = RewardSignal(terminal_B=torch.tensor([4.0, -1.0, 9.0]))
    options = {"kind": "sequence", "scale": 2.0, "clip": 0.5}
    rewards = compose(signal, kl=KL, kl_coef=10.0, terminal_clip=5.0, **options)
    torch.testing.assert_close(rewards.parts["terminal"], LAST * torch.tensor([[5.0], [-2.0], [0.0]]))
    assert rewards.rewards_BT[1, 3] == -12.0
    unbounded = compose(signal, **options).parts["terminal"]
    torch.testing.assert_close(unbounded, LAST * torch.tensor([[8.0], [-2.0], [0.0]]))
    both = replace(LOGITS, sequence_B=torch.tensor([2.0, -4.0, 8.0]))
    rewards = compose(both, sequence_coef=1.0, terminal_clip=3.0)
    torch.testing.assert_close(rewards.rewards_BT, D + LAST * torch.tensor([[2.0], [-3.0], [0.0]]))


@pytest.mark.parametrize("kind", ["continuous", "sum_at_end", "positive_only"])
def test_everything_at_once_by_hand(kind: str) -> None:
    options = {"kind": kind, "scale": 2.0, "clip": 1.0, "length_penalty": 0.05, "missing_eos_penalty": 0.7}
    rewards = compose(
        replace(LOGITS, sequence_B=torch.tensor([1.0, -1.0, 1.0])), kl=KL, kl_coef=0.1, sequence_coef=0.25, **options
    )
    token = (2 * (D.clamp(min=0) if kind == "positive_only" else D)).clamp(-1, 1)
    dense = torch.zeros(3, 5) if kind == "sum_at_end" else token
    terminal = LAST * torch.tensor([[0.25], [-0.25], [0.25]])
    if kind == "sum_at_end":
        terminal = terminal + LAST * token.sum(1, keepdim=True)
    kl = torch.tensor([[-0.01, 0.02, -0.03, -0.04, 0], [-0.05, 0, 0, -0.1, 0], [0] * 5])
    length = torch.tensor([[-0.05] * 4 + [0], [-0.05, 0, -0.05, -0.75, 0], [0] * 5])
    assert set(rewards.parts) == ({"terminal", "kl", "length"} | ({"dense"} if kind != "sum_at_end" else set()))
    for name, worked in (("dense", dense), ("terminal", terminal), ("kl", kl), ("length", length)):
        part = rewards.parts.get(name, torch.zeros(3, 5))
        torch.testing.assert_close(part, worked, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(rewards.rewards_BT, dense + terminal + kl + length, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_the_composition_is_what_the_fused_op_pays_in_one_call(kind: str) -> None:
    torch.manual_seed(1)
    logits, kl, score = torch.randn(6, 7, 2), torch.randn(6, 7), torch.randn(6)
    mask = torch.rand(6, 7) < 0.7
    rewards = compose(
        RewardSignal(logits_BTC=logits, sequence_B=score),
        mask,
        ended=torch.ones(6, dtype=torch.bool),
        kl=kl,
        kl_coef=0.3,
        temperature=1.7,
        kind=kind,
        band=0.3,
        scale=1.5,
        clip=0.9,
        sequence_coef=1.0,
    )
    fused = ops.fused_reward(
        logits,
        mask,
        kl=kl,
        kl_coef=0.3,
        terminal=score,
        temperature=1.7,
        scale=1.5,
        clip=0.9,
        kind=kind,
        band=0.3 if kind == "discrete" else 0.0,
    )
    torch.testing.assert_close(rewards.rewards_BT, fused)
    torch.testing.assert_close(sum(rewards.parts.values()), rewards.rewards_BT)


@pytest.mark.parametrize("centred", [False, True])
def test_sum_at_end_pays_what_continuous_pays_in_all(centred: bool) -> None:
    torch.manual_seed(2)
    signal = RewardSignal(logits_BTC=torch.randn(3, 5, 2) * 3)
    spread, at_end = (
        compose(signal, kind=kind, scale=2.0, clip=1.0, centre=RunningMean() if centred else None).rewards_BT
        for kind in ("continuous", "sum_at_end")
    )
    torch.testing.assert_close(at_end.sum(1), spread.sum(1))
    assert (at_end[~LAST] == 0).all() and (spread[:2, 0] != 0).all()


def test_what_stands_where_nothing_counts_never_matters() -> None:
    options = {"kl_coef": 0.1, "sequence_coef": 0.5, "length_penalty": 0.1, "missing_eos_penalty": 0.2}
    results = []
    for junk in (0.0, math.nan, math.inf, -1e30):
        signal = RewardSignal(
            logits_BTC=torch.where(MASK.unsqueeze(-1), logits_of(P), junk),
            sequence_B=torch.tensor([1.0, 2.0, junk]),
        )
        rewards = compose(signal, kl=torch.where(MASK, KL, junk), **options)
        results.append(rewards.rewards_BT)
        assert all(torch.isfinite(part).all() and (part[~MASK] == 0).all() for part in rewards.parts.values())
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("pad", [1, 4])
def test_wider_padding_changes_nothing(pad: int) -> None:
    options = {"kl_coef": 0.1, "missing_eos_penalty": 0.3}
    narrow = compose(LOGITS, kl=KL, **options).rewards_BT
    wide = compose(
        RewardSignal(logits_BTC=torch.nn.functional.pad(logits_of(P), (0, 0, 0, pad), value=math.nan)),
        torch.nn.functional.pad(MASK, (0, pad)),
        kl=torch.nn.functional.pad(KL, (0, pad), value=math.nan),
        **options,
    ).rewards_BT
    assert torch.equal(wide[:, :5], narrow) and (wide[:, 5:] == 0).all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty_batches_are_legal(shape: tuple[int, int]) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    ended = torch.ones(shape[0], dtype=torch.bool)
    rewards = compose(RewardSignal(logits_BTC=torch.zeros(*shape, 2)), mask, ended=ended, missing_eos_penalty=1.0)
    assert rewards.rewards_BT.shape == shape
    assert all(value == 0 for value in reward_accounting(rewards, mask).values())


def test_float64_stays_float64() -> None:
    signal = RewardSignal(logits_BTC=logits_of(P.double()))
    rewards = compose(signal, kl=KL, kl_coef=0.1, length_penalty=0.1)
    assert {part.dtype for part in (rewards.rewards_BT, *rewards.parts.values())} == {torch.float64}


@pytest.mark.parametrize(
    ("max_tokens", "buffer", "paid"),
    [
        (4, 2, (1.0, 0.5)),  # 4 and 3 counted tokens of 4, of which 2 are free
        (4, 1, (1.0, 0.0)),
        (5, 4, (0.75, 0.5)),
        (9, 3, (0.0, 0.0)),  # neither comes near the limit
    ],
)
def test_an_answer_pays_for_coming_near_the_limit(max_tokens: int, buffer: int, paid: tuple[float, float]) -> None:
    """DAPO's eq. 13 in the tokens of an answer that count: ((limit - buffer) - n) / buffer, at the last of them; the
    second answer's third column is no token of its own. An answer without tokens pays nothing."""
    rewards = compose(LOGITS, max_tokens=max_tokens, overlong_buffer=buffer, overlong_penalty=3.0)
    wanted = torch.zeros(3, 5)
    wanted[0, 3], wanted[1, 3] = -3 * paid[0], -3 * paid[1]
    torch.testing.assert_close(rewards.parts["length"], wanted)
    torch.testing.assert_close(rewards.rewards_BT, wanted + torch.where(MASK, D, 0.0))


def test_the_penalties_at_the_end_add_up() -> None:
    options = {"length_penalty": 0.1, "missing_eos_penalty": 0.5, "overlong_buffer": 2, "max_tokens": 4}
    rewards = compose(LOGITS, **options)  # type: ignore[arg-type]
    wanted = torch.where(MASK, -0.1, 0.0)
    wanted[0, 3] -= 1.0
    wanted[1, 3] -= 0.5 + 0.5
    torch.testing.assert_close(rewards.parts["length"], wanted)


def test_the_overlong_penalty_needs_the_limit() -> None:
    with pytest.raises(ConfigError, match="pass the length limit"):
        compose(LOGITS, overlong_buffer=2)


# ---- centring


@pytest.mark.parametrize("kind", [RunningMean, RunningLine])
def test_the_centre_is_float64(kind: type[Centre]) -> None:
    """Of equal rewards it leaves nothing; a float32 mean of 0.1 is off by 1.5e-9."""
    centre = kind()
    values_BT = torch.full((1, 3), 0.1, dtype=torch.float64)
    mask_BT = torch.tensor([[True, True, False]])
    centre.update(values_BT, mask_BT)
    at_BT = centre.at(mask_BT)
    assert at_BT.dtype == torch.float64
    torch.testing.assert_close(at_BT, torch.where(mask_BT, values_BT, 0.0), atol=1e-15, rtol=0)


def test_centring_takes_the_batch_in_and_subtracts_the_mean_of_what_a_token_earns() -> None:
    centre = RunningMean(decay=0.5)
    paid = torch.where(MASK, (2 * D).clamp(-1, 1), 0.0)
    mean = paid.sum().item() / 7
    first = compose(LOGITS, centre=centre, scale=2.0, clip=1.0)
    torch.testing.assert_close(first.rewards_BT, torch.where(MASK, paid - mean, 0.0))
    # the second batch earns 0 everywhere, less a mean in which the first one counts half
    second = compose(RewardSignal(logits_BTC=torch.zeros(3, 5, 2)), centre=centre)
    assert centre.mean == pytest.approx(0.5 * paid.sum().item() / (0.5 * 7 + 7))
    torch.testing.assert_close(second.rewards_BT, torch.where(MASK, -centre.mean, 0.0))


def test_the_centre_is_subtracted_after_scale_and_clip() -> None:
    """The source gives 3 and 0.2: scaled by 2 they are 6 and 0.4, within 1 they are 1 and 0.4, less their mean 0.7 they
    are 0.3 and -0.3. Centred first (by 1.6) they would be 1 and -1. A mean of -2 from before lifts them over the clip:
    the older round counts half, so the mean is (0.5 * 2 * -2 + 1.4) / (0.5 * 2 + 2) = -0.2."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    signal = RewardSignal(dense_BT=torch.tensor([[3.0, 0.2]]))
    options = {"kind": "callable", "callable": "m:f", "scale": 2.0, "clip": 1.0, "ended": torch.tensor([True])}
    first = compose(signal, mask, centre=RunningMean(), **options)  # type: ignore[arg-type]
    torch.testing.assert_close(first.rewards_BT, torch.tensor([[0.3, -0.3]]))
    before = RunningMean(decay=0.5)
    before.update(torch.tensor([[-2.0, -2.0]]), mask)
    later = compose(signal, mask, centre=before, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(later.rewards_BT, torch.tensor([[1.2, 0.6]]))


# Three answers of 3, 0 and 4 counted tokens, the last with one before them that does not count (a message).
PLACES = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
LOGS = torch.tensor([1.0, 2, 3, 1, 2, 3, 4], dtype=torch.float64).log()


def at_places(values: Tensor) -> Tensor:
    """(3, 5) with these at the seven tokens, and NaN where nothing counts."""
    return torch.full(PLACES.shape, torch.nan, dtype=torch.float64).masked_scatter(PLACES, values.double())


def test_a_line_in_the_logarithm_of_the_place_is_found_and_taken_away() -> None:
    line = RunningLine()
    assert torch.equal(line.at(PLACES), torch.zeros(3, 5))
    line.update(at_places(0.5 - 0.3 * LOGS), PLACES)
    assert (line.intercept, line.slope) == pytest.approx((0.5, -0.3))
    torch.testing.assert_close(line.at(PLACES), at_places(0.5 - 0.3 * LOGS).nan_to_num())


def test_the_line_is_that_of_least_squares_and_earlier_rounds_weigh_less() -> None:
    values = torch.tensor([0.3, -0.7, 0.2, 0.9, -0.4, 0.1, 0.6])
    line = RunningLine(decay=0.5)
    line.update(at_places(values), PLACES)
    line.update(at_places(2 * values + 1), PLACES)
    weights = np.sqrt([0.5] * 7 + [1.0] * 7)
    rewards = torch.cat([values, 2 * values + 1]).double().numpy()
    slope, intercept = np.polyfit(torch.cat([LOGS, LOGS]).numpy(), rewards, 1, w=weights)
    assert (line.slope, line.intercept) == pytest.approx((slope, intercept))
    late = RunningLine(decay=0.5)  # one place later, and the line is another
    late.update(at_places(values.roll(1)), PLACES)
    assert abs(late.slope - line.slope) > 0.05


def test_at_a_single_place_the_line_is_the_mean() -> None:
    first = torch.zeros(3, 5, dtype=torch.bool)
    first[:, 2] = True
    line, mean = RunningLine(), RunningMean()
    for centre in (line, mean):
        centre.update(torch.tensor([0.1, 0.7, 0.1, 0.2, 0.3]).repeat(3, 1).double(), first)
    assert (line.slope, line.intercept) == (0.0, pytest.approx(mean.mean))
    torch.testing.assert_close(line.at(first), mean.at(first))


def test_centring_by_position_pays_late_tokens_as_early_ones() -> None:
    """Rewards that fall by the place alone, with their KL, leave nothing; and centred by the mean they do not."""
    signal = RewardSignal(dense_BT=at_places(1 - 0.5 * LOGS).nan_to_num().float())
    kl = at_places(0.2 + 0.1 * LOGS).nan_to_num().float()
    options = {"kind": "callable", "callable": "m:f", "ended": torch.ones(3, dtype=torch.bool), "kl": kl}
    found = compose(signal, PLACES, centre=RunningLine(), kl_coef=2.0, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(found.rewards_BT, torch.zeros(3, 5), atol=1e-6, rtol=0)
    by_mean = compose(signal, PLACES, centre=RunningMean(), kl_coef=2.0, **options)  # type: ignore[arg-type]
    assert by_mean.rewards_BT.abs().max() > 0.4


def test_a_line_over_several_processes_is_that_of_all_their_tokens() -> None:
    values = torch.tensor([0.3, -0.7, 0.2, 0.9, -0.4, 0.1, 0.6])
    alone = RunningLine()
    alone.update(at_places(values), PLACES)
    theirs: list[Tensor] = []
    other = RunningLine(reduce=lambda sums: theirs.append(sums) or sums)  # type: ignore[func-returns-value]
    other.update(at_places(values)[2:], PLACES[2:])
    mine = RunningLine(reduce=lambda sums: sums + theirs[0])
    mine.update(at_places(values)[:2], PLACES[:2])
    assert mine.sums == pytest.approx(alone.sums)
    reduced: list[Tensor] = []
    empty = RunningLine(reduce=lambda sums: reduced.append(sums) or sums)  # type: ignore[func-returns-value]
    empty.update(at_places(values), torch.zeros(3, 5, dtype=torch.bool))
    assert len(reduced) == 1 and set(empty.sums.values()) == {0.0}


def test_a_line_resumes_and_refuses_the_state_of_a_mean() -> None:
    line = RunningLine()
    line.update(at_places(0.5 - 0.3 * LOGS), PLACES)
    resumed = RunningLine()
    resumed.load_state_dict(json.loads(json.dumps(line.state_dict())))
    for each in (line, resumed):
        each.update(at_places(LOGS), PLACES)
    assert (resumed.slope, resumed.intercept) == (line.slope, line.intercept)
    with pytest.raises(CheckpointError, match="wanted a finite 'x'"):
        resumed.load_state_dict({"total": 1.0, "count": 2.0})


@pytest.mark.parametrize(("centre", "kind"), [(True, RunningMean), (False, type(None)), ("position", RunningLine)])
def test_the_config_chooses_the_centre(centre: Any, kind: type) -> None:
    assert type(build_centre(RewardConfig(centre=centre))) is kind


def test_the_formula_is_told_in_one_way() -> None:
    told = [line.strip() for line in str(composition.__doc__).splitlines() if line.strip().startswith("r_t =")]
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert len(told) == 1 and f"    {told[0]}\n" in page


def test_centring_counts_the_price_of_kl_so_that_length_earns_nothing() -> None:
    centred = compose(LOGITS, centre=RunningMean(), kl=KL, kl_coef=0.3)
    plain = compose(LOGITS, kl=KL, kl_coef=0.3)
    mean = plain.rewards_BT.sum() / MASK.sum()
    assert abs(mean) > 0.1
    torch.testing.assert_close(centred.rewards_BT, torch.where(MASK, plain.rewards_BT - mean, 0.0))


def test_a_running_mean_resumes_where_it_stopped() -> None:
    mean = RunningMean()
    mean.update(D, MASK)
    resumed = RunningMean()
    resumed.load_state_dict(mean.state_dict())
    for each in (mean, resumed):
        each.update(D + 1, MASK)
    assert resumed.mean == mean.mean != 0
    with pytest.raises(CheckpointError, match="wanted a finite 'total'"):
        resumed.load_state_dict({"total": math.nan, "count": 1.0})


def test_a_running_mean_without_decay_is_the_mean_of_all() -> None:
    mean = RunningMean(decay=1.0)
    assert mean.mean == 0
    mean.update(D, MASK)
    mean.update(D.flip(0) + 1, MASK.flip(0))
    assert mean.mean == pytest.approx((2 * D.sum().item() + 7) / 14)
    with pytest.raises(ConfigError, match="decay is 0"):
        RunningMean(decay=0)


def test_a_running_mean_is_that_of_all_processes() -> None:
    shares = [torch.tensor([1.0, 2.0]).double(), torch.tensor([9.0, 3.0]).double()]
    mean = RunningMean(reduce=lambda sums: sums + shares[1])
    mean.update(torch.tensor([[0.25, 0.75, 5.0]]), torch.tensor([[True, True, False]]))
    assert mean.mean == pytest.approx((1.0 + 9.0) / (2 + 3))


# ---- accounting


def test_the_account_by_hand() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    parts = {
        "dense": torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        "terminal": torch.tensor([[0.0, 0.0, 4.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        "kl": torch.tensor([[-0.5, 0.25, -0.25], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    }
    rewards = Rewards(sum(parts.values()), parts)
    account = reward_accounting(rewards, mask)
    worked = {
        "reward/mean_token": (0.5 + 0.25 + 1.75 - 1.0) / 4,
        "reward/mean_abs_token": (0.5 + 0.25 + 1.75 + 1.0) / 4,
        "reward/mean_score": (1.0 + 2.0) / 4,
        "reward/mean_return": (2.5 - 1.0) / 2,
        "reward/nonzero_share": 2 / 4,
        "reward/share_dense": 3 / 9,
        "reward/share_terminal": 4 / 9,
        "reward/share_kl": 2 / 9,
        "reward/share_length": 0.0,
        "reward/dominated": 0.0,
        "reward/length_correlation": 1.0,  # two answers: the longer earned more
    }
    assert {name: value.item() for name, value in account.items()} == pytest.approx(worked)
    assert all(value.ndim == 0 for value in account.values())


def test_length_correlation_is_pearsons() -> None:
    torch.manual_seed(3)
    lengths = torch.tensor([1, 4, 6, 2, 5])
    mask = torch.arange(6) < lengths[:, None]
    values = torch.where(mask, torch.randn(5, 6), math.nan)
    correlation = reward_accounting(Rewards(values, {"dense": values}), mask)["reward/length_correlation"]
    truth = torch.corrcoef(torch.stack([values.nansum(1).double(), lengths.double()]))[0, 1]
    torch.testing.assert_close(correlation, truth)
    same_length = torch.ones(5, 6, dtype=torch.bool)
    constant = reward_accounting(Rewards(torch.randn(5, 6), {}), same_length)["reward/length_correlation"]
    assert constant == 0


@pytest.mark.parametrize(
    ("parts", "alarm"),
    [
        ({"dense": 0.1, "kl": 10.0}, 1.0),
        ({"dense": 10.0, "kl": -1.0}, 0.0),
        ({"kl": 10.0}, 0.0),  # alone by choice
    ],
)
def test_a_part_that_drowns_the_others_is_flagged(parts: dict[str, float], alarm: float) -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    tensors = {name: torch.full((2, 3), value) for name, value in parts.items()}
    assert reward_accounting(Rewards(sum(tensors.values()), tensors), mask)["reward/dominated"] == alarm


def test_the_account_over_two_processes_is_that_of_the_whole_batch() -> None:
    torch.manual_seed(4)
    mask = torch.arange(6) < torch.tensor([1, 4, 6, 2, 5])[:, None]
    whole = compose(
        RewardSignal(logits_BTC=torch.randn(5, 6, 2)),
        mask,
        ended=torch.ones(5, dtype=torch.bool),
        kl=torch.randn(5, 6),
        kl_coef=0.1,
    )

    def share(rows: slice, reduce: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
        parts = {name: part[rows] for name, part in whole.parts.items()}
        return reward_accounting(Rewards(whole.rewards_BT[rows], parts), mask[rows], reduce=reduce)

    sums: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        sums.append(tensor)
        return tensor

    share(slice(0, 2), keep)
    together = share(slice(2, 5), lambda tensor: tensor + sums[0])
    alone = reward_accounting(whole, mask)
    assert set(together) == set(alone)
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value)


def test_every_part_has_a_share() -> None:
    rewards = compose(LOGITS, kl=KL, kl_coef=0.2, length_penalty=0.1, sequence_coef=0.0)
    account = reward_accounting(rewards, MASK)
    assert sum(account[f"reward/share_{name}"] for name in PARTS) == pytest.approx(1.0)


# ---- refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "index", "options", "said"),
    [
        ("logits_BTC", (1, 2, 0), {}, r"'continuous' gave 1 of 7 logits .* answer 1, token 2"),
        ("dense_BT", (1, 3), {"kind": "random"}, r"'random' gave 1 of 7 dense .* answer 1, token 3"),
        ("terminal_B", (1,), {"kind": "callable", "callable": "m:f"}, r"\(m:f\) gave 1 of 2 terminal .* answer 1 "),
    ],
)
def test_a_reward_that_is_not_finite_is_refused(
    bad: float, name: str, index: tuple[int, ...], options: dict, said: str
) -> None:
    shape = {"logits_BTC": (3, 5, 2), "dense_BT": (3, 5), "terminal_B": (3,)}[name]
    values = torch.zeros(shape)
    values[index] = bad
    with pytest.raises(DataError, match=said):
        compose(RewardSignal(**{name: values}), **options)


def test_a_kl_that_is_not_finite_stops_training() -> None:
    kl = torch.zeros(3, 5)
    kl[0, 3] = math.inf
    with pytest.raises(TrainingDiverged, match=r"not finite at 1 tokens, first at answer 0, token 3 \(inf\)"):
        compose(LOGITS, kl=kl, kl_coef=0.1)


@pytest.mark.parametrize(
    ("fields", "options", "said"),
    [
        ({"logits_BTC": torch.zeros(3, 4, 2)}, {}, r"logits has shape \(3, 4, 2\), wanted \(3, 5, 2\) or \(3, 5, 3\)"),
        ({"logits_BTC": torch.zeros(3, 5, 4)}, {}, r"logits has shape \(3, 5, 4\)"),
        ({"dense_BT": torch.zeros(3, 6)}, {"kind": "random"}, r"dense has shape \(3, 6\), wanted \(3, 5\)"),
        ({"terminal_B": torch.zeros(3, 1)}, {"kind": "sequence"}, r"terminal has shape \(3, 1\), wanted \(3,\)"),
        ({"dense_BT": torch.zeros(3, 5)}, {"kind": "random", "kl": torch.zeros(3, 4)}, r"kl has shape \(3, 4\)"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(fields: dict, options: dict, said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        compose(RewardSignal(**fields), **options)


def test_masks_are_bool() -> None:
    with pytest.raises(ShapeError, match=r"mask has shape \(3, 5\) and dtype torch.int64, wanted \(B, T\) bool"):
        compose(LOGITS, MASK.long())
    with pytest.raises(ShapeError, match=r"ended has shape \(3,\) and dtype torch.float32, wanted \(3,\) bool"):
        compose(LOGITS, ended=ENDED.float())


@pytest.mark.parametrize(
    ("signal", "options", "said"),
    [
        (RewardSignal(), {}, "gave nothing and no logits"),
        (RewardSignal(dense_BT=D), {"kind": "sign"}, "kind is 'sign', but its source gave dense and no logits"),
        (LOGITS, {"kind": "sequence"}, "gave logits and no terminal"),
        (RewardSignal(sequence_B=SCORES), CALLABLE, r"\(m:f\) gave sequence_B alone"),
        (RewardSignal(terminal_B=SCORES), CALLABLE | {"centre": True}, "for token rewards, .* gave terminal alone"),
    ],
)
def test_a_kind_whose_signal_is_missing_is_refused(signal: RewardSignal, options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(signal, **options)


def test_a_sequence_score_alone_is_paid_by_its_weight() -> None:
    rewards = compose(RewardSignal(sequence_B=SCORES), **CALLABLE, sequence_coef=0.5).rewards_BT
    torch.testing.assert_close(rewards, LAST * 0.5 * SCORES[:, None])


def test_centring_needs_a_mean_that_outlives_the_call() -> None:
    with pytest.raises(ConfigError, match="pass one of build_centre that outlives it"):
        compose_rewards(
            LOGITS,
            MASK,
            ended_B=ENDED,
            kl_BT=None,
            kl_coef=0.0,
            cfg=RewardConfig(centre=True),
            temperature=1.0,
            centre=None,
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "callable"}, "name the function"),
        ({"callable": "m:f"}, "kind is 'continuous'; set kind: callable"),
        ({"kind": "sequence", "centre": True}, "kind 'sequence' has none"),
        ({"kind": "sequence", "sequence_coef": 0.5}, "weigh it with scale"),
    ],
)
def test_options_that_do_not_apply_are_refused(options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RewardConfig(**options)
