"""Builds the autograd functions of an operator from the names in its op's `Gradient`.

A result without an incoming gradient passes None to the kernel, which then leaves out its term. torch refuses second
derivatives, as it does for the reference.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from tlcr.ops._spec import Gradient, Op, fields, names

SetupContext = Callable[[Any, tuple[Any, ...], Any], None]
Backward = Callable[..., tuple[Tensor | None, ...]]

# The source of an argument of the backward operator.
_INCOMING, _KEPT, _OPTION, _WANTED = range(4)


class _Passes(NamedTuple):
    """The two halves of an operator's gradient, whoever drives them."""

    keep: SetupContext
    """(ctx, the operator's values, its output): remembers what the backward pass needs."""
    gradients: Callable[[Any, Sequence[bool], tuple[Tensor | None, ...]], list[Tensor | None]]
    """(ctx, which values need a gradient, incoming gradients) to the gradients of `Gradient.of`, in its order."""


def autograd(op: Op[Any, Any], gradient: Gradient, operators: Any) -> tuple[SetupContext, Backward]:
    """The two functions that torch.library requires; the backward operator is one of `operators`."""
    passes, places = _passes(op, gradient, operators), _places(op, gradient)

    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for place, result in zip(places, passes.gradients(ctx, ctx.needs_input_grad, grads), strict=True):
            found[place] = result
        return tuple(found)

    return passes.keep, backward


def eager_function(op: Op[Any, Any], gradient: Gradient, operators: Any) -> Callable[[list[Any]], Any]:
    """The operator with the same gradient, as a function of its values: where nothing traces it, that costs the host
    far less than the gradient that is registered with torch.library."""
    passes, places = _passes(op, gradient, operators), _places(op, gradient)
    operator = getattr(operators, op.name).default
    count = len(names(op.arguments))

    class EagerFunction(torch.autograd.Function):
        # Without torch's own setup_context, before which it inspects the signature of forward on every call. Only what
        # is trained is an argument of its own, because torch looks at each argument several times.
        @staticmethod
        def forward(ctx: Any, values: list[Any], *trained: Tensor | None) -> Any:
            with below_autograd():
                output = operator(*values)
            passes.keep(ctx, tuple(values), output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            needed = [False] * count
            for place, wanted in zip(places, ctx.needs_input_grad[1:], strict=True):
                needed[place] = wanted
            return None, *passes.gradients(ctx, needed, grads)

    def call(values: list[Any]) -> Any:
        trained = [values[place] for place in places]
        # In forward mode torch's function says that there is no such gradient; the kernel would drop it.
        if forward_ad._current_level >= 0 or any(tensor is not None and tensor.requires_grad for tensor in trained):
            return EagerFunction.apply(values, *trained)
        with below_autograd():
            return operator(*values)

    return call


def _places(op: Op[Any, Any], gradient: Gradient) -> list[int]:
    """Where the arguments that have a gradient stand among the operator's."""
    arguments = names(op.arguments)
    return [arguments.index(name) for name in gradient.of]


def _passes(op: Op[Any, Any], gradient: Gradient, operators: Any) -> _Passes:
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
    places = _places(op, gradient)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        values = (*inputs, *results)
        ctx.save_for_backward(*[values[at] for at in kept])
        ctx.options = [values[at] for at in options]
        missing = [at for at, argument in only_with if inputs[argument] is None]
        ctx.mark_non_differentiable(*[results[at] for at in (*constants, *missing)])
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, needed: Sequence[bool], grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        if any(grads[at] is None for at in required):
            return [None] * len(places)
        found = grads, ctx.saved_tensors, ctx.options, needed
        got = operator(*[found[source][at] for source, at in sources])
        results = got if isinstance(got, tuple) else (got,)
        return [result if needed[place] else None for place, result in zip(places, results, strict=True)]

    return _Passes(keep, gradients)


# Calls the kernel directly and not the registered gradient, as torch.library itself does in its autograd function.
below_autograd = torch._C._AutoDispatchBelowAutograd
