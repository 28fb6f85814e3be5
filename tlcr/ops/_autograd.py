"""Builds the autograd functions of an operator from the names in its op's `Gradient`.

A result without an incoming gradient passes None to the kernel, which then leaves out its term. The kernels have no
second derivatives, no derivatives in forward mode and no rules for torch.func; whoever asks for one is told so.
"""

import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tlcr.errors import NoDerivative
from tlcr.ops._spec import ArgumentsT, Gradient, Op, ResultT, fields, flattening, grouping, names

SetupContext = Callable[[Any, tuple[Any, ...], Any], None]
Backward = Callable[..., tuple[Tensor | None, ...]]
Pick = Callable[[Sequence[Any]], tuple[Any, ...]]
Recorded = Callable[[Any, list[Any], Sequence[Tensor | None]], Any]
"""Calls the operator, records it for autograd and makes what users get: `recomputing` or `scaling`, of the checked
arguments, their values one by one, and those of them that are trained."""


class _Layout(NamedTuple):
    """Where the arguments of the backward operator come from."""

    places: tuple[int, ...]
    """Of the arguments that have a gradient, among the operator's."""
    incoming: tuple[int, ...]
    """Of the results that have a gradient, among the operator's; one that need not exist is the last."""
    conditional: int | None
    """Where the argument stands without which the last of them does not exist."""
    required: tuple[int, ...]
    """The incoming gradients, in the order above, without which there are no gradients at all."""
    kept: Pick
    """The tensors that the backward pass needs, from the operator's values and results."""
    options: Pick
    """The numbers that it needs, from the operator's values."""
    order: Pick
    """Its arguments, from incoming gradients, kept tensors, options, and which of `places` want a gradient."""


def _layout(op: Op[Any, Any], gradient: Gradient) -> _Layout:
    arguments = names(op.arguments)
    known = (*arguments, *op.results)
    places = tuple(arguments.index(name) for name in gradient.of)
    wanted = fields(gradient.arguments)
    # Results that need not exist come last: where they do not, torch passes fewer gradients.
    results = [field.name.removeprefix("g_") for field in wanted if field.name.startswith("g_")]
    results.sort(key=gradient.only_with.__contains__)
    kept = [field.name for field in wanted if field.kind is Tensor and not field.name.startswith("g_")]
    options = [field.name for field in wanted if field.kind is not Tensor and not field.name.startswith("wants_")]
    sources = [*(f"g_{name}" for name in results), *kept, *options, *(f"wants_{name}" for name in gradient.of)]
    conditions = [arguments.index(name) for name in gradient.only_with.values()]
    return _Layout(
        places=places,
        incoming=tuple(op.results.index(name) for name in results),
        conditional=conditions[0] if conditions else None,
        required=tuple(sources.index(f.name) for f in wanted if f.name.startswith("g_") and not f.optional),
        kept=_pick([known.index(name) for name in kept]),
        options=_pick([arguments.index(name) for name in options]),
        order=_pick([sources.index(field.name) for field in wanted]),
    )


def _pick(indices: Sequence[int]) -> Pick:
    """The function that takes these elements, in this order."""
    if len(indices) > 1:
        return itemgetter(*indices)
    if not indices:
        return lambda values: ()
    only = indices[0]
    return lambda values: (values[only],)


