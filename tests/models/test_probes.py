"""Reward models that are no decoders: their scores are those of their own forward pass, or they are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.models.architectures import config_class, tiny_model
from tests.models.test_architectures import OURS, THEIRS, word_tokenizer
from tlcr.config.schema import ModelConfig, PPOConfig
from tlcr.errors import ConfigError, DataError
from tlcr.models.actor_critic import build_value_model
from tlcr.models.bidirectional import make_top_layers_bidirectional
from tlcr.models.discriminator import load_discriminator, score_answers
from tlcr.models.heads import Head
from tlcr.models.inspection import TWO_CLASSES
from tlcr.models.loading import load_sequence_classifier
from tlcr.models.positions import check_fits, position_limit
from tlcr.models.probes import check_reward_model, is_causal, reads_last_token, require_causal, require_decoder
from tlcr.models.reward_model import prefix_scores, sequence_scores
from tlcr.models.saving import save_model

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "roberta": SMALL,
    "electra": SMALL | {"embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "modernbert": SMALL | {"cls_token_id": 1, "sep_token_id": 2},
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "d_kv": 16, "decoder_start_token_id": 0},
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2},
}  # fmt: skip
DECODERS = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2}, "llama": SMALL}
ROWS = [[1, 5, 9, 17, 23, 2], [1, 7, 8, 2], [40, 41]]


def saved(folder: Path, kind: str, options: dict[str, Any], auto: Any = AutoModelForSequenceClassification) -> Path:
    """A random classifier with weights far from 0, in a folder."""
    labels = {"num_labels": 1} if auto is AutoModelForSequenceClassification else {"id2label": TWO_CLASSES}
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, vocab_size=99, **SPECIAL, **options, **labels)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and not name.startswith(model.base_model_prefix + "."):
            nn.init.normal_(parameter)
    save_model(model, word_tokenizer(), folder)
    return folder


def padded(left: int) -> tuple[Tensor, Tensor]:
    """ROWS with that many columns of padding before them."""
    ids, mask = torch.zeros(len(ROWS), left + 6, dtype=torch.long), torch.zeros(len(ROWS), left + 6).bool()
    for row, tokens in enumerate(ROWS):
        ids[row, left : left + len(tokens)], mask[row, left : left + len(tokens)] = torch.tensor(tokens), True
    return ids, mask


@torch.no_grad()
def alone(folder: Path) -> Tensor:
    """What transformers gives for each row by itself."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in ROWS])


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_scores_are_those_of_the_models_own_forward_pass(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, kind, (ENCODERS | DECODERS)[kind])
    model = load_sequence_classifier(folder, ModelConfig())
    truth = alone(folder)
    assert truth.std() > 1e-2  # so that another place of reading shows
    for left in (0, 3):
        torch.testing.assert_close(sequence_scores(model, *padded(left)), truth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sequence_scores(model, *padded(2), micro_batch_size=2), truth, rtol=1e-4, atol=1e-4)
    assert reads_last_token(model) == is_causal(model) == (kind in DECODERS)


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_an_encoder_decoder_is_refused(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, kind, ENCODER_DECODERS[kind])
    with pytest.raises(ConfigError, match="an encoder and a decoder: it looks for its score at an end-of-sequence"):
        load_sequence_classifier(folder, ModelConfig())


def test_a_score_that_depends_on_padding_is_refused(tmp_path: Path) -> None:
    """XLNet reads its score in the last column, whatever the mask says of it."""
    options = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}
    folder = saved(tmp_path, "xlnet", options)
    with pytest.raises(ConfigError, match="is a XLNetForSequenceClassification, whose scores depend on padding"):
        load_sequence_classifier(folder, ModelConfig(attn_implementation="eager"))


