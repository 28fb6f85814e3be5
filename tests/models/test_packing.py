"""Packed rows: what a model says of them is what it says of padded ones, and which models can read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from tests.models.architectures import config_class, tiny_model
from tlcr.config.schema import ModelConfig, PPOConfig
from tlcr.models.actor_critic import ActorCritic, PolicyOutput, build_value_model
from tlcr.models.heads import classification_head
from tlcr.models.packing import Packing, packed_inputs
from tlcr.models.preparing import enable_gradient_checkpointing
from tlcr.models.probes import packing_fault

ROWS = [
    [5, 9, 30, 41, 17, 60, 2],
    [7, 44, 12, 90, 33, 23],
    [8, 98, 3, 14],
    [61, 62, 4],
    [50, 51, 52, 53, 70, 71, 72, 73, 2],
]
PROMPTS = [3, 5, 1, 3, 4]
"""Tokens of each row that are its prompt; the answer of the fourth row is empty."""
LENGTHS = [len(row) for row in ROWS]
TEMPERATURE = 0.7
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},  # learned positions
    "gpt_neox": {},
    "phi": {},
    "olmo2": {},
    "mistral": {"sliding_window": 3},
    "gemma2": {"sliding_window": 6},  # eager attention, whose softmax is float32; capped logits
    "mixtral": {},
    "starcoder2": {},
}
IN_FLOAT32 = {"gemma2"}
CANNOT = {
    "bloom": "takes no positions",
    "mamba": "takes no positions",
    "opt": "mixes packed rows",
    "biogpt": "mixes packed rows",
    "xglm": "mixes packed rows",
    "jamba": "mixes packed rows",
    "bamba": "mixes packed rows",
    "lfm2_moe": "mixes packed rows",
    "llama4_text": "attends within chunks",
    "gpt_oss": "mixes packed rows",  # its eager attention gets a mask that is made without positions
}
VARLEN = "test_varlen"


def padded(rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    L = max(LENGTHS[row] for row in rows)
    ids_BL = torch.tensor([ROWS[row] + [0] * (L - LENGTHS[row]) for row in rows])
    mask_BL = torch.arange(L) < torch.tensor([LENGTHS[row] for row in rows]).unsqueeze(1)
    actions = [at * L + column for at, row in enumerate(rows) for column in range(PROMPTS[row], LENGTHS[row])]
    return ids_BL, mask_BL, torch.tensor(actions)


def packed(rows: list[int]) -> tuple[Tensor, Packing, Tensor]:
    ids_1L = torch.tensor([[token for row in rows for token in ROWS[row]]])
    lengths = [LENGTHS[row] for row in rows]
    actions, start = [], 0
    for row in rows:
        actions += range(start + PROMPTS[row], start + LENGTHS[row])
        start += LENGTHS[row]
    return ids_1L, Packing.of(lengths, torch.device("cpu")), torch.tensor(actions)


def make(model_type: str, *, shared: bool = False, attention: str | None = None, **changes: Any) -> ActorCritic:
    """Policy and value model of an architecture, in float64, with a head of values that is not zero."""
    torch.manual_seed(0)
    policy = tiny_model(config_class(model_type), **ARCHITECTURES.get(model_type, {}), **changes).double()
    own = ModelConfig(attn_implementation=policy.config._attn_implementation, dtype="float32")
    value_model = None
    if not shared:
        value_model = build_value_model(PPOConfig(), own, policy=policy).double()
        with torch.no_grad():
            classification_head(value_model).weight.normal_(std=0.5)
    model = ActorCritic(policy, value_model)
    for part in (policy, value_model):
        if part is not None and attention is not None:
            part.set_attn_implementation(attention)
        if part is not None and model_type == "mixtral":
            part.set_experts_implementation("eager")  # the grouped product has no float64
    return model.double()


def said(model: ActorCritic, tokens: tuple[Tensor, Tensor | Packing, Tensor]) -> tuple[PolicyOutput, list[Tensor]]:
    """What a model says of the actions, and the gradients of a sum in which no two actions weigh the same."""
    model.zero_grad(set_to_none=True)
    output = model(*tokens, temperature=TEMPERATURE)
    weights_N = torch.sin(1.0 + torch.arange(len(tokens[2]), dtype=torch.float64))
    total = sum((x_N * weights_N * speed).sum() for speed, x_N in enumerate(output[:4], 1) if x_N is not None)
    total.backward()
    return output, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(
    one: tuple[PolicyOutput, list[Tensor]], other: tuple[PolicyOutput, list[Tensor]], within: float
) -> None:
    for expected, found in zip(one[0], other[0], strict=True):
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=within, atol=within)
    assert len(one[1]) == len(other[1]) > 3
    size = max(float(gradient.norm()) for gradient in one[1])
    for expected, found in zip(one[1], other[1], strict=True):
        assert float((found - expected).norm()) <= within * size


# ---- the same numbers


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [4, 2], [1]], ids=str)
def test_packed_rows_say_what_padded_ones_do(model_type: str, rows: list[int]) -> None:
    model = make(model_type)
    assert_same(said(model, padded(rows)), said(model, packed(rows)), 1e-6 if model_type in IN_FLOAT32 else 1e-12)
    model = model.float()
    assert_same(said(model, padded(rows)), said(model, packed(rows)), 1e-6)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_values_of_a_shared_backbone_and_the_reference_are_the_same_too(model_type: str) -> None:
    model, reference = make(model_type, shared=True), make(model_type, shared=True).policy
    with torch.no_grad():
        model.value_head.weight.normal_()
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert_same(said(model, padded([0, 1, 2, 3, 4])), said(model, packed([0, 1, 2, 3, 4])), 1e-12)
    alone, together = (
        model.reference_logprobs(reference, *tokens, temperature=TEMPERATURE)
        for tokens in (padded([0, 1, 2, 3, 4]), packed([0, 1, 2, 3, 4]))
    )
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    exact, packed_exact = (
        model(*tokens, temperature=TEMPERATURE, reference=reference).kl_N
        for tokens in (padded([0, 1, 2, 3, 4]), packed([0, 1, 2, 3, 4]))
    )
    assert (exact > 1e-3).any()
    torch.testing.assert_close(packed_exact, exact, rtol=1e-10, atol=1e-12)


def test_the_order_of_packed_rows_changes_nothing() -> None:
    model = make("gpt2")
    forth, back = said(model, packed([0, 4]))[0].logprobs_N, said(model, packed([4, 0]))[0].logprobs_N
    answer = LENGTHS[0] - PROMPTS[0]
    torch.testing.assert_close(torch.cat([back[-answer:], back[:-answer]]), forth, rtol=1e-12, atol=1e-12)


def shifted(tokens: tuple[Tensor, Packing, Tensor]) -> dict[str, tuple[Tensor, Packing, Tensor]]:
    """Packed rows with one of their indices off by one."""
    ids_1L, packing, actions_N = tokens
    later = Packing.of([LENGTHS[0] + 1, LENGTHS[1] - 1, *LENGTHS[2:]], torch.device("cpu"))
    return {
        "actions": (ids_1L, packing, actions_N - 1),
        "rows": (ids_1L, later, actions_N),
        "positions": (ids_1L, packing._replace(positions_1L=packing.positions_1L.roll(1, dims=1)), actions_N),
    }


@pytest.mark.parametrize("what", ["actions", "rows", "positions"])
def test_a_shift_by_one_token_is_noticed(what: str) -> None:
    model = make("gpt2")
    right = said(model, padded([0, 1, 2, 3, 4]))
    wrong = said(model, shifted(packed([0, 1, 2, 3, 4]))[what])
    assert (right[0].logprobs_N - wrong[0].logprobs_N).abs().max() > 1e-3
    with pytest.raises(AssertionError):
        assert_same(right, wrong, 1e-6)


# ---- no mask


def test_with_a_mask_of_ones_rows_would_see_each_other() -> None:
    """Why a packed batch has no attention mask: the same tokens and positions, with one, and no error is raised."""
    policy = make("llama").policy
    ids_1L, packing, actions_N = packed([0, 1, 2, 3, 4])
    inputs = packed_inputs(policy, ids_1L, packing)
    assert "attention_mask" not in inputs

    def logprobs(**mask: Tensor) -> Tensor:
        logp_LV = policy(**inputs, **mask).logits[0].log_softmax(-1)
        return logp_LV[actions_N - 1].gather(1, ids_1L[0, actions_N].unsqueeze(1)).squeeze(1)

    with torch.no_grad():
        right_N, wrong_N = logprobs(), logprobs(attention_mask=torch.ones_like(ids_1L))
    assert (right_N - wrong_N).abs().max() > 0.1
    own_N = make("llama")(*padded([0, 1, 2, 3, 4]), temperature=1.0).logprobs_N
    torch.testing.assert_close(right_N, own_N, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_no_model_receives_a_mask_with_packed_rows(shared: bool) -> None:
    model, reference = make("llama", shared=shared), make("llama").policy
    masks: list[Any] = []
    for part in (model.policy, model.value_model, reference):
        for module in [] if part is None else [part, part.base_model]:
            module.register_forward_pre_hook(
                lambda _, args, kwargs: masks.append((args, kwargs.get("attention_mask"))), with_kwargs=True
            )
    model(*packed([0, 1, 2]), temperature=1.0, reference=reference)
    model.reference_logprobs(reference, *packed([0, 1, 2]), temperature=1.0)
    # Ids may be given by place, and are then the only argument that is.
    assert len(masks) >= 3 and all(len(args) <= 1 and mask is None for args, mask in masks)
    masks.clear()
    model(*padded([0, 1, 2]), temperature=1.0)
    assert masks and all(mask is not None for _, mask in masks)


# ---- kernels that are told where rows begin


@dataclass
class Varlen:
    """An attention that computes each row apart, as flash attention's kernels do, and notes whether it is told them."""

    told: list[list[int] | None] = field(default_factory=list)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        assert attention_mask is None and len(query) == 1
        starts = [0, query.shape[2]]
        if cu_seq_lens_q is not None:
            assert cu_seq_lens_q is cu_seq_lens_k and cu_seq_lens_q.dtype == torch.int32
            starts = cu_seq_lens_q.tolist()
            assert starts[-1] == query.shape[2]
            assert max_length_q == max_length_k == max(b - a for a, b in pairwise(starts))
        self.told.append(None if cu_seq_lens_q is None else starts)
        rows = [
            nn.functional.scaled_dot_product_attention(
                *(x[:, :, a:b] for x in (query, key, value)), is_causal=True, scale=scaling, enable_gqa=True
            )
            for a, b in pairwise(starts)
        ]
        return torch.cat(rows, dim=2).transpose(1, 2).contiguous(), None


