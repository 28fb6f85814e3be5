"""Classifiers of decoders for which transformers has none: made, saved, and loaded without tlcr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForTokenClassification,
    BertConfig,
    BertLMHeadModel,
    PreTrainedTokenizerFast,
)

from tests.models.architectures import SPECIAL, VOCABULARY, config_class, tiny_model, try_out
from tlcr.config.schema import ModelConfig, PPOConfig
from tlcr.errors import ConfigError
from tlcr.models.actor_critic import ActorCritic, build_value_model
from tlcr.models.discriminator import token_logits
from tlcr.models.heads import backbone, classification_head
from tlcr.models.inspection import TWO_CLASSES
from tlcr.models.loading import load_causal_lm, load_token_classifier
from tlcr.models.modeling_classifier import LinearHead
from tlcr.models.saving import save_model

OURS = ["opt", "gemma3_text", "olmo2", "granite", "cohere", "gptj", "codegen", "mamba", "bart", "olmoe"]
OURS += ["llama4_text", "openai-gpt", "rwkv"]
# ExaoneConfig is not the config that its causal model names; transformers has it since a later version than our first
OURS += [kind.model_type for kind in MODEL_FOR_CAUSAL_LM_MAPPING if kind.model_type == "exaone"]
THEIRS = ["gpt_neox", "bloom", "qwen2"]

IDS = torch.tensor([[5, 9, 17, 23, 2, 40], [7, 8, 30, 0, 0, 0]])
MASK = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
ACTIONS = torch.tensor([3, 4, 5, 6 + 1, 6 + 2])
"""Where, in IDS laid end to end, an answer begins after three tokens, and one after the first."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, as many as the tiny models have ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="w3"
    )


@pytest.fixture(autouse=True)
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the code of a folder here before it imports it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def own_config(model: torch.nn.Module, **changes: object) -> ModelConfig:
    """Settings whose attention implementation the architecture has."""
    return ModelConfig(attn_implementation=model.config._attn_implementation or "eager", **changes)


@pytest.mark.parametrize("model_type", [*OURS, *THEIRS])
def test_both_classifiers_of_a_decoder_load_with_equal_outputs(model_type: str, tmp_path: Path) -> None:
    made = try_out(tiny_model(config_class(model_type)), word_tokenizer(), tmp_path)
    assert made.startswith("token: ours" if model_type in OURS else "token: transformers, sequence: transformers")


@pytest.mark.slow
def test_a_process_without_tlcr_loads_the_folder(tmp_path: Path) -> None:
    """One OPT whose last hidden states are narrower than its layers, with a head in float32 on bfloat16."""
    source = tiny_model(config_class("opt"), word_embed_proj_dim=16).bfloat16()
    model = load_token_classifier(source, own_config(source), id2label=TWO_CLASSES)
    head = classification_head(model)
    torch.nn.init.normal_(head.weight)
    assert (head.in_features, head.weight.dtype) == (16, torch.float32)
    save_model(model, word_tokenizer(), tmp_path / "model")
    assert "tlcr." not in (tmp_path / "model" / "modeling_classifier.py").read_text().replace("tlcr.models.", "tlcr.")
    program = """
import json, sys
sys.modules["tlcr"] = None  # importing it is an ImportError
import torch
from transformers import AutoModelForTokenClassification
model = AutoModelForTokenClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[2])
again = AutoModelForTokenClassification.from_pretrained(sys.argv[2], trust_remote_code=True)
ids, mask = json.loads(sys.argv[3])
inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
print(json.dumps([type(model).__name__, str(model.score.weight.dtype), str(model.dtype), model.config.id2label,
                  model(**inputs).logits.tolist(), again(**inputs).logits.tolist()]))
"""
    sent = json.dumps([IDS.tolist(), MASK.long().tolist()])
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(tmp_path / "model"), str(tmp_path / "copy"), sent],
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "elsewhere"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    name, head_dtype, dtype, labels, logits, again = json.loads(done.stdout)
    assert (name, head_dtype, dtype) == ("OPTForTokenClassification", "torch.float32", "torch.bfloat16")
    assert labels == {str(index): label for index, label in TWO_CLASSES.items()}
    model.set_attn_implementation("sdpa")  # ours rounds bfloat16 otherwise
    with torch.no_grad():
        wanted = model(input_ids=IDS, attention_mask=MASK.long()).logits
    torch.testing.assert_close(torch.tensor(logits)[MASK], wanted[MASK], rtol=0, atol=0)
    assert again == logits


