"""The trainer's end of a line to one vLLM server, over which it broadcasts weights where the two share no disk.

A gloo group of the trainer, rank 0, and the workers of the server, whose end is ``tlcr.hosts.vllm_weights``. What the
server is told meanwhile over HTTP ends only when it has taken everything, and what it says of a failure is raised here:
while weights are sent, nobody waits for a server that has given up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, TCPStore

from tlcr.gloo import address_towards, joined

POLL = 0.002
"""Seconds between two looks at what the server says (ours)."""
GRACE = 2.0
"""Seconds that a server has to say why, when the line has broken (ours)."""


class Line:
    """A line that a server is yet to join.

    Args:
        address: of the server. The trainer waits where its own end of a connection to there is.
        workers: of the server.
        seconds: that joining, and each tensor, may take.

    Raises:
        OSError: the server cannot be reached.
    """

    def __init__(self, address: str, workers: int, seconds: float) -> None:
        self._limit, self._workers = timedelta(seconds=seconds), workers
        self._groups: list[Any] = []  # the ProcessGroupGloo, once it is joined
        parts = urlsplit(address)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = address_towards(parts.hostname or "", port, seconds)
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self._limit)
        self.info: dict[str, Any] = {
            "host": host,
            "port": self._store.port,
            "size": workers + 1,
            "seconds": seconds,
        }
        """What its workers need to join."""

    def join(self, told: Future[Any]) -> None:
        """Waits for the workers.

        Args:
            told: the request that has them join.

        Raises:
            RuntimeError: they do not come.
            Exception: what the request raised.
        """
        there = [f"there/{rank}" for rank in range(1, self._workers + 1)]
        _wait(lambda: self._store.check(there), told, self._limit)
        self._groups.append(joined(self._store, self.info["host"], 0, self._workers + 1, self._limit))
        told.result()

    def send(self, weights: Mapping[str, Tensor], told: Future[Any]) -> None:
        """Sends what ``chunk`` says of the weights.

        Args:
            weights: on the CPU, contiguous.
            told: the request that has the workers take it.

        Raises:
            RuntimeError: the workers do not take it.
            Exception: what the request raised.
        """
        how = BroadcastOptions()
        how.rootRank = 0
        try:
            for weight in weights.values():
                sent = self._groups[0].broadcast([weight.view(-1).view(torch.uint8)], how)
                _wait(sent.is_completed, told, self._limit)
                sent.wait()
        except RuntimeError as error:
            wait([told], timeout=GRACE)
            if told.done():
                told.result()
            raise RuntimeError(f"the line broke: {str(error)[:200]}") from error
        told.result()

    def close(self) -> None:
        """Leaves the group. In a thread: a gloo group goes only when all that it began has ended, and what a server
        does not take ends with the time limit."""
        threading.Thread(target=self._groups.clear, daemon=True).start()


def chunk(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Names, dtypes and shapes of what is sent, as JSON has them."""
    return {
        "names": list(weights),
        "dtypes": [str(weight.dtype).removeprefix("torch.") for weight in weights.values()],
        "shapes": [list(weight.shape) for weight in weights.values()],
    }


def _wait(done: Callable[[], bool], told: Future[Any], limit: timedelta) -> None:
    began = time.monotonic()
    while not done():
        if told.done():
            told.result()
        if time.monotonic() - began > limit.total_seconds():
            raise RuntimeError(f"nothing came within {limit.total_seconds():g} s")
        time.sleep(POLL)
