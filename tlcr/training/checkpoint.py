"""Checkpoints that are complete or absent: written to a temporary folder, synced to disk, renamed. No pickle.

<folder>/step-000100/
    checkpoint.json            step, the caller's state, versions, number of processes, each file's size and checksum
    config.yaml                the resolved config
    model-<name>.safetensors   weights; tied ones once
    optimizer-<name>.{json,safetensors}   scheduler-<name>.json   tensors.safetensors
    rng-00000.{json,safetensors}          random states of python, numpy and torch, one pair for each process

Sharded models (layout "sharded") have no file of their own, and optimizer-<name> has groups and steps alone:

    shards/shard-00001-model-00001-of-00001.safetensors   weights and moments of the first process, and so on
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import Tensor, nn

from tlcr.distribution import installed_version
from tlcr.errors import CheckpointError
from tlcr.files import clean_up, remove, sync_to_disk, take_place, unwritable
from tlcr.training import checksums, shards
from tlcr.training.distributed import (
    is_main_process,
    merged_over_processes,
    on_all_processes,
    on_main_process,
    process_count,
    process_index,
)
from tlcr.training.trees import Tree, copies, random_state, read_tree, restore_random_state

logger = logging.getLogger(__name__)

FORMAT_OF = {"whole": 1, "sharded": 2}
"""The number of a layout. Whole checkpoints keep theirs: their files did not change, and older versions read them."""
MANIFEST, SHARDS = "checkpoint.json", "shards"
FIELDS = {"format": int, "step": int, "processes": int, "versions": dict, "files": dict, "state": dict}
"""What every manifest has."""
CHECKSUM = "checksum"
"""Of the manifest's other entries."""
STEP_FOLDER = re.compile(r"step-(\d{6,})")
DIGEST = re.compile(r"[0-9a-f]{64}")
READING = (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, ArithmeticError)
"""What code that expects other contents raises where it meets any."""


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


@dataclass(frozen=True)
class Contents:
    """What a checkpoint will hold of this process, as tensors and text; ``write_checkpoint`` writes it.

    weights: of whole models, by the name of their file. shards: of sharded ones and of their optimisers, or None.
    own: trees of every process. trees: those that the main process writes.
    """

    step: int
    state: Mapping[str, Any]
    config: str
    weights: Mapping[str, dict[str, Tensor]]
    shards: Mapping[str, Tensor] | None
    own: Mapping[str, Tree]
    trees: Mapping[str, Tree]

    def in_host_memory(self) -> Contents:
        """Copies of all that training changes, so that it can go on while they are written."""
        return replace(
            self,
            state=deepcopy(self.state),
            weights={file: copies(tensors) for file, tensors in self.weights.items()} if is_main_process() else {},
            shards=None if self.shards is None else copies(self.shards),
            own={stem: tree.in_host_memory() for stem, tree in self.own.items()},
            trees={stem: tree.in_host_memory() for stem, tree in self.trees.items()} if is_main_process() else {},
        )


def contents(
    step: int,
    *,
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, shards.Optimizer],
    schedulers: Mapping[str, Stateful],
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    config: Any,
) -> Contents:
    """What ``save_checkpoint``, which has the same arguments, writes; nothing is copied. Every process calls it."""
    cut = shards.are_cut(models)
    trees = {f"scheduler-{name}": Tree.of(scheduler.state_dict()) for name, scheduler in schedulers.items()}
    for name, optimizer in optimizers.items():
        trees[f"optimizer-{name}"] = Tree.of(shards.tree_of(models, optimizer) if cut else optimizer.state_dict())
    return Contents(
        step,
        state,
        yaml.safe_dump(as_plain(config), sort_keys=False),
        {} if cut else {f"model-{name}.safetensors": shards.weights_of(model) for name, model in models.items()},
        shards.tensors_of(models, optimizers.values()) if cut else None,
        {f"rng-{process_index():05d}": Tree.of(random_state())},
        trees | {"tensors": Tree.of(dict(tensors))},
    )


