"""Rollouts: where answers start and end, what shapes the sampling, and scores held to loops over prefixes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from tokenizers import Tokenizer as TokenizerCore
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from tests.ppo.helpers import ANSWER_IDS, PROMPT_IDS, PROMPTS, bigram_lm, chain, double_actor_critic, known_rollout
from tlcr.config.schema import EngineName, RolloutConfig
from tlcr.errors import DataError
from tlcr.models import notes
from tlcr.ppo.rollout import PromptStream, generate, seeded_generator
from tlcr.ppo.scores import score_rollout

LM = Callable[..., PreTrainedModel]
Tokenizer = PreTrainedTokenizerFast


@pytest.fixture(params=[name for name in get_args(EngineName) if name not in ("vllm", "server", "auto")])
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rollout_of(policy: PreTrainedModel, tokenizer: Tokenizer, prompts: list[str], **options: object):
    settings = {"max_new_tokens": 5, "batch_size": 2, **options}
    return generate(policy, tokenizer, prompts, RolloutConfig(**settings), max_prompt_tokens=16)


# ---- where answers start and end


def test_answers_start_in_one_column_end_at_their_end_of_sequence_and_come_back_in_order(
    tiny_tokenizer: Tokenizer, engine: str
) -> None:
    eos, pad = tiny_tokenizer.eos_token_id, tiny_tokenizer.pad_token_id
    a, b, c = (ids_of(tiny_tokenizer, letter)[0] for letter in "abc")
    policy = chain(tiny_tokenizer, (a, b), (b, eos))
    prompts = ["QQQQa", "b", "Qc", "a"]
    rollout = rollout_of(policy, tiny_tokenizer, prompts, engine=engine)
    assert rollout.prompts == tuple(prompts)
    assert rollout.response_ids_BT.tolist() == [
        [b, eos, pad, pad, pad],
        [eos, pad, pad, pad, pad],
        [c] * 5,
        [b, eos, pad, pad, pad],
    ]
    assert rollout.mask_BT.sum(dim=1).tolist() == [2, 1, 5, 2]
    assert rollout.ended_B.tolist() == [True, True, False, True]
    assert rollout.responses == ("b", "", "ccccc", "b")
    for row, prompt in enumerate(prompts):
        ids = ids_of(tiny_tokenizer, prompt)
        assert rollout.prompt_ids_BP[row, -len(ids) :].tolist() == ids
        assert rollout.prompt_mask_BP[row].sum() == len(ids) and rollout.prompt_mask_BP[row, -len(ids) :].all()


def test_columns_that_no_answer_needs_are_not_kept(tiny_tokenizer: Tokenizer) -> None:
    a, eos = ids_of(tiny_tokenizer, "a")[0], tiny_tokenizer.eos_token_id
    rollout = rollout_of(chain(tiny_tokenizer, (a, eos)), tiny_tokenizer, ["a", "ba", "cca"])
    assert rollout.response_ids_BT.tolist() == [[eos]] * 3 and rollout.mask_BT.tolist() == [[True]] * 3


def test_masks_come_from_lengths_where_padding_and_end_of_sequence_share_an_id(
    tiny_tokenizer: Tokenizer, engine: str
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    a, b, eos = ids_of(tokenizer, "a")[0], ids_of(tokenizer, "b")[0], tokenizer.eos_token_id
    rollout = rollout_of(chain(tokenizer, (a, eos)), tokenizer, ["Qa", "b"], engine=engine)
    assert rollout.response_ids_BT.tolist() == [[eos] * 5, [b] * 5]
    assert rollout.mask_BT.tolist() == [[True] + [False] * 4, [True] * 5]
    assert rollout.ended_B.tolist() == [True, False]


def test_answers_end_with_the_tokenizers_end_alone_and_the_models_other_ends_are_named_once(
    tiny_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = ids_of(tiny_tokenizer, "a")[0], ids_of(tiny_tokenizer, "b")[0]
    policy = chain(tiny_tokenizer, (a, b), (b, tiny_tokenizer.eos_token_id))
    policy.generation_config = GenerationConfig(eos_token_id=[tiny_tokenizer.eos_token_id, b])
    notes.forget_notes()
    for _ in range(2):
        rollout = rollout_of(policy, tiny_tokenizer, ["a"])
        assert rollout.response_ids_BT.tolist() == [[b, tiny_tokenizer.eos_token_id]]
    said = [record.message for record in caplog.records if record.name == "tlcr"]
    assert len(said) == 1 and "also ends answers with 'b'; rollouts end with '<eos>' alone" in said[0]


def test_the_last_token_within_the_limit_may_be_the_end(tiny_tokenizer: Tokenizer, engine: str) -> None:
    a, b, eos = ids_of(tiny_tokenizer, "a")[0], ids_of(tiny_tokenizer, "b")[0], tiny_tokenizer.eos_token_id
    policy = chain(tiny_tokenizer, (a, b), (b, eos))
    assert rollout_of(policy, tiny_tokenizer, ["a"], max_new_tokens=2, engine=engine).ended_B.tolist() == [True]
    assert rollout_of(policy, tiny_tokenizer, ["a"], max_new_tokens=1, engine=engine).ended_B.tolist() == [False]


# ---- prompts


def test_a_long_prompt_keeps_its_end(tiny_tokenizer: Tokenizer, tiny_causal_lm: LM) -> None:
    prompt = "The food was good and the service was not bad at all."
    rollout = generate(tiny_causal_lm(), tiny_tokenizer, [prompt], RolloutConfig(max_new_tokens=1), max_prompt_tokens=4)
    assert rollout.prompt_ids_BP.tolist() == [ids_of(tiny_tokenizer, prompt)[-4:]]


def test_a_prompt_of_padding_is_refused_by_its_number(tiny_tokenizer: Tokenizer, tiny_causal_lm: LM) -> None:
    with pytest.raises(DataError, match=r"prompt 1 is .*no token but padding; .*drop it"):
        rollout_of(tiny_causal_lm(), tiny_tokenizer, ["fine", "<pad><pad>"])


def test_text_without_a_prompt_starts_from_the_token_that_starts_texts(
    tiny_tokenizer: Tokenizer, tiny_causal_lm: LM
) -> None:
    """The scores of its first action are read at that token, beside a prompt of three."""
    actor_critic = double_actor_critic(tiny_causal_lm)
    rollout = rollout_of(actor_critic.policy, tiny_tokenizer, ["", "abc"], max_new_tokens=3)
    assert rollout.prompts == ("", "abc")
    assert rollout.prompt_ids_BP[0][rollout.prompt_mask_BP[0]].tolist() == [tiny_tokenizer.bos_token_id]
    scores = score_rollout(
        actor_critic, actor_critic.policy, rollout, temperature=1.0, micro_batch_size=None, exact_kl=False
    )
    with torch.no_grad():
        logits_V = actor_critic.policy(torch.tensor([[tiny_tokenizer.bos_token_id]])).logits[0, -1]
        value = actor_critic.value_model(torch.tensor([[tiny_tokenizer.bos_token_id]])).logits[0, -1, 0]
    first = int(rollout.response_ids_BT[0, 0])
    torch.testing.assert_close(scores.logprobs_BT[0, 0], logits_V.log_softmax(-1)[first])
    torch.testing.assert_close(scores.values_BT[0, 0], value)


def test_an_answer_beyond_the_models_positions_is_refused(tiny_tokenizer: Tokenizer, tiny_causal_lm: LM) -> None:
    policy = tiny_causal_lm()
    positions = policy.config.max_position_embeddings
    with pytest.raises(DataError, match=rf"has {positions + 1} tokens, and the model reads at most {positions}"):
        rollout_of(policy, tiny_tokenizer, ["a"], max_new_tokens=positions)


def test_the_first_word_of_an_answer_keeps_its_space() -> None:
    words = ["<eos>", "<pad>", "\u2581how", "\u2581are", "\u2581you", "!"]
    plain = TokenizerCore(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    plain.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>")
    policy = chain(tokenizer, (2, 3), (3, 4), (4, 0))
    rollout = rollout_of(policy, tokenizer, ["how"])
    assert rollout.responses == (" are you",)


def test_no_prompts_are_refused(tiny_tokenizer: Tokenizer, tiny_causal_lm: LM) -> None:
    with pytest.raises(DataError, match="there are no prompts to answer"):
        rollout_of(tiny_causal_lm(), tiny_tokenizer, [])


def test_the_stream_takes_every_prompt_once_a_pass_and_goes_on_from_its_cursor() -> None:
    stream = PromptStream(PROMPTS, seed=4)
    taken = [prompt for _ in range(4) for prompt in stream.take(3)]
    assert sorted(taken[:6]) == sorted(taken[6:]) == sorted(PROMPTS)
    assert taken[:6] != taken[6:]
    assert PromptStream(PROMPTS, seed=4, cursor=5).take(7) == taken[5:]
    assert PromptStream(PROMPTS, seed=5).take(12) != taken
    with pytest.raises(DataError, match="there are no prompts"):
        PromptStream([], seed=0)


# ---- sampling


def test_tokens_are_drawn_from_the_policy_at_the_temperature(tiny_tokenizer: Tokenizer, engine: str) -> None:
    V, n, temperature = len(tiny_tokenizer), 3000, 0.5
    a = ids_of(tiny_tokenizer, "a")[0]
    logits_VV = torch.full((V, V), -50.0)
    logits_VV[a, 10:14] = torch.tensor([0.0, 0.5, 1.0, -0.5])
    rollout = rollout_of(
        bigram_lm(logits_VV, layers=1),
        tiny_tokenizer,
        ["a"] * n,
        max_new_tokens=1,
        temperature=temperature,
        batch_size=500,
        engine=engine,
    )
    shares = torch.bincount(rollout.response_ids_BT[:, 0], minlength=V)[10:14] / n
    expected = (logits_VV[a, 10:14] / temperature).softmax(-1)
    assert (shares - expected).abs().max() < 4 * (0.25 / n) ** 0.5  # four standard errors at most


def test_sampling_defaults_that_came_with_the_model_do_not_apply(tiny_tokenizer: Tokenizer, engine: str) -> None:
    policy = bigram_lm(torch.zeros(len(tiny_tokenizer), len(tiny_tokenizer)), layers=1)
    own = GenerationConfig(top_k=1, repetition_penalty=9.0, min_new_tokens=5, do_sample=True)
    policy.generation_config = own
    rollout = rollout_of(policy, tiny_tokenizer, ["a"] * 60, batch_size=60, engine=engine)
    assert rollout.response_ids_BT.unique().numel() > 50
    assert policy.generation_config is own


def test_a_generator_decides_the_answers_and_leaves_the_global_state_alone(
    tiny_tokenizer: Tokenizer, tiny_causal_lm: LM, engine: str
) -> None:
    def sample(seed: int) -> Tensor:
        cfg = RolloutConfig(max_new_tokens=5, batch_size=2, engine=engine)
        return generate(
            tiny_causal_lm(),
            tiny_tokenizer,
            PROMPTS,
            cfg,
            max_prompt_tokens=16,
            generator=seeded_generator("answers", seed),
        ).response_ids_BT

    before = torch.get_rng_state()
    first = sample(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(sample(1), first)
    assert not torch.equal(sample(2), first)


def test_seeds_that_are_neighbours_give_unrelated_streams() -> None:
    seeds = [(purpose, seed, update) for purpose in "ab" for seed in range(9) for update in range(9)]
    assert len({torch.rand(1, generator=seeded_generator(*parts)).item() for parts in seeds}) == len(seeds)
    assert torch.equal(*(torch.rand(3, generator=seeded_generator("a", 1, 2)) for _ in range(2)))


# ---- scores


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_scores_are_those_of_each_prefix_read_alone(tiny_causal_lm: LM, micro_batch_size: int | None) -> None:
    actor_critic, reference, temperature = double_actor_critic(tiny_causal_lm), tiny_causal_lm(seed=7).double(), 0.7
    rollout = known_rollout(extra_left=2, extra_right=1)
    scores = score_rollout(
        actor_critic, reference, rollout, temperature=temperature, micro_batch_size=micro_batch_size, exact_kl=True
    )
    assert actor_critic.value_model is not None
    for b, (prompt, answer) in enumerate(zip(PROMPT_IDS, ANSWER_IDS, strict=True)):
        for t, token in enumerate(answer):
            prefix = torch.tensor([prompt + answer[:t]])
            with torch.no_grad():
                logp_V = (actor_critic.policy(prefix).logits[0, -1] / temperature).log_softmax(-1)
                logq_V = (reference(prefix).logits[0, -1] / temperature).log_softmax(-1)
                value = actor_critic.value_model(prefix).logits[0, -1, 0]
            torch.testing.assert_close(scores.logprobs_BT[b, t], logp_V[token])
            torch.testing.assert_close(scores.ref_logprobs_BT[b, t], logq_V[token])
            torch.testing.assert_close(scores.values_BT[b, t], value)
            torch.testing.assert_close(scores.entropy_BT[b, t], -(logp_V.exp() * logp_V).sum())
            assert scores.kl_BT is not None
            torch.testing.assert_close(scores.kl_BT[b, t], (logp_V.exp() * (logp_V - logq_V)).sum())
    for found_BT in (scores.logprobs_BT, scores.ref_logprobs_BT, scores.values_BT, scores.entropy_BT, scores.kl_BT):
        assert found_BT is not None and (found_BT[~rollout.mask_BT] == 0).all()
        assert not found_BT.requires_grad


def test_without_the_exact_kl_the_other_scores_are_the_same(tiny_causal_lm: LM) -> None:
    """The reference is read in a pass of its own then, at the same temperature."""
    actor_critic, reference = double_actor_critic(tiny_causal_lm), tiny_causal_lm(seed=7).double()
    options: dict[str, Any] = {"temperature": 0.7, "micro_batch_size": 3}
    with_kl, without = (
        score_rollout(actor_critic, reference, known_rollout(), exact_kl=exact_kl, **options)
        for exact_kl in (True, False)
    )
    assert with_kl.kl_BT is not None and without.kl_BT is None
    for name in ("logprobs_BT", "ref_logprobs_BT", "values_BT", "entropy_BT"):
        torch.testing.assert_close(getattr(without, name), getattr(with_kl, name), rtol=1e-12, atol=1e-12)


def test_scores_one_token_late_would_be_noticed(tiny_causal_lm: LM) -> None:
    actor_critic = double_actor_critic(tiny_causal_lm)
    rollout = known_rollout()
    late = replace(
        rollout,
        prompt_ids_BP=torch.cat([rollout.prompt_ids_BP, rollout.response_ids_BT[:, :1]], dim=1),
        prompt_mask_BP=torch.cat([rollout.prompt_mask_BP, rollout.mask_BT[:, :1]], dim=1),
        response_ids_BT=rollout.response_ids_BT[:, 1:],
        mask_BT=rollout.mask_BT[:, 1:],
    )
    options = {"temperature": 1.0, "micro_batch_size": None, "exact_kl": False}
    right, shifted = (score_rollout(actor_critic, actor_critic.policy, r, **options) for r in (rollout, late))
    both_BT = late.mask_BT
    for name in ("logprobs_BT", "values_BT"):
        on_time, too_late = getattr(right, name)[:, :-1][both_BT], getattr(shifted, name)[both_BT]
        assert (on_time - too_late).abs().min() > 1e-6
        torch.testing.assert_close(getattr(right, name)[:, 1:][both_BT], too_late)


def test_scoring_spends_nothing_on_padding(tiny_causal_lm: LM) -> None:
    actor_critic, shapes = double_actor_critic(tiny_causal_lm), []
    actor_critic.register_forward_pre_hook(lambda _module, inputs: shapes.append(tuple(inputs[0].shape)))
    score_rollout(
        actor_critic,
        actor_critic.policy,
        known_rollout(extra_left=9, extra_right=9),
        temperature=1.0,
        micro_batch_size=4,
        exact_kl=False,
    )
    assert shapes == [(4, 8), (4, 6)]  # whole lengths of the longest row of each half, whatever its parts
