"""Classifiers of decoders for which transformers has none: made, trained, saved, and loaded without tlcr."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from tests.models.architectures import VOCABULARY


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, as many as the tiny models have ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="w3"
    )
