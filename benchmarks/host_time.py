"""What a small call of each op costs the host, in units of torch.add: at these sizes the call costs more than the work.

    OMP_NUM_THREADS=1 python -m benchmarks.host_time              the kernels of the CPU, work and all
    OMP_NUM_THREADS=1 python -m benchmarks.host_time --no-launch  what stands before a launch of a Triton kernel
    python -m benchmarks.host_time --device cuda                  launches and all, on a GPU

prints microseconds of processor time of the calling thread, medians of calls in alternation, for B = 4, T = 64
(score_tokens: 4 x 32 tokens, V = 64). `--no-launch` needs triton and no GPU: the host's functions run on tensors of the
CPU, and the launcher does nothing. The row of an empty autograd.Function is what torch alone takes to record a function
of three tensors, to call its backward pass and to leave a gradient with each.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.clocks import CPUClocks, calls

B, T, N, V = 4, 64, 32, 64
TRITON = ("fused_gae", "fused_reward", "ppo_loss")
UNIT = "torch.add"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--no-launch", action="store_true")
    parser.add_argument("--rounds", type=int, default=101)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.no_launch:
        do_not_launch()
    works = small_calls(options.device, "triton" if options.no_launch else "auto")
    if options.no_launch:
        works = {name: work for name, work in works.items() if name.split(",")[0] in (*TRITON, UNIT)}
    for work in works.values():
        work()  # the first call imports its kernels, and is no measure of how many fit into a turn
    found = CPUClocks(rounds=options.rounds, case_seconds=float("inf")).alternate(
        {name: calls(work) for name, work in works.items()}
    )
    unit = found[UNIT]["processor"].median
    made = Table(box=SIMPLE, pad_edge=False)
    for column, side in (("call", "left"), ("µs", "right"), (f"in units of {UNIT}", "right")):
        made.add_column(column, justify=side)  # type: ignore[arg-type]
    for name, timings in found.items():
        seconds = timings["processor"].median
        made.add_row(name, f"{1e6 * seconds:.2f}", f"{seconds / unit:.1f}")
    Console().print(made)


def do_not_launch() -> None:
    """Let the ops take their Triton kernels for tensors of the CPU, and a launch be nothing."""
    from triton.runtime.jit import JITFunction

    JITFunction.__getitem__ = lambda kernel, grid: lambda *values, **constants: None
    # The ops read this as they are imported. The kernels are imported at their first call, and must not be interpreted.
    os.environ["TRITON_INTERPRET"] = "1"
    import tlcr.ops  # noqa: F401

    del os.environ["TRITON_INTERPRET"]


def small_calls(device: str, impl: str) -> dict[str, Callable[[], object]]:
    """The calls, by their name in the table."""
    from tlcr import ops

    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    x, y, mask = normal(B, T), normal(B, T), torch.rand(B, T, device=device) < 0.9
    logits_BTC, terminal_B = normal(B, T, 2), normal(B)
    logits, ids = normal(B, N, V), torch.randint(V, (B, N), device=device)
    old, advantages, old_values, returns = (normal(B, T) for _ in range(4))
    trained = [normal(B, T).requires_grad_() for _ in range(3)]
    constants, weight = [tensor.detach() for tensor in trained], normal(T)

    def loss(logprobs: Tensor, values: Tensor, entropy: Tensor) -> Tensor:
        value: dict[str, Any] = {"values": values, "old_values": old_values, "returns": returns}
        return ops.ppo_loss(
            logprobs, old, advantages, mask, **value, entropy=entropy, entropy_coef=0.01, impl=impl
        ).loss

    def both(function: Callable[..., Tensor]) -> Callable[[], object]:
        def run() -> None:
            for tensor in trained:
                tensor.grad = None
            function(*trained).backward()

        return run

    class Empty(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:
            return torch.empty((), device=device)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return tuple(torch.empty((B, T), device=device) for _ in range(3))

    reward: dict[str, Any] = {"kl": x, "kl_coef": 0.1, "terminal": terminal_B, "clip": 5.0}
    return {
        UNIT: lambda: torch.add(x, y),
        "fused_gae": lambda: ops.fused_gae(x, y, mask, gamma=1.0, lam=0.95, impl=impl),
        "fused_reward": lambda: ops.fused_reward(logits_BTC, mask, **reward, impl=impl),
        "score_tokens": lambda: ops.score_tokens(logits, ids, impl="auto"),
        "score_tokens, with reference": lambda: ops.score_tokens(logits, ids, ref_logits=logits, impl="auto"),
        "rms_norm": lambda: ops.rms_norm(x, weight, eps=1e-6, impl="auto"),
        "gated_silu": lambda: ops.gated_silu(x, y, impl="auto"),
        "ppo_loss": lambda: loss(*constants),
        "ppo_loss, forward and backward": both(loss),
        "an empty autograd.Function, forward and backward": both(Empty.apply),
    }


if __name__ == "__main__":
    main()
