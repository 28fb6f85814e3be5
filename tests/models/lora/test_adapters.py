"""Adapters: what a layer computes, what is trained, roles over one backbone, what is written, and how peft reads it.

The tests whose names begin with ``test_peft_alone`` show what goes wrong without the precautions of
``tlcr.models.lora.roles``: should one of them fail, that precaution may have become needless.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.ppo.helpers import known_rollout, known_update
from tlcr import ops
from tlcr.config.schema import LoRAConfig, ModelConfig
from tlcr.errors import CheckpointError, ConfigError
from tlcr.models.actor_critic import ActorCritic, PolicyOutput
from tlcr.models.heads import backbone
from tlcr.models.loading import load_sequence_classifier, load_token_classifier
from tlcr.models.lora.adapters import add_adapter, base_digest, own_named_parameters, own_parameters
from tlcr.models.lora.files import attach_adapter, load_adapter, merged_weights, save_adapter, save_trained
from tlcr.models.lora.peft_layers import adapted_layers
from tlcr.models.lora.roles import REFERENCE, Roles
from tlcr.models.preparing import enable_gradient_checkpointing
from tlcr.ppo.microbatches import MicroBatches
from tlcr.training.optim import build_optimizer, parameter_groups

Make = Callable[..., PreTrainedModel]
CFG = LoRAConfig(rank=4)
IDS = torch.tensor([[5, 9, 30, 41, 17, 60, 2], [7, 44, 12, 90, 33, 23, 2]])
MASK = torch.ones_like(IDS)


def randomised(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Random numbers in an adapter and head that have zeros, so that they change the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in own_named_parameters(model).values():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def hidden(model: PreTrainedModel) -> Tensor:
    return backbone(model)(input_ids=IDS, attention_mask=MASK, use_cache=False).last_hidden_state


class Four:
    """The four roles of PPO, with adapters that change something, and the model as it was."""

    def __init__(self, lm: PreTrainedModel, cfg: LoRAConfig = CFG) -> None:
        self.plain = copy.deepcopy(lm)
        self.roles = Roles(lm, cfg, seed=0)
        self.policy = randomised(self.roles.policy, 1)
        self.value = randomised(self.roles.classifier("value", {0: "value"}), 2)
        self.discriminator = randomised(self.roles.classifier("discriminator", {0: "negative", 1: "positive"}), 3)
        for parameter in own_parameters(self.discriminator):
            parameter.requires_grad_(False)
        self.reference = self.roles.reference
        self.actor_critic = ActorCritic(self.policy, self.value)

    def loss(self, terms: str = "both") -> Tensor:
        """PPO's loss on a known update."""
        rollout = known_rollout()
        scores, advantages = known_update(rollout)
        ((batch,),) = MicroBatches(rollout, rows=None, tokens=None).split()
        tokens = batch.ids_BL, batch.attention_mask_BL, batch.actions_N
        output = PolicyOutput(None, None, None, None)
        if terms != "none":
            output = self.actor_critic(*tokens, temperature=1.0, terms=terms)
        take = batch.take
        old_BT = take(scores.logprobs_BT)
        values_BT = None if output.values_N is None else batch.spread(output.values_N)
        return ops.ppo_loss(
            old_BT if output.logprobs_N is None else batch.spread(output.logprobs_N),
            old_BT,
            take(advantages.advantages_BT),
            batch.mask_BT,
            values=values_BT,
            old_values=None if values_BT is None else take(scores.values_BT),
            returns=None if values_BT is None else take(advantages.returns_BT),
        ).loss

    def gradients(self) -> dict[str, Tensor]:
        """All gradients, which are then forgotten."""
        found = {n: p.grad.clone() for n, p in self.actor_critic.named_parameters() if p.grad is not None}
        self.actor_critic.zero_grad(set_to_none=True)
        return found

    def apart(self) -> dict[str, Tensor]:
        """The gradients of one role at a time, each in its own call of the loss."""
        self.loss("policy").backward()
        self.loss("value").backward()
        return self.gradients()


