"""Where a model's answers end: by its tokenizer, its chat template and its generation config."""

from __future__ import annotations

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import GeneratorConfig
from tlcr.errors import ConfigError
from tlcr.models import inspection
from tlcr.models.notes import note
from tlcr.text.turns import turn_end, turn_notes


def end_of_sequence_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The id that ends a policy's answers in rollouts: the tokenizer's end of sequence, which ends all answers that SFT
    and the judges learn from. Other ends that the model's generation config names are logged, once.

    Args:
        model: the policy.
        tokenizer: its tokenizer, as ``load_tokenizer`` gives it.

    Returns:
        A list of one id.

    Raises:
        ConfigError: the tokenizer names no end of sequence.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer names no end-of-sequence token; set its eos_token")
    other = _other_ends(tokenizer, _named_ends(model.generation_config))
    if other:
        note(other)
    return [tokenizer.eos_token_id]


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids at which a model that is asked in words stops: the tokenizer's end of sequence, and all ends that the
    model's generation config names.

    Args:
        model: the language model.
        tokenizer: its tokenizer.

    Returns:
        The ids, sorted.

    Raises:
        ConfigError: neither names an end of sequence.
    """
    ids = {tokenizer.eos_token_id, *_named_ends(model.generation_config)} - {None}
    if not ids:
        raise ConfigError("neither tokenizer nor model names an end-of-sequence token; set the tokenizer's eos_token")
    return sorted(ids)


def answer_notes(tokenizer: PreTrainedTokenizerBase, cfg: GeneratorConfig) -> tuple[str, ...]:
    """What is unusual about where answers begin and end, one sentence for each thing.

    Args:
        tokenizer: as ``load_tokenizer`` gives it.
        cfg: the model's folder or hub name.

    Returns:
        The notes of ``tlcr.text.turns.turn_notes``, and of ``other_ends``.
    """
    return (*turn_notes(tokenizer), *other_ends(tokenizer, cfg))


def other_ends(tokenizer: PreTrainedTokenizerBase, cfg: GeneratorConfig) -> tuple[str, ...]:
    """A note of the ends in the generation config at which rollouts do not stop; empty where there are none."""
    other = _other_ends(tokenizer, _ends_of_model(cfg))
    return (other,) if other else ()


def end_answers_as_the_template(tokenizer: PreTrainedTokenizerBase, cfg: GeneratorConfig) -> None:
    """Makes the token that the chat template writes after an assistant's content the tokenizer's end of sequence, in
    place and with a note, where the model's files name it as an end.

    Args:
        tokenizer: with its chat template.
        cfg: the model's folder or hub name.
    """
    end, own = turn_end(tokenizer), tokenizer.eos_token
    if end is None or end == own or tokenizer.convert_tokens_to_ids(end) not in _ends_of_model(cfg):
        return
    tokenizer.add_special_tokens({"eos_token": end})
    note(
        f"answers end with {end!r}, as the chat template of {cfg.path!r} writes them and its generation config allows, "
        f"and not with {own!r}, its tokenizer's eos_token: in every stage, and in the folders that are saved"
    )


def _ends_of_model(cfg: GeneratorConfig) -> set[int]:
    """The ends of sequence that the files of a model name, without loading the model."""
    try:
        return _named_ends(GenerationConfig.from_pretrained(cfg.path))
    except OSError:  # without that file transformers makes one from the model's config
        pass
    try:
        config = inspection.read_config(cfg)
    except (OSError, ValueError, ImportError):
        return set()  # a tokenizer's folder; a model that should be there is missed when it is loaded
    return _named_ends(config.get_text_config())


def _named_ends(config: GenerationConfig | PreTrainedConfig | None) -> set[int]:
    named = None if config is None else config.eos_token_id
    return set(named if isinstance(named, list) else [named]) - {None}


def _other_ends(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> str | None:
    others = sorted(ends - {tokenizer.eos_token_id})
    if not others:
        return None
    names = ", ".join(repr(tokenizer.convert_ids_to_tokens(id)) for id in others)
    return (
        f"the model's generation config also ends answers with {names}; rollouts end with {tokenizer.eos_token!r} "
        "alone, because no answer in training ends with another token, so no reward is made for one"
    )
