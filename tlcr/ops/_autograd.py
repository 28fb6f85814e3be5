"""Builds the autograd functions of an operator from the names in its op's `Gradient`.

A result without an incoming gradient passes None to the kernel, which then leaves out its term. torch refuses second
derivatives, as it does for the reference.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tlcr.ops._spec import Gradient, Op, fields, names

SetupContext = Callable[[Any, tuple[Any, ...], Any], None]
Backward = Callable[..., tuple[Tensor | None, ...]]

# The source of an argument of the backward operator.
_INCOMING, _KEPT, _OPTION, _WANTED = range(4)


def autograd(op: Op[Any, Any], gradient: Gradient, operators: Any) -> tuple[SetupContext, Backward]:
    """The two functions that torch requires; the backward operator is one of `operators`."""
    operator = getattr(operators, f"{op.name}_backward").default
    arguments = names(op.arguments)
    known = (*arguments, *op.results)
    sources: list[tuple[int, int]] = []
    required: list[int] = []
    kept: list[int] = []
    options: list[int] = []
    for name, kind, optional in fields(gradient.arguments):
        if name.startswith("g_"):
            at = op.results.index(name.removeprefix("g_"))
            sources.append((_INCOMING, at))
            required += [] if optional else [at]
        elif name.startswith("wants_"):
            sources.append((_WANTED, arguments.index(name.removeprefix("wants_"))))
        elif kind is Tensor:
            sources.append((_KEPT, len(kept)))
            kept.append(known.index(name))
        else:
            sources.append((_OPTION, len(options)))
            options.append(arguments.index(name))
    incoming = {at for source, at in sources if source == _INCOMING}
    constants = [at for at in range(len(op.results)) if at not in incoming]
    only_with = [(op.results.index(result), arguments.index(name)) for result, name in gradient.only_with.items()]
    places = [arguments.index(name) for name in gradient.of]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        values = (*inputs, *results)
        ctx.save_for_backward(*[values[at] for at in kept])
        ctx.options = [values[at] for at in options]
        missing = [at for at, argument in only_with if inputs[argument] is None]
        ctx.mark_non_differentiable(*[results[at] for at in (*constants, *missing)])
        ctx.set_materialize_grads(False)

    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        gradients: list[Tensor | None] = [None] * len(needed)
        if any(grads[at] is None for at in required):
            return tuple(gradients)
        found = grads, ctx.saved_tensors, ctx.options, needed
        got = operator(*[found[source][at] for source, at in sources])
        for place, result in zip(places, got if isinstance(got, tuple) else (got,), strict=True):
            if needed[place]:
                gradients[place] = result
        return tuple(gradients)

    return setup_context, backward


def eager_function(op: Op[Any, Any], gradient: Gradient, operators: Any) -> type[torch.autograd.Function]:
    """The operator with the same gradient, as a torch.autograd.Function: where nothing traces it, that costs the host
    far less than the gradient that is registered with torch.library."""
    setup_context, backward_of = autograd(op, gradient, operators)
    operator = getattr(operators, op.name).default

    class EagerFunction(torch.autograd.Function):
        # Without torch's own setup_context, before which it inspects the signature of forward on every call.
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with below_autograd():
                output = operator(*args)
            setup_context(ctx, args, output)
            return output

        backward = staticmethod(backward_of)

    return EagerFunction


# Calls the kernel directly and not the registered gradient, as torch.library itself does in its autograd function.
below_autograd = torch._C._AutoDispatchBelowAutograd
