"""The only file that uses jsonargparse: it builds parsers and interprets their messages.

Only this file reads its messages and uses private names of it. tests/config/test_argument_parser.py tests both with
the installed version: if a new version words a message differently, that test says what to change here.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

__all__ = ["ArgumentParser", "Namespace", "Unparsable", "flags_of", "option_of", "parse_arguments", "parse_values"]

MISSING = re.compile(r"^the following arguments are required: (.*)$", re.DOTALL)
VALUE = re.compile(r'^Parser key "([^"]+)":(.*)$', re.DOTALL)
GOT = re.compile(r"(?:Got value|Given value): ?(.*)")


TOO_LARGE = "a number is larger than any float; numbers must fit 64 bits"


class Unparsable(Exception):
    """An error of jsonargparse: its message, and the argument that it is about.

    name: the argument whose value is wrong, with its dots, or None. value: that value as text, None where the message
    does not show it. missing: the arguments that are required and not there, without the name of their command.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        wrong, missing = VALUE.match(message), MISSING.match(message)
        got = GOT.search(wrong[2]) if wrong else None
        self.name: str | None = wrong[1] if wrong else None
        self.value: str | None = got[1] if got else None
        self.missing: tuple[str, ...] = (
            tuple(name.rpartition(".")[2] for name in missing[1].split(", ")) if missing else ()
        )


def flags_of(parser: ArgumentParser) -> list[str]:
    """Every flag that a parser knows."""
    return list(parser._option_string_actions)


def option_of(parser: ArgumentParser, name: str) -> tuple[str, Any]:
    """The flag of the option that an ``Unparsable`` names, as a user types it, and the type of its value."""
    action: Any = next(action for action in parser._actions if action.dest == name)
    return action.option_strings[0], action._typehint


def parse_arguments(parser: ArgumentParser, arguments: Sequence[str], *, defaults: bool) -> Namespace:
    """The typed arguments; with ``defaults``, also the defaults of the others. Raises Unparsable."""
    try:
        return parser.parse_args(arguments, defaults=defaults)
    except argparse.ArgumentError as error:
        raise Unparsable(str(error.message)) from error
    except OverflowError as error:
        raise Unparsable(TOO_LARGE) from error


def parse_values(types: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts values (text as on a command line, or typed) to their types, by dotted name. Raises Unparsable.

    None is not converted: jsonargparse reads it as "not given" for every type.
    """
    parser = ArgumentParser(exit_on_error=False)
    for name in values:
        parser.add_argument(f"--{name}", type=types[name])
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        here = nested
        for section in sections:
            here = here.setdefault(section, {})
        here[last] = value
    try:
        typed = parser.parse_object(nested, defaults=False)
    except argparse.ArgumentError as error:
        raise Unparsable(str(error.message)) from error
    except OverflowError as error:
        raise Unparsable(TOO_LARGE) from error
    return {name: typed[name] for name in values}
