"""Opens the folder of a run: what a start writes there, and which folder may be a run's.

``config.yaml`` is what the run was last asked for, ``started.json`` when it began, and from which weights and data.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from tlcr.config.loading import dump_config, load_config
from tlcr.config.schema import RunConfig, ShardingConfig
from tlcr.config.stages import CONFIG, DONE, STAGES, STARTED, TRAINED
from tlcr.data.places import SUFFIXES, inner_suffix
from tlcr.errors import CheckpointError, ConfigError, DataError
from tlcr.experiment.preflight import foreign_config, holds_a_run, sources_used, taken
from tlcr.experiment.run_folder import RunFolder
from tlcr.files import atomic_write, write_json
from tlcr.training import checksums
from tlcr.training.checkpoint import reading
from tlcr.training.distributed import barrier, is_main_process, on_main_process

logger = logging.getLogger(__name__)

READ_WHOLE = 1 << 28
"""Bytes of the largest file of records whose checksum is one of all of it."""


def open_run(cfg: RunConfig, *, resume: bool, whole: bool = True) -> RunFolder:
    """Writes ``config.yaml`` and ``started.json`` into ``output_dir`` and returns the run.

    resume: continue what the folder holds. whole: a run of all stages, which needs the folder for itself. Raises
    ConfigError where the folder holds a run and ``resume`` is False, or a ``config.yaml`` of somebody else.
    """
    path = Path(cfg.output_dir)
    if (foreign := foreign_config(path)) is not None:
        raise foreign
    if whole and not resume and holds_a_run(path):
        raise taken(path)
    barrier()
    on_main_process(lambda: _write_start(cfg, path, anew=whole and not resume))
    on_main_process(lambda: _write_config(cfg, path))
    return RunFolder(cfg, resume, path, path)


def reopen_run(folder: Path) -> RunFolder:
    """The run in a folder, to read its results, for which no model is cut. Raises ConfigError where there is none."""
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{str(folder)!r} holds no run (no config.yaml); name the output_dir of a run")
    cfg = replace(load_config(folder / CONFIG), output_dir=str(folder), sharding=ShardingConfig())
    return RunFolder(cfg, resume=True, path=folder, models=folder)


@contextmanager
def config_kept_if_refused(cfg: RunConfig) -> Iterator[None]:
    """Puts ``config.yaml`` back where the command within, which opens the run of ``cfg``, fails before it has changed
    what the folder holds.

    The file is written before the stages, because a machine may stop in the middle of one; whether a stage may go on
    is known only once its models and data are read. Another command's file is left alone.
    """
    folder = Path(cfg.output_dir)
    config, before = _config_text(folder), _progress(folder)
    try:
        yield
    except BaseException:
        written_here = _config_text(folder) == dump_config(cfg) != config
        # the main process does not wait for the others, which may have failed elsewhere
        if config is not None and written_here and is_main_process() and _progress(folder) == before:
            with suppress(CheckpointError), atomic_write(folder / CONFIG) as aside:  # the error within is the cause
                aside.write_text(config, encoding="utf-8")
        raise


def _config_text(folder: Path) -> str | None:
    path = folder / CONFIG
    return path.read_text(encoding="utf-8") if path.exists() else None


def _progress(folder: Path) -> dict[str, int]:
    """When each file was written that changes with a stage, a step of training, an evaluation or a bought answer.

    Without the numbers of ``shares``, which every command counts before its stages.
    """
    found = {}
    for where, _, names in os.walk(folder):
        for name in {DONE, TRAINED, "metrics.jsonl", "evaluation.json", "answers.sqlite"}.intersection(names):
            path = Path(where) / name
            if path.parent != folder / "shares":
                with suppress(OSError):  # another command may have deleted it since
                    found[str(path)] = path.stat().st_mtime_ns
    return found


def _write_config(cfg: RunConfig, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = dump_config(cfg)
    # An equal config is not written again: stages of one run may be started in its folder at the same time.
    if _config_text(folder) == text:
        return
    with atomic_write(folder / CONFIG) as aside:
        aside.write_text(text, encoding="utf-8")


def _write_start(cfg: RunConfig, folder: Path, *, anew: bool) -> None:
    weights, data, record = _weights(cfg), _data(cfg), folder / STARTED
    if record.exists() and not anew:
        with reading(record, "delete it, and the run's chat template shows the time of the next start"):
            began = json.loads(record.read_text(encoding="utf-8"))
            # earlier versions recorded no weights, or no data
            old_weights, old_data = dict(began.get("weights", weights)), dict(began.get("data", {}))
        _compare_weights(cfg, folder, old_weights, weights)
        _compare_data(folder, old_data, data)
        if old_data | data != old_data:
            write_json(record, {**began, "data": old_data | data})
        return
    if holds_a_run(folder):
        logger.warning(
            "%s was begun by an earlier version, which held out other prompts: what its models learnt from may be held "
            "out now; go on with that version, or begin a new run",
            folder,
        )
    folder.mkdir(parents=True, exist_ok=True)
    started = datetime.now().isoformat(timespec="seconds")
    write_json(record, {"started": started, "weights": weights, "data": data})


def _weights(cfg: RunConfig) -> dict[str, str]:
    """A checksum of some of each file of weights under ``model.path``, where that is a folder."""
    files = (path for kind in ("*.safetensors", "*.gguf") for path in Path(cfg.model.path).glob(kind))
    return {path.name: checksums.of_samples(path) for path in sorted(files)}


def _data(cfg: RunConfig) -> dict[str, str]:
    """A checksum of each source of records that the config names and that is a file or a folder of this machine, by its
    path. Of large files it is one of samples, as for weights."""
    own = Path(cfg.output_dir).resolve()
    found = {}
    for source in dict.fromkeys(sources_used(cfg, STAGES).values()):
        path = Path(source or "")
        if source is None or not path.exists():  # a name of the hub, or none
            continue
        files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if _holds_records(each, path))
        try:
            parts = {str(each): _checksum(each) for each in files if own not in each.resolve().parents}
        except OSError as error:
            raise DataError(f"{source} cannot be read: {error}; check its permissions, or name another") from error
        found[source] = checksums.of_record(parts)
    return found


def _holds_records(path: Path, folder: Path) -> bool:
    """Whether what stands in a folder of data may be data; what is hidden there is what tools keep."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return inner_suffix(path) in SUFFIXES and not hidden and path.is_file()


