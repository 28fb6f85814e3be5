"""Later tokens reach earlier scores exactly where layers are bidirectional; padding never does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForTokenClassification, PreTrainedModel

from tlcr.config.schema import ModelConfig
from tlcr.errors import ConfigError
from tlcr.models.bidirectional import make_top_layers_bidirectional
from tlcr.models.discriminator import classify, labels_of
from tlcr.models.heads import classification_head
from tlcr.models.loading import load_token_classifier
from tlcr.models.preparing import enable_gradient_checkpointing

Make = Callable[..., PreTrainedModel]


def classifier(lm: PreTrainedModel, layers: int, attention: str = "sdpa") -> PreTrainedModel:
    model = load_token_classifier(lm, ModelConfig(), id2label=labels_of("soft"))
    model.set_attn_implementation(attention)
    torch.manual_seed(1)
    torch.nn.init.normal_(classification_head(model).weight)
    make_top_layers_bidirectional(model, layers)
    return model.eval()


def logits(model: PreTrainedModel, rows: list[list[int]], width: int = 0, fill: int = 0, left: bool = False) -> Tensor:
    length = max(width, *map(len, rows))
    ids, mask = torch.full((len(rows), length), fill), torch.zeros(len(rows), length, dtype=torch.bool)
    for b, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        ids[b, where], mask[b, where] = torch.tensor(row), True
    return classify(model, ids, mask)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("width", [0, 9])
def test_a_later_token_changes_earlier_scores_only_with_bidirectional_layers(
    tiny_causal_lm: Make, attention: str, layers: int, width: int
) -> None:
    model = classifier(tiny_causal_lm(), layers, attention)
    row, changed = [7, 8, 9, 10, 11, 12], [7, 8, 9, 10, 11, 99]
    before, after = logits(model, [row, row[:3]], width)[0, :5], logits(model, [changed, row[:3]], width)[0, :5]
    if layers:
        assert ((before - after).abs().amax(dim=-1) > 1e-5).all()
    else:
        assert torch.equal(before, after)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_padding_never_matters(tiny_causal_lm: Make, attention: str, layers: int) -> None:
    model = classifier(tiny_causal_lm(), layers, attention)
    row, longer = [7, 8, 9, 10], [20, 21, 22, 23, 24, 25]
    alone = logits(model, [row])[0]
    torch.testing.assert_close(logits(model, [row, longer])[0, :4], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model, [row], width=11, fill=77)[0, :4], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model, [row], width=11, left=True)[0, -4:], alone, rtol=1e-4, atol=1e-5)


def test_both_attention_implementations_agree(tiny_causal_lm: Make) -> None:
    lm = tiny_causal_lm()
    rows = [[7, 8, 9, 10], [20, 21, 22, 23, 24, 25]]
    sdpa, eager = (logits(classifier(lm, 1, attention), rows) for attention in ("sdpa", "eager"))
    torch.testing.assert_close(sdpa[1], eager[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sdpa[0, :4], eager[0, :4], rtol=1e-4, atol=1e-5)


def test_all_layers_bidirectional_is_an_encoder(tiny_causal_lm: Make) -> None:
    # config.is_causal = False is transformers' own way to make every layer of a Llama bidirectional
    lm = tiny_causal_lm()
    ours = classifier(lm, 2)
    theirs = classifier(lm, 0)
    theirs.config.is_causal = False
    for layer in theirs.model.layers:
        layer.self_attn.is_causal = False
    rows = [[7, 8, 9, 10], [20, 21, 22, 23, 24, 25]]
    torch.testing.assert_close(logits(ours, rows)[1], logits(theirs, rows)[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(ours, rows)[0, :4], logits(theirs, rows)[0, :4], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_causal_lm: Make) -> None:
    lm = tiny_causal_lm()
    gradients = []
    for checkpointing in (False, True):
        model = classifier(lm, 1)
        model.train()
        if checkpointing:
            enable_gradient_checkpointing(model)
        logits(model, [[7, 8, 9, 10], [20, 21, 22, 23, 24, 25]])[0, :4].square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_bidirectional_says_so(tiny_causal_lm: Make, tiny_gpt2: Make) -> None:
    with pytest.raises(ConfigError, match=r"not supported for GPT2ForTokenClassification.*Llama"):
        classifier(tiny_gpt2(), 1)
    with pytest.raises(ConfigError, match="is 3, but LlamaForTokenClassification has 2 layers"):
        classifier(tiny_causal_lm(), 3)
    model = classifier(tiny_causal_lm(), 0)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ConfigError, match=r"eager or sdpa, not 'flex_attention'"):
        make_top_layers_bidirectional(model, 1)
    windowed = MistralForTokenClassification(
        MistralConfig(
            vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, sliding_window=4,
        )
    )  # fmt: skip
    with pytest.raises(ConfigError, match="sliding_attention"):
        make_top_layers_bidirectional(windowed, 1)
