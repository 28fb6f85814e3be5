"""A tiny policy for TRL, the text `w5 w11` of which has the ids 5 and 11, and trainers that keep what they compute."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from golden import load
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from tlcr.hosts.trl import TokenReward, TokenRewardMixin

WORDS, PAD, EOS = 48, 0, 2


def tokenizer() -> PreTrainedTokenizerFast:
    names = {PAD: "<pad>", 1: "<unk>", EOS: "<eos>"}
    words = Tokenizer(models.WordLevel({names.get(i, f"w{i}"): i for i in range(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    made.chat_template = (
        "{% for message in messages %}w3 {{ message['content'] }} w4 {% endfor %}"
        "{% if add_generation_prompt %}w3{% endif %}"
    )
    return made


def text(ids: list[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


def policy(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def config(folder: Path, **changes: Any) -> GRPOConfig:
    """A config that needs no accelerator and no network."""
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    return GRPOConfig(**{**values, **changes})


def prompts(*rows: list[int]) -> Dataset:
    return Dataset.from_dict({"prompt": [text(row) for row in rows]})


class GoldenSampler(GRPOTrainer):
    """Samples the golden answers, and keeps what its loss is given. Column by column they go where TRL puts them."""

    given: list[dict[str, Any]]

    def _generate(self, prompts: list[str]) -> Any:
        items = load()["items"]
        first = self.accelerator.process_index * len(prompts)  # answers of one prompt may be on two processes
        seen: Counter[str] = Counter(text(item["prompt_ids"]) for item in items[:first])
        chosen = []
        for prompt in prompts:
            answers = [item for item in items if text(item["prompt_ids"]) == prompt]
            chosen.append(answers[seen[prompt]])
            seen[prompt] += 1
        # TRL samples no answer without tokens, and makes float tensors of an empty list
        prompt_ids, ids, masks = (
            [item[key] or torch.empty(0, dtype=torch.long) for item in chosen]
            for key in ("prompt_ids", "response_ids", "mask")
        )
        return prompt_ids, ids, masks, [text(row) for row in ids], None, {}, None, []

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        if not hasattr(self, "given"):
            self.given = []
        self.given.append({name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return super()._compute_loss(model, inputs)


class GoldenTrainer(TokenRewardMixin, GoldenSampler):
    """The golden answers, with an advantage for every token."""


def golden_trainer(folder: Path, reward: TokenReward, **changes: Any) -> GoldenTrainer:
    """One step on the six golden answers, in the order of the file."""
    rows = [item["prompt_ids"] for item in load()["items"][::2]]
    values = {
        "per_device_train_batch_size": 6,
        "num_generations": 2,
        "max_steps": 1,
        "shuffle_dataset": False,
        **changes,
    }
    return GoldenTrainer(
        model=policy(),
        processing_class=tokenizer(),
        reward_funcs=[reward],
        args=config(folder, **values),
        train_dataset=prompts(*rows),
        normalise="none",
    )


def misplaced(given: list[dict[str, Any]], wanted: list[list[float]]) -> list[int]:
    """The golden answers whose advantages did not reach the loss once, at their own tokens, and 0 elsewhere."""
    wrong = []
    items = load()["items"]
    for number, item in enumerate(items):
        n, found = len(item["response_ids"]), []
        for batch in given:
            for row in range(len(batch["completion_ids"])):
                mask = batch["prompt_mask"][row].bool()
                prompt = batch["prompt_ids"][row][mask].tolist()
                ids = batch["completion_ids"][row].tolist()
                length = int(batch["completion_mask"][row].sum())
                if prompt == item["prompt_ids"] and length == n and ids[:n] == item["response_ids"]:
                    found.append(batch["advantages"][row])
        row = torch.tensor(wanted[number])
        width = found[0].numel() if found else 0
        beyond = row[width:].any()  # another process may have padded to longer answers
        if len(found) != 1 or beyond or not torch.allclose(found[0], row[:width], rtol=0, atol=1e-6):
            wrong.append(number)
    return wrong
