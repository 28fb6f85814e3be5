"""The torch operators behind the implementations: torch's own checks, compiled callers, the dispatch table."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.ops.examples import CALLS, V, call_inputs, samples
from tests.ops.helpers import Backend, assert_close
from tlcr import ops
from tlcr.errors import DataError, NoDerivative, ShapeError
from tlcr.ops import _extension, _library
from tlcr.ops._spec import Op, fields, grouping


def namespaces() -> list[tuple[str, str]]:
    """Namespace and device of the operators that can run here."""
    found = [] if _extension.unavailable("cpu") else [(_library.NAMESPACE, "cpu")]
    if _library.has_triton() and _library.interpreting():
        found.append((_library.INTERPRETED, "cpu"))
    if torch.cuda.is_available() and not _extension.unavailable("cuda"):
        found.append((_library.NAMESPACE, "cuda"))
    return found


def operators() -> list[Any]:
    """Every operator of every namespace that can run here."""
    return [
        pytest.param(namespace, device, operator.name, id=f"{namespace}-{device}-{operator.name}")
        for namespace, device in namespaces()
        for op in ops.OPS
        if has_kernels(op, namespace, device)
        for operator in (op.cpp_operators if (namespace, device) == (_library.NAMESPACE, "cpu") else op.operators)
    ]


def has_kernels(op: Op[Any, Any], namespace: str, device: str) -> bool:
    if namespace == _library.INTERPRETED:
        return op.triton is not None
    return op.cpp if device == "cpu" else op.on_gpu != "reference"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, of 2.15
@pytest.mark.parametrize(("namespace", "device", "op"), operators())
def test_opcheck(namespace: str, device: str, op: str) -> None:
    """torch's own tests: the schema is honoured, the fake agrees with the kernel, gradients are registered rightly."""
    found = getattr(torch.ops, namespace)

    def run(name: str, arguments: list[Any]) -> Any:
        return getattr(found, name)(*to_list(arguments, device))

    for arguments in samples(op, device, run):
        torch.library.opcheck(getattr(found, op).default, arguments)


def to_list(values: list[Any], device: str) -> list[Any]:
    return [value.to(device) if isinstance(value, Tensor) else value for value in values]


def fast_backends(differentiable: bool | None = None) -> list[Any]:
    """Every op with every implementation but the reference; only those that have a gradient or only those that do not,
    if asked for."""
    has_gradient = {op.name: op.gradient is not None for op in ops.OPS}
    return [
        pytest.param(status.op, Backend(status.device, impl), id=f"{status.op}-{status.device}-{impl}")
        for status in ops.available()
        for impl in status.usable
        if impl != "reference" and differentiable in (None, has_gradient[status.op])
    ]


def results_and_gradients(
    call: Callable[[dict[str, Any]], Any], inputs: dict[str, Any], trained: tuple[str, ...]
) -> list[Tensor]:
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in trained}
    result = call(inputs | leaves)
    results = list(result) if isinstance(result, tuple) else [result]
    gradients = list(torch.autograd.grad(results[0], leaves.values())) if trained else []
    return [x.detach() for x in (*results, *gradients)]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own, as inductor starts
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("op", "backend"), fast_backends())
def test_a_compiled_caller_needs_no_graph_break_and_gets_the_same(op: str, backend: Backend, compiler: str) -> None:
    """`torch.compile(fullgraph=True)` of code that calls the door, forward and backward, at two lengths: all that looks
    at our operators, and with inductor the C++ around them, which takes most of the time."""
    call, trained = CALLS[op]
    torch.compiler.reset()
    compiled = torch.compile(lambda inputs: call(inputs, backend.impl), fullgraph=True, dynamic=True, backend=compiler)
    for length in (4, 7):
        inputs = call_inputs(length, backend.device)
        wanted = results_and_gradients(lambda inputs: call(inputs, backend.impl), inputs, trained)
        for got, want in zip(results_and_gradients(compiled, inputs, trained), wanted, strict=True):
            assert_close(got, want.double())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.skipif(_extension.unavailable("cpu") is not None, reason="no C++ kernels here")
def test_compiled_code_refuses_ids_outside_the_vocabulary() -> None:
    logits, wrong = torch.randn(2, V), torch.tensor([0, V])
    with pytest.raises(DataError, match="token_ids holds 11"):
        ops.score_tokens(logits, wrong, impl="cpp")
    compiled = torch.compile(lambda x, y: ops.score_tokens(x, y, impl="cpp").logprobs, fullgraph=True)
    with pytest.raises(IndexError, match=r"token_ids holds 11, wanted ids in \[0, 11\)"):
        compiled(logits, wrong)