def save_checkpoint(
    folder: str | Path,
    step: int,
    *,
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, shards.Optimizer],
    schedulers: Mapping[str, Stateful],
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    config: Any,
    keep: int,
) -> Path:
    """Writes ``folder/step-<step>/`` and then deletes all but the newest ``keep`` checkpoints. Every process calls it.

    The random states of python, numpy and torch are saved for every process, and of sharded models and their
    optimisers each process's shards; the main process writes everything else.

    Args:
        folder: where checkpoints are.
        step: the number of steps done.
        models: unwrapped modules by name.
        optimizers: optimisers by name; those of sharded models are torch's, or have their ``param_groups``.
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
    what = on_all_processes(
        lambda: contents(
            step,
            models=models,
            optimizers=optimizers,
            schedulers=schedulers,
            state=state,
            tensors=tensors,
            config=config,
        )
    )
    return write_checkpoint(folder, what, keep=keep)


def write_checkpoint(
    folder: str | Path, what: Contents, *, keep: int, group: torch.distributed.ProcessGroup | None = None
) -> Path:
    """Writes what ``contents`` returned; see ``save_checkpoint``.

    Args:
        folder: where checkpoints are.
        what: this process's contents.
        keep: checkpoints to keep.
        group: the processes' group for messages; None: that of the training.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: as for ``save_checkpoint``.
    """
    folder = Path(folder)
    path = folder / f"step-{what.step:06d}"
    aside = folder / f".partial-{path.name}"

    def prepare() -> None:
        for leftover in (*folder.glob(".partial-step-*"), *folder.glob(".old-step-*")):
            remove(leftover)
        aside.mkdir(parents=True)

    def write_own() -> None:
        for stem, tree in what.own.items():
            tree.write(aside / stem)
        if is_main_process():
            for file, tensors in what.weights.items():
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(aside / file))
            for stem, tree in what.trees.items():
                tree.write(aside / stem)
            (aside / "config.yaml").write_text(what.config, encoding="utf-8")

    def checksums_of_a_share() -> dict[str, str]:
        return {file: checksums.of_file(aside / file) for file in _files(aside)[process_index() :: process_count()]}

    def complete() -> None:
        manifest = {
            "format": FORMAT_OF[layout],
            "layout": layout,
            "step": what.step,
            "processes": process_count(),
            "saved_at": time.time(),
            "versions": versions(),
            "files": {file: (aside / file).stat().st_size for file in _files(aside)},
            "checksums": sums,
            "state": what.state,
        }
        text = json.dumps(manifest | {CHECKSUM: checksums.of_record(manifest)}, indent=1)
        (aside / MANIFEST).write_text(text, encoding="utf-8")
        sync_to_disk(aside)
        take_place(aside, path)
        # those of later steps are damaged ones, which this run passed over and will write again
        earlier = [old for old in _checkpoints(folder) if _step_of(old) < what.step]
        for old in earlier[: max(len(earlier) + 1 - keep, 0)]:
            doomed = folder / f".old-{old.name}"
            try:
                os.replace(old, doomed)  # one atomic step: a half-deleted checkpoint never looks complete
            except OSError as error:
                logger.warning("the old checkpoint %s cannot be deleted (%s)", old, error.strerror)
            clean_up(doomed)

    layout = "whole" if what.shards is None else "sharded"
    try:
        on_main_process(_writing(path)(prepare), group)
        on_all_processes(_writing(path)(write_own), group)
        if what.shards is not None:
            with _writing(path):
                shards.write(aside / SHARDS, what.shards, group)
        sums = merged_over_processes(on_all_processes(_writing(path)(checksums_of_a_share), group), group)
        on_main_process(_writing(path)(complete), group)
    except BaseException:
        if is_main_process():
            with suppress(OSError):
                remove(aside)
        raise
    return path


def _files(folder: Path) -> list[str]:
    """The files of a checkpoint but for its manifest, by their paths in the folder."""
    found = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in found if file != MANIFEST)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns errors of the disk into the one that every process can raise."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error


def load_checkpoint(
    path: str | Path,
    *,
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, shards.Optimizer],
    schedulers: Mapping[str, Stateful],
    identity: Mapping[str, Any] | None = None,
) -> LoadedCheckpoint:
    """Fills models, optimisers and schedulers from a checkpoint and restores this process's random states.

    Whole models read sharded checkpoints, and the other way round. Other versions of tlcr, torch, transformers or
    python are reported in the log, and another number of processes, which only shards allow.

    Args:
        path: the folder of the checkpoint.
        models: unwrapped modules by the names they were saved under.
        optimizers: optimisers by name; see ``save_checkpoint``.
        schedulers: learning-rate schedules by name.
        identity: what the entry "identity" of the saved state must equal, but for "processes"; None where nothing has
            to.

    Returns:
        Step, state, tensors and config of the checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged, does not fit the models or optimisers, was written by another
            number of processes where neither it nor the models are sharded, or belongs to a run of another identity.
            The last two are raised first.
    """
    path = Path(path)
    manifest = _manifest(path)
    problem = _incompleteness(path, manifest)
    if problem:
        raise CheckpointError(
            f"the checkpoint {path} is incomplete: {problem}; delete it to resume from an earlier one"
        )
    on_all_processes(lambda: _check_share(path, manifest.get("checksums", {})))
    sharded, cut = manifest.get("layout") == "sharded", shards.are_cut(models)
    if manifest["processes"] != process_count() and not (sharded or cut):
        raise CheckpointError(
            f"the checkpoint {path} was written by {manifest['processes']} processes and is read by {process_count()}: "
            "start as many processes, so that each continues its own random state"
        )
    if identity is not None:
        with reading(path / MANIFEST):
            _check_identity(path, manifest["state"]["identity"], identity)
    trees = {}
    for kind, targets in (("optimizer", optimizers), ("scheduler", schedulers)):
        for name in targets:
            with reading(path / f"{kind}-{name}"):
                trees[kind, name] = read_tree(path / f"{kind}-{name}")
    if sharded:
        with reading(path / SHARDS):
            shards.read(path / SHARDS, models, optimizers, {name: trees["optimizer", name] for name in optimizers})
    else:
        _read_whole(path, models, optimizers, {name: trees["optimizer", name] for name in optimizers})
    for name, scheduler in schedulers.items():
        with reading(path / f"scheduler-{name}"):
            scheduler.load_state_dict(trees["scheduler", name])
    with reading(path / "tensors"):
        tensors = read_tree(path / "tensors")
    with reading(path / "config.yaml"):
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    if process_index() < manifest["processes"]:
        rng = path / f"rng-{process_index():05d}"
        with reading(rng):
            restore_random_state(read_tree(rng))
    _report_processes(path, manifest["processes"])
    _report_versions(path, manifest["versions"])
    return LoadedCheckpoint(manifest["step"], manifest["state"], tensors, config, manifest["versions"])


def _check_share(path: Path, sums: Mapping[str, str]) -> None:
    """Reads this process's share of the files and compares their checksums; earlier versions wrote none."""
    for name in sorted(sums)[process_index() :: process_count()]:
        with reading(path / name):
            if checksums.of_file(path / name) != sums[name]:
                raise ValueError("its checksum is another than when it was written")


