"""The cases of the op benchmark: sizes, dtypes, inputs, the bytes that must move, and the check against float64.

A case is an op, its options, a shape and a dtype. Its `Problem` holds the inputs and the truth, which is tlcr's
specification in float64 on a cut of them, and turns an implementation into the work of a pass: "forward" with no
gradient asked for, "backward" from given gradients after a forward pass that is not timed, "both".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.clocks import Work, calls, calls_after
from benchmarks.record import largest
from tlcr import ops

Inputs = dict[str, Tensor]
Function = Callable[..., tuple[Tensor, ...]]

WITH_REFERENCE = "with reference and KL"
LOSS_ONLY = "mean negative log-probability"
PADDED, HOLES, PACKED, WHITENED = "padded rows", "holes", "packed", "padded rows, whitened"

FORWARD = ("forward",)
PASSES = ("forward", "backward", "both")

LAM = 0.95
"""gamma is 1, as in the recipes. gamma lam must be below 1, because some rivals truncate their sums."""
REWARD_OPTIONS = {"kl_coef": 0.1, "clip": 0.9}
NORM_EPS = 1e-5
CHECKED_TOKENS = 8
"""Rows of logits, or hidden states, that are compared with float64."""
CHECKED_SMALL = 2**17
"""The number of values that are compared with float64 where there is one value for each token."""

# Of the largest true value. Sums over V in float32, and what is rounded to half precision, stay well below.
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

BYTES = {torch.float32: 4, torch.bfloat16: 2}


class Wrong(Exception):
    """A result or gradient is not the true one."""


@dataclass(frozen=True)
class Case:
    """One op on inputs of one size."""

    op: str
    name: str
    """Which of the op's uses, or "" for the plain one."""
    shape: tuple[int, ...]
    """(B, T), (N, V), (N, H) or (N, H, V); packed, B T tokens in B sequences."""
    dtype: torch.dtype = torch.float32
    passes: tuple[str, ...] = PASSES
    rivals: bool = True
    """Whether all rivals run, or, for one more point of a curve, only the plain form in torch."""

    @property
    def axes(self) -> dict[str, int]:
        names = {"score_tokens": "NV", "score_hidden": "NHV", "rms_norm": "NH", "gated_silu": "NH"}.get(self.op, "BT")
        return dict(zip(names, self.shape, strict=True))

    @property
    def elements(self) -> int:
        """Elements of the largest tensor that an unfused form holds: logits, activations, or one number per token."""
        axes = self.axes
        return axes["N"] * axes["V"] if "V" in axes else math.prod(self.shape)

    def __str__(self) -> str:
        size = " x ".join(f"{name}={size}" for name, size in self.axes.items())
        return f"{self.op}{', ' if self.name else ''}{self.name} ({size}, {str(self.dtype)[6:]})"


class Traffic(NamedTuple):
    """The bytes and the operations that every implementation needs."""

    bytes: int
    formula: str
    """The formula for the bytes, in the axes and s, the bytes of one element of the inputs."""
    flops: int | None
    """Operations of the matrix products, if there are any, with nothing computed twice."""


def traffic(case: Case, which: str) -> Traffic:
    """Inputs are read once by each pass that needs them, results and gradients written once; nothing else is counted.

    "both" is the sum: the gradients of the results come from elsewhere, between the two passes.
    """
    if which == "both":
        forward, backward = traffic(case, "forward"), traffic(case, "backward")
        flops = None if forward.flops is None or backward.flops is None else forward.flops + backward.flops
        return Traffic(forward.bytes + backward.bytes, f"{forward.formula} + {backward.formula}", flops)
    formula = _FORMULAS[case.op, case.name, which]
    flops = None
    if case.op == "score_hidden":
        models = 2 if case.name == WITH_REFERENCE and which == "forward" else 1
        products = {"forward": 2, "backward": 4}[which] * models
        flops = products * case.axes["N"] * case.axes["V"] * case.axes["H"]
    return Traffic(_value(formula, {**case.axes, "s": BYTES[case.dtype]}), formula, flops)


def _value(formula: str, values: dict[str, int]) -> int:
    """The value of a formula like "2 N V s + 16 N"."""
    total = 0
    for term in formula.split(" + "):
        product = 1
        for factor in term.split():
            product *= values[factor] if factor in values else int(factor)
        total += product
    return total


