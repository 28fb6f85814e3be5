"""One layer's attention in bfloat16 on a CPU: tlcr's two products beside torch's scaled_dot_product_attention.

    OMP_NUM_THREADS=1 python -m benchmarks.attention

prints milliseconds of processor time, medians of calls in alternation, for about 1000 tokens in rows of several
lengths, with the heads of a 135M model. tlcr takes its own form up to `tlcr.models.attention.SHORT` tokens.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.clocks import CPUClocks, calls, calls_after
from tlcr.models import attention

Form = Callable[..., tuple[Tensor, Any]]

QUERY_HEADS, KEY_HEADS, WIDTH, TOKENS = 9, 3, 64, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = Table(box=SIMPLE, pad_edge=False)
    for column in ("tokens of a row", "sdpa forward", "backward", "two products forward", "backward", "both: ratio"):
        made.add_column(column, justify="right")
    for length in options.lengths:
        sdpa, ours = (milliseconds(form, length) for form in (sdpa_attention_forward, attention.attention))
        made.add_row(str(length), *(f"{x:.2f}" for x in (*sdpa, *ours)), f"{sum(sdpa) / sum(ours):.1f}x")
    Console().print(made)


def milliseconds(form: Form, length: int) -> tuple[float, float]:
    """Milliseconds of a forward pass, and of the backward pass after it."""
    rows = TOKENS // length
    module = SimpleNamespace(is_causal=True, num_key_value_groups=QUERY_HEADS // KEY_HEADS)
    inputs = [
        torch.randn(rows, length, heads, WIDTH, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for heads in (QUERY_HEADS, KEY_HEADS, KEY_HEADS)
    ]
    direction = torch.randn(rows, length, QUERY_HEADS, WIDTH, dtype=torch.bfloat16)

    def forward() -> Tensor:
        return form(module, *inputs, None)[0]

    def ready() -> Callable[[], object]:
        return functools.partial(torch.autograd.grad, forward(), inputs, direction)

    found = CPUClocks().alternate({"forward": calls(forward), "backward": calls_after(ready)})
    return 1e3 * found["forward"]["processor"].median, 1e3 * found["backward"]["processor"].median


if __name__ == "__main__":
    main()
