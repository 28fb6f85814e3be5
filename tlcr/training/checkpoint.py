"""Checkpoints that are complete or absent: written to a temporary folder, synced to disk, renamed. No pickle.

<folder>/step-000100/
    checkpoint.json            step, the caller's state, versions, number of processes, name and size of each file
    config.yaml                the resolved config
    model-<name>.safetensors   weights; tied ones once
    optimizer-<name>.{json,safetensors}   scheduler-<name>.json   tensors.safetensors
    rng-00000.{json,safetensors}          random states of python, numpy and torch, one pair for each process
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
import platform
import random
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file
from safetensors.torch import save_model as save_weights
from torch import Tensor, nn

from tlcr.config.dropped import without_dropped
from tlcr.config.stages import DONE
from tlcr.distribution import installed_version
from tlcr.errors import CheckpointError
from tlcr.training.distributed import (
    is_main_process,
    on_all_processes,
    on_main_process,
    process_count,
    process_device,
    process_index,
)

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "checkpoint.json"
STEP_FOLDER = re.compile(r"step-(\d{6,})")
DIGEST = re.compile(r"[0-9a-f]{64}")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stateful(Protocol):
    """An optimiser, a scheduler: anything with the two methods of torch's state protocol."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What ``load_checkpoint`` returns; it also fills models, optimisers and schedulers."""

    step: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------ files, atomically


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a path beside ``path`` at which to write a file or a folder; at the end it replaces ``path``.

    The data is synced to disk before the rename, so ``path`` is always the old version or the new one. If the block
    fails, what it wrote is deleted and the old version stays.

    Args:
        path: what to write or replace.

    Yields:
        The path to write at.

    Raises:
        CheckpointError: the disk is full or the place cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)
        yield aside
        sync_to_disk(aside)
        _take_place(aside, path)
    except (OSError, SafetensorError) as error:
        _remove(aside)
        raise unwritable(path, error) from error
    except BaseException:
        _remove(aside)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically. Floats keep every bit; NaN and infinity become null."""
    with atomic_write(path) as aside:
        aside.write_text(json.dumps(finite(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_json_lines(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes each record as a line of JSON, all of them or none; non-ASCII text is not escaped."""
    with atomic_write(path) as aside, aside.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def finite(value: Any) -> Any:
    """``value`` with None in place of every float that is not finite: not every JSON reader accepts NaN."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync_to_disk(path: Path) -> None:
    """Syncs a file, or a folder with everything in it, to disk."""
    if path.is_dir():
        for child in path.iterdir():
            sync_to_disk(child)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_place(aside: Path, path: Path) -> None:
    if path.is_dir():  # a folder cannot be renamed over another
        old = path.with_name(f".old-{path.name}")
        _remove(old)
        os.replace(path, old)
        os.replace(aside, path)
        _remove(old)
    else:
        os.replace(aside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Syncs a folder's list of names to disk, without its files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def unwritable(path: Path, error: Exception) -> CheckpointError:
    """The error to raise where writing ``path`` failed: the cause and the remedy."""
    number = getattr(error, "errno", None)
    reason = os.strerror(number) if number is not None else " ".join(str(error).split())
    full = number in DISK_FULL or any(os.strerror(n) in str(error) for n in DISK_FULL)
    remedy = (
        "free some space or name another output_dir, then resume"
        if full
        else "name an output_dir that can be written, then resume"
    )
    return CheckpointError(f"cannot write {path}: {reason}; what was there before is untouched: {remedy}")


# ------------------------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(
    folder: str | Path,
    step: int,
    *,
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, Stateful],
    schedulers: Mapping[str, Stateful],
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    config: Any,
    keep: int,
) -> Path:
    """Writes ``folder/step-<step>/`` and then deletes all but the newest ``keep`` checkpoints. Every process calls it.

    The random states of python, numpy and torch are saved for every process; the main process writes everything else.

    Args:
        folder: where checkpoints are.
        step: the number of steps done.
        models: unwrapped modules by name.
        optimizers: optimisers by name.
        schedulers: learning-rate schedules by name.
        state: any value that JSON can hold; floats keep every bit.
        tensors: values that JSON cannot hold, such as the state of a ``torch.Generator``.
        config: a dataclass or a mapping, for readers and for comparison.
        keep: checkpoints to keep.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: on every process, where the disk is full or the place cannot be written. The earlier
            checkpoints are then untouched and nothing of this one is left.
    """
    folder = Path(folder)
    path = folder / f"step-{step:06d}"
    aside = folder / f".partial-{path.name}"

    def prepare() -> None:
        for leftover in (*folder.glob(".partial-step-*"), *folder.glob(".old-step-*")):
            _remove(leftover)
        aside.mkdir(parents=True)

    def write_shared() -> None:
        for name, model in models.items():
            save_weights(model, str(aside / f"model-{name}.safetensors"))
        for name, optimizer in optimizers.items():
            _write_tree(aside / f"optimizer-{name}", optimizer.state_dict())
        for name, scheduler in schedulers.items():
            _write_tree(aside / f"scheduler-{name}", scheduler.state_dict())
        _write_tree(aside / "tensors", dict(tensors))
        (aside / "config.yaml").write_text(yaml.safe_dump(as_plain(config), sort_keys=False), encoding="utf-8")

    def write_own() -> None:
        _write_tree(aside / f"rng-{process_index():05d}", _random_state())
        if is_main_process():
            write_shared()

    def complete() -> None:
        manifest = {
            "format": FORMAT,
            "step": step,
            "processes": process_count(),
            "saved_at": time.time(),
            "versions": versions(),
            "files": {file.name: file.stat().st_size for file in sorted(aside.iterdir())},
            "state": state,
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        sync_to_disk(aside)
        _take_place(aside, path)
        for old in _checkpoints(folder)[:-keep]:
            doomed = folder / f".old-{old.name}"
            os.replace(old, doomed)  # one atomic step: a half-deleted checkpoint never looks complete
            _remove(doomed)

    try:
        on_main_process(prepare)
        on_all_processes(write_own)
        on_main_process(complete)
    except BaseException as error:
        if is_main_process():
            _remove(aside)
        if isinstance(error, (OSError, SafetensorError)):
            raise unwritable(path, error) from error
        raise
    return path


def load_checkpoint(
    path: str | Path,
    *,
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, Stateful],
    schedulers: Mapping[str, Stateful],
    identity: Mapping[str, Any] | None = None,
) -> LoadedCheckpoint:
    """Fills models, optimisers and schedulers from a checkpoint and restores this process's random states.

    Other versions of tlcr, torch, transformers or python are reported in the log.

    Args:
        path: the folder of the checkpoint.
        models: unwrapped modules by the names they were saved under.
        optimizers: optimisers by name.
        schedulers: learning-rate schedules by name.
        identity: what the entry "identity" of the saved state must equal; None where nothing has to.

    Returns:
        Step, state, tensors and config of the checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged, does not fit the models or optimisers, was written by another
            number of processes, or belongs to a run of another identity. The last two are raised first.
    """
    path = Path(path)
    manifest = _manifest(path)
    problem = _incompleteness(path, manifest)
    if problem:
        raise CheckpointError(
            f"the checkpoint {path} is incomplete: {problem}; delete it to resume from an earlier one"
        )
    if manifest["processes"] != process_count():
        raise CheckpointError(
            f"the checkpoint {path} was written by {manifest['processes']} processes and is read by {process_count()}: "
            "start as many processes, so that each continues its own random state"
        )
    if identity is not None:
        with _reading(path / MANIFEST):
            _check_identity(path, manifest["state"]["identity"], identity)
    for name, model in models.items():
        file = path / f"model-{name}.safetensors"
        with _reading(file):
            load_model(model, str(file), strict=True)
    for kind, targets in (("optimizer", optimizers), ("scheduler", schedulers)):
        for name, target in targets.items():
            stem = path / f"{kind}-{name}"
            with _reading(stem):
                target.load_state_dict(_read_tree(stem))
    with _reading(path / "tensors"):
        tensors = _read_tree(path / "tensors")
    with _reading(path / "config.yaml"):
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    rng = path / f"rng-{process_index():05d}"
    with _reading(rng):
        _restore_random_state(_read_tree(rng))
    _report_versions(path, manifest["versions"])
    return LoadedCheckpoint(manifest["step"], manifest["state"], tensors, config, manifest["versions"])


def _check_identity(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises CheckpointError, with each difference, unless both are equal. A missing name counts as None."""
    before, after = _dotted(then), _dotted(now)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        parts = dict.fromkeys(name.partition(".")[0] for name in changed)
        differences = "; ".join(
            f"{name.removeprefix('settings.')} was {_shown(before.get(name))} and is {_shown(after.get(name))}"
            for name in changed
        )
        raise CheckpointError(
            f"the checkpoint {path} belongs to a run with other {' and '.join(parts)} ({differences}): restore them, "
            f"name another output_dir, or delete {path.parent} to start again"
        )


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping's values by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _shown(value: Any) -> str:
    """A value for a message; a digest is shortened."""
    text = str(value)
    return f"{text[:8]}..." if DIGEST.fullmatch(text) else text


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, or None. Incomplete ones are skipped, with a warning."""
    for path in reversed(_checkpoints(Path(folder))):
        try:
            problem = _incompleteness(path, _manifest(path))
        except CheckpointError as error:
            problem = str(error)
        if not problem:
            return path
        logger.warning("Passing over the checkpoint %s: %s", path, problem)
    return None


def start_or_resume(folder: str | Path, *, resume: bool) -> Path | None:
    """The checkpoint to resume from, or None for a new start.

    Args:
        folder: where checkpoints are.
        resume: whether to continue from one.

    Returns:
        The newest complete checkpoint; None where there is none.

    Raises:
        CheckpointError: checkpoints are there but ``resume`` is False: a new start would delete hours of work.
    """
    latest = latest_checkpoint(folder)
    if latest is not None and not resume:
        raise CheckpointError(
            f"{folder} holds the checkpoint {latest.name} of an earlier run: pass --resume to continue it, name "
            "another output_dir, or delete that folder to start again"
        )
    return latest


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
        _remove(Path(folder) / "checkpoints")

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
    with _reading(path):
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


def as_plain(config: Any) -> Any:
    """A config as YAML and JSON can hold it: dataclasses become dicts, tuples lists, paths text."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: as_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): as_plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [as_plain(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def versions() -> dict[str, str]:
    """Versions of the software that a result depends on; that of torch says for which device it was built."""
    packages = {name: version(name) for name in ("transformers", "accelerate")}
    return {"tlcr": installed_version(), "torch": torch.__version__, **packages, "python": platform.python_version()}


