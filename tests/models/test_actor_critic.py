"""Policy and value model as one module: the alignment of every output, held to loops over prefixes in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tlcr.config.schema import ModelConfig, PPOConfig
from tlcr.errors import CheckpointError, ConfigError
from tlcr.models.actor_critic import ActorCritic, build_value_model, load_value_head
from tlcr.models.heads import classification_head
from tlcr.models.loading import load_sequence_classifier, load_token_classifier
from tlcr.models.preparing import enable_gradient_checkpointing

PROMPTS = [[5, 9, 30], [7, 44, 12, 90, 33], [8]]
ANSWERS = [[41, 17, 60, 2], [23], [99, 3, 14]]
TEMPERATURE = 0.7


def batch(extra_left: int = 0, extra_right: int = 0, pad: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The rows above as (ids_BL, attention_mask_BL, actions_N), padded as a rollout is, and wider on request."""
    P, T = max(map(len, PROMPTS)) + extra_left, max(map(len, ANSWERS)) + extra_right
    rows, masks = [], []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        left, right = P - len(prompt), T - len(answer)
        rows.append([pad] * left + prompt + answer + [pad] * right)
        masks.append([False] * left + [True] * (len(prompt) + len(answer)) + [False] * right)
    starts = [row * (P + T) + P for row in range(len(rows))]
    actions = [start + t for start, answer in zip(starts, ANSWERS, strict=True) for t in range(len(answer))]
    return torch.tensor(rows), torch.tensor(masks), torch.tensor(actions)


def by_row(x_N: Tensor) -> tuple[Tensor, ...]:
    """Each answer's part of what a model says of the actions."""
    return x_N.split([len(answer) for answer in ANSWERS])


def by_prefixes(policy: PreTrainedModel, value_of: Callable[[list[int]], float]) -> list[list[tuple[float, ...]]]:
    """For each answer token (log-prob, entropy, value), one unpadded prefix at a time: the definition."""
    rows = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        row = []
        for t, token in enumerate(answer):
            prefix = prompt + answer[:t]
            logits_V = policy(torch.tensor([prefix])).logits[0, -1] / TEMPERATURE
            logp_V = logits_V.log_softmax(-1)
            row.append((logp_V[token].item(), -(logp_V.exp() * logp_V).sum().item(), value_of(prefix)))
        rows.append(row)
    return rows


