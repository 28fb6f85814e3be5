"""Importance weights of an engine's answers: by hand, in the loss, and where an engine's figures cannot be right."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.ppo.helpers import bigram_lm, known_rollout, known_update, run_ppo, small_config, without_times
from tlcr import ops
from tlcr.config.schema import EngineName, RolloutConfig
from tlcr.engines import Answer, Sampling
from tlcr.engines.protocol import InProcess
from tlcr.errors import BackendUnavailable, ConfigError
from tlcr.models.actor_critic import ActorCritic
from tlcr.ppo import correction, rollout
from tlcr.ppo.correction import Correction, importance_weights
from tlcr.ppo.scores import score_rollout
from tlcr.training.metrics import read_metrics
from tlcr.types import Advantages, PolicyScores, Rollout

LM = Callable[..., PreTrainedModel]
Tokenizer = PreTrainedTokenizerFast

WEIGHTS = [1.0, 3.0, 0.25, 0.6]
MASK = torch.tensor([[True, True, True], [True, False, False]])
ADVANTAGES = [2.0, -1.0, 4.0, 5.0]
SHORT = RolloutConfig(max_new_tokens=4)


def at_tokens(*values: float) -> Tensor:
    """(2, 3) with these at the four tokens, and NaN where nothing counts."""
    figures = torch.full(MASK.shape, torch.nan, dtype=torch.float64)
    figures[MASK] = torch.tensor(values, dtype=torch.float64)
    return figures


def example() -> tuple[Rollout, PolicyScores, Advantages]:
    """Four tokens whose log-probabilities differ by the logarithms of WEIGHTS."""
    old_BT = at_tokens(-1.0, -2.0, -3.0, -4.0)
    ids = torch.zeros(MASK.shape, dtype=torch.long)
    rows = Rollout(
        ("a", "b"),
        ("x", "y"),
        ids[:, :1],
        MASK[:, :1],
        ids,
        MASK,
        torch.ones(2, dtype=torch.bool),
        engine_logprobs_BT=old_BT - at_tokens(*WEIGHTS).log(),
    )
    scores = PolicyScores(old_BT, old_BT, old_BT, old_BT)
    return rows, scores, Advantages(at_tokens(*ADVANTAGES), at_tokens(9.0, 8.0, 7.0, 6.0))


# ---- by hand


@pytest.mark.parametrize(
    ("kind", "applied", "cut"),
    [
        ("truncate", [1.0, 2.0, 0.25, 0.6], 1 / 4),
        ("mask", [1.0, 0.0, 0.0, 0.6], 2 / 4),
        ("none", [1.0, 1.0, 1.0, 1.0], 0.0),
    ],
)
def test_weights_and_figures_by_hand(kind: Any, applied: list[float], cut: float) -> None:
    rows, scores, given = example()
    found, figures = Correction(RolloutConfig(correction=kind))(rows, scores, given)
    wanted = [w * a for w, a in zip(applied, ADVANTAGES, strict=True)]
    assert found.advantages_BT[MASK].tolist() == pytest.approx(wanted)
    assert found.returns_BT is given.returns_BT
    assert figures == pytest.approx(
        {
            "mismatch/log_weight": math.log(1.0 * 3.0 * 0.25 * 0.6) / 4,
            "mismatch/kl": sum(w - 1 - math.log(w) for w in WEIGHTS) / 4,
            "mismatch/weight_max": 3.0,
            "mismatch/cut_share": cut,
            "mismatch/effective_share": sum(WEIGHTS) ** 2 / sum(w * w for w in WEIGHTS) / 4,
        }
    )


def test_the_bounds_are_those_of_the_config() -> None:
    log_ratios = torch.tensor(WEIGHTS, dtype=torch.float64).log()
    cfg = RolloutConfig(correction="mask", correction_min=0.2, correction_max=3.5)
    assert importance_weights(log_ratios, cfg).tolist() == pytest.approx(WEIGHTS)
    cfg = RolloutConfig(correction="truncate", correction_max=1.0)
    assert importance_weights(log_ratios, cfg).tolist() == pytest.approx([1.0, 1.0, 0.25, 0.6])


def test_weights_that_overflow_are_cut_and_leave_one_effective_token() -> None:
    rows, scores, given = example()
    assert rows.engine_logprobs_BT is not None
    rows.engine_logprobs_BT[0, 0] = -1000.0
    for kind, wanted in (("truncate", 2.0), ("mask", 0.0)):
        found, figures = Correction(RolloutConfig(correction=kind))(rows, scores, given)  # type: ignore[arg-type]
        assert found.advantages_BT[0, 0] == wanted * ADVANTAGES[0]
        assert figures["mismatch/effective_share"] == pytest.approx(1 / 4)


def test_figures_are_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process with the same answers changes none; one with a larger weight is heard of."""
    alone = Correction(RolloutConfig())(*example())[1]
    monkeypatch.setattr(correction, "sum_over_processes", lambda values: 2 * values)
    assert Correction(RolloutConfig())(*example())[1] == pytest.approx(alone)
    monkeypatch.setattr(correction, "largest_of_processes", lambda values: values + math.log(2))
    other = Correction(RolloutConfig())(*example())[1]
    assert other == pytest.approx(alone | {"mismatch/weight_max": 6.0})


