"""Tokenizers and models of the Hugging Face libraries: loading, a new head, and saving in their standard formats."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils import CONFIG_NAME

from tlcr import ops
from tlcr.config.schema import GeneratorConfig, ModelConfig
from tlcr.errors import ConfigError, DataError
from tlcr.files import atomic_write, sync_folder
from tlcr.models import classifiers, inspection, probes
from tlcr.models.faults import AUTO, LOADABLE, WHAT, Role, one_line, raise_first, some
from tlcr.models.heads import backbone, classification_head, name_of_head, name_of_last_layer, use_float32_head
from tlcr.models.inspection import THREE_CLASSES, TWO_CLASSES, Inspection
from tlcr.models.layers import fuse_layers
from tlcr.models.stored import (
    find_stored,
    is_unread,
    leave_unread,
    make_buffers,
    stored_for_copy,
    when_read,
    without_weights,
)
from tlcr.models.weight_files import read_weights, weight_files
from tlcr.models.weight_names import report_faults, unused
from tlcr.text.files import read_text
from tlcr.text.turns import turn_end, turn_notes
from tlcr.training.distributed import on_main_process, process_device
from tlcr.training.sharding import Sharding, has_shards, whole_state

logger = logging.getLogger("tlcr")


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
    _named(cfg.tokenizer or cfg.path)
    tokenizer, faults = inspection.inspect_tokenizer(cfg)
    raise_first(faults)
    assert tokenizer is not None
    _note_other_ids(tokenizer, cfg)
    if cfg.chat_template is not None:
        tokenizer.chat_template = _template(cfg.chat_template)
    _end_answers_as_the_template(tokenizer, cfg)
    if cfg.pad_token is not None:
        tokenizer.pad_token = cfg.pad_token
    rows = inspection.embedding_rows(cfg)
    lacking = None
    if tokenizer.pad_token_id is None:
        lacking = "names no padding token"
    elif rows is not None and tokenizer.pad_token_id >= rows:
        lacking = f"pads with {tokenizer.pad_token!r}, for which {cfg.path!r} has no embedding"
    if lacking is not None:
        _note(
            f"the tokenizer {(cfg.tokenizer or cfg.path)!r} {lacking}: {tokenizer.eos_token!r} pads, and nothing is "
            "learnt from padding"
        )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    cfg: GeneratorConfig, *, device: torch.device | None = None, sharding: Sharding | None = None
) -> PreTrainedModel:
    """The causal language model of ``cfg``, in its dtype, with no dropout. Safetensors only, or the GGUF file named.

    Args:
        cfg: the model's folder or hub name, and settings of loading.
        device: where the weights go, each straight from its file; None: the CPU.
        sharding: how the caller will cut the model (``tlcr.training.sharding.shard``), alone or as a part of another
            module. The model is then on the meta device, and its weights are read when it is cut. Where that cannot be
            (a GGUF file, weights that transformers converts), every process reads them whole, and a note says so.

    Returns:
        The model, every weight of which was in the file.

    Raises:
        ConfigError: the folder has a fault (``tlcr.models.inspection``), or it is not one that transformers can load.
    """
    _named(cfg.path)
    found = _inspected(cfg, "policy")
    model = None if sharding is None else _without_weights("policy", AUTO["policy"], cfg, found)
    if model is None:
        model = _read("policy", AUTO["policy"], cfg, found, device if sharding is None else None)
    when_read(model, partial(probes.require_causal, model))
    return prepared(model, cfg)


def load_token_classifier(
    source: str | Path | PreTrainedModel,
    cfg: ModelConfig,
    *,
    id2label: Mapping[int, str] | None = None,
    copy_head: bool = False,
    device: torch.device | None = None,
    sharding: Sharding | None = None,
) -> PreTrainedModel:
    """A standard ``AutoModelForTokenClassification`` whose labels are negative/positive or negative/neutral/positive.

    Args:
        source: a folder (or hub name) with a trained classifier, or a causal LM, whose backbone is copied under a new
            head (see ``_with_new_head``) and which stays as it is.
        cfg: dtype and settings of loading.
        id2label: the labels wanted. None accepts either set, and is allowed for a folder only.
        copy_head: where ``source`` is a model with a head of as many outputs, its weight is copied too.
        device: where the weights of a folder go; None: the CPU. A copy of a causal LM is made where that is.
        sharding: as for ``load_causal_lm``, for a folder. A copy of a causal LM that was loaded so has no weights
            either before it is cut.

    Returns:
        The classifier.

    Raises:
        ConfigError: a loaded classifier has other labels, or has them in another order; or a new one gets no labels.
    """
    if isinstance(source, PreTrainedModel):
        if id2label is None:
            raise ConfigError(
                "a new token classifier needs id2label: TWO_CLASSES or THREE_CLASSES of tlcr.models.inspection"
            )
        return _with_new_head(AutoModelForTokenClassification, source, cfg, dict(id2label), copy_head=copy_head)
    model = _load_classifier("discriminator", source, cfg, device, sharding)
    accepted = [TWO_CLASSES, THREE_CLASSES] if id2label is None else [dict(id2label)]
    raise_first(inspection.label_faults(model.config, str(source), accepted))
    return model


def load_sequence_classifier(
    source: str | Path | PreTrainedModel,
    cfg: ModelConfig,
    *,
    device: torch.device | None = None,
    sharding: Sharding | None = None,
) -> PreTrainedModel:
    """A standard ``AutoModelForSequenceClassification`` with one output, the score of an answer.

    Args:
        source: as for ``load_token_classifier``.
        cfg: dtype and settings of loading.
        device: as for ``load_token_classifier``.
        sharding: as for ``load_token_classifier``.

    Returns:
        The classifier.

    Raises:
        ConfigError: a loaded classifier has more than one output, or cannot be run on padded rows
            (``probes.check_reward_model``).
    """
    if isinstance(source, PreTrainedModel):
        return _with_new_head(AutoModelForSequenceClassification, source, cfg, {0: "score"})
    model = _load_classifier("reward_model", source, cfg, device, sharding)
    outputs = model.config.num_labels or 0
    if outputs != 1:
        raise_first([inspection.several_outputs(str(source), outputs)])
    own = {name: getattr(model.config, name) for name in ("mean", "std") if hasattr(model.config, name)}
    if own:
        said = " and ".join(f"{name} {value}" for name, value in own.items())
        _note(f"the reward model {str(source)!r} has {said} in its config.json: not applied, scores are the head's own")
    when_read(model, partial(probes.check_reward_model, model))
    return model


def last_logits(model: PreTrainedModel, inputs: Mapping[str, Any], count: int) -> Tensor:
    """The logits (B, count, V) of the last `count` columns of `inputs["input_ids"]`; no others are computed."""
    keep: int | Tensor = count
    if not torch.is_grad_enabled():
        # A list of columns makes torch copy them together. With a slice, outside autograd, torch multiplies row by row,
        # and on a CPU copies the whole head for each row.
        ids_BL = inputs["input_ids"]
        keep = torch.arange(max(0, ids_BL.shape[1] - count), ids_BL.shape[1], device=ids_BL.device)
    return model(**inputs, logits_to_keep=keep).logits[:, -count:]


def answer_logprobs(model: PreTrainedModel, ids_BL: Tensor, attention_mask_BL: Tensor, columns: int) -> Tensor:
    """log p(token | all before it) of the tokens in the last K columns. Gradients flow.

    The log-probability of column j is read at column j - 1. Values in padding are meaningless.

    Args:
        model: a causal language model.
        ids_BL: integers (B, L), padded on the right.
        attention_mask_BL: bool (B, L), True where a token counts.
        columns: K, below L, because nothing predicts the first column.

    Returns:
        (B, K) float32, in nats.
    """
    inputs = {"input_ids": ids_BL, "attention_mask": attention_mask_BL.long(), "use_cache": False}
    logits_BKV = last_logits(model, inputs, columns + 1)[:, :-1]
    return ops.score_tokens(logits_BKV, ids_BL[:, ids_BL.shape[1] - columns :]).logprobs


def position_limit(model: PreTrainedModel) -> int | None:
    """How many tokens a model can read in one row.

    Args:
        model: any model; it may be on the meta device.

    Returns:
        ``max_position_embeddings`` of its config, without the rows that models of RoBERTa's kind keep for padding;
        None where the config names no limit.
    """
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1  # their positions count from the padding's row on
    return limit


LIMITS = ("data.max_prompt_tokens", "data.max_answer_tokens", "rollout.max_new_tokens")
"""What limits the texts of a run."""
CONVERSATION_LIMITS = (*LIMITS, "rollout.max_turns", "rollout.max_message_tokens")
"""The same where an environment answers the policy."""


def check_fits(model: PreTrainedModel, tokens: int, what: str, limits: Sequence[str] = LIMITS) -> None:
    """Refuses a text that is longer than the model has positions.

    Args:
        model: the model that is to read it.
        tokens: how many tokens the text has.
        what: what the text is, as the beginning of a sentence.
        limits: the knobs or flags that keep it shorter, for the error's text.

    Raises:
        DataError: the text is longer.
    """
    check_positions(position_limit(model), tokens, what, reader="the model", limits=limits)


def check_positions(
    positions: int | None, tokens: int, what: str, *, reader: str, limits: Sequence[str] = LIMITS
) -> None:
    """``check_fits`` for a model whose positions are known.

    Args:
        positions: how many tokens it reads in one row; None: there is no limit.
        tokens: how many tokens the text has.
        what: what the text is, as the beginning of a sentence.
        reader: the model, as the error calls it.
        limits: as for ``check_fits``.

    Raises:
        DataError: the text is longer.
    """
    if positions is not None and tokens > positions:
        raise DataError(
            f"{what} has {tokens} tokens, and {reader} reads at most {positions} (max_position_embeddings); lower "
            f"{', '.join(limits[:-1])} or {limits[-1]}"
        )


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
    note = _other_ends(tokenizer, _named_ends(model.generation_config))
    if note:
        _note(note)
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


@contextmanager
def generating_with(model: PreTrainedModel, sampling: GenerationConfig) -> Iterator[None]:
    """Replaces the model's generation config: `generate` would fill every unset field of ``sampling`` from it."""
    own = model.generation_config
    model.generation_config = sampling
    try:
        yield
    finally:
        model.generation_config = own


