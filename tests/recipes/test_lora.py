"""Every recipe with adapters: what moves, what is saved, what resumes, and what the saved folders compute."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.ppo.helpers import PROMPTS, small_config, without_times
from tests.recipes.test_train_discriminator import edits
from tests.recipes.test_train_sft import PAIRS
from tlcr.config.schema import (
    Adapted,
    DiscriminatorConfig,
    DPOConfig,
    LoRAConfig,
    ModelConfig,
    RewardModelConfig,
    RunConfig,
    SFTConfig,
)
from tlcr.errors import CheckpointError
from tlcr.models.actor_critic import ActorCritic
from tlcr.models.loading import load_token_classifier
from tlcr.models.lora.adapters import add_adapter, base_parameters, own_parameters
from tlcr.models.lora.roles import Roles
from tlcr.models.preparing import enable_gradient_checkpointing
from tlcr.ppo.run import PPOResult
from tlcr.recipes.train_discriminator import train_discriminator
from tlcr.recipes.train_dpo import train_dpo
from tlcr.recipes.train_ppo import train_ppo
from tlcr.recipes.train_reward_model import train_reward_model
from tlcr.recipes.train_sft import train_sft
from tlcr.rewards.sources import CallableSource, DiscriminatorSource
from tlcr.rewards.sources.frozen_model import FrozenModel
from tlcr.training.callbacks import Callback
from tlcr.training.metrics import read_metrics

LM = Callable[..., PreTrainedModel]
ALONE: tuple[Adapted, ...] = ("sft", "reward_model", "dpo", "discriminator")
LOW_IDS = "tests.ppo.helpers:reward_low_ids"
IDS = torch.tensor([[5, 9, 30, 41, 17, 60, 2], [7, 44, 12, 90, 33, 23, 2]])


class StopAfter(Callback):
    """Ends a training at a step, as a power cut would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, step: int, metrics: Any) -> bool | None:
        if step == self.step:
            raise OSError("the power went out")
        return None


# ---- one model


def config(name: Adapted) -> RunConfig:
    values = {"epochs": 3, "batch_size": 3, "learning_rate": 5e-3, "save_every": 2, "weight_decay": 0.0}
    sections = {
        "sft": SFTConfig(**values),
        "reward_model": RewardModelConfig(**values),
        "dpo": DPOConfig(**values),
        "discriminator": DiscriminatorConfig(**values),
    }
    model = ModelConfig(path="named")
    return RunConfig(model=model, lora=LoRAConfig(rank=4, roles=(name, "policy")), **{name: sections[name]})


def train(name: Adapted, cfg: RunConfig, lm: PreTrainedModel, tokenizer: Any, folder: Path, **options: Any) -> Any:
    given: dict[str, Any] = {"tokenizer": tokenizer, "folder": folder / name, **options}
    if name == "discriminator":
        return train_discriminator(cfg, backbone=lm, train=edits(6, seed=1), held_out=edits(4, seed=2), **given)
    given |= {"train": PAIRS, "held_out": PAIRS[:2]}
    if name == "reward_model":
        return train_reward_model(cfg, backbone=lm, **given)
    return {"sft": train_sft, "dpo": train_dpo}[name](cfg, model=lm, **given)


AUTO = {
    "sft": AutoModelForCausalLM,
    "dpo": AutoModelForCausalLM,
    "reward_model": AutoModelForSequenceClassification,
    "discriminator": AutoModelForTokenClassification,
}


