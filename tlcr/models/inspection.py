"""What a model's folder, or a hub name in the cache, says of itself, and what is wrong with it. No weights are read.

The loaders of ``tlcr.models.loading`` raise the first fault as a ConfigError, and ``tlcr doctor`` lists them all. The
names and shapes of the weights come from the headers of the safetensors. transformers' own loader compares them with
the architecture, on the meta device, so that every renaming that it knows applies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    logging,
)

from tlcr.config.schema import GeneratorConfig
from tlcr.errors import ConfigError
from tlcr.models import attention
from tlcr.models.heads import HEADS

Role = Literal["policy", "reward_model", "discriminator"]
"""What a model is wanted for."""

AUTO: Mapping[Role, Any] = {
    "policy": AutoModelForCausalLM,
    "reward_model": AutoModelForSequenceClassification,
    "discriminator": AutoModelForTokenClassification,
}
"""The class of transformers that loads each role."""

LOADABLE = "give a folder that transformers can load (hub names need the network, or a filled cache)"

POINTER = b"version https://git-lfs"
"""How a Git LFS pointer begins: the text that a clone without git-lfs has in the place of a large file."""

POINTER_BYTES = 1024
"""Git LFS pointers are shorter than this (its specification)."""

UNMERGEABLE = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT")
"""Kinds of peft's adapters that add inputs or layers and no change of weights."""

OTHER_HEADS = ("value_head", "v_head", "v_head.summary")
"""Names of the head of a score in reward models that other libraries train."""

NAMED = 3
"""Names that a message gives of many."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a model, and what to do.

    Attributes:
        subject: whose fault it is: "model", "reward model", "discriminator" or "tokenizer".
        fact: what was found, with the path and the names.
        remedy: what puts it right.
    """

    subject: str
    fact: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.fact}; {self.remedy}"


