"""The record of a training that has ended, by which a later run knows that it need not train again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlcr.config.dropped import without_dropped
from tlcr.config.stages import DONE
from tlcr.training.checkpoint import as_plain, machine, reading, remove, versions, write_json
from tlcr.training.distributed import on_main_process


def mark_done(
    folder: str | Path, *, config: Any, metrics: Mapping[str, Any], seconds: float, record: str = DONE
) -> None:
    """Ends a stage: writes ``record`` and deletes the checkpoints, which are not needed any more.

    Every process calls it, once the model is saved.

    Args:
        folder: the stage's folder.
        config: what the result depends on; ``is_done`` compares it.
        metrics: figures to keep.
        seconds: time that the stage took.
        record: name of the file.
    """

    def write() -> None:
        ended = {
            "config": as_plain(config),
            "metrics": dict(metrics),
            "seconds": seconds,
            "versions": versions(),
            "machine": machine(),
        }
        write_json(Path(folder) / record, ended)
        remove(Path(folder) / "checkpoints")

    on_main_process(write)


def is_done(folder: str | Path, config: Any, record: str = DONE) -> bool:
    """Whether the stage in ``folder`` has ended with this very config, so that it need not run again."""
    return (Path(folder) / record).is_file() and done_config(folder, config, record) == as_plain(config)


def done_config(folder: str | Path, config: Any, record: str = DONE) -> Any:
    """The config that the stage in ``folder`` ended with, in plain values, to compare with ``config``.

    Args:
        folder: the stage's folder.
        config: the current config.
        record: name of the file.

    Returns:
        The old config. Knobs that are newer than it are added with their defaults. Knobs that were removed since are
        left out where they had their defaults. So a new version of tlcr alone does not require new training.
    """
    path = Path(folder) / record
    with reading(path):
        return _with_the_knobs_of_today(json.loads(path.read_text(encoding="utf-8"))["config"], config)


def _with_the_knobs_of_today(before: Any, config: Any) -> Any:
    if not isinstance(before, dict):
        return before
    new, now = {}, dict(config) if isinstance(config, Mapping) else {}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        before = without_dropped(type(config), before)
        fields = dataclasses.fields(config)
        new = {field.name: as_plain(_default(field)) for field in fields if field.name not in before}
        now = {field.name: getattr(config, field.name) for field in fields}
    return new | {name: _with_the_knobs_of_today(value, now.get(name)) for name, value in before.items()}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
