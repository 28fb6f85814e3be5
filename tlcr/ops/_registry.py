"""Which implementations of each op exist, which can run, and which one ``impl="auto"`` takes."""

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from tlcr.ops import _extension, _library
from tlcr.ops._autograd import without_inference
from tlcr.ops._spec import DEVICES, IMPLS, ArgumentsT, Op, ResultT


class OpStatus(NamedTuple):
    """What can run one op on one kind of device."""

    op: str
    device: str
    """Device type: "cpu", or "cuda" where torch sees one."""
    auto: str
    """The implementation that ``impl="auto"`` takes."""
    usable: tuple[str, ...]
    """Every implementation that can be named."""
    reasons: dict[str, str]
    """Why each of the others cannot run here."""


def register(ops: Iterable[Op[Any, Any]]) -> None:
    """Define the ops' operators, load the kernels, and find out what of each op can run here."""
    # The operators come first: torch compares them with what the extension registers. This happens at import, so that
    # an extension that does not fit is reported before any work is done.
    _library.define(ops)
    _extension.load()
    for op in ops:
        for device in DEVICES:
            for impl in IMPLS:
                reason = _why_not(op, impl, device)
                if reason is None:
                    op.implementations[impl, device] = _find(op, impl, device)
                else:
                    op.reasons[impl, device] = reason
            op.implementations["auto", device] = op.implementations[_auto(op, device), device]
    if _extension.unavailable("cuda") is None:
        # Of what kind the GPUs are is known when torch initialises CUDA, which an import must not do.
        torch.cuda._lazy_call(functools.partial(_look_at_gpus, ops))


def _look_at_gpus(ops: Iterable[Op[Any, Any]]) -> None:
    """Take the compiled kernels away where a GPU cannot run them."""
    problem = _extension.gpu_problem()
    if problem is None:
        return
    for op in ops:
        if op.implementations.pop(("cuda", "cuda"), None) is not None:
            op.reasons["cuda", "cuda"] = problem
            op.implementations["auto", "cuda"] = op.implementations[_auto(op, "cuda"), "cuda"]


def status(op: Op[Any, Any], device: str) -> OpStatus:
    if device == "cuda" and torch.backends.cuda.is_built() and torch.cuda.is_available():
        # Not in a process that has no use of its GPUs, such as a fork of one that has.
        with contextlib.suppress(RuntimeError):
            torch.cuda.init()
    usable = tuple(impl for impl in IMPLS if (impl, device) in op.implementations)
    reasons = {impl: op.reasons[impl, device] for impl in IMPLS if impl not in usable}
    return OpStatus(op.name, device, _auto(op, device), usable, reasons)


def _auto(op: Op[Any, Any], device_type: str) -> str:
    """The implementation for the device if it can run, else the reference, which runs everywhere."""
    fast = {"cpu": "cpp", "cuda": op.on_gpu}.get(device_type, "reference")
    return fast if (fast, device_type) in op.implementations else "reference"


def _why_not(op: Op[Any, Any], impl: str, device_type: str) -> str | None:
    """Why an implementation cannot run on this kind of device; None where it can."""
    if impl == "reference":
        return None
    if impl == "cpp":
        if not op.cpp:
            return "the op has none"
        return _wrong_device("cpu", device_type) or _extension.unavailable("cpu")
    if impl != op.on_gpu:
        return f"the op has none; on GPUs it is {op.on_gpu!r}"
    if impl == "cuda":
        return _wrong_device("cuda", device_type) or _extension.unavailable("cuda")
    if not _library.has_triton():
        return "triton is not installed (pip install triton)"
    if device_type == "cpu" and _library.interpreting():
        return None
    return _wrong_device("cuda", device_type)


def _wrong_device(wanted: str, device_type: str) -> str | None:
    return None if device_type == wanted else f"it runs on {wanted} tensors, not on {device_type}"


def _find(op: Op[ArgumentsT, ResultT], impl: str, device_type: str) -> Callable[[ArgumentsT], ResultT]:
    interpreted = impl == "triton" and device_type == "cpu"
    if impl == "reference":
        run = without_inference(op) if op.gradient is not None and op.gradient.plain else op.reference
    else:
        run = _library.implementation(op, _library.INTERPRETED if interpreted else _library.NAMESPACE, impl)
    looks_itself = impl == "cpp" or device_type == "cuda"
    return run if op.read is None or looks_itself else _after(op.read, run)


def devices() -> tuple[str, ...]:
    """The kinds of device that torch sees here."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _after(read: Callable[[ArgumentsT], None], run: Callable[[ArgumentsT], ResultT]) -> Callable[[ArgumentsT], ResultT]:
    def read_and_run(arguments: ArgumentsT) -> ResultT:
        read(arguments)
        return run(arguments)

    return read_and_run