def machine() -> dict[str, str | int | None]:
    """What decides the order of floating-point sums, and so the last bits of every result, beside the software.

    processor: its name. instructions: the widest instruction set that torch's kernels use on it. threads: of torch, in
    each process. processes: that share one training. gpu: the one that this process may use, or None.
    """
    return {
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": process_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest step first."""
    if not folder.is_dir():
        return []
    found = [(int(m.group(1)), path) for path in folder.iterdir() if (m := STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _manifest(path: Path) -> dict[str, Any]:
    with _reading(path / MANIFEST):
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"it has the format {manifest['format']}, and this version of tlcr reads {FORMAT}")
        return manifest


def _incompleteness(path: Path, manifest: dict[str, Any]) -> str | None:
    for name, size in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    return None


def _report_versions(path: Path, then: Mapping[str, str]) -> None:
    now = versions()
    changed = [f"{name} {then.get(name, 'none')} -> {now[name]}" for name in now if then.get(name) != now[name]]
    if changed:
        logger.warning(
            "The checkpoint %s was written with other versions (%s): the run continues, but not bit for bit",
            path,
            ", ".join(changed),
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns any error from a missing, damaged or unsuitable file into one CheckpointError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename or path} is missing: is {path.parent} a checkpoint of tlcr?") from error
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, TypeError, yaml.YAMLError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} cannot be read into this run ({type(error).__name__}: {reason}): it is damaged, or belongs to "
            "another model or config; delete its folder to resume from an earlier checkpoint"
        ) from error


