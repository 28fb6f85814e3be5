"""The CUDA kernels' own sources, compiled by g++ with the stand-in headers of `emulator/`, and called on CPU tensors.

This shows that the kernels compute what they should, in several orders of their threads, with their barriers reached
and their vectors aligned. It shows nothing of speed, of the memory model of a GPU, or of the rounding of `ex2.approx`,
which is taken to be exp2 in float.
"""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

EMULATOR = Path(__file__).parent / "emulator"
CSRC = Path(__file__).parent.parent.parent / "csrc"
KERNELS = ("scoring.cu", "hidden_reward.cu")

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def compile_emulated(output: Path, sources: Sequence[Path], *, flags: Sequence[str]) -> None:
    """Compile `sources` and the emulator into `output`."""
    # g++ unrolls no loop on request, and does not know that the stand-in for a vector may be copied byte by byte.
    usual = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-class-memaccess"]
    headers = ["-I", str(EMULATOR / "include"), "-I", str(CSRC / "kernels" / "cuda")]
    files = [*map(str, sources), str(EMULATOR / "grid.cpp")]
    done = subprocess.run(
        ["g++", *usual, *flags, *headers, "-o", str(output), "-x", "c++", *files], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


class Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("inner", ctypes.c_int64),
        ("outer_stride", ctypes.c_int64),
        ("inner_stride", ctypes.c_int64),
    )


