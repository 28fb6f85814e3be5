"""The one file that knows jsonargparse: the parsers that tlcr builds of it, and what its messages say.

Its messages are read here and nowhere else, and so is the one private name that tlcr needs. tests/config/
test_argument_parser.py pins both against the installed version: where a new one words something differently, that test
says what to change here.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace, get_loader

__all__ = ["ArgumentParser", "Namespace", "Unparsable", "flags_of", "parse_arguments", "parse_values", "read_yaml"]

MISSING = re.compile(r"^the following arguments are required: (.*)$", re.DOTALL)
VALUE = re.compile(r'^Parser key "([^"]+)":(.*)$', re.DOTALL)
GOT = re.compile(r"(?:Got value|Given value): ?(.*)")


class Unparsable(Exception):
    """What could not be parsed, in jsonargparse's words, and what these words are about.

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


def parse_arguments(parser: ArgumentParser, arguments: Sequence[str], *, defaults: bool) -> Namespace:
    """What was typed; with the defaults of what was not, where they are asked for. Raises Unparsable."""
    try:
        return parser.parse_args(arguments, defaults=defaults)
    except argparse.ArgumentError as error:
        raise Unparsable(str(error.message)) from error


def parse_values(types: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted name as their types want them: text as on a command line, or typed. Raises Unparsable.

    None stands for itself: jsonargparse takes it for "not given", whatever the type.
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
    return {name: typed[name] for name in values}


def read_yaml(text: str) -> Any:
    """Plain values of YAML, numbers such as 1e-5 included, which YAML 1.1 takes for text. Raises yaml.YAMLError."""
    return get_loader("yaml")(text)