@pytest.mark.parametrize(("op", "backend"), fast_backends(differentiable=False))
def test_what_has_no_gradient_asks_for_none(op: str, backend: Backend) -> None:
    inputs = {
        name: value.requires_grad_() if value.is_floating_point() else value
        for name, value in call_inputs(4, backend.device).items()
    }
    results = CALLS[op][0](inputs, backend.impl)
    assert not any(result.requires_grad for result in (results if isinstance(results, tuple) else [results]))


def first_derivatives_only() -> list[Any]:
    """Every op with every implementation that has no other derivatives: for scoring, the specification too."""
    return fast_backends(differentiable=True) + [
        pytest.param(status.op, Backend(status.device, "reference"), id=f"{status.op}-{status.device}-reference")
        for status in ops.available()
        if status.op.startswith("score_")
    ]


def remedy(op: str) -> str:
    return "no implementation of it has them" if op.startswith("score_") else "pass impl='reference'"


@pytest.mark.parametrize(("op", "backend"), first_derivatives_only())
def test_gradients_are_those_of_a_call_whose_activations_are_computed_again(op: str, backend: Backend) -> None:
    """torch's checkpointing calls the op again from within its backward pass, where what it kept is asked for."""
    call, names = CALLS[op]
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        inputs = call_inputs(4, backend.device)
        trained = [inputs[name].requires_grad_() for name in names]
        run = partial(call, inputs, backend.impl)
        found.append(torch.autograd.grad(checkpoint(run, use_reentrant=False) if again else run(), trained))
    assert all(map(torch.equal, *found))


def all_differentiable() -> list[Any]:
    """Every op that has a gradient, with every implementation."""
    return [
        pytest.param(op, Backend(status.device, impl), id=f"{op.name}-{status.device}-{impl}")
        for op in ops.OPS
        if op.gradient is not None
        for status in ops.available()
        if status.op == op.name
        for impl in status.usable
    ]


def of_inference_mode(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.detach().clone()


def gradients_of_all(run: Callable[[], Any], trained: list[Tensor]) -> tuple[Tensor, ...]:
    """From incoming gradients that are the same in every call."""
    found = run()
    results = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None and x.requires_grad]
    torch.manual_seed(1)
    return torch.autograd.grad(results, trained, [torch.randn_like(x) for x in results])


