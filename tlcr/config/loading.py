"""From YAML and flags to one ``RunConfig`` and back.

YAML and flags name the same knobs by the same dotted path (``ppo.updates``), use the same typed parser and
the same checks. Nothing is ignored: an unknown key, a repeated key or a value of the wrong type is an error that
names its place. The only exception is a knob of an older version (tlcr/config/dropped.py) at its default.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from tlcr.config.argument_parser import Unparsable, parse_values
from tlcr.config.dropped import dropped_paths
from tlcr.config.schema import LARGEST, Arm, Checked, RewardConfig, RunConfig, in_short
from tlcr.errors import ConfigError

__all__ = [
    "Knob",
    "describe_type",
    "dump_config",
    "is_dumped",
    "knobs",
    "load_command_config",
    "load_config",
    "nearest",
    "value_problem",
]

ConfigT = TypeVar("ConfigT", bound=Checked)

MOST_VALUES = 100_000
"""A config of more values is one whose aliases repeat each other; the largest of ours have some two hundred."""
METHOD = {"output_dir", "model", "data", "labels", "discriminator", "reward", "rollout", "ppo"}
"""What every version wrote of a run's config, among other sections."""
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 200, 200


@dataclass(frozen=True)
class Knob:
    """One leaf of the config: its dotted path, its type, its default and its field's metadata."""

    path: str
    type: Any
    default: Any
    metadata: Mapping[str, Any]

    @property
    def section(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def advanced(self) -> bool:
        return bool(self.metadata.get("advanced"))


@cache
def knobs(cls: type) -> tuple[Knob, ...]:
    """Every knob of a config dataclass, depth first, with the defaults it has there."""
    return tuple(_walk(cls, {}, ""))


def _walk(cls: type, defaults: Mapping[str, Any], prefix: str) -> Iterator[Knob]:
    hints = typing.get_type_hints(cls)
    for f in sorted(dataclasses.fields(cls), key=lambda f: bool(f.kw_only)):  # a section's own knobs first
        hint = hints[f.name]
        default = defaults.get(f.name, _field_default(f))
        if dataclasses.is_dataclass(hint):
            # The default of a section may differ from that of its class: sft and reward_model share TrainingConfig.
            values = {g.name: getattr(default, g.name) for g in dataclasses.fields(hint)}
            yield from _walk(typing.cast(type, hint), values, f"{prefix}{f.name}.")
        else:
            yield Knob(f"{prefix}{f.name}", hint, default, f.metadata)


def _field_default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def describe_type(hint: Any) -> str:
    """A type in words, for an error message: ``int | None`` is "a whole number or null"."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe_type(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return "a list, each item " + describe_type(get_args(hint)[0])
    if dataclasses.is_dataclass(hint):
        return "a mapping with " + ", ".join(f.name for f in dataclasses.fields(hint))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names[hint]


def nearest(name: str, names: Sequence[str], prefix: str = "") -> str:
    """The known names nearest to an unknown dotted name ("; did you mean ...?"), or all names of its section."""
    section, _, last = name.rpartition(".")
    elsewhere = [known for known in names if known.rpartition(".")[2] == last]
    close = elsewhere or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(prefix + known for known in close)}?"
    above = f"{section}." if section else ""
    here = dict.fromkeys(known[len(above) :].partition(".")[0] for known in names if known.startswith(above))
    return f"; known here: {', '.join(here)}"


def load_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a YAML file, apply the overrides, and make the typed config.

    Args:
        path: None for the defaults alone.
        overrides: values by dotted path, typed or as written on a command line; they win over the file. Each entry of
            ``arms`` names only what differs: its ``reward`` overrides parts of the top-level ``reward``.

    Returns:
        The config.

    Raises:
        ConfigError: a file that cannot be read, an unknown or repeated key, a wrong type or a violated bound.
    """
    values = _read_values(RunConfig, path, overrides)
    arms = values.pop("arms", None)
    cfg = _build(RunConfig(), values, "")
    if arms is None:
        return cfg
    return dataclasses.replace(cfg, arms=_load_arms(arms, cfg.reward, str(path)))


def load_command_config(
    default: ConfigT, path: str | Path | None, overrides: Mapping[str, Any] | None = None
) -> ConfigT:
    """The same for a command's separate config: ``default`` changed by the file and the overrides."""
    return _build(default, _read_values(type(default), path, overrides), "")


def _read_values(cls: type, path: str | Path | None, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if path is not None:
        values = _flatten(*_read_yaml(Path(path)), cls, str(path))
    names = [knob.path for knob in knobs(cls)]
    for name, value in (overrides or {}).items():
        if name in names:
            values[name] = value
        elif not _is_dropped(cls, name, value):
            raise ConfigError(f"unknown key {name}{nearest(name, names)}")
    return values


def _is_dropped(cls: type, name: str, value: Any, place: str = "") -> bool:
    """Whether this knob was removed and has its old default; ConfigError at any other value."""
    gone = dropped_paths(cls).get(name)
    if gone is not None and value != gone.default:
        written = value if isinstance(value, str) else json.dumps(value)
        raise ConfigError(f"{place}{name} is {written}, and tlcr has no such knob any more: {gone.instead}")
    return gone is not None


def dump_config(cfg: Checked) -> str:
    """The config as YAML; reading it gives an equal config."""
    return _dump(_plain(dataclasses.asdict(cfg)))  # type: ignore[call-overload]


def _dump(values: Any) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def is_dumped(path: Path) -> bool:
    """Whether a file is what ``dump_config`` gave of a run's config, by this version or an earlier one.

    Args:
        path: the file; it may be anything.

    Returns:
        True where it has the sections of the method, in the form of a dump, and no comment.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(values, Mapping) and values.keys() >= METHOD and _dump(values) == text


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _load_arms(arms: Any, reward: RewardConfig, where: str) -> tuple[Arm, ...]:
    if isinstance(arms, str):
        arms, _ = _parse_yaml(arms, "arms")
    if not isinstance(arms, (list, tuple)) or not all(isinstance(arm, (Mapping, Arm)) for arm in arms):
        raise ConfigError(f"arms is {_shown(arms)}; it must be {describe_type(tuple[Arm, ...])}")
    loaded = []
    for index, arm in enumerate(arms):
        if isinstance(arm, Arm):
            loaded.append(arm)
            continue
        if not arm.get("name"):
            raise ConfigError(f"arms[{index}] has no name; its runs are written to a folder of that name")
        values = _flatten(arm, None, Arm, where, prefix=f"arms[{index}].")
        loaded.append(_build(Arm(name=str(arm["name"]), reward=reward), values, f"arms[{index}]."))
    return tuple(loaded)


def _read_yaml(path: Path) -> tuple[dict[str, Any], yaml.Node | None]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config {path} cannot be read: {error.strerror}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    values, node = _parse_yaml(text, f"config {path}")
    if values is None:
        return {}, None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} holds {type(values).__name__}, not a mapping such as 'ppo: {{updates: 100}}'")
    return values, node


def _parse_yaml(text: str, where: str) -> tuple[Any, yaml.Node | None]:
    """The values of a YAML text and its nodes, once no key stands twice in it and all of it can be shown.

    Aliases can make a text of some hundred bytes stand for billions of values, or for a value that holds itself.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _size(node, where, "", {}) > MOST_VALUES:
            raise ConfigError(f"{where} stands for more than {MOST_VALUES:,} values; write out what its aliases repeat")
        return yaml.safe_load(text), node
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply to be read; no knob needs more than four levels") from error
    except ValueError as error:  # a number of thousands of digits, a date that is none
        raise ConfigError(f"{where} holds a value that cannot be read: {error}") from error


def _size(node: yaml.Node, where: str, path: str, sizes: dict[int, int | None]) -> int:
    """How many values the node at ``path`` stands for, each alias counted as what it repeats; no key stands twice."""
    if id(node) not in sizes:
        sizes[id(node)] = None  # until it is known
        parts: list[tuple[str, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated_keys(node, where, path)
            parts = [(f"{path}{key}.", part) for key, (_, part) in _children(node)]
        elif isinstance(node, yaml.SequenceNode):
            parts = [(f"{path.rstrip('.')}[{index}].", part) for index, part in enumerate(node.value)]
        sizes[id(node)] = 1 + sum(_size(part, where, name, sizes) for name, part in parts)
    size = sizes[id(node)]
    if size is None:
        line = node.start_mark.line + 1
        raise ConfigError(f"{where}:{line}: {path.rstrip('.')} holds itself, by an alias; write it out")
    return size


def _shown(value: Any) -> str:
    """A value of any size, as an error message shows it."""
    return _SHORT.repr(value)


def _flatten(
    values: Mapping[str, Any], node: yaml.Node | None, cls: type, where: str, prefix: str = ""
) -> dict[str, Any]:
    """Values by dotted path, once every key is known to be one of cls and to stand there once."""
    leaves = [knob.path for knob in knobs(cls)]
    sections = {name.rpartition(".")[0] for name in leaves} - {""}
    flat: dict[str, Any] = {}

    def visit(values: Mapping[str, Any], node: yaml.Node | None, section: str) -> None:
        children = dict(_children(node))
        for key, value in values.items():
            name = f"{section}{key}"
            at = f"{where}:{children[key][0]}: " if key in children else ""
            if name in flat:
                raise ConfigError(f"{at}{prefix}{name} stands twice, with dots and in its section; keep one")
            if name in leaves:
                flat[name] = value
            elif name in sections:
                if value is None:
                    continue
                if not isinstance(value, Mapping):
                    raise ConfigError(f"{at}{prefix}{name} is {_shown(value)}; it must be a mapping of knobs")
                visit(value, children[key][1] if key in children else None, f"{name}.")
            elif not _is_dropped(cls, name, value, f"{at}{prefix}"):
                raise ConfigError(f"{at}unknown key {prefix}{name}{nearest(name, leaves, prefix)}")

    visit(values, node, "")
    return flat


def _children(node: yaml.Node | None) -> Iterator[tuple[Any, tuple[int, yaml.Node]]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            # A key that is itself a list or a mapping is no knob's name, and so known by its place alone.
            name = key.value if isinstance(key, yaml.ScalarNode) else id(key)
            yield name, (key.start_mark.line + 1, value)


def _refuse_repeated_keys(node: yaml.Node, where: str, section: str) -> None:
    seen: dict[Any, int] = {}
    for key, (line, _) in _children(node):
        if key in seen:
            raise ConfigError(f"{where}:{line}: {section}{key} stands twice, first on line {seen[key]}; keep one")
        seen[key] = line


def value_problem(error: Unparsable, cls: type = RunConfig) -> str | None:
    """What is wrong with a knob's value, in one line; None where the error is not about a knob."""
    hints = {knob.path: knob.type for knob in knobs(cls)}
    if error.name not in hints:
        return None
    got = ":" if error.value is None else f" is {error.value};"
    return f"{error.name}{got} it must be {describe_type(hints[error.name])}"


def _build(default: ConfigT, values: Mapping[str, Any], prefix: str) -> ConfigT:
    """The default with typed values in place; errors name the path that the user wrote."""
    cls: type = type(default)
    hints = {knob.path: knob.type for knob in knobs(cls)}
    for name, value in values.items():
        # jsonargparse reads None as "not given"; here it is a value.
        if value is None and type(None) not in get_args(hints[name]):
            raise ConfigError(f"{prefix}{name} is null; it must be {describe_type(hints[name])}")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ConfigError(f"{prefix}{name} is {in_short(value)}; it must be a number that fits 64 bits")
    try:
        typed = parse_values(hints, values)
    except Unparsable as error:
        raise ConfigError(f"{prefix}{value_problem(error, cls) or error}") from error
    return _replace(default, typed, prefix)


def _replace(default: ConfigT, values: Mapping[str, Any], prefix: str) -> ConfigT:
    changed: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        name, _, rest = path.partition(".")
        if rest:
            sections.setdefault(name, {})[rest] = value
        else:
            changed[name] = value
    for name, inner in sections.items():
        changed[name] = _replace(getattr(default, name), inner, f"{prefix}{name}.")
    try:
        return dataclasses.replace(default, **changed)  # type: ignore[type-var]
    except ConfigError as error:
        # A dataclass knows only its own name, but the user wrote the path.
        raise ConfigError(str(error).replace(f"{type(default).__name__}.", prefix, 1)) from error
