"""Attention in two products against the formula in float64, and which calls take it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tlcr.config.schema import ModelConfig
from tlcr.models import attention
from tlcr.models.loading import load_causal_lm
from tlcr.models.saving import save_model

CAUSAL = SimpleNamespace(is_causal=True, num_key_value_groups=3)
B, HQ, HK, T, D = 2, 6, 2, 7, 16


@pytest.fixture(autouse=True)
def on_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed does not depend on the instructions that it is computed with."""
    monkeypatch.setattr(attention, "multiplies_bfloat16", lambda: True)


def inputs(dtype: torch.dtype = torch.bfloat16, length: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """As models make them: heads and tokens change places without a copy."""
    return tuple(torch.randn(B, length, heads, D).to(dtype).transpose(1, 2).requires_grad_() for heads in (HQ, HK, HK))  # type: ignore[return-value]


def formula(query: Tensor, key: Tensor, value: Tensor, mask_TS: Tensor, scaling: float) -> Tensor:
    """Head by head, row by row, in float64."""
    answers = torch.zeros(B, query.shape[2], HQ, D, dtype=torch.float64)
    for b in range(B):
        for head in range(HQ):
            shared = head // (HQ // HK)
            scores = scaling * query[b, head].double() @ key[b, shared].double().t()
            weights = scores.masked_fill(~mask_TS[b], -torch.inf).softmax(dim=-1)
            answers[b, :, head] = weights @ value[b, shared].double()
    return answers


def masks(kind: str) -> tuple[Tensor | None, Tensor]:
    """What a model hands over, and what it means."""
    causal = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T)
    if kind == "causal":
        return None, causal
    if kind == "everything":
        return None, torch.ones_like(causal)
    padded = causal.clone()
    padded[0, :, :3] = False  # row 0 is padded on the left; its first queries see themselves only
    padded[0] |= torch.eye(T, dtype=torch.bool)
    return padded[:, None], padded


@pytest.mark.parametrize("kind", ["causal", "everything", "padded"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_values_and_gradients_are_those_of_the_formula(kind: str, scaling: float | None) -> None:
    query, key, value = inputs()
    given, meant = masks(kind)
    truth = formula(query, key, value, meant, D**-0.5 if scaling is None else scaling)
    result, weights = attention.attention(
        CAUSAL, query, key, value, given, scaling=scaling, is_causal=False if kind == "everything" else None
    )
    assert weights is None
    assert result.dtype == torch.bfloat16
    assert result.is_contiguous()
    torch.testing.assert_close(result.double(), truth, rtol=2**-6, atol=2**-6)
    direction = torch.randn(B, T, HQ, D)
    ours = torch.autograd.grad(result, (query, key, value), direction.bfloat16())
    wide = torch.autograd.grad(truth, (query, key, value), direction.bfloat16().double())
    for gradient, true in zip(ours, wide, strict=True):
        assert float((gradient.double() - true.double()).norm() / true.double().norm()) < 2**-6


def test_a_query_that_sees_nothing_gets_a_finite_answer_and_gradient() -> None:
    query, key, value = inputs()
    mask = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T).clone()
    mask[0, :, 2] = False
    result, _ = attention.attention(CAUSAL, 1e4 * query, key, value, mask)
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result[0, 2, :3], value[0, :1].mean(dim=1).expand(3, D), rtol=0.02, atol=0.02)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(result.sum(), (query, key, value)))


def calls_of_sdpa(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    calls: list[tuple[int, ...]] = []

    def sdpa(module: object, query: Tensor, *rest: object, **kwargs: object) -> tuple[Tensor, None]:
        calls.append(tuple(query.shape))
        return query.transpose(1, 2), None

    monkeypatch.setattr(attention, "sdpa_attention_forward", sdpa)
    return calls


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("float32", {}),
        ("long", {}),
        ("one query", {}),
        ("a mask that is added", {"attention_mask": torch.zeros(B, 1, T, T)}),
        ("dropout", {"dropout": 0.1}),
        ("softcap", {"softcap": 30.0}),
        ("no instructions for bfloat16", {}),
    ],
)
def test_everything_else_goes_to_sdpa(what: str, arguments: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of_sdpa(monkeypatch)
    if what == "no instructions for bfloat16":
        monkeypatch.setattr(attention, "multiplies_bfloat16", lambda: False)
    query, key, value = inputs(
        torch.float32 if what == "float32" else torch.bfloat16, attention.SHORT + 1 if what == "long" else T
    )
    attention.attention(
        CAUSAL, query[:, :, -1:] if what == "one query" else query, key, value, **{"attention_mask": None, **arguments}
    )
    assert len(calls) == 1


def test_the_case_it_is_for_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of_sdpa(monkeypatch)
    attention.attention(CAUSAL, *inputs(length=attention.SHORT), None)
    assert not calls


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    config = LlamaConfig(
        vocab_size=400, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    save_model(LlamaForCausalLM(config).bfloat16(), tiny_tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_a_loaded_model_says_what_it_says_with_sdpa(
    folder: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    loaded = load_causal_lm(ModelConfig(path=str(folder), dtype="bfloat16"))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert (loaded.config._attn_implementation, plain.config._attn_implementation) == (attention.NAME, "sdpa")
    ids, mask = torch.randint(3, 400, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    seen: Callable[[PreTrainedModel], Tensor] = lambda model: model(input_ids=ids, attention_mask=mask).logits[:, 4:]  # noqa: E731
    torch.testing.assert_close(seen(loaded), seen(plain), rtol=0.05, atol=0.02)
    save_model(loaded, tiny_tokenizer, tmp_path / "again")
    assert attention.NAME not in json.dumps(json.loads((tmp_path / "again" / "config.json").read_text()))


def test_another_implementation_is_left_as_it_was_asked_for(folder: Path) -> None:
    model = load_causal_lm(ModelConfig(path=str(folder), dtype="bfloat16", attn_implementation="eager"))
    assert model.config._attn_implementation == "eager"
