"""Whether the installed trainer is one that an adaptor was tested with. Standard library only, but for ``packaging``.

An adaptor overrides methods that their authors call private. Each names them here, so that a release which renames one
is refused in a sentence, before training.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from functools import reduce
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tlcr.errors import HostError, HostWarning

__all__ = ["require"]


def require(host: str, distribution: str, tested: str, names: Mapping[str, str | None]) -> None:
    """Refuses a trainer that an adaptor does not fit.

    Args:
        host: the trainer, as people call it.
        distribution: its name for pip.
        tested: the versions that the adaptor was run with, as pip writes a range: ``>=1.11,<=1.16.0``.
        names: what the adaptor relies on, ``module:attribute`` with dots in either, and the parameters of it that the
            adaptor gives or takes, ``self, inputs``; None: it only has to exist.

    Raises:
        HostError: the trainer is not installed, is older than what was tested, or lacks one of the names.

    Warns:
        HostWarning: it is newer than what was tested, and has all names.
    """
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    remedy = f"pip install '{distribution}{tested}'"
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        raise HostError(f"{host} is not installed; {remedy}") from None
    bounds = SpecifierSet(tested)
    newest = max((Version(bound.version) for bound in bounds if bound.operator.startswith("<")), default=None)
    is_newer = newest is not None and Version(installed) >= newest and not bounds.contains(installed, prereleases=True)
    if not is_newer and not bounds.contains(installed, prereleases=True):
        raise HostError(f"tlcr works with {host} {tested} and {installed} is installed; {remedy}")
    for name, parameters in names.items():
        problem = _problem(name, parameters)
        if problem is not None:
            raise HostError(
                f"tlcr was tested with {host} {tested}, and in {host} {installed} {problem}; {remedy}, or look for a "
                "newer tlcr"
            )
    if is_newer:
        warnings.warn(
            f"tlcr was tested with {host} {tested}, and {installed} is newer; every name that tlcr relies on is there. "
            f"If rewards look wrong: {remedy}",
            HostWarning,
            stacklevel=2,
        )


def _problem(name: str, parameters: str | None) -> str | None:
    """What is wrong with one name, as the end of a sentence; None where nothing is."""
    module, _, attribute = name.partition(":")
    try:
        found: Any = reduce(getattr, attribute.split(".") if attribute else [], import_module(module))
    except (ImportError, AttributeError) as error:
        return f"{name.replace(':', '.')} is not there ({' '.join(str(error).split())})"
    if parameters is None:
        return None
    wanted = [one.strip() for one in parameters.split(",") if one.strip()]
    actual = inspect.signature(found).parameters
    catches_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in actual.values())
    missing = [] if catches_all else [one for one in wanted if one not in actual]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    unknown = [
        one.name
        for one in actual.values()
        if one.name not in wanted and one.default is inspect.Parameter.empty and one.kind not in variadic
    ]
    in_order = [one for one in actual if one in wanted] == [one for one in wanted if one in actual]
    if missing or unknown or not in_order:
        return f"{name.replace(':', '.')} takes ({', '.join(actual)}) and not ({', '.join(wanted)})"
    return None
