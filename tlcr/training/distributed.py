"""Communication between processes. In a single process every function returns at once, without communication."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor
from torch import distributed as dist

from tlcr.errors import AnotherProcessFailed, ConfigError, TlcrError
from tlcr.training.launcher import launched_processes

T = TypeVar("T")
STORE_TIMEOUT = timedelta(seconds=20)


# ---- which processes there are


def join_processes() -> None:
    """Joins the processes that a launcher started into one group; once, and nothing where there is no launcher.

    Whoever asks for the number of processes has joined, because a process that asked before would take itself for the
    only one: each would do the whole work, in the same folder.

    Raises:
        ConfigError: the processes do not find each other.
    """
    launched = launched_processes()
    if launched == 1 or dist.is_initialized():
        return
    try:
        _state()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the {launched} processes of the launcher do not find each other ({' '.join(str(error).split())}); check "
            "MASTER_ADDR and MASTER_PORT, and that no other run uses that port"
        ) from error
    if not dist.is_initialized() or dist.get_world_size() != launched:
        raise ConfigError(
            f"the launcher started {launched} processes, and they cannot share work on {_state().device}; set "
            "ACCELERATE_USE_CPU=true to share it on the CPU, or start one process"
        )


def process_count() -> int:
    join_processes()
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if process_count() > 1 else 0


def is_main_process() -> bool:
    return process_index() == 0


def process_device() -> torch.device:
    """The device of this process."""
    join_processes()
    device: torch.device = _state().device
    return device


def _state() -> PartialState:
    # accelerate joins processes on CPUs only where it is told to use the CPU.
    without = launched_processes() > 1 and not torch.accelerator.is_available()
    return PartialState(cpu=without or parse_flag_from_env("ACCELERATE_USE_CPU"))


# ---- working together


def barrier() -> None:
    """Waits until every process has called it."""
    if process_count() > 1:
        dist.barrier()


@cache
def background_group() -> dist.ProcessGroup | None:
    """The group of all processes for a thread beside training: messages of one group do not mix with another's. None
    for a single process. Every process calls it, outside that thread."""
    return dist.new_group(backend="gloo") if process_count() > 1 else None


def sum_over_processes(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of ``values`` over all processes, the same tensor on each; a new tensor, without gradient."""
    return _reduced(values, dist.ReduceOp.SUM, group)


def largest_of_processes(values: Tensor) -> Tensor:
    """The largest of each of ``values`` over all processes, the same tensor on each; a new tensor, without gradient."""
    return _reduced(values, dist.ReduceOp.MAX)


def _reduced(values: Tensor, how: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None = None) -> Tensor:
    reduced = values.detach().clone()
    if process_count() > 1:
        on_device = reduced.to(_device(group))
        dist.all_reduce(on_device, op=how, group=group)
        reduced = on_device.to(values.device)
    return reduced


def any_process(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """True on every process if ``flag`` is True on one. Every process must call it."""
    return flag if process_count() == 1 else bool(sum_over_processes(torch.tensor(int(flag)), group))


def on_main_process(action: Callable[[], object], group: dist.ProcessGroup | None = None) -> None:
    """Runs ``action`` on the main process while the others wait. If it fails there, every process raises."""
    on_all_processes(action if is_main_process() else lambda: None, group)


def on_all_processes(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs ``action``, which must not communicate, on every process. If it fails on one, all raise: none waits forever.

    Args:
        action: called without arguments.
        group: the processes' group for messages; None: that of the training.

    Returns:
        What ``action`` returned on this process.

    Raises:
        TlcrError: an error of tlcr is raised on all processes, with its class and message; so all save what such an
            error saves.
        AnotherProcessFailed: any other exception of ``action`` is raised where it happened, and this elsewhere.
    """
    try:
        result = action()
    except BaseException as error:
        _first_failure(error, group)
        raise
    failure = _first_failure(None, group)
    if failure is not None:
        raise failure
    return result


def merged_over_processes(own: Mapping[str, T], group: dist.ProcessGroup | None = None) -> dict[str, T]:
    """The mappings of all processes as one, the same on each. Every process must call it."""
    if process_count() == 1:
        return dict(own)
    parts: list[Mapping[str, T]] = [{}] * process_count()
    dist.all_gather_object(parts, own, group=group)
    return {key: value for part in parts for key, value in part.items()}


def _first_failure(own: BaseException | None, group: dist.ProcessGroup | None) -> TlcrError | None:
    """What a process without a failure of its own has to raise; None where none failed. Every process must call it."""
    if process_count() == 1 or not any_process(own is not None, group):
        return None
    failures: list[TlcrError | None] = [None] * process_count()
    dist.all_gather_object(failures, type(own)(str(own)) if isinstance(own, TlcrError) else None, group=group)
    known = [failure for failure in failures if failure is not None]
    return known[0] if known else AnotherProcessFailed("another process failed; its own message says why")


def _device(group: dist.ProcessGroup | None) -> torch.device:
    nccl = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


# ---- saying things once


def is_first(what: str) -> bool:
    """True on the process that is the first of all to ask for ``what``, and only once.

    It works without the other processes: they may be at work, wait for one that has failed, or have ended.

    Args:
        what: any text.

    Returns:
        Whether no process has asked for it before; True for every question where there is no launcher.
    """
    if launched_processes() == 1:
        return True
    try:
        return _noticeboard().add(what, 1) == 1
    except RuntimeError:  # the process or launcher that keeps the board has ended: better said twice than never
        return True


def was_asked(what: str) -> bool:
    """Whether a process has called ``is_first`` with ``what``."""
    try:
        return launched_processes() > 1 and bool(_noticeboard().check([what]))
    except RuntimeError:
        return False


@cache
def _noticeboard() -> dist.Store:
    """A table that all processes share; the launcher keeps it, or the main process."""
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)
    # A launcher that starts the processes again keeps the table.
    return dist.PrefixStore(f"tlcr/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class SaidOnce(logging.Filter):
    """Lets a log record pass on the first process that has it: what all say is said once, what one says too.

    A text that a process logs n times passes n times.
    """

    def __init__(self) -> None:
        super().__init__()
        self._times: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        self._times[text] += 1
        return is_first(f"note {self._times[text]} {text}")