def with_random_head(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        classification_head(model).weight.normal_(std=0.5)
        classification_head(model).bias.fill_(0.25)
    return model


@pytest.fixture
def policy(tiny_causal_lm: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_causal_lm(seed=1).double()


@pytest.fixture
def value_model(policy: PreTrainedModel, tiny_causal_lm: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    other = tiny_causal_lm(seed=2).double()
    model = build_value_model(PPOConfig(), ModelConfig(), policy=other)
    assert model is not None
    return with_random_head(model).double()


@torch.no_grad()
@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_every_output_belongs_to_the_action_that_emitted_the_token(
    policy: PreTrainedModel, value_model: PreTrainedModel, chunk_tokens: int | None
) -> None:
    output = ActorCritic(policy, value_model, chunk_tokens=chunk_tokens)(*batch(), temperature=TEMPERATURE)
    truth = by_prefixes(policy, lambda prefix: value_model(torch.tensor([prefix])).logits[0, -1, 0].item())
    for b, row in enumerate(truth):
        for t, expected in enumerate(row):
            found = tuple(by_row(x_N)[b][t] for x_N in (output.logprobs_N, output.entropy_N, output.values_N))
            torch.testing.assert_close(torch.stack(found), torch.tensor(expected, dtype=torch.float64))


@torch.no_grad()
def test_a_shared_value_is_the_heads_view_of_the_policys_last_hidden_state(policy: PreTrainedModel) -> None:
    actor_critic = ActorCritic(policy, None)
    head = actor_critic.value_head
    assert head is not None
    head.weight.normal_(std=0.5)
    output = actor_critic(*batch(), temperature=TEMPERATURE)
    truth = by_prefixes(
        policy, lambda prefix: head(policy.model(torch.tensor([prefix])).last_hidden_state[0, -1]).item()
    )
    for b, row in enumerate(truth):
        for t, expected in enumerate(row):
            found = tuple(by_row(x_N)[b][t] for x_N in (output.logprobs_N, output.entropy_N, output.values_N))
            torch.testing.assert_close(torch.stack(found), torch.tensor(expected, dtype=torch.float64))


@torch.no_grad()
@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_the_exact_kl_is_the_sum_over_the_vocabulary(
    policy: PreTrainedModel,
    value_model: PreTrainedModel,
    tiny_causal_lm: Callable[..., PreTrainedModel],
    chunk_tokens: int | None,
) -> None:
    reference = tiny_causal_lm(seed=3).double()
    actor_critic = ActorCritic(policy, value_model, chunk_tokens=chunk_tokens)
    output = actor_critic(*batch(), temperature=TEMPERATURE, reference=reference)
    plain_N = actor_critic.reference_logprobs(reference, *batch(), temperature=TEMPERATURE)
    for b, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        for t, token in enumerate(answer):
            prefix = torch.tensor([prompt + answer[:t]])
            logp_V = (policy(prefix).logits[0, -1] / TEMPERATURE).log_softmax(-1)
            logq_V = (reference(prefix).logits[0, -1] / TEMPERATURE).log_softmax(-1)
            torch.testing.assert_close(by_row(output.kl_N)[b][t], (logp_V.exp() * (logp_V - logq_V)).sum())
            torch.testing.assert_close(by_row(output.ref_logprobs_N)[b][t], logq_V[token])
            torch.testing.assert_close(by_row(plain_N)[b][t], logq_V[token])


@torch.no_grad()
def test_padding_changes_nothing_whatever_its_width_and_its_ids(
    policy: PreTrainedModel, value_model: PreTrainedModel
) -> None:
    actor_critic = ActorCritic(policy, value_model)
    narrow = actor_critic(*batch(), temperature=TEMPERATURE)
    wide = actor_critic(*batch(extra_left=4, extra_right=3, pad=77), temperature=TEMPERATURE)
    for name in ("logprobs_N", "entropy_N", "values_N"):
        torch.testing.assert_close(getattr(wide, name), getattr(narrow, name))


@torch.no_grad()
def test_gpt2_with_learned_positions_counts_them_from_the_first_real_token(
    tiny_gpt2: Callable[..., PreTrainedModel],
) -> None:
    policy = tiny_gpt2(seed=4).double()
    output = ActorCritic(policy, None)(*batch(extra_left=3), temperature=TEMPERATURE)
    for b, row in enumerate(by_prefixes(policy, lambda _: 0.0)):
        for t, (logprob, _, _) in enumerate(row):
            assert by_row(output.logprobs_N)[b][t].item() == pytest.approx(logprob, abs=1e-12)


def test_chunked_logits_give_the_same_gradients(
    tiny_causal_lm: Callable[..., PreTrainedModel], value_model: PreTrainedModel
) -> None:
    gradients = []
    for chunk_tokens in (None, 3):
        actor_critic = ActorCritic(tiny_causal_lm(seed=1).double(), value_model, chunk_tokens=chunk_tokens)
        output = actor_critic(*batch(), temperature=TEMPERATURE)
        (output.logprobs_N + 0.3 * output.entropy_N).sum().backward()
        gradients.append([p.grad for p in actor_critic.policy_parameters()])
    assert all(g is not None and g.abs().sum() > 0 for g in gradients[0])
    for plain, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, plain)


@pytest.mark.parametrize("shared", [True, False])
def test_value_terms_alone_send_nothing_into_the_policy(
    policy: PreTrainedModel, value_model: PreTrainedModel, shared: bool
) -> None:
    actor_critic = ActorCritic(policy, None if shared else value_model)
    output = actor_critic(*batch(), temperature=1.0, terms="value")
    assert output.logprobs_N is None and output.entropy_N is None
    output.values_N.sum().backward()
    assert all(p.grad is None for p in actor_critic.policy_parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in actor_critic.value_parameters())


@pytest.mark.parametrize(("chunk_tokens", "shared", "passes"), [(None, False, 0), (4, False, 0), (4, True, 1)])
def test_value_terms_alone_read_the_policy_only_where_it_has_the_values_head(
    policy: PreTrainedModel, value_model: PreTrainedModel, chunk_tokens: int | None, shared: bool, passes: int
) -> None:
    actor_critic = ActorCritic(policy, None if shared else value_model, chunk_tokens=chunk_tokens)
    seen: list[object] = []
    policy.model.register_forward_pre_hook(lambda *_: seen.append(None))
    output = actor_critic(*batch(), temperature=TEMPERATURE, terms="value")
    assert output.logprobs_N is None and output.values_N is not None and len(seen) == passes


def test_policy_terms_alone_leave_the_value_model_out(policy: PreTrainedModel, value_model: PreTrainedModel) -> None:
    output = ActorCritic(policy, value_model)(*batch(), temperature=1.0, terms="policy")
    assert output.values_N is None and output.logprobs_N is not None


def test_logits_exist_for_actions_only(policy: PreTrainedModel, value_model: PreTrainedModel) -> None:
    shapes = []
    policy.lm_head.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape)))
    ActorCritic(policy, value_model)(*batch(), temperature=1.0)
    assert shapes == [(1, sum(map(len, ANSWERS)), policy.config.vocab_size)]