@dataclass(frozen=True)
class StoredHead:
    """The head of a classifier as its safetensors have it: its name there, its outputs, whether it has a bias."""

    name: str
    outputs: int
    has_bias: bool


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors of a model: each file, and the shapes of its tensors by their names."""

    files: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Inspection:
    """What loading needs to know of a model, and what is wrong with it.

    Attributes:
        config: its config, with one label for a reward model whose head has one output; None where it cannot be read.
        attention: the attention implementation that it is to run.
        head: the head in the files of a classifier.
        weights: files, names and shapes; None where they cannot be read, and for GGUF.
        faults: what is wrong.
    """

    config: PreTrainedConfig | None = None
    attention: str = "eager"
    head: StoredHead | None = None
    weights: WeightFiles | None = None
    faults: tuple[Fault, ...] = ()


def model_faults(cfg: GeneratorConfig, role: Role) -> list[Fault]:
    """Everything that is wrong with a model and its tokenizer, read without loading weights.

    Args:
        cfg: the model's folder or hub name, its tokenizer, and the settings of loading.
        role: what it is wanted for.

    Returns:
        The faults, in the order in which loading would meet them; none for 'embedded', which the pipeline makes, and
        none of weights that are not in the cache yet.
    """
    if cfg.path == "embedded":
        return []
    return [*inspect_model(cfg, role).faults, *inspect_tokenizer(cfg)[1]]


def raise_first(faults: Sequence[Fault]) -> None:
    """Raises the first fault as a ConfigError of one line; nothing where there is none."""
    if faults:
        raise ConfigError(str(faults[0]))


def inspect_model(cfg: GeneratorConfig, role: Role) -> Inspection:
    """A model's folder, as loading needs it, with what is wrong in it.

    Args:
        cfg: the model's folder or hub name, and the settings of loading.
        role: what it is wanted for.

    Returns:
        The inspection. Where the names of the weights cannot be compared without loading (a quantized model, a GGUF
        file, an architecture whose weights transformers cannot convert on the meta device, a hub name that is not in
        the cache), loading compares them.
    """
    try:
        faults = [*_adapter_faults(cfg, role), *_pointer_faults(cfg.path, _SUBJECT[role], (CONFIG_NAME, GENERATION))]
        if faults:
            return Inspection(faults=tuple(faults))
        config = AutoConfig.from_pretrained(
            cfg.path,
            trust_remote_code=cfg.trust_remote_code,
            **({"gguf_file": cfg.gguf_file} if cfg.gguf_file else {}),
        )
    except (OSError, ValueError, ImportError) as error:
        return Inspection(faults=(_unreadable(cfg.path, role, error),))
    weights, faults = _weights(cfg, role)
    head = stored_head(weights.shapes, config) if weights is not None and role != "policy" else None
    if role == "reward_model" and head is not None and head.outputs == 1 and config.num_labels != 1:
        config.num_labels = 1
    implementation, skeleton, attention_faults = _skeleton(cfg, role, config)
    if role == "reward_model" and head is not None and head.outputs != 1:
        faults.append(several_outputs(cfg.path, head.outputs))
    elif skeleton is not None and weights is not None:
        report = _report(skeleton, config, weights)
        faults += [] if report is None else report_faults(report, skeleton, cfg, role, head)
    return Inspection(config, implementation, head, weights, (*faults, *attention_faults))


def inspect_tokenizer(cfg: GeneratorConfig) -> tuple[PreTrainedTokenizerBase | None, list[Fault]]:
    """The tokenizer of ``cfg`` as it is stored, None where it cannot be read, and what is wrong with it.

    A padding token is not needed (see ``load_tokenizer``). A token that the model has no embedding for is a fault where
    tlcr would write it: beginning and end of sequence, a padding token that the config names, and the tokens that the
    chat template has in it. Gemma 3 has tokens of images beyond its vocabulary, which no text has.

    Args:
        cfg: the model's folder or hub name, its tokenizer, and settings for what the tokenizer lacks.

    Returns:
        The tokenizer and the faults.
    """
    source = cfg.tokenizer or cfg.path
    gguf = {"gguf_file": cfg.gguf_file} if cfg.gguf_file and not cfg.tokenizer else {}
    try:
        faults = _pointer_faults(source, "tokenizer", None)
        if faults:
            return None, faults
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=cfg.trust_remote_code, **gguf)
    except (OSError, ValueError, ImportError) as error:
        fact = f"cannot load a tokenizer from {source!r}: {one_line(error)}"
        return None, [Fault("tokenizer", fact, LOADABLE)]
    return tokenizer, [*_token_faults(tokenizer, source, cfg), *_embedding_faults(tokenizer, source, cfg)]


def _token_faults(tokenizer: PreTrainedTokenizerBase, source: str, cfg: GeneratorConfig) -> Iterator[Fault]:
    if not tokenizer.is_fast:
        yield Fault(
            "tokenizer",
            f"the tokenizer {source!r} is a {type(tokenizer).__name__}, which gives no character offsets; tlcr aligns "
            "text and tokens by them",
            "name a fast one (a folder with tokenizer.json) with model.tokenizer",
        )
    if tokenizer.eos_token_id is None:
        yield Fault(
            "tokenizer",
            f"the tokenizer {source!r} has no end-of-sequence token; answers could never end",
            "set eos_token in its tokenizer_config.json",
        )
    if cfg.pad_token is not None and cfg.pad_token not in tokenizer.get_vocab():
        yield Fault(
            "tokenizer",
            f"model.pad_token {cfg.pad_token!r} is not in the vocabulary of {source!r}",
            f"name a token that is, such as {tokenizer.eos_token!r}",
        )


def _embedding_faults(tokenizer: PreTrainedTokenizerBase, source: str, cfg: GeneratorConfig) -> Iterator[Fault]:
    rows = embedding_rows(cfg)
    if rows is None:
        return
    template = cfg.chat_template or tokenizer.chat_template
    written = {tokenizer.bos_token, tokenizer.eos_token, cfg.pad_token}
    beyond = {
        token: index
        for token, index in tokenizer.get_vocab().items()
        if index >= rows and (token in written or (isinstance(template, str) and token in template))
    }
    if beyond:
        names = some(f"{token!r} ({index})" for token, index in sorted(beyond.items(), key=lambda item: item[1]))
        resized = f"{Path(cfg.path).name}-resized"
        yield Fault(
            "tokenizer",
            f"the tokenizer {source!r} has tokens that the model {cfg.path!r}, with {rows} embeddings, does not have: "
            f"{names}",
            "give the model rows for them: "
            + _python(
                "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T",
                f"t = T.from_pretrained({source!r}); m = M.from_pretrained({cfg.path!r})",
                f"m.resize_token_embeddings(len(t)); m.save_pretrained({resized!r}); t.save_pretrained({resized!r})",
            )
            + f", and name {resized!r} as the model",
        )


def embedding_rows(cfg: GeneratorConfig) -> int | None:
    """Rows of the model's input embeddings by its config; None where there is no config to read beside the tokenizer,
    which loading the model reports, and for GGUF, whose file has both."""
    folder = Path(cfg.path)
    if cfg.gguf_file or (folder.is_dir() and not (folder / CONFIG_NAME).is_file()):
        return None
    try:
        config = AutoConfig.from_pretrained(cfg.path, trust_remote_code=cfg.trust_remote_code)
    except (OSError, ValueError, ImportError):
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def attention_for(cfg: GeneratorConfig, auto: Any, config: PreTrainedConfig) -> str:
    """The attention implementation that a model of ``config`` runs under these settings.

    Args:
        cfg: its ``attn_implementation`` "auto" is sdpa, and "eager" for an architecture that has no other.
        auto: the class of transformers that makes the model.
        config: the model's.

    Returns:
        A name for transformers.

    Raises:
        ConfigError: the architecture does not have the implementation that ``cfg`` names.
    """
    implementation, _, faults = _try_attention(cfg, auto, config)
    raise_first(faults)
    return implementation


def stored_head(shapes: Mapping[str, tuple[int, ...]], config: PreTrainedConfig) -> StoredHead | None:
    """The linear head that a classifier's safetensors have, under the names of transformers and of other libraries."""
    prefix = getattr(config, "value_head_prefix", None)
    for name in (*HEADS, "classifier.out_proj", *([prefix] if isinstance(prefix, str) else []), *OTHER_HEADS):
        shape = shapes.get(f"{name}.weight", ())
        if len(shape) == 2:
            return StoredHead(name, shape[0], f"{name}.bias" in shapes)
    return None


