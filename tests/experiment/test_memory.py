"""Memory estimates against parameters counted by hand, real optimiser states and what autograd really keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tlcr.config.loading import load_config
from tlcr.config.schema import Arm, ModelConfig, PPOConfig, RewardConfig, RolloutConfig, RunConfig, SFTConfig
from tlcr.data import embedded
from tlcr.errors import ConfigError
from tlcr.experiment.memory import Estimate, ModelSize, advice, build_on_meta, estimate_run, measure_model
from tlcr.models.loading import enable_gradient_checkpointing
from tlcr.training.optim import build_optimizer

SIZE = ModelSize(parameters=1000, backbone=900, vocabulary=50, hidden=10, layers=2, intermediate=20, key_value=10)


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
        vocabulary=100,
        hidden=8,
        layers=3,
        intermediate=20,
        key_value=2 * 2,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_tied_embeddings_are_counted_once(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    size = measure_model(build_on_meta(ModelConfig(path=str(tmp_path))))
    assert size.parameters == size.backbone == 124_439_808  # the published size of GPT-2
    assert (size.intermediate, size.key_value) == (4 * 768, 768)


def test_the_embedded_model_is_counted_as_it_is_built() -> None:
    model = embedded.build_model(embedded.build_tokenizer())
    size = measure_model(build_on_meta(ModelConfig(path="embedded")))
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert (size.hidden, size.layers) == (model.config.hidden_size, model.config.num_hidden_layers)


def test_a_model_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path .*give a folder that transformers can load"):
        measure_model(build_on_meta(ModelConfig(path=str(tmp_path))))


@pytest.mark.parametrize(("dtype", "bytes_per_parameter"), [("float32", 4 + 4 + 8), ("bfloat16", 2 + 2 + 8 + 2)])
def test_a_trained_model_takes_weights_gradients_moments_and_masters(dtype: str, bytes_per_parameter: int) -> None:
    cfg = load_config(None, {"model.dtype": dtype})
    assert of_stage(estimate_run(cfg, SIZE), "sft").roles[0].total == 1000 * bytes_per_parameter


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
    role = of_stage(estimate_run(cfg, size), "sft").roles[0]
    assert kept == role.optimizer


def kept_by_autograd(model: PreTrainedModel, ids: torch.Tensor) -> int:
    """Bytes of the distinct storages, parameters aside, that the backbone's graph keeps for its backward pass."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert output.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_of_the_size_that_autograd_keeps(checkpointing: bool) -> None:
    """The estimate is rough by design: held to within a factor of 1.6 of the truth."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).train()
    if checkpointing:
        enable_gradient_checkpointing(model)
    rows, columns = 4, 96
    kept = kept_by_autograd(model, torch.zeros(rows, columns, dtype=torch.long))
    size = ModelSize(parameters=0, backbone=0, vocabulary=0, hidden=64, layers=6, intermediate=160, key_value=64)
    cfg = RunConfig(
        model=ModelConfig(gradient_checkpointing=checkpointing),
        data=dataclasses.replace(RunConfig().data, max_prompt_tokens=columns // 2, max_answer_tokens=columns // 2),
        sft=SFTConfig(batch_size=rows),
    )
    estimated = of_stage(estimate_run(cfg, size), "sft").phases["training"]
    if checkpointing:
        # The hook sees what outlives the forward pass; one block's inside exists only while it is recomputed.
        estimated -= rows * columns * (8 * 64 + 4 * 160) * 4
    assert kept / 1.6 < estimated < kept * 1.6


def test_ppo_at_its_peak_as_by_hand() -> None:
    cfg = RunConfig(
        data=dataclasses.replace(RunConfig().data, max_prompt_tokens=3),
        rollout=RolloutConfig(max_new_tokens=5, batch_size=7),
        ppo=PPOConfig(minibatch_size=4, micro_batch_size=2),
    )
    ppo = of_stage(estimate_run(cfg, SIZE), "ppo")
    trained = 16 * 1000 + 16 * (900 + 10)  # policy; value model with one output
    frozen = 4 * 1000 + 4 * (900 + 2 * 10)  # reference; discriminator with two
    cache = 7 * 2 * 2 * 10 * (3 + 5) * 4  # answers, key and value, layers, width, columns
    next_logits = 7 * 50 * 4
    activations = 2 * (2 * 8) * 2 * (8 * 10 + 4 * 20) * 4  # both models, tokens, layers
    logits = 2 * (2 * 5) * 50 * 4  # with their gradient
    assert {role.name for role in ppo.roles} == {"policy", "value model", "reference", "discriminator"}
    assert sum(role.total for role in ppo.roles) == trained + frozen
    assert ppo.phases == {"generation": cache + next_logits, "update": activations + logits}
    assert ppo.total == trained + frozen + max(cache + next_logits, activations + logits)


def test_a_shared_value_model_is_a_head_and_no_second_set_of_activations() -> None:
    separate, shared = (
        of_stage(estimate_run(load_config(None, {"ppo.value_model": kind}), SIZE), "ppo")
        for kind in ("separate", "shared")
    )
    assert shared.roles[1].parameters == SIZE.hidden + 1
    logits = 2 * 64 * 256 * SIZE.vocabulary * 4
    assert separate.phases["update"] - logits == 2 * (shared.phases["update"] - logits)


def test_chunked_logits_exist_for_one_chunk() -> None:
    whole, chunked = (
        of_stage(estimate_run(load_config(None, {"ppo.chunk_tokens": tokens}), SIZE), "ppo").phases["update"]
        for tokens in (None, 100)
    )
    assert whole - chunked == 2 * SIZE.vocabulary * 4 * (64 * 256 - 100)


@pytest.mark.parametrize(
    ("rewards", "judges"),
    [
        ([RewardConfig()], {"discriminator"}),
        ([RewardConfig(kind="sequence")], {"reward model"}),
        ([RewardConfig(kind="random")], set()),
        ([RewardConfig(kind="sign", sequence_coef=0.1)], {"discriminator", "reward model"}),
        ([RewardConfig(kind="random"), RewardConfig(kind="sequence")], {"reward model"}),
    ],
)
def test_only_the_judges_that_the_rewards_need_are_trained_and_loaded(
    rewards: list[RewardConfig], judges: set[str]
) -> None:
    cfg = RunConfig(arms=tuple(Arm(f"arm{index}", reward) for index, reward in enumerate(rewards)))
    estimates = estimate_run(cfg, SIZE)
    both = {"discriminator", "reward model"}
    assert {role.name for role in of_stage(estimates, "ppo").roles} & both == judges
    assert {estimate.stage for estimate in estimates} & both == judges


def test_a_limit_of_tokens_bounds_what_an_update_takes() -> None:
    def update(**ppo: int) -> int:
        cfg = load_config(None, {f"ppo.{name}": number for name, number in ppo.items()})
        estimate = next(one for one in estimate_run(cfg, SIZE) if one.stage == "ppo")
        return estimate.phases["update"]

    whole = update()
    assert update(micro_batch_tokens=10**9) == whole
    assert update(micro_batch_tokens=2048) < update(micro_batch_tokens=4096) < whole


def test_advice_lowers_the_peak_and_the_micro_batch_it_names_fits() -> None:
    cfg = RunConfig()
    now = of_stage(estimate_run(cfg, SIZE), "ppo").total
    limit = now // 3
    found = dict(advice(cfg, SIZE, "ppo", limit))
    assert list(found.values()) == sorted(found.values())
    assert all(peak < now for peak in found.values())
    assert {"model.dtype: bfloat16", "ppo.value_model: shared", "ppo.chunk_tokens: 1024"} <= set(found)
    name, peak = next((name, peak) for name, peak in found.items() if name.startswith("ppo.micro_batch_size"))
    size = int(name.rpartition(" ")[2])
    assert peak <= limit
    twice = load_config(None, {"ppo.micro_batch_size": 2 * size})
    assert of_stage(estimate_run(twice, SIZE), "ppo").total > limit
    for change, low in found.items():
        path, _, value = change.partition(": ")
        assert of_stage(estimate_run(load_config(None, {path: value}), SIZE), "ppo").total == low
