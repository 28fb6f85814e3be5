"""The record of a training that has ended, by which a later run knows that it need not train again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlcr.config.dropped import IDLE, without_dropped
from tlcr.config.schema import undecisive, with_home
from tlcr.config.stages import DONE, TRAINED
from tlcr.errors import CheckpointError
from tlcr.files import remove, write_json
from tlcr.training import checksums
from tlcr.training.checkpoint import as_plain, machine, reading, versions
from tlcr.training.distributed import is_main_process, on_main_process

RESULTS = {
    *("config.json", "tokenizer.json", "tokenizer_config.json", "value_head.json", "adapter_config.json"),
    *("calibration.json", "revisions.jsonl"),
}
"""What later stages start from, beside weights."""
PASSING = {"checkpoints", "diverged", "server_weights"}
"""Folders of a stage that nothing starts from once it has ended."""
AGAIN = "delete it to make that stage again"
_CHECKED: set[Path] = set()
"""Records whose files this process found to be whole."""


def mark_done(
    folder: str | Path,
    *,
    config: Any,
    metrics: Mapping[str, Any],
    seconds: float,
    record: str = DONE,
    ended: Mapping[str, Any] | None = None,
) -> None:
    """Ends a stage: writes ``record`` and deletes the checkpoints, which are not needed any more.

    Every process calls it, once the model is saved.

    Args:
        folder: the stage's folder.
        config: what the result depends on; ``is_done`` compares it.
        metrics: figures to keep.
        seconds: time that the stage took.
        record: name of the file.
        ended: what else to keep of how it ended, by name.
    """

    def write() -> None:
        files = _results(Path(folder))
        found = {
            "config": as_plain(config),
            "metrics": dict(metrics),
            "seconds": seconds,
            "versions": versions(),
            "machine": machine(),
            "checksums": {name: checksums.of_file(Path(folder) / name) for name in files},
            **(ended or {}),
        }
        write_json(Path(folder) / record, found)
        remove_checkpoints(folder)

    on_main_process(write)


def amend_done(folder: str | Path, *, config: Mapping[str, Any], metrics: Mapping[str, Any], record: str) -> None:
    """Takes up in the record of a stage that has ended what was measured of its result again.

    Every process calls it. Without a record, as the stage has not ended, nothing happens.

    Args:
        folder: the stage's folder.
        config: the sections that it was measured with, in place of those of the record.
        metrics: the new figures.
        record: name of the file.
    """
    path = Path(folder) / record

    def write() -> None:
        if not path.is_file():
            return
        with reading(path, AGAIN):
            ended = json.loads(path.read_text(encoding="utf-8"))
            ended["config"] |= as_plain(config)
        write_json(path, ended | {"metrics": metrics})

    on_main_process(write)


def origin_of(folder: str | Path) -> str:
    """A name for a model that changes with its weights, where a stage of tlcr wrote them.

    Args:
        folder: the model's folder, or its name on the hub.

    Returns:
        The SHA-256 of the checksums in the stage's record; where there is none, the folder or name itself.
    """
    path = Path(folder) / DONE
    if not path.is_file():
        return str(folder)
    with reading(path, AGAIN):
        sums = json.loads(path.read_text(encoding="utf-8")).get("checksums")
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest() if sums else str(folder)


def remove_checkpoints(folder: str | Path) -> None:
    """Deletes the checkpoints of a stage that has ended; also those that a kill right after its record left."""
    if (Path(folder) / "checkpoints").exists():  # a finished run may lie on a disk that nothing can be deleted from
        remove(Path(folder) / "checkpoints")


def _results(folder: Path) -> list[str]:
    """The files that later stages start from, by their paths in the folder of the stage that wrote them."""
    found = (path for path in folder.rglob("*") if path.is_file() and not PASSING & set(path.relative_to(folder).parts))
    return sorted(
        path.relative_to(folder).as_posix() for path in found if path.suffix == ".safetensors" or path.name in RESULTS
    )


def check_results(folder: str | Path, record: str = DONE) -> None:
    """Compares what a finished stage left with the checksums in its record; earlier versions wrote none.

    The main process reads the files, once as long as it lives; in the others this does nothing.

    Args:
        folder: the stage's folder.
        record: name of the file.

    Raises:
        CheckpointError: a file is missing, or a disk, a copy or a person changed it.
    """
    path = Path(folder).absolute() / record
    if not is_main_process() or path in _CHECKED:
        return
    with reading(path, AGAIN):
        sums = json.loads(path.read_text(encoding="utf-8")).get("checksums", {})
        for name, value in sums.items():
            if checksums.of_file(path.parent / name) != value:
                raise CheckpointError(
                    f"{path.parent / name} is not as its stage wrote it: it is damaged, or was changed; put it back, "
                    f"delete {path.parent} to make it again, or, if you changed it, delete the entry 'checksums' of "
                    f"{record}"
                )
    _CHECKED.add(path)


def is_done(folder: str | Path, config: Any, record: str = DONE) -> bool:
    """Whether the stage in ``folder`` has ended with this config, so that it need not run again."""
    return (Path(folder) / record).is_file() and done_config(folder, config, record) == decisive(config)


def decisive(config: Any) -> Any:
    """The plain values of a config, without the knobs on which no result depends."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        free = undecisive(config)
        return {f.name: decisive(getattr(config, f.name)) for f in dataclasses.fields(config) if f.name not in free}
    if isinstance(config, Mapping):
        return {str(key): decisive(value) for key, value in config.items()}
    return as_plain(config)


def done_config(folder: str | Path, config: Any, record: str = DONE) -> Any:
    """The config that the stage in ``folder`` ended with, as ``decisive`` gives that of today.

    Args:
        folder: the stage's folder.
        config: the current config.
        record: name of the file.

    Returns:
        The old config. Knobs that are newer than it are added with their defaults. Knobs that were removed since are
        left out where they had their defaults, and those that did nothing then and now are taken as they are now. So a
        new version of tlcr alone does not require new training.
    """
    path = Path(folder) / record
    with reading(path, AGAIN):
        before = json.loads(path.read_text(encoding="utf-8"))["config"]
        if record == TRAINED and "revisions" not in config:  # earlier versions named them for trials that use none
            before.pop("revisions", None)
        return _with_the_knobs_of_today(before, config)


def _with_the_knobs_of_today(before: Any, config: Any) -> Any:
    if not isinstance(before, dict):
        return before
    new, now = {}, dict(config) if isinstance(config, Mapping) else {}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        # Earlier versions wrote paths as they were given.
        before = with_home(config, without_dropped(type(config), before))
        for name, needed in IDLE.get(type(config), {}).items():
            if before.get(needed) is None and getattr(config, needed) is None:
                before[name] = as_plain(getattr(config, name))
        free = undecisive(config)
        before = {name: value for name, value in before.items() if name not in free}
        fields = [field for field in dataclasses.fields(config) if field.name not in free]
        new = {field.name: as_plain(_default(field)) for field in fields if field.name not in before}
        now = {field.name: getattr(config, field.name) for field in fields}
    return new | {name: _with_the_knobs_of_today(value, now.get(name)) for name, value in before.items()}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