@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize(("op", "backend"), all_differentiable())
def test_constants_of_inference_mode_are_constants_like_any_others(
    op: Op[Any, Any], backend: Backend, again: bool
) -> None:
    """Such as old log-probabilities, or a reference's logits: autograd itself refuses to keep them."""
    implementation, made = op.implementations[backend.impl, backend.device], grouping(op.arguments)
    for values in samples(op.name, backend.device, lambda name, arguments: None):
        leaves = [at for at, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
        for trained in (leaves, *([at] for at in leaves)):
            ordinary, inferred = list(values), list(values)
            for at, value in enumerate(values):
                if isinstance(value, Tensor) and at not in trained:
                    ordinary[at], inferred[at] = value.detach(), of_inference_mode(value)
            found = []
            for given in (ordinary, inferred):
                run = partial(implementation, made(given))
                if again:
                    run = partial(checkpoint, run, use_reentrant=False)
                found.append(gradients_of_all(run, [values[at] for at in trained]))
            assert all(map(torch.equal, *found))


@pytest.mark.parametrize(("namespace", "device"), namespaces())
def test_constants_of_inference_mode_where_the_operator_is_called_without_the_door(namespace: str, device: str) -> None:
    arguments = samples("ppo_loss", device, lambda name, arguments: None)[0]
    found = []
    for kind in (Tensor.detach, of_inference_mode):
        given = [kind(x) if isinstance(x, Tensor) and not x.requires_grad else x for x in arguments]
        run = partial(getattr(torch.ops, namespace).ppo_loss, *given)
        found += gradients_of_all(lambda run=run: run()[0], [arguments[0]])
    assert torch.equal(*found)


@pytest.mark.parametrize(("op", "backend"), [one for one in all_differentiable() if one.id.startswith("score_")])
def test_a_large_constant_of_inference_mode_is_kept_without_a_copy(op: Op[Any, Any], backend: Backend) -> None:
    values = samples(op.name, backend.device, lambda name, arguments: None)[0]
    large = {"score_tokens": "ref_logits", "score_hidden": "ref_weight"}[op.name]
    at = [field.name for field in fields(op.arguments)].index(large)
    values[at] = of_inference_mode(values[at])
    kl = op.implementations[backend.impl, backend.device](grouping(op.arguments)(values)).kl
    node = kl.grad_fn
    while not hasattr(node, "of_inference"):
        node = node.next_functions[0][0]
    place = values[at].data_ptr()
    assert place in [tensor.data_ptr() for tensor in node.of_inference.values()]
    kl.sum().backward(retain_graph=True)
    assert place in [tensor.data_ptr() for tensor in node.of_inference.values()]
    kl.sum().backward()
    assert not node.of_inference, "held by whoever holds the result"


@pytest.mark.parametrize("incoming", ["constant", "differentiable"])
@pytest.mark.parametrize(("op", "backend"), first_derivatives_only())
def test_second_derivatives_are_refused(op: str, backend: Backend, incoming: str) -> None:
    """Not given as zero: a silent 0 would be a wrong answer. The gradient itself is right, and can be used."""
    call, names = CALLS[op]
    inputs = call_inputs(4, backend.device)
    trained = [inputs[name].requires_grad_() for name in names]
    result = call(inputs, backend.impl)
    result = result.square() if incoming == "differentiable" else result
    wanted = torch.autograd.grad(result, trained, retain_graph=True)
    gradients = torch.autograd.grad(result, trained, create_graph=True)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert torch.equal(gradient.detach(), want)
        with pytest.raises(NoDerivative, match=rf"^{op} has no second derivatives .*; {remedy(op)}"):
            gradient.sum().backward(retain_graph=True)
        with pytest.raises(NoDerivative, match=rf"^{op} has no second derivatives .*; {remedy(op)}"):
            # of these tensors alone, where torch leaves out what does not lead to them, and gives None where it may
            torch.autograd.grad(gradient.sum(), trained, retain_graph=True, allow_unused=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch takes them one by one
@pytest.mark.parametrize(("op", "backend"), first_derivatives_only())
def test_many_incoming_gradients_at_once_are_taken_one_by_one_or_refused(op: str, backend: Backend) -> None:
    call, names = CALLS[op]
    inputs = call_inputs(4, backend.device)
    trained = [inputs[name].requires_grad_() for name in names]
    result, factors = call(inputs, backend.impl), torch.tensor([1.0, -4.0, 0.5], device=backend.device)
    singles = [torch.autograd.grad(result, trained, factor, retain_graph=True) for factor in factors]
    if backend.impl == "reference":
        with pytest.raises(NoDerivative, match=rf"^{op} of impl='reference' takes one incoming gradient at a time"):
            torch.autograd.grad(result, trained, factors, is_grads_batched=True)
        return
    together = torch.autograd.grad(result, trained, factors, is_grads_batched=True)
    for all_of_one, wanted in zip(together, zip(*singles, strict=True), strict=True):
        torch.testing.assert_close(all_of_one, torch.stack(wanted), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("namespace", "device"), namespaces())
def test_second_derivatives_of_a_registered_gradient_are_refused(namespace: str, device: str) -> None:
    """Where torch runs the gradient that is registered with it, as it does for who calls the operator."""
    arguments = samples("ppo_loss", device, lambda name, arguments: None)[0]
    loss, _, _ = getattr(torch.ops, namespace).ppo_loss(*arguments)
    (gradient,) = torch.autograd.grad(loss, arguments[0], create_graph=True)
    with pytest.raises(NoDerivative, match="ppo_loss has no second derivatives"):
        gradient.sum().backward()


def test_the_specification_of_a_loss_has_second_derivatives() -> None:
    inputs = call_inputs(4, "cpu")
    logprobs = inputs["logprobs"].requires_grad_()
    (gradient,) = torch.autograd.grad(CALLS["ppo_loss"][0](inputs, "reference"), logprobs, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), logprobs)
    assert second.any()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own, as forward mode starts
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")  # the same of torch 2.15
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("op", "backend"), first_derivatives_only())
def test_derivatives_in_forward_mode_are_refused(op: str, backend: Backend, grad: bool) -> None:
    """Not dropped: a result without a tangent would say that nothing depends on the input."""
    call, (name, *_) = CALLS[op]
    inputs = call_inputs(4, backend.device)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        call(inputs, backend.impl)  # tensors without a tangent are welcome
        with pytest.raises(NoDerivative, match=rf"^{op} has no derivatives in forward mode; {remedy(op)}"):
            call(inputs | {name: forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))}, backend.impl)


