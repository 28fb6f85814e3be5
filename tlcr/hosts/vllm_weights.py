"""vLLM: a server takes a trainer's weights over the network, where the two share no disk.

    vllm serve MODEL --weight-transfer-config '{"backend": "tlcr"}' \\
        --worker-extension-cls tlcr.hosts.vllm_weights.Worker

The trainer has ``server_weights: network`` (docs/engines.md). Each worker of the server imports ``Worker``, which
registers a backend for vLLM's own routes of weight transfer. The trainer is rank 0 of a gloo group and the workers are
the others; it broadcasts the bytes of one tensor after the other. ``tlcr.engines.line`` is its side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, TCPStore

from tlcr.gloo import address_towards, joined
from tlcr.hosts.guard import require

TESTED = ">=0.32.0,<=0.32.0"
"""The one vLLM that took weights so."""

_TRANSFER, _RELOAD = "vllm.distributed.weight_transfer", "vllm.model_executor.model_loader.reload"
_ENGINE = f"{_TRANSFER}.base:WeightTransferEngine"
NAMES = {
    f"{_ENGINE}.init_transfer_engine": "self, init_info",
    f"{_ENGINE}.start_weight_update": "self",
    f"{_ENGINE}.update_weights": "self, update_info",
    f"{_ENGINE}.receive_weights": "self, update_info",
    f"{_ENGINE}.finish_weight_update": "self",
    f"{_ENGINE}.shutdown": "self",
    f"{_ENGINE}.parse_update_info": "self, update_dict",
    f"{_TRANSFER}.base:WeightTransferInitInfo": None,
    f"{_TRANSFER}.base:WeightTransferUpdateInfo": None,
    f"{_TRANSFER}.factory:WeightTransferEngineFactory._registry": None,
    f"{_TRANSFER}.factory:WeightTransferEngineFactory.register_engine": "name, module_path_or_cls",
    f"{_RELOAD}:initialize_layerwise_reload": "model",
    f"{_RELOAD}:finalize_layerwise_reload": None,
}
"""What this module overrides or calls."""

# Before they are imported: a server that lacks one of them is then refused in a sentence as it starts.
require("vLLM", "vllm", TESTED, NAMES)

from vllm.distributed.weight_transfer.base import (  # noqa: E402
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # noqa: E402

__all__ = ["BACKEND", "NAMES", "TESTED", "Chunk", "Line", "Receiver", "Worker"]

BACKEND = "tlcr"


@dataclass
class Line(WeightTransferInitInfo):
    """Where the trainer waits.

    host, port: of its store. size: of the group, the trainer with all workers. seconds: that anything may take.
    """

    host: str
    port: int
    size: int
    seconds: float


@dataclass
class Chunk(WeightTransferUpdateInfo):
    """What comes next: names as transformers has them, dtypes as torch has them, and shapes."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


class Receiver(WeightTransferEngine[Line, Chunk]):
    """A worker's end: of each tensor it takes the bytes and hands them to the model, which keeps its own shard."""

    init_info_cls = Line
    update_info_cls = Chunk
    group: Any = None  # a ProcessGroupGloo

    def init_transfer_engine(self, init_info: Line) -> None:
        """Joins the trainer's group, in place of the one before."""
        limit = timedelta(seconds=init_info.seconds)
        replica = self.parallel_config.data_parallel_index * self.parallel_config.world_size
        rank = 1 + replica + self.parallel_config.rank
        store = TCPStore(init_info.host, init_info.port, is_master=False, timeout=limit)
        store.set(f"there/{rank}", "")
        own = address_towards(init_info.host, init_info.port, init_info.seconds)
        self.group = joined(store, own, rank, init_info.size, limit)

    def start_weight_update(self) -> None:
        """Before the first chunk."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        # An update that failed leaves layers half loaded, and they would count on.
        finalize_layerwise_reload(self.model, self.model_config)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """One chunk. vLLM's own then waits for an accelerator, which a CPU has not."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Chunk) -> None:
        """One chunk."""
        self.model.load_weights(self._tensors(update_info))

    def _tensors(self, chunk: Chunk) -> Iterator[tuple[str, Tensor]]:
        if self.group is None:
            raise RuntimeError("weights are sent before the trainer's group was joined")
        how = BroadcastOptions()
        how.rootRank = 0
        for name, dtype, shape in zip(chunk.names, chunk.dtypes, chunk.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast([tensor.view(-1).view(torch.uint8)], how).wait()
            yield name, tensor.to(self.device)

    def finish_weight_update(self) -> None:
        """After the last chunk."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leaves the group."""
        self.group = None


class Worker:
    """What ``--worker-extension-cls`` names. It adds no method: importing it registers the backend."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, Receiver)
