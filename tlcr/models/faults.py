"""A fault of a model: what was found and what to do, in words that an error and ``tlcr doctor`` both print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from tlcr.errors import ConfigError

__all__ = [
    "AUTO",
    "LOADABLE",
    "SUBJECT",
    "WHAT",
    "Fault",
    "Role",
    "one_line",
    "python_command",
    "raise_first",
    "refuse_embedded",
    "some",
]

Role = Literal["policy", "reward_model", "discriminator"]
"""What a model is wanted for."""

AUTO: Mapping[Role, Any] = {
    "policy": AutoModelForCausalLM,
    "reward_model": AutoModelForSequenceClassification,
    "discriminator": AutoModelForTokenClassification,
}
"""The class of transformers that loads each role."""

SUBJECT: Mapping[Role, str] = {"policy": "model", "reward_model": "reward model", "discriminator": "discriminator"}
"""What a fault calls each role."""

WHAT: Mapping[Role, str] = {"policy": "language model", "reward_model": "classifier", "discriminator": "classifier"}
"""What is loaded for each role."""

LOADABLE = "give a folder that transformers can load (hub names need the network, or a filled cache)"

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


def refuse_embedded(path: str) -> None:
    """Raises a ConfigError where ``model.path`` is "embedded", and a folder or a hub name is wanted."""
    if path == "embedded":
        raise ConfigError(
            "model.path 'embedded' is no folder: a run makes that model itself and trains it in its SFT stage; set "
            "sft.enabled: true, or name the folder of a trained one, such as <output_dir>/sft of an earlier run"
        )


def raise_first(faults: Sequence[Fault]) -> None:
    """Raises the first fault as a ConfigError of one line; nothing where there is none."""
    if faults:
        raise ConfigError(str(faults[0]))


def some(names: Iterable[str]) -> str:
    """A few of many names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def one_line(error: BaseException) -> str:
    """The whole message of an error in one line."""
    return " ".join(str(error).split()).rstrip(".")


def python_command(*lines: str) -> str:
    """A command that runs these lines of Python."""
    return f'python -c "{"; ".join(lines)}"'
