"""How few tokens a text can have, known from its characters alone, so that a text that is too long is not tokenised."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

__all__ = ["LeastTokens"]

COMPOSING = ("NFC", "NFKC")
"""Normalisers that join characters."""
COMPOSED = 4
"""How many characters they join into one at the most: none decomposes into more."""
SPLITTING = ("Digits", "Punctuation", "Split")
"""Pre-tokenisers that change no character; the last two may remove what they split at."""
KEEPING = ("ByteLevel", "Lowercase", "Metaspace", "NFD", "NFKD", "Prepend")
"""Normalisers and pre-tokenisers that make no text shorter."""

Part = Mapping[str, Any]


class LeastTokens:
    """A lower bound of the tokens of a text, special tokens that a tokenizer adds aside.

    A token stands for as many characters as its own text has, at the most, where the tokenizer drops no character; for
    four times as many where it joins characters by NFC or NFKC. That holds of byte-pair encoders that know all bytes,
    those of most decoders. Where it does not hold, or is not known to, the bound is 0: a word of WordPiece may be one
    unknown token, however long it is.

    Source: ours.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._characters: int | None = None
        """Of one token at the most; None where a token has no bound."""
        self._strips = False
        """Whether tokens take the white space beside them, all of it."""
        if not tokenizer.is_fast:
            return
        backend = tokenizer.backend_tokenizer
        whole: Part = json.loads(backend.to_str())
        parts = [*_parts(whole["normalizer"], "normalizers"), *_parts(whole["pre_tokenizer"], "pretokenizers")]
        joined = _joined(parts)
        if joined is None or not _knows_all(whole["model"], [part["type"] for part in parts]):
            return
        added = [token["content"] for token in whole["added_tokens"]]
        if backend.normalizer is not None:  # added tokens may be looked for in the normalised text, as it writes them
            added += [backend.normalizer.normalize_str(content) for content in added]
        self._characters = joined * max(map(len, [*whole["model"]["vocab"], *added]))
        self._strips = any(token["lstrip"] or token["rstrip"] for token in whole["added_tokens"])

    def __call__(self, *texts: str) -> int:
        """The fewest tokens that the texts can have, joined to one."""
        if self._characters is None:
            return 0
        count = sum(map(_without_spaces if self._strips else len, texts))
        return -(-count // self._characters)


def _parts(part: Part | None, name: str) -> Iterator[Part]:
    """A normaliser or pre-tokeniser, or those of a sequence, which may hold others."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for one in part[name]:
            yield from _parts(one, name)
    else:
        yield part


def _joined(parts: list[Part]) -> int | None:
    """How many characters become one at the most; None where some are dropped, or a part is not known."""
    joined = 1
    for part in parts:
        kind = part["type"]
        if kind in COMPOSING:
            joined *= COMPOSED
        elif kind == "Replace":
            before, after = part["pattern"].get("String"), part["content"]
            if before is None or len(after) < len(before) or _without_spaces(after) < _without_spaces(before):
                return None
        elif kind not in (*KEEPING, *SPLITTING) or part.get("behavior") == "Removed":
            return None
    return joined


def _knows_all(model: Part, parts: list[str]) -> bool:
    """Whether no character is unknown to the model: unknown ones may be dropped, or many become one token."""
    if model["type"] != "BPE" or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return False
    if "ByteLevel" in parts:  # what writes characters after it may write others than those of bytes
        after = parts[::-1].index("ByteLevel")
        return model["vocab"].keys() >= set(ByteLevel.alphabet()) and set(parts[len(parts) - after :]) <= set(SPLITTING)
    return model["byte_fallback"] and model["vocab"].keys() >= {f"<0x{byte:02X}>" for byte in range(256)}


def _without_spaces(text: str) -> int:
    """Characters that are no white space: python knows all that tokenizers do, and more."""
    return sum(map(len, text.split()))
