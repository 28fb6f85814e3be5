"""Which implementations of each op exist, which can run, and which one ``impl="auto"`` takes.

An implementation is a module with one function per op, named as the op. It takes the op's arguments, all of them and
already checked, except ``impl``. A backend joins by an entry in `_IMPLEMENTATIONS`; no caller changes.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tlcr.errors import BackendUnavailable, ConfigError

IMPLS = ("reference", "cpp", "triton", "cuda")


class Implementation(NamedTuple):
    """A module that implements an op, and the device types it runs on (None: any)."""

    module: str
    devices: frozenset[str] | None = None


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


_SCORING = {
    "score_tokens": Implementation("tlcr.ops.reference_scoring"),
    "score_hidden": Implementation("tlcr.ops.reference_scoring"),
}
_ELEMENTWISE = {
    op: Implementation("tlcr.ops.reference") for op in ("fused_reward", "reward_from_hidden", "fused_gae", "ppo_loss")
}
OPS = (*_ELEMENTWISE, *_SCORING)

# A string in place of an implementation is the reason why there is none.
_IMPLEMENTATIONS: dict[str, dict[str, Implementation | str]] = {
    op: {
        "reference": (_ELEMENTWISE | _SCORING)[op],
        "cpp": "this version of tlcr has no C++ kernels",
        "triton": "this version of tlcr has no Triton kernels",
        "cuda": "this version of tlcr has no CUDA kernels",
    }
    for op in OPS
}


def _preference(op: str, device_type: str) -> tuple[str, ...]:
    """What "auto" tries, in order; the reference runs everywhere and so comes last."""
    if device_type == "cpu":
        return ("cpp", "reference")
    if device_type == "cuda":
        return ("triton" if op in ("fused_reward", "fused_gae", "ppo_loss") else "cuda", "reference")
    return ("reference",)


@functools.cache
def _find(op: str, impl: str, device_type: str) -> Callable[..., Any] | str:
    """The function, or the reason why there is none."""
    entry = _IMPLEMENTATIONS[op][impl]
    if isinstance(entry, str):
        return entry
    if entry.devices is not None and device_type not in entry.devices:
        return f"it runs on {' and '.join(sorted(entry.devices))} tensors, not on {device_type}"
    function: Callable[..., Any] = getattr(importlib.import_module(entry.module), op)
    return function


@functools.cache
def resolve(op: str, impl: str, device_type: str) -> Callable[..., Any]:
    """The function that runs `op` as `impl` on `device_type`.

    A named implementation is that one or an error, never another.

    Raises:
        ConfigError: no implementation has this name.
        BackendUnavailable: it has one that cannot run here.
    """
    if impl == "auto":
        found = (_find(op, name, device_type) for name in _preference(op, device_type))
        return next(function for function in found if not isinstance(function, str))
    if impl not in IMPLS:
        raise ConfigError(f"{op}: impl={impl!r} is unknown, choose from {', '.join(map(repr, ('auto', *IMPLS)))}")
    function = _find(op, impl, device_type)
    if isinstance(function, str):
        raise BackendUnavailable(
            f"{op}: impl={impl!r} is unavailable: {function}; use impl='auto' or impl='reference' "
            "(tlcr.ops.available() lists what can run)"
        )
    return function


def available() -> list[OpStatus]:
    """For every op and kind of device here: what "auto" takes, what else can be named, and why the rest cannot."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    report = []
    for op in OPS:
        for device in devices:
            found = {impl: _find(op, impl, device) for impl in IMPLS}
            usable = tuple(impl for impl in IMPLS if not isinstance(found[impl], str))
            auto = next(impl for impl in _preference(op, device) if impl in usable)
            reasons = {impl: reason for impl, reason in found.items() if isinstance(reason, str)}
            report.append(OpStatus(op, device, auto, usable, reasons))
    return report
