"""Scores and values in float32 on a bfloat16 backbone: as computed, as trained, as saved and loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerFast

from tlcr.config.schema import ModelConfig
from tlcr.errors import CheckpointError, ConfigError
from tlcr.models import loading
from tlcr.models.discriminator import classify
from tlcr.models.heads import Head, backbone, classification_head, use_float32_head
from tlcr.models.inspection import TWO_CLASSES
from tlcr.models.loading import load_sequence_classifier, load_token_classifier
from tlcr.models.reward_model import sequence_scores
from tlcr.models.saving import save_model
from tlcr.training.optim import MasterWeightAdamW, build_optimizer, parameter_groups

LM = Callable[..., PreTrainedModel]
BFLOAT16 = ModelConfig(dtype="bfloat16")


def classifier(make: LM, dtype: torch.dtype = torch.bfloat16, kind: str = "token") -> PreTrainedModel:
    """A classifier on a random backbone of the dtype; its head's weights are random too, and no bfloat16 numbers."""
    source = make(seed=1).to(dtype)
    model = (
        load_sequence_classifier(source, ModelConfig())
        if kind == "sequence"
        else load_token_classifier(source, ModelConfig(), id2label=TWO_CLASSES)
    )
    head = classification_head(model)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(0))
        assert not torch.equal(head.weight, head.weight.bfloat16().to(head.weight.dtype))
    return model


def ids(rows: int = 200) -> Tensor:
    return torch.randint(3, 300, (rows, 12), generator=torch.Generator().manual_seed(0))


# ---- computed


def test_values_that_differ_by_less_than_bfloat16_can_say_are_different() -> None:
    """w = [1, 2^-10] on h = [1, 0], [1, 1] and [1, 2]: 1, 1 + 2^-10 and 1 + 2^-9. bfloat16 has nothing between 1 and
    1 + 2^-7, so that there all three are 1."""
    head = Head(2, 1, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 2.0**-10]]))
    h_BH = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=torch.bfloat16)
    assert head(h_BH).dtype == torch.float32
    assert head(h_BH).flatten().tolist() == [1.0, 1.0 + 2.0**-10, 1.0 + 2.0**-9]
    assert torch.nn.functional.linear(h_BH, head.weight.bfloat16()).flatten().tolist() == [1.0, 1.0, 1.0]


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny_causal_lm", "tiny_gpt2"])
def test_a_bfloat16_classifier_multiplies_its_hidden_states_in_float32(
    request: pytest.FixtureRequest, name: str
) -> None:
    model = classifier(request.getfixturevalue(name))
    assert backbone(model).dtype == model.dtype == torch.bfloat16
    hidden_BLH = backbone(model)(input_ids=ids()).last_hidden_state
    assert hidden_BLH.dtype == torch.bfloat16
    head = classification_head(model)
    truth_BLC = hidden_BLH.double() @ head.weight.double().t()
    logits_BLC = classify(model, ids(), torch.ones_like(ids()))
    assert logits_BLC.dtype == torch.float32
    torch.testing.assert_close(logits_BLC.double(), truth_BLC, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_two_hundred_answers_have_two_hundred_scores(tiny_causal_lm: LM) -> None:
    scores_B = sequence_scores(classifier(tiny_causal_lm, kind="sequence"), ids(), torch.ones_like(ids()))
    assert len(scores_B.unique()) == 200
    assert len(scores_B.bfloat16().unique()) < 200  # a head in bfloat16 would not tell them all apart


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_models_compute_what_they_did_to_the_bit(tiny_causal_lm: LM, dtype: torch.dtype) -> None:
    model = classifier(tiny_causal_lm, dtype)
    hidden_BLH = backbone(model)(input_ids=ids()).last_hidden_state
    head = classification_head(model)
    plain = torch.nn.Linear(head.in_features, head.out_features, dtype=dtype)
    plain.load_state_dict(head.state_dict())
    assert head.weight.dtype == dtype
    assert torch.equal(model(input_ids=ids()).logits, plain(hidden_BLH))


def test_a_head_is_replaced_once_and_draws_no_random_number(tiny_causal_lm: LM) -> None:
    model = AutoModelForTokenClassification.from_config(tiny_causal_lm().config)
    weight, state = model.score.weight.detach().clone(), torch.get_rng_state()
    use_float32_head(model)
    head = classification_head(model)
    use_float32_head(model)
    assert classification_head(model) is head
    assert torch.equal(head.weight, weight) and torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in head.parameters())


def test_a_model_without_one_linear_head_is_left_alone_and_named(tiny_causal_lm: LM) -> None:
    model = tiny_causal_lm()
    use_float32_head(model)
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no single linear head under score or classifier"):
        classification_head(model)


# ---- trained


