"""Tokenizers of the Hugging Face libraries: loading one, with what tlcr needs of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tlcr.config.schema import GeneratorConfig
from tlcr.errors import ConfigError
from tlcr.models import inspection
from tlcr.models.ends import end_answers_as_the_template
from tlcr.models.faults import raise_first, refuse_embedded, some
from tlcr.models.notes import note
from tlcr.text.files import read_text


def load_tokenizer(cfg: GeneratorConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of ``cfg``, checked for what tlcr needs.

    Its end-of-sequence token ends every answer, in all stages. It is the token that the chat template writes right
    after an assistant's content, if the model's generation config names that as an end; else the tokenizer's own. A
    change is logged.

    Args:
        cfg: the model's folder or hub name, and settings for what its tokenizer lacks.

    Returns:
        A fast tokenizer with character offsets, an end-of-sequence token and a padding token. Where it names none, or
        one that the model has no embedding for, the end-of-sequence token pads: every mask comes from lengths.

    Raises:
        ConfigError: one of these is missing; the message names the setting that supplies it.
    """
    refuse_embedded(cfg.tokenizer or cfg.path)
    tokenizer, faults = inspection.inspect_tokenizer(cfg)
    raise_first(faults)
    assert tokenizer is not None
    _note_other_ids(tokenizer, cfg)
    if cfg.chat_template is not None:
        tokenizer.chat_template = _template(cfg.chat_template)
    end_answers_as_the_template(tokenizer, cfg)
    if cfg.pad_token is not None:
        tokenizer.pad_token = cfg.pad_token
    rows = inspection.embedding_rows(cfg)
    lacking = None
    if tokenizer.pad_token_id is None:
        lacking = "names no padding token"
    elif rows is not None and tokenizer.pad_token_id >= rows:
        lacking = f"pads with {tokenizer.pad_token!r}, for which {cfg.path!r} has no embedding"
    if lacking is not None:
        note(
            f"the tokenizer {(cfg.tokenizer or cfg.path)!r} {lacking}: {tokenizer.eos_token!r} pads, and nothing is "
            "learnt from padding"
        )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _note_other_ids(tokenizer: PreTrainedTokenizerBase, cfg: GeneratorConfig) -> None:
    """A note where another folder's tokenizer gives the tokens of the model's own other ids, so that it reads noise."""
    if cfg.tokenizer is None or cfg.gguf_file is not None:
        return
    own, _ = inspection.inspect_tokenizer(replace(cfg, tokenizer=None))
    if own is None:
        return
    ids, given = own.get_vocab(), tokenizer.get_vocab()
    moved = [token for token, index in ids.items() if given.get(token, index) != index]
    if moved:
        note(
            f"the tokenizer {cfg.tokenizer!r} gives {len(moved)} of {len(ids)} tokens another id than the tokenizer in "
            f"{cfg.path!r} ({some(map(repr, moved))}): the model was trained on the ids of its own; unless it is to "
            "learn others, leave model.tokenizer out"
        )


def _template(template: str) -> str:
    if "{" in template:
        return template
    if not Path(template).is_file():
        raise ConfigError(f"model.chat_template {template!r} is neither a Jinja template nor a file that exists")
    return read_text(template)
