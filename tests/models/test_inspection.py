"""What a model's folder says of itself: each fault is found without loading weights, raised by the loader, and put
right by its remedy, applied to the letter."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from tlcr.config.schema import ModelConfig
from tlcr.errors import ConfigError
from tlcr.models import attention
from tlcr.models.heads import classification_head
from tlcr.models.inspection import THREE_CLASSES, TWO_CLASSES, label_faults, model_faults
from tlcr.models.loading import load_causal_lm, load_sequence_classifier, load_token_classifier
from tlcr.models.reward_model import sequence_scores
from tlcr.models.saving import save_model
from tlcr.models.tokenizers import load_tokenizer

IDS = torch.tensor([[5, 9, 17, 23, 2, 40], [7, 8, 30, 31, 32, 33]])
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n"
LOADERS = {
    "policy": lambda cfg: (load_tokenizer(cfg), load_causal_lm(cfg)),
    "reward_model": lambda cfg: (load_tokenizer(cfg), load_sequence_classifier(cfg.path, cfg)),
    "discriminator": lambda cfg: (load_tokenizer(cfg), load_token_classifier(cfg.path, cfg)),
}


@pytest.fixture
def folder(tmp_path, tiny_tokenizer, tiny_causal_lm, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)  # remedies write beside the model
    save_model(tiny_causal_lm(), tiny_tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def reward_folder(tmp_path, tiny_tokenizer, tiny_causal_lm, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    config = tiny_causal_lm().config
    config.num_labels = 1
    save_model(LlamaForSequenceClassification(config).eval(), tiny_tokenizer, tmp_path / "reward")
    return tmp_path / "reward"


def only_fault(folder, role="policy", **changes) -> str:
    """The one fault of a folder, which loading raises too."""
    cfg = ModelConfig(path=str(folder), **changes)
    faults = model_faults(cfg, role)
    assert len(faults) == 1, faults
    assert "\n" not in str(faults[0])
    with pytest.raises(ConfigError) as caught:
        LOADERS[role](cfg)
    assert str(caught.value) == str(faults[0])
    return str(faults[0])


def is_sound(folder, role="policy", **changes):
    cfg = ModelConfig(path=str(folder), **changes)
    assert model_faults(cfg, role) == []
    return LOADERS[role](cfg)[1]


def apply(fault: str) -> None:
    """Runs the command of a remedy."""
    code = re.search(r'python -c "(.*)"', fault)
    assert code is not None, fault
    exec(code.group(1), {})


def change_json(path: Path, **changes) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    weights = {name: tensor.clone().contiguous() for name, tensor in change(load_file(path)).items()}
    save_file(weights, path, metadata={"format": "pt"})


def shard(folder: Path) -> list[Path]:
    """Splits a saved model into parts with an index."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 1
    return parts


# ---- sound folders