def autograd(op: Op[Any, Any], gradient: Gradient, operators: Any) -> tuple[SetupContext, Backward]:
    """The two functions that torch.library requires; the backward operator is one of `operators`."""
    layout, operator = _layout(op, gradient), getattr(operators, f"{op.name}_backward").default
    constants = [at for at in range(len(op.results)) if at not in layout.incoming]

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = _tuple(output)
        keep_for_backward(ctx, *layout.kept((*inputs, *results)))
        ctx.options = layout.options(inputs)
        missing = layout.conditional is not None and inputs[layout.conditional] is None
        without = [*constants, layout.incoming[-1]] if missing else constants
        ctx.mark_non_differentiable(*[results[at] for at in without])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        incoming = [grads[at] for at in layout.incoming]
        if all(incoming[at] is not None for at in layout.required):
            needed = [ctx.needs_input_grad[place] for place in layout.places]
            saved = kept_tensors(ctx)  # once: under torch's checkpointing this computes them again
            got = operator(*layout.order((*incoming, *saved, *ctx.options, *needed)))
            gradients = [x if wanted else None for x, wanted in zip(_tuple(got), needed, strict=True)]
            once = differentiable_once(op.name, gradient.plain, gradients, (*grads, *saved))
            for place, x in zip(layout.places, once, strict=True):
                found[place] = x
        return tuple(found)

    return keep, backward


def eager_function(
    op: Op[Any, Any], gradient: Gradient, operator: Callable[..., Any], recorded: Recorded
) -> Callable[[Any, list[Any]], Any]:
    """The op with the same gradient, as a function of the checked arguments and of their values one by one: where
    nothing traces it, that costs the host far less than the gradient that is registered with torch.library."""
    name, plain, result = op.name, gradient.plain, op.result
    trained_of = _pick(_layout(op, gradient).places)

    def call(given: Any, values: list[Any]) -> Any:
        trained = trained_of(values)
        if forward_ad._current_level >= 0:
            refuse_forward_mode(name, plain, trained)
        if torch.is_grad_enabled():
            for tensor in trained:
                if tensor is not None and tensor.requires_grad:
                    refuse_transforms(name, plain)
                    return recorded(given, values, trained)
        with below_autograd():
            results = operator(*values)
        return result(given, results)

    return call


# What torch does with each argument and each result of an autograd.Function takes longer than what we do. So of the two
# below only what is trained is an argument of its own, and only what has a gradient is returned. `found` gets all
# results, which are the same objects as what torch returns and makes part of the graph. The `apply` that torch wraps
# around the one we take serves torch.func and defaults of arguments, which we have not.


def recomputing(
    op: Op[Any, Any],
    gradient: Gradient,
    operator: Callable[..., Any],
    backward_operator: Callable[..., Any],
    of_many: Callable[..., Any],
) -> Recorded:
    """Records a call that keeps what the backward operator needs, and calls that for the gradients; `of_many`, the
    operator that torch knows, for many incoming gradients at once (is_grads_batched): torch takes it for each of them.
    """
    name, plain, single = op.name, gradient.plain, len(op.results) == 1
    places, incoming, conditional, required, kept, options, order = _layout(op, gradient)
    arguments: type[tuple[Any, ...]] = op.arguments
    constants = [at for at, field in enumerate(fields(arguments)) if field.kind is Tensor and at not in places]

    class Recomputing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: list[Any], found: list[Tensor], *trained: Tensor | None) -> Any:
            for at in constants:
                tensor = values[at]
                if tensor is not None and tensor.requires_grad:
                    values[at] = tensor.detach()  # which does not keep the graph behind it alive
            with below_autograd():
                results = (operator(*values),) if single else operator(*values)
            keep_for_backward(ctx, *kept((*values, *results)))
            ctx.options = options(values)
            ctx.set_materialize_grads(False)
            found += results
            exist = incoming[:-1] if conditional is not None and values[conditional] is None else incoming
            return tuple([results[at] for at in exist])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            needed = ctx.needs_input_grad[2:]
            for at in required:
                if grads[at] is None:
                    return (None, None, *[None] * len(needed))
            if len(grads) < len(incoming):
                grads = (*grads, None)
            saved = kept_tensors(ctx)  # under torch's checkpointing this computes them again, with autograd
            with below_autograd():
                of_these = of_many if any(map(batched, grads)) else backward_operator
                got = of_these(*order((*grads, *saved, *ctx.options, *needed)))
            gradients = [x if wanted else None for x, wanted in zip(_tuple(got), needed, strict=True)]
            return None, None, *differentiable_once(name, plain, gradients, (*grads, *saved))

    result, apply = op.result, super(torch.autograd.Function, Recomputing).apply

    def recorded(given: Any, values: list[Any], trained: Sequence[Tensor | None]) -> Any:
        found: list[Tensor] = []
        apply(values, found, *trained)
        return result(given, found[0] if single else found)

    return recorded


