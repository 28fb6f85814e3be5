"""Every op with every kernel of a device, forward and backward, at sizes that end inside a tile or a vector.

    python -m tests.ops.every_op --device cuda                  what compute-sanitizer watches (benchmarks/gpu)
    python -m tests.ops.every_op --impl reference --small       the same calls on a CPU

The calls are those of tests/ops/examples.py, so a new op is among them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.ops.examples import CALLS, V, call_inputs, calls
from tlcr import ops

LENGTHS = (1, 7, 1025, 2500)
VOCABULARIES = (5, 50, 2049, 50_257)
HALF = ("logits", "hidden", "head", "lm_head", "policy", "reference", "norm")
"""Inputs that may be of half precision while the others stay float32."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--impl", help="default: every kernel, and the reference where there is none")
    parser.add_argument("--small", action="store_true", help="the shortest rows only")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    number = 0
    for op, impl in implementations(options.device, options.impl):
        calls(options.device)[op](impl=impl)
        call, differentiated = CALLS[op]
        for inputs in examples(op, options.device, small=options.small):
            leaves = [inputs[name].requires_grad_() for name in differentiated]
            result = call(inputs, impl)
            if leaves:
                torch.autograd.grad(result, leaves)
            number += 1
        if options.device == "cuda":
            torch.cuda.synchronize()
        sys.stdout.write(f"{op} {impl}\n")
    sys.stdout.write(f"{number} calls on {options.device}\n")


def implementations(device: str, only: str | None) -> Iterator[tuple[str, str]]:
    """An op and what runs it; torch's own kernels only where tlcr has none."""
    for status in ops.available():
        if status.device == device and status.op in CALLS:
            kernels = [impl for impl in status.usable if impl != "reference"] or ["reference"]
            yield from ((status.op, impl) for impl in ([only] if only else kernels) if impl in status.usable)


def examples(op: str, device: str, *, small: bool) -> Iterator[dict[str, Any]]:
    for length in LENGTHS[:2] if small else LENGTHS:
        inputs = call_inputs(length, device)
        yield inputs
        yield {name: value.bfloat16() if name in HALF else value for name, value in inputs.items()}
    if not op.startswith("score_"):
        return
    for vocabulary in VOCABULARIES[:2] if small else VOCABULARIES:
        for dtype in (torch.float32, torch.bfloat16):
            yield with_vocabulary(call_inputs(3, device), vocabulary, dtype)


def with_vocabulary(inputs: dict[str, Any], vocabulary: int, dtype: torch.dtype) -> dict[str, Any]:
    wide: dict[str, Tensor] = {
        name: torch.randn(*inputs[name].shape[:-1], vocabulary, device=inputs[name].device).to(dtype)
        for name in ("policy", "reference")
    }
    wide["lm_head"] = torch.randn(vocabulary, inputs["lm_head"].shape[-1], device=inputs["lm_head"].device).to(dtype)
    wide["hidden"] = inputs["hidden"].to(dtype)
    return {**inputs, **wide, "ids": inputs["ids"] * (vocabulary - 1) // (V - 1)}


if __name__ == "__main__":
    main()