@pytest.fixture
def four(tiny_causal_lm: Make) -> Four:
    return Four(tiny_causal_lm().double())


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative difference of two sets of gradients of the same parameters."""
    assert found.keys() == wanted.keys()
    return max(float((found[n] - wanted[n]).norm() / (wanted[n].norm() + 1e-12)) for n in wanted)


# ---- one layer


def set_by_hand(model: PreTrainedModel, name: str) -> Any:
    """The first layer's k_proj (16 outputs, 32 inputs) with A that reads inputs 0 and 1, and B that writes output 0."""
    layer = backbone(model).get_submodule("layers.0.self_attn.k_proj")
    with torch.no_grad():
        for _, each in adapted_layers(model, name):
            each.lora_A[name].weight.zero_()
            each.lora_B[name].weight.zero_()
        layer.lora_A[name].weight[0, 0], layer.lora_A[name].weight[1, 1] = 3.0, 5.0
        layer.lora_B[name].weight[0, 0], layer.lora_B[name].weight[0, 1] = 2.0, -1.0
    return layer


def test_a_layer_adds_the_scaled_product_of_two_matrices(tiny_causal_lm: Make) -> None:
    model = tiny_causal_lm()
    add_adapter(model, LoRAConfig(rank=2, alpha=3.0), "policy", seed=0)
    layer = set_by_hand(model, "policy")
    x_H = torch.zeros(32)
    x_H[0], x_H[1] = 7.0, 11.0
    with torch.no_grad():
        added = layer(x_H) - layer.base_layer(x_H)
    # alpha / rank = 1.5;  A x = (3 * 7, 5 * 11) = (21, 55);  B A x = 2 * 21 - 55 = -13 in output 0 alone
    assert added[0].item() == pytest.approx(1.5 * -13, rel=1e-5)
    assert added[1:].abs().max() == 0


def test_merging_adds_in_float32_and_rounds_once(tiny_causal_lm: Make) -> None:
    model = tiny_causal_lm().bfloat16()
    add_adapter(model, LoRAConfig(rank=2, alpha=2.0), "policy", seed=0)
    layer = set_by_hand(model, "policy")
    with torch.no_grad():
        layer.base_layer.weight[0, 0] = 1.0  # bfloat16 has steps of 1/128 from 1 to 2
        layer.lora_A["policy"].weight[0, 0], layer.lora_B["policy"].weight[0, 0] = 1.0, 0.0156  # just below 2 steps
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
    merged = merged_weights(model)["model.layers.0.self_attn.k_proj.weight"]
    assert merged.dtype == torch.bfloat16
    assert merged[0, 0].item() == 1 + 2 / 128
    w = before["model.layers.0.self_attn.k_proj.base_layer.weight"][0, 1]
    assert merged[0, 1] == (w.float() - 5).bfloat16()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_an_untrained_adapter_changes_nothing(tiny_causal_lm: Make) -> None:
    model, plain = tiny_causal_lm(), tiny_causal_lm()
    add_adapter(model, CFG, "policy", seed=0)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


WITH_HEAD = LoRAConfig(rank=4, targets=("all-linear", "lm_head"))