def _checksum(path: Path) -> str:
    return checksums.of_file(path) if path.stat().st_size <= READ_WHOLE else checksums.of_samples(path)


def _compare_data(folder: Path, before: Mapping[str, str], data: Mapping[str, str]) -> None:
    """Warns where a source of records has changed in place since the last start, and something learnt from it."""
    changed = [source for source in sorted(set(before) & set(data)) if before[source] != data[source]]
    if not changed or not any(Path(path).name in (DONE, TRAINED) for path in _progress(folder)):
        return
    for source in changed:
        logger.warning(
            "%s is not what it was when the run in %s began with it: stages that are done keep what they learnt from "
            "it, and the others read what it holds now; put it back, or begin a run in another output_dir",
            source,
            folder,
        )


def _compare_weights(cfg: RunConfig, folder: Path, before: Mapping[str, str], weights: Mapping[str, str]) -> None:
    """Warns where a run goes on from other weights than it began with, which no setting shows."""
    changed = sorted(name for name in {*before, *weights} if before.get(name) != weights.get(name))
    if not changed:
        return
    logger.warning(
        "%s is not what it was when the run in %s began (%s): stages that are done keep what they learnt from the old "
        "weights, and the others would start from the new ones; put the old ones back, or begin a run in another "
        "output_dir",
        cfg.model.path,
        folder,
        ", ".join(changed),
    )
