"""The files of a model's weights, read as far as their headers: names, shapes, and what is no weights at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from tlcr.config.schema import GeneratorConfig
from tlcr.models.faults import AUTO, SUBJECT, WHAT, Fault, Role, one_line, python_command, some
from tlcr.models.heads import HEADS
from tlcr.text.files import is_lfs_pointer

__all__ = [
    "StoredHead",
    "WeightFiles",
    "find_file",
    "pointer_faults",
    "read_weights",
    "stored_head",
    "weight_files",
]

TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".jinja")
NOT_OF_A_TOKENIZER = (CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)
"""The files that a tokenizer may read have these suffixes, and not these names."""

OTHER_HEADS = ("value_head", "v_head", "v_head.summary")
"""Names of the head of a score in reward models that other libraries train."""


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


def find_file(source: str, name: str, *, download: bool = True) -> Path | None:
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


def pointer_faults(source: str, subject: str, names: Sequence[str] | None) -> list[Fault]:
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
            else path.suffix in TOKENIZER_SUFFIXES and path.name not in NOT_OF_A_TOKENIZER
        )
    ]
    return [_pointer(path, subject) for path in files if is_lfs_pointer(path)]


def weight_files(cfg: GeneratorConfig, role: Role) -> tuple[WeightFiles | None, list[Fault]]:
    """The safetensors and the shapes in their headers; None and the faults where a file is not what it should be."""
    subject = SUBJECT[role]
    if cfg.gguf_file:
        return None, _gguf_faults(cfg, subject)
    local = Path(cfg.path).is_dir()
    whole = find_file(cfg.path, SAFE_WEIGHTS_NAME, download=False)
    index = None if whole is not None else find_file(cfg.path, SAFE_WEIGHTS_INDEX_NAME)
    if whole is None and index is None:
        return None, [_no_weights(cfg, role)] if local else []
    if whole is not None:
        files, faults = [whole], list[Fault]()
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


def stored_head(shapes: Mapping[str, tuple[int, ...]], config: PreTrainedConfig) -> StoredHead | None:
    """The linear head that a classifier's safetensors have, under the names of transformers and of other libraries."""
    prefix = getattr(config, "value_head_prefix", None)
    for name in (*HEADS, "classifier.out_proj", *([prefix] if isinstance(prefix, str) else []), *OTHER_HEADS):
        shape = shapes.get(f"{name}.weight", ())
        if len(shape) == 2:
            return StoredHead(name, shape[0], f"{name}.bias" in shapes)
    return None


def read_weights(weights: WeightFiles, module: str) -> dict[str, torch.Tensor]:
    """The tensors of one module as the files have them, by their names in it."""
    found = {}
    for file in weights.files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                if name.rpartition(".")[0] == module:
                    found[name.rpartition(".")[2]] = tensors.get_tensor(name).clone()  # not a view of the file
    return found


def _pointer(path: Path, subject: str) -> Fault:
    fact = f"{str(path)!r} is a Git LFS pointer, a note of where the file is, and not the file itself"
    return Fault(subject, fact, "run 'git lfs pull' in that folder, or download the file")


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as tensors:
        names = tensors.keys()
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}


def _unlike_weights(file: Path, subject: str, error: BaseException) -> Fault:
    if is_lfs_pointer(file):
        return _pointer(file, subject)
    size = file.stat().st_size
    fact = f"{str(file)!r} is {'empty' if not size else f'cut off or damaged ({size} bytes: {one_line(error)})'}"
    return Fault(subject, fact, "download or copy the file again")


def _shards(source: str, index: Path, subject: str) -> tuple[list[Path], list[Fault]]:
    if is_lfs_pointer(index):
        return [], [_pointer(index, subject)]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError) as error:
        fact = f"{str(index)!r} is no index of weights ({type(error).__name__}: {one_line(error)})"
        return [], [Fault(subject, fact, "download or copy the file again")]
    found = {name: find_file(source, name, download=False) for name in names}
    absent = [name for name, file in found.items() if file is None]
    fact = f"{source!r} lacks {some(absent)}, which {index.name} names"
    faults = [Fault(subject, fact, "download or copy what is missing")] if absent else []
    return [file for file in found.values() if file is not None], faults


def _no_weights(cfg: GeneratorConfig, role: Role) -> Fault:
    fact = f"cannot load a {WHAT[role]} from {cfg.path!r}: "
    ggufs = sorted(path.name for path in Path(cfg.path).glob("*.gguf"))
    pickled = [name for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if (Path(cfg.path) / name).is_file()]
    if pickled:
        auto = AUTO[role].__name__
        remedy = "if you trust it, convert it: " + python_command(
            f"from transformers import {auto} as M",
            f"M.from_pretrained({cfg.path!r}, use_safetensors=False).save_pretrained({cfg.path!r})",
        )
        return Fault(
            SUBJECT[role], f"{fact}its weights are pickled ({pickled[0]}); tlcr reads safetensors only", remedy
        )
    if ggufs and role == "policy":
        return Fault(SUBJECT[role], f"{fact}it has no safetensors, but {some(ggufs)}", f"model.gguf_file: {ggufs[0]}")
    return Fault(
        SUBJECT[role],
        f"{fact}it has no weights ({SAFE_WEIGHTS_NAME}, or {SAFE_WEIGHTS_INDEX_NAME} and its parts)",
        "download or copy them, or name the folder that has them",
    )


def _gguf_faults(cfg: GeneratorConfig, subject: str) -> list[Fault]:
    assert cfg.gguf_file is not None
    file = find_file(cfg.path, cfg.gguf_file, download=False)
    if file is None:
        if not Path(cfg.path).is_dir():
            return []
        there = some(sorted(path.name for path in Path(cfg.path).glob("*.gguf"))) or "none"
        fact = f"{cfg.path!r} has no file {cfg.gguf_file!r} (model.gguf_file); its GGUF files: {there}"
        return [Fault(subject, fact, "correct model.gguf_file")]
    with file.open("rb") as opened:
        begins = opened.read(4)
    return [] if begins == b"GGUF" else [_unlike_weights(file, subject, ValueError("it does not begin with GGUF"))]