def disable_dropout(model: PreTrainedModel) -> None:
    """Sets every dropout of ``model`` to 0, in the modules and in the config that is saved with it.

    PPO's ratios compare two passes of one policy: they must be the same function.

    Args:
        model: the model to change.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):  # some attention modules keep the rate as a plain number
                setattr(module, name, 0.0)
    for config in {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values():
        for name, value in list(vars(config).items()):
            if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
                setattr(config, name, 0.0)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Writes model and tokenizer to ``folder`` so that ``AutoModel*.from_pretrained`` loads them from there.

    Everything is written to a temporary folder and then renamed into place, config.json last: a folder with a
    config.json is complete. Other files of the folder stay. The configs record the ids of padding and of the end of
    sequence for other programs that load the model: they stop where the policy's answers ended in training.
    Every process calls it: the weights of a sharded model are gathered in the main process's memory.

    Args:
        model: the model to save.
        tokenizer: its tokenizer.
        folder: where to write.
        weights: what to write as the model's weights, on the main process; None: its own.
    """
    folder = Path(folder)
    state = whole_state(model) if weights is None and has_shards(model) else weights

    def write() -> None:
        for config in filter(None, (model.config, getattr(model, "generation_config", None))):
            config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        parts = folder / ".model"
        classifiers.name_source(model)
        with atomic_write(parts) as aside:
            model.save_pretrained(aside, state_dict=state)
            classifiers.write_source(model, aside)
            tokenizer.save_pretrained(aside)
        names = {part.name for part in parts.iterdir()}
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        for stale in folder.glob("*.safetensors*"):
            if stale.name not in names:
                stale.unlink()
        for name in sorted(names - {CONFIG_NAME}):
            os.replace(parts / name, folder / name)
        os.replace(parts / CONFIG_NAME, folder / CONFIG_NAME)
        parts.rmdir()
        sync_folder(folder)

    on_main_process(write)


