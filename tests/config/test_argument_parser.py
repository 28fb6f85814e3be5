"""What tlcr takes from jsonargparse beside its documented interface: the wording of messages, and one private name.

Run it alone against another version to see whether that one fits.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from tlcr.config import argument_parser
from tlcr.config.argument_parser import (
    ArgumentParser,
    Unparsable,
    flags_of,
    option_of,
    parse_arguments,
    parse_values,
)

TYPES: dict[str, Any] = {
    "count": int,
    "ppo.updates": int,
    "ppo.clip_high": float | None,
    "kl.placement": Literal["reward", "loss"],
    "judge.format": Literal["a", "b"] | None,
    "seeds": tuple[int, ...],
    "model.path": str,
    "whiten": bool,
}


def command() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, prog="tool", allow_abbrev=False)
    one = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    one.add_argument("folder")
    one.add_argument("other")
    one.add_argument("--batch-size", type=int, default=3)
    for name, hint in TYPES.items():
        one.add_argument(f"--{name}", type=hint)
    parser.add_subcommands(dest="command").add_subcommand("one", one)
    return parser


WRONG = [
    ("ppo.updates", "many", "many"),
    ("ppo.updates", "1.5", "1.5"),
    ("ppo.clip_high", "wide", "wide"),
    ("kl.placement", "los", "los"),
    ("judge.format", "c", "c"),
    ("whiten", "maybe", "maybe"),
    ("seeds", "3", "3"),
    ("seeds", "[1, q]", "q"),
]


@pytest.mark.parametrize(("name", "typed", "value"), WRONG)
def test_a_wrong_value_is_named_with_its_argument(name: str, typed: str, value: str) -> None:
    with pytest.raises(Unparsable) as of_a_flag:
        parse_arguments(command(), ["one", "x", "y", f"--{name}", typed], defaults=False)
    with pytest.raises(Unparsable) as of_a_file:
        parse_values(TYPES, {name: yaml.safe_load(typed)})
    for caught in (of_a_flag, of_a_file):
        assert (caught.value.name, caught.value.value, caught.value.missing) == (name, value, ())


def test_a_wrong_value_of_several_lines_is_cut_to_the_first() -> None:
    with pytest.raises(Unparsable) as caught:
        parse_values(TYPES, {"ppo.clip_high": "first\nsecond"})
    assert caught.value.name == "ppo.clip_high"
    assert caught.value.value is not None and "\n" not in caught.value.value and "first" in caught.value.value


def test_a_dash_in_a_flag_is_an_underscore_in_its_name() -> None:
    with pytest.raises(Unparsable) as caught:
        parse_arguments(command(), ["one", "x", "y", "--batch-size", "q"], defaults=True)
    assert (caught.value.name, caught.value.value) == ("batch_size", "q")


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [(["one"], ("folder", "other")), (["one", "x"], ("other",))],
)
def test_missing_arguments_are_named_without_their_command(arguments: list[str], missing: tuple[str, ...]) -> None:
    with pytest.raises(Unparsable) as caught:
        parse_arguments(command(), arguments, defaults=False)
    assert (caught.value.name, caught.value.value, caught.value.missing) == (None, None, missing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["two"], "invalid choice: 'two'"),
        (["one", "x", "y", "z"], "unrecognized arguments: z"),
        (["one", "x", "y", "--ppo.updates"], "expected one argument"),
    ],
)
def test_other_errors_keep_their_words_and_are_about_no_value(arguments: list[str], message: str) -> None:
    with pytest.raises(Unparsable) as caught:
        parse_arguments(command(), arguments, defaults=False)
    assert message in str(caught.value)
    assert (caught.value.name, caught.value.value, caught.value.missing) == (None, None, ())


def test_without_defaults_only_what_was_typed_is_there() -> None:
    typed = parse_arguments(command(), ["one", "x", "y", "--ppo.updates", "3", "--model.path=null"], defaults=False)
    assert typed["command"] == "one"
    one = typed["one"]
    assert (one["ppo.updates"], one["model.path"]) == (3, "null")
    assert [name for name in (*TYPES, "batch_size") if name in one] == ["ppo.updates", "model.path"]
    assert parse_arguments(command(), ["one", "x", "y"], defaults=True)["one"]["batch_size"] == 3


def test_values_are_typed_whether_written_or_not() -> None:
    values = {"ppo.updates": "7", "ppo.clip_high": None, "seeds": [1, 2], "whiten": "no", "model.path": "a b"}
    typed = {"ppo.updates": 7, "ppo.clip_high": None, "seeds": (1, 2), "whiten": False, "model.path": "a b"}
    assert parse_values(TYPES, values) == typed
    assert parse_values(TYPES, typed) == typed
    assert parse_values(TYPES, {"ppo.clip_high": 1}) == {"ppo.clip_high": 1.0}
    assert parse_values(TYPES, {}) == {}


def test_the_flags_of_a_parser_are_known() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("place")
    parser.add_argument_group("a").add_argument("--a.b", type=int)
    assert flags_of(parser) == ["-h", "--help", "--a.b"]


def test_the_option_of_a_name_has_its_flag_and_type() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--gpu_memory", type=float)
    parser.add_argument("--dtype-of-it", type=Literal["a", "b"])
    assert option_of(parser, "gpu_memory") == ("--gpu_memory", float)
    assert option_of(parser, "dtype_of_it") == ("--dtype-of-it", Literal["a", "b"])


def test_nothing_else_in_tlcr_knows_jsonargparse() -> None:
    package = Path(argument_parser.__file__).parents[1]
    known = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(
            r"^\s*(import|from) jsonargparse|_subcommands_action|_option_string_actions|_typehint|Parser key",
            path.read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    }
    assert known == {"config/argument_parser.py"}