def test_an_output_head_that_is_named_is_adapted_for_its_own_model_alone(
    tiny_causal_lm: Make, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plain = tiny_causal_lm()
    plain.save_pretrained(tmp_path / "base")
    roles = Roles(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), WITH_HEAD, seed=0)
    randomised(roles.policy)
    values = roles.classifier("value", {0: "value"})
    assert len(own_parameters(roles.policy)) == 28 + 2 and len(own_parameters(values)) == 28 + 2
    save_trained(roles.policy, tiny_tokenizer, tmp_path / "policy")
    attached = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    attach_adapter(attached, tmp_path / "policy" / "adapter")
    adapted = loaded_by_peft(copy.deepcopy(plain), tmp_path / "policy" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    with torch.no_grad():
        wanted = roles.policy(input_ids=IDS).logits
        assert torch.equal(roles.reference(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        body = hidden(roles.policy)
        assert not torch.allclose(wanted, plain.lm_head(body))  # the head's adapter is a part of it
        for model in (attached, adapted, merged):
            torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(merged_weights(attached)["lm_head.weight"], merged.lm_head.weight)


def test_chunks_of_logits_read_an_adapted_head_as_whole_logits_do(tiny_causal_lm: Make) -> None:
    found = []
    for chunk in (None, 3):
        roles = Roles(tiny_causal_lm().double(), WITH_HEAD, seed=0)
        randomised(roles.policy)
        actor_critic = ActorCritic(roles.policy, None, chunk_tokens=chunk)
        actions = torch.tensor([2, 3, 4, 9, 10])
        output = actor_critic(IDS, MASK.bool(), actions, temperature=0.7, reference=roles.reference)
        (output.logprobs_N.sum() + output.kl_N.sum()).backward()
        gradients = {n: p.grad for n, p in roles.policy.named_parameters() if p.grad is not None}
        assert {"lm_head.lora_A.policy.weight", "lm_head.lora_B.policy.weight"} < gradients.keys()
        found.append((output, gradients))
    (whole, truth), (chunks, ours) = found
    torch.testing.assert_close(chunks.logprobs_N, whole.logprobs_N)
    torch.testing.assert_close(chunks.ref_logprobs_N, whole.ref_logprobs_N)
    assert ours.keys() == truth.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, truth[name], rtol=1e-6, atol=1e-9)


def test_chunks_of_logits_of_an_adapted_head_make_no_matrix_of_its_size(tiny_causal_lm: Make) -> None:
    """Neither the sum of the head's matrix and its adapter's, nor that matrix's gradient."""
    roles = Roles(tiny_causal_lm(vocab_size=5000), WITH_HEAD, seed=0)
    randomised(roles.policy)
    actor_critic = ActorCritic(roles.policy, None, chunk_tokens=3)
    actions = torch.tensor([2, 3, 4, 9, 10])
    with Sizes(roles.policy) as sizes:
        output = actor_critic(IDS, MASK.bool(), actions, temperature=0.7, reference=roles.reference)
        (output.logprobs_N.sum() + output.kl_N.sum()).backward()
    assert 3 * 5000 <= sizes.largest < 5000 * 32  # the logits of a chunk


class Sizes(TorchDispatchMode):
    """Counts the elements of the largest tensor that an operator makes beside the parameters and views of them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
        return result


def test_an_output_head_that_is_the_embedding_too_is_not_adapted(tiny_causal_lm: Make) -> None:
    model = tiny_causal_lm()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ConfigError, match=r"lora.targets names lm_head, but .* the output head is the embedding"):
        add_adapter(model, WITH_HEAD, "policy", seed=0)


def test_the_seed_and_the_name_decide_the_first_weights_and_no_other_random_number(tiny_causal_lm: Make) -> None:
    def first(name: str, seed: int, draws: int) -> Tensor:
        model = tiny_causal_lm()
        torch.rand(draws)
        state = torch.get_rng_state()
        add_adapter(model, CFG, name, seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    same = first("policy", 0, draws=1)
    assert torch.equal(same, first("policy", 0, draws=5))
    assert not torch.equal(same, first("policy", 1, draws=1))
    assert not torch.equal(same, first("value", 0, draws=1))
    # uniform in +-1/sqrt(inputs), as nn.Linear's
    assert same[: 4 * 32].abs().max() <= 32**-0.5


@pytest.mark.parametrize("head", [False, True])
def test_adapter_and_head_are_trained_in_float32_by_plain_adamw(tiny_causal_lm: Make, head: bool) -> None:
    lm = tiny_causal_lm().bfloat16()
    model = load_token_classifier(lm, ModelConfig(), id2label={0: "negative", 1: "positive"}) if head else lm
    add_adapter(model, CFG, "discriminator", seed=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # 2 layers of 7 linear layers, A and B each; the output head of the LM has no adapter
    assert len(trained) == 2 * 7 * 2 + (2 if head else 0)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    optimizer = build_optimizer(parameter_groups(model, learning_rate=1e-3, weight_decay=0.0))
    assert type(optimizer) is torch.optim.AdamW


def test_targets_name_layers(tiny_causal_lm: Make) -> None:
    model = tiny_causal_lm()
    add_adapter(model, LoRAConfig(rank=2, targets=("q_proj", "v_proj")), "policy", seed=0)
    assert {path.rpartition(".")[2] for path, _ in adapted_layers(model)} == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match=r"no linear layer named 'query'.*down_proj.*lora\.targets"):
        add_adapter(tiny_causal_lm(), LoRAConfig(rank=2, targets=("query",)), "policy", seed=0)


def test_without_peft_one_sentence_says_how_to_get_it(tiny_causal_lm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tlcr.models.lora.peft_layers.find_spec", lambda name: None if name == "peft" else find_spec(name)
    )
    monkeypatch.setattr("tlcr.distribution.install_command", lambda extra: f"pip install what {extra} needs")
    with pytest.raises(ConfigError, match=r"lora\.rank needs the package peft, .* pip install what lora needs$"):
        add_adapter(tiny_causal_lm(), CFG, "policy", seed=0)


# ---- roles


def test_the_reference_is_the_untouched_model_bit_for_bit_and_the_roles_differ(four: Four) -> None:
    with torch.no_grad():
        for _ in range(2):  # and after other roles ran
            assert torch.equal(four.reference(input_ids=IDS).logits, four.plain(input_ids=IDS).logits)
            states = [hidden(m) for m in (four.reference, four.policy, four.value, four.discriminator)]
    assert all(not torch.equal(a, b) for i, a in enumerate(states) for b in states[:i])


def test_all_roles_share_one_copy_of_the_weights(four: Four) -> None:
    models = four.policy, four.value, four.discriminator, four.reference
    own = {p.untyped_storage().data_ptr() for m in models for p in own_parameters(m)}
    all_of_them = {p.untyped_storage().data_ptr() for m in models for p in m.parameters()}
    assert len(all_of_them) - len(own) == len(list(four.plain.parameters()))
    assert own_parameters(four.reference) == []
    assert len(own) == 3 * 28 + 2 * 2  # three adapters, two heads


def test_a_role_alone_is_a_model_with_that_adapter_alone(four: Four) -> None:
    """Each role against another model, which has no role but its merged weights."""
    alone = copy.deepcopy(four.plain)
    alone.load_state_dict(merged_weights(four.policy))
    with torch.no_grad():
        torch.testing.assert_close(four.policy(input_ids=IDS).logits, alone(input_ids=IDS).logits)
        value = four.value(input_ids=IDS).logits
        whole = load_token_classifier(four.plain, ModelConfig(), id2label={0: "value"})
        whole.load_state_dict(merged_weights(four.value))
        torch.testing.assert_close(value, whole(input_ids=IDS).logits)


def test_gradients_of_one_loss_are_those_of_one_role_at_a_time(four: Four) -> None:
    """Two calls of ppo_loss, whose sum is the loss that is fused."""
    apart = four.apart()
    assert {".policy." in name or ".value." in name or "score" in name for name in apart} == {True}
    assert len(apart) == 28 + 28 + 2
    four.loss("both").backward()
    assert worst(four.gradients(), apart) == 0
    with torch.no_grad():
        both, policy, value = (four.loss(terms) for terms in ("both", "policy", "value"))
        # without the policy's log-probs its term is that of ratios of 1, a constant
        assert (policy + value - four.loss("none")).item() == pytest.approx(both.item(), rel=1e-12)


def test_no_switch_changes_what_is_trained(four: Four) -> None:
    before = {name: p.requires_grad for name, p in four.actor_critic.named_parameters()}
    for role in ("value", REFERENCE, "discriminator", "policy"):
        with four.roles.as_role(role):
            assert four.roles.role == role
    assert {name: p.requires_grad for name, p in four.actor_critic.named_parameters()} == before
    assert any(before.values()) and not all(before.values())


def test_a_role_ends_where_its_block_fails(four: Four) -> None:
    with four.roles.as_role("policy"):
        with pytest.raises(ZeroDivisionError), four.roles.as_role("value"):
            raise ZeroDivisionError
        assert four.roles.role == "policy"


def test_peft_alone_takes_the_gradient_from_the_adapter_that_it_leaves(four: Four) -> None:
    def call(role: str) -> Tensor:
        for layer in four.roles._layers:
            layer.set_adapter(role)
        return four.roles._shared(input_ids=IDS).last_hidden_state.sum()

    (call("policy") + call("value")).backward()
    names = four.gradients()
    assert not any(".policy." in name for name in names)
    assert any(".value." in name for name in names)


def checkpointed(four: Four, contexts: Any) -> None:
    four.actor_critic.train()  # transformers recomputes in training alone
    enable_gradient_checkpointing(four.policy, contexts)


def test_peft_alone_computes_wrong_gradients_with_gradient_checkpointing(four: Four) -> None:
    apart = four.apart()
    checkpointed(four, None)
    four.loss("both").backward()
    assert worst(four.gradients(), apart) > 0.1
    # right while each backward pass follows its own forward pass
    assert worst(four.apart(), apart) == 0


def test_with_gradient_checkpointing_each_layer_is_repeated_in_its_role(tiny_causal_lm: Make) -> None:
    plain, lm = Four(tiny_causal_lm().double()), tiny_causal_lm().double()
    enable_gradient_checkpointing(lm)  # as model.gradient_checkpointing does, before there are roles
    four = Four(lm)
    four.actor_critic.train()
    apart = plain.apart()
    four.loss("both").backward()
    assert worst(four.gradients(), apart) == 0
    loss = four.loss("both")
    with torch.no_grad():
        hidden(four.reference)  # another role is active when the backward pass begins
    loss.backward()
    assert worst(four.gradients(), apart) == 0


def test_peft_alone_leaves_another_base_after_merging_and_unmerging(tiny_causal_lm: Make) -> None:
    four = Four(tiny_causal_lm().bfloat16())
    before = {path: layer.base_layer.weight.clone() for path, layer in adapted_layers(four.policy)}
    save_all = merged_weights(four.policy), merged_weights(four.value)
    assert save_all
    after = {path: layer.base_layer.weight for path, layer in adapted_layers(four.policy)}
    assert all(torch.equal(weight, before[path]) for path, weight in after.items())
    for layer in four.roles._layers:
        layer._disable_adapters = False
        layer.merge(adapter_names=["policy"])
        layer.unmerge()
    changed = sum(int((weight != before[path]).sum()) for path, weight in after.items())
    assert changed > 0.01 * sum(weight.numel() for weight in before.values())


def test_sampling_is_the_policys(four: Four) -> None:
    alone = copy.deepcopy(four.plain)
    alone.load_state_dict(merged_weights(four.policy))
    settings = {"attention_mask": MASK, "max_new_tokens": 12, "do_sample": False}
    hidden(four.value)
    sampled = four.policy.generate(IDS, **settings)
    assert torch.equal(sampled, alone.generate(IDS, **settings))
    assert not torch.equal(sampled, four.plain.generate(IDS, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt2_has_transposed_weights(tiny_gpt2: Make, dtype: torch.dtype) -> None:
    four = Four(tiny_gpt2().to(dtype))
    with torch.no_grad():
        assert torch.equal(four.reference(input_ids=IDS).logits, four.plain(input_ids=IDS).logits)
        alone = copy.deepcopy(four.plain)
        alone.load_state_dict(merged_weights(four.policy))
        wanted, found = four.policy(input_ids=IDS).logits, alone(input_ids=IDS).logits
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert not torch.equal(found, four.plain(input_ids=IDS).logits)


# ---- folders


@pytest.fixture
def base(tmp_path: Path, tiny_causal_lm: Make, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "base"
    tiny_causal_lm().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def trained(base: Path) -> Callable[[], Four]:
    return lambda: Four(AutoModelForCausalLM.from_pretrained(base).eval())


def loaded_by_peft(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    with warnings.catch_warnings():
        # peft 0.21 asks for a property that transformers 5.23 renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return peft.PeftModel.from_pretrained(model, folder).eval()


def test_peft_loads_the_policys_adapter(tmp_path: Path, base: Path, trained: Callable[[], Four]) -> None:
    four = trained()
    save_adapter(four.policy, tmp_path / "adapter")
    assert set(os.listdir(tmp_path / "adapter")) == {"adapter_config.json", "adapter_model.safetensors", "base.json"}
    theirs = loaded_by_peft(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=IDS).logits, four.policy(input_ids=IDS).logits)
        assert not torch.equal(theirs(input_ids=IDS).logits, four.reference(input_ids=IDS).logits)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == base and config["r"] == 4 and config["lora_alpha"] == 32
    assert config["lora_dropout"] == 0


@pytest.mark.parametrize("role", ["value", "discriminator"])
def test_peft_loads_a_classifiers_adapter_with_its_head(
    tmp_path: Path, base: Path, trained: Callable[[], Four], role: str
) -> None:
    model = getattr(trained(), role)
    save_adapter(model, tmp_path / "adapter")
    new = AutoModelForTokenClassification.from_pretrained(base, num_labels=model.config.num_labels)
    theirs = loaded_by_peft(new, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_peft_loads_a_reward_models_adapter(tmp_path: Path, base: Path) -> None:
    model = load_sequence_classifier(AutoModelForCausalLM.from_pretrained(base), ModelConfig())
    add_adapter(model, CFG, "reward_model", seed=0)
    randomised(model)
    save_adapter(model, tmp_path / "adapter")
    new = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    theirs = loaded_by_peft(new, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_an_adapter_is_loaded_where_it_was_saved_from(tmp_path: Path, trained: Callable[[], Four]) -> None:
    four, again = trained(), trained()
    for role in ("policy", "value"):
        model, other = getattr(four, role), getattr(again, role)
        save_adapter(model, tmp_path / role)
        randomised(other, seed=9)
        load_adapter(other, tmp_path / role)
        with torch.no_grad():
            assert torch.equal(hidden(model), hidden(other))
    with pytest.raises(CheckpointError, match=r"does not fit .*2 of its weights .*score"):
        load_adapter(again.value, tmp_path / "policy")
    with pytest.raises(CheckpointError, match=r"no adapter in .*adapter_model.safetensors"):
        load_adapter(again.value, tmp_path)


def test_an_adapter_of_another_rank_does_not_fit(tmp_path: Path, trained: Callable[[], Four], base: Path) -> None:
    save_adapter(trained().policy, tmp_path / "adapter")
    wider = Four(AutoModelForCausalLM.from_pretrained(base), LoRAConfig(rank=5))
    with pytest.raises(CheckpointError, match=r"does not fit LlamaForCausalLM: 28 of its weights .* lora\.rank"):
        load_adapter(wider.policy, tmp_path / "adapter")


def test_a_discriminators_adapter_joins_the_roles_on_its_own_weights_alone(
    tmp_path: Path, base: Path, trained: Callable[[], Four], tiny_causal_lm: Make
) -> None:
    lm = AutoModelForCausalLM.from_pretrained(base)
    alone = load_token_classifier(lm, ModelConfig(), id2label={0: "negative", 1: "positive"})
    add_adapter(alone, LoRAConfig(rank=3, targets=("q_proj", "up_proj")), "discriminator", seed=0)
    randomised(alone)
    alone.config.tlcr_temperature = 1.75
    save_adapter(alone, tmp_path / "adapter")
    roles = Roles(AutoModelForCausalLM.from_pretrained(base), CFG, seed=0)
    joined = roles.load_classifier("discriminator", tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(joined(input_ids=IDS).logits, alone(input_ids=IDS).logits)
        assert torch.equal(roles.reference(input_ids=IDS).logits, lm(input_ids=IDS).logits)
    assert joined.config.tlcr_temperature == 1.75 and joined.config.id2label == {0: "negative", 1: "positive"}
    assert not any(p.requires_grad for p in own_parameters(joined))
    assert all(p.requires_grad for p in own_parameters(roles.policy))
    with pytest.raises(CheckpointError, match="was trained on other weights"):
        Roles(tiny_causal_lm(seed=7), CFG, seed=0).load_classifier("discriminator", tmp_path / "adapter")


def test_a_saved_model_is_whole_and_has_its_adapter_beside_it(
    tmp_path: Path, trained: Callable[[], Four], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    four = trained()
    save_trained(four.policy, tiny_tokenizer, tmp_path / "policy")
    save_trained(four.value, tiny_tokenizer, tmp_path / "value")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    value = AutoModelForTokenClassification.from_pretrained(tmp_path / "value")
    with torch.no_grad():
        torch.testing.assert_close(policy(input_ids=IDS).logits, four.policy(input_ids=IDS).logits)
        torch.testing.assert_close(value(input_ids=IDS).logits, four.value(input_ids=IDS).logits)
    again = copy.deepcopy(four.plain)
    attach_adapter(again, tmp_path / "policy" / "adapter")
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, four.policy(input_ids=IDS).logits)


def test_the_digest_is_of_the_backbones_weights_alone(tiny_causal_lm: Make) -> None:
    four = Four(tiny_causal_lm())
    models = four.plain, four.policy, four.value, four.reference
    assert len({base_digest(model) for model in models}) == 1
    with torch.no_grad():
        four.plain.lm_head.weight.add_(1)
    assert base_digest(four.plain) == base_digest(four.policy)
    with torch.no_grad():
        four.plain.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    assert base_digest(four.plain) != base_digest(four.policy)
    assert base_digest(tiny_causal_lm().bfloat16()) != base_digest(four.policy)


OTHER_KINDS = {
    "dora": peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]),
    "bias": peft.LoraConfig(r=2, bias="all", target_modules=["q_proj"]),
    "ia3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
}


@pytest.mark.parametrize("config", OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_adapters_of_other_kinds_are_refused(tmp_path: Path, tiny_causal_lm: Make, config: peft.PeftConfig) -> None:
    config.save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=r"is no plain LoRA .* merge it by peft's merge_and_unload"):
        attach_adapter(tiny_causal_lm(), tmp_path)