@pytest.fixture
def varlen() -> Iterator[Varlen]:
    attention = Varlen()
    AttentionInterface.register(VARLEN, attention)
    AttentionMaskInterface.register(VARLEN, flash_attention_mask)
    yield attention
    del AttentionInterface._global_mapping[VARLEN], AttentionMaskInterface._global_mapping[VARLEN]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gpt_neox", "phi", "olmo2"])
def test_kernels_of_flash_attention_are_told_where_rows_begin(model_type: str, varlen: Varlen) -> None:
    apart = said(make(model_type, attention=VARLEN), packed([0, 1, 2, 3, 4]))
    assert varlen.told == [[0, 7, 13, 17, 20, 29]] * 4  # two layers of the policy, two of the value model
    assert_same(said(make(model_type), padded([0, 1, 2, 3, 4])), apart, 1e-12)
    assert packing_fault(make(model_type, attention=VARLEN).policy) is None


def test_gradient_checkpointing_tells_them_again(varlen: Varlen) -> None:
    model = make("llama", attention=VARLEN)
    once = said(model, packed([0, 1, 2]))
    for part in (model.policy, model.value_model):
        enable_gradient_checkpointing(part)
    varlen.told.clear()
    model.train()
    assert_same(once, said(model, packed([0, 1, 2])), 1e-12)
    assert varlen.told == [[0, 7, 13, 17]] * 8