# Token ids are 8 bytes, a mask 1, cu_seqlens 4, log-probabilities and all values of one number a token 4.
_FORMULAS = {
    ("fused_reward", "", "forward"): "2 B T s + 9 B T + 4 B",  # logits, mask, kl, rewards; terminal
    ("fused_reward", "3 classes", "forward"): "3 B T s + 9 B T + 4 B",
    ("fused_gae", "", "forward"): "16 B T",  # rewards, values; advantages, returns
    ("fused_gae", PADDED, "forward"): "17 B T",  # and the mask
    ("fused_gae", HOLES, "forward"): "17 B T",
    ("fused_gae", WHITENED, "forward"): "17 B T",
    ("fused_gae", PACKED, "forward"): "16 B T + 4 B + 4",
    ("score_tokens", "", "forward"): "N V s + 16 N",  # logits, ids; log-probability and entropy
    ("score_tokens", "", "backward"): "2 N V s + 16 N",  # logits, ids, two gradients; the logits' gradient
    ("score_tokens", WITH_REFERENCE, "forward"): "2 N V s + 24 N",
    ("score_tokens", WITH_REFERENCE, "backward"): "3 N V s + 20 N",
    ("score_hidden", "", "forward"): "N H s + V H s + 16 N",
    ("score_hidden", "", "backward"): "2 N H s + 2 V H s + 16 N",
    ("score_hidden", WITH_REFERENCE, "forward"): "2 N H s + 2 V H s + 24 N",
    ("score_hidden", WITH_REFERENCE, "backward"): "3 N H s + 3 V H s + 20 N",
    ("score_hidden", LOSS_ONLY, "forward"): "N H s + V H s + 8 N + 4",
    ("score_hidden", LOSS_ONLY, "backward"): "2 N H s + 2 V H s + 8 N + 4",
    ("ppo_loss", "", "forward"): "25 B T + 20",  # six values and the mask; the loss and four statistics
    ("ppo_loss", "", "backward"): "33 B T + 4",  # and two gradients
    ("rms_norm", "", "forward"): "2 N H s + H s",  # x, y; weight
    ("rms_norm", "", "backward"): "3 N H s + 2 H s + 4 N",  # x and two gradients; weight and its own; a scale a row
    ("gated_silu", "", "forward"): "3 N H s",  # gate, up, y
    ("gated_silu", "", "backward"): "5 N H s",  # gate, up and three gradients
}