def test_dropout_is_off_in_training_too(tiny_gpt2: Callable[..., PreTrainedModel]) -> None:
    policy = tiny_gpt2(seed=5, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    actor_critic = ActorCritic(policy, None)
    still = actor_critic.eval()(*batch(), temperature=1.0).logprobs_N
    moving = actor_critic.train()(*batch(), temperature=1.0).logprobs_N
    torch.testing.assert_close(moving, still, rtol=0, atol=0)


def test_gradient_checkpointing_changes_memory_and_nothing_else(
    tiny_causal_lm: Callable[..., PreTrainedModel],
) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = tiny_causal_lm(seed=6).double()
        torch.manual_seed(0)
        critic = with_random_head(build_value_model(PPOConfig(), ModelConfig(), policy=policy))
        for model in (policy, critic) if checkpointing else ():
            enable_gradient_checkpointing(model)
        actor_critic = ActorCritic(policy, critic).train()
        assert policy.model.layers[0].gradient_checkpointing == checkpointing
        output = actor_critic(*batch(), temperature=1.0)
        (output.logprobs_N.sum() + output.values_N.sum()).backward()
        gradients.append([p.grad for p in actor_critic.parameters()])
        cached = policy.eval().generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)
        assert cached.shape[1] > 2
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_models_that_cap_their_logits_are_refused_where_the_hidden_states_are_read() -> None:
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 128, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    policy = Gemma2ForCausalLM(Gemma2Config(**small, **heads, final_logit_softcapping=0.5))
    with pytest.raises(ConfigError, match=r"capped or scaled.*ppo.chunk_tokens=null and ppo.value_model=separate"):
        ActorCritic(policy, None)
    value_model = build_value_model(PPOConfig(), ModelConfig(attn_implementation="eager"), policy=policy)
    capped = ActorCritic(policy.double(), value_model.double())(*batch(), temperature=TEMPERATURE)
    for found_N, row in zip(by_row(capped.logprobs_N), by_prefixes(policy, lambda _: 0.0), strict=True):
        torch.testing.assert_close(found_N, torch.tensor([logprob for logprob, _, _ in row], dtype=torch.float64))
    with pytest.raises(ConfigError, match="capped or scaled"):
        ActorCritic(policy, value_model, chunk_tokens=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_is_found_whatever_the_logits_of_two_tokens_are(dtype: torch.dtype) -> None:
    """In bfloat16 the difference that a cap of 30 makes to logits of some ten is within the rounding of the largest."""
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 128, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    for scale in (1, 40):
        torch.manual_seed(0)
        policy = Gemma2ForCausalLM(Gemma2Config(**small, **heads, final_logit_softcapping=30.0)).to(dtype)
        with torch.no_grad():
            policy.lm_head.weight.mul_(scale)
        value_model = build_value_model(PPOConfig(), ModelConfig(attn_implementation="eager"), policy=policy)
        for values, chunk_tokens in ((None, None), (value_model, 4)):
            with pytest.raises(ConfigError, match="capped or scaled"):
                ActorCritic(policy, values, chunk_tokens=chunk_tokens)
    policy.config.final_logit_softcapping = None
    ActorCritic(policy, None, chunk_tokens=4)


def test_the_policy_cannot_be_its_own_value_model(policy: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="pass None for a head on the policy"):
        ActorCritic(policy, policy)


def test_a_value_model_starts_from_the_model_that_value_init_names(
    tiny_causal_lm: Callable[..., PreTrainedModel],
) -> None:
    policy, config = tiny_causal_lm(seed=1), ModelConfig()
    reward_model = load_sequence_classifier(tiny_causal_lm(seed=2), config)
    discriminator = load_token_classifier(tiny_causal_lm(seed=3), config, id2label={0: "negative", 1: "positive"})
    with torch.no_grad():
        classification_head(reward_model).weight.normal_()
    for init, source, seed in (
        ("policy", policy, 1),
        ("reward_model", reward_model, 2),
        ("discriminator", discriminator, 3),
    ):
        model = build_value_model(
            PPOConfig(value_init=init),
            config,
            policy=policy,
            reward_model=reward_model,
            discriminator=discriminator,
        )
        assert model is not None and model.config.id2label == {0: "value"}
        expected = tiny_causal_lm(seed=seed).model.layers[0].mlp.up_proj.weight
        torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight, expected)
        head = classification_head(model).weight
        torch.testing.assert_close(
            head, classification_head(source).weight if init == "reward_model" else torch.zeros_like(head)
        )
    with pytest.raises(ConfigError, match=r"there is no such model in this run.*'policy'"):
        build_value_model(PPOConfig(value_init="reward_model"), config, policy=policy)
    assert build_value_model(PPOConfig(value_model="shared"), config, policy=policy) is None


