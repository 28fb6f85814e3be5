"""One step of AdamW over the bfloat16 weights of a 135M model: tlcr's split masters beside what torch offers.

    python -m benchmarks.optimizer                    on this machine; on its GPU with --device cuda

prints milliseconds of a step, wall-clock medians of steps in alternation; the bytes that a form keeps for each weight,
beside the weight and its gradient; and how far a hundred updates of 1e-6 move a weight whose neighbours in bfloat16 are
4e-6 away, in such updates.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import chain, count

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.clocks import CPUClocks, GPUClocks, calls
from tlcr import ops
from tlcr.training.optim import build_optimizer

LAYERS, WIDTH, INNER, KEYS, VOCABULARY = 30, 576, 1536, 192, 49_152
RATE, UPDATES = 1e-6, 100
WIDTH_OF_TABLE = 110  # where the output is no terminal

Form = Callable[[list[nn.Parameter]], tuple[Callable[[], object], Callable[[], list[Tensor]]]]
"""Takes parameters with gradients; returns a function that makes a step and one that returns its state."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model whose weights they are")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps, made = {}, Table(box=SIMPLE, pad_edge=False)
    for column in ("", "ms a step", "ratio", "bytes a weight", f"kept of {UPDATES} updates"):
        made.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, form in FORMS.items():
        steps[name] = form(weights(options.layers, options.device))
        steps[name][0]()
    clocks = (GPUClocks if options.device == "cuda" else CPUClocks)(case_seconds=20)
    found = clocks.alternate({name: calls(step) for name, (step, _) in steps.items()})
    size = sum(parameter.numel() for parameter in weights(options.layers, "meta"))
    ours = found["tlcr"]["wall"].median
    for (name, form), (_, state) in zip(FORMS.items(), steps.values(), strict=True):
        kept = sum(tensor.numel() * tensor.element_size() for tensor in state()) / size
        seconds = found[name]["wall"].median
        made.add_row(name, f"{1e3 * seconds:.1f}", f"{seconds / ours:.2f}x", f"{kept:.1f}", f"{kept_updates(form):.0f}")
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_OF_TABLE)
    console.print(f"{size / 1e6:.0f}M weights, {options.device}, {options.threads} threads of the CPU", made)


def weights(layers: int, device: str) -> list[nn.Parameter]:
    """The weights of a Llama, each with a gradient; with 30 layers they are 135M parameters."""
    layer = [(WIDTH, WIDTH)] * 2 + [(KEYS, WIDTH)] * 2 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)] + [(WIDTH,)] * 2
    parameters = [
        nn.Parameter(torch.randn(shape, dtype=torch.bfloat16, device=device))
        for shape in [*layer * layers, (WIDTH,), (VOCABULARY, WIDTH)]
    ]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def _split_masters(parameters: list[nn.Parameter], impl: str = "auto") -> tuple[Callable[[], object], ...]:
    optimizer = build_optimizer([{"params": parameters, "lr": RATE, "weight_decay": 0.0}])
    if impl == "auto":
        return optimizer.step, partial(_state_of, optimizer)
    numbers = count(1)
    moments = [[torch.zeros_like(p, dtype=torch.float32) for _ in range(2)] for p in parameters]
    remainders = [torch.zeros_like(p, dtype=torch.int16) for p in parameters]

    def step() -> None:
        number = next(numbers)
        for parameter, (mean, square), remainder in zip(parameters, moments, remainders, strict=True):
            tensors = parameter.detach(), parameter.grad, mean, square, remainder
            ops.adamw_step(*tensors, learning_rate=RATE, betas=(0.9, 0.95), step=number, impl=impl)

    return step, lambda: [*chain(*moments), *remainders]


def _masters_of_torch(parameters: list[nn.Parameter]) -> tuple[Callable[[], object], ...]:
    """A float32 copy of every weight, and of every gradient while stepping, as mixed-precision trainers keep them."""
    masters = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
    optimizer = torch.optim.AdamW(masters, lr=RATE, weight_decay=0.0, fused=True)

    def step() -> None:
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad = parameter.grad.float()
        optimizer.step()
        torch._foreach_copy_([p.detach() for p in parameters], [m.detach() for m in masters])
        optimizer.zero_grad()

    return step, lambda: [*_state_of(optimizer), *masters]


def _bfloat16_of_torch(parameters: list[nn.Parameter]) -> tuple[Callable[[], object], ...]:
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    return optimizer.step, partial(_state_of, optimizer)


def _state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"]


def kept_updates(form: Form) -> float:
    parameter = nn.Parameter(torch.full((1,), 2**-10).bfloat16())
    before = parameter.item()
    step, _ = form([parameter])
    for _ in range(UPDATES):
        parameter.grad = torch.ones_like(parameter)
        step()
    return (before - parameter.item()) / RATE


FORMS: dict[str, Form] = {
    "tlcr": _split_masters,
    "tlcr's specification": partial(_split_masters, impl="reference"),
    "torch, float32 masters beside the weights": _masters_of_torch,
    "torch, bfloat16 states": _bfloat16_of_torch,
}


if __name__ == "__main__":
    main()
