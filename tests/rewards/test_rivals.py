"""Rivals' rewards: each against its formula by hand, against a real model read row by row, and one token off."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import tlcr
from tests.rewards.rollouts import (
    PADDINGS,
    Rigged,
    Row,
    character_tokenizer,
    frozen_model,
    ids_of,
    random_rows,
    rollout_of,
)
from tlcr.config.schema import Arm, DataConfig, DPOConfig, KLConfig, ModelConfig, RewardConfig, RunConfig
from tlcr.config.trials import trials_of
from tlcr.errors import ConfigError
from tlcr.models.heads import classification_head
from tlcr.models.loading import load_sequence_classifier
from tlcr.models.reward_model import prefix_scores, scores_and_attention, sequence_scores
from tlcr.rewards.composition import compose_rewards
from tlcr.rewards.sources import (
    AttentionSource,
    DiscriminatorSource,
    LoadedModel,
    LogRatioSource,
    PrefixDifferenceSource,
    QSource,
    SpanSource,
    UniformSource,
    build_reward_source,
)
from tlcr.types import Rewards, RewardSignal, Rollout

Sources = (UniformSource, AttentionSource, PrefixDifferenceSource)


@pytest.fixture(params=["tiny_causal_lm", "tiny_gpt2"])
def scorer(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A reward model with a head that is not zero."""
    model = load_sequence_classifier(request.getfixturevalue(request.param)(), ModelConfig())
    torch.nn.init.normal_(classification_head(model).weight)
    return model


@torch.no_grad()
def score(model: PreTrainedModel, ids: Sequence[int]) -> float:
    """The score of one text by itself."""
    hidden = model.base_model(torch.tensor([list(ids)])).last_hidden_state
    return float(classification_head(model)(hidden[0, -1]))


@torch.no_grad()
def attention(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """What the last position of one text looks at, by transformers' own output."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    weights = model.base_model(torch.tensor([list(ids)]), output_attentions=True).attentions[-1]
    model.set_attn_implementation(own)
    return weights[0].mean(dim=0)[-1]


def rows_of(tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    return [*random_rows(tokenizer), Row("The", [60, 70, tokenizer.eos_token_id], True)]


def dense(signal: RewardSignal, rollout: Rollout) -> list[Tensor]:
    """The counted rewards, row by row; those that do not count must be 0."""
    assert signal.dense_BT is not None and signal.logits_BTC is None and signal.terminal_B is None
    assert (signal.dense_BT[~rollout.mask_BT] == 0).all()
    return [row[mask] for row, mask in zip(signal.dense_BT, rollout.mask_BT, strict=True)]


def assert_rewards(got: Sequence[Tensor], truth: Sequence[Sequence[float] | Tensor]) -> None:
    """Equal to the truth, and the truth is such that one token earlier or later would not be."""
    for row, wanted in zip(got, truth, strict=True):
        wanted_T = torch.as_tensor(wanted, dtype=torch.float32)
        torch.testing.assert_close(row, wanted_T, rtol=1e-3, atol=1e-5)
        for shifted in (pad(wanted_T[:-1], (1, 0)), pad(wanted_T[1:], (0, 1))):
            assert len(row) == 1 or not torch.allclose(row, shifted, rtol=1e-2, atol=1e-4)


# ---- by hand, with a model whose every answer is known


def test_each_way_of_sharing_a_score_by_hand(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of one token, an answer of three and one of two; R = 2 and -3."""
    rows = [Row("I", [50, 60, 70], False), Row("I", [80, tiny_tokenizer.eos_token_id], True)]
    assert len(ids_of(tiny_tokenizer, "I")) == 1
    rollout = rollout_of(rows, tiny_tokenizer, left=2, right=1)
    scores_B = torch.tensor([2.0, -3.0])
    prefixes_BL = torch.tensor([[0.5, 1.5, 1.0, 2.0], [0.5, 4.0, -3.0, 0.0]])
    attention_BL = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.2, 0.2, 0.6, 0.0]])
    module = "tlcr.rewards.sources.sequence"
    monkeypatch.setattr(f"{module}.require_decoder", lambda *_: None)  # nothing asks the model
    monkeypatch.setattr(f"{module}.sequence_scores", lambda *_, **__: scores_B)
    monkeypatch.setattr(f"{module}.prefix_scores", lambda *_, **__: prefixes_BL)
    monkeypatch.setattr(f"{module}.scores_and_attention", lambda *_, **__: (scores_B, attention_BL))
    worked: dict[Any, list[list[float]]] = {
        UniformSource: [[2 / 3] * 3, [-1.5] * 2],
        AttentionSource: [[2 * 0.2, 2 * 0.6, 2 * 0.2], [-3 * 0.25, -3 * 0.75]],
        PrefixDifferenceSource: [[1.0, -0.5, 1.0], [3.5, -7.0]],
    }
    for kind, truth in worked.items():
        signal = kind(frozen_model(Rigged({}), tiny_tokenizer, tiny_tokenizer))(rollout)
        for row, wanted in zip(dense(signal, rollout), truth, strict=True):
            assert row.tolist() == pytest.approx(wanted)
        assert signal.sequence_B is not None and signal.sequence_B.tolist() == [2.0, -3.0]