@torch.no_grad()
def test_saved_models_load_anywhere(
    policy: PreTrainedModel, value_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ids_BL, _, _ = batch()
    ActorCritic(policy, value_model).save(tiny_tokenizer, tmp_path / "policy", tmp_path / "value")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    torch.testing.assert_close(loaded(ids_BL).logits, policy(ids_BL).logits)
    both = ActorCritic.load(ModelConfig(path=str(tmp_path / "policy")), tmp_path / "value")
    assert both.value_model is not None and both.value_model.config.id2label == {0: "value"}
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "value")
    torch.testing.assert_close(critic(ids_BL).logits, value_model(ids_BL).logits)


@torch.no_grad()
def test_a_shared_value_head_is_saved_and_loaded(
    policy: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    actor_critic = ActorCritic(policy, None)
    assert actor_critic.value_head is not None
    actor_critic.value_head.weight.normal_()
    actor_critic.save(tiny_tokenizer, tmp_path / "policy", tmp_path / "value")
    head = load_value_head(tmp_path / "value")
    loaded = ActorCritic.load(ModelConfig(path=str(tmp_path / "policy")), tmp_path / "value")
    found = loaded(*batch(), temperature=1.0).values_N
    torch.testing.assert_close(found.double(), actor_critic(*batch(), temperature=1.0).values_N, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.weight, actor_critic.value_head.weight, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="no value head in"):
        load_value_head(tmp_path / "policy")


def test_a_folder_holds_the_value_model_that_was_saved_last(
    policy: PreTrainedModel, value_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A head of an earlier training was loaded in place of the separate model that was written over it."""
    for critic in (None, value_model, None):
        ActorCritic(policy, critic).save(tiny_tokenizer, tmp_path / "policy", tmp_path / "value")
        loaded = ActorCritic.load(ModelConfig(path=str(tmp_path / "policy")), tmp_path / "value")
        assert (loaded.value_model is None) is (critic is None)
        assert (tmp_path / "value" / "config.json").exists() is (critic is not None)


def test_a_bfloat16_policy_has_a_float32_shared_head_and_float32_outputs(
    tiny_causal_lm: Callable[..., PreTrainedModel],
) -> None:
    actor_critic = ActorCritic(tiny_causal_lm(seed=1).bfloat16(), None)
    assert actor_critic.value_head is not None and actor_critic.value_head.weight.dtype == torch.float32
    output = actor_critic(*batch(), temperature=1.0)
    assert output.logprobs_N.dtype == output.values_N.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
def test_a_bfloat16_policy_that_has_not_moved_is_at_distance_zero(
    tiny_causal_lm: Callable[..., PreTrainedModel], shared: bool
) -> None:
    policy, reference = (tiny_causal_lm(seed=1).bfloat16() for _ in range(2))
    critic = None if shared else build_value_model(PPOConfig(), ModelConfig(dtype="bfloat16"), policy=policy)
    actor_critic = ActorCritic(policy, critic)
    own_N = actor_critic(*batch(), temperature=1.0).logprobs_N
    ref_N = actor_critic.reference_logprobs(reference, *batch(), temperature=1.0)
    torch.testing.assert_close(ref_N, own_N, rtol=0, atol=0)


# ---- a separate value model in bfloat16


def bfloat16_models(make: Callable[..., PreTrainedModel], init: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A policy, and the value model that `init` gives it; its head is random and holds no bfloat16 numbers."""
    config = ModelConfig(dtype="bfloat16")
    policy = make(seed=1).bfloat16()
    reward_model = load_sequence_classifier(make(seed=2).bfloat16(), config)
    with torch.no_grad():
        classification_head(reward_model).weight.normal_()
    value_model = build_value_model(
        PPOConfig(value_init=init),
        config,
        policy=policy,
        reward_model=reward_model,
        discriminator=load_token_classifier(make(seed=3).bfloat16(), config, id2label={0: "negative", 1: "positive"}),
    )
    assert value_model is not None
    if init == "reward_model":
        assert torch.equal(classification_head(value_model).weight, classification_head(reward_model).weight)
    return policy, with_random_head(value_model)


@torch.no_grad()
@pytest.mark.parametrize("init", ["policy", "reward_model", "discriminator"])
def test_values_of_a_bfloat16_value_model_are_float32_products_of_its_hidden_states(
    tiny_causal_lm: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, init: str
) -> None:
    policy, value_model = bfloat16_models(tiny_causal_lm, init)
    actor_critic = ActorCritic(policy, value_model)
    head = classification_head(value_model)
    assert value_model.dtype == torch.bfloat16 and head.weight.dtype == torch.float32
    ids_BL, mask_BL, actions_N = batch()
    values_N = actor_critic(ids_BL, mask_BL, actions_N, temperature=1.0).values_N
    assert values_N.dtype == torch.float32
    positions_BL = (mask_BL.long().cumsum(1) - 1).clamp(min=0)
    hidden_BLH = value_model.model(
        ids_BL[:, :-1], attention_mask=mask_BL[:, :-1].long(), position_ids=positions_BL[:, :-1]
    ).last_hidden_state
    truth_BL = (hidden_BLH.double() @ head.weight.double().t() + head.bias.double()).squeeze(-1)
    rows_N, columns_N = actions_N // ids_BL.shape[1], actions_N % ids_BL.shape[1]
    torch.testing.assert_close(values_N.double(), truth_BL[rows_N, columns_N - 1], rtol=1e-5, atol=1e-6)
    assert (values_N != values_N.bfloat16().float()).all()

    actor_critic.save(tiny_tokenizer, tmp_path / "policy", tmp_path / "value")
    own = ModelConfig(path=str(tmp_path / "policy"), dtype="bfloat16")
    loaded = ActorCritic.load(own, tmp_path / "value")
    assert torch.equal(loaded(ids_BL, mask_BL, actions_N, temperature=1.0).values_N, values_N)
    for (name, p), q in zip(actor_critic.named_parameters(), loaded.parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q), name


def test_a_value_model_that_comes_with_a_bfloat16_head_gets_a_float32_one(
    tiny_causal_lm: Callable[..., PreTrainedModel],
) -> None:
    policy = tiny_causal_lm(seed=1).bfloat16()
    plain = AutoModelForTokenClassification.from_config(policy.config, dtype=torch.bfloat16)
    weight = plain.score.weight.detach().clone()
    head = classification_head(ActorCritic(policy, plain).value_model)
    assert head.weight.dtype == torch.float32 and torch.equal(head.weight, weight.float())
