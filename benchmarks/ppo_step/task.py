"""The work that both trainers do: the same models, prompts, lengths, epochs and precision.

Every answer has its full length: the end of sequence is never sampled, because TRL computes beyond it and tlcr does
not, so the times would depend on the answers' lengths. Each trainer chooses how many answers go through a
model at a time, up to `Task.micro_batch`: that changes its cost, but not its results. TRL takes one optimiser step for
a batch where tlcr takes one for each minibatch, where they differ (`with_trl`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

PHASES = ("rollout", "score", "reward", "update")
TRL_VERSION = "1.11.0"
TRL = f"TRL {TRL_VERSION}"

# Far below any logit, and finite in bfloat16.
NEVER = -1e9

SHAPES: dict[str, dict[str, Any]] = {
    "embedded": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
"""Llamas that are made with random weights: of the embedded task's size, and of the sizes of SmolLM-135M and
Llama-3.2-1B (1.24e9 weights)."""


@dataclass(frozen=True)
class Task:
    """One PPO set-up; every field is the same for all trainers."""

    model: str | None = None
    """Folder of a causal language model; None: a Llama with random weights."""
    shape: str = "embedded"
    """Of the random Llama: a name in SHAPES."""
    dtype: str = "float32"
    batch: int = 64
    prompt_tokens: int = 16
    response_tokens: int = 32
    epochs: int = 4
    minibatch: int = 64
    micro_batch: int = 64
    value_model: str = "separate"
    engine: str = "generate"
    """What samples, of tlcr; TRL has no choice."""
    threads: int = 1
    rounds: int = 6
    """The first of them warms up and is not counted."""
    profile: str | None = None
    """Folder for a profile of one more round; None: no profile is taken."""

    @classmethod
    def from_argv(cls) -> tuple[Task, Path]:
        """What `benchmarks.ppo_step` hands to each trainer's process: the task, and where its journal goes."""
        return cls(**json.loads(sys.argv[1])), Path(sys.argv[2])

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def response_tokens_per_round(self) -> int:
        return self.batch * self.response_tokens

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def device() -> torch.device:
    """Where both trainers put their models: the GPU, if there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def tokenizer_of(task: Task) -> PreTrainedTokenizerBase:
    if task.model is not None:
        tokenizer = AutoTokenizer.from_pretrained(task.model, local_files_only=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    words = {"<pad>": 0, "<eos>": 1, **{f"w{number}": number for number in range(2, SHAPES[task.shape]["vocab_size"])}}
    bare = Tokenizer(WordLevel(words, unk_token="<pad>"))
    bare.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def prompts_of(task: Task, tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """Texts that encode to exactly `task.prompt_tokens` tokens."""
    generator = torch.Generator().manual_seed(0)
    words = [word for word, number in tokenizer.get_vocab().items() if number > 1 and word.isascii() and word.isalnum()]
    words = sorted(words)
    prompts = []
    while len(prompts) < count:
        picked = [words[int(i)] for i in torch.randint(len(words), (task.prompt_tokens,), generator=generator)]
        ids = tokenizer(" ".join(picked), add_special_tokens=False)["input_ids"][: task.prompt_tokens]
        text = tokenizer.decode(ids)
        if tokenizer(text, add_special_tokens=False)["input_ids"] == ids and len(ids) == task.prompt_tokens:
            prompts.append(text)
    return prompts


def load_as_everyone(task: Task) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        task.model, dtype=task.torch_dtype, device_map={"": device()}, local_files_only=True
    )


def causal_lm(
    task: Task, tokenizer: PreTrainedTokenizerBase, load: Callable[[Task], PreTrainedModel] = load_as_everyone
) -> PreTrainedModel:
    """The policy, on its device. Random weights are drawn there: nothing is written, nor kept on the host.

    load: how the trainer's users load a model from a folder.
    """
    random = task.model is None
    model = _random(AutoModelForCausalLM, task, config_of(task, tokenizer)) if random else load(task)
    model.get_output_embeddings().register_forward_hook(_NeverEnds(tokenizer.eos_token_id))
    return model


def config_of(task: Task, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    if task.model is not None:
        found: PreTrainedConfig = AutoConfig.from_pretrained(task.model, local_files_only=True)
        return found
    return LlamaConfig(
        **SHAPES[task.shape],
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _random(auto: Any, task: Task, config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    with device():
        made: PreTrainedModel = auto.from_config(config, dtype=task.torch_dtype)
    return made.eval()


class _NeverEnds:
    """Makes the end of sequence impossible, in sampling and scoring alike. A class, because trainers copy models."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        logits[..., self.token] = NEVER
        return logits


def scorer(task: Task, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A sequence classifier of the policy's size with one output: TRL's value model and reward model."""
    auto = AutoModelForSequenceClassification
    if task.model is not None:
        model = auto.from_pretrained(
            task.model, dtype=task.torch_dtype, num_labels=1, device_map={"": device()}, local_files_only=True
        )
    else:
        config = config_of(task, tokenizer)
        config.num_labels = 1
        model = _random(auto, task, config)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model
