"""Communication between processes. In a single process every function returns at once, without communication."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch import distributed as dist

from tlcr.errors import TlcrError


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if process_count() > 1 else 0


def is_main_process() -> bool:
    return process_index() == 0


def barrier() -> None:
    """Waits until every process has called it."""
    if process_count() > 1:
        dist.barrier()


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes, the same tensor on each; a new tensor, without gradient."""
    total = values.detach().clone()
    if process_count() > 1:
        on_device = total.to(_device())
        dist.all_reduce(on_device)
        total = on_device.to(values.device)
    return total


def any_process(flag: bool) -> bool:
    """True on every process if ``flag`` is True on one. Every process must call it."""
    return flag if process_count() == 1 else bool(sum_over_processes(torch.tensor(int(flag))))


def on_main_process(action: Callable[[], object]) -> None:
    """Runs ``action`` on the main process while the others wait. If it fails there, every process raises."""
    on_all_processes(action if is_main_process() else lambda: None)


def on_all_processes(action: Callable[[], object]) -> None:
    """Runs ``action`` on every process and waits for all. If it fails on one, all raise, so that none waits forever."""
    failed = True
    try:
        action()
        failed = False
    finally:
        failed = any_process(failed)
    if failed:
        raise TlcrError("another process failed; its own message says why")


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