def test_a_forward_pass_that_needs_more_than_ids_is_refused(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(saved(tmp_path, "bert", SMALL))

    def forward(**inputs: Tensor) -> Any:
        raise ValueError(f"You have to specify pixels\nbeside {sorted(inputs)}")

    model.forward = forward
    with pytest.raises(ConfigError, match=r"fails on a plain text \(ValueError: You have to specify pixels beside \["):
        check_reward_model(model)


def test_a_head_of_zeros_does_not_hide_where_the_score_is_read(tmp_path: Path) -> None:
    for kind in ("bert", "llama"):
        model = AutoModelForSequenceClassification.from_pretrained(
            saved(tmp_path / kind, kind, (ENCODERS | DECODERS)[kind])
        )
        nn.init.zeros_((model.classifier if kind == "bert" else model.score).weight)
        assert reads_last_token(model) == (kind == "llama")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_large_activation_does_not_hide_that_a_model_reads_later_tokens(dtype: torch.dtype) -> None:
    """All other differences are within the rounding of that number in bfloat16."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=99, **SPECIAL, **SMALL | {"hidden_size": 64})
    model = AutoModelForTokenClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.1)
        model.model.embed_tokens.weight.normal_()
        model.model.embed_tokens.weight[:, 0] = 10.0
        model.model.norm.weight[0] = 40.0
    model = model.to(dtype)
    assert is_causal(model)
    seeing = copy.deepcopy(model)
    make_top_layers_bidirectional(seeing, 2)
    assert not is_causal(seeing)


@pytest.mark.parametrize("model_type", [*OURS, *THEIRS, "gpt2", "llama", "mixtral", "qwen3_moe", "jetmoe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_is_causal_in_every_dtype(model_type: str, dtype: torch.dtype) -> None:
    """Experts, of which later tokens may change the numbers of tokens, round otherwise and no more."""
    model = tiny_model(config_class(model_type)).to(dtype)
    require_causal(model)


def test_a_score_for_every_prefix_needs_a_decoder(tmp_path: Path) -> None:
    model = load_sequence_classifier(saved(tmp_path, "bert", SMALL), ModelConfig())
    with pytest.raises(ConfigError, match=r"prefix_difference' needs a reward model that is a decoder .* Bert"):
        require_decoder(model, "reward.kind 'prefix_difference'")
    decoder = load_sequence_classifier(saved(tmp_path / "llama", "llama", SMALL), ModelConfig())
    require_decoder(decoder, "reward.kind 'prefix_difference'")
    ids, mask = padded(2)
    scores = prefix_scores(decoder, ids, mask)
    assert not scores[~mask].any()
    truth = decoder(input_ids=torch.tensor([ROWS[0][:3]])).logits
    torch.testing.assert_close(scores[0, 4], truth[0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_the_last_layer_of_an_encoders_head_is_float32_too(kind: str, tmp_path: Path) -> None:
    model = load_sequence_classifier(saved(tmp_path, kind, ENCODERS[kind]), ModelConfig(dtype="bfloat16"))
    heads = [module for module in model.modules() if isinstance(module, Head)]
    assert [head.weight.dtype for head in heads] == [torch.float32]
    rows = torch.randint(3, 99, (200, 9))
    assert len(sequence_scores(model, rows, torch.ones_like(rows).bool()).unique()) > 195


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_model_reads_as_many_tokens_as_its_positions_say(kind: str, tmp_path: Path) -> None:
    """RoBERTa keeps the first rows of its positions: with 14 of them it reads fewer tokens, and fails at one more."""
    model = load_sequence_classifier(saved(tmp_path, kind, {**SMALL, "max_position_embeddings": 14}), ModelConfig())
    limit = position_limit(model)
    assert limit is not None
    longest = torch.full((1, limit), 7)
    assert sequence_scores(model, longest, torch.ones_like(longest).bool()).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 7), attention_mask=torch.ones(1, limit + 1))
    with pytest.raises(DataError, match=f"has {limit + 1} tokens, and the model reads at most {limit}"):
        check_fits(model, limit + 1, "a text")


def test_values_do_not_start_from_an_encoder(tmp_path: Path) -> None:
    bert = load_sequence_classifier(saved(tmp_path, "bert", SMALL), ModelConfig())
    policy = AutoModelForSequenceClassification.from_pretrained(saved(tmp_path / "llama", "llama", SMALL))
    with pytest.raises(ConfigError, match="its backbone is not that of BertLMHeadModel"):
        build_value_model(PPOConfig(value_init="reward_model"), ModelConfig(), policy=policy, reward_model=bert)
    tokens = AutoModelForTokenClassification.from_pretrained(
        saved(tmp_path / "tokens", "bert", SMALL, AutoModelForTokenClassification)
    )
    with pytest.raises(ConfigError, match="is no decoder: it reads later tokens"):
        build_value_model(PPOConfig(value_init="discriminator"), ModelConfig(), policy=policy, discriminator=tokens)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert"])
def test_an_encoder_may_be_the_discriminator(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, kind, ENCODERS[kind], AutoModelForTokenClassification)
    model, tokenizer = load_discriminator(folder, ModelConfig(path=str(folder)))
    answers = [("w5 w6", " w7 w8 w9"), ("w10", " w11")]
    scores = score_answers(
        model, tokenizer, answers, max_prompt_tokens=8, max_answer_tokens=8, batch_size=2, end_of_sequence=False
    )
    for (prompt, answer), given in zip(answers, scores, strict=True):
        ids = torch.tensor([tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            wanted = model(input_ids=ids).logits[0].softmax(dim=-1)[-len(given.ids) :, 1]
        torch.testing.assert_close(torch.tensor(given.p_positive), wanted, rtol=1e-4, atol=1e-5)
