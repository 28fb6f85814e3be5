"""Rollouts, tokenizers and frozen models to test reward sources with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from tlcr.rewards.sources import FrozenModel
from tlcr.text.tokenization import decode_text
from tlcr.types import Rollout


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


PADDINGS = [(0, 0), (3, 0), (0, 2), (5, 4)]


def character_tokenizer(*, lowercase: bool = False, bos: str | None = None) -> PreTrainedTokenizerFast:
    """One token for each character of Latin-1, with an end of sequence of its own; `lowercase` joins spaces too."""
    vocabulary = {token: index for index, token in enumerate(["[END]", "[PAD]", "[UNK]", "<s>"])}
    vocabulary |= {chr(code): len(vocabulary) + code for code in range(256)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if lowercase:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(" +"), " ")])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="[END]", pad_token="[PAD]", unk_token="[UNK]", bos_token=bos
    )


@dataclass(frozen=True)
class Row:
    """An answer: ids, whether it ended by itself, and which positions do not count though others follow."""

    prompt: str
    ids: list[int]
    ended: bool
    masked: tuple[int, ...] = ()


def rollout_of(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, *, left: int = 0, right: int = 0, filler: int = 0
) -> Rollout:
    """The rows as a rollout, with `left` and `right` columns of padding more than they need, all holding `filler`."""
    prompts = [tokenizer(row.prompt, add_special_tokens=False)["input_ids"] for row in rows]
    P = max(map(len, prompts)) + left
    T = max(len(row.ids) for row in rows) + right
    return Rollout(
        prompts=tuple(row.prompt for row in rows),
        responses=tuple(decode_text(tokenizer, row.ids) for row in rows),
        prompt_ids_BP=torch.tensor([[filler] * (P - len(ids)) + ids for ids in prompts]),
        prompt_mask_BP=torch.tensor([[False] * (P - len(ids)) + [True] * len(ids) for ids in prompts]),
        response_ids_BT=torch.tensor([row.ids + [filler] * (T - len(row.ids)) for row in rows]),
        mask_BT=torch.tensor([[t < len(row.ids) and t not in row.masked for t in range(T)] for row in rows]),
        ended_B=torch.tensor([row.ended for row in rows]),
    )


class Rigged(nn.Module):
    """A frozen model that gives each id its own positive logit, and remembers what it was shown."""

    def __init__(self, positive: dict[int, float], *, positions: int | None = None) -> None:
        super().__init__()
        self.positive = positive
        self.config = PreTrainedConfig(num_labels=2, max_position_embeddings=positions)
        self.device = torch.device("cpu")
        self.name_or_path = "rigged"
        self.shown: list[list[int]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: object) -> SimpleNamespace:
        shown = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        self.shown += shown
        logits = torch.zeros(*input_ids.shape, 2)
        for id, value in self.positive.items():
            logits[..., 1] += value * (input_ids == id)
        return SimpleNamespace(logits=logits)


def frozen_model(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    policy: PreTrainedTokenizerFast,
    *,
    max_prompt_tokens: int = 64,
    micro_batch_size: int | None = None,
) -> FrozenModel:
    return FrozenModel(model, tokenizer, policy, max_prompt_tokens, micro_batch_size)


def random_rows(tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    prompts = ["The food was", "I", "Human: How do I bake bread?\n\nAssistant:", "A wonderful film", "Naïve"]
    lengths = [4, 1, 7, 3, 5]
    generator = torch.Generator().manual_seed(6)
    return [
        Row(prompt, torch.randint(10, len(tokenizer), (length,), generator=generator).tolist(), False)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
