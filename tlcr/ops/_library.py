"""The torch operators that C++, CUDA and Triton kernels are registered under, as the ops' specs describe them.

The schemas are defined in Python only, because an installation without compiled code registers its Triton kernels under
the same schemas. torch compares the signatures of compiled code with them and refuses to load it if they differ. An
operator takes arguments that the functions of `tlcr.ops` have checked, and returns float32 or float64. Where a result
does not exist (no reference, no gradient wanted), it returns a tensor of no elements in its place.

The namespace ``tlcr`` holds the C++ kernels on the CPU, and on CUDA both the compiled and the Triton kernels. Triton
kernels on the CPU, which only its interpreter can run, live in ``tlcr_interpreted``: an operator has one kernel per
device.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tlcr.ops._autograd import autograd, below_autograd, count_change, eager_function, recomputing, scaling, watched
from tlcr.ops._spec import ArgumentsT, Op, Operator, ResultT, fields, flattening, takes

NAMESPACE, INTERPRETED = "tlcr", "tlcr_interpreted"

# The operators exist as long as these objects.
_libraries: list[torch.library.Library] = []


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU, as Python. Triton itself reads this when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def define(ops: Iterable[Op[Any, Any]]) -> None:
    """Define the operators and register their parts that are written in Python."""
    library = torch.library.Library(NAMESPACE, "DEF")
    interpreted = torch.library.Library(INTERPRETED, "DEF") if has_triton() and interpreting() else None
    _libraries.append(library)
    for op in ops:
        _define(library, op, op.cpp_operators)
        if op.triton is None or not has_triton():
            continue
        _register_triton(library, op, op.triton, "CUDA")
        if interpreted is not None:
            _define(interpreted, op, op.operators)
            _register_triton(interpreted, op, op.triton, "CPU")
    if interpreted is not None:
        _libraries.append(interpreted)


def _define(library: torch.library.Library, op: Op[Any, Any], operators: Iterable[Operator]) -> None:
    for operator in operators:
        library.define(operator.name + operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
        fake = takes(operator.arguments)(operator.fake)
        torch.library.register_fake(f"{library.ns}::{operator.name}", fake, lib=library)
    if op.gradient is not None:
        setup_context, backward = autograd(op, op.gradient, getattr(torch.ops, library.ns))
        torch.library.register_autograd(f"{library.ns}::{op.name}", backward, setup_context=setup_context, lib=library)


def _register_triton(library: torch.library.Library, op: Op[Any, Any], module: str, key: str) -> None:
    for operator in op.operators:
        library.impl(operator.name, _imported_when_called(module, operator.name), key)


def _imported_when_called(module: str, function: str) -> Callable[..., Any]:
    """Importing Triton is slow, so it is imported when the first of its kernels runs."""

    @functools.cache
    def imported() -> Any:
        return getattr(importlib.import_module(module), function)

    return lambda *values: imported()(*values)


# The values that a Triton kernel can be called with. Tensors of another class are for torch to unwrap.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, float, int, bool, type(None)))


def _unless_watched(operator: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Calls a kernel that is a Python function without its operator, which would take as long as all else that the
    host does, unless there is someone who wants to see the operator: a mode, a transform or a class of tensor."""

    def call(*values: Any) -> Any:
        return operator(*values) if watched() or not _PLAIN.issuperset(map(type, values)) else kernel(*values)

    return call


def implementation(op: Op[ArgumentsT, ResultT], namespace: str, impl: str) -> Callable[[ArgumentsT], ResultT]:
    """The op by its operator. torch takes the kernel of the tensors' device.

    Args:
        op: the op.
        namespace: that of the operator.
        impl: "triton" if the kernel is a function in Python, "cpp" if there may be a third operator.

    Returns:
        a function of checked arguments.
    """
    used = op.cpp_operators if impl == "cpp" else op.operators
    operator, *others = [getattr(getattr(torch.ops, namespace), one.name).default for one in used]
    # What the overload's own call passes on to. On this way are no keyword arguments, which it takes apart.
    forward, *others = [overload._op for overload in (operator, *others)]
    known = others
    if impl == "triton" and op.triton is not None:
        kernels = [_imported_when_called(op.triton, operator.name) for operator in op.operators]
        forward, *others = map(_unless_watched, (forward, *others), kernels)
    function = None
    if op.gradient is not None:
        backward, *with_gradients = others
        recorded = scaling(op, op.gradient, *with_gradients) if with_gradients else None
        recorded = recorded or recomputing(op, op.gradient, forward, backward, known[0])
        function = eager_function(op, op.gradient, forward, recorded)
    trained = () if op.gradient is None else op.gradient.of
    tensors = [(at, name) for at, (name, kind, _) in enumerate(fields(op.arguments)) if kind is Tensor]
    constants = [at for at, name in tensors if name not in trained]
    lists = [at for at, (_, kind, _) in enumerate(fields(op.arguments)) if kind == list[Tensor]]
    changed = [at for at, (name, _, _) in enumerate(fields(op.arguments)) if name in op.changes]
    flat = flattening(op.arguments)

    def traced(values: list[Any]) -> Any:
        # Results without a gradient are marked as constants: torch would otherwise expect gradients that do not exist.
        for at in constants:
            if values[at] is not None and values[at].requires_grad:
                values[at] = values[at].detach()
        for at in lists:
            values[at] = [tensor.detach() if tensor.requires_grad else tensor for tensor in values[at]]
        return operator(*values)

    def run(given: ArgumentsT) -> ResultT:
        values = flat(given)
        if torch.compiler.is_compiling():
            return op.result(given, traced(values))
        try:
            if function is not None:
                return function(given, values)
            with below_autograd():
                results = forward(*values)
        except Exception:
            if op.read is not None:
                op.read(given)  # says it better
            raise
        for at in changed:
            count_change(values[at])
        return op.result(given, results)

    return run
