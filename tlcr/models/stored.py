"""Models whose weights stay in their files until they are cut into shards, so that no process holds one whole.

transformers loads such a model onto the meta device: its report, dtypes and tied weights are those of ordinary loading,
and no number is read. ``tlcr.training.sharding.shard`` then lets each process read its rows of every tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.initialization import no_init_weights

from tlcr.models.heads import backbone
from tlcr.models.weight_files import WeightFiles
from tlcr.training.sharding import check_when_cut, fill_when_cut, local, part_of

__all__ = [
    "Stored",
    "find_stored",
    "is_unread",
    "leave_unread",
    "make_buffers",
    "stored_for_copy",
    "stored_parameters",
    "when_read",
    "without_adapters",
    "without_weights",
]


@dataclass(frozen=True)
class Stored:
    """Where the weights of a model are: its safetensors, and for each parameter and persistent buffer the name there.

    A tied weight has its first name alone. A weight without a name there is zero.
    """

    files: tuple[str, ...]
    names: Mapping[str, str | None]


_unread: weakref.WeakKeyDictionary[PreTrainedModel, Stored] = weakref.WeakKeyDictionary()


def is_unread(model: PreTrainedModel) -> bool:
    """Whether the weights of ``model`` are still in its files."""
    return model in _unread


def find_stored(model: PreTrainedModel, weights: WeightFiles, renamed: Mapping[str, str]) -> Stored | None:
    """Where each weight of a model on the meta device is stored.

    Args:
        model: the model.
        weights: its files.
        renamed: names of weights that are stored under another name, and that name.

    Returns:
        The places; None where a weight is not stored as the model has it, in one tensor of the same shape, so that
        only transformers can load it.
    """
    if any(isinstance(change, WeightConverter) for change in get_model_conversion_mapping(model)):
        return None
    aliases: dict[int, list[str]] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        aliases.setdefault(id(tensor), []).append(name)
    names: dict[str, str | None] = {}
    for together in aliases.values():
        shape = tuple(tensors[together[0]].shape)
        found = [stored for name in together if (stored := _stored_name(model, name, weights, renamed)) is not None]
        # Where a file has both of two tied weights, transformers compares them and ties equal ones only.
        if len(found) != 1 or weights.shapes[found[0]] != shape:
            return None
        names[together[0]] = found[0]
    return Stored(weights.files, names)


def _stored_name(model: PreTrainedModel, name: str, weights: WeightFiles, renamed: Mapping[str, str]) -> str | None:
    """The name in the files: a file may lack the prefix of the backbone, or have it where the model does not."""
    prefix = f"{model.base_model_prefix}."
    spellings = (renamed.get(name, name), prefix + name, name.removeprefix(prefix))
    return next((spelling for spelling in spellings if spelling in weights.shapes), None)


def stored_for_copy(model: PreTrainedModel, source: PreTrainedModel, same: Mapping[str, str]) -> Stored:
    """The places for a model with the backbone of ``source``, which is unread; all other weights are zero.

    Args:
        model: the copy, on the meta device.
        source: what it copies.
        same: further weights of the copy by name, and their names in ``source``.

    Returns:
        The places.
    """
    theirs, ours = _name_of_backbone(source), _name_of_backbone(model)
    known = _unread[source]
    names: dict[str, str | None] = {}
    for name in _own_names(model):
        copied = theirs + name.removeprefix(ours) if name.startswith(ours) else same.get(name)
        names[name] = None if copied is None else known.names[copied]
    return Stored(known.files, names)


def leave_unread(model: PreTrainedModel, stored: Stored) -> None:
    """Lets ``shard`` read the weights of a model on the meta device.

    Args:
        model: the model, changed no more before it is cut, but for what leaves its weights alone.
        stored: where they are.
    """
    _unread[model] = stored
    fill_when_cut(model, partial(_fill, model, stored))


def when_read(model: PreTrainedModel, check: Callable[[], object]) -> None:
    """Calls ``check``, which runs the model: now, or as soon as the model has its weights.

    Args:
        model: the model.
        check: refuses a model that does not do what it should.
    """
    if is_unread(model):
        check_when_cut(model, check)
    else:
        check()


def without_weights() -> AbstractContextManager[None]:
    """Models that are made inside have their parameters on the meta device, and their buffers on the CPU."""
    context: AbstractContextManager[None] = init_empty_weights(include_buffers=False)
    return context


def make_buffers(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Gives a model on the meta device the buffers that its constructor makes, such as the frequencies of rotary
    positions, which no file has.

    Args:
        model: the model.
        dtype: in which it was loaded.

    Returns:
        False where it keeps tensors otherwise than as parameters and buffers: they cannot be made here.
    """
    if any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values()):
        return False
    with no_init_weights(), without_weights():
        made = type(model)._from_config(
            deepcopy(model.config), dtype=dtype, attn_implementation=model.config._attn_implementation
        )
    for name, module in made.named_modules():
        model.get_submodule(name)._buffers.update(module._buffers)
    return True


@torch.no_grad()
def _fill(model: PreTrainedModel, stored: Stored) -> None:
    """Reads this process's rows of every weight, in the dtype that the parameter has."""
    del _unread[model]
    tensors = (*model.named_parameters(), *model.named_buffers())
    targets = {without_adapters(name): tensor for name, tensor in tensors}
    wanted: dict[str, list[Tensor]] = {}
    for name, where in stored.names.items():
        if where is None:
            local(targets[name]).zero_()
        else:
            wanted.setdefault(where, []).append(targets[name])
    for file in stored.files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                for target in wanted.get(name, ()):
                    whole = opened.get_slice(name)
                    rows = whole[part_of(target)] if target.ndim else whole[:]
                    local(target).copy_(rows.reshape(local(target).shape))


def stored_parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The parameters of an unread model by name, as it will have them, each whole: read when it is asked for.

    Those that no file has are left out.

    Args:
        model: as the loaders give it while its weights are unread.

    Yields:
        Name and tensor, in the dtype that the model has it in.
    """
    stored = _unread[model]
    dtypes = {without_adapters(name): parameter.dtype for name, parameter in model.named_parameters()}
    names = {where: name for name, where in stored.names.items() if where is not None and name in dtypes}
    for file in stored.files:
        with safe_open(file, framework="pt") as opened:
            for where in names.keys() & set(opened.keys()):
                yield names[where], opened.get_tensor(where).to(dtypes[names[where]])


def without_adapters(name: str) -> str:
    """The name of a weight as its files have it: peft puts an adapted layer below another, under this name."""
    return name.replace(".base_layer.", ".")


def _own_names(model: nn.Module) -> list[str]:
    """Parameters and persistent buffers, tied ones once."""
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), name)
    return list(names.values())


def _name_of_backbone(model: PreTrainedModel) -> str:
    """Its name and a dot: what the names of its weights begin with."""
    inner = backbone(model)
    return next(f"{name}." for name, module in model.named_modules() if module is inner)