# ---- in the loss


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_weighing_the_advantages_weighs_the_clipped_loss_and_its_gradient(kind: Any, dual_clip: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(9) < torch.tensor([9, 3, 7, 1, 5, 8])[:, None]

    def normal() -> Tensor:
        return torch.randn(mask.shape, generator=generator, dtype=torch.float64)

    old, advantages = normal() - 3, normal()
    new = (old + 0.3 * normal()).requires_grad_()
    weights = importance_weights(0.8 * normal(), RolloutConfig(correction=kind))
    loss = ops.ppo_loss(new, old, advantages * weights, mask, dual_clip=dual_clip).loss
    (gradient,) = torch.autograd.grad(loss, new)

    ratios = (new - old).exp()
    tokens = torch.maximum(-advantages * ratios, -advantages * ratios.clamp(0.8, 1.2))
    if dual_clip is not None:
        tokens = torch.where(advantages < 0, torch.minimum(tokens, -dual_clip * advantages), tokens)
    direct = (weights * tokens)[mask].mean()
    (wanted,) = torch.autograd.grad(direct, new)
    torch.testing.assert_close(loss, direct, rtol=0, atol=1e-15)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-15)
    if kind == "mask":
        dropped = mask & (weights == 0)
        assert dropped.any() and (gradient[dropped] == 0).all() and (gradient[mask & ~dropped] != 0).any()


# ---- what engines report


class Says(InProcess):
    """An engine that answers every prompt with two tokens, and reports what it is told to."""

    def __init__(self, logprobs: Sequence[float] | None) -> None:
        self._logprobs = None if logprobs is None else torch.tensor(logprobs)

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: Any = None) -> list[Answer]:
        assert sampling.logprobs
        return [Answer(torch.tensor([5, 6]), self._logprobs) for _ in prompts]