def scaling(op: Op[Any, Any], gradient: Gradient, operator: Callable[..., Any]) -> Recorded:
    """Records a call that computes the gradients with the results, keeps them, and later scales them.

    On the CPU alone, where the factor can be read without a wait: it is 1 where the result is the loss itself.
    """
    name, plain, made, number = op.name, gradient.plain, op.result_type._make, len(op.result_type._fields)

    class Scaling(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: list[Any], found: list[Tensor], *trained: Tensor | None) -> Any:
            needed = ctx.needs_input_grad[2:]
            # Autograd need not be passed over, which takes its time: torch knows no gradient of this operator.
            results = operator(*values, *needed)
            gradients = [x if wanted else None for x, wanted in zip(results[number:], needed, strict=True)]
            # As saved tensors torch would wrap them here and unwrap them there, which takes as long as the kernel.
            ctx.kept = gradients, trained
            ctx.set_materialize_grads(False)
            found += results[:number]
            return found[0]

        @staticmethod
        def backward(ctx: Any, factor: Tensor | None) -> tuple[Tensor | None, ...]:
            if ctx.kept is None:
                _ = ctx.saved_tensors  # none, but torch raises here what it says to a second backward pass
            gradients, trained = ctx.kept
            is_last = not graph_is_kept()
            if is_last:
                ctx.kept = None  # so that a parameter takes its gradient as it is
            if factor is None:
                return (None, None, *[None] * len(gradients))
            if (
                not is_last
                or torch.is_grad_enabled()
                or type(factor) is not Tensor
                or is_batched_tensor(factor)
                or watched()
            ):
                scaled = [None if x is None else _times(x, factor) for x in gradients]
                return None, None, *differentiable_once(name, plain, scaled, (factor, *trained))
            value = factor.item()
            if value != 1:
                times = Tensor.mul_ if math.isfinite(value) else _times  # for the last time, so in place
                gradients = [None if x is None else times(x, factor) for x in gradients]
            return None, None, *gradients

    apply = super(torch.autograd.Function, Scaling).apply

    def recorded(given: Any, values: list[Any], trained: Sequence[Tensor | None]) -> Any:
        found: list[Tensor] = []
        apply(values, found, *trained)
        return made(found)

    return recorded


graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph
"""Whether another backward pass may follow the one that is under way."""