def several_outputs(source: str, outputs: int) -> Fault:
    """The fault of a reward model with more outputs than the score."""
    return Fault(
        _SUBJECT["reward_model"],
        f"the reward model {source!r} has {outputs} outputs; wanted 1, the score of an answer (num_labels: 1)",
        "train it with 'tlcr train reward-model', or name one that was trained with one output",
    )


def report_faults(
    report: Mapping[str, Any], model: PreTrainedModel, cfg: GeneratorConfig, role: Role, head: StoredHead | None
) -> list[Fault]:
    """What transformers' report of loading says is wrong: weights that are not there, or that do not fit.

    Args:
        report: what ``from_pretrained`` gives with ``output_loading_info``.
        model: the model that was loaded, or its skeleton on the meta device.
        cfg: the folder or hub name.
        role: what the model is wanted for.
        head: the head of a classifier in the file, which may have another name there.

    Returns:
        No fault where every weight of the model was in the file, with its shape, and no layer of the file is left over.
    """
    missing, unexpected = set(report["missing_keys"]), set(report["unexpected_keys"])
    own = name_of_head(model)
    if head is not None and own is not None and role == "reward_model":
        missing -= {f"{own}.weight"} if head.name != own else set()
        unexpected -= {f"{head.name}.weight", f"{head.name}.bias"}
    fault = (
        _unmerged(unexpected, cfg)
        or _renamed(missing, unexpected, cfg, role)
        or _missing(missing, unexpected, cfg, role)
        or _mismatched(report["mismatched_keys"], cfg)
        or _left_over(unexpected, model, cfg, role)
    )
    return [] if fault is None else [Fault(_SUBJECT[role], *fault)]


