"""What a model's folder, or a hub name in the cache, says of itself, and what is wrong with it. No weights are read.

The loaders of ``tlcr.models.loading`` raise the first fault as a ConfigError, and ``tlcr doctor`` lists them all. The
names and shapes of the weights come from the headers of the safetensors. transformers' own loader compares them with
the architecture, on the meta device, so that every renaming that it knows applies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from logging import Filter, LogRecord
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    logging,
)

from tlcr.config.schema import GeneratorConfig
from tlcr.data.places import looks_like_a_path, nearest_name
from tlcr.models import attention, classifiers
from tlcr.models.faults import AUTO, LOADABLE, SUBJECT, WHAT, Fault, Role, one_line, python_command, raise_first, some
from tlcr.models.weight_files import (
    StoredHead,
    WeightFiles,
    find_file,
    pointer_faults,
    stored_head,
    weight_files,
)
from tlcr.models.weight_names import report_faults

__all__ = [
    "THREE_CLASSES",
    "TWO_CLASSES",
    "Fault",
    "Inspection",
    "Role",
    "attention_for",
    "embedding_rows",
    "inspect_model",
    "inspect_tokenizer",
    "label_faults",
    "model_faults",
    "quiet",
    "read_config",
    "several_outputs",
]

TWO_CLASSES = {0: "negative", 1: "positive"}
THREE_CLASSES = {0: "negative", 1: "neutral", 2: "positive"}

UNMERGEABLE = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT")
"""Kinds of peft's adapters that add inputs or layers and no change of weights."""


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
    found = inspect_model(cfg, role)
    labels: list[Fault] = []
    if role == "discriminator" and found.config is not None:
        labels = label_faults(found.config, cfg.path, [TWO_CLASSES, THREE_CLASSES])
    return [*found.faults, *labels, *inspect_tokenizer(cfg)[1]]


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
        faults = [
            *_adapter_faults(cfg, role),
            *pointer_faults(cfg.path, SUBJECT[role], (CONFIG_NAME, GENERATION_CONFIG_NAME)),
        ]
        weights, damaged = (None, []) if faults else weight_files(cfg, role)
        faults += damaged
        if faults:
            return Inspection(faults=tuple(faults))
        config = read_config(cfg)
    except (OSError, ValueError, ImportError) as error:
        return Inspection(faults=(_unreadable(cfg.path, role, error),))
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
        faults = pointer_faults(source, "tokenizer", None)
        if faults:
            return None, faults
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=cfg.trust_remote_code, **gguf)
    except Exception as error:  # noqa: BLE001 - of a damaged file tokenizers raises Exception itself, and python the rest
        fact = f"cannot load a tokenizer from {source!r}: {one_line(error)}"
        return None, [Fault("tokenizer", fact, LOADABLE)]
    return tokenizer, [*_token_faults(tokenizer, source, cfg), *_embedding_faults(tokenizer, source, cfg)]


def read_config(cfg: GeneratorConfig) -> PreTrainedConfig:
    """The config of a model, from its folder, hub name or GGUF file.

    Args:
        cfg: the model's folder or hub name.

    Returns:
        The config.

    Raises:
        OSError: transformers finds none. It raises ValueError for an architecture that it does not know, and
            ImportError where the model's own code needs a package.
    """
    gguf = {"gguf_file": cfg.gguf_file} if cfg.gguf_file else {}
    config: PreTrainedConfig = AutoConfig.from_pretrained(cfg.path, trust_remote_code=cfg.trust_remote_code, **gguf)
    return config