def keep_for_backward(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward`, for tensors of inference mode too.

    Those have no version that could show a change, so autograd takes none of them. They are kept as they are: a clone
    of a reference's logits would be as large as they are.
    """
    of_inference = []
    if not torch.compiler.is_compiling():  # which cannot be asked of what is compiled
        of_inference = [at for at, x in enumerate(tensors) if x is not None and x.is_inference()]
    ctx.of_inference = {at: tensors[at] for at in of_inference}
    if of_inference:
        tensors = tuple([None if at in ctx.of_inference else x for at, x in enumerate(tensors)])
    ctx.save_for_backward(*tensors)


def kept_tensors(ctx: Any) -> tuple[Any, ...]:
    """What `keep_for_backward` was given. After the last backward pass autograd lets go of it, and so must ctx."""
    saved, of_inference = ctx.saved_tensors, ctx.of_inference
    if not of_inference:
        return saved
    if not graph_is_kept():
        ctx.of_inference = {}
    return tuple([of_inference.get(at, x) for at, x in enumerate(saved)])


def without_inference(op: Op[ArgumentsT, ResultT]) -> Callable[[ArgumentsT], ResultT]:
    """The op's reference if it is plain torch, whose operators cannot keep a tensor of inference mode: they get a copy
    of each."""
    flat, grouped = flattening(op.arguments), grouping(op.arguments)

    def run(given: ArgumentsT) -> ResultT:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            values = flat(given)
            found = [at for at, x in enumerate(values) if isinstance(x, Tensor) and x.is_inference()]
            for at in found:
                values[at] = values[at].clone()
            if found:
                given = grouped(values)
        return op.reference(given)

    return run


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    """A gradient times a number. A token that does not count keeps its 0 where the number is infinite or NaN."""
    return torch.where(gradient == 0, gradient, gradient * factor)


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def differentiable_once(
    op: str, plain: bool, found: Sequence[Tensor | None], sources: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """The gradients, as functions of which none has a derivative where the backward pass is itself recorded.

    Without this they would be constants there, and a second derivative would lack their part without a word. torch's
    `once_differentiable` overlooks a gradient that came as a constant, and costs time in every backward pass.

    Args:
        op: the op's name.
        plain: `Gradient.plain` of the op.
        found: its gradients.
        sources: what they were computed from. Those of them that need a gradient are how a second derivative that is
            asked of one tensor alone gets here.

    Returns:
        the same gradients.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return found
    leaves = [None if result is None else result.detach().requires_grad_() for result in found]
    from_ = [source for source in sources if source is not None and source.requires_grad]
    once: tuple[Tensor | None, ...] = _DifferentiableOnce.apply(op, plain, len(leaves), *leaves, *from_)
    return once


class _DifferentiableOnce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, op: str, plain: bool, count: int, *found_and_sources: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.error = _no_derivative(op, plain, "no second derivatives (create_graph=True)")
        return found_and_sources[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise ctx.error


def batched(gradient: Tensor | None) -> bool:
    """Whether it stands for many incoming gradients at once (is_grads_batched)."""
    return gradient is not None and is_batched_tensor(gradient)


is_batched_tensor = torch._C._functorch.is_legacy_batchedtensor


def refuse_batched(op: str, grads: Sequence[Tensor | None]) -> None:
    """Raises where many gradients come at once, for a backward pass that fills tensors of its own."""
    if any(map(batched, grads)):
        raise NoDerivative(
            f"{op} of impl='reference' takes one incoming gradient at a time (is_grads_batched=True); call "
            "torch.autograd.grad for each, or take the compiled kernels, which have no such bound"
        )


def count_change(written: Tensor | Sequence[Tensor]) -> None:
    """Counts a change in place, as most of torch's own operators do: a backward pass that needs what was there before
    then raises, where it would take what is there now. A tensor of inference mode counts nothing."""
    if torch.compiler.is_compiling():
        return  # what is compiled counts by itself
    tensors = (written,) if isinstance(written, Tensor) else written
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def watched() -> bool:
    """Whether a mode or a transform wants to see the operators that are called."""
    return bool(torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active())


def refuse_transforms(op: str, plain: bool) -> None:
    """Raises inside torch.func.grad, vmap and the like."""
    if torch._C._are_functorch_transforms_active():
        raise _no_derivative(op, plain, "no derivatives by torch.func, only by torch.autograd")


def refuse_forward_mode(op: str, plain: bool, trained: Sequence[Tensor | None]) -> None:
    """Raises where a tensor has a tangent: a result without one would say that nothing depends on the tensor."""
    if forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in trained):
        raise _no_derivative(op, plain, "no derivatives in forward mode")


def _no_derivative(op: str, plain: bool, what: str) -> NoDerivative:
    remedy = "pass impl='reference', which is plain torch" if plain else "no implementation of it has them"
    return NoDerivative(f"{op} has {what}; {remedy}")


# Calls the kernel directly and not the registered gradient, as torch.library itself does in its autograd function.
below_autograd = torch._C._AutoDispatchBelowAutograd
