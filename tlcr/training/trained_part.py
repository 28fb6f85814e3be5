"""The part of a module that training changes, which is what a checkpoint has to hold, and the digest of what is frozen,
which it leaves out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tlcr.training.sharding import whole

PIECE = 1 << 24
"""Elements that are copied to the host at a time for a digest."""


class TrainedPart(nn.Module):
    """Parameters of other modules under their names there, shared and not copied: a checkpoint of it holds them alone,
    and loading it fills them in place.

    parameters: by dotted name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            *path, last = name.split(".")
            holder: nn.Module = self
            for step in path:
                if step not in holder._modules:
                    holder.add_module(step, nn.Module())
                holder = holder.get_submodule(step)
            holder.register_parameter(last, parameter)


def trained_part(module: nn.Module) -> nn.Module:
    """What a checkpoint of a module must hold.

    Args:
        module: a module that is trained, perhaps in part.

    Returns:
        The module itself where all of its parameters are trained; else a ``TrainedPart`` with those that are.
    """
    parameters = dict(module.named_parameters())
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    return module if len(trained) == len(parameters) else TrainedPart(trained)


def frozen_digest(module: nn.Module) -> str | None:
    """What identifies the weights that a checkpoint of ``trained_part`` leaves out. Every process calls it.

    Args:
        module: the module.

    Returns:
        ``digest`` of its frozen parameters; None where it has none.
    """
    frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return digest(frozen.items()) if frozen else None


@torch.no_grad()
def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The SHA-256 of tensors with their names, dtypes and shapes. Every process calls it. One is held at a time.

    Args:
        tensors: names and tensors, on any device, whole or sharded; their order does not count.

    Returns:
        The digest, as 64 hexadecimal digits.
    """
    lines = []
    for name, tensor in tensors:
        found = hashlib.sha256()
        for piece in whole(tensor.detach()).reshape(-1).split(PIECE):
            found.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
        lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {found.hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
