"""What two processes check of models that are read straight into shards, together. Started by test_sharded_loading."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForTokenClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from tests.launched import Checks
from tests.training.sharded import full, lm
from tlcr.config.schema import ModelConfig, PPOConfig
from tlcr.errors import ConfigError
from tlcr.models.actor_critic import ActorCritic, build_value_model
from tlcr.models.discriminator import classify
from tlcr.models.heads import classification_head
from tlcr.models.inspection import TWO_CLASSES
from tlcr.models.loading import load_causal_lm, load_sequence_classifier, load_token_classifier
from tlcr.models.notes import logger
from tlcr.models.reward_model import sequence_scores
from tlcr.models.saving import save_model
from tlcr.models.stored import is_unread
from tlcr.training.distributed import barrier, is_main_process, on_main_process
from tlcr.training.sharding import Sharding, as_forward, is_sharded, local, shard, shard_model, whole_state

checks = Checks()
LLAMA: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 63, "num_attention_heads": 4, "num_hidden_layers": 3}
LLAMA |= {"num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 32, "pad_token_id": 0}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 61, "pad_token_id": 0}
OPT: dict[str, Any] = {"hidden_size": 32, "ffn_dim": 63, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT |= {"vocab_size": 61, "max_position_embeddings": 32, "word_embed_proj_dim": 32, "pad_token_id": 0}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "gpt2 untied": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, tie_word_embeddings=False)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=8)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
}
BERT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 63, "num_attention_heads": 4, "num_hidden_layers": 2}
BERT |= {"vocab_size": 61, "max_position_embeddings": 32}
MOE: dict[str, Any] = {"intermediate_size": 64, "num_local_experts": 2}
IDS_BL = torch.tensor([[5, 9, 30, 41, 17], [7, 44, 12, 60, 2]])


def stored(folder: Path, make: Callable[[], PreTrainedModel], **options: Any) -> Path:
    """The model's folder, which the main process writes."""

    def write() -> None:
        torch.manual_seed(0)
        make().save_pretrained(folder, **options)

    on_main_process(write)
    return folder


def in_shards(model: PreTrainedModel) -> PreTrainedModel:
    assert is_unread(model) and all(p.is_meta for p in model.parameters())
    shard_model(model, full())
    assert not is_unread(model) and is_sharded(model)
    return model