@pytest.mark.parametrize(("op", "backend"), first_derivatives_only())
def test_derivatives_by_transforms_are_refused(op: str, backend: Backend) -> None:
    call, (name, *_) = CALLS[op]
    inputs = call_inputs(4, backend.device)
    with pytest.raises(NoDerivative, match=rf"^{op} has no derivatives by torch.func, .*; {remedy(op)}"):
        torch.func.grad(lambda x: call(inputs | {name: x}, backend.impl))(inputs[name])


@pytest.mark.parametrize("mapped", ["logits", "token_ids"])
def test_the_specification_of_scores_says_that_it_cannot_be_mapped(mapped: str) -> None:
    given = {"logits": torch.randn(2, 3, 5), "token_ids": torch.randint(5, (2, 3))}

    def score(one: torch.Tensor) -> torch.Tensor:
        own = {name: value[:1] for name, value in given.items()} | {mapped: one[None]}
        return ops.score_tokens(**own, impl="reference").logprobs

    with pytest.raises(ShapeError, match=r"score_tokens: impl='reference' cannot be mapped by torch\.vmap"):
        torch.vmap(score)(given[mapped])


class Recorder(TorchDispatchMode):
    """Remembers the operators of ours that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("tlcr"):
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("op", "backend"), fast_backends())
def test_a_mode_sees_the_operators(op: str, backend: Backend) -> None:
    """Triton's kernels are called without their operator where nobody looks, and must not be where someone does."""
    call, trained = CALLS[op]
    inputs = call_inputs(4, backend.device)
    plain = results_and_gradients(lambda inputs: call(inputs, backend.impl), inputs, trained)
    with Recorder() as recorder:
        seen = results_and_gradients(lambda inputs: call(inputs, backend.impl), inputs, trained)
    at_once = f"{op}_with_gradients"
    alone = backend.impl == "cpp" and at_once in [operator.name for one in ops.OPS for operator in one.cpp_operators]
    assert recorder.seen == ([at_once] if alone else [op, f"{op}_backward"] if trained else [op])
    for got, want in zip(seen, plain, strict=True):
        assert torch.equal(got, want)


def test_a_class_of_tensor_goes_through_the_operator() -> None:
    class Other(Tensor): ...

    call = _library._unless_watched(lambda *values: "operator", lambda *values: "kernel")
    x = torch.zeros(2)
    assert call(x, torch.nn.Parameter(x), None, 1.0, 2, True) == "kernel"
    assert call(x.as_subclass(Other), 1.0) == "operator"


@pytest.mark.parametrize(("op", "backend"), fast_backends(differentiable=True))
def test_without_a_gradient_the_operator_is_called_alone(op: str, backend: Backend) -> None:
    call, _ = CALLS[op]
    assert call(call_inputs(4, backend.device), backend.impl).grad_fn is None


def test_every_operator_has_a_kernel_where_it_says_so() -> None:
    """The dispatch table: C++ on the CPU where the extension is, and for CUDA the extension's and Triton's."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in ops.OPS:
        with_cpp = op.cpp and _extension.unavailable("cpu") is None
        with_triton = op.triton is not None and _library.has_triton()
        with_cuda = op.cuda and _extension.unavailable("cuda") is None
        for operator in op.cpp_operators:
            assert has_kernel(f"tlcr::{operator.name}", "CPU") == with_cpp
        for operator in op.operators:
            assert has_kernel(f"tlcr::{operator.name}", "CUDA") == (with_triton or with_cuda)


@pytest.mark.skipif(_extension.unavailable("cpu") is not None, reason="the compiled operator")
def test_a_reference_without_its_head_is_an_error_where_the_operator_is_called_without_the_door() -> None:
    """It used to end the process."""
    hidden, weight, token_ids = torch.randn(3, 4), torch.randn(V, 4), torch.arange(3)
    with pytest.raises(RuntimeError, match="got ref_hidden without ref_weight, wanted both or neither"):
        torch.ops.tlcr.score_hidden(hidden, weight, token_ids, None, hidden, None, None, 1.0, None, 256)
