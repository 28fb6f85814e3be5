"""Knobs of older versions that were removed, and their replacements.

The ``config.yaml`` and ``done.json`` of a run by an older version still name its knobs. A removed knob at its old
default changes nothing and is ignored; any other value is an error that says what to do instead.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from tlcr.config.judging import JudgeConfig
from tlcr.config.schema import EndpointConfig, GeneratorConfig, KLConfig, LabelConfig, TrainingConfig

__all__ = ["DROPPED", "IDLE", "Dropped", "dropped_knobs", "dropped_paths", "without_dropped"]


@dataclass(frozen=True)
class Dropped:
    """A removed knob: its old default, and its replacement."""

    default: Any
    instead: str


DROPPED: Mapping[type, Mapping[str, Dropped]] = {
    GeneratorConfig: {
        "gradient_checkpointing": Dropped(
            False, "this model only generates, and never runs the backward pass that it is about"
        )
    },
    EndpointConfig: {
        "json_schema": Dropped(
            "auto",
            "a schema is sent with answer_format json, and left out for servers that refuse it; set answer_format to "
            "marker (reviser) or line (judge) to do without",
        )
    },
    LabelConfig: {"warn_edited_share": Dropped(0.6, "the warning comes above 60% of the tokens, always")},
    TrainingConfig: {
        "enabled": Dropped(
            True,
            "this model is trained where an arm needs it and path names no trained one; name one in path, or another "
            "reward.kind",
        )
    },
    JudgeConfig: {
        "confidence": Dropped(0.95, "all intervals of tlcr are at 95%"),
        "seed": Dropped(0, "the bootstrap's seed is 0; more resamples make its interval depend less on it"),
        "cache": Dropped(None, "the judge's answers are in answers.sqlite of output_dir, for all that is judged there"),
    },
}
"""By the class that had them. A subclass that still has a knob of the name keeps it: ModelConfig, SFTConfig."""

IDLE: Mapping[type, Mapping[str, str]] = {KLConfig: {"horizon": "target"}}
"""Knobs that do nothing while the one that they name is null, and whose default was another once: then what a run noted
of them says nothing about it."""


@cache
def dropped_knobs(cls: type) -> Mapping[str, Dropped]:
    """The knobs that a config dataclass had, by name."""
    has = {f.name for f in dataclasses.fields(cls)}
    had = {name: gone for base in cls.__mro__ for name, gone in DROPPED.get(base, {}).items()}
    return {name: gone for name, gone in had.items() if name not in has}


@cache
def dropped_paths(cls: type) -> Mapping[str, Dropped]:
    """The same for the config and all its sections, by dotted path."""
    hints = typing.get_type_hints(cls)
    found = dict(dropped_knobs(cls))
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            inner = dropped_paths(typing.cast(type, hints[f.name]))
            found |= {f"{f.name}.{name}": gone for name, gone in inner.items()}
    return found


def without_dropped(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one section, as a run of an older version noted them, less the dropped knobs at their defaults."""
    gone = dropped_knobs(cls)
    return {name: value for name, value in values.items() if name not in gone or gone[name].default != value}