# --------------------------------------------------------------------------- nested state: JSON, with tensors aside


def _write_tree(stem: Path, tree: Any) -> None:
    """``stem.json`` with the nesting and every number, ``stem.safetensors`` with the tensors in it."""
    tensors: dict[str, Tensor] = {}
    encoded = _encode(tree, tensors)
    stem.with_name(stem.name + ".json").write_text(json.dumps(encoded), encoding="utf-8")
    save_file(tensors, str(stem.with_name(stem.name + ".safetensors")))


def _read_tree(stem: Path) -> Any:
    encoded = json.loads(stem.with_name(stem.name + ".json").read_text(encoding="utf-8"))
    return _decode(encoded, load_file(str(stem.with_name(stem.name + ".safetensors"))))


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().contiguous().clone() if value._base is not None else value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, Mapping):
        return {"items": [[key, _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_encode(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"cannot store a {type(value).__name__} in a checkpoint; give numbers, text or tensors")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "array" in value:
        return np.asarray(value["array"], dtype=value["dtype"])
    if "tuple" in value:
        return tuple(_decode(item, tensors) for item in value["tuple"])
    return {key: _decode(item, tensors) for key, item in value["items"]}


# ---------------------------------------------------------------------------------------------------- random states


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if process_device().type == "cuda":  # a run on the CPU leaves a GPU alone, which others may need
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and process_device().type == "cuda":
        torch.cuda.set_rng_state(state["cuda"])
