"""`tlcr merge`: the whole models that it writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tlcr.cli import main as cli
from tlcr.config.schema import LoRAConfig, ModelConfig
from tlcr.models.discriminator import load_discriminator, temperature_of
from tlcr.models.inspection import THREE_CLASSES
from tlcr.models.loading import load_causal_lm, load_sequence_classifier, load_token_classifier
from tlcr.models.lora.adapters import add_adapter, own_named_parameters
from tlcr.models.lora.files import save_trained

IDS = torch.tensor([[5, 9, 30, 41, 17, 60, 2]])
CFG = LoRAConfig(rank=3, alpha=6)


@pytest.fixture(params=["float32", "bfloat16"])
def cfg(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny_causal_lm: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> ModelConfig:
    """A base on disk, which the adapters of these tests name."""
    tiny_causal_lm().to(getattr(torch, request.param)).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return ModelConfig(path=str(tmp_path / "base"), dtype=request.param)


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    add_adapter(model, CFG, "role", seed=0)
    with torch.no_grad():
        for parameter in own_named_parameters(model).values():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def equal(one: Path, other: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_a_policy_is_merged_as_a_run_merges_it_and_computes_what_the_adapter_does(
    cfg: ModelConfig, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = adapted(load_causal_lm(cfg))
    save_trained(model, tiny_tokenizer, tmp_path / "policy")
    assert cli.main(["merge", str(tmp_path / "policy" / "adapter"), str(tmp_path / "whole")]) == 0
    assert equal(tmp_path / "whole", tmp_path / "policy")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert whole.dtype == getattr(torch, cfg.dtype)
    with torch.no_grad():
        found, wanted = whole(input_ids=IDS).logits, model(input_ids=IDS).logits
        base = load_causal_lm(cfg)(input_ids=IDS).logits
    difference = (found - wanted).abs().max()
    assert difference <= (1e-5 if cfg.dtype == "float32" else 0.02) < 0.2 < (base - wanted).abs().max()


def test_a_discriminator_keeps_labels_and_temperature(
    cfg: ModelConfig, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = adapted(load_token_classifier(load_causal_lm(cfg), cfg, id2label=THREE_CLASSES))
    model.config.tlcr_temperature = 1.5
    save_trained(model, tiny_tokenizer, tmp_path / "discriminator")
    assert cli.main(["merge", str(tmp_path / "discriminator" / "adapter"), str(tmp_path / "whole")]) == 0
    assert equal(tmp_path / "whole", tmp_path / "discriminator")
    merged, _ = load_discriminator(tmp_path / "whole", cfg)
    assert temperature_of(merged) == 1.5 and merged.config.id2label == THREE_CLASSES


def test_a_reward_model_is_merged_with_its_head(
    cfg: ModelConfig, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = adapted(load_sequence_classifier(load_causal_lm(cfg), cfg))
    model.config.pad_token_id = tiny_tokenizer.pad_token_id
    save_trained(model, tiny_tokenizer, tmp_path / "reward_model")
    assert cli.main(["merge", str(tmp_path / "reward_model" / "adapter"), str(tmp_path / "whole")]) == 0
    assert equal(tmp_path / "whole", tmp_path / "reward_model")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").config.num_labels == 1


# peft 0.21 asks for a property that transformers 5.23 renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_of_another_program_is_merged_as_peft_does(tmp_path: Path, tiny_folder: Path) -> None:
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder),
        peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    theirs.save_pretrained(tmp_path / "adapter")
    arguments = ["merge", str(tmp_path / "adapter"), str(tmp_path / "whole"), "--base", str(tiny_folder)]
    assert cli.main(arguments) == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    for name, weight in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[name], weight)


def test_what_cannot_be_merged_is_refused_in_one_line(
    cfg: ModelConfig,
    tmp_path: Path,
    tiny_causal_lm: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_trained(adapted(load_causal_lm(cfg)), tiny_tokenizer, tmp_path / "policy")
    adapter = tmp_path / "policy" / "adapter"
    tiny_causal_lm(seed=7).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")

    def refused(*arguments: str | Path) -> str:
        assert cli.main(["merge", *map(str, arguments)]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        return said[-1]

    assert "holds a model already; name another folder" in refused(adapter, tmp_path / "policy")
    before = sorted(path.name for path in adapter.iterdir())
    assert "holds an adapter, which would be loaded with the whole model" in refused(adapter, adapter)
    assert sorted(path.name for path in adapter.iterdir()) == before
    other = refused(adapter, tmp_path / "whole", "--base", tmp_path / "other")
    assert "was trained on other weights than those in" in other and "--base" in other
    assert "wanted adapter_config.json" in refused(tmp_path / "base", tmp_path / "whole")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert "names no model that it was trained on; name it with --base" in refused(adapter, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
