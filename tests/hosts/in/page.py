"""The commands of docs/hosts/: their modules and flags are looked up where the trainer is installed."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parents[3] / "docs" / "hosts"
OTHERS = {"discriminator", "port", "no-deps", "runtime-env-json", "config-path", "config-name"}
"""Flags of tlcr serve, pip, Ray and hydra."""


def modules(host: str) -> set[str]:
    """What the page of a trainer has Python run by ``-m``, tlcr's own left out."""
    return set(re.findall(r"python3? -m (?!tlcr)([\w.]+)", _text(host)))


def flags(host: str) -> set[str]:
    """The trainer's flags that its page names, without the hyphens before them."""
    return set(re.findall(r"(?<![\w-])--([a-zA-Z][\w.-]*\w)", _text(host))) - OTHERS


def _text(host: str) -> str:
    return (FOLDER / f"{host}.md").read_text(encoding="utf-8")