def test_tlcr_reads_such_a_folder_without_running_its_code(tmp_path: Path) -> None:
    source = tiny_model(config_class("granite"))
    model = load_token_classifier(source, ModelConfig(), id2label=TWO_CLASSES)
    save_model(model, word_tokenizer(), tmp_path)
    (tmp_path / "modeling_classifier.py").write_text("raise SystemExit('run')")
    assert isinstance(load_token_classifier(tmp_path, ModelConfig()), LinearHead)


def test_a_folder_of_another_class_names_no_module(tmp_path: Path) -> None:
    source = tiny_model(config_class("qwen2"))
    source.config.auto_map = {"AutoModelForSequenceClassification": "modeling_classifier.Qwen2ForNothing"}
    save_model(load_token_classifier(source, ModelConfig(), id2label=TWO_CLASSES), word_tokenizer(), tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not (tmp_path / "modeling_classifier.py").exists()
    assert AutoModelForTokenClassification.from_pretrained(tmp_path).config.model_type == "qwen2"


@pytest.mark.parametrize("model_type", ["opt", "gemma3_text", "olmo2", "granite", "mamba", "rwkv"])
def test_a_token_of_a_rollout_has_the_logits_that_it_has_alone(model_type: str) -> None:
    """A rollout pads prompts on the left; some of these architectures read no attention mask."""
    source = tiny_model(config_class(model_type))
    model = load_token_classifier(source, own_config(source), id2label=TWO_CLASSES)
    torch.nn.init.normal_(classification_head(model).weight)
    ids_BL, mask_BL = torch.tensor([[0, 0, 5, 9, 17, 2], [7, 8, 30, 31, 0, 0]]), torch.ones(2, 6).bool()
    mask_BL[0, :2] = mask_BL[1, 4:] = False
    logits_BTC = token_logits(model, ids_BL, mask_BL, slice(3, 6))
    for row in range(2):
        alone = model(input_ids=ids_BL[row][mask_BL[row]][None]).logits[0, 1 if row == 0 else 3 :]
        torch.testing.assert_close(logits_BTC[row][mask_BL[row, 3:]], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["opt", "gemma3_text", "olmo2", "granite"])
@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_values_start_at_zero_and_are_trained(model_type: str, kind: str, tmp_path: Path) -> None:
    policy = tiny_model(config_class(model_type), **({"word_embed_proj_dim": 16} if model_type == "opt" else {}))
    cfg = own_config(policy)
    value_model = build_value_model(PPOConfig(value_model=kind), cfg, policy=policy)
    model = ActorCritic(policy, value_model)
    output = model(IDS, MASK, ACTIONS, temperature=1.0)
    assert torch.equal(output.values_N, torch.zeros(len(ACTIONS)))
    ((output.values_N - 1) ** 2).sum().backward()
    head = model.value_head if value_model is None else classification_head(value_model)
    assert head.weight.grad.abs().sum() > 0
    model.save(word_tokenizer(), tmp_path / "policy", tmp_path / "value")
    loaded = ActorCritic.load(own_config(policy, path=str(tmp_path / "policy")), tmp_path / "value")
    torch.testing.assert_close(loaded(IDS, MASK, ACTIONS, temperature=1.0).values_N, output.values_N)


def test_a_model_that_sees_later_tokens_is_no_language_model(tmp_path: Path) -> None:
    bert = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    save_model(BertLMHeadModel(bert), word_tokenizer(), tmp_path)
    with pytest.raises(ConfigError, match=r"BertLMHeadModel is no causal language model: .* set is_decoder"):
        load_causal_lm(ModelConfig(path=str(tmp_path)))
    bert.is_decoder = True
    save_model(BertLMHeadModel(bert), word_tokenizer(), tmp_path)
    assert load_causal_lm(ModelConfig(path=str(tmp_path))).config.is_decoder


def test_the_backbone_of_a_model_whose_prefix_names_nothing(tmp_path: Path) -> None:
    model = tiny_model(config_class("llama4_text"))
    assert model.base_model is model
    assert type(backbone(model)).__name__ == "Llama4TextModel"
    assert SPECIAL["pad_token_id"] == 0