@pytest.mark.parametrize("make", ["tiny_causal_lm", "tiny_gpt2"])
def test_what_tlcr_saves_has_no_fault(tmp_path, tiny_tokenizer, make, request):
    lm = request.getfixturevalue(make)()
    classifiers = {
        "policy": lm,
        "reward_model": load_sequence_classifier(lm, ModelConfig()),
        "discriminator": load_token_classifier(lm, ModelConfig(), id2label=TWO_CLASSES),
    }
    for role, model in classifiers.items():
        save_model(model, tiny_tokenizer, tmp_path / role)
        loaded = is_sound(tmp_path / role, role)
        assert torch.equal(loaded(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


def test_tied_embeddings_sharded_files_and_weights_that_are_merged_are_sound(tmp_path, tiny_tokenizer, tiny_causal_lm):
    save_model(tiny_causal_lm(tie_word_embeddings=True), tiny_tokenizer, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    is_sound(tmp_path / "tied")
    save_model(tiny_causal_lm(), tiny_tokenizer, tmp_path / "parts")
    shard(tmp_path / "parts")
    is_sound(tmp_path / "parts")
    # its files keep every expert apart, and the model has them in one tensor
    experts = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tiny_tokenizer),
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )
    save_model(experts, tiny_tokenizer, tmp_path / "experts")
    assert any("experts.0" in name for name in load_file(tmp_path / "experts" / "model.safetensors"))
    is_sound(tmp_path / "experts")


def test_the_embedded_model_is_no_folder():
    assert model_faults(ModelConfig(), "policy") == []


def test_a_folder_that_is_not_there(tmp_path):
    faults = model_faults(ModelConfig(path=str(tmp_path / "absent")), "policy")
    assert [fault.subject for fault in faults] == ["model", "tokenizer"]
    assert re.match("cannot load a language model from .*absent", faults[0].fact)


# ---- files that are no weights


def test_a_git_lfs_pointer_in_the_place_of_weights(folder):
    (folder / "model.safetensors").write_text(POINTER)
    assert re.search(r"model\.safetensors' is a Git LFS pointer.*'git lfs pull'", only_fault(folder))


def test_a_git_lfs_pointer_in_the_place_of_a_tokenizer(folder):
    (folder / "tokenizer.json").write_text(POINTER)
    assert re.search(r"tokenizer\.json' is a Git LFS pointer", only_fault(folder))


def test_a_git_lfs_pointer_among_the_parts(folder):
    parts = shard(folder)
    parts[1].write_text(POINTER)
    assert re.search(rf"{parts[1].name}' is a Git LFS pointer", only_fault(folder))


def test_a_git_lfs_pointer_in_the_place_of_a_gguf_file(folder):
    (folder / "model.gguf").write_text(POINTER)
    found = [str(fault) for fault in model_faults(ModelConfig(path=str(folder), gguf_file="model.gguf"), "policy")]
    assert "model.gguf' is a Git LFS pointer" in " ".join(found)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_weights_that_were_cut_off(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    state = "empty" if keep == 0 else "cut off or damaged"
    assert re.search(rf"model\.safetensors' is {state}.*; download or copy the file again", only_fault(folder))


def test_a_part_that_the_index_names_is_missing(folder):
    parts = shard(folder)
    parts[0].unlink()
    assert re.search(rf"lacks {parts[0].name}, which model\.safetensors\.index\.json names", only_fault(folder))


def test_an_index_that_is_none(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "is no index of weights" in only_fault(folder)


def test_pickled_weights_alone_are_converted_by_the_remedy(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    fault = only_fault(folder)
    assert "its weights are pickled (pytorch_model.bin); tlcr reads safetensors only" in fault
    apply(fault)
    loaded = is_sound(folder)
    assert torch.equal(loaded.lm_head.weight, weights["lm_head.weight"])


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "it has no weights (model.safetensors" in only_fault(folder)
    (folder / "small.gguf").write_bytes(b"GGUF")
    assert only_fault(folder).endswith("; model.gguf_file: small.gguf")


def test_a_gguf_file_that_is_not_there(folder):
    (folder / "small.gguf").write_bytes(b"GGUF")
    from tlcr.models.weight_files import weight_files

    _, faults = weight_files(ModelConfig(path=str(folder), gguf_file="large.gguf"), "policy")
    assert "has no file 'large.gguf' (model.gguf_file); its GGUF files: small.gguf" in str(faults[0])


# ---- adapters


def make_adapter(folder: Path, base: Path, kind: str = "LORA") -> Path:
    folder.mkdir()
    about = {"peft_type": kind, "base_model_name_or_path": str(base), "r": 4, "lora_alpha": 8}
    about |= {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    names = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{side}.weight" for i in (0, 1) for side in "AB"]
    shapes = {"A": (4, 32), "B": (32, 4)}
    weights = {name: torch.randn(*shapes[name.split("lora_")[1][0]]) for name in names}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("role", LOADERS)
def test_an_adapter_is_to_be_merged(folder, tmp_path, tiny_tokenizer, role):
    adapter = make_adapter(tmp_path / "adapter", folder)
    tiny_tokenizer.save_pretrained(adapter)
    fault = only_fault(adapter, role)
    assert f"{str(adapter)!r} is an adapter (LORA) of {str(folder)!r} and has no weights of its own" in fault
    task = {"policy": "CausalLM", "reward_model": "SequenceClassification", "discriminator": "TokenClassification"}
    assert f"from peft import AutoPeftModelFor{task[role]}" in fault
    assert "merge_and_unload().save_pretrained('adapter-merged')" in fault


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
def test_the_remedy_of_an_adapter_gives_the_merged_model(folder, tmp_path, tiny_tokenizer):
    pytest.importorskip("peft")
    adapter = make_adapter(tmp_path / "adapter", folder)
    tiny_tokenizer.save_pretrained(adapter)
    apply(only_fault(adapter))
    merged = is_sound(tmp_path / "adapter-merged")
    lora = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    change = 8 / 4 * lora[name.format("B")] @ lora[name.format("A")]
    before = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.weight.data, before + change)


def test_an_adapter_that_cannot_be_merged_says_so(folder, tmp_path):
    faults = model_faults(ModelConfig(path=str(make_adapter(tmp_path / "a", folder, "PREFIX_TUNING"))), "policy")
    assert faults[0].remedy == "this kind cannot be merged into weights: name a model with whole weights"


def test_whole_weights_beside_an_adapter_are_ambiguous(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')
    assert "has whole weights and an adapter (adapter_config.json, LORA)" in only_fault(folder)


def test_weights_with_an_adapter_that_was_not_merged(folder):
    def wrap(weights):
        name = "model.layers.0.self_attn.q_proj"
        weights[f"{name}.base_layer.weight"] = weights.pop(f"{name}.weight")
        return weights | {f"{name}.lora_A.default.weight": torch.zeros(4, 32)}

    change_weights(folder, wrap)
    assert "has the weights of an adapter that is not merged, such as model.layers.0" in only_fault(folder)


# ---- weights under other names, of other shapes, of other models


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "pretrained_model."])
def test_the_names_that_a_wrapper_gives_are_put_right_by_the_remedy(folder, prefix):
    before = load_causal_lm(ModelConfig(path=str(folder)))(IDS).logits
    change_weights(folder, lambda weights: {prefix + name: weight for name, weight in weights.items()})
    fault = only_fault(folder)
    assert f"they begin with {prefix!r}, which a wrapper of the model has put there" in fault
    apply(fault)
    assert torch.equal(is_sound("model-renamed")(IDS).logits, before)


def test_some_names_without_their_beginning(folder):
    before = load_causal_lm(ModelConfig(path=str(folder)))(IDS).logits
    change_weights(folder, lambda weights: {name.removeprefix("model."): weight for name, weight in weights.items()})
    # transformers puts the beginning before the names of a backbone itself
    assert torch.equal(is_sound(folder)(IDS).logits, before)


def test_a_backbone_is_no_language_model(folder):
    change_weights(folder, lambda weights: {k: v for k, v in weights.items() if k != "lm_head.weight"})
    assert "holds no trained language model: it lacks lm_head.weight; name the folder" in only_fault(folder)


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_is_no_policy(tmp_path, tiny_tokenizer, tiny_causal_lm, tied):
    config = tiny_causal_lm(tie_word_embeddings=tied).config
    config.num_labels = 1
    save_model(LlamaForSequenceClassification(config), tiny_tokenizer, tmp_path)
    fault = only_fault(tmp_path)
    assert f"holds no language model: it {'has' if tied else 'lacks lm_head.weight and has'} score.weight" in fault


def test_a_language_model_is_no_classifier(folder):
    for role in ("reward_model", "discriminator"):
        faults = model_faults(ModelConfig(path=str(folder)), role)
        assert re.search(r"holds no trained \w+Classification model: it lacks score\.", faults[0].fact)


def test_weights_of_other_shapes_than_the_config_says(folder):
    change_json(folder / "config.json", intermediate_size=48)
    assert re.search(
        r"do not have the shapes of its config.json: model\.layers\.0\.mlp\.down_proj\.weight is 32 x 64 and should be "
        r"32 x 48, .* and 3 more; bring back",
        only_fault(folder),
    )


def test_layers_that_the_config_does_not_count(folder):
    change_json(folder / "config.json", num_hidden_layers=1, layer_types=None)
    assert "has weights of layers that its config.json does not count: model.layers.1" in only_fault(folder)
    change_json(folder / "config.json", num_hidden_layers=3)
    assert "it lacks model.layers.2" in only_fault(folder)
    change_json(folder / "config.json", num_hidden_layers=2)
    is_sound(folder)


def test_layers_that_predict_further_tokens_are_left_out(folder):
    change_json(folder / "config.json", num_hidden_layers=1, layer_types=None, num_nextn_predict_layers=1)
    is_sound(folder)


def test_other_weights_that_are_not_used_are_said_once(folder, caplog):
    change_weights(folder, lambda weights: weights | {"v_head.summary.weight": torch.zeros(1, 32)})
    for _ in range(2):
        is_sound(folder)
    assert [r.getMessage() for r in caplog.records if r.name == "tlcr"] == [
        f"1 weight of {str(folder)!r} is not used as LlamaForCausalLM: v_head.summary.weight"
    ]


def test_a_model_of_another_kind_is_no_policy(tmp_path, tiny_tokenizer):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=len(tiny_tokenizer), dim=32, hidden_dim=32, n_heads=4, n_layers=1)
    save_model(DistilBertForSequenceClassification(config), tiny_tokenizer, tmp_path)
    assert "is a 'distilbert' model, for which transformers has no AutoModelForCausalLM; use another" in only_fault(
        tmp_path
    )


# ---- tokens without an embedding


def test_padding_beyond_the_vocabulary_is_replaced_and_said(folder, caplog):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert tokenizer.pad_token_id == rows
    is_sound(folder)
    assert load_tokenizer(ModelConfig(path=str(folder))).pad_token == "<eos>"
    said = f"pads with '[PAD]', for which {str(folder)!r} has no embedding: '<eos>' pads"
    assert any(said in record.getMessage() for record in caplog.records)
    is_sound(folder, pad_token="<bos>")


def test_tokens_of_the_template_beyond_the_vocabulary_get_rows_by_the_remedy(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<|im_start|>", "<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    is_sound(folder)  # no text of ours has these tokens
    template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    fault = only_fault(folder, chat_template=template)
    assert f"with {rows} embeddings, does not have: '<|im_start|>' ({rows}); give the model rows" in fault
    apply(fault)
    model = is_sound("model-resized", chat_template=template)
    assert model.get_input_embeddings().num_embeddings == rows + 2


def test_an_end_of_sequence_beyond_the_vocabulary_is_a_fault(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(folder)
    assert "does not have: '<|end|>'" in only_fault(folder)


# ---- reward models of others


def test_one_output_is_read_from_the_weights(reward_folder):
    before = load_sequence_classifier(reward_folder, ModelConfig())(IDS[:1]).logits
    change_json(reward_folder / "config.json", id2label=None, label2id=None, num_labels=None)
    model = is_sound(reward_folder, "reward_model")
    assert model.config.num_labels == 1
    assert torch.equal(model(IDS[:1]).logits, before)


def test_several_outputs_are_refused(tmp_path, tiny_tokenizer, tiny_causal_lm):
    config = tiny_causal_lm().config
    config.num_labels = 3
    save_model(LlamaForSequenceClassification(config), tiny_tokenizer, tmp_path)
    change_json(tmp_path / "config.json", id2label=None, label2id=None)
    fault = only_fault(tmp_path, "reward_model")
    assert "has 3 outputs; wanted 1, the score of an answer (num_labels: 1)" in fault


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "bias", "prefix"),
    [
        ("value_head", False, None),
        ("v_head.summary", True, None),
        ("score", True, None),
        ("my_head", False, "my_head"),
    ],
)
def test_a_head_under_another_name_or_with_a_bias_is_used_in_float32(reward_folder, name, bias, prefix, dtype, caplog):
    plain = sequence_scores(load_sequence_classifier(reward_folder, ModelConfig(dtype=dtype)), IDS, IDS >= 0)

    def rename(weights):
        weights[f"{name}.weight"] = weights.pop("score.weight")
        return weights | ({f"{name}.bias": torch.tensor([2.5])} if bias else {})

    change_weights(reward_folder, rename)
    change_json(reward_folder / "config.json", value_head_prefix=prefix)
    caplog.clear()
    model = is_sound(reward_folder, "reward_model", dtype=dtype)
    assert classification_head(model).weight.dtype == torch.float32
    torch.testing.assert_close(sequence_scores(model, IDS, IDS >= 0), plain + (2.5 if bias else 0.0))
    assert not caplog.records


def test_a_head_of_another_form_is_no_score(reward_folder):
    change_weights(
        reward_folder,
        lambda weights: (
            {k: v for k, v in weights.items() if k != "score.weight"}
            | {"v_head.0.weight": torch.zeros(32, 32), "v_head.2.weight": torch.zeros(1, 32)}
        ),
    )
    assert "it lacks score.weight, and has v_head.0.weight, v_head.2.weight" in only_fault(
        reward_folder, "reward_model"
    )


def test_a_normalisation_in_the_config_is_said_and_not_applied(reward_folder, caplog):
    before = load_sequence_classifier(reward_folder, ModelConfig())(IDS[:1]).logits
    change_json(reward_folder / "config.json", mean=-1.5, std=2.0)
    model = is_sound(reward_folder, "reward_model")
    assert torch.equal(model(IDS[:1]).logits, before)
    assert "has mean -1.5 and std 2.0 in its config.json: not applied" in caplog.text


def test_a_reward_model_without_a_padding_token_scores_answers_together(reward_folder):
    before = sequence_scores(load_sequence_classifier(reward_folder, ModelConfig()), IDS, IDS >= 0)
    change_json(reward_folder / "config.json", pad_token_id=None)
    change_json(reward_folder / "tokenizer_config.json", pad_token=None)
    model = is_sound(reward_folder, "reward_model")
    tokenizer = load_tokenizer(ModelConfig(path=str(reward_folder)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert torch.equal(sequence_scores(model, IDS, IDS >= 0), before)
    assert AutoModelForSequenceClassification.from_pretrained(reward_folder).config.pad_token_id is None


def test_a_discriminator_with_other_labels(tmp_path, tiny_tokenizer, tiny_causal_lm):
    labels = {0: "bad", 1: "good"}
    save_model(load_token_classifier(tiny_causal_lm(), ModelConfig(), id2label=labels), tiny_tokenizer, tmp_path)
    assert "has the labels [bad, good]; wanted [negative, positive]" in only_fault(tmp_path, "discriminator")


@pytest.mark.parametrize(
    ("labels", "remedy"),
    [
        ({0: "bad", 1: "good"}, "or rename id2label in its config.json"),
        ({0: "positive", 1: "negative"}, "new names alone would turn the rewards round"),
        ({0: "positive", 1: "neutral", 2: "negative"}, "new names alone would turn the rewards round"),
        ({0: "score"}, "train discriminator'"),
    ],
)
def test_labels_are_only_to_be_renamed_where_that_keeps_their_meaning(labels, remedy):
    (fault,) = label_faults(SimpleNamespace(id2label=labels), "tokens", [TWO_CLASSES, THREE_CLASSES])
    assert fault.remedy.endswith(remedy) or remedy in fault.remedy
    assert ("rename id2label" in fault.remedy) == ("rename" in remedy)


# ---- attention


@pytest.fixture
def eager_only(tmp_path, tiny_tokenizer) -> Path:
    """A model of an architecture that transformers gives no sdpa attention."""
    config = GPTNeoConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    )
    save_model(GPTNeoForCausalLM(config), tiny_tokenizer, tmp_path / "eager")
    return tmp_path / "eager"


def test_an_architecture_without_sdpa_runs_eager_and_says_so_once(eager_only, tiny_tokenizer, caplog):
    for _ in range(2):
        model = is_sound(eager_only)
    assert model.config._attn_implementation == "eager"
    assert [r.getMessage() for r in caplog.records if "attention" in r.getMessage()] == [
        f"{str(eager_only)!r} runs with eager attention (model.attn_implementation): its architecture has no other"
    ]
    scorer = load_sequence_classifier(model, ModelConfig())
    torch.nn.init.normal_(classification_head(scorer).weight)
    save_model(scorer, tiny_tokenizer, eager_only.parent / "reward")
    loaded = is_sound(eager_only.parent / "reward", "reward_model")
    assert loaded.config._attn_implementation == "eager"
    torch.testing.assert_close(sequence_scores(loaded, IDS, IDS >= 0), sequence_scores(scorer, IDS, IDS >= 0))


def test_an_attention_that_is_named_and_does_not_work_is_a_whole_sentence(eager_only):
    fault = only_fault(eager_only, attn_implementation="sdpa")
    assert fault.startswith("model.attn_implementation 'sdpa' does not work with GPTNeoForCausalLM: ")
    assert fault.endswith("; leave model.attn_implementation out, or set it to eager, which every architecture has")
    is_sound(eager_only, attn_implementation="eager")


def test_where_there_is_sdpa_it_is_taken(folder):
    for named in ("auto", "sdpa"):
        assert is_sound(folder, attn_implementation=named).config._attn_implementation == attention.NAME


def test_what_transformers_says_is_not_cut(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "unknown")
    change_json(tmp_path / "unknown" / "config.json", model_type="nothing_of_this_name", architectures=None)
    fault = str(model_faults(ModelConfig(path=str(tmp_path / "unknown")), "policy")[0])
    assert "does not recognize this architecture" in fault
    assert len(fault) > 500
    assert fault.endswith("give a folder that transformers can load (hub names need the network, or a filled cache)")