def tlcr_function(case: Case, impl: str) -> Function:
    """The op, as a function from the case's inputs to the results that are checked, those with gradients first."""
    op = getattr(ops, case.op)

    def score(**inputs: Tensor) -> tuple[Tensor, ...]:
        scores = op(**inputs, impl=impl)
        if case.name == LOSS_ONLY:
            return (-scores.logprobs.mean(),)
        if case.name == WITH_REFERENCE:
            return scores.logprobs, scores.entropy, scores.kl, scores.ref_logprobs
        return scores.logprobs, scores.entropy

    def loss(**inputs: Tensor) -> tuple[Tensor, ...]:
        found = op(**inputs, impl=impl)
        return found.loss, found.clip_fraction, found.value_clip_fraction, found.approx_kl, found.ratio_max

    def reward(**inputs: Tensor) -> tuple[Tensor, ...]:
        return (op(**inputs, **REWARD_OPTIONS, impl=impl),)

    def gae(**inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(op(**inputs, lam=LAM, whiten=case.name == WHITENED, impl=impl))

    def norm(**inputs: Tensor) -> tuple[Tensor, ...]:
        return (op(**inputs, eps=NORM_EPS, impl=impl),)

    def gate(**inputs: Tensor) -> tuple[Tensor, ...]:
        return (op(**inputs, impl=impl),)

    own = {"fused_reward": reward, "fused_gae": gae, "ppo_loss": loss, "rms_norm": norm, "gated_silu": gate}
    return own.get(case.op, score)


def tlcr_implementations(op: str, device: str, *, interpreted: bool = False) -> list[tuple[str, str | None]]:
    """The fast implementation for this device; where it cannot run, with the reason, and what runs in its place.

    Args:
        op: its name.
        device: "cpu" or "cuda".
        interpreted: those for GPUs, on the CPU.
    """
    status = next(status for status in ops.available() if (status.op, status.device) == (op, device))
    on_gpu = {"score_tokens": "cuda", "score_hidden": "cuda"}
    fast = "cpp" if device == "cpu" and not interpreted else on_gpu.get(op, "triton")
    reason = status.reasons.get(fast)
    return [(fast, reason)] if reason is None else [(fast, reason), ("reference", None)]


class Problem:
    """A case with its inputs on a device, and the truth about a cut of them."""

    def __init__(self, case: Case, device: str, seed: int = 0) -> None:
        # What was compiled for other cases goes: after so many shapes torch.compile would leave a function uncompiled.
        torch.compiler.reset()
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(seed)
        self.inputs, self.trained = _inputs(case, device, generator)
        for name in self.trained:
            self.inputs[name].requires_grad_()
        differentiable = {"": 2, WITH_REFERENCE: 3}.get(case.name, 1) if case.op.startswith("score") else 1
        axes = 2 if "H" in case.axes and "V" not in case.axes else 1
        rows = () if case.op == "ppo_loss" or case.name == LOSS_ONLY else case.shape[:axes]
        self.gradients = tuple(
            torch.randn(rows, generator=generator, device=device) if rows else torch.ones((), device=device)
            for _ in range(differentiable if self.trained else 0)
        )
        self.rows = _checked_rows(case)
        self._truth: list[Tensor] | None = None

    @property
    def truth(self) -> list[Tensor]:
        if self._truth is None:
            cut = {name: x.double() if x.is_floating_point() else x for name, x in self._cut().items()}
            gradients = tuple(
                gradient[: self.rows].double() if gradient.ndim else gradient for gradient in self.gradients
            )
            self._truth = self._run(tlcr_function(self.case, "reference"), cut, gradients)
        return self._truth

    def _cut(self) -> Inputs:
        """The first rows of everything that has rows."""
        whole = ("weight", "ref_weight", "cu_seqlens")
        return {name: x if name in whole else x.detach()[: self.rows] for name, x in self.inputs.items()}

    def _run(self, function: Function, inputs: Inputs, gradients: tuple[Tensor, ...]) -> list[Tensor]:
        """The results, then the gradients of what is trained."""
        inputs = {name: x.detach().requires_grad_() if name in self.trained else x for name, x in inputs.items()}
        results = function(**inputs)
        found = [result.detach() for result in results]
        if gradients:
            wanted = [inputs[name] for name in self.trained]
            found += torch.autograd.grad(results[: len(gradients)], wanted, _as(results, gradients))
        return found

    def error(self, function: Function, *, gradients: bool = True) -> float:
        """The largest error of results and gradients, relative to the largest true value of each.

        The function runs on the whole inputs, so that what was compiled for their shape is what is checked, once with
        no gradient asked for and once with; gradients come from the compared rows alone. Only a mean over all tokens is
        taken of the cut.

        Args:
            function: an implementation.
            gradients: whether those are compared; without, the results alone.

        Raises:
            Wrong: above LARGEST_ERROR, or of another shape.
        """
        inputs, wanted = (self._cut() if self.case.name == LOSS_ONLY else self.inputs), self.gradients
        if inputs is self.inputs and wanted and wanted[0].ndim:
            counts = torch.arange(len(wanted[0]), device=self.device) < self.rows
            counts = counts.view(-1, *[1] * (wanted[0].ndim - 1))
            wanted = tuple(gradient * counts for gradient in wanted)
        bound = LARGEST_ERROR[self.case.dtype]
        if self.case.name == WHITENED:
            # Trainers divide by the count minus one, tlcr by the count.
            bound += 1 / max(int(self.inputs["mask"].sum()), 1)
        with torch.no_grad():
            results = function(**inputs)
        true = self.truth[: len(self.truth) - len(self.trained)]
        errors = [_error(got, right, bound) for got, right in zip(results, true, strict=True)]
        if gradients and self.trained:
            found = self._run(function, inputs, wanted)
            errors += [_error(got, right, bound) for got, right in zip(found, self.truth, strict=True)]
        return largest(errors)

    def work(self, function: Function, which: str) -> Work:
        """The calls of one pass."""
        wanted = [self.inputs[name] for name in self.trained]

        def forward() -> None:
            with torch.no_grad():
                function(**self.inputs)

        def ready() -> Callable[[], object]:
            results = function(**self.inputs)[: len(self.gradients)]
            gradients = _as(results, self.gradients)
            return lambda: torch.autograd.grad(results, wanted, gradients)

        if which == "forward":
            return calls(forward)
        return calls_after(ready) if which == "backward" else calls(lambda: ready()())


def _as(results: Iterable[Tensor], gradients: Iterable[Tensor]) -> list[Tensor]:
    """Gradients in the dtype of their results, which is not the same with all rivals."""
    return [gradient.to(result.dtype) for result, gradient in zip(results, gradients, strict=False)]


def _checked_rows(case: Case) -> int:
    if case.name == LOSS_ONLY:
        return 64
    if "V" in case.axes:
        return CHECKED_TOKENS
    if case.op == "ppo_loss" or case.name in (WHITENED, PACKED):
        return case.elements  # a sum over all
    return max(1, CHECKED_SMALL // case.shape[1])


def _error(got: Tensor, true: Tensor, bound: float) -> float:
    got = got[: true.shape[0]] if got.ndim else got
    if got.shape != true.shape:
        raise Wrong(f"wrong result: shape {tuple(got.shape)}, wanted {tuple(true.shape)}")
    error = float((got.double() - true).abs().max() / true.abs().max().clamp(min=1e-30))
    if not error <= bound:
        raise Wrong(f"wrong result: relative error {error:.1e} against float64, wanted at most {bound:.0e}")
    return error


def _inputs(case: Case, device: str, generator: torch.Generator) -> tuple[Inputs, tuple[str, ...]]:
    """The arguments of the op, and those that are trained."""

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    if "V" in case.axes:
        N, V = case.axes["N"], case.axes["V"]
        inputs = {"token_ids": integers(0, V, N)}
        models = ("", "ref_") if case.name == WITH_REFERENCE else ("",)
        if case.op == "score_tokens":
            for model in models:
                inputs[f"{model}logits"] = normal(N, V, dtype=case.dtype)
            if len(models) == 2:  # near the policy, as a reference is
                inputs["ref_logits"].mul_(0.3).add_(inputs["logits"])
            return inputs, ("logits",)
        H = case.axes["H"]
        for model in models:
            inputs[f"{model}hidden"] = normal(N, H, dtype=case.dtype)
            inputs[f"{model}weight"] = normal(V, H, dtype=case.dtype).div_(H**0.5)
        return inputs, ("hidden", "weight")

    if "H" in case.axes:
        N, H = case.shape
        if case.op == "rms_norm":
            inputs = {"x": normal(N, H, dtype=case.dtype), "weight": normal(H, dtype=case.dtype).mul_(0.1).add_(1)}
        else:
            inputs = {name: normal(N, H, dtype=case.dtype) for name in ("gate", "up")}
        return inputs, tuple(inputs)

    B, T = case.shape
    lengths = integers(max(1, T // 4), T + 1, B)
    prefix = torch.arange(T, device=device) < lengths.unsqueeze(1)
    if case.op == "fused_reward":
        classes = 3 if case.name == "3 classes" else 2
        logits = normal(B, T, classes, dtype=case.dtype)
        return {"logits": logits, "mask": prefix, "kl": normal(B, T), "terminal": normal(B)}, ()
    if case.op == "ppo_loss":
        names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
        inputs = {name: normal(B, T).mul_(0.3) for name in names}
        for name in names:
            # Of few digits, so that no difference is rounded and none lies at a clip: among millions of tokens some
            # would fall to one side in float32 and to the other in float64.
            inputs[name].mul_(1024).round_().div_(1024)
        return inputs | {"mask": prefix}, ("logprobs", "values")
    pair = {"rewards": normal(B, T), "values": normal(B, T)}
    if case.name == PACKED:
        # Sequences of all lengths, as many tokens in all as there are in the rows.
        ends = torch.randperm(B * T - 1, generator=generator, device=device)[: B - 1].sort().values + 1
        offsets = pad(pad(ends, (0, 1), value=B * T), (1, 0)).int()
        return {name: x.flatten() for name, x in pair.items()} | {"cu_seqlens": offsets}, ()
    if case.name == HOLES:
        return pair | {"mask": torch.rand(B, T, generator=generator, device=device) < 0.8}, ()
    return pair if case.name == "" else pair | {"mask": prefix}, ()


VOCABULARIES = (32_000, 50_257, 128_256, 151_936)
GAE_NAMES = ("", PADDED, HOLES, PACKED, WHITENED)


def cpu_cases() -> Iterator[Case]:
    """The most important cases come first; then series, cases larger than the last-level cache, and other sizes."""
    bf16 = torch.bfloat16
    head = (256, 256, 32_000)
    yield Case("score_tokens", WITH_REFERENCE, (128, 128_256))
    yield Case("score_tokens", "", (128, 128_256))
    yield from (Case("fused_gae", name, (64, 1024), passes=FORWARD) for name in GAE_NAMES)
    yield Case("fused_reward", "", (64, 1024), passes=FORWARD)
    yield Case("ppo_loss", "", (64, 1024))
    yield Case("score_hidden", "", head)
    yield Case("score_hidden", LOSS_ONLY, head, passes=("forward", "both"))
    # The layers of a 135M model, over a micro-batch.
    yield from (Case("rms_norm", "", (1024, 576), dtype) for dtype in (torch.float32, bf16))
    yield from (Case("gated_silu", "", (1024, 1536), dtype) for dtype in (torch.float32, bf16))
    yield from (
        Case("score_tokens", WITH_REFERENCE, (128, V), dtype, passes=("forward", "both"), rivals=False)
        for V in VOCABULARIES
        for dtype in (torch.float32, bf16)
    )
    yield from _series(
        tokens=(16, 1024), token_points=5, rows=(32, 32_768), row_points=5, hidden=(64, 256, 16_384), hidden_points=4
    )
    # Several times the last-level cache.
    yield Case("score_tokens", "", (2048, 151_936), passes=("forward", "both"))
    yield Case("fused_gae", PADDED, (16_384, 4096), passes=FORWARD)
    yield Case("fused_reward", "", (16_384, 4096), passes=FORWARD)
    yield Case("ppo_loss", "", (8192, 2048), passes=("forward", "both"))
    # Sizes at which the call costs more than the work.
    yield from (Case("score_tokens", "", size) for size in ((4, 32_000), (128, 64)))
    yield from (Case(op, "", (4, 64), passes=FORWARD) for op in ("fused_gae", "fused_reward"))
    yield from (Case(op, "", (4, 64)) for op in ("ppo_loss", "rms_norm", "gated_silu"))
    yield Case("score_tokens", WITH_REFERENCE, (128, 128_256), bf16)
    yield Case("fused_gae", PADDED, (512, 2048), passes=FORWARD)
    yield Case("ppo_loss", "", (512, 2048))
    yield Case("score_hidden", "", head, bf16)
    yield Case("fused_reward", "3 classes", (64, 1024), passes=FORWARD)
    yield Case("score_hidden", WITH_REFERENCE, head)


def gpu_cases() -> Iterator[Case]:
    """The same order, at the sizes of a GPU."""
    bf16 = torch.bfloat16
    yield Case("score_tokens", WITH_REFERENCE, (8192, 128_256), bf16)
    yield from (Case("fused_gae", name, (64, 1024), passes=FORWARD) for name in (PADDED, "", HOLES, PACKED, WHITENED))
    yield Case("fused_reward", "", (64, 1024), passes=FORWARD)
    yield Case("ppo_loss", "", (64, 1024))
    yield Case("score_tokens", "", (8192, 151_936), bf16)
    yield Case("score_hidden", "", (8192, 4096, 128_256), bf16)
    yield Case("score_hidden", LOSS_ONLY, (8192, 4096, 128_256), bf16, passes=("forward", "both"))
    yield from _series(
        tokens=(64, 1024),
        token_points=6,
        rows=(512, 32_768),
        row_points=5,
        hidden=(1024, 2048, 16_384),
        hidden_points=4,
    )
    yield Case("fused_gae", PADDED, (2048, 4096), passes=FORWARD)
    yield Case("score_hidden", WITH_REFERENCE, (8192, 4096, 128_256), bf16)
    yield from (Case("score_tokens", WITH_REFERENCE, (4096, V), bf16) for V in VOCABULARIES)
    yield Case("score_tokens", WITH_REFERENCE, (4096, 128_256))
    yield Case("score_tokens", "", (4, 32_000), bf16)
    yield from (Case(op, "", (4, 64), passes=FORWARD) for op in ("fused_gae", "fused_reward"))
    yield Case("fused_gae", PADDED, (8192, 8192), passes=FORWARD)
    yield Case("fused_reward", "", (8192, 8192), passes=FORWARD)
    yield Case("fused_reward", "3 classes", (64, 1024), passes=FORWARD)
    yield Case("ppo_loss", "", (8192, 4096))


def short_cases(device: str) -> Iterator[Case]:
    """Each op at a size that fills the device, and where it has one, a call that costs more than its work."""
    large = device == "cuda"
    B, T, N = (8192, 4096, 8192) if large else (64, 1024, 32)
    yield Case("score_tokens", WITH_REFERENCE, (N, 128_256), torch.bfloat16, rivals=False)
    yield Case("fused_gae", PADDED, (B, T), passes=FORWARD, rivals=False)
    yield Case("fused_gae", WHITENED, (B, T), passes=FORWARD)  # which plain torch does not do
    yield Case("ppo_loss", "", (B, T), rivals=False)
    yield Case("fused_reward", "", (B, T), passes=FORWARD, rivals=False)
    yield from (Case(op, "", (4, 64), passes=FORWARD, rivals=False) for op in ("fused_gae", "fused_reward"))
    yield Case("ppo_loss", "", (4, 64), rivals=False)
    yield Case("score_tokens", "", (4, 32_000), torch.bfloat16, rivals=False)
    yield Case("score_hidden", "", (N, 4096, 128_256) if large else (N, 256, 32_000), torch.bfloat16, rivals=False)
    yield from (Case(op, "", (1024, 576), rivals=False) for op in ("rms_norm", "gated_silu"))


def interpreted_cases() -> Iterator[Case]:
    """Every op and pass, of a size for an interpreter."""
    yield from (Case("fused_gae", name, (2, 6), passes=FORWARD) for name in (PADDED, PACKED))
    yield Case("fused_reward", "", (2, 6), passes=FORWARD)
    yield Case("ppo_loss", "", (2, 6))
    yield Case("score_tokens", WITH_REFERENCE, (3, 50), torch.bfloat16)
    yield Case("score_hidden", "", (3, 8, 50))
    yield from (Case(op, "", (3, 8)) for op in ("rms_norm", "gated_silu"))


def _series(
    *,
    tokens: tuple[int, int],
    token_points: int,
    rows: tuple[int, int],
    row_points: int,
    hidden: tuple[int, int, int],
    hidden_points: int,
) -> Iterator[Case]:
    """One axis doubled at a time, from the size that is named: B and T, N and V. N stands for B as for T."""
    seen = set()
    for op, name in (("fused_gae", PADDED), ("fused_reward", ""), ("ppo_loss", "")):
        passes = PASSES[2:] if op == "ppo_loss" else FORWARD
        B, T = tokens
        sizes = [(B << k, T) for k in range(token_points)] + [(B << 2, T >> 2 << k) for k in range(token_points)]
        seen |= {Case(op, name, size, passes=passes, rivals=False) for size in sizes}
    N, V = rows
    for size in [(N << k, V) for k in range(row_points)] + [(N << 2, V >> 2 << k) for k in range(row_points)]:
        seen.add(Case("score_tokens", WITH_REFERENCE, size, passes=("both",), rivals=False))
    N, H, V = hidden
    for wide in [(N << k, H, V) for k in range(hidden_points)] + [(N, H, V << k) for k in range(hidden_points)]:
        seen.add(Case("score_hidden", "", wide, passes=("both",), rivals=False))
    yield from sorted(seen, key=lambda case: (case.op, case.name, case.shape))


def once(cases: Iterable[Case]) -> list[Case]:
    """Each case once; a case with plain torch only is left out if the same inputs also come with all rivals."""
    listed = list(dict.fromkeys(cases))
    whole = {(case.op, case.name, case.shape, case.dtype) for case in listed if case.rivals}
    return [case for case in listed if case.rivals or (case.op, case.name, case.shape, case.dtype) not in whole]


def case_row(case: Case, which: str) -> dict[str, Any]:
    """What a row says of its case and pass."""
    moved = traffic(case, which)
    return {
        "op": case.op,
        "case": case.name,
        "pass": which,
        "shape": case.axes,
        "dtype": str(case.dtype)[6:],
        "bytes_moved": moved.bytes,
        "bytes_formula": moved.formula,
        "flops": moved.flops,
    }
