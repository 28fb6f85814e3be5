"""What every section is made of: knobs, and checks of their bounds."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from tlcr.errors import ConfigError


def knob(
    default: Any,
    help: str,
    *,
    source: str = "ours",
    unit: str | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    advanced: bool = False,
    decides: bool = True,
    path: bool = False,
) -> Any:
    """A dataclass field that carries its meaning, its unit, its bounds and the source of its default.

    tests/config/knobs.txt lists every knob, and says how to add one.

    Args:
        default: the default; a list or tuple is copied for each config.
        help: what the knob means, in one line.
        source: where the default comes from.
        unit: of the value.
        ge: the value is at least this.
        gt: the value is greater than this.
        le: the value is at most this.
        advanced: few runs set it; only ``--help-all`` lists it. Its path and flag work like those of any other knob.
        decides: whether the result depends on it, but for rounding; else what has ended counts with any value of it.
        path: whether it names a file or folder, or may; a "~" at its beginning is then the user's home.

    Returns:
        The field.
    """
    metadata = {"help": help, "source": source, "unit": unit, "ge": ge, "gt": gt, "le": le}
    metadata |= {"advanced": advanced, "decides": decides, "path": path}
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: tuple(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def with_home(section: object, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of knobs of a section, with the user's home for a "~" at the beginning of each that is a path.

    Args:
        section: the section, or its class.
        values: by the name of the knob; those of other names stay.

    Returns:
        All of them.
    """
    paths = {f.name for f in dataclasses.fields(section) if f.metadata.get("path")}  # type: ignore[arg-type]
    return {name: _with_home(value) if name in paths else value for name, value in values.items()}


def _with_home(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_with_home, value))
    return os.path.expanduser(value) if isinstance(value, str) else value


def undecisive(section: object) -> tuple[str, ...]:
    """The knobs of a section on which no result depends."""
    return tuple(f.name for f in dataclasses.fields(section) if not f.metadata.get("decides", True))  # type: ignore[arg-type]


LARGEST = 2**63 - 1
"""Of whole numbers: no knob counts further, and floats and tensors do not hold them."""


def in_short(number: int) -> str:
    """A whole number for a message: its digits, or how many it has."""
    # Not str(): python refuses to write thousands of digits.
    return str(number) if abs(number) < 10**40 else f"a number of some {int(number.bit_length() * 0.30103) + 1} digits"


class Checked:
    """Checks the bounds of every knob when a config is made, so that a bad value raises before any model loads.

    Paths get the user's home for a "~" there, so that no other place need know of it.
    """

    def __post_init__(self) -> None:
        for name, value in with_home(self, vars(self)).items():
            object.__setattr__(self, name, value)
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, str) and "\0" in value:
                raise ConfigError(f"{type(self).__name__}.{f.name} holds the character NUL; take it out")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int) and abs(number) > LARGEST:
                    raise ConfigError(
                        f"{type(self).__name__}.{f.name} is {in_short(number)}; it must be a number that fits 64 bits"
                    )
                if isinstance(number, float) and not math.isfinite(number):
                    verb = "is" if number is value else "holds"
                    raise ConfigError(f"{type(self).__name__}.{f.name} {verb} {number!r}; it must be a finite number")
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            for name, holds, word in (
                ("ge", lambda v, b: v >= b, "at least"),
                ("gt", lambda v, b: v > b, "greater than"),
                ("le", lambda v, b: v <= b, "at most"),
            ):
                bound = f.metadata.get(name)
                if bound is not None and not holds(value, bound):
                    raise ConfigError(f"{type(self).__name__}.{f.name} is {value!r}; it must be {word} {bound}")
