"""Tokenizers and models: what is checked on loading, what a copied backbone keeps, what a saved folder holds."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.text.test_tokenization import byte_level
from tlcr.config.schema import ModelConfig
from tlcr.errors import CheckpointError, ConfigError
from tlcr.models import notes
from tlcr.models.ends import answer_notes, end_of_sequence_ids, stop_ids
from tlcr.models.heads import backbone, classification_head
from tlcr.models.inspection import THREE_CLASSES, TWO_CLASSES
from tlcr.models.loading import load_causal_lm, load_sequence_classifier, load_token_classifier
from tlcr.models.preparing import disable_dropout
from tlcr.models.saving import save_model
from tlcr.models.tokenizers import load_tokenizer

IDS = torch.tensor([[5, 9, 17, 23, 2, 40], [7, 8, 30, 31, 32, 33]])


@pytest.fixture(params=["tiny_causal_lm", "tiny_gpt2"])
def make(request):
    return request.getfixturevalue(request.param)


def config(folder, **changes) -> ModelConfig:
    return ModelConfig(path=str(folder), **changes)


def rewrite(path, **changes) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


# ---- causal language models


def test_a_saved_model_loads_bit_for_bit_here_and_elsewhere(tmp_path, tiny_tokenizer, make):
    model = make()
    save_model(model, tiny_tokenizer, tmp_path)
    for loaded in (load_causal_lm(config(tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        assert not loaded.training
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tiny_tokenizer.get_vocab()
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_the_dtype_is_the_configs(tmp_path, tiny_tokenizer, make):
    save_model(make(), tiny_tokenizer, tmp_path)
    model = load_causal_lm(config(tmp_path, dtype="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    classifier = load_token_classifier(model, config(tmp_path, dtype="bfloat16"), id2label=TWO_CLASSES)
    assert {p.dtype for p in backbone(classifier).parameters()} == {torch.bfloat16} == {classifier.dtype}
    assert {p.dtype for p in classification_head(classifier).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("auto", "load"),
    [
        (AutoModelForCausalLM, load_causal_lm),
        (AutoModelForTokenClassification, load_token_classifier),
        (AutoModelForSequenceClassification, load_sequence_classifier),
    ],
    ids=["policy", "discriminator", "reward model"],
)
def test_each_weight_goes_straight_to_the_device(tmp_path, tiny_tokenizer, tiny_causal_lm, monkeypatch, auto, load):
    """transformers makes no copy on the host where it is told the device; here it is told, and the CPU stands in."""
    model = tiny_causal_lm()
    if load is load_token_classifier:
        model = load_token_classifier(model, ModelConfig(), id2label=TWO_CLASSES)
    elif load is load_sequence_classifier:
        model = load_sequence_classifier(model, ModelConfig())
    save_model(model, tiny_tokenizer, tmp_path)
    told = []

    def from_pretrained(*args, device_map=None, **options):
        told.append(device_map)
        return kept(*args, **options)

    kept = auto.from_pretrained
    monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    gpu = torch.device("cuda", 0)
    source = str(tmp_path) if load is not load_causal_lm else config(tmp_path)
    arguments = (source,) if load is load_causal_lm else (source, ModelConfig())
    load(*arguments, device=gpu)
    load(*arguments, device=torch.device("cpu"))
    load(*arguments)
    assert told == [{"": gpu}, None, None]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_loading_onto_a_gpu_takes_no_host_memory_for_the_weights(tmp_path, tiny_tokenizer):
    wide = LlamaConfig(vocab_size=400, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, pad_token_id=0)
    with torch.device("cuda"):
        save_model(LlamaForCausalLM(wide), tiny_tokenizer, tmp_path)
    held = re.compile(r"RssAnon:\s+(\d+) kB")
    status = Path("/proc/self/status")
    before = int(held.search(status.read_text())[1])
    model = load_causal_lm(config(tmp_path), device=torch.device("cuda"))
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1024
    assert all(p.is_cuda for p in model.parameters())
    assert int(held.search(status.read_text())[1]) - before < 0.5 * weights


def test_a_new_classifier_is_made_where_the_causal_lm_is(tiny_causal_lm, monkeypatch):
    """On the device of its source from the start: made on the host and moved, it would take as much there."""
    made = []
    kept = torch.nn.Linear.__init__

    def linear(self, *args, **options):
        kept(self, *args, **options)
        made.append(self.weight.device.type)

    monkeypatch.setattr(torch.nn.Linear, "__init__", linear)
    source = tiny_causal_lm().to("meta")
    made.clear()
    assert load_token_classifier(source, ModelConfig(), id2label=TWO_CLASSES).device.type == "meta"
    assert len(made) > 10 and set(made) == {"meta"}


def test_saving_over_a_model_replaces_all_of_it_and_keeps_what_else_is_there(tmp_path, tiny_tokenizer, make):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"a shard of an older, larger model")
    save_model(make(seed=1), tiny_tokenizer, tmp_path)
    model = make(seed=2)
    save_model(model, tiny_tokenizer, tmp_path)
    assert torch.equal(load_causal_lm(config(tmp_path))(IDS).logits, model(IDS).logits)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert "metrics.jsonl" in names
    assert [name for name in names if name.endswith(".safetensors")] == ["model.safetensors"]
    assert not [name for name in names if name.startswith(".")]


def test_a_model_that_cannot_be_saved_leaves_the_old_one(tmp_path, tiny_tokenizer, make, monkeypatch):
    model = make(seed=1)
    save_model(model, tiny_tokenizer, tmp_path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tlcr.files.os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_model(make(seed=2), tiny_tokenizer, tmp_path)
    assert torch.equal(load_causal_lm(config(tmp_path))(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("damage", ['"content": "<pad>",', '"vocab": {', '"added_tokens": ['])
def test_a_tokenizer_whose_file_is_damaged_is_one_line(damage, tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    assert damage in text
    (tmp_path / "tokenizer.json").write_text(text.replace(damage, "", 1), encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot load a tokenizer") as caught:
        load_tokenizer(config(tmp_path))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot load a language model from .*absent") as caught:
        load_causal_lm(config(tmp_path / "absent"))
    assert "\n" not in str(caught.value) and "huggingface" not in str(caught.value)
    (tmp_path / "trained").mkdir()
    with pytest.raises(ConfigError, match=r"there is no such folder \(nearest name: '.*/trained'\); correct the path"):
        load_sequence_classifier(tmp_path / "traned", ModelConfig())
    with pytest.raises(ConfigError, match="cannot load a tokenizer"):
        load_tokenizer(config(tmp_path))
    for load in (load_causal_lm, load_tokenizer):
        with pytest.raises(ConfigError, match=r"'embedded' is no folder: .* set sft.enabled: true"):
            load(ModelConfig())


def test_pickled_weights_are_not_loaded(tmp_path, tiny_tokenizer, make):
    model = make()
    save_model(model, tiny_tokenizer, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot load a language model"):
        load_causal_lm(config(tmp_path))


# ---- tokenizers


def test_the_end_of_sequence_pads_where_no_token_is_named_for_it(tmp_path, tiny_tokenizer, caplog):
    tiny_tokenizer.save_pretrained(tmp_path)
    rewrite(tmp_path / "tokenizer_config.json", pad_token=None)
    for _ in range(2):
        tokenizer = load_tokenizer(config(tmp_path))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tiny_tokenizer.eos_token_id
    assert [record.getMessage() for record in caplog.records] == [
        f"the tokenizer {str(tmp_path)!r} names no padding token: '<eos>' pads, and nothing is learnt from padding"
    ]
    notes.forget_notes()  # as a second run in this process does
    load_tokenizer(config(tmp_path))
    assert len(caplog.records) == 2
    assert load_tokenizer(config(tmp_path, pad_token="<bos>")).pad_token == "<bos>"
    with pytest.raises(ConfigError, match=r"'<nothing>' is not in the vocabulary .* such as '<eos>'"):
        load_tokenizer(config(tmp_path, pad_token="<nothing>"))
    assert len(load_tokenizer(config(tmp_path, pad_token="<eos>"))) == len(tiny_tokenizer)  # nothing was added


def test_a_missing_end_of_sequence_token_is_an_error(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    rewrite(tmp_path / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ConfigError, match="has no end-of-sequence token"):
        load_tokenizer(config(tmp_path))


def test_the_tokenizer_may_be_another_folder(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(ModelConfig(path="absent", tokenizer=str(tmp_path))).eos_token == "<eos>"


def test_a_chat_template_comes_as_text_or_as_a_file(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (tmp_path / "template.jinja").write_text(template)
    for given in (template, str(tmp_path / "template.jinja")):
        tokenizer = load_tokenizer(config(tmp_path, chat_template=given))
        messages = [{"role": "user", "content": "hi"}]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "[hi]"
    with pytest.raises(ConfigError, match="neither a Jinja template nor a file that exists"):
        load_tokenizer(config(tmp_path, chat_template=str(tmp_path / "absent.jinja")))


# ---- the end of answers

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def chat_model(tmp_path, tiny_causal_lm):
    """Writes a model with a template that ends turns with <|im_end|>, and the ends that its files name."""

    def write(*, generation=(), config=None, special=True):
        tokenizer = byte_level()
        tokenizer.add_tokens([AddedToken("<|im_end|>", special=special)])
        tokenizer.chat_template = CHAT
        ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<eos>", "<|im_end|>", "<bos>")}
        model = tiny_causal_lm(vocab_size=len(tokenizer))
        save_model(model, tokenizer, tmp_path)
        (tmp_path / "generation_config.json").unlink()
        if generation:
            GenerationConfig(eos_token_id=[ids[name] for name in generation]).save_pretrained(tmp_path)
        if config is not None:
            rewrite(tmp_path / "config.json", eos_token_id=[ids[name] for name in config])
        notes.forget_notes()
        return ModelConfig(path=str(tmp_path))

    return write


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "named",
    [{"generation": ("<eos>", "<|im_end|>")}, {"generation": ("<|im_end|>",)}, {"config": ("<eos>", "<|im_end|>")}],
)
def test_answers_end_as_the_template_ends_them_where_the_model_names_that_end(chat_model, caplog, named, special):
    cfg = chat_model(**named, special=special)
    for _ in range(2):
        tokenizer = load_tokenizer(cfg)
    assert tokenizer.eos_token == "<|im_end|>"
    ids = tokenizer("a<|im_end|>")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids, skip_special_tokens=True) == "a"
    said = [record.message for record in caplog.records if record.name == "tlcr"]
    assert len(said) == 1 and "answers end with '<|im_end|>', as the chat template of" in said[0]
    assert "not with '<eos>'" in said[0]


@pytest.mark.parametrize("named", [{"generation": ("<eos>",)}, {"config": ("<eos>", "<bos>")}, {}])
def test_answers_end_with_the_tokenizers_own_end_where_the_model_does_not_name_the_templates(chat_model, caplog, named):
    cfg = chat_model(**named)
    tokenizer = load_tokenizer(cfg)
    assert tokenizer.eos_token == "<eos>"
    assert not [record for record in caplog.records if record.name == "tlcr"]
    assert "ends turns with '<|im_end|>', and answers end with '<eos>'" in answer_notes(tokenizer, cfg)[0]


def test_all_that_is_saved_and_generated_has_the_same_end(chat_model, tmp_path, caplog):
    cfg = chat_model(generation=("<eos>", "<|im_end|>", "<bos>"))
    tokenizer, model = load_tokenizer(cfg), load_causal_lm(cfg)
    end, own, bos = tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<eos>", "<bos>"])
    assert end_of_sequence_ids(model, tokenizer) == [end]
    assert stop_ids(model, tokenizer) == sorted([end, own, bos])
    (note,) = answer_notes(tokenizer, cfg)
    assert "also ends answers with '<bos>', '<eos>'; rollouts end with '<|im_end|>' alone" in note
    assert note in [record.message for record in caplog.records]

    save_model(model, tokenizer, tmp_path / "policy")
    discriminator = load_token_classifier(model, cfg, id2label=TWO_CLASSES)
    save_model(discriminator, tokenizer, tmp_path / "discriminator")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert policy.generation_config.eos_token_id == policy.config.eos_token_id == end
    assert stop_ids(policy, load_tokenizer(config(tmp_path / "policy"))) == [end]
    for folder in ("policy", "discriminator"):
        saved = config(tmp_path / folder)
        loaded = load_tokenizer(saved)
        assert loaded.eos_token == "<|im_end|>" and answer_notes(loaded, saved) == ()
        assert json.loads((tmp_path / folder / "config.json").read_text())["eos_token_id"] == end


# ---- classifiers


def test_a_new_head_sits_on_a_copy_of_the_backbone_and_knows_nothing(make):
    source = make()
    before = copy.deepcopy(source.state_dict())
    hidden = backbone(source)(IDS).last_hidden_state
    for classes in (TWO_CLASSES, THREE_CLASSES):
        model = load_token_classifier(source, ModelConfig(), id2label=classes)
        assert torch.equal(backbone(model)(IDS).last_hidden_state, hidden)
        assert torch.equal(model(IDS).logits, torch.zeros(2, 6, len(classes)))
        assert model.config.id2label == classes
        assert model.config.label2id == {label: index for index, label in classes.items()}
    scorer = load_sequence_classifier(source, ModelConfig())
    assert torch.equal(backbone(scorer)(IDS).last_hidden_state, hidden)
    assert classification_head(scorer).out_features == 1

    with torch.no_grad():  # a copy: training it does not touch the source, whose config stays a language model's
        for parameter in (*model.parameters(), *scorer.parameters()):
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert source.config.id2label != THREE_CLASSES


def test_the_head_moves_at_the_first_step_and_the_backbone_at_the_second(make):
    model = load_token_classifier(make(), ModelConfig(), id2label=TWO_CLASSES)
    for moves in (False, True):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(IDS).logits.flatten(0, 1), torch.ones(12, dtype=torch.long)).backward()
        assert classification_head(model).weight.grad.abs().sum() > 0
        gradient = sum(p.grad.abs().sum() for p in backbone(model).parameters() if p.grad is not None)
        assert bool(gradient > 0) is moves
        with torch.no_grad():
            classification_head(model).weight.sub_(classification_head(model).weight.grad)


@pytest.mark.parametrize("auto", [AutoModelForTokenClassification, AutoModelForSequenceClassification])
def test_classifiers_load_with_the_standard_classes(tmp_path, tiny_tokenizer, make, auto):
    load = load_token_classifier if auto is AutoModelForTokenClassification else load_sequence_classifier
    options = {"id2label": TWO_CLASSES} if load is load_token_classifier else {}
    model = load(make(), ModelConfig(), **options)
    torch.nn.init.normal_(classification_head(model).weight)
    save_model(model, tiny_tokenizer, tmp_path)
    anywhere, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    ours = load(tmp_path, ModelConfig(), **options)
    assert torch.equal(anywhere(IDS).logits, model(IDS).logits)
    assert torch.equal(ours(IDS).logits, model(IDS).logits)
    assert torch.equal(anywhere.train()(IDS).logits, model(IDS).logits)  # its config switches dropout off, too


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({0: "NEGATIVE", 1: "POSITIVE"}, r"has the labels \[NEGATIVE, POSITIVE\]; wanted \[negative, positive\] or"),
        ({0: "positive", 1: "negative"}, r"\[positive, negative\]; wanted .* in this order"),
        ({0: "negative", 1: "neutral", 2: "positive"}, None),
    ],
)
def test_a_discriminator_must_have_the_labels(tmp_path, tiny_tokenizer, make, labels, says):
    save_model(load_token_classifier(make(), ModelConfig(), id2label=labels), tiny_tokenizer, tmp_path)
    if says is None:
        assert load_token_classifier(tmp_path, ModelConfig()).config.id2label == labels
        with pytest.raises(ConfigError, match=r"\[negative, neutral, positive\]; wanted \[negative, positive\],"):
            load_token_classifier(tmp_path, ModelConfig(), id2label=TWO_CLASSES)
    else:
        with pytest.raises(ConfigError, match=says):
            load_token_classifier(tmp_path, ModelConfig())


def test_a_language_model_is_no_trained_classifier(tmp_path, tiny_tokenizer, make):
    save_model(make(), tiny_tokenizer, tmp_path)
    for load in (load_token_classifier, load_sequence_classifier):
        with pytest.raises(ConfigError, match=r"holds no trained \w+ model: it lacks .*(score|classifier)"):
            load(tmp_path, ModelConfig())


def test_a_reward_model_has_one_output(tmp_path, tiny_tokenizer, tiny_causal_lm):
    source = tiny_causal_lm()
    source.config.id2label = {0: "a", 1: "b", 2: "c"}
    model = AutoModelForSequenceClassification.from_config(source.config)
    save_model(model, tiny_tokenizer, tmp_path)
    with pytest.raises(ConfigError, match="has 3 outputs; wanted 1"):
        load_sequence_classifier(tmp_path, ModelConfig())


def test_new_classifiers_need_their_labels(tiny_causal_lm):
    with pytest.raises(ConfigError, match="needs id2label"):
        load_token_classifier(tiny_causal_lm(), ModelConfig())


def test_the_backbone_of_a_backbone_is_refused(tiny_causal_lm):
    with pytest.raises(ConfigError, match="LlamaModel has no backbone of its own"):
        backbone(backbone(tiny_causal_lm()))
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no single linear head under score or classifier"):
        classification_head(tiny_causal_lm())


# ---- dropout and checkpointed gradients


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("tiny_causal_lm", {"attention_dropout": 0.5}),
        ("tiny_gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
    ],
)
def test_dropout_is_off_in_modules_and_config(request, name, rates):
    model = request.getfixturevalue(name)(**rates).train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    disable_dropout(model)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    assert torch.equal(model(IDS).logits, model.eval()(IDS).logits)
    assert {rate: getattr(model.config, rate) for rate in rates} == dict.fromkeys(rates, 0.0)


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(tmp_path, tiny_tokenizer, make):
    save_model(make(), tiny_tokenizer, tmp_path)
    gradients = []
    for checkpointing in (False, True):
        model = load_causal_lm(config(tmp_path, gradient_checkpointing=checkpointing)).train()
        calls = []
        layers = getattr(model.base_model, "layers", None) or model.base_model.h
        layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        assert len(calls) == (2 if checkpointing else 1)
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_tokenizer_with_other_ids_than_the_models_own_is_said(tmp_path, tiny_tokenizer, caplog):
    for name in ("model", "same", "other"):
        tiny_tokenizer.save_pretrained(tmp_path / name)
    path = tmp_path / "other" / "tokenizer.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    vocab = whole["model"]["vocab"]
    one, two = [token for token in vocab if token.isalpha()][:2]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    path.write_text(json.dumps(whole), encoding="utf-8")
    load_tokenizer(ModelConfig(path=str(tmp_path / "model"), tokenizer=str(tmp_path / "same")))
    assert "another id" not in caplog.text
    load_tokenizer(ModelConfig(path=str(tmp_path / "model"), tokenizer=str(tmp_path / "other")))
    assert f"gives 2 of {len(tiny_tokenizer)} tokens another id than the tokenizer in" in caplog.text
