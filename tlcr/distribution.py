"""What is installed under the name that pip knows: a package called ``tlcr`` on the public index is not ours."""

from __future__ import annotations

import shlex
from importlib.metadata import requires, version

from packaging.requirements import Requirement

DISTRIBUTION = "tlcr-rlhf"
"""The name that pip knows tlcr by; the import and the command are called ``tlcr``."""


def installed_version() -> str:
    """The version of tlcr.

    Returns:
        The version that pip knows.

    Raises:
        importlib.metadata.PackageNotFoundError: tlcr is imported from a folder that was never installed.
    """
    return version(DISTRIBUTION)


def requirements(extra: str = "") -> list[Requirement]:
    """The packages that tlcr needs, or those that an extra needs beside them, with the versions that fit.

    Args:
        extra: the name of an extra, such as ``openai``.

    Returns:
        The requirements, in the order of the metadata.

    Raises:
        importlib.metadata.PackageNotFoundError: tlcr is imported from a folder that was never installed.
    """
    needed = [Requirement(line) for line in requires(DISTRIBUTION) or []]
    if not extra:
        return [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [
        one
        for one in needed
        if one.marker is not None and one.marker.evaluate({"extra": extra}) and not one.marker.evaluate({"extra": ""})
    ]


def install_command(extra: str) -> str:
    """The command that installs what an extra needs, wherever tlcr itself came from."""
    packages = [shlex.quote(f"{one.name}{one.specifier}") for one in requirements(extra)]
    return f"pip install {' '.join(packages)}"
