"""A step of AdamW over the bfloat16 weights of a model, and the norm of their gradients: tlcr beside torch's forms.

    python -m benchmarks.optimizer                                 the weights of a 135M model, on this machine
    python -m benchmarks.optimizer --tensors 300 --size 16384      300 tensors of 2^14
    python -m benchmarks.optimizer --device cuda --tensors 300 --size 1048576

prints milliseconds of a step, medians of steps in alternation: wall-clock time on a CPU, and on a GPU what is slower of
the host and the device, over many calls; the bytes that a form keeps for each weight, the weight and its gradient
among them; and how far a hundred updates of 1e-6 move a weight whose neighbours in bfloat16 are 4e-6 away, in such
updates. Then the same times of measuring and of scaling the gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain, count

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.clocks import CPUClocks, GPUClocks, calls
from tlcr import ops
from tlcr.training.optim import build_optimizer, gradient_norm, scale_gradients

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
    parser.add_argument("--tensors", type=int, help="take so many equal tensors instead of a model's")
    parser.add_argument("--size", type=int, default=2**20, help="of each of these")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = model_shapes(options.layers) if options.tensors is None else [(options.size,)] * options.tensors
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_OF_TABLE)
    size = sum(torch.Size(shape).numel() for shape in shapes)
    console.print(
        f"{size / 1e6:.0f}M weights in {len(shapes)} tensors, {options.device}, {options.threads} threads of the CPU"
    )
    console.print(_steps(shapes, size, options.device))
    console.print(_gradients(weights(shapes, options.device), options.device))


def _steps(shapes: list[tuple[int, ...]], size: int, device: str) -> Table:
    parameters = {name: weights(shapes, device) for name in FORMS}
    steps = {name: form(parameters[name]) for name, form in FORMS.items()}
    seconds = _seconds({name: step for name, (step, _) in steps.items()}, device)
    table = _table("a step", "ms", "ratio", "bytes a weight", f"kept of {UPDATES} updates")
    for name, form in FORMS.items():
        held = [*steps[name][1](), *chain.from_iterable((p, p.grad) for p in parameters[name])]
        held_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held) / size
        table.add_row(*_row(name, seconds), f"{held_bytes:.1f}", f"{kept_updates(form):.0f}")
    return table


def _gradients(parameters: list[nn.Parameter], device: str) -> Table:
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    seconds = _seconds(
        {
            "tlcr": lambda: gradient_norm(parameters),
            "torch's norm, of norms in bfloat16": lambda: torch.nn.utils.get_total_norm(grads),
            "one norm a tensor": lambda: torch.stack(
                [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
            ).norm(),
            "scaling them": lambda: scale_gradients(parameters, 1.0),
        },
        device,
    )
    table = _table("the norm of the gradients", "ms", "ratio")
    for name in seconds:
        table.add_row(*_row(name, seconds))
    return table


def _seconds(works: Mapping[str, Callable[[], object]], device: str) -> dict[str, float]:
    """The median of each, from turns in alternation after a first call, which makes what later ones keep."""
    for work in works.values():
        work()
    on_gpu = device == "cuda"
    found = (GPUClocks if on_gpu else CPUClocks)(case_seconds=20).alternate({n: calls(w) for n, w in works.items()})
    return {name: timings["amortised" if on_gpu else "wall"].median for name, timings in found.items()}


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right", no_wrap=True)
    return table


def _row(name: str, seconds: Mapping[str, float]) -> tuple[str, str, str]:
    return name, f"{1e3 * seconds[name]:.1f}", f"{seconds[name] / seconds['tlcr']:.2f}x"


def model_shapes(layers: int) -> list[tuple[int, ...]]:
    """Of the weights of a Llama; with 30 layers they are 135M parameters."""
    layer = [(WIDTH, WIDTH)] * 2 + [(KEYS, WIDTH)] * 2 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)] + [(WIDTH,)] * 2
    return [*layer * layers, (WIDTH,), (VOCABULARY, WIDTH)]


def weights(shapes: list[tuple[int, ...]], device: str) -> list[nn.Parameter]:
    """Parameters, each with a gradient."""
    parameters = [nn.Parameter(torch.randn(shape, dtype=torch.bfloat16, device=device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def _split_masters(parameters: list[nn.Parameter]) -> tuple[Callable[[], object], ...]:
    optimizer = build_optimizer([{"params": parameters, "lr": RATE, "weight_decay": 0.0}])
    return optimizer.step, partial(_state_of, optimizer)


def _one_by_one(parameters: list[nn.Parameter], impl: str = "auto") -> tuple[Callable[[], object], ...]:
    """A call for each parameter."""
    numbers = count(1)
    moments = [[torch.zeros_like(p, dtype=torch.float32) for _ in range(2)] for p in parameters]
    remainders = [torch.zeros_like(p, dtype=torch.int16) for p in parameters]

    def step() -> None:
        number = next(numbers)
        for parameter, (mean, square), remainder in zip(parameters, moments, remainders, strict=True):
            lists = [parameter.detach()], [parameter.grad], [mean], [square], [remainder]
            ops.adamw_step(*lists, learning_rate=RATE, betas=(0.9, 0.95), step=number, impl=impl)

    return step, lambda: [*chain(*moments), *remainders]


def _float32_of_torch(parameters: list[nn.Parameter]) -> tuple[Callable[[], object], ...]:
    """Weights and gradients are float32."""
    for parameter in parameters:
        gradient, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.float()
        parameter.grad = gradient.float()
    return _plain_of_torch(parameters)


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


def _plain_of_torch(parameters: list[nn.Parameter]) -> tuple[Callable[[], object], ...]:
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    return optimizer.step, partial(_state_of, optimizer)


def _state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"]


def kept_updates(form: Form) -> float:
    parameter = nn.Parameter(torch.full((1,), 2**-10).bfloat16())
    parameter.grad = torch.ones_like(parameter)
    before = parameter.item()
    step, _ = form([parameter])
    for _ in range(UPDATES):
        parameter.grad = torch.ones_like(parameter)
        step()
    return (before - parameter.item()) / RATE


FORMS: dict[str, Form] = {
    "tlcr": _split_masters,
    "tlcr, a call for each tensor": _one_by_one,
    "tlcr's specification": partial(_one_by_one, impl="reference"),
    "torch, float32 weights and gradients": _float32_of_torch,
    "torch, float32 masters beside the weights": _masters_of_torch,
    "torch, bfloat16 states": _plain_of_torch,
}


if __name__ == "__main__":
    main()