def _read_whole(
    path: Path, models: Mapping[str, nn.Module], optimizers: Mapping[str, shards.Optimizer], states: Mapping[str, Any]
) -> None:
    for name, model in models.items():
        file = path / f"model-{name}.safetensors"
        with reading(file):
            if shards.are_cut({name: model}):
                shards.read_whole_weights(model, file)
            else:
                load_model(model, str(file), strict=True)
    for name, optimizer in optimizers.items():
        with reading(path / f"optimizer-{name}"):
            state = states[name]
            optimizer.load_state_dict(shards.cut_states(optimizer, state) if shards.are_cut(models) else state)


NEWER = ("origin", "data", "updates", "evaluation")
"""What the identity of a training names that it did not in earlier versions."""


def _check_identity(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises CheckpointError, with each difference, unless both are equal. A missing name counts as None. The number
    of processes is not compared: the manifest has it, and whether it matters depends on more. Nor are those of
    ``NEWER`` where one of them has none: earlier versions did not record them."""
    before, after = _dotted(then), _dotted(now)
    left_out = {"processes", *(name for name in NEWER if name not in then or name not in now)}
    names = [name for name in {**before, **after} if name.partition(".")[0] not in left_out]
    changed = [name for name in names if before.get(name) != after.get(name)]
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
    return sorted((path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _manifest(path: Path) -> dict[str, Any]:
    with reading(path / MANIFEST):
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, kind in FIELDS.items():
            if not isinstance(manifest, dict) or not isinstance(manifest.get(name), kind):
                raise ValueError(f"it has no {name}, or one that is no {kind.__name__}")
        if manifest["format"] not in FORMAT_OF.values():
            known = " and ".join(str(number) for number in FORMAT_OF.values())
            raise ValueError(f"it has the format {manifest['format']}, and this version of tlcr reads {known}")
        outside = [name for name in manifest["files"] if Path(name).is_absolute() or ".." in Path(name).parts]
        if outside:
            raise ValueError(f"it names {outside[0]!r}, which is not in its folder")
        written = manifest.pop(CHECKSUM, None)  # earlier versions wrote none
        if written not in (None, checksums.of_record(manifest)):
            raise ValueError("its checksum is another than when it was written")
        return manifest


def _incompleteness(path: Path, manifest: dict[str, Any]) -> str | None:
    for name, size in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    return None


def _report_processes(path: Path, then: int) -> None:
    now = process_count()
    if now == then:
        return
    fresh = f"; processes from {then} on begin with random states of their own" if now > then else ""
    logger.warning(
        "The checkpoint %s was written by %d processes and is read by %d: the run continues from the same weights and "
        "moments, but does not repeat what %d processes would have done%s",
        path,
        then,
        now,
        then,
        fresh,
    )


def _report_versions(path: Path, then: Mapping[str, str]) -> None:
    now = versions()
    changed = [f"{name} {then.get(name, 'none')} -> {now[name]}" for name in now if then.get(name) != now[name]]
    if changed:
        logger.warning(
            "The checkpoint %s was written with other versions (%s): the run continues, but not bit for bit",
            path,
            ", ".join(changed),
        )


RESUME_EARLIER = "delete its folder to resume from an earlier checkpoint"


@contextmanager
def reading(path: Path, remedy: str = RESUME_EARLIER) -> Iterator[None]:
    """Turns any error from a missing, damaged or unsuitable file into one CheckpointError that names the file.

    Args:
        path: what is read.
        remedy: what to do, the end of the message.

    Yields:
        Nothing.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename or path} is missing: is {path.parent} a checkpoint of tlcr?") from error
    except (*READING, SafetensorError, yaml.YAMLError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} cannot be read into this run ({type(error).__name__}: {reason}): it is damaged, or belongs to "
            f"another model or config; {remedy}"
        ) from error