def name_of_head(model: PreTrainedModel) -> str | None:
    """The name of the linear head that a classifier has; None where it has no single one."""
    return next((name for name in HEADS if isinstance(getattr(model, name, None), torch.nn.Linear)), None)


def read_weights(weights: WeightFiles, module: str) -> dict[str, torch.Tensor]:
    """The tensors of one module as the files have them, by their names in it."""
    found = {}
    for file in weights.files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                if name.rpartition(".")[0] == module:
                    found[name.rpartition(".")[2]] = tensors.get_tensor(name)
    return found


def unused(report: Mapping[str, Any], head: StoredHead | None) -> list[str]:
    """The weights in the file that the model has no place for, where that is no fault, in order."""
    own = set() if head is None else {f"{head.name}.weight", f"{head.name}.bias"}
    return sorted(set(report["unexpected_keys"]) - own)


def some(names: Iterable[str]) -> str:
    """A few of many names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def one_line(error: BaseException) -> str:
    """The whole message of an error in one line."""
    return " ".join(str(error).split()).rstrip(".")


# ---- the files

GENERATION = "generation_config.json"
_SUBJECT: Mapping[Role, str] = {"policy": "model", "reward_model": "reward model", "discriminator": "discriminator"}
_WHAT: Mapping[Role, str] = {"policy": "language model", "reward_model": "classifier", "discriminator": "classifier"}
_TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".jinja")


def _unreadable(source: str, role: Role, error: BaseException) -> Fault:
    return Fault(_SUBJECT[role], f"cannot load a {_WHAT[role]} from {source!r}: {one_line(error)}", LOADABLE)


def _find(source: str, name: str, *, download: bool = True) -> Path | None:
    """A file of a folder or hub name. A hub's file is fetched only with ``download``."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    found = cached_file(
        source,
        name,
        local_files_only=not download,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _adapter_faults(cfg: GeneratorConfig, role: Role) -> Iterator[Fault]:
    """transformers with peft loads an adapter with its base, all frozen, and takes the base for a folder with both."""
    path = _find(cfg.path, ADAPTER_CONFIG_NAME)
    if path is None:
        return
    about = json.loads(path.read_text(encoding="utf-8"))
    kind, base = about.get("peft_type") or "an unnamed kind", about.get("base_model_name_or_path") or "an unnamed model"
    if _find(cfg.path, SAFE_WEIGHTS_NAME) or _find(cfg.path, SAFE_WEIGHTS_INDEX_NAME):
        yield Fault(
            _SUBJECT[role],
            f"{cfg.path!r} has whole weights and an adapter ({ADAPTER_CONFIG_NAME}, {kind}); with peft installed, "
            "others load than without it",
            f"remove {ADAPTER_CONFIG_NAME} if the adapter is merged into the weights; else name a folder of merged "
            "weights",
        )
        return
    fact = f"{cfg.path!r} is an adapter ({kind}) of {base!r} and has no weights of its own"
    if kind in UNMERGEABLE:
        remedy = "this kind cannot be merged into weights: name a model with whole weights"
    else:
        remedy = f"merge it: {_merging(cfg.path, base, role)}, and name the merged folder"
    yield Fault(_SUBJECT[role], fact, remedy)


def _merging(source: str, base: str, role: Role) -> str:
    task = {"policy": "CausalLM", "reward_model": "SequenceClassification", "discriminator": "TokenClassification"}
    options = ", num_labels=1" if role == "reward_model" else ""
    merged = f"{Path(source).name}-merged"
    tokenizer = source if _find(source, "tokenizer_config.json") else base
    return _python(
        f"from peft import AutoPeftModelFor{task[role]} as M; from transformers import AutoTokenizer as T",
        f"M.from_pretrained({source!r}{options}).merge_and_unload().save_pretrained({merged!r})",
        f"T.from_pretrained({tokenizer!r}).save_pretrained({merged!r})",
    )


def _python(*lines: str) -> str:
    return f'python -c "{"; ".join(lines)}"'


