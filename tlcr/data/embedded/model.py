"""The tokenizer and the model of the embedded task: a byte-level BPE and a Llama, both real, both small."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tlcr.data.embedded.pairs import generate_pairs

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
VOCABULARY = 640
TOKENIZER_PAIRS = 400


def build_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 640 tokens on generated dialogues. It adds no special token on its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    preferences, edits = generate_pairs(TOKENIZER_PAIRS, seed)
    texts = [p.prompt + p.chosen for p in preferences] + [e.prompt + e.revised for e in edits]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int = 0, heads: int = 4) -> LlamaForCausalLM:
    """A Llama of two layers with random weights that depend on `seed` only; the caller's random state is left alone."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,  # for the longest answers that data.embedded_words is tried with
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
