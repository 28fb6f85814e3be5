"""What studies share: a YAML file that says all of one, and a command that works on it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging as transformers_logging

from tlcr.errors import ConfigError, DataError, TlcrError
from tlcr.report.page import number
from tlcr.report.results import SeedRun, coefficient_of, read_runs


def values_of(path: Path, study: type) -> dict[str, Any]:
    """What the YAML file at ``path`` says of a study.

    Args:
        path: the file.
        study: a dataclass with a field for each key; one with a default may be left out.

    Returns:
        A value for each key that the file names.

    Raises:
        ConfigError: the file cannot be read, or a key is missing or unknown.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    names = {field.name: field.default is MISSING and field.default_factory is MISSING for field in fields(study)}
    keys = {str(key) for key in values} if isinstance(values, Mapping) else set()
    if not keys <= set(names) or any(needed and name not in keys for name, needed in names.items()):
        raise ConfigError(
            f"{path} has the keys {', '.join(sorted(keys)) or 'of no mapping'}; wanted {', '.join(names)}"
        )
    return dict(values)


def distinct(runs: Iterable[SeedRun]) -> Iterator[SeedRun]:
    """The same runs, which count for a seed each.

    Args:
        runs: of one folder or several.

    Yields:
        Each of them.

    Raises:
        DataError: two are of one arm, coefficient and seed.
    """
    seen: set[tuple[str, float | None, int]] = set()
    for run in runs:
        own = (run.arm, run.kl_coef, run.seed)
        if own in seen:
            raise DataError(f"two runs are of arm {run.arm!r}, coefficient {run.kl_coef}, seed {run.seed}; give one")
        seen.add(own)
        yield run


def runs_of(folders: Sequence[Path]) -> list[SeedRun]:
    """The runs of several folders, which are compared as those of one.

    Args:
        folders: of `tlcr run`.

    Returns:
        All of them, in the order of the folders.

    Raises:
        DataError: two are of one arm, coefficient and seed, or an arm was trained at one coefficient in each folder,
            and not at the same.
    """
    found = [(folder, run) for folder in folders for run in read_runs(folder)]
    places: dict[str, dict[Path, set[float | None]]] = {}
    for folder, run in found:
        places.setdefault(run.arm, {}).setdefault(folder, set()).add(run.kl_coef)
    # Where an arm has a single coefficient its runs do not name it, so those of two folders would look alike.
    shared = {arm for arm, own in places.items() if len(own) > 1 and any(None in coefs for coefs in own.values())}
    named = [replace(r, kl_coef=coefficient_of(folder, r)) if r.arm in shared else r for folder, r in found]
    single: set[str] = set()
    for arm in sorted(shared):
        coefs = sorted({run.kl_coef for run in named if run.arm == arm and run.kl_coef is not None})
        if len(coefs) > 1 and all(own == {None} for own in places[arm].values()):
            raise DataError(
                f"arm {arm!r} was trained at other KL coefficients ({', '.join(map(str, coefs))}) in one of "
                f"{', '.join(map(str, places[arm]))} than in another: it cannot be compared as one arm"
            )
        single |= {arm} if len(coefs) == 1 else set()
    return [replace(r, kl_coef=None) if r.arm in single else r for r in distinct(named)]


def with_interval(mean: float, interval: Sequence[float] | None) -> str:
    """How tables write a mean over seeds: ``0.400 (0.341 to 0.459)``.

    Args:
        mean: the mean.
        interval: its two ends; None where there is one seed.

    Returns:
        The text.
    """
    return number(mean) + ("" if interval is None else f" ({number(interval[0])} to {number(interval[1])})")


def markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows))


def golds_at_equal_kl(comparison: Mapping[str, Any]) -> list[str]:
    """The first cells of one of ``tlcr.report.results.frontier``'s comparisons: the other arm, the KL, both golds."""
    golds = (comparison["arm_gold"], comparison["other_gold"])
    return [comparison["other"], number(comparison["kl"]), *(number(gold and gold["mean"]) for gold in golds)]


def command(work: Callable[[], None]) -> int:
    """Works with tlcr's messages on stderr, and without the progress bars of others.

    Args:
        work: the study.

    Returns:
        The exit code: 2 where tlcr refused, with its sentence.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("tlcr").setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()
    try:
        work()
    except TlcrError as error:
        sys.stderr.write(f"study: {error}\n")
        return 2
    return 0
