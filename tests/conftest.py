"""Fixtures that many tests share: a real byte-level BPE tokenizer and tiny random models, made in memory.

Libraries beside torch are imported inside the fixtures, so that collecting tests stays fast.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
# Training runs on the CPU, whatever the machine has, unless a test takes the fixture `device`.
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Triton reads this when it is imported: its kernels then run on the CPU, as Python.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CORPUS = (
    "The food was good and the service was not bad at all.",
    "I would never recommend this place; the waiter was rude, and the soup was cold!",
    "Human: How do I bake bread?\n\nAssistant: Mix flour, water, salt and yeast, then wait.",
    "A wonderful film with a dull ending, or a dull film with a wonderful ending?",
    "Naïve café owners don't always know what 1,024 customers want.",
)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state, on one thread."""
    import numpy as np

    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True, scope="module")
def little_to_look_through() -> None:
    """What was imported stays. Where transformers and accelerate collect garbage they need not look at all of it again,
    which took two fifths of the time of some tests."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """As Python ends it collects what is left, and packages complain of what it cannot see."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_accelerator_of_another_test() -> Iterator[None]:
    """What an Accelerator knows of device and processes is shared in a process; the next test's finds out anew."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device that training runs on: the test runs once on the CPU, and once on a GPU where there is one."""
    found = torch.device(request.param)
    if found.type == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch sees no GPU")
        monkeypatch.delenv("ACCELERATE_USE_CPU")
        found = torch.device("cuda", torch.cuda.current_device())
    return found


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained here, with distinct <bos>, <eos> and <pad>, and no template of special tokens."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        CORPUS, vocab_size=400, min_frequency=1, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


@pytest.fixture(scope="session")
def tiny_causal_lm(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    """A factory of random Llamas (2 layers, hidden 32) that speak ``tiny_tokenizer``; a seed fixes the weights.

    Keyword arguments beyond ``seed`` replace values of the ``LlamaConfig``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int = 0, **changes: object) -> PreTrainedModel:
        values: dict = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": tiny_tokenizer.bos_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval()

    return make


@pytest.fixture
def tiny_folder(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, tiny_causal_lm: Callable[..., PreTrainedModel]
) -> Path:
    """A tiny model with 1,024 positions and its tokenizer, saved; its parent is the test's own."""
    path = tmp_path / "tiny"
    tiny_causal_lm(max_position_embeddings=1024).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    """The same for GPT-2: learned positions, tied embeddings, dropout in its config."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(seed: int = 0, **changes: object) -> PreTrainedModel:
        values: dict = {
            "vocab_size": len(tiny_tokenizer),
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "bos_token_id": tiny_tokenizer.bos_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GPT2LMHeadModel(GPT2Config(**{**values, **changes})).eval()

    return make
