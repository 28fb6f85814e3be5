"""Discriminators whose weights are a formula, and what a real vLLM said of them: ``vllm.json``, by ``make vllm``.

The weights come from no random generator, so that every version of torch makes the same ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tlcr.hosts.contract import Item

FILE = Path(__file__).with_name("vllm.json")
KINDS = ("llama", "qwen2", "qwen3")
"""What ``make vllm`` compares."""
TEMPERATURE = 1.7
LENGTHS = ((1, 1), (3, 5), (40, 60), (0, 7), (17, 2), (9, 30))
"""Tokens of prompt and answer of each item. vLLM's block has 32 tokens."""


def save(kind: str, tokenizer: Any, folder: Path) -> None:
    """Writes the discriminator of this kind, two layers of width 64 with heads of width 32 (vLLM's smallest)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tlcr.config.schema import ModelConfig
    from tlcr.models.inspection import TWO_CLASSES
    from tlcr.models.loading import load_token_classifier
    from tlcr.models.saving import save_model

    config = AutoConfig.for_model(
        kind,
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    causal = AutoModelForCausalLM.from_config(config)
    model = load_token_classifier(causal, ModelConfig(), id2label=TWO_CLASSES)
    with torch.no_grad():
        for number, (name, weight) in enumerate(sorted(model.named_parameters())):
            steps = torch.arange(weight.numel(), dtype=torch.float64)
            wave = torch.sin(steps * (0.7391 + 0.0173 * number) + number).reshape(weight.shape)
            weight.copy_(1 + 0.1 * wave if name.endswith("norm.weight") else 0.25 * wave)
    model.config.tlcr_temperature = TEMPERATURE
    save_model(model, tokenizer, folder)


def items() -> list[Item]:
    """What was asked."""
    return [
        Item(
            [3 + (7 * n + 11 * t) % 397 for t in range(prompt)],
            [3 + (13 * n + 5 * t + t * t) % 397 for t in range(answer)],
        )
        for n, (prompt, answer) in enumerate(LENGTHS)
    ]


def recording() -> dict[str, Any]:
    """Of each kind that was recorded, what vLLM answered to ``/pooling`` and ``/v1/models``, and its version."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    return found
