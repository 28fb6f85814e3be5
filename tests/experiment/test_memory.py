"""Memory estimates against parameters counted by hand, real optimiser states and what autograd really keeps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PreTrainedModel

from tlcr.config.loading import load_config
from tlcr.config.schema import (
    Arm,
    LoRAConfig,
    ModelConfig,
    PPOConfig,
    RefreshConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)
from tlcr.data import embedded
from tlcr.errors import ConfigError
from tlcr.experiment.architecture import Architecture, Machine, ModelSize, build_on_meta, measure_model
from tlcr.experiment.memory import Estimate, estimate_run, ppo_roles, roles_of_a_process
from tlcr.experiment.remedy import remedy
from tlcr.experiment.simulation import Step
from tlcr.training.optim import build_optimizer

SIZE = ModelSize(parameters=1000, backbone=900, hidden=10)
CPU = Machine(gpu=False)


class Counted(Architecture):
    """Sizes as given; a step takes a byte for each token, twice as many with a reference, and 1000 for a new token."""

    def __init__(self, size: ModelSize = SIZE) -> None:
        self.size = size  # type: ignore[misc]

    def adapter(self, lora: LoRAConfig) -> int:
        return 7 * (lora.rank or 0)

    def peak(self, step: Step, cfg: RunConfig, machine: Machine) -> int:
        return 1000 if step.kind == "next token" else step.rows * step.columns * (2 if step.reference else 1)


def of_stage(estimates: list[Estimate], stage: str) -> Estimate:
    return next(estimate for estimate in estimates if estimate.stage == stage)


def test_a_llama_is_counted_as_by_hand_without_weights(tmp_path: Path) -> None:
    LlamaConfig(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)
    attention = 8 * 8 + 2 * (8 * 4) + 8 * 8  # queries, keys and values of two heads of width 2, output
    block = attention + 3 * 8 * 20 + 2 * 8  # gate, up and down; two norms
    backbone = 100 * 8 + 3 * block + 8
    assert measure_model(build_on_meta(ModelConfig(path=str(tmp_path)))) == ModelSize(
        parameters=backbone + 100 * 8,
        backbone=backbone,
        hidden=8,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_tied_embeddings_are_counted_once(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    size = measure_model(build_on_meta(ModelConfig(path=str(tmp_path))))
    assert size.parameters == size.backbone == 124_439_808  # the published size of GPT-2


def test_the_embedded_model_is_counted_as_it_is_built() -> None:
    model = embedded.build_model(embedded.build_tokenizer())
    size = measure_model(build_on_meta(ModelConfig(path="embedded")))
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.hidden == model.config.hidden_size


def test_a_model_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path .*give a folder that transformers can load"):
        measure_model(build_on_meta(ModelConfig(path=str(tmp_path))))


@pytest.mark.parametrize(("dtype", "bytes_per_parameter"), [("float32", 4 + 4 + 8), ("bfloat16", 2 + 2 + 8 + 2)])
def test_a_trained_model_takes_weights_gradients_moments_and_masters(dtype: str, bytes_per_parameter: int) -> None:
    cfg = load_config(None, {"model.dtype": dtype})
    assert of_stage(estimate_run(cfg, Counted(), CPU), "sft").roles[0].total == 1000 * bytes_per_parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_optimiser_keeps_what_is_estimated(
    dtype: torch.dtype, tiny_causal_lm: Callable[..., PreTrainedModel]
) -> None:
    """Moments and what the masters have beyond the parameters, as counted in the optimiser after a step."""
    model = tiny_causal_lm().to(dtype)
    count = sum(p.numel() for p in model.parameters())
    optimizer = build_optimizer([{"params": list(model.parameters()), "lr": 1e-3, "weight_decay": 0.0}])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = sum(
        value.numel() * value.element_size()
        for state in optimizer.state_dict()["state"].values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim > 0
    )
    cfg = load_config(None, {"model.dtype": str(dtype).removeprefix("torch.")})
    size = dataclasses.replace(SIZE, parameters=count)
    role = of_stage(estimate_run(cfg, Counted(size), CPU), "sft").roles[0]
    assert kept == role.optimizer


def test_ppo_at_its_peak_as_by_hand() -> None:
    cfg = RunConfig(
        data=dataclasses.replace(RunConfig().data, max_prompt_tokens=3),
        rollout=RolloutConfig(max_new_tokens=5, batch_size=7),
        ppo=PPOConfig(minibatch_size=4, micro_batch_size=2),
    )
    ppo = of_stage(estimate_run(cfg, Counted(), CPU), "ppo")
    kept = 12 * 1000 + 12 * (900 + 10)  # policy; value model with one output: weights and moments
    gradients = 4 * 1000 + 4 * (900 + 10)
    frozen = 4 * 1000 + 4 * (900 + 2 * 10)  # reference; discriminator with two
    assert {role.name for role in ppo.roles} == {"policy", "value model", "reference", "discriminator"}
    assert {phase.name: phase.allocated for phase in ppo.phases} == {
        "generation": 1000,
        "scoring": 7 * (3 + 5),
        "rewards": 7 * (3 + 5),
        "evaluation": 1000,
        "update": 2 * (3 + 5),
    }
    assert {phase.name: ppo.at(phase) for phase in ppo.phases}["generation"] == kept + frozen + 1000
    assert ppo.peak.name == "update" and ppo.total == kept + frozen + gradients + 2 * (3 + 5)


def test_an_evaluation_has_batches_of_its_own_and_the_exact_kl() -> None:
    class WithoutCache(Counted):
        def peak(self, step: Step, cfg: RunConfig, machine: Machine) -> int:
            return 0 if step.kind == "next token" else super().peak(step, cfg, machine)

    def taken(machine: Machine = CPU, **evaluation: int) -> dict[str, int]:
        cfg = load_config(None, {"data.max_prompt_tokens": 3, "rollout.max_new_tokens": 5, "rollout.batch_size": 7})
        cfg = dataclasses.replace(cfg, ppo=PPOConfig(batch_size=4, minibatch_size=4, packing="always"))
        cfg = dataclasses.replace(cfg, evaluation=dataclasses.replace(cfg.evaluation, **evaluation))
        ppo = of_stage(estimate_run(cfg, WithoutCache(), machine), "ppo")
        return {phase.name: phase.allocated for phase in ppo.phases}

    assert taken()["scoring"] == 4 * (3 + 5)  # a round has four answers
    assert taken()["evaluation"] == 2 * 7 * (3 + 5)  # held-out prompts are enough for a whole batch
    assert taken(prompts=5)["evaluation"] == 2 * 5 * (3 + 5)
    assert taken(Machine(gpu=True, processes=2), prompts=5)["evaluation"] == 2 * 3 * (3 + 5)


def test_a_refresh_trains_the_discriminator_by_its_own_batches_within_ppo() -> None:
    cfg = load_config(None, {"reward.refresh.every": 5, "discriminator.batch_size": 6, "ppo.minibatch_size": 2})
    cfg = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, max_prompt_tokens=3, max_answer_tokens=9),
        rollout=dataclasses.replace(cfg.rollout, max_new_tokens=5),
    )
    ppo = of_stage(estimate_run(cfg, Counted(), CPU), "ppo")
    refresh = next(phase for phase in ppo.phases if phase.name == "refresh")
    (discriminator,) = (role for role in ppo.roles if role.name == "discriminator")
    # both answers of six edits; the first step since gradients were freed makes its own
    assert refresh.allocated == max(0, 2 * 6 * (3 + 5) - discriminator.gradients) and refresh.with_gradients
    update = next(phase for phase in ppo.phases if phase.name == "update")
    others = sum(role.gradients for role in ppo.roles if role is not discriminator)
    assert update.allocated == max(0, 2 * (3 + 5) - others)


def test_the_log_ratio_of_dpo_has_all_logits_of_the_answers() -> None:
    class ByKind(Counted):
        def peak(self, step: Step, cfg: RunConfig, machine: Machine) -> int:
            return {"language model": 700, "token classifier": 300}.get(step.kind, 1)

    def rewards(**reward: Any) -> int:
        cfg = RunConfig(reward=RewardConfig(**reward))
        ppo = of_stage(estimate_run(cfg, ByKind(), CPU), "ppo")
        return next(phase for phase in ppo.phases if phase.name == "rewards").allocated

    assert (rewards(kind="dpo"), rewards(kind="continuous")) == (700, 300)
    assert rewards(kind="dpo", sequence_coef=1.0) == 700


def test_gradients_that_a_single_micro_batch_makes_are_counted_once() -> None:
    class Large(Counted):
        def peak(self, step: Step, cfg: RunConfig, machine: Machine) -> int:
            return 50_000

    def update(micro_batch_size: int) -> int:
        cfg = RunConfig(ppo=PPOConfig(minibatch_size=4, micro_batch_size=micro_batch_size, micro_batch_tokens=10**6))
        ppo = of_stage(estimate_run(cfg, Large(), CPU), "ppo")
        return ppo.at(ppo.phases[-1])

    gradients = 4 * 1000 + 4 * (900 + 10)
    assert update(micro_batch_size=2) == update(micro_batch_size=4) + gradients


def test_a_shared_value_model_is_a_head_in_float32() -> None:
    cfg = load_config(None, {"ppo.value_model": "shared", "model.dtype": "bfloat16"})
    head = ppo_roles(cfg, Counted())[1]
    assert (head.name, head.parameters, head.weights) == ("value head", 10 + 1, 4 * 11)


@pytest.mark.parametrize(
    ("rewards", "judges"),
    [
        ([RewardConfig()], {"discriminator"}),
        ([RewardConfig(kind="sequence")], {"reward model"}),
        ([RewardConfig(kind="q")], {"q model"}),
        ([RewardConfig(kind="random")], set()),
        ([RewardConfig(kind="sign", sequence_coef=0.1)], {"discriminator", "reward model"}),
        ([RewardConfig(kind="random"), RewardConfig(kind="sequence")], {"reward model"}),
    ],
)
def test_only_the_judges_that_the_rewards_need_are_trained_and_loaded(
    rewards: list[RewardConfig], judges: set[str]
) -> None:
    cfg = RunConfig(arms=tuple(Arm(f"arm{index}", reward) for index, reward in enumerate(rewards)))
    estimates = estimate_run(cfg, Counted(), CPU)
    known = {"discriminator", "reward model", "q model"}
    assert {role.name for role in of_stage(estimates, "ppo").roles} & known == judges
    assert {estimate.stage for estimate in estimates} & known == judges


def test_a_discriminator_that_learns_on_is_held_as_one_that_is_trained() -> None:
    def held(every: int) -> tuple[int, int]:
        roles = ppo_roles(RunConfig(reward=RewardConfig(refresh=RefreshConfig(every=every))), Counted())
        return next((role.gradients, role.optimizer) for role in roles if role.name == "discriminator")

    assert held(0) == (0, 0) and min(held(5)) > 0


def test_a_limit_of_tokens_bounds_what_an_update_takes() -> None:
    def update(**ppo: int) -> int:
        cfg = load_config(None, {f"ppo.{name}": number for name, number in ppo.items()})
        return of_stage(estimate_run(cfg, Counted(), CPU), "ppo").phases[-1].allocated

    whole = update(micro_batch_tokens=10**9)
    assert update(micro_batch_tokens=2048) < update(micro_batch_tokens=4096) < whole
    assert update() == update(micro_batch_tokens=1024)  # the limit on a CPU
    on_gpu = estimate_run(RunConfig(), Counted(), Machine(gpu=True))
    assert of_stage(on_gpu, "ppo").phases[-1].allocated == whole


class ByTokens(Counted):
    """1000 bytes for each token, a tenth with checkpoints."""

    def peak(self, step: Step, cfg: RunConfig, machine: Machine) -> int:
        return step.rows * step.columns * (100 if cfg.model.gradient_checkpointing else 1000)


def test_the_smallest_change_that_fits_is_one_setting_that_costs_time_alone() -> None:
    cfg = load_config(None, {"sft.batch_size": 16, "data.max_prompt_tokens": 6, "data.max_answer_tokens": 4})
    # 16 rows of 10 tokens beside 16,000 bytes of states
    assert of_stage(estimate_run(cfg, ByTokens(), CPU), "sft").total == 160_000 + 16_000 - 4_000
    found = remedy(cfg, ByTokens(), CPU, "sft", 100_000)
    assert found.fits and found.settings == ("sft.micro_batch_size: 8",)
    smaller = dataclasses.replace(cfg, sft=dataclasses.replace(cfg.sft, micro_batch_size=8))
    assert found.peak == of_stage(estimate_run(smaller, ByTokens(), CPU), "sft").total <= 100_000
    assert remedy(cfg, ByTokens(), CPU, "sft", 60_000).settings == ("sft.micro_batch_size: 4",)


def test_several_changes_are_named_where_none_alone_fits_and_none_that_is_not_needed() -> None:
    cfg = load_config(None, {"sft.batch_size": 16, "data.max_prompt_tokens": 6, "data.max_answer_tokens": 4})
    found = remedy(cfg, ByTokens(), CPU, "sft", 17_500)  # a row takes 10,000, with checkpoints 1000
    assert found.fits and found.settings == ("sft.micro_batch_size: 1", "model.gradient_checkpointing: true")


def test_what_fits_none_is_said_with_the_least_that_is_needed() -> None:
    found = remedy(load_config(None, {}), ByTokens(), CPU, "ppo", 5_000)
    assert not found.fits and found.peak > 5_000
    assert "ppo.value_model: shared" in found.settings and "model.dtype: bfloat16" in found.settings


def test_adapters_are_proposed_for_shards_too() -> None:
    changes = {"sharding.kind": "full", "model.dtype": "bfloat16", "model.gradient_checkpointing": True}
    smallest = {"rollout.batch_size": 1, "ppo.micro_batch_size": 1, "ppo.chunk_tokens": 8}
    cfg, machine = load_config(None, changes | smallest), Machine(gpu=True, processes=8)
    adapted = dataclasses.replace(cfg, lora=LoRAConfig(rank=16))
    limit = of_stage(estimate_run(adapted, Counted(), machine), "ppo").total
    found = remedy(cfg, Counted(), machine, "ppo", limit)
    assert found.fits and found.settings == ("lora.rank: 16",) and found.peak == limit


def test_of_shards_with_adapters_a_process_holds_its_part_of_the_base_and_of_each_adapter() -> None:
    cfg = load_config(None, {"sharding.kind": "full", "model.dtype": "bfloat16", "lora.rank": 4})
    roles = {role.name: role for role in roles_of_a_process(cfg, Counted(), Machine(gpu=True, processes=2))}
    adapter, value = 7 * 4, 7 * 4 + SIZE.hidden
    assert roles["reference"].total == 2 * SIZE.parameters // 2
    assert roles["policy"].total == (4 + 4 + 8) * adapter // 2
    assert roles["value model"].total == (4 + 4 + 8) * value // 2
    assert roles["discriminator"].total == 4 * adapter // 2


@pytest.mark.parametrize(
    ("changes", "about", "is_a_role"),
    [
        ({}, None, True),
        ({"lora.roles": ["policy", "value"]}, None, False),
        ({"discriminator.bidirectional_layers": 2}, None, False),
        ({"lora.roles": ["policy", "discriminator"], "ppo.value_init": "discriminator"}, None, False),
        ({"discriminator.path": "there"}, None, False),
        ({"discriminator.path": "there"}, {}, False),
        ({"discriminator.path": "there", "sft.enabled": False}, {}, True),
        ({"discriminator.path": "there", "sft.enabled": False}, {"tlcr_bidirectional_layers": 2}, False),
    ],
)
def test_a_discriminator_counts_as_it_will_be_loaded(
    changes: dict[str, object],
    about: dict[str, int] | None,
    is_a_role: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an adapter only where it can stand on the policy's weights; else it is a whole model."""
    monkeypatch.chdir(tmp_path)
    if about is not None:
        (tmp_path / "there" / "adapter").mkdir(parents=True)
        (tmp_path / "there" / "adapter" / "base.json").write_text(json.dumps({"config": about}))
    cfg = load_config(None, {"lora.rank": 4, "model.path": "owner/name", **changes})
    (role,) = [role for role in ppo_roles(cfg, Counted()) if role.name == "discriminator"]
    assert role.total == 4 * (7 * 4 if is_a_role else SIZE.with_head(2))


@pytest.mark.parametrize(
    ("changes", "impossible"),
    [
        ({"ppo.value_init": "reward_model", "reward.sequence_coef": 0.1}, "lora.rank: 16"),
        ({"lora.rank": 4, "lora.base_bits": 4}, "sharding.kind: full"),
    ],
)
def test_what_the_config_does_not_allow_is_not_proposed(changes: dict[str, object], impossible: str) -> None:
    found = remedy(load_config(None, changes), InBits(), Machine(gpu=True, processes=2), "ppo", 100)
    assert not found.fits and "model.dtype: bfloat16" in found.settings and impossible not in found.settings


class InBits(Counted):
    def saved_by_bits(self, cfg: RunConfig) -> int:
        return 300
