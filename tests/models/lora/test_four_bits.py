"""Adapters over frozen weights in 4 bits: what a layer computes, what is trained, what is written, and its memory.

What needs bitsandbytes is skipped where it is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.experiment.measured import CLOSE, PPO, config, estimate, peak_of_ppo
from tests.models.lora.test_adapters import IDS, hidden, randomised
from tlcr.cli import main as cli
from tlcr.config.schema import LoRAConfig, ModelConfig
from tlcr.errors import ConfigError
from tlcr.models.heads import backbone
from tlcr.models.loading import load_causal_lm
from tlcr.models.lora import four_bits
from tlcr.models.lora.adapters import add_adapter, base_digest, own_parameters
from tlcr.models.lora.files import merged_weights, save_trained
from tlcr.models.lora.four_bits import bytes_of, dequantised, is_quantised, linear_layers, quantise
from tlcr.models.lora.roles import Roles

Make = Callable[..., PreTrainedModel]
WIDE = {"hidden_size": 64, "intermediate_size": 192}
"""Rows of whole blocks."""
CFG = LoRAConfig(rank=4, base_bits=4)
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def test_without_bitsandbytes_one_sentence_says_what_to_do(
    tiny_causal_lm: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(four_bits, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bitsandbytes, and it is not installed; pip install bitsandbytes, or set"):
        add_adapter(tiny_causal_lm(**WIDE), CFG, "policy", seed=0)


def test_weights_that_are_quantised_already_take_no_adapter(tiny_causal_lm: Make) -> None:
    model = tiny_causal_lm(**WIDE)
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(codes, requires_grad=False)
    with pytest.raises(ConfigError, match=r"are quantised already.*name the model that they were made from"):
        add_adapter(model, LoRAConfig(rank=4), "policy", seed=0)


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """The same model whose weights are what their codes stand for, as numbers."""
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    body = backbone(other)
    quantise(body)
    weights = {path: dequantised(layer) for path, layer in body.named_modules() if is_quantised(layer)}
    whole = type(model)(model.config).to(model.dtype).eval()
    whole.load_state_dict(model.state_dict())
    with torch.no_grad():
        for path, weight in weights.items():
            backbone(whole).get_submodule(path).weight.copy_(weight)
    return whole


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_the_nearest_of_16_numbers_of_each_block(
    dtype: torch.dtype, tiny_causal_lm: Make
) -> None:
    model = tiny_causal_lm(**WIDE).to(dtype)
    before = {path: layer.weight.detach().clone() for path, layer in linear_layers(model.model).items()}
    quantise(model.model)
    layers = linear_layers(model.model)
    assert layers.keys() == before.keys() and all(map(is_quantised, layers.values()))
    assert not is_quantised(model.lm_head) and model.model.embed_tokens.weight.dtype == dtype
    for path, layer in layers.items():
        weight = dequantised(layer)
        assert weight.dtype == dtype and weight.shape == before[path].shape
        blocks, wanted = weight.float().view(-1, 64), before[path].float().view(-1, 64)
        assert max(len(block.unique()) for block in blocks) <= 16
        # half of the widest gap of NF4 is 0.152; the scale has 8 bits
        largest = wanted.abs().amax(dim=1, keepdim=True)
        assert ((blocks - wanted).abs() <= 0.18 * largest).all()
        x = torch.randn(2, 5, layer.in_features, dtype=dtype, requires_grad=True)
        y = layer(x)
        torch.testing.assert_close(y, x @ weight.T, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)
        with torch.no_grad():
            layer(x)
        assert torch.equal(dequantised(layer), weight)  # a pass without gradients packs nothing anew
        state: Any = layer.weight.quant_state
        held = [layer.weight, state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset]
        assert bytes_of(before[path].shape) == sum(tensor.nbytes for tensor in held)


@needs_bitsandbytes
def test_layers_whose_rows_are_no_whole_blocks_stay_as_they_are(tiny_causal_lm: Make) -> None:
    model = tiny_causal_lm(hidden_size=32, intermediate_size=192)
    quantise(model.model)
    kept = {path.rpartition(".")[2] for path, m in model.named_modules() if is_quantised(m)}
    assert kept == {"down_proj"}
    with pytest.raises(ConfigError, match="of a multiple of 64 inputs"):
        quantise(tiny_causal_lm(hidden_size=32, intermediate_size=48).model)


@needs_bitsandbytes
def test_roles_compute_and_learn_what_they_do_over_the_rounded_weights(tiny_causal_lm: Make) -> None:
    found = []
    for model, cfg in ((tiny_causal_lm(**WIDE), CFG), (rounded(tiny_causal_lm(**WIDE)), LoRAConfig(rank=4))):
        roles = Roles(model, cfg, seed=0)
        values = roles.classifier("value", {0: "value"})
        with torch.no_grad():
            assert torch.equal(roles.policy(input_ids=IDS).logits, roles.reference(input_ids=IDS).logits)
        for number, trained in enumerate((roles.policy, values)):
            randomised(trained, seed=number)
        outputs = [roles.policy(input_ids=IDS).logits, values(input_ids=IDS).logits]
        sum(output.square().sum() for output in outputs).backward()
        with torch.no_grad():
            outputs.append(roles.reference(input_ids=IDS).logits)
        found.append((outputs, [p.grad for m in (roles.policy, values) for p in own_parameters(m)]))
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@needs_bitsandbytes
def test_training_leaves_the_codes_as_they_are(tiny_causal_lm: Make) -> None:
    roles = Roles(tiny_causal_lm(**WIDE), CFG, seed=0)
    before = {name: p.detach().clone() for name, p in roles.policy.named_parameters() if not p.requires_grad}
    assert sum(p.dtype == torch.uint8 for p in before.values()) == 14
    optimizer = torch.optim.AdamW([p for p in roles.policy.parameters() if p.requires_grad], lr=1e-2)
    for _step in range(2):
        roles.policy(input_ids=IDS).logits.square().sum().backward()
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in roles.policy.named_parameters() if name in before)
    with torch.no_grad():
        assert not torch.equal(hidden(roles.policy), hidden(roles.reference))


@pytest.fixture
def base(tmp_path: Path, tiny_causal_lm: Make, tiny_tokenizer: PreTrainedTokenizerFast) -> ModelConfig:
    tiny_causal_lm(**WIDE).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return ModelConfig(path=str(tmp_path / "base"))


@needs_bitsandbytes
def test_folders_hold_whole_models_and_merging_gives_the_same(
    base: ModelConfig, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, tiny_causal_lm: Make
) -> None:
    roles = Roles(load_causal_lm(base), CFG, seed=0)
    randomised(roles.policy)
    save_trained(roles.policy, tiny_tokenizer, tmp_path / "policy")
    about = json.loads((tmp_path / "policy" / "adapter" / "base.json").read_text())
    assert about["base_bits"] == 4 and about["sha256"] == base_digest(roles.policy)
    assert "quantization_config" not in json.loads((tmp_path / "policy" / "config.json").read_text())
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    with torch.no_grad():
        torch.testing.assert_close(
            whole(input_ids=IDS).logits, roles.policy(input_ids=IDS).logits, rtol=1e-4, atol=1e-4
        )

    assert cli.main(["merge", str(tmp_path / "policy" / "adapter"), str(tmp_path / "merged")]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("policy", "merged"))
    assert one.keys() == other.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    assert all(torch.equal(one[key], other[key]) for key in one)

    tiny_causal_lm(seed=1, **WIDE).save_pretrained(tmp_path / "base")
    assert cli.main(["merge", str(tmp_path / "policy" / "adapter"), str(tmp_path / "again")]) == 2


@needs_bitsandbytes
def test_layers_without_an_adapter_are_written_as_numbers_too(tiny_causal_lm: Make) -> None:
    model = tiny_causal_lm(**WIDE)
    add_adapter(model, LoRAConfig(rank=4, base_bits=4, targets=("q_proj",)), "policy", seed=0)
    weights = merged_weights(model)
    assert weights.keys() == tiny_causal_lm(**WIDE).state_dict().keys()
    assert all(weight.dtype == torch.float32 for weight in weights.values())


@needs_bitsandbytes
def test_a_base_is_known_by_its_weights_and_bits(base: ModelConfig) -> None:
    whole = load_causal_lm(base)
    one, other = (Roles(load_causal_lm(base), CFG, seed=seed) for seed in (0, 1))
    assert base_digest(one.policy) == base_digest(other.reference) == base_digest(whole, 4) != base_digest(whole)
    assert base_digest(one.classifier("value", {0: "value"})) == base_digest(one.policy)


def of_quantisation(model: nn.Module) -> int:
    """The bytes of scales and tables, which are no parameters."""
    states: list[Any] = [m.weight.quant_state for m in model.modules() if is_quantised(m)]
    parts: list[list[Tensor]] = [[s.absmax, s.code, s.state2.absmax, s.state2.code, s.offset] for s in states]
    return sum(tensor.nbytes for part in parts for tensor in part)


@needs_bitsandbytes
@pytest.mark.parametrize("changes", [{}, {"model.dtype": "bfloat16", "model.gradient_checkpointing": True}])
def test_ppo_takes_what_is_estimated(
    changes: dict[str, Any], tmp_path: Path, tiny_causal_lm: Make, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_causal_lm(**WIDE, num_hidden_layers=4).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    cfg = config(tmp_path / "model", {**PPO, "lora.rank": 8, "lora.base_bits": 4, "ppo.chunk_tokens": 64, **changes})
    scales = of_quantisation(Roles(load_causal_lm(cfg.model), cfg.lora, seed=0).policy)
    found = peak_of_ppo(cfg, tiny_tokenizer, tmp_path / "ppo") + scales
    assert found == pytest.approx(estimate(cfg, "ppo").total, rel=2 * CLOSE)
