"""The least tokens of a text, against those that tokenizers make of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tlcr.text.least_tokens import LeastTokens

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MERGES = ["aa", "aaaa", "aaaaaaaa"]
"""What the tokenizers here know beyond bytes; the longest text of a token has eight characters."""
LONGEST = 8
HALVES = [(word[: len(word) // 2],) * 2 for word in MERGES]


def wrapped(model: models.Model, normalizer: Any = None, pre_tokenizer: Any = None, **token: Any) -> Any:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if token:
        fast.add_tokens([AddedToken("<x>", **token)])
    return fast


def by_bytes(normalizer: Any = None, pre_tokenizer: Any = None, **token: Any) -> Any:
    """As GPT-2's and Llama 3's, Qwen's with NFC."""
    model = models.BPE(vocab={piece: number for number, piece in enumerate([*ALPHABET, *MERGES])}, merges=HALVES)
    return wrapped(model, normalizer, pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False), **token)


def falling_back(normalizer: Any = None, pre_tokenizer: Any = None, pieces: list[str] = BYTES, **token: Any) -> Any:
    """As Llama 2's and Gemma's: bytes stand for what is unknown."""
    vocab = {piece: number for number, piece in enumerate(["<unk>", "a", "\u2581", *MERGES, *pieces])}
    model = models.BPE(vocab=vocab, merges=HALVES, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return wrapped(model, normalizer, pre_tokenizer, **token)


BOUNDED = [
    (by_bytes(), LONGEST),
    (by_bytes(normalizers.NFC()), 4 * LONGEST),
    (by_bytes(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])), 4 * LONGEST),
    (by_bytes(normalizers.ByteLevel(), pre_tokenizers.Split(Regex("a+"), "isolated")), LONGEST),
    (by_bytes(normalizers.NFKD(), normalized=True), LONGEST),
    (by_bytes(rstrip=True), LONGEST),
    (by_bytes(normalizers.NFC(), lstrip=True, rstrip=True, normalized=True), 4 * LONGEST),
    (
        falling_back(
            normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]), rstrip=True
        ),
        LONGEST,
    ),
    (falling_back(pre_tokenizer=pre_tokenizers.Metaspace()), LONGEST),
]
PIECES = st.sampled_from(
    [
        *("a", "aaaaaaaa", "b", "1", ".", "\u2581", "<x>", "<x", "e\u0301", "\u0301", "\u1100\u1161\u11a8"),
        *(" ", "    ", "\n", "\t", "\x1c", "\u00a0", "\u3000", "\u00a8", "\ufdfa", "\U0001f600", "\u0130"),
        *("\u03b1\u0313\u0300\u0345", "\u1f82", "\u00ad", "\x00"),
    ]
)


@pytest.mark.parametrize(("tokenizer", "most"), BOUNDED)
@given(pieces=st.lists(PIECES | st.characters(exclude_categories=["Cs"]), max_size=30))
@settings(max_examples=40, deadline=None)
def test_no_text_has_fewer(tokenizer: Any, most: int, pieces: list[str]) -> None:
    least, text = LeastTokens(tokenizer), "".join(pieces)
    assert least(text) <= len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert least(text, text) <= len(tokenizer(text + text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(("tokenizer", "most"), BOUNDED)
def test_a_token_has_the_characters_of_the_longest(tokenizer: Any, most: int) -> None:
    least = LeastTokens(tokenizer)
    assert (least(""), least("b"), least("b" * most), least("b" * most, "b")) == (0, 1, 1, 2)


@pytest.mark.parametrize(
    ("tokenizer", "text", "tokens"), [(by_bytes(), "a" * 80, 10), (by_bytes(rstrip=True), "<x>" + " " * 1000, 1)]
)
def test_some_texts_have_no_more(tokenizer: Any, text: str, tokens: int) -> None:
    assert LeastTokens(tokenizer)(text) == len(tokenizer(text)["input_ids"]) == tokens


@pytest.mark.parametrize(
    "tokenizer",
    [
        wrapped(models.WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]"), None, pre_tokenizers.Whitespace()),
        wrapped(models.WordLevel(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]"), None, pre_tokenizers.Whitespace()),
        wrapped(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)),
        wrapped(models.BPE(vocab={"a": 0}, merges=[])),
        wrapped(models.BPE(vocab={"a": 0, "<unk>": 1}, merges=[], unk_token="<unk>", fuse_unk=True)),
        falling_back(pieces=BYTES[:-1]),
        by_bytes(normalizers.StripAccents()),
        by_bytes(normalizers.Strip()),
        by_bytes(normalizers.Replace(Regex(" +"), " ")),
        by_bytes(normalizers.Replace("ab", "a")),
        by_bytes(normalizers.Replace("b", " "), lstrip=True),
        by_bytes(None, pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])),
        by_bytes(
            None,
            pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(use_regex=False)]),
        ),
        by_bytes(None, pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(), pre_tokenizers.Metaspace()])),
        by_bytes(None, pre_tokenizers.Whitespace()),
    ],
)
def test_a_tokenizer_that_drops_or_joins_characters_has_no_bound(tokenizer: Any) -> None:
    assert LeastTokens(tokenizer)("b" * 10**6) == 0