def test_the_head_gets_a_float32_gradient_and_the_backbone_one_of_its_own_dtype(tiny_causal_lm: LM) -> None:
    model = classifier(tiny_causal_lm)
    weight_BLC = torch.randn(4, 12, 2, generator=torch.Generator().manual_seed(1))
    (model(input_ids=ids(4)).logits * weight_BLC).sum().backward()
    hidden_BLH = backbone(model)(input_ids=ids(4)).last_hidden_state.detach()
    truth_CH = torch.einsum("blc,blh->ch", weight_BLC.double(), hidden_BLH.double())
    head = classification_head(model)
    assert head.weight.grad is not None and head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(head.weight.grad.double(), truth_CH, rtol=1e-5, atol=1e-4)
    for parameter in backbone(model).parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.bfloat16 and parameter.grad.any()


def test_the_optimiser_takes_the_head_for_its_own_master(tiny_causal_lm: LM) -> None:
    """No half of a master beside it; and a step below bfloat16's resolution is seen in the weight itself."""
    model = classifier(tiny_causal_lm)
    optimizer = build_optimizer(parameter_groups(model, learning_rate=1e-6, weight_decay=0.0))
    assert isinstance(optimizer, MasterWeightAdamW)
    head, before = classification_head(model), classification_head(model).weight.detach().clone()
    model(input_ids=ids(4)).logits.square().sum().backward()
    optimizer.step()
    assert set(optimizer.state[head.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert "remainder" in optimizer.state[next(iter(backbone(model).parameters()))]
    torch.testing.assert_close((head.weight - before).abs(), torch.full_like(before, 1e-6), rtol=0.2, atol=0)


def test_the_optimiser_of_a_bfloat16_head_is_not_resumed_by_a_float32_one() -> None:
    """A run that an older version of tlcr began: its optimiser has half of the head's masters."""
    old, new = (torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    rest = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))

    def optimizer(head: torch.nn.Parameter) -> torch.optim.Optimizer:
        return build_optimizer([{"params": [head, rest], "lr": 0.1, "weight_decay": 0.0}])

    before = optimizer(old)
    old.grad = torch.ones_like(old)
    before.step()
    with pytest.raises(CheckpointError, match=r"shape \(3,\) that was bfloat16 and is torch.float32 now; resume with"):
        optimizer(new).load_state_dict(before.state_dict())


# ---- saved and loaded


def load(folder: Path, kind: str, dtype: str = "bfloat16") -> PreTrainedModel:
    cfg = ModelConfig(path=str(folder), dtype=dtype)
    return load_sequence_classifier(folder, cfg) if kind == "sequence" else load_token_classifier(folder, cfg)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny_causal_lm", "tiny_gpt2"])
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_a_float32_head_is_saved_and_loaded_to_the_bit(
    request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, kind: str
) -> None:
    model = classifier(request.getfixturevalue(name), kind=kind)
    save_model(model, tiny_tokenizer, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load(tmp_path, kind)
    assert loaded.dtype == torch.bfloat16
    for (key, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), key
    save_model(loaded, tiny_tokenizer, tmp_path / "again")
    for key, weight in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(weight, model.state_dict()[key]), key


@torch.no_grad()
def test_a_head_in_one_of_many_files_is_found(
    tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = classifier(tiny_causal_lm)
    save_model(model, tiny_tokenizer, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(classification_head(load(tmp_path, "token")).weight, classification_head(model).weight)


@torch.no_grad()
def test_transformers_alone_loads_the_folder_and_rounds_the_head(
    tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = classifier(tiny_causal_lm)
    save_model(model, tiny_tokenizer, tmp_path)
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert torch.equal(plain.score.weight, classification_head(model).weight.bfloat16())
    wide = AutoModelForTokenClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(wide.score.weight, classification_head(model).weight)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_a_folder_with_a_bfloat16_head_loads_with_its_weights_in_float32(
    tiny_causal_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: str
) -> None:
    """As tlcr wrote them before heads were float32, and as others write them."""
    model = classifier(tiny_causal_lm, kind=kind)
    save_model(model, tiny_tokenizer, tmp_path)
    file = tmp_path / "model.safetensors"
    rounded = {key: weight.bfloat16() for key, weight in load_file(file).items()}
    save_file(rounded, file, metadata={"format": "pt"})
    head = classification_head(load(tmp_path, kind))
    assert head.weight.dtype == torch.float32
    assert torch.equal(head.weight, rounded["score.weight"].float())


def test_a_head_that_the_files_name_otherwise_is_read_rounded_and_said(
    tiny_causal_lm: LM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = classifier(tiny_causal_lm)
    save_model(model, tiny_tokenizer, tmp_path)
    # As where transformers renames the weights of a file while it loads them.
    monkeypatch.setattr(loading, "read_weights", lambda files, module: {})
    head = classification_head(load(tmp_path, "token"))
    assert torch.equal(head.weight, classification_head(model).weight.bfloat16().float())
    assert "keeps no score.weight under that name; it was read in torch.bfloat16" in caplog.text
