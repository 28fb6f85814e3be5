"""Counts what a step of training allocates, operator by operator; the tensors may be fake ones without memory."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tlcr.ops.scratch import scratch_of

__all__ = ["Allocations"]

EXCHANGES = ("c10d", "fsdp", "_c10d_functional")
"""Namespaces of the operators by which processes exchange shards."""


class Allocations(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, until they are freed, and what kernels take for themselves.

    Args:
        known: tensors that are there already and do not count.
        on_cpu: whether the operators are to run on a CPU; else on a GPU.
    """

    def __init__(self, known: Iterable[Tensor], *, on_cpu: bool) -> None:
        super().__init__()
        self.peak = 0
        self._on_cpu = on_cpu
        self._now = 0
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}
        # Kept, so that no storage takes the place of another under its key.
        self._known = {_key(tensor): tensor for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        if func.namespace in EXCHANGES:
            self._measure_again()
        scratch = scratch_of(func.name().partition(".")[0], args, on_cpu=self._on_cpu)
        if self._on_cpu:
            scratch += _converted(func, args, kwargs)
        self.peak = max(self.peak, self._now + scratch)
        return result

    def _count(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._known or key in self._alive:
            return
        storage = tensor.untyped_storage()
        self._alive[key] = weakref.ref(storage, lambda _: self._free(key)), storage.nbytes()
        self._now += storage.nbytes()

    def _free(self, key: int) -> None:
        self._now -= self._alive.pop(key)[1]

    def _measure_again(self) -> None:
        """FSDP gives memory back, and takes it again, by the size of a storage, which no operator tells of."""
        for key, (reference, before) in list(self._alive.items()):
            storage = reference()
            if storage is not None and storage.nbytes() != before:
                self._now += storage.nbytes() - before
                self._alive[key] = reference, storage.nbytes()


def _converted(func: Any, args: Any, kwargs: Any) -> int:
    """The bytes of operands that torch copies to the common dtype before a pointwise operator of the CPU runs, such as
    a bfloat16 output of a layer to which the float32 output of its adapter is added. Kernels of GPUs convert as they
    read."""
    if torch.Tag.pointwise not in func.tags:
        return 0
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
    # A mask chooses, and is not computed with.
    operands = [tensor for tensor in operands if tensor.is_floating_point()]
    if len({tensor.dtype for tensor in operands}) < 2:
        return 0
    common = functools.reduce(torch.promote_types, (tensor.dtype for tensor in operands))
    return sum(tensor.numel() * common.itemsize for tensor in operands if tensor.dtype != common)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