def equal(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """The same weights, buffers and outputs, bit for bit; and half of them here."""
    weights = whole_state(model)
    if is_main_process():
        assert weights.keys() == plain.state_dict().keys()
        for name, truth in plain.state_dict().items():
            assert weights[name].dtype == truth.dtype and torch.equal(weights[name], truth), name
    for (name, ours), (other, theirs) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert name == other and ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    share = sum(local(p).numel() for p in model.parameters()) / sum(p.numel() for p in plain.parameters())
    assert share < 0.6
    assert model.training == plain.training
    with torch.no_grad():
        ours = as_forward(model, lambda: model(input_ids=IDS_BL).logits)
        assert torch.equal(ours, plain(input_ids=IDS_BL).logits)


@checks
def shards_are_those_of_the_model(folder: Path) -> None:
    """In one file and in many, and as a backbone whose names have no prefix."""
    for name, make in MODELS.items():
        paths = [stored(folder / name, make), stored(folder / f"{name} in parts", make, max_shard_size="20KB")]
        assert len(list(paths[1].glob("model-*.safetensors"))) > 2
        for path in paths:
            for dtype in ("float32", "bfloat16"):
                cfg = ModelConfig(path=str(path), dtype=dtype)
                plain, model = load_causal_lm(cfg), in_shards(load_causal_lm(cfg, sharding=full()))
                equal(model, plain)
                assert model.generation_config.to_dict() == plain.generation_config.to_dict()
                plain_forwards = {type(m).__name__ for m in plain.modules() if "forward" in vars(m)}
                assert {type(m).__name__ for m in model.modules() if "forward" in vars(m)} == plain_forwards

    def without_prefix() -> None:
        weights = load_file(folder / "gpt2" / "model.safetensors")
        short = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
        save_file(short, folder / "gpt2" / "model.safetensors", {"format": "pt"})

    on_main_process(without_prefix)
    cfg = ModelConfig(path=str(folder / "gpt2"))
    equal(in_shards(load_causal_lm(cfg, sharding=full())), load_causal_lm(cfg))


@checks
def new_classifiers_copy_a_model_that_is_not_read_yet(folder: Path) -> None:
    for name in ("llama tied", "gpt2 untied", "opt"):
        for dtype in ("float32", "bfloat16"):
            cfg = ModelConfig(path=str(folder / name), dtype=dtype)
            plain, source = load_causal_lm(cfg), load_causal_lm(cfg, sharding=full())
            makers: list[Callable[[PreTrainedModel], PreTrainedModel]] = [
                lambda lm, cfg=cfg: load_token_classifier(lm, cfg, id2label=TWO_CLASSES),  # type: ignore[misc]
                lambda lm, cfg=cfg: load_sequence_classifier(lm, cfg),  # type: ignore[misc]
            ]
            for make in makers:
                equal(in_shards(make(source)), make(plain))
            equal(in_shards(source), plain)  # it stays as it is
    with pytest.raises(ConfigError, match=r"cut into shards \(sharding.kind\): make it before"):
        load_sequence_classifier(source, cfg)


@checks
def trained_classifiers_keep_their_float32_heads(folder: Path) -> None:
    def trained(load: Callable[[PreTrainedModel], PreTrainedModel]) -> PreTrainedModel:
        model = load(lm(torch.bfloat16, pad_token_id=0))
        for parameter in classification_head(model).parameters():
            torch.nn.init.normal_(parameter)
        return model

    cfg = ModelConfig(dtype="bfloat16")
    rows, mask = IDS_BL, torch.ones_like(IDS_BL, dtype=torch.bool)
    path = stored(folder / "d", lambda: trained(lambda m: load_token_classifier(m, cfg, id2label=TWO_CLASSES)))
    plain, model = load_token_classifier(path, cfg), in_shards(load_token_classifier(path, cfg, sharding=full()))
    equal(model, plain)
    assert classification_head(plain).weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(classify(model, rows, mask), classify(plain, rows, mask))

    path = stored(folder / "r", lambda: trained(lambda m: load_sequence_classifier(m, cfg)))

    def rename() -> None:
        weights = load_file(path / "model.safetensors")
        weights["v_head.summary.weight"] = weights.pop("score.weight")
        weights["v_head.summary.bias"] = torch.tensor([0.3])
        save_file(weights, path / "model.safetensors", {"format": "pt"})

    for change in (lambda: None, rename):  # and under the name that another library gives it
        on_main_process(change)
        plain = load_sequence_classifier(path, cfg)
        model = in_shards(load_sequence_classifier(path, cfg, sharding=full()))
        equal(model, plain)
        with torch.no_grad():
            ours = as_forward(model, lambda model=model: sequence_scores(model, rows, mask))  # type: ignore[misc]
            assert torch.equal(ours, sequence_scores(plain, rows, mask))


@checks
def policy_and_value_model_are_those_of_a_whole_load(folder: Path) -> None:
    """From every model that values can start from, and as a finished run has saved them."""
    for dtype in ("float32", "bfloat16"):
        for init in ("policy", "reward_model", "discriminator", "shared"):
            cfg = ModelConfig(path=str(folder / "llama tied"), dtype=dtype)
            kind = "shared" if init == "shared" else "separate"
            ppo = PPOConfig(value_model=kind, **({} if init == "shared" else {"value_init": init}))

            def load(
                sharding: Sharding | None, cfg: ModelConfig = cfg, init: str = init, ppo: PPOConfig = ppo
            ) -> ActorCritic:
                policy = load_causal_lm(cfg, sharding=sharding)
                values = build_value_model(
                    ppo,
                    cfg,
                    policy=policy,
                    reward_model=load_sequence_classifier(folder / "r", cfg, sharding=sharding),
                    discriminator=load_token_classifier(folder / "d", cfg, sharding=sharding),
                )
                assert is_unread(policy) == (sharding is not None)
                both = ActorCritic(policy, values, chunk_tokens=3)
                shard(both, sharding)
                return both

            plain, cut = load(None), load(full())
            same(cut, plain)
            head = plain.value_head if init == "shared" else classification_head(plain.value_model)
            assert head.weight.any() == (init == "reward_model")
            with torch.no_grad():
                for model in (plain, cut):
                    for number, parameter in enumerate(model.critic.parameters()):
                        local(parameter).fill_(0.1 * number + 0.3)
            places = folder / f"{init}-{dtype}-policy", folder / f"{init}-{dtype}-value"
            cut.save(tokenizer(), *places)
            barrier()
            cfg = ModelConfig(path=str(places[0]), dtype=dtype)
            plain, cut = ActorCritic.load(cfg, places[1]), ActorCritic.load(cfg, places[1], sharding=full())
            shard(cut, full())
            same(cut, plain)


def same(cut: ActorCritic, plain: ActorCritic) -> None:
    """The same weights and outputs, bit for bit; and half of them here."""
    weights = whole_state(cut)
    if is_main_process():
        assert weights.keys() == plain.state_dict().keys()
        for name, truth in plain.state_dict().items():
            assert weights[name].dtype == truth.dtype and torch.equal(weights[name], truth), name
    share = sum(local(p).numel() for p in cut.parameters()) / sum(p.numel() for p in plain.parameters())
    assert share < 0.6
    batch = IDS_BL, torch.ones_like(IDS_BL, dtype=torch.bool), torch.tensor([2, 3, 9])
    with torch.no_grad():
        ours, theirs = (model(*batch, temperature=0.7) for model in (cut, plain))
    assert torch.equal(ours.logprobs_N, theirs.logprobs_N) and torch.equal(ours.values_N, theirs.values_N)


@checks
def what_cannot_be_trained_is_refused_once_it_is_read(folder: Path) -> None:
    """Checks that run a model wait until it has weights."""
    gemma = {**LLAMA, "head_dim": 8, "final_logit_softcapping": 0.5}
    cfg = ModelConfig(path=str(stored(folder / "gemma2", lambda: Gemma2ForCausalLM(Gemma2Config(**gemma)))))
    for values, chunk in (("shared", None), ("separate", 3)):
        policy = load_causal_lm(cfg, sharding=full())
        value_model = build_value_model(PPOConfig(value_model=values), cfg, policy=policy)
        capped = ActorCritic(policy, value_model, chunk_tokens=chunk)
        with pytest.raises(ConfigError, match=r"capped or scaled.*ppo.chunk_tokens=null and ppo.value_model=separate"):
            shard(capped, full())
    bert = BertConfig(**BERT, num_labels=2, id2label={0: "negative", 1: "positive"})
    path = stored(folder / "bert", lambda: BertForTokenClassification(bert))
    policy = load_causal_lm(ModelConfig(path=str(folder / "llama")), sharding=full())
    values = build_value_model(
        PPOConfig(value_init="discriminator"),
        ModelConfig(),
        policy=policy,
        discriminator=load_token_classifier(path, ModelConfig(), sharding=full()),
    )
    with pytest.raises(ConfigError, match="is no decoder: it reads later tokens"):
        shard(ActorCritic(policy, values), full())


@checks
def what_transformers_converts_is_read_whole_and_said(folder: Path) -> None:
    path = stored(folder / "mixtral", lambda: MixtralForCausalLM(MixtralConfig(**(LLAMA | MOE))))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    cfg = ModelConfig(path=str(path))
    model = load_causal_lm(cfg, sharding=full())
    logger.removeHandler(handler)
    assert len(said) == 1 and "is read whole by every process" in said[0]
    assert not is_unread(model)
    shard_model(model, full())
    equal(model, load_causal_lm(cfg))


@checks
def a_saved_folder_is_that_of_the_whole_model(folder: Path) -> None:
    """Every file, byte for byte."""
    for name in ("llama", "llama tied", "gpt2"):
        for dtype in ("float32", "bfloat16"):
            cfg = ModelConfig(path=str(folder / name), dtype=dtype)
            plain, model = load_causal_lm(cfg), in_shards(load_causal_lm(cfg, sharding=full()))
            ours, theirs = folder / "saved in shards", folder / "saved whole"
            save_model(model, tokenizer(), ours)
            save_model(plain, tokenizer(), theirs)
            files = sorted(file.name for file in theirs.iterdir())
            assert files == sorted(file.name for file in ours.iterdir())
            for file in files:
                assert (ours / file).read_bytes() == (theirs / file).read_bytes(), (name, file)
            barrier()


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2, "a": 3}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


