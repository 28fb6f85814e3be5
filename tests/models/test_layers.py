"""Layers by the ops: the values that they had, gradients held to float64, less that is kept, and which they are."""

from __future__ import annotations

import re
from collections import defaultdict
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tlcr.config.schema import ModelConfig
from tlcr.models.layers import fuse_layers
from tlcr.models.loading import load_causal_lm
from tlcr.models.saving import save_model

SIZES = {
    "vocab_size": 400,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}


def llama(dtype: torch.dtype = torch.bfloat16, *, seed: int = 0, **knobs: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **knobs)).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)  # not the ones of a new model, with which much is right by chance
    return model


def changed(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


def gradients(model: PreTrainedModel, ids_BL: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits_BLV = model(ids_BL).logits
    logits_BLV[:, :-1].log_softmax(-1).gather(2, ids_BL[:, 1:, None]).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


IDS_BL = torch.randint(0, 400, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_says_what_it_said(dtype: torch.dtype) -> None:
    """To the rounding of the layers' own dtype, with and without a gradient, and the same in both."""
    model = llama(dtype)
    truth = deepcopy(model).double()(IDS_BL).logits
    before = model(IDS_BL).logits
    fuse_layers(model)
    assert changed(model) == {"LlamaRMSNorm", "LlamaMLP"}
    after = model(IDS_BL).logits
    assert (after - truth).abs().max() < max(1.2 * (before - truth).abs().max(), 16 * torch.finfo(dtype).eps)
    with torch.no_grad():
        assert torch.equal(model(IDS_BL).logits, after)


def test_gradients_are_no_further_from_float64_than_torchs() -> None:
    """On average over layers and models: which of two roundings of one gradient is the better one is chance."""
    error: dict[tuple[str, str], float] = defaultdict(float)
    for seed in range(4):
        model = llama(seed=seed)
        truth = gradients(deepcopy(model).double(), IDS_BL)
        torchs = gradients(model, IDS_BL)
        fuse_layers(model)
        ours = gradients(model, IDS_BL)
        assert ours.keys() == torchs.keys() == truth.keys()
        for whose, found in (("torch", torchs), ("ours", ours)):
            for name, gradient in found.items():
                kind = re.sub(r"\.\d+\.", ".", name)
                error[whose, kind] += float((gradient.double() - truth[name]).norm() / truth[name].norm())
    for kind in {kind for _, kind in error}:
        assert error["ours", kind] < 1.05 * error["torch", kind], kind


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """What the backward pass of one call keeps beside its input and the weights."""
    known = {x.data_ptr(), *(p.data_ptr() for p in module.parameters())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = module(x)
    return sum(size for address, size in kept.items() if address not in known and address != result.data_ptr())


def test_less_is_kept() -> None:
    model, tokens = llama(), 64
    x_BLH = torch.randn(1, tokens, 48).bfloat16().requires_grad_()
    mlp, norm = model.model.layers[0].mlp, model.model.norm
    before = kept_bytes(norm, x_BLH), kept_bytes(mlp, x_BLH)
    fuse_layers(model)
    after = kept_bytes(norm, x_BLH), kept_bytes(mlp, x_BLH)
    # The norm: a float32 number for each token, without a float32 and a bfloat16 copy. The gate: 3 values for 4.
    assert before == (4 * tokens + (4 + 2) * 48 * tokens, 4 * 2 * 80 * tokens)
    assert after == (4 * tokens, 3 * 2 * 80 * tokens)


def test_float32_and_other_devices_are_left_alone() -> None:
    for model in (llama(torch.float32), llama().to("meta")):
        fuse_layers(model)
        assert not changed(model)


def test_a_model_that_moves_away_goes_back_to_transformers() -> None:
    model = llama()
    fuse_layers(model)
    plain, copy = deepcopy(llama()).float(), deepcopy(model).float()
    assert torch.equal(copy(IDS_BL).logits, plain(IDS_BL).logits)
    layer = model.to("meta").model.layers[0]
    x_BLH = torch.randn(2, 5, 48, device="meta").bfloat16()
    assert layer.mlp(layer.input_layernorm(x_BLH)).shape == (2, 5, 48)


def test_another_formula_is_left_alone() -> None:
    """Gemma's norm multiplies in float32, by 1 + w; its gate is no SiLU."""
    torch.manual_seed(0)
    model = GemmaForCausalLM(GemmaConfig(**SIZES)).bfloat16()
    fuse_layers(model)
    assert not changed(model)
    model = llama(hidden_act="gelu")
    fuse_layers(model)
    assert changed(model) == {"LlamaRMSNorm"}


def test_another_order_of_rounding_is_left_alone() -> None:
    """A norm that rounds once, after the weight, differs in last bits only, but in many. With weights of one it would
    not differ."""

    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(48).bfloat16())
            self.variance_epsilon = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            return (self.weight * wide).to(x.dtype)

    model = llama()
    model.model.norm = Later()
    fuse_layers(model)
    assert "forward" not in vars(model.model.norm)
    assert changed(model) == {"LlamaRMSNorm", "LlamaMLP"}


def test_other_families_with_the_same_formula() -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES)).bfloat16()
    fuse_layers(model)
    assert changed(model) == {"Qwen3RMSNorm", "Qwen3MLP"}  # queries and keys have norms of heads: (B, L, heads, D)
    grads = gradients(model, IDS_BL)
    assert grads["model.layers.0.self_attn.q_norm.weight"].shape == (12,)
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_a_copy_computes_with_its_own_weights() -> None:
    model = llama()
    fuse_layers(model)
    copy = deepcopy(model)
    nn.init.zeros_(model.model.norm.weight)
    assert copy.model.norm.forward.__self__ is copy.model.norm
    assert bool((copy(IDS_BL).logits != 0).any())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loaded_models_have_it(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, checkpointing: bool) -> None:
    save_model(llama(), tiny_tokenizer, tmp_path)
    model = load_causal_lm(ModelConfig(path=str(tmp_path), dtype="bfloat16", gradient_checkpointing=checkpointing))
    assert changed(model) >= {"LlamaRMSNorm", "LlamaMLP"}
    grads = gradients(model.train(), IDS_BL)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