class ScoreArguments(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("logits", Rows),
        ("ref_logits", Rows),
        ("token_ids", ctypes.c_void_p),
        ("temperature", ctypes.c_double),
        ("temperatures", ctypes.c_void_p),
        ("logprobs", ctypes.c_void_p),
        ("entropy", ctypes.c_void_p),
        ("ref_logprobs", ctypes.c_void_p),
        ("kl", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
        ("ref_stats", ctypes.c_void_p),
    )


class ScoreBackwardArguments(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("grad_type", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("first_entry", ctypes.c_int64),
        ("logits", Rows),
        ("ref_logits", Rows),
        ("token_ids", ctypes.c_void_p),
        ("temperature", ctypes.c_double),
        ("temperatures", ctypes.c_void_p),
        ("g_logprobs", ctypes.c_void_p),
        ("g_entropy", ctypes.c_void_p),
        ("g_kl", ctypes.c_void_p),
        ("entropy", ctypes.c_void_p),
        ("kl", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
        ("ref_stats", ctypes.c_void_p),
        ("grad_logits", Rows),
    )


class RewardOptions(ctypes.Structure):
    _fields_ = (
        ("temperature", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("clip", ctypes.c_double),
        ("kl_coef", ctypes.c_double),
        ("band", ctypes.c_double),
        ("discrete", ctypes.c_bool),
    )


class HiddenRewardArguments(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("batch", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("hidden", Rows),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("kl", ctypes.c_void_p),
        ("terminal", ctypes.c_void_p),
        ("options", RewardOptions),
        ("rewards", ctypes.c_void_p),
    )


class Scores(NamedTuple):
    """What the forward kernel writes; every field has the shape of the token ids, the last two with a 2 behind it."""

    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor | None
    kl: Tensor | None
    stats: Tensor
    ref_stats: Tensor | None


def real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of(tensor: Tensor | None) -> Rows:
    """(A, B, K) or (B, K), with elements side by side and any strides else."""
    if tensor is None:
        return Rows()
    assert tensor.ndim in (2, 3) and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1)
    outer = tensor.stride(0) if tensor.ndim == 3 else 0
    return Rows(tensor.data_ptr(), max(1, tensor.shape[-2]), outer, tensor.stride(-2))


def pointer(tensor: Tensor | None, dtype: torch.dtype) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous() and tensor.dtype == dtype, f"{tensor.dtype} where {dtype} is wanted"
    return tensor.data_ptr()


class KernelFault(Exception):
    """The emulator stopped a kernel, or the kernel refused its arguments."""


class EmulatedKernels:
    """The kernels, by the names of csrc/kernels/cuda/kernels.h. Every output is poisoned with NaN before a call."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulator_fault.restype = ctypes.c_char_p
        for name, mirror in (
            ("score", ScoreArguments),
            ("score_backward", ScoreBackwardArguments),
            ("hidden_reward", HiddenRewardArguments),
        ):
            size = getattr(self._library, f"size_of_{name}_arguments")()
            assert size == ctypes.sizeof(mirror), f"{mirror.__name__} has {size} bytes in C++, not so many here"

    def set_order(self, seed: int) -> None:
        """In which order threads run: 0 ascending, 1 descending, more: at random."""
        self._library.emulator_set_order(seed)

    def _call(self, name: str, arguments: ctypes.Structure) -> None:
        status = getattr(self._library, f"emulated_{name}")(ctypes.byref(arguments))
        if status != 0:
            raise KernelFault(f"{name} returned {status}: {self._library.emulator_fault().decode()}")

    def score(
        self, logits: Tensor, token_ids: Tensor, ref_logits: Tensor | None = None, temperature: float | Tensor = 1.0
    ) -> Scores:
        dtype, shape = real(logits.dtype), token_ids.shape
        assert ref_logits is None or ref_logits.dtype == logits.dtype

        def output(*more: int) -> Tensor:
            return torch.full((*shape, *more), float("nan"), dtype=dtype)

        with_ref = ref_logits is not None
        scores = Scores(
            output(),
            output(),
            output() if with_ref else None,
            output() if with_ref else None,
            output(2),
            output(2) if with_ref else None,
        )
        arguments = ScoreArguments(
            TYPES[logits.dtype], token_ids.numel(), logits.shape[-1], rows_of(logits), rows_of(ref_logits)
        )
        arguments.token_ids = pointer(token_ids, torch.int64)
        _set_temperature(arguments, temperature, dtype)
        for name, tensor in scores._asdict().items():
            setattr(arguments, name, pointer(tensor, dtype))
        self._call("score", arguments)
        return scores

    def score_backward(
        self,
        scores: Scores,
        logits: Tensor,
        token_ids: Tensor,
        ref_logits: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        *,
        g_logprobs: Tensor | None = None,
        g_entropy: Tensor | None = None,
        g_kl: Tensor | None = None,
        out: Tensor | None = None,
        first_entry: int = 0,
    ) -> Tensor:
        """The gradient of the logits, in `out` where that is given; it may be `logits`."""
        dtype = real(logits.dtype)
        grad_logits = torch.full(logits.shape, float("nan"), dtype=logits.dtype) if out is None else out
        with_kl = g_kl is not None
        arguments = ScoreBackwardArguments(
            TYPES[logits.dtype],
            TYPES[grad_logits.dtype],
            token_ids.numel(),
            logits.shape[-1],
            first_entry,
            rows_of(logits),
            rows_of(ref_logits if with_kl else None),
            grad_logits=rows_of(grad_logits),
        )
        arguments.token_ids = pointer(token_ids, torch.int64)
        _set_temperature(arguments, temperature, dtype)
        for name, tensor in (("g_logprobs", g_logprobs), ("g_entropy", g_entropy), ("g_kl", g_kl)):
            setattr(arguments, name, pointer(tensor, dtype))
        arguments.entropy, arguments.stats = pointer(scores.entropy, dtype), pointer(scores.stats, dtype)
        if with_kl:
            arguments.kl, arguments.ref_stats = pointer(scores.kl, dtype), pointer(scores.ref_stats, dtype)
        self._call("score_backward", arguments)
        return grad_logits

    def hidden_reward(
        self,
        hidden: Tensor,
        weight: Tensor,
        mask: Tensor,
        *,
        bias: Tensor | None = None,
        kl: Tensor | None = None,
        terminal: Tensor | None = None,
        temperature: float = 1.0,
        scale: float = 1.0,
        clip: float | None = None,
        kl_coef: float = 0.0,
        kind: str = "continuous",
        band: float = 0.0,
    ) -> Tensor:
        dtype = real(hidden.dtype)
        rewards = torch.full(mask.shape, float("nan"), dtype=dtype)
        bound = float("inf") if clip is None else clip
        arguments = HiddenRewardArguments(
            TYPES[hidden.dtype],
            *mask.shape,
            hidden.shape[-1],
            weight.shape[0],
            rows_of(hidden),
            options=RewardOptions(temperature, scale, bound, kl_coef, band, kind == "discrete"),
        )
        arguments.mask = pointer(mask, torch.bool)
        tensors = {"weight": weight, "bias": bias, "kl": kl, "terminal": terminal, "rewards": rewards}
        for name, tensor in tensors.items():
            setattr(arguments, name, pointer(tensor, dtype))
        self._call("hidden_reward", arguments)
        return rewards


def _set_temperature(arguments: Any, temperature: float | Tensor, dtype: torch.dtype) -> None:
    if isinstance(temperature, Tensor):
        arguments.temperatures = pointer(temperature, dtype)
    else:
        arguments.temperature = temperature
