"""Groups of processes on several machines, by gloo: what both ends of a line of weights share.

It imports torch alone, since a vLLM server may have nothing else of tlcr's requirements.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo, TCPStore

__all__ = ["address_towards", "joined"]


def joined(store: TCPStore, host: str, rank: int, size: int, limit: timedelta) -> Any:
    """A gloo group that is reached at an address of this machine: by itself gloo takes that of its name, which often is
    one that no other machine can reach.

    Args:
        store: where its members meet.
        host: the address.
        rank: of this member.
        size: of the group.
        limit: for joining, and for each operation.

    Returns:
        The ProcessGroupGloo.
    """
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = limit
    return ProcessGroupGloo(store, rank, size, options)


def address_towards(host: str, port: int, seconds: float) -> str:
    """This machine's address, as another sees it.

    Args:
        host: of the other.
        port: where it listens.
        seconds: that connecting may take.

    Returns:
        The address of this end of a connection.

    Raises:
        OSError: the other cannot be reached.
    """
    with socket.create_connection((host, port), timeout=seconds) as connection:
        own: str = connection.getsockname()[0]
    return own
