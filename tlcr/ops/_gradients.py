"""How gradients pass the operators of `_library`: each forward operator has a backward one, called here.

A gradient that did not come stays None on its way to the kernel, which then leaves out its term. Second derivatives are
refused by torch, as for the reference.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SetupContext = Callable[[Any, tuple[Any, ...], Any], None]
Backward = Callable[..., tuple[Tensor | None, ...]]


def _score_tokens(operators: Any) -> tuple[SetupContext, Backward]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        logits, token_ids, ref_logits, temperature, temperatures = inputs
        ctx.temperature = temperature
        _keep(ctx, output, (logits, token_ids, ref_logits, temperatures), with_reference=ref_logits is not None)

    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, token_ids, ref_logits, temperatures, *results = ctx.saved_tensors
        grad_logits = operators.score_tokens_backward(
            grads[0], grads[1], grads[3], logits, token_ids, ref_logits, ctx.temperature, temperatures, *results
        )
        return grad_logits, None, None, None, None

    return setup_context, backward


def _score_hidden(operators: Any) -> tuple[SetupContext, Backward]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, temperature, temperatures, chunk_tokens = inputs
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        _keep(ctx, output, (*tensors, temperatures), with_reference=tensors[4] is not None)

    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, temperatures, entropy, kl, stats, ref_stats = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wanted = needs[0], needs[1], needs[3]
        options = ctx.temperature, temperatures, ctx.chunk_tokens
        results = entropy, kl, stats, ref_stats
        got = operators.score_hidden_backward(grads[0], grads[1], grads[3], *tensors, *options, *results, *wanted)
        hidden, weight, bias = (grad if wants else None for grad, wants in zip(got, wanted, strict=True))
        return hidden, weight, None, bias, None, None, None, None, None, None

    return setup_context, backward


def _keep(ctx: Any, output: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...], *, with_reference: bool) -> None:
    """Keep what scoring's backward pass reads. Only logprobs, entropy and a KL to a reference have gradients."""
    _, entropy, ref_logprobs, kl, stats, ref_stats = output
    ctx.save_for_backward(*inputs, entropy, kl, stats, ref_stats)
    constants = (ref_logprobs, stats, ref_stats) if with_reference else (ref_logprobs, kl, stats, ref_stats)
    ctx.mark_non_differentiable(*constants)
    ctx.set_materialize_grads(False)


def _ppo_loss(operators: Any) -> tuple[SetupContext, Backward]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *inputs_of_backward, _, _, _ = inputs
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs_of_backward]
        ctx.others = [value for value in inputs_of_backward if not isinstance(value, Tensor)]
        _, stats, row_weights = output
        ctx.save_for_backward(row_weights, *(value for value in inputs_of_backward if isinstance(value, Tensor)))
        ctx.mark_non_differentiable(stats, row_weights)
        ctx.set_materialize_grads(False)

    @once_differentiable
    def backward(ctx: Any, g_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if g_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        row_weights, *tensors = ctx.saved_tensors
        from_tensors, from_others = iter(tensors), iter(ctx.others)
        arguments = [next(from_tensors if is_tensor else from_others) for is_tensor in ctx.is_tensor]
        # Where logprobs, values, entropy and kl stand among the inputs.
        places = (0, 7, 12, 14)
        wanted = [ctx.needs_input_grad[place] for place in places]
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        got = operators.ppo_loss_backward(g_loss, row_weights, *arguments, *wanted)
        for place, gradient, wants in zip(places, got, wanted, strict=True):
            gradients[place] = gradient if wants else None
        return tuple(gradients)

    return setup_context, backward


def _rms_norm(operators: Any) -> tuple[SetupContext, Backward]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _ = inputs
        _, scales = output
        ctx.save_for_backward(x, weight, scales)
        ctx.mark_non_differentiable(scales)
        ctx.set_materialize_grads(False)

    @once_differentiable
    def backward(ctx: Any, g_y: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if g_y is None:
            return None, None, None
        return (*operators.rms_norm_backward(g_y, *ctx.saved_tensors), None)

    return setup_context, backward


def _gated_silu(operators: Any) -> tuple[SetupContext, Backward]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @once_differentiable
    def backward(ctx: Any, g_y: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor, Tensor] = operators.gated_silu_backward(g_y, *ctx.saved_tensors)
        return gradients

    return setup_context, backward


GRADIENTS: dict[str, Callable[[Any], tuple[SetupContext, Backward]]] = {
    "score_tokens": _score_tokens,
    "score_hidden": _score_hidden,
    "ppo_loss": _ppo_loss,
    "rms_norm": _rms_norm,
    "gated_silu": _gated_silu,
}


def eager_function(op: str, operators: Any) -> type[torch.autograd.Function]:
    """The operator with its registered gradient, as a torch.autograd.Function."""
    setup_context, backward_of = GRADIENTS[op](operators)
    operator = getattr(operators, op).default

    class EagerFunction(torch.autograd.Function):
        # Without torch's own setup_context, before which it inspects the signature of forward on every call.
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = operator(*args)
            setup_context(ctx, args, output)
            return output

        backward = staticmethod(backward_of)

    return EagerFunction
