"""The work that both trainers do: the same models, prompts, lengths, epochs and precision.

Every answer has its full length: the end of sequence is never sampled, because TRL computes beyond it and tlcr does
not, so the times would depend on the answers' lengths. Each trainer chooses how many answers go through a
model at a time, up to `Task.micro_batch`: that changes its cost, but not its results.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

PHASES = ("rollout", "score", "reward", "update")
TRL_VERSION = "1.11.0"
TRL = f"TRL {TRL_VERSION}"

# Far below any logit, and finite in bfloat16.
NEVER = -1e9


@dataclass(frozen=True)
class Task:
    """One PPO set-up; every field is the same for all trainers."""

    model: str | None = None
    """Folder of a causal language model; None: a Llama with random weights, of the embedded task's size."""
    dtype: str = "float32"
    batch: int = 64
    prompt_tokens: int = 16
    response_tokens: int = 32
    epochs: int = 4
    minibatch: int = 64
    micro_batch: int = 64
    value_model: str = "separate"
    threads: int = 1
    rounds: int = 6
    """The first of them warms up and is not counted."""

    @classmethod
    def from_argv(cls) -> tuple[Task, Path]:
        """What `benchmarks.ppo_step` hands to each trainer's process: the task, and where the result goes."""
        return cls(**json.loads(sys.argv[1])), Path(sys.argv[2])

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def response_tokens_per_round(self) -> int:
        return self.batch * self.response_tokens


VOCABULARY, WIDTH, LAYERS = 512, 128, 4


def tokenizer_of(task: Task) -> PreTrainedTokenizerBase:
    if task.model is not None:
        tokenizer = AutoTokenizer.from_pretrained(task.model, local_files_only=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    words = {"<pad>": 0, "<eos>": 1, **{f"w{number}": number for number in range(2, VOCABULARY)}}
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
    return AutoModelForCausalLM.from_pretrained(task.model, dtype=getattr(torch, task.dtype), local_files_only=True)


def causal_lm(
    task: Task, tokenizer: PreTrainedTokenizerBase, load: Callable[[Task], PreTrainedModel] = load_as_everyone
) -> PreTrainedModel:
    """load: how the trainer's users load a model from a folder."""
    if task.model is not None:
        model = load(task)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _random_llama(task, tokenizer).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            model = load(replace(task, model=folder))
    model.get_output_embeddings().register_forward_hook(_NeverEnds(tokenizer.eos_token_id))
    return model


def _random_llama(task: Task, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).to(getattr(torch, task.dtype))


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
    dtype = getattr(torch, task.dtype)
    if task.model is not None:
        model = auto.from_pretrained(task.model, dtype=dtype, num_labels=1, local_files_only=True)
    else:
        config = causal_lm(task, tokenizer).config
        config.num_labels = 1
        model = auto.from_config(config).to(dtype)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def write_result(path: Path, rounds: list[dict[str, float]], versions: dict[str, str]) -> None:
    """rounds: seconds of each of PHASES and of the whole, "total". Peak memory is the process's, or the GPU's."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    result = {"rounds": rounds[1:], "peak_bytes": peak, "versions": versions}
    path.write_text(json.dumps(result), encoding="utf-8")