def _named(path: str) -> str:
    if path == "embedded":
        raise ConfigError(
            "model.path 'embedded' is no folder: a run makes that model itself and trains it in its SFT stage; set "
            "sft.enabled: true, or name the folder of a trained one, such as <output_dir>/sft of an earlier run"
        )
    return path


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
        _note(
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


def _end_answers_as_the_template(tokenizer: PreTrainedTokenizerBase, cfg: GeneratorConfig) -> None:
    end, own = turn_end(tokenizer), tokenizer.eos_token
    if end is None or end == own or tokenizer.convert_tokens_to_ids(end) not in _ends_of_model(cfg):
        return
    tokenizer.add_special_tokens({"eos_token": end})
    _note(
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
    except (OSError, ValueError):  # a tokenizer's folder; a model that should be there is missed when it is loaded
        return set()
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


def _inspected(cfg: GeneratorConfig, role: Role) -> Inspection:
    found = inspection.inspect_model(cfg, role)
    raise_first(found.faults)
    if found.attention == "eager" and cfg.attn_implementation != "eager":
        _note(f"{cfg.path!r} runs with eager attention (model.attn_implementation): its architecture has no other")
    return found


def _common(cfg: GeneratorConfig, found: Inspection) -> dict[str, Any]:
    return {
        "config": found.config,
        "dtype": getattr(torch, cfg.dtype),
        "attn_implementation": found.attention,
        "trust_remote_code": cfg.trust_remote_code,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # the report names them, see _check_report
    }


def _onto(device: torch.device | None) -> dict[str, Any]:
    """Lets ``from_pretrained`` put each weight on the device as it reads it: the model is never whole on the host."""
    return {} if device is None or device.type == "cpu" else {"device_map": {"": device}}


def _move(model: PreTrainedModel, device: torch.device | None) -> None:
    nn.Module.to(model, device)  # the wrapper of PreTrainedModel.to loses its type


def _check_report(
    report: Mapping[str, Any],
    model: PreTrainedModel,
    cfg: GeneratorConfig,
    role: Role,
    found: Inspection,
) -> None:
    """Raises ConfigError where a weight was newly initialised; a note of weights that no part of the model took."""
    raise_first(report_faults(report, model, cfg, role, found.head))
    left_over = unused(report, found.head)
    if left_over:
        count = "1 weight" if len(left_over) == 1 else f"{len(left_over)} weights"
        verb = "is" if len(left_over) == 1 else "are"
        _note(f"{count} of {cfg.path!r} {verb} not used as {type(model).__name__}: {some(left_over)}")


_said: set[str] = set()


def forget_notes() -> None:
    """Lets every note of this module be logged again: each is logged once in a run, which loads a model many times."""
    _said.clear()


def _note(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.warning("%s", message)


@contextmanager
def _loading(what: str, source: str) -> Iterator[None]:
    """Turns any error from a missing folder, or from one of another format, into a ConfigError of one line."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = one_line(error)
        raise ConfigError(f"cannot load a {what} from {source!r}: {reason}; {LOADABLE}") from error


def prepared(model: PreTrainedModel, cfg: GeneratorConfig, *, device: torch.device | None = None) -> PreTrainedModel:
    """A model as every stage runs it: no dropout, fused layers on a CPU, checkpoints where ``cfg`` asks for them.

    Args:
        model: the model, which is changed in place.
        cfg: settings of loading.
        device: where a model on the meta device is to run; None: where it is, or this process's device.

    Returns:
        The same model, in evaluation mode.
    """
    if device is None and is_unread(model):
        device = process_device()
    disable_dropout(model)
    fuse_layers(model, device=device)
    if isinstance(cfg, ModelConfig) and cfg.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model.eval()


def enable_gradient_checkpointing(model: PreTrainedModel, contexts: Callable[[], Any] | None = None) -> None:
    """Keep no activations within the blocks for the backward pass, which computes them again.

    Args:
        model: the model to change.
        contexts: called in each block's forward pass, for the contexts of that pass and of its repetition.
    """
    # transformers 5.23 renamed it and warns of the old name; 5.20, the last for python 3.10, has only the old one
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False} if contexts is None else {"use_reentrant": False, "context_fn": contexts})


def _load_classifier(
    role: Role, source: str | Path, cfg: ModelConfig, device: torch.device | None, sharding: Sharding | None
) -> PreTrainedModel:
    cfg = replace(cfg, path=str(source), gguf_file=None)
    found = _inspected(cfg, role)
    assert found.config is not None  # _inspected has raised
    kind = classifiers.saved_class(AUTO[role], found.config) or AUTO[role]
    model = None if sharding is None else _without_weights(role, kind, cfg, found)
    if model is None:
        model = _read(role, kind, cfg, found, device if sharding is None else None)
        use_float32_head(model, _stored_head(model, cfg, role, found))
    return prepared(model, cfg)


def _read(role: Role, kind: Any, cfg: GeneratorConfig, found: Inspection, device: torch.device | None) -> Any:
    """The model with its weights, as transformers loads it."""
    with _loading(WHAT[role], cfg.path), inspection.quiet():
        if cfg.gguf_file:
            # Packed GGUF blocks can be neither trained nor saved.
            options: dict[str, Any] = {"gguf_file": cfg.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
        else:
            options = {"use_safetensors": True, **_onto(device)}
        model, report = kind.from_pretrained(cfg.path, **options, **_common(cfg, found))
    if cfg.gguf_file:
        _move(model, device)
        model.config.quantization_config = None
        model.hf_quantizer = None
    _check_report(report, model, cfg, role, found)
    return model


def _without_weights(role: Role, kind: Any, cfg: GeneratorConfig, found: Inspection) -> PreTrainedModel | None:
    """The model on the meta device, unread; None, and a note, where its weights cannot be read in parts."""
    weights = None if cfg.gguf_file else found.weights or weight_files(cfg, role)[0]
    whole = cfg.gguf_file is not None or cfg.trust_remote_code or weights is None
    if not whole and getattr(found.config, "quantization_config", None) is None:
        assert weights is not None
        model = _read(role, kind, cfg, found, torch.device("meta"))
        renamed: dict[str, str] = {}
        if role != "policy":
            use_float32_head(model, _stored_head(model, cfg, role, found))
            own = name_of_head(model)
            if role == "reward_model" and own is not None and found.head is not None:
                renamed = {f"{own}.{part}": f"{found.head.name}.{part}" for part in ("weight", "bias")}
        stored = find_stored(model, weights, renamed)
        if stored is not None and make_buffers(model, getattr(torch, cfg.dtype)):
            leave_unread(model, stored)
            return model
    _note(
        f"{cfg.path!r} is read whole by every process, and cut into shards after that: transformers converts its "
        "weights while it loads them, so no process can read its part alone"
    )
    return None


def _stored_head(
    model: PreTrainedModel, cfg: GeneratorConfig, role: Role, found: Inspection
) -> dict[str, Tensor] | None:
    """The weights of a classifier's last layer as its files have them; None where they have none under its name.

    A reward model's head may have another name there, or a bias that transformers' class is without.
    """
    name = name_of_last_layer(model)
    files = found.weights or weight_files(cfg, role)[0]  # a hub name may be in the cache only now
    if name is None or files is None:
        return None
    head = found.head if role == "reward_model" and name == name_of_head(model) else None
    stored = read_weights(files, name if head is None else head.name)
    if "weight" in stored:
        return stored
    dtype = model.get_submodule(name).weight.dtype
    _note(f"{cfg.path!r} keeps no {name}.weight under that name; it was read in {dtype}")
    return None


def _with_new_head(
    auto: Any, causal_lm: PreTrainedModel, cfg: ModelConfig, id2label: dict[int, str], *, copy_head: bool = False
) -> PreTrainedModel:
    """A classifier with a copy of the causal LM's backbone under a head of zeros, or of the weights of its head.

    With zeros (ours) the first prediction is p = 1/2 for every token and the same score for every answer, for any scale
    of the hidden states and any seed. The head's gradient is not zero there, so it moves at the
    first step and the backbone from the second on.
    """
    if has_shards(causal_lm):
        raise ConfigError(
            f"no classifier can be made of a {type(causal_lm).__name__} that is cut into shards (sharding.kind): make "
            "it before the model is cut, or from a model that load_causal_lm gives with the same sharding"
        )
    config = deepcopy(causal_lm.config)
    config.id2label = id2label
    config.label2id = {label: index for index, label in id2label.items()}
    config.classifier_dropout = 0.0
    kind = classifiers.new_class(auto, causal_lm, config)
    attention = inspection.attention_for(cfg, kind, config)
    unread = is_unread(causal_lm)
    # made where it stays: a copy on the host would be as large as the model
    with no_init_weights(), without_weights() if unread else causal_lm.device:
        model = kind._from_config(config, dtype=causal_lm.dtype, attn_implementation=attention)
    use_float32_head(model)
    if unread:
        heads = [f"{name_of_head(one)}.weight" for one in (model, causal_lm)]
        leave_unread(model, stored_for_copy(model, causal_lm, dict([heads] if copy_head else [])))
        return prepared(model, cfg)
    backbone(model).load_state_dict(backbone(causal_lm).state_dict(), strict=True)
    for parameter in classification_head(model).parameters():
        nn.init.zeros_(parameter)
    if copy_head:
        with torch.no_grad():
            classification_head(model).weight.copy_(classification_head(causal_lm).weight)
    return prepared(model, cfg)
