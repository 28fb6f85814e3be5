"""Conversations: messages stand in their rows, every model reads them, and nothing is paid or trained on them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import LlamaForSequenceClassification, LlamaForTokenClassification, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from tests.ppo.helpers import (
    PROMPTS,
    GradientRecorder,
    StopAt,
    Stopped,
    chain,
    double_actor_critic,
    reward_low_ids,
    run_ppo,
    small_config,
    without_times,
)
from tests.rewards.rollouts import character_tokenizer, frozen_model
from tlcr.config.schema import KLConfig, PPOConfig, RewardConfig, RolloutConfig
from tlcr.errors import ConfigError, DataError
from tlcr.evaluation.evaluate import evaluate_policy
from tlcr.ppo import conversation
from tlcr.ppo.advantages import compute_advantages
from tlcr.ppo.conversation import Environment
from tlcr.ppo.microbatches import MicroBatches
from tlcr.ppo.rollout import generate, seeded_generator
from tlcr.ppo.scores import score_rollout
from tlcr.ppo.update import ppo_update
from tlcr.rewards.composition import compose_rewards
from tlcr.rewards.sources import CallableSource, DiscriminatorSource
from tlcr.rewards.sources.sequence import AttentionSource, PrefixDifferenceSource, SequenceRewardSource
from tlcr.rewards.sources.spans import SpanSource
from tlcr.training.metrics import read_metrics
from tlcr.types import Advantages, PolicyScores, Rewards, Rollout

LM = Callable[..., PreTrainedModel]


def asks_again(*, prompts: list[str], turns: list[list[str]]) -> list[str | None]:
    """A message that depends on the answer, until two were written."""
    return [None if len(texts) > 3 else f" Human: {texts[-1][:1]}!" for texts in turns]


def play(
    policy: PreTrainedModel, tokenizer: Tokenizer, prompts: list[str], environment: Environment | None, **options: Any
) -> Rollout:
    logprobs = options.pop("logprobs", False)
    cfg = RolloutConfig(**({"max_new_tokens": 3, "batch_size": 2, "max_turns": 3, "max_message_tokens": 16} | options))
    return generate(
        policy,
        tokenizer,
        prompts,
        cfg,
        max_prompt_tokens=16,
        generator=seeded_generator("answers", 1),
        logprobs=logprobs,
        environment=environment,
    )


def often_ending(model: PreTrainedModel, end: int) -> PreTrainedModel:
    """The model, with an output head that makes an end of sequence likely everywhere, so that conversations go on."""
    with torch.no_grad():
        states_LH = model.model(torch.arange(5, 200)[None]).last_hidden_state[0]
        mean_H = states_LH.mean(dim=0)
        model.lm_head.weight[end] = 5 * mean_H / mean_H.square().sum()
    return model


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- playing


def test_answers_and_messages_stand_in_their_order_and_only_answers_are_actions(tiny_tokenizer: Tokenizer) -> None:
    """a and c are followed by b, b by the end; d by itself, so that its answer is cut and gets no message."""
    end, pad = tiny_tokenizer.eos_token_id, tiny_tokenizer.pad_token_id
    a, b, c, d = (letters(tiny_tokenizer, letter)[0] for letter in "abcd")
    asked: list[Any] = []

    def environment(*, prompts: list[str], turns: list[list[str]]) -> list[str | None]:
        asked.append((prompts, turns))
        first = {"Qa": "Zc", "Qb": None}
        return [first[prompt] if len(texts) == 1 else "d" for prompt, texts in zip(prompts, turns, strict=True)]

    policy = chain(tiny_tokenizer, (a, b), (c, b), (b, end))
    rollout = play(policy, tiny_tokenizer, ["Qa", "Qb", "Qd"], environment, logprobs=True)
    z, c_ = letters(tiny_tokenizer, "Zc")
    assert c_ == c
    # answer "b", message "Zc", answer "b", message "d", and an answer that the limit cuts
    rows = [[b, end, z, c, b, end, d, d, d, d], [end], [d, d, d]]
    acted = [[1, 1, 0, 0, 1, 1, 0, 1, 1, 1], [1], [1, 1, 1]]
    assert rollout.response_ids_BT.tolist() == [row + [pad] * (10 - len(row)) for row in rows]
    assert rollout.mask_BT.int().tolist() == [row + [0] * (10 - len(row)) for row in acted]
    assert rollout.messages_BT is not None
    assert rollout.messages_BT.int().tolist() == [[0, 0, 1, 1, 0, 0, 1, 0, 0, 0], [0] * 10, [0] * 10]
    assert rollout.ended_B.tolist() == [False, True, False]
    assert rollout.responses == ("bZcbdddd", "", "ddd")
    assert asked == [(["Qa", "Qb"], [["b"], [""]]), (["Qa"], [["b", "Zc", "b"]])]
    assert rollout.attention_mask_BL[:, rollout.prompt_ids_BP.shape[1] :].sum(dim=1).tolist() == [10, 1, 3]


@pytest.mark.parametrize("engine", ["generate", "paged"])
def test_an_engine_answers_with_the_messages_before_its_eyes(
    engine: str, tiny_causal_lm: LM, tiny_tokenizer: Tokenizer
) -> None:
    """The log-probabilities that it drew with are those of the whole row, at every action."""
    actor_critic = double_actor_critic(tiny_causal_lm).float()
    policy = often_ending(actor_critic.policy, tiny_tokenizer.eos_token_id)
    rollout = play(policy, tiny_tokenizer, PROMPTS, asks_again, logprobs=True, engine=engine, max_new_tokens=6)
    assert rollout.messages_BT is not None and rollout.messages_BT.sum() > 8
    assert (rollout.mask_BT & rollout.messages_BT).sum() == 0
    scores = score_rollout(actor_critic, tiny_causal_lm(), rollout, temperature=1.0, micro_batch_size=2, exact_kl=False)
    assert rollout.engine_logprobs_BT is not None
    torch.testing.assert_close(rollout.engine_logprobs_BT, scores.logprobs_BT, rtol=0, atol=1e-5)
    assert (rollout.engine_logprobs_BT[~rollout.mask_BT] == 0).all()


def test_without_an_environment_nothing_changes(tiny_causal_lm: LM, tiny_tokenizer: Tokenizer) -> None:
    alone = play(tiny_causal_lm(), tiny_tokenizer, PROMPTS, None)
    played = play(tiny_causal_lm(), tiny_tokenizer, PROMPTS, lambda *, prompts, turns: [None] * len(prompts))
    assert torch.equal(alone.response_ids_BT, played.response_ids_BT) and alone.messages_BT is None
    assert played.messages_BT is not None and not played.messages_BT.any()


def test_a_conversation_has_so_many_answers_at_most(tiny_tokenizer: Tokenizer) -> None:
    a, end = letters(tiny_tokenizer, "a")[0], tiny_tokenizer.eos_token_id
    policy = chain(tiny_tokenizer, (a, end))
    for most in (1, 2, 3):
        rollout = play(policy, tiny_tokenizer, ["a"], lambda *, prompts, turns: ["a"], max_turns=most)
        assert rollout.response_ids_BT.tolist() == [([end, a] * most)[:-1]] and rollout.ended_B.tolist() == [True]


def test_a_message_that_is_too_long_ends_the_conversation_and_is_said_once(
    tiny_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    a, end = letters(tiny_tokenizer, "a")[0], tiny_tokenizer.eos_token_id
    conversation._say_too_long.cache_clear()
    for _ in range(2):
        rollout = play(
            chain(tiny_tokenizer, (a, end)), tiny_tokenizer, ["a"], lambda **_: ["QQa"], max_message_tokens=2
        )
        assert rollout.response_ids_BT.tolist() == [[end]]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1 and "more tokens than rollout.max_message_tokens = 2" in said[0]


def raises(**_: Any) -> list[str | None]:
    raise KeyError("no such tool")


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (raises, "the environment raised KeyError: 'no such tool'"),
        (lambda **_: "a", "returned a str for 1 conversations; it must return a list with a text, or None, for each"),
        (lambda **_: ["a", "a"], "returned a list of 2 for 1 conversations"),
        (lambda **_: [3], "returned 3 as a message"),
        (lambda **_: [""], "returned '' as a message"),
    ],
)
def test_what_an_environment_does_wrong_is_one_sentence(environment: Any, says: str, tiny_tokenizer: Tokenizer) -> None:
    a, end = letters(tiny_tokenizer, "a")[0], tiny_tokenizer.eos_token_id
    with pytest.raises(DataError) as caught:
        play(chain(tiny_tokenizer, (a, end)), tiny_tokenizer, ["a"], environment)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_messages_count_for_the_models_positions(tiny_tokenizer: Tokenizer, tiny_causal_lm: LM) -> None:
    positions = tiny_causal_lm().config.max_position_embeddings
    with pytest.raises(DataError, match=rf"at most {positions} .*; lower .*, rollout\.max_turns or rollout\.max_"):
        play(tiny_causal_lm(), tiny_tokenizer, ["a"], asks_again, max_new_tokens=1, max_message_tokens=positions)
    with pytest.raises(ConfigError, match=r"rollout\.environment is 'tests\.ppo\.helpers:reward_low_ids', which takes"):
        cfg = RolloutConfig(max_new_tokens=3, environment="tests.ppo.helpers:reward_low_ids")
        generate(tiny_causal_lm(), tiny_tokenizer, ["a"], cfg, max_prompt_tokens=16)


# ---- from the row to the step


def known_conversation() -> Rollout:
    """Rows of unlike prompts: answer, message, answer; one answer; answer, message, answer, message, answer."""
    prompts, rows = (
        [[5, 9, 30], [8], [7, 44, 12, 90, 33]],
        [
            [(41, 1), (2, 1), (60, 0), (61, 0), (17, 1), (2, 1)],
            [(23, 1), (99, 1), (2, 1)],
            [(2, 1), (70, 0), (12, 1), (2, 1), (71, 0), (72, 0), (3, 1), (14, 1)],
        ],
    )
    P, T = 5, 9
    prompt_ids_BP, prompt_mask_BP = torch.full((3, P), 99), torch.zeros(3, P, dtype=torch.bool)
    response_ids_BT = torch.full((3, T), 98)
    mask_BT, messages_BT = torch.zeros(2, 3, T, dtype=torch.bool).unbind()
    for b, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        prompt_ids_BP[b, P - len(prompt) :], prompt_mask_BP[b, P - len(prompt) :] = torch.tensor(prompt), True
        for t, (token, acted) in enumerate(row):
            response_ids_BT[b, t], mask_BT[b, t], messages_BT[b, t] = token, bool(acted), not acted
    return Rollout(
        prompts=("The", "food", "was"),
        responses=("a", "b", "c"),
        prompt_ids_BP=prompt_ids_BP,
        prompt_mask_BP=prompt_mask_BP,
        response_ids_BT=response_ids_BT,
        mask_BT=mask_BT,
        ended_B=torch.tensor([True, True, False]),
        messages_BT=messages_BT,
    )


def as_one_answer(rollout: Rollout) -> Rollout:
    """The same rows, with the policy as author of every token."""
    return replace(rollout, mask_BT=rollout.read_BT, messages_BT=None)


def rows_of(rollout: Rollout) -> list[tuple[list[int], int]]:
    """Each row without padding, and the length of its prompt."""
    found = []
    for b in range(len(rollout.prompts)):
        prompt = rollout.prompt_ids_BP[b][rollout.prompt_mask_BP[b]].tolist()
        found.append((prompt + rollout.response_ids_BT[b][rollout.read_BT[b]].tolist(), len(prompt)))
    return found


def test_scores_of_actions_are_those_of_whole_prefixes_with_their_messages(tiny_causal_lm: LM) -> None:
    actor_critic, reference = double_actor_critic(tiny_causal_lm), tiny_causal_lm(seed=7).double()
    rollout = known_conversation()
    scores = score_rollout(actor_critic, reference, rollout, temperature=0.7, micro_batch_size=2, exact_kl=True)
    assert actor_critic.value_model is not None and scores.kl_BT is not None
    for b, (row, start) in enumerate(rows_of(rollout)):
        for t in range(len(row) - start):
            if not rollout.mask_BT[b, t]:
                assert scores.logprobs_BT[b, t] == scores.values_BT[b, t] == scores.kl_BT[b, t] == 0
                continue
            prefix = torch.tensor([row[: start + t]])
            with torch.no_grad():
                logp_V = (actor_critic.policy(prefix).logits[0, -1] / 0.7).log_softmax(-1)
                value = actor_critic.value_model(prefix).logits[0, -1, 0]
            torch.testing.assert_close(scores.logprobs_BT[b, t], logp_V[row[start + t]])
            torch.testing.assert_close(scores.values_BT[b, t], value)


@pytest.mark.parametrize("packed", [False, True])
def test_models_get_rows_with_their_messages(packed: bool) -> None:
    rollout = known_conversation()
    (batches,) = MicroBatches(rollout, rows=1, tokens=None, packed=packed).split()
    found = {tuple(batch.ids_BL[0].tolist()) for batch in batches}
    assert found == {tuple(row) for row, _ in rows_of(rollout)}


def test_advantages_are_those_of_the_actions_alone_end_to_end() -> None:
    rollout = known_conversation()
    shape, mask_BT = rollout.mask_BT.shape, rollout.mask_BT
    generator = torch.Generator().manual_seed(2)
    rewards_BT, values_BT = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    scores = PolicyScores(values_BT, values_BT, values_BT, values_BT)
    found = compute_advantages(Rewards(rewards_BT), scores, mask_BT, gamma=0.9, lam=0.8, whiten=False)
    for b in range(shape[0]):
        later, value_after = 0.0, 0.0
        for t in reversed(range(shape[1])):
            if mask_BT[b, t]:
                delta = rewards_BT[b, t] + 0.9 * value_after - values_BT[b, t]
                later, value_after = delta + 0.9 * 0.8 * later, values_BT[b, t]
                torch.testing.assert_close(found.advantages_BT[b, t], later)
            else:
                assert found.advantages_BT[b, t] == found.returns_BT[b, t] == 0


def test_the_step_has_the_gradient_of_the_actions_alone(tiny_gpt2: LM) -> None:
    """A mean over the actions, each read behind all that stands before it."""
    actor_critic, rollout = double_actor_critic(tiny_gpt2), known_conversation()
    scores = score_rollout(
        actor_critic, actor_critic.policy, rollout, temperature=1.0, micro_batch_size=None, exact_kl=False
    )
    generator = torch.Generator().manual_seed(3)
    advantages_BT, returns_BT = (
        torch.randn(rollout.mask_BT.shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    recorder = GradientRecorder(actor_critic)
    ppo_update(
        actor_critic,
        recorder,
        rollout,
        scores,
        Advantages(advantages_BT, returns_BT),
        PPOConfig(minibatch_size=3, epochs=1, max_grad_norm=1e9, value_clip=None),
        KLConfig(coef=0.0),
        kl_coef=0.0,
        temperature=1.0,
        reference=actor_critic.policy,
        accelerator=Accelerator(),
        generator=seeded_generator("test", 0),
    )
    policy, value_model = actor_critic.policy, actor_critic.value_model
    assert value_model is not None
    loss = torch.zeros((), dtype=torch.float64)
    coef = PPOConfig().value_coef
    for b, (row, start) in enumerate(rows_of(rollout)):
        logprobs_LV = policy(torch.tensor([row])).logits[0].log_softmax(-1)
        values_L = value_model(torch.tensor([row])).logits[0, :, 0]
        for t in range(len(row) - start):
            if rollout.mask_BT[b, t]:
                at = start + t
                ratio = (logprobs_LV[at - 1, row[at]] - scores.logprobs_BT[b, t]).exp()
                loss = loss - ratio * advantages_BT[b, t] + coef * 0.5 * (values_L[at - 1] - returns_BT[b, t]) ** 2
    wanted = torch.autograd.grad(loss / rollout.mask_BT.sum(), list(actor_critic.parameters()), allow_unused=True)
    (found,) = recorder.steps
    compared = 0
    for mine, theirs in zip(found, wanted, strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
            compared += 1
    assert compared > 20


# ---- rewards


@pytest.mark.parametrize("own", [True, False], ids=["its tokens", "other tokens"])
def test_a_discriminator_reads_messages_and_pays_none(own: bool, tiny_causal_lm: LM, tiny_tokenizer: Tokenizer) -> None:
    """What it says of an action is what it would say if the policy had written the messages too."""
    other = tiny_tokenizer if own else character_tokenizer()
    torch.manual_seed(5)
    config = tiny_causal_lm().config
    config.vocab_size = max(config.vocab_size, len(other))
    model = LlamaForTokenClassification(config).eval()
    source = DiscriminatorSource(frozen_model(model, other, tiny_tokenizer))
    rollout = known_conversation() if own else spoken(tiny_tokenizer)
    logits_BTC, whole_BTC = source(rollout).logits_BTC, source(as_one_answer(rollout)).logits_BTC
    assert logits_BTC is not None and whole_BTC is not None
    torch.testing.assert_close(logits_BTC[rollout.mask_BT], whole_BTC[rollout.mask_BT])
    assert (logits_BTC[rollout.mask_BT] != 0).any()
    if own:
        for b, (row, start) in enumerate(rows_of(rollout)):
            with torch.no_grad():
                alone_LC = model(torch.tensor([row])).logits[0]
            read_T = rollout.read_BT[b]
            torch.testing.assert_close(logits_BTC[b, read_T], alone_LC[start:], rtol=0, atol=1e-5)
    rewards = compose_rewards(
        source(rollout),
        rollout.mask_BT,
        ended_B=rollout.ended_B,
        kl_BT=None,
        kl_coef=0.0,
        cfg=RewardConfig(),
        temperature=1.0,
        centre=None,
    ).rewards_BT
    assert (rewards[~rollout.mask_BT] == 0).all() and (rewards[rollout.mask_BT] != 0).float().mean() > 0.5
    changed = replace(rollout, response_ids_BT=rollout.response_ids_BT.clone())
    assert rollout.messages_BT is not None
    changed.response_ids_BT[rollout.messages_BT] = letters(tiny_tokenizer, "z")[0]
    after_BTC = source(changed).logits_BTC
    assert after_BTC is not None
    first = int(rollout.messages_BT[0].int().argmax())
    torch.testing.assert_close(after_BTC[0, :first], logits_BTC[0, :first])
    assert not torch.allclose(
        after_BTC[0, first:][rollout.mask_BT[0, first:]], logits_BTC[0, first:][rollout.mask_BT[0, first:]]
    )


def spoken(tokenizer: Tokenizer) -> Rollout:
    """A conversation of letters, with an end of sequence inside it."""
    a, end = letters(tokenizer, "a")[0], tokenizer.eos_token_id
    return play(
        chain(tokenizer, (a, letters(tokenizer, "b")[0]), (letters(tokenizer, "b")[0], end)),
        tokenizer,
        ["Ha", "a", "c"],
        lambda *, prompts, turns: [f"H{prompt[-1]}: a" for prompt in prompts],
        max_turns=2,
    )


@pytest.mark.parametrize("kind", [SequenceRewardSource, AttentionSource, PrefixDifferenceSource])
@pytest.mark.parametrize("own", [True, False], ids=["its tokens", "other tokens"])
def test_scores_of_answers_go_to_actions(kind: Any, own: bool, tiny_causal_lm: LM, tiny_tokenizer: Tokenizer) -> None:
    other = tiny_tokenizer if own else character_tokenizer()
    torch.manual_seed(5)
    config = tiny_causal_lm().config
    config.vocab_size, config.num_labels = max(config.vocab_size, len(other)), 1
    config.pad_token_id = other.pad_token_id
    source = kind(frozen_model(LlamaForSequenceClassification(config).eval(), other, tiny_tokenizer))
    rollout = spoken(tiny_tokenizer)
    found, whole = source(rollout), source(as_one_answer(rollout))
    if kind is SequenceRewardSource:
        torch.testing.assert_close(found.terminal_B, whole.terminal_B)
        return
    assert (found.dense_BT[~rollout.mask_BT] == 0).all()
    torch.testing.assert_close(found.sequence_B, whole.sequence_B)
    if kind is AttentionSource and own:  # what messages are looked at with goes to the actions
        torch.testing.assert_close(found.dense_BT.sum(1), found.sequence_B)
    else:
        torch.testing.assert_close(found.dense_BT[rollout.mask_BT], whole.dense_BT[rollout.mask_BT])


def test_spans_and_functions_of_the_user_see_whole_conversations(tiny_tokenizer: Tokenizer) -> None:
    rollout = spoken(tiny_tokenizer)
    spans_BT = SpanSource(CallableSource("tests.ppo.helpers:reward_low_ids"), tiny_tokenizer, ":")(rollout).spans_BT
    whole = SpanSource(CallableSource("tests.ppo.helpers:reward_low_ids"), tiny_tokenizer, ":")
    assert spans_BT is not None
    assert torch.equal(spans_BT, whole(as_one_answer(rollout)).spans_BT)  # type: ignore[arg-type]
    dense_BT = CallableSource("tests.ppo.helpers:reward_low_ids")(rollout).dense_BT
    assert dense_BT is not None
    ids = [row[mask].tolist() for row, mask in zip(rollout.response_ids_BT, rollout.mask_BT, strict=True)]
    given = reward_low_ids(response_ids=ids)
    assert [row[mask].tolist() for row, mask in zip(dense_BT, rollout.mask_BT, strict=True)] == given
    assert (dense_BT[~rollout.mask_BT] == 0).all()


# ---- whole runs


def replies(*, prompts: list[str], turns: list[list[str]]) -> list[str | None]:
    """For ``rollout.environment``."""
    return [" Human: " + texts[-1][:2] for texts in turns]


def test_ppo_plays_evaluates_and_resumes(tiny_causal_lm: LM, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    cfg = small_config(updates=2, save_every=1)
    game = replace(
        cfg.rollout,
        environment="tests.ppo.test_conversation:replies",
        max_turns=2,
        max_new_tokens=4,
        max_message_tokens=12,
    )
    cfg = replace(cfg, rollout=game)

    def ends_often(**options: Any) -> PreTrainedModel:
        return often_ending(tiny_causal_lm(**options), tiny_tokenizer.eos_token_id)

    actor_critic, _ = run_ppo(cfg, ends_often, tiny_tokenizer, tmp_path / "whole")
    with pytest.raises(Stopped):
        run_ppo(cfg, ends_often, tiny_tokenizer, tmp_path / "cut", callbacks=[StopAt(1)])
    run_ppo(cfg, ends_often, tiny_tokenizer, tmp_path / "cut", resume=True)
    whole, cut = (
        [without_times(row) for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "cut")
    )
    assert whole == cut and whole[0]["length/message_tokens"] > 0

    def sample(prompts: Sequence[str]) -> Rollout:
        return generate(actor_critic.policy, tiny_tokenizer, prompts, cfg.rollout, max_prompt_tokens=8)

    def score(rollout: Rollout) -> PolicyScores:
        return score_rollout(
            actor_critic, actor_critic.policy, rollout, temperature=1.0, micro_batch_size=None, exact_kl=True
        )

    found = evaluate_policy(
        PROMPTS, tokenizer=tiny_tokenizer, generate=sample, score=score, scorer=None, samples=len(PROMPTS)
    )
    talked = [answer for answer in found.samples if "Human" in answer.response]
    assert talked and all(len(a.tokens) == len(a.value) == a.length for a in found.samples)
    assert all("Human" not in "".join(answer.tokens) for answer in talked)


def shift(x_BT: Tensor) -> Tensor:
    return torch.roll(x_BT, 1, dims=1)


def test_a_mask_one_token_late_would_be_noticed(tiny_causal_lm: LM) -> None:
    actor_critic, rollout = double_actor_critic(tiny_causal_lm), known_conversation()
    assert rollout.messages_BT is not None
    late = replace(rollout, mask_BT=shift(rollout.mask_BT) & rollout.read_BT)
    late = replace(late, messages_BT=rollout.read_BT & ~late.mask_BT)
    options: dict[str, Any] = {"temperature": 1.0, "micro_batch_size": None, "exact_kl": False}
    right, wrong = (score_rollout(actor_critic, actor_critic.policy, r, **options) for r in (rollout, late))
    assert not torch.allclose(right.logprobs_BT, wrong.logprobs_BT)