# ---- where rows stand


def test_positions_begin_again_and_a_row_without_tokens_is_none() -> None:
    packing = Packing.of([3, 0, 1, 1, 2], torch.device("cpu"))
    assert packing.positions_1L.tolist() == [[0, 1, 2, 0, 0, 0, 1]]
    assert packing.starts_S.tolist() == [0, 3, 4, 5, 7] and packing.starts_S.dtype == torch.int32
    assert packing.longest == 3


# ---- which models can


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_that_keep_packed_rows_apart(model_type: str, dtype: torch.dtype) -> None:
    model = make(model_type).to(dtype)
    assert packing_fault(model.policy) is None
    assert packing_fault(model.value_model) is None


@pytest.mark.parametrize("model_type", CANNOT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_that_mix_packed_rows_are_found(model_type: str, dtype: torch.dtype) -> None:
    fault = packing_fault(tiny_model(config_class(model_type)).to(dtype))
    assert fault is not None and fault.startswith(CANNOT[model_type])


def test_an_attention_that_ignores_rows_is_found(
    tiny_causal_lm: Callable[..., PreTrainedModel], varlen: Varlen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is causal over all tokens, with positions that start again: nothing but its output says so."""

    def over_all(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Any, **kwargs: Any) -> Any:
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2), None

    model = tiny_causal_lm(seed=1)
    model.set_attn_implementation(VARLEN)
    assert packing_fault(model) is None
    monkeypatch.setitem(AttentionInterface._global_mapping, VARLEN, over_all)
    assert str(packing_fault(model)).startswith("mixes packed rows")
    monkeypatch.setitem(AttentionInterface._global_mapping, VARLEN, lambda *_, **__: 1 / 0)
    assert packing_fault(model) == "fails on packed rows (ZeroDivisionError: division by zero)"