@pytest.mark.parametrize("name", ALONE)
def test_a_model_alone_learns_by_its_adapter_and_is_saved_whole(
    name: Adapted, tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lm = tiny_causal_lm()
    train(name, config(name), lm, tiny_tokenizer, tmp_path)
    losses = [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    saved = AUTO[name].from_pretrained(tmp_path / name).state_dict()
    before = tiny_causal_lm().state_dict()
    moved = {n for n in saved if n in before and not torch.equal(saved[n], before[n])}
    assert moved == {n for n in before if n.endswith("_proj.weight")}  # all linear layers, and nothing else
    adapter = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
    W, A, B = (
        before["model.layers.1.mlp.up_proj.weight"],
        adapter["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"],
        adapter["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"],
    )
    torch.testing.assert_close(saved["model.layers.1.mlp.up_proj.weight"], W + 32 / 4 * B @ A)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_dpo_in_four_bits_begins_at_its_reference(
    tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Both stand on the rounded weights, so that the first loss is log 2."""
    cfg = config("dpo")
    cfg = replace(cfg, lora=replace(cfg.lora, base_bits=4))
    train("dpo", cfg, tiny_causal_lm(hidden_size=64, intermediate_size=192), tiny_tokenizer, tmp_path)
    assert read_metrics(tmp_path / "dpo" / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("name", ALONE)
def test_a_training_by_an_adapter_resumes_bit_for_bit_from_a_checkpoint_without_the_frozen_weights(
    name: Adapted, tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    cfg = config(name)
    train(name, cfg, tiny_causal_lm(), tiny_tokenizer, tmp_path / "whole")
    with pytest.raises(OSError, match="power"):
        train(name, cfg, tiny_causal_lm(), tiny_tokenizer, tmp_path / "cut", callbacks=[StopAfter(3)])
    (file,) = (tmp_path / "cut").rglob("step-000002/model-model.safetensors")
    kept = set(load_file(file))
    assert len([key for key in kept if "lora_" in key]) == 28
    assert {key for key in kept if "lora_" not in key} <= {"score.weight", "score.bias"}
    with pytest.raises(CheckpointError, match="frozen"):
        train(name, cfg, tiny_causal_lm(seed=5), tiny_tokenizer, tmp_path / "cut", resume=True)
    train(name, cfg, tiny_causal_lm(), tiny_tokenizer, tmp_path / "cut", resume=True)
    whole, cut = (load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)


def test_a_model_that_is_not_named_is_trained_whole(
    tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plain = RunConfig(model=ModelConfig(path="named"), sft=SFTConfig(epochs=1, batch_size=3, learning_rate=1e-2))
    for run, lora in (("plain", LoRAConfig()), ("other", LoRAConfig(rank=4, roles=("policy", "discriminator")))):
        train("sft", replace(plain, lora=lora), tiny_causal_lm(), tiny_tokenizer, tmp_path / run)
    one, other = (load_file(tmp_path / run / "sft" / "model.safetensors") for run in ("plain", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not (tmp_path / "other" / "sft" / "adapter").exists()


# ---- PPO


class Run:
    """PPO with the roles of a tiny policy; the same weights every time."""

    def __init__(
        self,
        tiny_causal_lm: LM,
        tiny_tokenizer: PreTrainedTokenizerFast,
        *,
        seed: int = 1,
        prepare: Any = None,
        shared: bool = False,
    ) -> None:
        lm = tiny_causal_lm(seed=seed)
        if prepare is not None:
            lm = prepare(lm)
        self.plain = copy.deepcopy(lm)
        self.tokenizer = tiny_tokenizer
        self.roles = Roles(lm, LoRAConfig(rank=4), seed=0)
        value = None if shared else self.roles.classifier("value", {0: "value"})
        self.actor_critic = ActorCritic(self.roles.policy, value)

    def train(self, folder: Path, cfg: RunConfig | None = None, **options: Any) -> PPOResult:
        cfg = cfg or ppo_config()
        given = options if "reward_source" in options else {**options, "reward_source": CallableSource(LOW_IDS)}
        return train_ppo(
            cfg,
            actor_critic=self.actor_critic,
            reference=self.roles.reference,
            tokenizer=self.tokenizer,
            prompts=PROMPTS,
            folder=folder,
            seed=3,
            **given,
        )

    def trained(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.actor_critic.named_parameters() if p.requires_grad}

    def logits(self, model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=IDS).logits


def ppo_config(**ppo: Any) -> RunConfig:
    return replace(small_config(learning_rate=1e-2, value_learning_rate=1e-2, **ppo), lora=LoRAConfig(rank=4))


@pytest.fixture
def make(tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Run]:
    return lambda **options: Run(tiny_causal_lm, tiny_tokenizer, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ppo_moves_the_adapters_of_policy_and_value_model_and_no_bit_of_the_base(
    make: Callable[..., Run], tmp_path: Path, dtype: torch.dtype
) -> None:
    run = make(prepare=lambda lm: lm.to(dtype))
    before = run.trained()
    result = run.train(tmp_path)
    frozen = dict(base_parameters(run.actor_critic.policy))
    wanted = dict(run.plain.named_parameters())
    assert frozen.keys() == wanted.keys()
    assert all(torch.equal(weight, wanted[name]) for name, weight in frozen.items())
    assert torch.equal(run.logits(run.roles.reference), run.logits(run.plain))
    after = run.trained()
    assert {name for name in after if torch.equal(after[name], before[name])} == set()
    assert len(after) == 28 + 28 + 2
    first, last = (read_metrics(tmp_path / "metrics.jsonl")[i] for i in (0, -1))
    assert first["kl/per_token"] == 0 and last["kl/per_token"] != 0
    assert result.updates == 4


def test_gradient_checkpointing_trains_the_same_adapters(make: Callable[..., Run], tmp_path: Path) -> None:
    def checkpointed(lm: PreTrainedModel) -> PreTrainedModel:
        enable_gradient_checkpointing(lm.double())
        return lm

    plain, other = make(prepare=PreTrainedModel.double), make(prepare=checkpointed)
    plain.train(tmp_path / "plain")
    other.train(tmp_path / "checkpointed")
    one, two = plain.trained(), other.trained()
    assert all(torch.allclose(one[name], two[name], rtol=1e-9, atol=1e-12) for name in one)


def test_packed_rows_train_the_same_adapters(make: Callable[..., Run], tmp_path: Path) -> None:
    padded, packed = make(prepare=PreTrainedModel.double), make(prepare=PreTrainedModel.double)
    padded.train(tmp_path / "padded")
    packed.train(tmp_path / "packed", ppo_config(packing="always"))
    one, two = padded.trained(), packed.trained()
    assert all(torch.allclose(one[name], two[name], rtol=1e-7, atol=1e-9) for name in one)


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(make: Callable[..., Run], tmp_path: Path) -> None:
    whole, cut, resumed = make(), make(), make()
    whole.train(tmp_path / "whole")
    with pytest.raises(OSError, match="power"):
        cut.train(tmp_path / "cut", callbacks=[StopAfter(3)])
    (file,) = (tmp_path / "cut").rglob("step-000002/model-actor_critic.safetensors")
    assert len(load_file(file)) == 28 + 28 + 2  # neither the base nor what it stands under
    resumed.train(tmp_path / "cut", resume=True)
    one, two = whole.trained(), resumed.trained()
    assert all(torch.equal(one[name], two[name]) for name in one)
    rows = [[without_times(row) for row in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("whole", "cut")]
    assert rows[0] == rows[1]


def test_a_run_is_not_resumed_on_another_base_nor_with_other_adapters(make: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(OSError, match="power"):
        make().train(tmp_path, callbacks=[StopAfter(3)])
    with pytest.raises(CheckpointError, match="frozen"):
        make(seed=2).train(tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="lora"):
        make().train(tmp_path, replace(ppo_config(), lora=LoRAConfig(rank=4, alpha=8)), resume=True)


def test_a_finished_run_is_loaded_with_its_adapters_as_they_were(make: Callable[..., Run], tmp_path: Path) -> None:
    run, again = make(), make()
    run.train(tmp_path)
    again.train(tmp_path, resume=True)
    one, two = run.trained(), again.trained()
    assert all(torch.equal(one[name], two[name]) for name in one)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    torch.testing.assert_close(run.logits(merged), run.logits(run.roles.policy), rtol=1e-4, atol=1e-5)
    value = AutoModelForTokenClassification.from_pretrained(tmp_path / "value")
    wanted = run.logits(run.actor_critic.value_model)
    torch.testing.assert_close(run.logits(value), wanted, rtol=1e-4, atol=1e-5)


def test_a_shared_value_head_stands_on_the_policys_role(make: Callable[..., Run], tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        run = make(shared=True)
        run.train(tmp_path, ppo_config(value_model="shared"), resume=True)
        runs.append(run.trained())
    assert len(runs[0]) == 28 + 2
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_discriminator_on_the_same_base_rewards_as_it_does_alone(
    make: Callable[..., Run], tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The whole run, to the bit, whether the discriminator is a role or a model of its own."""

    def discriminated(run: Run, model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
        source = DiscriminatorSource(FrozenModel(model, tiny_tokenizer, tiny_tokenizer, max_prompt_tokens=8))
        run.train(
            folder,
            replace(ppo_config(), reward=replace(ppo_config().reward, kind="continuous", callable=None)),
            reward_source=source,
        )
        return run.trained()

    train("discriminator", config("discriminator"), tiny_causal_lm(seed=1), tiny_tokenizer, tmp_path)
    role, alone = make(), make()
    joined = role.roles.load_classifier("discriminator", tmp_path / "discriminator" / "adapter")
    own = load_token_classifier(tiny_causal_lm(seed=1), ModelConfig(), id2label={0: "negative", 1: "positive"})
    add_adapter(own, LoRAConfig(rank=4), "discriminator", seed=0)
    with torch.no_grad():
        for parameter, trained in zip(
            (p for p in own.parameters() if p.requires_grad), own_parameters(joined), strict=True
        ):
            parameter.copy_(trained)
    before = [parameter.clone() for parameter in own_parameters(joined)]
    one = discriminated(role, joined, tmp_path / "role")
    two = discriminated(alone, own, tmp_path / "alone")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(a, b) for a, b in zip(before, own_parameters(joined), strict=True))
    row = read_metrics(tmp_path / "role" / "metrics.jsonl")[-1]
    assert row["reward/mean_score"] != 0
