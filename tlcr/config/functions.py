"""The functions that knobs name, such as ``reward.callable`` and ``evaluation.scorer``. Imports no large package."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tlcr.errors import ConfigError

__all__ = [
    "ENVIRONMENT_KEYWORDS",
    "REWARD_KEYWORDS",
    "failure",
    "import_environment",
    "import_function",
    "import_reward",
    "import_scorer",
]

REWARD_KEYWORDS = ("prompts", "responses", "response_ids", "mask", "ended")
"""What a reward is called with."""
ENVIRONMENT_KEYWORDS = ("prompts", "turns")
"""What an environment is called with."""


def import_reward(path: str) -> Callable[..., Any]:
    """The function that ``reward.callable`` names. Raises ConfigError as ``import_function``, or where it does not take
    the keywords of a reward."""
    function = import_function(path, "reward.callable")
    _require_arguments(function, f"reward.callable is {path!r}", keywords=REWARD_KEYWORDS)
    return function


def import_environment(path: str) -> Callable[..., Any]:
    """The function that ``rollout.environment`` names. Raises ConfigError as ``import_function``, or where it does not
    take the keywords of an environment."""
    function = import_function(path, "rollout.environment")
    _require_arguments(function, f"rollout.environment is {path!r}", keywords=ENVIRONMENT_KEYWORDS)
    return function


def import_scorer(path: str) -> Callable[..., Any]:
    """The function that ``evaluation.scorer`` names. Raises ConfigError as ``import_function``, or where it does not
    take prompts and responses."""
    function = import_function(path, "evaluation.scorer")
    _require_arguments(function, f"evaluation.scorer is {path!r}", positional=("prompts", "responses"))
    return function


def import_function(path: str, knob: str) -> Callable[..., Any]:
    """The function that a knob names; importing it runs its module's code.

    Args:
        path: "package.module:function" or "folder/file.py:function".
        knob: the knob that holds the path, for the error's text.

    Returns:
        The function.

    Raises:
        ConfigError: the path is malformed, the module or the function is not there, or the module raises an error.
    """
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise ConfigError(f"{knob} is {path!r}; write it as 'package.module:function' or 'folder/file.py:function'")
    if place.endswith(".py") and not Path(place).is_file():
        raise ConfigError(f"{knob} is {path!r}, but there is no file {place!r} here ({Path.cwd()}); correct the path")
    try:
        module = _module_of(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{knob} is {path!r}, but there is no module {error.name!r}; install it, or put its folder on PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:  # a script that ends itself would end the command, without a word
        raise ConfigError(f"{knob} is {path!r}, and importing it raises {failure(error)}; mend that module") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(
            f"{knob} is {path!r}, but {module.__file__ or place} has no function {name!r}; correct the name"
        )
    return function


def failure(error: BaseException) -> str:
    """What a function or module of the user raised, and where: "KeyError: 'x' (my_reward.py:12)"."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    at = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (last.filename, last.lineno)
    return f"{type(error).__name__}: {error} ({at[0]}:{at[1]})"


def _module_of(path: Path) -> ModuleType:
    return _load_file(path.resolve(), path.stat().st_mtime_ns)


@lru_cache
def _load_file(path: Path, changed: int) -> ModuleType:
    """Loads the module in a file under a name that no package has.

    Cached: the file is named where a run is checked and where it is used, and must not run twice. changed: when it was
    last written.
    """
    spec = importlib.util.spec_from_file_location(f"tlcr_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # holds for every path that ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _require_arguments(
    function: Callable[..., Any], what: str, *, positional: Sequence[str] = (), keywords: Sequence[str] = ()
) -> None:
    """Raises ConfigError where the function cannot be called with these arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a few functions written in C tell nothing; the call will
    try:
        bound = signature.bind(*positional, **dict.fromkeys(keywords))
        # Python 3.13.0 binds a keyword of the name of a positional-only parameter to **kwargs, and misses no argument.
        for name, parameter in signature.parameters.items():
            needed = parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty
            if needed and name not in bound.arguments:
                raise TypeError(f"missing a required argument: {name!r}")
    except TypeError as error:
        wanted = f"the keywords {', '.join(keywords)}" if keywords else f"({', '.join(positional)})"
        rest = ", or **unused for those that it ignores" if keywords else ", in this order"
        raise ConfigError(
            f"{what}, which takes {signature}, but it is called with {wanted} ({error}); give it these parameters{rest}"
        ) from error