@pytest.mark.parametrize(
    ("logprobs", "says"),
    [
        ([-1.0, math.nan], "that no drawn token can have for 2 of 4 tokens, such as nan"),
        ([-math.inf, -1.0], "for 2 of 4 tokens, such as -inf"),
        ([-1.0, 0.5], "for 2 of 4 tokens, such as 0.5"),
        ([-1.0], "gave 1 log-probabilities for an answer of 2 tokens"),
        (None, "gave no log-probabilities for an answer of 2 tokens"),
    ],
)
def test_log_probs_that_cannot_be_are_one_sentence(
    logprobs: Any, says: str, tiny_causal_lm: LM, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "build_engine", lambda *_: Says(logprobs))
    with pytest.raises(BackendUnavailable) as caught:
        rollout.generate(tiny_causal_lm(), tiny_tokenizer, ["a", "b"], SHORT, max_prompt_tokens=8, logprobs=True)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_log_probs_after_the_end_of_an_answer_do_not_count(
    tiny_causal_lm: LM, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines may go on after the end of sequence."""
    end = tiny_tokenizer.eos_token_id

    class GoesOn(InProcess):
        def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: Any = None) -> list[Answer]:
            longer = Answer(torch.tensor([5, 6, 7]), torch.tensor([-1.0, -2.0, -3.0]))
            return [longer, Answer(torch.tensor([5, end, 0, 0]), torch.tensor([-4.0, -5.0, math.nan, -math.inf]))]

    monkeypatch.setattr(rollout, "build_engine", lambda *_: GoesOn())
    found = rollout.generate(tiny_causal_lm(), tiny_tokenizer, ["a", "b"], SHORT, max_prompt_tokens=8, logprobs=True)
    assert found.engine_logprobs_BT is not None
    assert found.engine_logprobs_BT.tolist() == [[-1.0, -2.0, -3.0], [-4.0, -5.0, 0.0]]


def test_log_probs_of_the_next_token_are_noticed_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", logger="tlcr")
    rows = known_rollout()
    scores, advantages = known_update(rows)
    spread_BT = torch.where(rows.mask_BT, 10 * scores.logprobs_BT + 56, torch.nan)  # from -7 to -1 nats
    scores = dataclasses.replace(scores, logprobs_BT=spread_BT)
    noise_BT = 1e-3 * torch.sin(torch.arange(spread_BT.numel(), dtype=torch.float64)).view(spread_BT.shape)
    right = dataclasses.replace(rows, engine_logprobs_BT=spread_BT + noise_BT)
    shifted = dataclasses.replace(rows, engine_logprobs_BT=spread_BT.nan_to_num(-4.0).roll(-1, dims=1))

    correct = Correction(RolloutConfig(engine="paged"))
    figures = correct(right, scores, advantages)[1]
    assert figures["mismatch/effective_share"] > 0.999 and figures["mismatch/cut_share"] == 0 and not caplog.records
    for _ in range(2):
        figures = correct(shifted, scores, advantages)[1]
    assert figures["mismatch/effective_share"] < 0.5 and figures["mismatch/cut_share"] > 0.2
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "'paged' do not fit the policy" in record.getMessage() and "below 50%" in record.getMessage()


# ---- truncated distributions


@pytest.mark.parametrize("engine", [name for name in get_args(EngineName) if name not in ("vllm", "server", "auto")])
@pytest.mark.parametrize("truncation", [{"top_k": 2}, {"top_p": 0.75}])
def test_a_truncated_distribution_is_corrected_by_the_probability_that_it_kept(
    engine: EngineName, truncation: dict[str, Any], tiny_tokenizer: Tokenizer
) -> None:
    """Of 0.5, 0.3, 0.15 and 0.05 both settings keep 0.5 and 0.3: they are drawn with 0.625 and 0.375, and each weight
    is 0.8. The weighted share of a token that was kept is then its own probability."""
    logits_V = torch.full((len(tiny_tokenizer),), -50.0)
    logits_V[10:14] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    policy = bigram_lm(logits_V.expand(len(tiny_tokenizer), -1), layers=1)
    cfg = RolloutConfig(max_new_tokens=6, batch_size=4, engine=engine, **truncation)
    assert cfg.off_policy
    found = rollout.generate(
        policy,
        tiny_tokenizer,
        ["a"] * 4,
        cfg,
        max_prompt_tokens=8,
        generator=torch.Generator().manual_seed(1),
        logprobs=cfg.off_policy,
    )
    assert found.engine_logprobs_BT is not None and set(found.response_ids_BT.flatten().tolist()) == {10, 11}
    drawn_with = torch.where(found.response_ids_BT == 10, 0.625, 0.375)
    torch.testing.assert_close(found.engine_logprobs_BT.exp(), drawn_with, rtol=0, atol=1e-5)
    scores = score_rollout(
        ActorCritic(policy, None), policy, found, temperature=1.0, micro_batch_size=None, exact_kl=False
    )
    ones_BT = torch.ones(found.mask_BT.shape)
    weighted, figures = Correction(cfg)(found, scores, Advantages(ones_BT, ones_BT))
    torch.testing.assert_close(weighted.advantages_BT, 0.8 * ones_BT, rtol=0, atol=1e-5)
    torch.testing.assert_close(0.625 * weighted.advantages_BT[0, 0], torch.tensor(0.5), rtol=0, atol=1e-5)
    assert figures["mismatch/log_weight"] == pytest.approx(math.log(0.8), abs=1e-5)
    assert figures["mismatch/cut_share"] == 0 and figures["mismatch/effective_share"] == pytest.approx(1.0)


@pytest.mark.parametrize("truncation", [{"top_k": 5}, {"top_p": 0.9}])
def test_a_truncated_distribution_without_a_correction_is_refused(truncation: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'none' with top_p .*; set correction: truncate, or top_p: 1 and top_k: 0"):
        RolloutConfig(correction="none", **truncation)


# ---- in a run


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [without_times(row) for row in read_metrics(folder / "metrics.jsonl")]


def test_answers_of_the_policy_itself_are_left_as_they_are(
    tiny_causal_lm: LM, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    cfg = small_config(updates=2)
    masked = dataclasses.replace(cfg, rollout=dataclasses.replace(cfg.rollout, correction="mask"))
    run_ppo(cfg, tiny_causal_lm, tiny_tokenizer, tmp_path / "default")
    run_ppo(masked, tiny_causal_lm, tiny_tokenizer, tmp_path / "masked")
    rows = rows_of(tmp_path / "default")
    assert rows == rows_of(tmp_path / "masked") and not any(key.startswith("mismatch/") for key in rows[0])
    given = example()
    without = dataclasses.replace(given[0], engine_logprobs_BT=None)
    found, figures = Correction(RolloutConfig())(without, *given[1:])
    assert found is given[2] and figures == {}


def test_packed_and_padded_rows_are_corrected_alike(
    tiny_causal_lm: LM, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Among 40 of some hundred words the weights are far from 1."""
    trained = {}
    for packing in ("never", "always"):
        cfg = small_config(updates=2, packing=packing)
        cfg = dataclasses.replace(cfg, rollout=dataclasses.replace(cfg.rollout, top_k=40))
        trained[packing], _ = run_ppo(cfg, tiny_causal_lm, tiny_tokenizer, tmp_path / packing)
    padded, packed = (rows_of(tmp_path / packing) for packing in ("never", "always"))
    assert padded[0]["mismatch/log_weight"] < -0.1
    for before, after in zip(padded, packed, strict=True):
        assert after == pytest.approx(before, rel=1e-3, abs=1e-5)
    for a, b in zip(trained["never"].parameters(), trained["always"].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
