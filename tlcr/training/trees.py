"""Nested state in two files: JSON with the nesting and every number, safetensors with the tensors in it. No pickle."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tlcr.errors import CheckpointError
from tlcr.training.distributed import process_device

# ---- trees


@dataclass(frozen=True)
class Tree:
    """Nested state as it is written: ``encoded`` is JSON, in which a tensor is a name in ``tensors``."""

    encoded: Any
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, value: Any) -> Tree:
        """Encodes mappings, lists, tuples, numbers, text, arrays and tensors; tensors are not copied.

        Args:
            value: the state.

        Returns:
            The tree.

        Raises:
            CheckpointError: there is a value of another kind in it.
        """
        tensors: dict[str, Tensor] = {}
        return cls(_encode(value, tensors), tensors)

    def in_host_memory(self) -> Tree:
        """The tree with copies of its tensors, which nothing changes any more."""
        return replace(self, tensors=copies(self.tensors))

    def write(self, stem: Path) -> None:
        """Writes ``stem.json`` and ``stem.safetensors``."""
        stem.with_name(stem.name + ".json").write_text(json.dumps(self.encoded), encoding="utf-8")
        save_file(self.tensors, str(stem.with_name(stem.name + ".safetensors")))


def read_tree(stem: Path) -> Any:
    """The state that ``Tree.write`` wrote at ``stem``, with lists, tuples and types as they were."""
    encoded = json.loads(stem.with_name(stem.name + ".json").read_text(encoding="utf-8"))
    return _decode(encoded, load_file(str(stem.with_name(stem.name + ".safetensors"))))


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory; those of shards are shards."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


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


# ---- random states


def random_state() -> dict[str, Any]:
    """The random states of python, numpy and torch in this process."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if process_device().type == "cuda":  # a run on the CPU leaves a GPU alone, which others may need
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Sets what ``random_state`` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and process_device().type == "cuda":
        torch.cuda.set_rng_state(state["cuda"])
