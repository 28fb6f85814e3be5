"""Whether every weight of a model was in its files: what transformers' report of loading says, in words.

transformers initialises a weight that is missing at random, and drops one that it has no place for, with a warning. A
run would train from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from tlcr.config.schema import GeneratorConfig
from tlcr.models.faults import AUTO, SUBJECT, Fault, Role, python_command, some
from tlcr.models.heads import HEADS, name_of_head
from tlcr.models.weight_files import StoredHead

__all__ = ["report_faults", "unused"]

_Sentences = tuple[str, str]
"""Fact and remedy."""


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
    return [] if fault is None else [Fault(SUBJECT[role], *fault)]


def unused(report: Mapping[str, Any], head: StoredHead | None) -> list[str]:
    """The weights in the file that the model has no place for, where that is no fault, in order."""
    own = set() if head is None else {f"{head.name}.weight", f"{head.name}.bias"}
    return sorted(set(report["unexpected_keys"]) - own)


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
            + python_command(
                f"from transformers import {auto} as M, AutoTokenizer as T",
                f"M.from_pretrained({cfg.path!r}, key_mapping={mapping!r}).save_pretrained({renamed!r}, "
                "save_original_format=False)",
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