def _pointer_faults(source: str, subject: str, names: Sequence[str] | None) -> list[Fault]:
    """Git LFS pointers among the files of a folder; ``names`` None: all that a tokenizer may read."""
    folder = Path(source)
    if not folder.is_dir():
        return []
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (
            path.name in names
            if names is not None
            else path.suffix in _TOKENIZER_SUFFIXES and path.name not in (CONFIG_NAME, GENERATION)
        )
    ]
    return [_pointer(path, subject) for path in files if _is_pointer(path)]


def _is_pointer(path: Path) -> bool:
    if path.stat().st_size >= POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def _pointer(path: Path, subject: str) -> Fault:
    fact = f"{str(path)!r} is a Git LFS pointer, a note of where the file is, and not the file itself"
    return Fault(subject, fact, "run 'git lfs pull' in that folder, or download the file")


def _weights(cfg: GeneratorConfig, role: Role) -> tuple[WeightFiles | None, list[Fault]]:
    """The safetensors and the shapes in their headers; None and the faults where a file is not what it should be."""
    subject = _SUBJECT[role]
    if cfg.gguf_file:
        return None, _gguf_faults(cfg, subject)
    local = Path(cfg.path).is_dir()
    whole = _find(cfg.path, SAFE_WEIGHTS_NAME, download=False)
    index = None if whole is not None else _find(cfg.path, SAFE_WEIGHTS_INDEX_NAME)
    if whole is None and index is None:
        return None, [_no_weights(cfg, role)] if local else []
    if whole is not None:
        files, faults = [whole], []
    else:
        assert index is not None
        files, faults = _shards(cfg.path, index, subject)
        if not local and faults:
            return None, []  # a part of it is not in the cache yet
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            shapes |= _header(file)
        except (SafetensorError, OSError) as error:
            faults.append(_unlike_weights(file, subject, error))
    return (None if faults else WeightFiles(tuple(map(str, files)), shapes)), faults


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as tensors:
        names = tensors.keys()
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}


def _unlike_weights(file: Path, subject: str, error: BaseException) -> Fault:
    if _is_pointer(file):
        return _pointer(file, subject)
    size = file.stat().st_size
    fact = f"{str(file)!r} is {'empty' if not size else f'cut off or damaged ({size} bytes: {one_line(error)})'}"
    return Fault(subject, fact, "download or copy the file again")


def _shards(source: str, index: Path, subject: str) -> tuple[list[Path], list[Fault]]:
    if _is_pointer(index):
        return [], [_pointer(index, subject)]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError) as error:
        fact = f"{str(index)!r} is no index of weights ({type(error).__name__}: {one_line(error)})"
        return [], [Fault(subject, fact, "download or copy the file again")]
    found = {name: _find(source, name, download=False) for name in names}
    absent = [name for name, file in found.items() if file is None]
    fact = f"{source!r} lacks {some(absent)}, which {index.name} names"
    faults = [Fault(subject, fact, "download or copy what is missing")] if absent else []
    return [file for file in found.values() if file is not None], faults


def _no_weights(cfg: GeneratorConfig, role: Role) -> Fault:
    fact = f"cannot load a {_WHAT[role]} from {cfg.path!r}: "
    ggufs = sorted(path.name for path in Path(cfg.path).glob("*.gguf"))
    pickled = [name for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if (Path(cfg.path) / name).is_file()]
    if pickled:
        auto = AUTO[role].__name__
        remedy = "if you trust it, convert it: " + _python(
            f"from transformers import {auto} as M",
            f"M.from_pretrained({cfg.path!r}, use_safetensors=False).save_pretrained({cfg.path!r})",
        )
        return Fault(
            _SUBJECT[role], f"{fact}its weights are pickled ({pickled[0]}); tlcr reads safetensors only", remedy
        )
    if ggufs and role == "policy":
        return Fault(_SUBJECT[role], f"{fact}it has no safetensors, but {some(ggufs)}", f"model.gguf_file: {ggufs[0]}")
    return Fault(
        _SUBJECT[role],
        f"{fact}it has no weights ({SAFE_WEIGHTS_NAME}, or {SAFE_WEIGHTS_INDEX_NAME} and its parts)",
        "download or copy them, or name the folder that has them",
    )