def embedding_rows(cfg: GeneratorConfig) -> int | None:
    """Rows of the model's input embeddings, by its config.

    Args:
        cfg: the model's folder or hub name.

    Returns:
        The rows; None where there is no config to read beside the tokenizer, which loading the model reports, and for
        GGUF, whose file has both.
    """
    folder = Path(cfg.path)
    if cfg.gguf_file or (folder.is_dir() and not (folder / CONFIG_NAME).is_file()):
        return None
    try:
        config = read_config(cfg)
    except (OSError, ValueError, ImportError):
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def attention_for(cfg: GeneratorConfig, kind: Any, config: PreTrainedConfig) -> str:
    """The attention implementation that a model of ``config`` runs under these settings.

    Args:
        cfg: its ``attn_implementation`` "auto" is sdpa, and "eager" for an architecture that has no other.
        kind: the class of the model, or the Auto class of transformers that makes it.
        config: the model's.

    Returns:
        A name for transformers.

    Raises:
        ConfigError: the architecture does not have the implementation that ``cfg`` names.
    """
    implementation, _, faults = _try_attention(cfg, kind, config)
    raise_first(faults)
    return implementation


def several_outputs(source: str, outputs: int) -> Fault:
    """The fault of a reward model with more outputs than the score."""
    return Fault(
        SUBJECT["reward_model"],
        f"the reward model {source!r} has {outputs} outputs; wanted 1, the score of an answer (num_labels: 1)",
        "train it with 'tlcr train reward-model', or name one that was trained with one output",
    )


def label_faults(config: PreTrainedConfig, source: str, accepted: Sequence[Mapping[int, str]]) -> list[Fault]:
    """The fault of a token classifier with other labels than the accepted ones, or with them in another order."""
    found = {int(index): label for index, label in (config.id2label or {}).items()}
    if found in accepted:
        return []
    remedy = "train it with 'tlcr train discriminator'"
    if any(set(found.values()) == set(labels.values()) for labels in accepted):
        remedy += ", or put the rows of its head in this order too; new names alone would turn the rewards round"
    elif any(len(found) == len(labels) for labels in accepted):
        remedy += ", or rename id2label in its config.json if these are the same classes"
    return [
        Fault(
            SUBJECT["discriminator"],
            f"the token classifier {source!r} has the labels {_listed(found)}; wanted "
            f"{' or '.join(map(_listed, accepted))}, in this order",
            remedy,
        )
    ]


def _listed(labels: Mapping[int, str]) -> str:
    return "[" + ", ".join(labels[index] for index in sorted(labels)) + "]"


# ---- tokenizer


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
            + python_command(
                "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T",
                f"t = T.from_pretrained({source!r}); m = M.from_pretrained({cfg.path!r})",
                f"m.resize_token_embeddings(len(t)); m.save_pretrained({resized!r}); t.save_pretrained({resized!r})",
            )
            + f", and name {resized!r} as the model",
        )


# ---- adapters


def _unreadable(source: str, role: Role, error: BaseException) -> Fault:
    if not Path(source).exists() and looks_like_a_path(source):  # transformers would speak of the hub
        fact = f"cannot load a {WHAT[role]} from {source!r}: there is no such folder{nearest_name(Path(source))}"
        if source.count("/") == 1 and not source.startswith((".", "/", "~")):  # it may be a name of the hub as well
            fact += f"; as a name of the hub: {one_line(error)}"
        return Fault(SUBJECT[role], fact, "correct the path")
    return Fault(SUBJECT[role], f"cannot load a {WHAT[role]} from {source!r}: {one_line(error)}", LOADABLE)


