"""Which implementations of each op exist, which can run, and which one ``impl="auto"`` takes.

An implementation is an object with one function per op, named as the op. It takes the op's arguments, all of them and
already checked, except ``impl``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tlcr.errors import BackendUnavailable, ConfigError
from tlcr.ops import _extension, _library, reference, reference_scoring
from tlcr.ops._operators import Operators

IMPLS = ("reference", "cpp", "triton", "cuda")

OTHER_DEVICE = "other devices"


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


_REFERENCE = {
    "fused_reward": reference,
    "reward_from_hidden": reference,
    "fused_gae": reference,
    "ppo_loss": reference,
    "score_tokens": reference_scoring,
    "score_hidden": reference_scoring,
    "adamw_step": reference,
    "rms_norm": reference,
    "gated_silu": reference,
}
OPS = tuple(_REFERENCE)

# The operators first: torch compares them with what the extension registers as it is loaded. And at import, so that an
# extension that does not fit is said before any work is done.
_library.define()
_extension.load()


def _on_gpu(op: str) -> str:
    """The one implementation that an op has for GPUs, beside the reference if it has another."""
    return "triton" if op in _library.TRITON else "cuda" if op in _library.CUDA else "reference"


def _preference(op: str, device_type: str) -> tuple[str, ...]:
    """What "auto" tries, in order; the reference runs everywhere and so comes last."""
    fast = {"cpu": ("cpp",), "cuda": (_on_gpu(op),)}
    return (*fast.get(device_type, ()), "reference")


def _why_not(op: str, impl: str, device_type: str) -> str | None:
    """Why an implementation cannot run on this kind of device; None where it can."""
    if impl == "reference":
        return None
    if impl == "cpp":
        return _wrong_device("cpu", device_type) or _extension.unavailable("cpu")
    if impl != _on_gpu(op):
        return f"the op has none; on GPUs it is {_on_gpu(op)!r}"
    if impl == "cuda":
        return _wrong_device("cuda", device_type) or _extension.unavailable("cuda")
    if not _library.has_triton():
        return "triton is not installed (pip install triton)"
    if device_type == "cpu" and _library.interpreting():
        return None
    return _wrong_device("cuda", device_type)


def _wrong_device(wanted: str, device_type: str) -> str | None:
    return None if device_type == wanted else f"it runs on {wanted} tensors, not on {device_type}"


def _find(op: str, impl: str, device_type: str) -> Callable[..., Any] | str:
    """The function, or the reason why there is none."""
    reason = _why_not(op, impl, device_type)
    if reason is not None:
        return reason
    home: Any = _REFERENCE[op]
    if impl != "reference":
        interpreted = impl == "triton" and device_type == "cpu"
        home = _operators(_library.INTERPRETED if interpreted else _library.NAMESPACE)
    function: Callable[..., Any] = getattr(home, op)
    return function


@functools.cache
def _operators(namespace: str) -> Operators:
    return Operators(namespace)


# Looked up and not computed on a call: torch.compile traces through resolve.
_FOUND = {
    (op, impl, device): _find(op, impl, device)
    for op in OPS
    for impl in IMPLS
    for device in ("cpu", "cuda", OTHER_DEVICE)
}
_AUTO = {
    (op, device): next(impl for impl in _preference(op, device) if not isinstance(_FOUND[op, impl, device], str))
    for op in OPS
    for device in ("cpu", "cuda", OTHER_DEVICE)
}


def resolve(op: str, impl: str, device_type: str) -> Callable[..., Any]:
    """The function that runs `op` as `impl` on `device_type`.

    A named implementation is that one or an error, never another.

    Raises:
        ConfigError: no implementation has this name.
        BackendUnavailable: it has one that cannot run here.
    """
    device = device_type if device_type in ("cpu", "cuda") else OTHER_DEVICE
    if impl == "auto":
        impl = _AUTO[op, device]
    if impl not in IMPLS:
        raise ConfigError(f"{op}: impl={impl!r} is unknown, choose from {', '.join(map(repr, ('auto', *IMPLS)))}")
    function = _FOUND[op, impl, device]
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
            found = {impl: _FOUND[op, impl, device] for impl in IMPLS}
            usable = tuple(impl for impl in IMPLS if not isinstance(found[impl], str))
            reasons = {impl: reason for impl, reason in found.items() if isinstance(reason, str)}
            report.append(OpStatus(op, device, _AUTO[op, device], usable, reasons))
    return report
