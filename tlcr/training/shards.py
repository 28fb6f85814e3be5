"""Sharded weights and optimiser states on disk, by torch.distributed.checkpoint (DCP): safetensors, no pickle.

Every process writes its own shards, and any number of processes reads them. A tensor is named by what it is and by the
parameter: ``weights.<parameter>``, ``exp_avg.<parameter>``, ``remainder.<parameter>``; a parameter by its model and by
its name there. What an optimiser has beside, groups and numbers of steps, is a tree in which parameters have the same
names. Files of DCP know where in its tensor a shard lies; so that no other safetensors file is taken for one of them,
they have a folder of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from tlcr.errors import CheckpointError

WEIGHTS = "weights"
BYTES_OF_A_FILE = 1 << 32
"""Of a process. DCP builds each file in memory before it writes it, so this bounds what saving needs beside the
tensors."""

Models = Mapping[str, nn.Module]


class Optimizer(Protocol):
    """What an optimiser needs to have for its states to be written as shards; torch's have it."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def are_cut(models: Models) -> bool:
    """Whether a weight of these models is a shard."""
    return any(isinstance(tensor, DTensor) for model in models.values() for tensor in model.state_dict().values())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers of a model by name, as a checkpoint holds them: those that are tied once.

    Args:
        model: whole or sharded; what is gathered of it goes back into shards.

    Returns:
        Tensors that share the model's memory; of tied ones the first name.
    """
    state = model.state_dict()
    first = _first_names(model)
    return {name: tensor.detach() for name, tensor in state.items() if first.get(name, name) == name}


def _first_names(model: nn.Module) -> dict[str, str]:
    """Of every name of a parameter or buffer, the first name of the same tensor."""
    first: dict[object, str] = {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(_place(tensor), name) for name, tensor in named}


def _place(tensor: Tensor) -> object:
    """What two tensors have in common if and only if they are the same values in the same memory."""
    if isinstance(tensor, DTensor) or not tensor.numel():
        return id(tensor)
    storage = tensor.untyped_storage().data_ptr()
    return tensor.device, storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


# ---- to disk and back


def tensors_of(models: Models, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """The flat mapping of all weights and of all states that have a parameter's shape.

    Args:
        models: by name.
        optimizers: of their parameters.

    Returns:
        Tensors by name, on every process the same names; they share the memory of models and optimisers.
    """
    flat = {
        f"{WEIGHTS}.{model}.{name}": tensor for model in models for name, tensor in weights_of(models[model]).items()
    }
    for optimizer in optimizers:
        for name, parameter, state in _named_states(models, optimizer):
            flat |= {f"{kind}.{name}": value for kind, value in state.items() if _is_like(value, parameter)}
    return flat


def tree_of(models: Models, optimizer: Optimizer) -> dict[str, Any]:
    """What an optimiser has beside the tensors of ``tensors_of``: its groups and the number of steps, by parameter."""
    states = {
        name: {kind: value for kind, value in state.items() if not _is_like(value, parameter)}
        for name, parameter, state in _named_states(models, optimizer)
    }
    names = _names(models, optimizer)
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in _groups(optimizer)]
    return {"state": states, "param_groups": groups}


def write(folder: Path, tensors: Mapping[str, Tensor], group: ProcessGroup | None) -> None:
    """Writes every process's part of ``tensors`` into ``folder``, synced to disk. Every process calls it.

    Args:
        folder: the processes share it.
        tensors: by name, the same names on every process; whole ones are written once.
        group: the processes' group for messages; None: that of the training.

    Raises:
        Exception: the error of the first process that failed, on every process.
    """
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_file_numbers(tensors), save_distributed=True)
    with _own_errors():
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)


def read(folder: Path, models: Models, optimizers: Mapping[str, Optimizer], trees: Mapping[str, Any]) -> None:
    """Fills models and optimisers, sharded or whole, from ``folder``. Every process calls it.

    Args:
        folder: where ``write`` wrote.
        models: by the names that they were saved under.
        optimizers: by name.
        trees: what ``tree_of`` returned for each.

    Raises:
        Exception: a tensor is missing or of another shape.
    """
    reader = HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    flat = tensors_of(models, ())
    states: dict[str, list[dict[str, Any]]] = {}
    for name, optimizer in optimizers.items():
        parameters, names = _parameters(optimizer), _names(models, optimizer)
        states[name] = [dict(trees[name]["state"].get(of, {})) for of in names]
        number = {of: i for i, of in enumerate(names)}
        for key in saved:
            kind, _, of = key.partition(".")
            if kind != WEIGHTS and of in number:
                like = parameters[number[of]].detach()
                dtype = cast(Any, saved[key]).properties.dtype
                flat[key] = states[name][number[of]][kind] = torch.zeros_like(like, dtype=dtype)
    missing = sorted(flat.keys() - saved.keys())
    if missing:
        raise ValueError(f"there is no {missing[0]} in it, and {len(missing) - 1} more are missing")
    alone = not are_cut(models)  # then each process reads everything
    with _own_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        dcp.load(flat, storage_reader=reader, no_dist=alone)
    for name, optimizer in optimizers.items():
        groups = _numbered(trees[name]["param_groups"], _names(models, optimizer))
        kept = {i: state for i, state in enumerate(states[name]) if state}
        optimizer.load_state_dict({"state": kept, "param_groups": groups})


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    numbers, written = {}, 0
    for name, tensor in tensors.items():
        parts = tensor.device_mesh.size() if isinstance(tensor, DTensor) else 1
        written += tensor.numel() * tensor.element_size() // parts
        numbers[name] = 1 + written // BYTES_OF_A_FILE
    return numbers


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raises the error that DCP wraps, which is no ``Exception``, with a traceback of each process as its text."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, AssertionError):  # of DCP: a file that does not fit
            raise ValueError(str(cause)) from None
        raise cause from None


# ---- whole files into shards


def read_whole_weights(model: nn.Module, file: Path) -> None:
    """Fills a sharded model from a file of whole tensors, one after the other: no process holds all of them.

    Args:
        model: whose names the file has.
        file: safetensors.

    Raises:
        ValueError: names or shapes differ.
    """
    state, first = model.state_dict(), _first_names(model)
    with safe_open(str(file), framework="pt") as source:
        names = list(source.keys())
        wanted, found = {first.get(name, name) for name in state}, {first.get(name, name) for name in names}
        if wanted != found:
            raise ValueError(f"{sorted(wanted ^ found)[0]} is only in one of them, the model or the file")
        for name in names:
            whole = source.get_tensor(name)
            if whole.shape != state[name].shape:
                raise ValueError(f"{name} has the shape {tuple(whole.shape)}, and {tuple(state[name].shape)} is wanted")
            state[name].copy_(cut_like(whole, state[name]))


def cut_states(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimiser with whole tensors, cut as its parameters are.

    Args:
        optimizer: whose parameters are sharded.
        state_dict: of an optimiser of whole parameters.

    Returns:
        The state for ``optimizer.load_state_dict``.
    """
    parameters = _parameters(optimizer)
    states = {
        i: {kind: cut_like(x, parameters[i]) if _is_like(x, parameters[i]) else x for kind, x in state.items()}
        for i, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def cut_like(whole: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor that every process has, cut as ``like``, which may be whole too."""
    if not isinstance(like, DTensor):
        return whole
    # Without a source: each process cuts its own copy, and none sends.
    cut = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return cut.to(like.device)


# ---- names


def _named_states(models: Models, optimizer: Optimizer) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    parameters, names = _parameters(optimizer), _names(models, optimizer)
    for i, state in optimizer.state_dict()["state"].items():
        yield names[i], parameters[i], state


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """The parameters in the order in which torch numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    return groups


def _names(models: Models, optimizer: Optimizer) -> list[str]:
    """The names of ``_parameters``."""
    for model in models.values():
        model.state_dict()  # parameters that are gathered are other objects than their shards
    named = {id(p): f"{model}.{name}" for model in models for name, p in models[model].named_parameters()}
    parameters = _parameters(optimizer)
    strangers = [tuple(parameter.shape) for parameter in parameters if id(parameter) not in named]
    if strangers:
        raise CheckpointError(
            f"the optimiser has {len(strangers)} parameters that belong to none of the models {', '.join(models)}, the "
            f"first of shape {strangers[0]}: give the models whole to the checkpoint, after they are sharded"
        )
    return [named[id(parameter)] for parameter in parameters]


def _numbered(groups: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Groups that hold names, as groups that hold numbers."""
    saved = [name for group in groups for name in group["params"]]
    if saved != names:
        unlike = next((name for name in saved if name not in names), "their order")
        raise ValueError(f"its optimiser has other parameters than this one: {unlike}")
    numbers = iter(range(len(saved)))
    return [{**group, "params": [next(numbers) for _ in group["params"]]} for group in groups]


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape == parameter.shape