def _adapter_faults(cfg: GeneratorConfig, role: Role) -> Iterator[Fault]:
    """transformers with peft loads an adapter with its base, all frozen, and takes the base for a folder with both."""
    path = find_file(cfg.path, ADAPTER_CONFIG_NAME)
    if path is None:
        return
    about = json.loads(path.read_text(encoding="utf-8"))
    kind, base = about.get("peft_type") or "an unnamed kind", about.get("base_model_name_or_path") or "an unnamed model"
    if find_file(cfg.path, SAFE_WEIGHTS_NAME) or find_file(cfg.path, SAFE_WEIGHTS_INDEX_NAME):
        yield Fault(
            SUBJECT[role],
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
    yield Fault(SUBJECT[role], fact, remedy)


def _merging(source: str, base: str, role: Role) -> str:
    options = ", num_labels=1" if role == "reward_model" else ""
    merged = f"{Path(source).name}-merged"
    tokenizer = source if find_file(source, "tokenizer_config.json") else base
    auto = AUTO[role].__name__.replace("AutoModel", "AutoPeftModel")
    return python_command(
        f"from peft import {auto} as M; from transformers import AutoTokenizer as T",
        f"M.from_pretrained({source!r}{options}).merge_and_unload().save_pretrained({merged!r})",
        f"T.from_pretrained({tokenizer!r}).save_pretrained({merged!r})",
    )


# ---- architecture


def _skeleton(
    cfg: GeneratorConfig, role: Role, config: PreTrainedConfig
) -> tuple[str, PreTrainedModel | None, list[Fault]]:
    """The attention implementation; the model on the meta device, None where it cannot be made there; faults."""
    kind = AUTO[role] if role == "policy" else classifiers.saved_class(AUTO[role], config) or AUTO[role]
    implementation, model, faults = _try_attention(cfg, kind, config)
    if model is None and not faults and role != "discriminator" and not _knows(kind, config):
        fact = f"{cfg.path!r} is a {config.model_type!r} model, for which transformers has no {AUTO[role].__name__}"
        faults = [Fault(SUBJECT[role], fact, "use another architecture, such as Llama, Qwen, Mistral, Gemma or GPT-2")]
    return implementation, model, [replace(fault, subject=SUBJECT[role]) for fault in faults]


def _knows(kind: Any, config: PreTrainedConfig) -> bool:
    if _is_model_class(kind):
        return True
    return type(config) in kind._model_mapping or kind.__name__ in (getattr(config, "auto_map", None) or {})


def _is_model_class(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, PreTrainedModel)


def _try_attention(
    cfg: GeneratorConfig, kind: Any, config: PreTrainedConfig
) -> tuple[str, PreTrainedModel | None, list[Fault]]:
    named = cfg.attn_implementation
    wanted = attention.NAME if named in ("auto", "sdpa") else named
    if not _knows(kind, config):
        return wanted, None, []
    model, error = _on_meta(cfg, kind, config, wanted)
    if model is not None or wanted == "eager":
        return wanted, model, []
    model, _ = _on_meta(cfg, kind, config, "eager")
    if model is None:  # it is not the attention: loading says what it is
        return wanted, None, []
    if named == "auto":
        return "eager", model, []
    assert error is not None
    fact = f"model.attn_implementation {named!r} does not work with {type(model).__name__}: {one_line(error)}"
    remedy = "leave model.attn_implementation out, or set it to eager, which every architecture has"
    return wanted, model, [Fault("model", fact, remedy)]


def _on_meta(
    cfg: GeneratorConfig, kind: Any, config: PreTrainedConfig, implementation: str
) -> tuple[PreTrainedModel | None, Exception | None]:
    """The model without weights, or why it cannot be made. What a model's own code raises can be of any class."""
    try:
        with torch.device("meta"):
            if _is_model_class(kind):
                return kind._from_config(deepcopy(config), attn_implementation=implementation), None
            model = kind.from_config(
                deepcopy(config), attn_implementation=implementation, trust_remote_code=cfg.trust_remote_code
            )
        return model, None
    except Exception as error:  # noqa: BLE001
        return None, error


def _report(model: Any, config: PreTrainedConfig, weights: WeightFiles) -> dict[str, Any] | None:
    """transformers' report of loading these names and shapes into the architecture; None where it cannot be had.

    The tensors are on the meta device: all of its renaming and merging runs, and no number is read. A conversion that
    needs numbers raises, and loading itself then makes the report. So do quantized weights, which need their library.
    """
    if getattr(config, "quantization_config", None) is not None:
        return None
    tensors = {name: torch.empty(shape, device="meta") for name, shape in weights.shapes.items()}
    try:
        with quiet(), _no_progress_bars():
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
    """No report of loading by transformers inside: tlcr says what of it is a fault, and what to do."""
    theirs, no_report = logging.get_logger("transformers.modeling_utils"), _NoReport()
    theirs.addFilter(no_report)
    try:
        yield
    finally:
        theirs.removeFilter(no_report)


class _NoReport(Filter):
    def filter(self, record: LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