def _gguf_faults(cfg: GeneratorConfig, subject: str) -> list[Fault]:
    assert cfg.gguf_file is not None
    file = _find(cfg.path, cfg.gguf_file, download=False)
    if file is None:
        if not Path(cfg.path).is_dir():
            return []
        there = some(sorted(path.name for path in Path(cfg.path).glob("*.gguf"))) or "none"
        fact = f"{cfg.path!r} has no file {cfg.gguf_file!r} (model.gguf_file); its GGUF files: {there}"
        return [Fault(subject, fact, "correct model.gguf_file")]
    with file.open("rb") as opened:
        begins = opened.read(4)
    return [] if begins == b"GGUF" else [_unlike_weights(file, subject, ValueError("it does not begin with GGUF"))]


# ---- the architecture


def _skeleton(
    cfg: GeneratorConfig, role: Role, config: PreTrainedConfig
) -> tuple[str, PreTrainedModel | None, list[Fault]]:
    """The attention implementation; the model on the meta device, None where it cannot be made there; faults."""
    implementation, model, faults = _try_attention(cfg, AUTO[role], config)
    if model is None and not faults and role != "discriminator" and not _knows(AUTO[role], config):
        fact = f"{cfg.path!r} is a {config.model_type!r} model, for which transformers has no {AUTO[role].__name__}"
        faults = [Fault(_SUBJECT[role], fact, "use another architecture, such as Llama, Qwen, Mistral, Gemma or GPT-2")]
    return implementation, model, [replace(fault, subject=_SUBJECT[role]) for fault in faults]


def _knows(auto: Any, config: PreTrainedConfig) -> bool:
    return type(config) in auto._model_mapping or auto.__name__ in (getattr(config, "auto_map", None) or {})


def _try_attention(
    cfg: GeneratorConfig, auto: Any, config: PreTrainedConfig
) -> tuple[str, PreTrainedModel | None, list[Fault]]:
    named = cfg.attn_implementation
    wanted = attention.NAME if named in ("auto", "sdpa") else named
    if not _knows(auto, config):
        return wanted, None, []
    model, error = _on_meta(cfg, auto, config, wanted)
    if model is not None or wanted == "eager":
        return wanted, model, []
    model, _ = _on_meta(cfg, auto, config, "eager")
    if model is None:  # it is not the attention: loading says what it is
        return wanted, None, []
    if named == "auto":
        return "eager", model, []
    assert error is not None
    fact = f"model.attn_implementation {named!r} does not work with {type(model).__name__}: {one_line(error)}"
    remedy = "leave model.attn_implementation out, or set it to eager, which every architecture has"
    return wanted, model, [Fault("model", fact, remedy)]


def _on_meta(
    cfg: GeneratorConfig, auto: Any, config: PreTrainedConfig, implementation: str
) -> tuple[PreTrainedModel | None, Exception | None]:
    """The model without weights, or why it cannot be made. What a model's own code raises can be of any class."""
    try:
        with torch.device("meta"):
            model = auto.from_config(
                deepcopy(config), attn_implementation=implementation, trust_remote_code=cfg.trust_remote_code
            )
        return model, None
    except Exception as error:  # noqa: BLE001
        return None, error


def _report(model: PreTrainedModel, config: PreTrainedConfig, weights: WeightFiles) -> dict[str, Any] | None:
    """transformers' report of loading these names and shapes into the architecture; None where it cannot be had.

    The tensors are on the meta device: all of its renaming and merging runs, and no number is read. A conversion that
    needs numbers raises, and loading itself then makes the report. So do quantized weights, which need their library.
    """
    if getattr(config, "quantization_config", None) is not None:
        return None
    tensors = {name: torch.empty(shape, device="meta") for name, shape in weights.shapes.items()}
    try:
        with quiet():
            _, report = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict=tensors,
                device_map={"": "meta"},
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception:  # noqa: BLE001
        return None
    return None if report["error_msgs"] else report


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no progress bars of transformers inside."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# ---- the names of the weights

_Sentences = tuple[str, str]
"""Fact and remedy."""