@checks
def no_process_holds_the_whole(folder: Path) -> None:
    """Host memory at its highest, of this process; 140 MB of weights, of which each process keeps a half."""
    large = LLAMA | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 36}
    path = stored(folder / "large", lambda: LlamaForCausalLM(LlamaConfig(**large)), max_shard_size="15MB")
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert size > 130e6
    shares = []
    for sharding in (full(), None):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the highest is from now on
        begun = memory("VmRSS")
        model = load_causal_lm(ModelConfig(path=str(path)), sharding=sharding)
        shard_model(model, sharding)
        shares.append((memory("VmHWM") - begun) / size)
        del model
    assert shares[0] < 0.75 < 0.95 < shares[1], shares
    if is_main_process():
        (folder / "shares.txt").write_text(str(shares))


@checks
def no_process_holds_policy_and_value_model_whole(folder: Path) -> None:
    """Of the same model: both are read, and cut together."""
    cfg = ModelConfig(path=str(folder / "large"))
    size = sum(file.stat().st_size for file in Path(cfg.path).glob("*.safetensors"))
    shares = []
    for sharding in (full(), None):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        begun = memory("VmRSS")
        policy = load_causal_lm(cfg, sharding=sharding)
        both = ActorCritic(policy, build_value_model(PPOConfig(), cfg, policy=policy))
        shard(both, sharding)
        shares.append((memory("VmHWM") - begun) / (2 * size))
        del policy, both
    assert shares[0] < 0.7 < 0.85 < shares[1], shares
    if is_main_process():
        (folder / "shares.txt").write_text(f"policy and value model: {shares}")


def memory(name: str) -> int:
    """Bytes of host memory that this process has (VmRSS) or had at its highest (VmHWM), mapped files among them."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    checks.run(Path(sys.argv[1]))