@pytest.mark.parametrize(("left", "right"), PADDINGS)
def test_uniform_shares_are_the_score_over_the_length(
    tiny_tokenizer: PreTrainedTokenizerFast, scorer: PreTrainedModel, left: int, right: int
) -> None:
    rows = rows_of(tiny_tokenizer)
    rollout = rollout_of(rows, tiny_tokenizer, left=left, right=right, filler=tiny_tokenizer.eos_token_id)
    signal = UniformSource(frozen_model(scorer, tiny_tokenizer, tiny_tokenizer, micro_batch_size=4))(rollout)
    for row, got in zip(rows, dense(signal, rollout), strict=True):
        whole = score(scorer, ids_of(tiny_tokenizer, row.prompt) + row.ids)
        assert got.tolist() == pytest.approx([whole / len(row.ids)] * len(row.ids), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("left", "right"), PADDINGS)
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_attention_credit_is_what_the_scored_position_looks_at(
    tiny_tokenizer: PreTrainedTokenizerFast,
    scorer: PreTrainedModel,
    left: int,
    right: int,
    micro_batch_size: int | None,
) -> None:
    rows = rows_of(tiny_tokenizer)
    rollout = rollout_of(rows, tiny_tokenizer, left=left, right=right, filler=17)
    of = frozen_model(scorer, tiny_tokenizer, tiny_tokenizer, micro_batch_size=micro_batch_size)
    own = scorer.config._attn_implementation
    signal = AttentionSource(of)(rollout)
    assert scorer.config._attn_implementation == own != "eager" and not any(m._forward_hooks for m in scorer.modules())
    truth = []
    for row in rows:
        ids = ids_of(tiny_tokenizer, row.prompt) + row.ids
        on_answer = attention(scorer, ids)[-len(row.ids) :]
        truth.append(score(scorer, ids) * on_answer / on_answer.sum())
    assert_rewards(dense(signal, rollout), truth)
    totals = [score(scorer, ids_of(tiny_tokenizer, row.prompt) + row.ids) for row in rows]
    assert signal.dense_BT is not None and signal.dense_BT.sum(1).tolist() == pytest.approx(totals, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("left", "right"), PADDINGS)
def test_prefix_differences_are_what_each_token_added(
    tiny_tokenizer: PreTrainedTokenizerFast, scorer: PreTrainedModel, left: int, right: int
) -> None:
    rows = rows_of(tiny_tokenizer)
    rollout = rollout_of(rows, tiny_tokenizer, left=left, right=right, filler=17)
    signal = PrefixDifferenceSource(frozen_model(scorer, tiny_tokenizer, tiny_tokenizer, micro_batch_size=4))(rollout)
    truth, telescoped = [], []
    for row in rows:
        prompt = ids_of(tiny_tokenizer, row.prompt)
        scores = [score(scorer, prompt + row.ids[:n]) for n in range(len(row.ids) + 1)]
        truth.append([after - before for before, after in itertools.pairwise(scores)])
        telescoped.append(scores[-1] - scores[0])
    assert_rewards(dense(signal, rollout), truth)
    assert signal.dense_BT is not None
    assert signal.dense_BT.sum(1).tolist() == pytest.approx(telescoped, rel=1e-3, abs=1e-4)


