"""Layers that keep less: their values bit for bit, their gradients held to float64, and which layers they are."""

from __future__ import annotations

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

from tlcr.config import ModelConfig
from tlcr.layers import keep_less
from tlcr.models import load_causal_lm, save_model

SIZES = {
    "vocab_size": 400,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}


def llama(dtype: torch.dtype = torch.bfloat16, **knobs: object) -> PreTrainedModel:
    torch.manual_seed(0)
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
def test_a_model_says_bit_for_bit_what_it_said(dtype: torch.dtype) -> None:
    model = llama(dtype)
    before = model(IDS_BL).logits
    keep_less(model)
    assert changed(model) == {"LlamaRMSNorm", "LlamaMLP"}
    assert torch.equal(model(IDS_BL).logits, before)
    with torch.no_grad():
        assert torch.equal(model(IDS_BL).logits, before)


def test_gradients_are_no_further_from_float64_than_torchs() -> None:
    model = llama()
    truth = gradients(deepcopy(model).double(), IDS_BL)
    torchs = gradients(model, IDS_BL)
    keep_less(model)
    ours = gradients(model, IDS_BL)
    assert ours.keys() == truth.keys()
    error = {
        whose: {name: float((grad[name].double() - truth[name]).norm() / truth[name].norm()) for name in truth}
        for whose, grad in (("torch", torchs), ("ours", ours))
    }
    for name, of_torch in error["torch"].items():
        assert error["ours"][name] < max(1.1 * of_torch, 2**-7), name


def test_the_norms_gradients_are_those_of_the_formula() -> None:
    """In float64, by hand: y = w x / sqrt(mean(x^2) + eps)."""
    norm = llama().model.norm
    x_BLH = torch.randn(2, 5, 48).bfloat16().requires_grad_()
    x, w = x_BLH.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    direction = torch.randn(2, 5, 48).bfloat16()
    truth = torch.autograd.grad(
        w * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt(), (x, w), direction.double()
    )
    model = llama()
    keep_less(model)
    ours = torch.autograd.grad(model.model.norm(x_BLH), (x_BLH, model.model.norm.weight), direction)
    for got, wanted in zip(ours, truth, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), wanted, rtol=2**-7, atol=1e-3)


def test_the_gated_layers_gradients_are_bit_for_bit_torchs() -> None:
    plain = llama().model.layers[0].mlp
    model = llama()
    keep_less(model)
    lean = model.model.layers[0].mlp
    x_BLH, direction = torch.randn(2, 5, 48).bfloat16().requires_grad_(), torch.randn(2, 5, 48).bfloat16()
    for ours, torchs in zip(
        torch.autograd.grad(lean(x_BLH), (x_BLH, *lean.parameters()), direction),
        torch.autograd.grad(plain(x_BLH), (x_BLH, *plain.parameters()), direction),
        strict=True,
    ):
        assert torch.equal(ours, torchs)


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
    keep_less(model)
    after = kept_bytes(norm, x_BLH), kept_bytes(mlp, x_BLH)
    # The norm: a float32 number for each token, without a float32 and a bfloat16 copy. The gate: 3 values for 4.
    assert before == (4 * tokens + (4 + 2) * 48 * tokens, 4 * 2 * 80 * tokens)
    assert after == (4 * tokens, 3 * 2 * 80 * tokens)


def test_float32_is_left_alone() -> None:
    model = llama(torch.float32)
    keep_less(model)
    assert not changed(model)


def test_another_formula_is_left_alone() -> None:
    """Gemma's norm multiplies in float32, by 1 + w; its gate is no SiLU."""
    torch.manual_seed(0)
    model = GemmaForCausalLM(GemmaConfig(**SIZES)).bfloat16()
    keep_less(model)
    assert not changed(model)
    model = llama(hidden_act="gelu")
    keep_less(model)
    assert changed(model) == {"LlamaRMSNorm"}


def test_another_order_of_rounding_is_left_alone() -> None:
    """A norm that rounds once, after the weight, differs in bits only; with weights of one it would not."""

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
    keep_less(model)
    assert "forward" not in vars(model.model.norm)
    assert changed(model) == {"LlamaRMSNorm", "LlamaMLP"}


def test_other_families_with_the_same_formula() -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES)).bfloat16()
    keep_less(model)
    assert changed(model) == {"Qwen3RMSNorm", "Qwen3MLP"}  # queries and keys have norms of heads: (B, L, heads, D)
    grads = gradients(model, IDS_BL)
    assert grads["model.layers.0.self_attn.q_norm.weight"].shape == (12,)
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_a_copy_computes_with_its_own_weights() -> None:
    model = llama()
    keep_less(model)
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