def _unmerged(unexpected: set[str], cfg: GeneratorConfig) -> _Sentences | None:
    found = sorted(name for name in unexpected if ".lora_" in name or ".base_layer." in name)
    if not found:
        return None
    return (
        f"{cfg.path!r} has the weights of an adapter that is not merged, such as {found[0]}",
        "load it where it was trained, merge it (merge_and_unload of peft) and save the merged model",
    )


def _renamed(missing: set[str], unexpected: set[str], cfg: GeneratorConfig, role: Role) -> _Sentences | None:
    """Names that a wrapper has put before all others, or that lack the architecture's own beginning."""
    for name in sorted(missing):
        longer = next((key for key in sorted(unexpected) if key.endswith("." + name)), None)
        shorter = next((key for key in sorted(unexpected) if name.endswith("." + key)), None)
        if longer is not None:
            wrapped, found, mapping = longer[: -len(name)], longer, {f"^{re.escape(longer[: -len(name)])}": ""}
            why = f"they begin with {wrapped!r}, which a wrapper of the model has put there"
        elif shorter is not None:
            lacking, found = name[: -len(shorter)], shorter
            mapping, why = {"^": lacking}, f"they lack the beginning {lacking!r}"
        else:
            continue
        auto, renamed = AUTO[role].__name__, f"{Path(cfg.path).name}-renamed"
        return (
            f"the weights of {cfg.path!r} have other names than the model: {why} ({found} is {name} there)",
            "save it from the model itself and not from its wrapper, or rename them: "
            + _python(
                f"from transformers import {auto} as M, AutoTokenizer as T",
                f"M.from_pretrained({cfg.path!r}, key_mapping={mapping!r}).save_pretrained({renamed!r})",
                f"T.from_pretrained({(cfg.tokenizer or cfg.path)!r}).save_pretrained({renamed!r})",
            )
            + f", and name {renamed!r}",
        )
    return None


def _missing(missing: set[str], unexpected: set[str], cfg: GeneratorConfig, role: Role) -> _Sentences | None:
    heads = [name for name in sorted(unexpected) if name.rpartition(".")[0] in HEADS]
    if role == "policy" and heads:
        lacks = f"it lacks {some(sorted(missing))} and has {some(heads)}" if missing else f"it has {some(heads)}"
        return (
            f"{cfg.path!r} holds no language model: {lacks}, the head of a classifier or reward model",
            "name the folder of a causal language model",
        )
    if not missing:
        return None
    known = f"it lacks {some(sorted(missing))}"
    if unexpected:
        known += f", and has {some(sorted(unexpected))}, which the architecture has no place for"
    what = "language" if role == "policy" else AUTO[role].__name__.removeprefix("AutoModelFor")
    return f"{cfg.path!r} holds no trained {what} model: {known}", "name the folder of a trained one"


def _mismatched(mismatched: Iterable[Sequence[Any]], cfg: GeneratorConfig) -> _Sentences | None:
    names = sorted(f"{name} is {_shape(stored)} and should be {_shape(wanted)}" for name, stored, wanted in mismatched)
    if not names:
        return None
    return (
        f"the weights of {cfg.path!r} do not have the shapes of its {CONFIG_NAME}: {some(names)}",
        f"bring back the {CONFIG_NAME} that was saved with these weights",
    )


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _left_over(unexpected: set[str], model: PreTrainedModel, cfg: GeneratorConfig, role: Role) -> _Sentences | None:
    """Weights of whole layers that the architecture does not count, beyond those that predict further tokens."""
    pattern = re.compile(r"\.\d+\.")
    known = {pattern.sub(".0.", name) for name in model.state_dict()}
    layers: dict[str, str] = {}
    for name in sorted(unexpected):
        match = pattern.search(name)
        if match and pattern.sub(".0.", name) in known:
            layers.setdefault(name[: match.end() - 1], name)
    predicting = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    if len(layers) <= predicting:
        return None
    return (
        f"{cfg.path!r} has weights of layers that its {CONFIG_NAME} does not count: {some(layers)}",
        f"correct num_hidden_layers (or its like) in {CONFIG_NAME}: these layers would be left out",
    )