def test_a_masked_token_earns_nothing_and_is_not_there_for_the_model(
    tiny_tokenizer: PreTrainedTokenizerFast, scorer: PreTrainedModel
) -> None:
    whole = rollout_of([Row("The food", [50, 60, 70, 80], False)], tiny_tokenizer)
    holed = rollout_of([Row("The food", [50, 99, 60, 99, 70, 80], False, masked=(1, 3))], tiny_tokenizer, left=2)
    for kind in Sources:
        source = kind(frozen_model(scorer, tiny_tokenizer, tiny_tokenizer))
        torch.testing.assert_close(dense(source(holed), holed), dense(source(whole), whole), rtol=1e-4, atol=1e-5)


def test_an_answer_without_tokens_earns_nothing(
    tiny_tokenizer: PreTrainedTokenizerFast, scorer: PreTrainedModel
) -> None:
    rollout = rollout_of([Row("I", [50], False, masked=(0,)), Row("I", [60], False)], tiny_tokenizer)
    for kind in Sources:
        rewards = kind(frozen_model(scorer, tiny_tokenizer, tiny_tokenizer))(rollout).dense_BT
        assert rewards is not None and rewards[0].tolist() == [0.0] and rewards[1, 0] != 0


@pytest.mark.parametrize("kind", Sources)
def test_through_another_tokenizer_no_credit_is_lost(
    kind: Any, tiny_tokenizer: PreTrainedTokenizerFast, scorer: PreTrainedModel
) -> None:
    """A character policy, read by words: each word's credit is shared by the characters that spell it."""
    characters = character_tokenizer()
    prompt, text = "The food was", " not good at"
    rows = [
        Row(prompt, [*ids_of(characters, text), characters.eos_token_id], True),
        Row(prompt, ids_of(characters, text), False),
    ]
    rollout = rollout_of(rows, characters, left=1)
    own = rollout_of(
        [
            Row(prompt, [*ids_of(tiny_tokenizer, text), tiny_tokenizer.eos_token_id], True),
            Row(prompt, ids_of(tiny_tokenizer, text), False),
        ],
        tiny_tokenizer,
    )
    signal = kind(frozen_model(scorer, tiny_tokenizer, characters))(rollout)
    of_words = dense(kind(frozen_model(scorer, tiny_tokenizer, tiny_tokenizer))(own), own)
    widths = [len(tiny_tokenizer.decode([id])) for id in ids_of(tiny_tokenizer, text)]
    assert len(set(widths)) > 1
    if kind is UniformSource:
        truth = [row.sum() / n * torch.ones(n) for row, n in zip(of_words, (len(text) + 1, len(text)), strict=True)]
    else:
        spelt = [*(1 / torch.tensor(widths)).repeat_interleave(torch.tensor(widths)), torch.tensor(1.0)]
        truth = [
            torch.repeat_interleave(row, torch.tensor([*widths, 1][: len(row)])) * torch.stack(spelt)[:n]
            for row, n in zip(of_words, (len(text) + 1, len(text)), strict=True)
        ]
    for got, wanted, words in zip(dense(signal, rollout), truth, of_words, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
        assert float(got.sum()) == pytest.approx(float(words.sum()), rel=1e-4, abs=1e-5)


def test_prefix_scores_are_those_of_cut_rows_whatever_the_padding(scorer: PreTrainedModel) -> None:
    ids_BL = torch.tensor([[0, 0, 5, 9, 17, 2], [7, 8, 30, 31, 0, 0]])
    mask_BL = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    scores_BL = prefix_scores(scorer, ids_BL, mask_BL, micro_batch_size=1)
    for row in range(2):
        columns = mask_BL[row].nonzero()[:, 0].tolist()
        for n, column in enumerate(columns, start=1):
            assert scores_BL[row, column].item() == pytest.approx(
                score(scorer, ids_BL[row, columns[:n]].tolist()), rel=1e-3, abs=1e-5
            )
    assert (scores_BL[~mask_BL] == 0).all()
    last_B = sequence_scores(scorer, ids_BL, mask_BL)
    torch.testing.assert_close(last_B, torch.stack([scores_BL[0, 5], scores_BL[1, 3]]), rtol=1e-4, atol=1e-5)


def test_attention_sums_to_one_and_never_falls_on_padding(scorer: PreTrainedModel) -> None:
    ids_BL = torch.tensor([[0, 0, 5, 9, 17, 2], [7, 8, 30, 31, 0, 0]])
    mask_BL = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    _, attention_BL = scores_and_attention(scorer, ids_BL, mask_BL)
    torch.testing.assert_close(attention_BL.sum(1), torch.ones(2), rtol=1e-4, atol=1e-5)
    assert (attention_BL[~mask_BL] == 0).all() and (attention_BL[mask_BL] > 0).all()


def test_an_architecture_whose_attention_cannot_be_read_is_refused(scorer: PreTrainedModel) -> None:
    ids, mask = torch.tensor([[5, 9]]), torch.ones(1, 2, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tlcr.models.reward_model.ATTENTION_MODULES", ("nowhere",))
        with pytest.raises(ConfigError, match=r"has no module named nowhere.*another reward\.kind"):
            scores_and_attention(scorer, ids, mask)
        patch.setattr("tlcr.models.reward_model.ATTENTION_MODULES", ("mlp",))
        with pytest.raises(ConfigError, match="does not return its attention weights"):
            scores_and_attention(scorer, ids, mask)
    assert scorer.config._attn_implementation != "eager"


# ---- values


@pytest.mark.parametrize(("left", "right"), PADDINGS)
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_the_value_of_each_action_is_read_at_its_token(
    tiny_tokenizer: PreTrainedTokenizerFast,
    scorer: PreTrainedModel,
    left: int,
    right: int,
    micro_batch_size: int | None,
) -> None:
    rows = rows_of(tiny_tokenizer)
    rollout = rollout_of(rows, tiny_tokenizer, left=left, right=right, filler=tiny_tokenizer.eos_token_id)
    of = frozen_model(scorer, tiny_tokenizer, tiny_tokenizer, micro_batch_size=micro_batch_size)
    truth = []
    for row in rows:
        prompt = ids_of(tiny_tokenizer, row.prompt)
        truth.append([0.2 * score(scorer, prompt + row.ids[:n]) for n in range(1, len(row.ids) + 1)])
    assert_rewards(dense(QSource(of, beta=0.2)(rollout), rollout), truth)


def test_a_value_through_another_tokenizer_is_shared_by_characters(
    tiny_tokenizer: PreTrainedTokenizerFast, scorer: PreTrainedModel
) -> None:
    characters = character_tokenizer()
    prompt, text = "The food was", " not good at"
    rollout = rollout_of([Row(prompt, [*ids_of(characters, text), characters.eos_token_id], True)], characters)
    (got,) = dense(QSource(frozen_model(scorer, tiny_tokenizer, characters), beta=1.0)(rollout), rollout)
    words = [*ids_of(tiny_tokenizer, text), tiny_tokenizer.eos_token_id]
    before = ids_of(tiny_tokenizer, prompt)
    values = [score(scorer, before + words[: n + 1]) for n in range(len(words))]
    widths = [len(tiny_tokenizer.decode([id])) for id in words[:-1]] + [1]
    shared = [value / width for value, width in zip(values, widths, strict=True) for _ in range(width)]
    assert got.tolist() == pytest.approx(shared, rel=1e-3, abs=1e-5)


def test_an_arm_may_take_values_for_returns() -> None:
    """With gamma 0 the return of an action is its own reward: the advantage is beta Z(s, a) - V(s), as in Q-RM."""
    arm = Arm("q", reward=RewardConfig(kind="q"), gamma=0.0)
    cfg = replace(RunConfig(), arms=(arm, Arm("continuous")))
    of_q, other = (trial.config(cfg).ppo.gamma for trial in trials_of(cfg))
    assert (of_q, other) == (0.0, 1.0)
    rewards_BT, values_BT = torch.tensor([[0.4, -0.2, 0.7]]), torch.tensor([[0.1, 0.3, -0.1]])
    advantages, returns = tlcr.fused_gae(
        rewards_BT, values_BT, torch.ones(1, 3, dtype=torch.bool), gamma=of_q, lam=0.95, whiten=False
    )
    torch.testing.assert_close(advantages, rewards_BT - values_BT)
    torch.testing.assert_close(returns, rewards_BT)


# ---- log-ratios


@pytest.mark.parametrize(("left", "right"), PADDINGS)
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_the_log_ratio_of_each_token_is_read_before_it(
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_causal_lm: Callable[..., PreTrainedModel],
    left: int,
    right: int,
    micro_batch_size: int | None,
) -> None:
    rows = rows_of(tiny_tokenizer)
    dpo, reference = tiny_causal_lm(seed=1), tiny_causal_lm(seed=2)
    for parameter in dpo.parameters():
        parameter.data *= 3  # far from uniform, so that tokens differ
    rollout = rollout_of(rows, tiny_tokenizer, left=left, right=right, filler=17)
    of = frozen_model(dpo, tiny_tokenizer, tiny_tokenizer, micro_batch_size=micro_batch_size)
    signal = LogRatioSource(of, reference, beta=0.5)(rollout)
    truth = []
    for row in rows:
        ids = torch.tensor(ids_of(tiny_tokenizer, row.prompt) + row.ids)
        with torch.no_grad():
            ours, theirs = (model(ids[None]).logits[0].log_softmax(-1) for model in (dpo, reference))
        at = torch.arange(len(ids) - len(row.ids), len(ids))
        truth.append(0.5 * (ours[at - 1, ids[at]] - theirs[at - 1, ids[at]]))
    assert_rewards(dense(signal, rollout), truth)


def test_a_policy_of_other_tokens_has_no_log_ratio(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    of = frozen_model(Rigged({}), character_tokenizer(), tiny_tokenizer)
    with pytest.raises(ConfigError, match=r"the model in dpo\.path has another tokenizer"):
        LogRatioSource(of, Rigged({}), beta=0.1)  # type: ignore[arg-type]


# ---- spans


def composed(signal: RewardSignal, rollout: Rollout, **options: Any) -> Rewards:
    return compose_rewards(
        signal,
        rollout.mask_BT,
        ended_B=rollout.ended_B,
        kl_BT=None,
        kl_coef=0.0,
        cfg=RewardConfig(**options),
        temperature=1.0,
        centre=None,
    )


def spans(text: str, span_end: str, tokenizer: PreTrainedTokenizerFast, *, ended: bool = True) -> list[int]:
    ids = [*ids_of(tokenizer, text), *([tokenizer.eos_token_id] if ended else [])]
    rollout = rollout_of([Row("The", ids, ended)], tokenizer, left=1, right=2)
    rigged = DiscriminatorSource(frozen_model(Rigged({}), tokenizer, tokenizer))
    found = SpanSource(rigged, tokenizer, span_end)(rollout).spans_BT
    assert found is not None
    return found[0, : len(ids)].tolist()


def test_a_span_ends_with_a_match_and_the_end_of_sequence_stands_alone() -> None:
    characters = character_tokenizer()
    text = "a, bc. d"
    assert spans(text, "[.,]", characters) == [0, 0, 1, 1, 1, 1, 2, 2, 8]
    assert spans(text, "[.,]", characters, ended=False) == [0, 0, 1, 1, 1, 1, 2, 2]
    assert spans(text, "[.]", characters) == [0, 0, 0, 0, 0, 0, 1, 1, 8]
    assert spans(text, r"(?=\s)", characters) == [0, 0, 1, 1, 1, 1, 2, 2, 8]  # words, each with the space before it
    assert spans(text, "nowhere", characters, ended=False) == [0] * 8
    assert spans("a.", "[.]", characters) == [0, 0, 2]
    assert spans("", "[.]", characters) == [0]


def test_a_token_belongs_to_the_span_that_it_starts_in(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = " was wonderful, the"
    widths = [len(tiny_tokenizer.decode([id])) for id in ids_of(tiny_tokenizer, text)]
    starts = [sum(widths[:i]) for i in range(len(widths))]
    assert max(widths) > 2
    assert spans(text, "wo", tiny_tokenizer, ended=False) == [int(start >= text.index("wo") + 2) for start in starts]


def test_every_token_of_a_span_earns_the_mean_over_it() -> None:
    """d of "a" is 0.6, of "b" -0.2, of anything else 0; the mean over a span, then scale and clip."""
    characters = character_tokenizer()
    a, b = ids_of(characters, "ab")
    logit = {a: torch.tensor(0.8).logit().item(), b: torch.tensor(0.4).logit().item()}
    ids = [*ids_of(characters, "ab.ba,aa"), characters.eos_token_id]
    rollout = rollout_of([Row("a", ids, True, masked=(4,)), Row("b", [a], False)], characters, left=1, right=1)
    source = SpanSource(DiscriminatorSource(frozen_model(Rigged(logit), characters, characters)), characters, "[.,]")
    first, second = (0.6 - 0.2 + 0) / 3, (-0.2 + 0) / 2  # the masked "a" counts for nothing
    rewards = composed(source(rollout), rollout, kind="spans").rewards_BT
    worked = [[first] * 3 + [second, 0, second] + [0.6, 0.6, 0, 0], [0.6] + [0] * 9]
    assert_close_lists(rewards.tolist(), worked)
    scaled = composed(source(rollout), rollout, kind="spans", scale=2.0, clip=0.5).rewards_BT
    assert_close_lists(scaled.tolist(), [[max(-0.5, min(0.5, 2 * x)) for x in row] for row in worked])
    tokens = composed(source(rollout), rollout, kind="continuous").rewards_BT
    torch.testing.assert_close(rewards.sum(1), tokens.sum(1))
    with pytest.raises(ConfigError, match="gave logits and no spans"):
        composed(RewardSignal(logits_BTC=source(rollout).logits_BTC), rollout, kind="spans")


def assert_close_lists(got: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> None:
    for row, truth in zip(got, wanted, strict=True):
        assert row == pytest.approx(truth, abs=1e-6)


# ---- the released code


def test_the_released_code_pays_half_as_much_one_action_late() -> None:
    """tanh(d / 2) of the previous token: nothing for the first action, and what the last token earned is lost."""
    p_BT = torch.tensor([[0.9, 0.55, 0.2, 0.7], [0.8, 0.3, 0.6, 0.5]])
    mask_BT = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]]).bool()
    signal = RewardSignal(logits_BTC=torch.stack([torch.zeros(2, 4), p_BT.logit()], dim=-1))

    def rewards(kl_coef: float = 0.0, **options: Any) -> list[list[float]]:
        return compose_rewards(
            signal,
            mask_BT,
            ended_B=torch.tensor([True, False]),
            kl_BT=torch.full((2, 4), 0.5),
            kl_coef=kl_coef,
            cfg=RewardConfig(compat="tlcr-official", **options),
            temperature=1.0,
            centre=None,
        ).rewards_BT.tolist()

    half = torch.tanh((2 * p_BT - 1) / 2).tolist()
    worked = [[0, half[0][0], half[0][1], half[0][2]], [0, 0, half[1][0], 0]]
    assert_close_lists(rewards(), worked)
    # the KL stays where it is, on the action that it belongs to
    kl = [[x - 0.05 for x in worked[0]], [-0.05, 0, worked[1][2] - 0.05, 0]]
    assert_close_lists(rewards(kl_coef=0.1), kl)
    # the band is on the squashed scale: |tanh(0.3)| = 0.29 is outside, tanh(0.05) = 0.05 inside
    assert_close_lists(rewards(kind="discrete", band=0.25), [[0, 1, 0, -1], [0, 0, 1, 0]])


def test_the_released_code_pays_the_exact_kl_in_the_reward() -> None:
    official = RewardConfig(compat="tlcr-official")
    assert RunConfig().kl_estimator == "k1" and RunConfig(reward=official).kl_estimator == "full"
    in_loss = KLConfig(placement="loss", estimator="k3")
    with pytest.raises(ConfigError, match=r"pays the KL in the reward.*set kl\.placement: reward"):
        RunConfig(reward=official, kl=in_loss)
    assert RunConfig(kl=in_loss).kl_estimator == "k3"


# ---- from a config


@pytest.mark.parametrize(
    ("kind", "source"),
    [("uniform", UniformSource), ("attention", AttentionSource), ("prefix_difference", PrefixDifferenceSource)],
)
def test_a_shared_score_mixes_with_the_score_at_the_end(
    kind: str, source: type, tiny_tokenizer: PreTrainedTokenizerFast, scorer: PreTrainedModel
) -> None:
    """ABC's (1 - beta) R at the end and beta R shared out, from one pass of the model."""
    cfg = RewardConfig(kind=kind, scale=0.25, sequence_coef=0.75)  # type: ignore[arg-type]
    options = {"policy_tokenizer": tiny_tokenizer, "data": DataConfig(), "seed": 0}
    built = build_reward_source(cfg, reward_model=LoadedModel(scorer, tiny_tokenizer), **options)  # type: ignore[arg-type]
    assert isinstance(built, source)
    rollout = rollout_of(rows_of(tiny_tokenizer), tiny_tokenizer, right=2)
    signal = built(rollout)
    assert signal.dense_BT is not None and signal.sequence_B is not None
    mixed = composed(signal, rollout, kind=kind, scale=0.25, sequence_coef=0.75)
    torch.testing.assert_close(mixed.parts["dense"], 0.25 * signal.dense_BT)
    last_B = rollout.mask_BT.sum(1) - 1
    at_end_BT = torch.zeros_like(signal.dense_BT).scatter(1, last_B[:, None], 0.75 * signal.sequence_B[:, None])
    torch.testing.assert_close(mixed.parts["terminal"], at_end_BT)
    assert set(composed(signal, rollout, kind=kind).parts) == {"dense"}
    with pytest.raises(ConfigError, match=f"reward.kind '{kind}' needs the reward_model"):
        build_reward_source(cfg, **options)  # type: ignore[arg-type]


def test_a_log_ratio_and_spans_are_built_from_their_models(
    tiny_tokenizer: PreTrainedTokenizerFast, tiny_causal_lm: Callable[..., PreTrainedModel]
) -> None:
    options: dict[str, Any] = {"policy_tokenizer": tiny_tokenizer, "data": DataConfig(), "seed": 0}
    dpo = LoadedModel(tiny_causal_lm(seed=1), tiny_tokenizer)
    reference = tiny_causal_lm()
    built = build_reward_source(RewardConfig(kind="dpo"), dpo=dpo, reference=reference, dpo_beta=0.7, **options)
    assert isinstance(built, LogRatioSource) and built.beta == 0.7 and built.reference is reference
    with pytest.raises(ConfigError, match=r"reward\.kind .dpo. needs the dpo, but there is none"):
        build_reward_source(RewardConfig(kind="dpo"), reference=reference, **options)
    with pytest.raises(ConfigError, match="is a ratio to the reference"):
        build_reward_source(RewardConfig(kind="dpo"), dpo=dpo, **options)
    scorer = LoadedModel(load_sequence_classifier(reference, ModelConfig()), tiny_tokenizer)
    values = build_reward_source(RewardConfig(kind="q"), q_model=scorer, q_beta=0.3, **options)
    assert isinstance(values, QSource) and values.beta == 0.3
    with pytest.raises(ConfigError, match=r"reward\.kind .q. needs the q_model.*'tlcr train q-model'"):
        build_reward_source(RewardConfig(kind="q"), **options)
    discriminator = LoadedModel(Rigged({}), tiny_tokenizer)  # type: ignore[arg-type]
    cfg = RewardConfig(kind="spans", span_end="!")
    spanned = build_reward_source(cfg, discriminator=discriminator, **options)
    assert isinstance(spanned, SpanSource) and spanned.span_end.pattern == "!" and spanned.state_dict() == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "spans", "span_end": "["}, r"RewardConfig\.span_end is '\[', which is no regular expression"),
        ({"kind": "sequence", "compat": "tlcr-official"}, r"the released code has no kind 'sequence'"),
        ({"kind": "spans", "compat": "tlcr-official"}, r"the released code has no kind 'spans'"),
    ],
)
def test_what_a_reward_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RewardConfig(**options)


def test_which_models_a_reward_needs() -> None:
    cfg = RunConfig(dpo=DPOConfig(beta=0.2))
    for kind, needs in {
        "continuous": "discriminator",
        "spans": "discriminator",
        "attention": "reward_model",
        "uniform": "reward_model",
        "prefix_difference": "reward_model",
        "q": "q_model",
        "dpo": "dpo",
    }.items():
        reward = RewardConfig(kind=kind)  # type: ignore[arg-type]
        used = {
            "discriminator": cfg.uses_discriminator(reward),
            "reward_model": cfg.uses_reward_model(reward),
            "q_model": cfg.uses_q_model(reward),
            "dpo": cfg.uses_dpo(reward),
        }
        assert [name for name, uses in used.items() if uses] == [needs], kind
    both = RewardConfig(kind="dpo", sequence_coef=1.0)
    assert cfg.uses_dpo(both) and cfg.uses_reward_model(both) and not cfg.uses_discriminator(both)
