"""Defines `Op`, the single description of an op, from which everything else about the op is derived.

An op's arguments are a NamedTuple. Its public function (`door`) fills it with checked values, and every implementation
in Python takes it.
The names and types of its fields make the schema of the torch operator. A field may be a group of arguments, which is a
NamedTuple too: the schema lists the fields of a group one by one, and so do `torch.ops` and C++.

Derived from an `Op`: the torch operators with their schemas, fakes and Triton kernels (`_library`), their gradients
(`_autograd`), the implementation that runs (`_registry`), and the tests that all ops share.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args, get_type_hints

import torch

from tlcr.errors import BackendUnavailable, ConfigError

Impl = Literal["auto", "reference", "cpp", "triton", "cuda"]
IMPLS = ("reference", "cpp", "triton", "cuda")

OTHER_DEVICE = "other devices"
DEVICES = ("cpu", "cuda", OTHER_DEVICE)

CPU = torch.device("cpu")

ArgumentsT = TypeVar("ArgumentsT", bound=tuple[Any, ...])
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Gradient:
    """The operator of an op's backward pass, ``<op>_backward``.

    The names of its arguments define their values. ``g_<result>`` is the incoming gradient of a result, or None where
    there is none and the type allows it. ``wants_<argument>`` says whether the gradient of the argument is needed. Any
    other name is the op's argument or result of that name, kept from the forward pass. A result without a ``g_``
    argument has no gradient.
    """

    of: tuple[str, ...]
    """The arguments whose gradients it returns, in this order; one that is not wanted has no elements."""
    arguments: type[tuple[Any, ...]]
    absent: str | None = None
    """The gradient of an argument that was not given has no elements, and the dtype of this argument."""
    only_with: Mapping[str, str] = field(default_factory=dict)
    """A result that exists, and so has a gradient, only where an optional argument is given: at most one."""
    plain: bool = True
    """Whether the reference is plain torch, which has all other derivatives too."""
    with_results: type[tuple[Any, ...]] | None = None
    """Of a C++ operator ``<op>_with_gradients``, which takes the op's arguments and ``wants_<argument>``. It returns
    the fields of what users get, and then the gradients of the first: a single number and the only one that has any, in
    its dtype. The backward pass then only scales them."""

    def fake(self, arguments: tuple[Any, ...]) -> Any:
        """What the operator returns, in shapes and dtypes."""
        values = dict(zip(names(self.arguments), flattening(self.arguments)(arguments), strict=True))
        gradients = []
        for name in self.of:
            like = values[name] if values[name] is not None else values[self.absent or name]
            gradients.append(like.new_empty(like.shape if values.get(f"wants_{name}", True) else (0,)))
        return gradients[0] if len(gradients) == 1 else tuple(gradients)

    def fake_with_results(self, op: "Op[Any, Any]", arguments: tuple[Any, ...]) -> Any:
        """As `fake`, of `with_results`."""
        forward, *wants = arguments
        results = [one.new_empty(one.shape) for one in op.result(forward, op.fake(forward))]
        values = dict(zip(names(type(forward)), flattening(type(forward))(forward), strict=True))
        shapes = [values[name].shape if wanted else (0,) for name, wanted in zip(self.of, wants, strict=True)]
        return (*results, *(results[0].new_empty(shape) for shape in shapes))


class Operator(NamedTuple):
    """One torch operator of an op."""

    name: str
    schema: str
    arguments: type[tuple[Any, ...]]
    fake: Callable[[Any], Any]


@dataclass(frozen=True, eq=False, repr=False)
class Op(Generic[ArgumentsT, ResultT]):
    """One op, with everything but its kernels."""

    door: Callable[..., ResultT]
    """The function that users call. It checks what it is given and then calls this object."""
    arguments: type[ArgumentsT]
    """What every implementation takes: checked, masks as bool, numbers as float."""
    results: tuple[str, ...]
    """The tensors that the torch operator returns. One that does not exist in a call has no elements."""
    reference: Callable[[ArgumentsT], ResultT]
    """The specification, in plain torch."""
    fake: Callable[[ArgumentsT], Any]
    """What the operator returns, in shapes and dtypes: for torch.compile, which traces without computing."""
    result: Callable[[ArgumentsT, Any], ResultT] = lambda arguments, results: results
    """Makes the result that users get from what the operator returns."""
    gradient: Gradient | None = None
    """None: the results are constants."""
    changes: tuple[str, ...] = ()
    """The arguments that are changed in place."""
    cpp: bool = False
    """Whether the extension has kernels for the CPU."""
    triton: str | None = None
    """The module of the Triton kernels, one function per operator. An op has these for GPUs or `cuda`, not both."""
    cuda: bool = False
    """Whether the extension has kernels for GPUs. Without either, the op runs there as its specification."""
    read: Callable[[ArgumentsT], None] | None = None
    """Raises `DataError` for a value of a tensor that is out of range, on the CPU only. C++ kernels look themselves,
    and this says what they found; other implementations run after it."""
    implementations: dict[tuple[str, str], Callable[[ArgumentsT], ResultT]] = field(default_factory=dict, init=False)
    """What can run here, by its name ("auto" is one) and the kind of device. `_registry` fills it."""
    reasons: dict[tuple[str, str], str] = field(default_factory=dict, init=False)
    """Why each of the others cannot run."""

    @functools.cached_property
    def name(self) -> str:
        return self.door.__name__

    @functools.cached_property
    def result_type(self) -> Any:
        """Of what users get."""
        return get_type_hints(self.door)["return"]

    @property
    def on_gpu(self) -> str:
        """The one implementation for GPUs, beside the reference if there is another."""
        return "triton" if self.triton else "cuda" if self.cuda else "reference"

    @functools.cached_property
    def operators(self) -> tuple[Operator, ...]:
        """Those that every kind of device has, for which the op has kernels: forward, and backward with a gradient."""
        schema = f"{_schema(self.arguments, self.changes)} -> {_returns(self.results)}"
        forward = Operator(self.name, schema, self.arguments, self.fake)
        if self.gradient is None:
            return (forward,)
        schema = f"{_schema(self.gradient.arguments)} -> {_returns(self.gradient.of)}"
        return forward, Operator(f"{self.name}_backward", schema, self.gradient.arguments, self.gradient.fake)

    @functools.cached_property
    def cpp_operators(self) -> tuple[Operator, ...]:
        """The same, and the third that C++ may have."""
        if self.gradient is None or self.gradient.with_results is None:
            return self.operators
        gradient, arguments = self.gradient, self.gradient.with_results
        results = (*self.result_type._fields, *(f"g_{name}" for name in gradient.of))
        fake = functools.partial(gradient.fake_with_results, self)
        schema = f"{_schema(arguments)} -> {_returns(results)}"
        return *self.operators, Operator(f"{self.name}_with_gradients", schema, arguments, fake)

    def __call__(self, impl: str, device: torch.device, arguments: ArgumentsT) -> ResultT:
        """Run an implementation. A named one is that one or an error, never another.

        Args:
            impl: "auto" or the name of one.
            device: where the tensors are.
            arguments: what the function that users call has checked.

        Returns:
            What the op returns.

        Raises:
            ConfigError: no implementation has this name.
            BackendUnavailable: it has one that cannot run here.
        """
        # A call only looks this up, because torch.compile traces this function. torch makes `type` anew at each look.
        implementation = self.implementations.get((impl, "cpu" if device == CPU else device.type))
        if implementation is not None:
            return implementation(arguments)
        key = impl, device.type if device.type in DEVICES else OTHER_DEVICE
        if key in self.implementations:
            return self.implementations[key](arguments)
        if impl not in IMPLS:
            choices = ", ".join(map(repr, ("auto", *IMPLS)))
            raise ConfigError(f"{self.name}: impl={impl!r} is unknown, choose from {choices}")
        raise BackendUnavailable(
            f"{self.name}: impl={impl!r} is unavailable: {self.reasons[key]}; use impl='auto' or impl='reference' "
            "(tlcr.ops.available() lists what can run)"
        )


class Field(NamedTuple):
    """One argument of an operator."""

    name: str
    kind: Any
    """Tensor, list[Tensor], float, bool or int."""
    optional: bool


@functools.cache
def fields(arguments: type[tuple[Any, ...]]) -> tuple[Field, ...]:
    """The arguments that a NamedTuple stands for, groups one by one."""
    found: list[Field] = []
    for name, hint in get_type_hints(arguments).items():
        if _is_group(hint):
            found += fields(hint)
        else:
            choices = () if hint == list[torch.Tensor] else get_args(hint)
            kinds = [kind for kind in choices or (hint,) if kind is not type(None)]
            found.append(Field(name, kinds[0], optional=hint is not kinds[0]))
    return tuple(found)


def names(arguments: type[tuple[Any, ...]]) -> tuple[str, ...]:
    return tuple(argument.name for argument in fields(arguments))


class _Run(NamedTuple):
    """Values in a row that are single arguments, or all those of one group."""

    at: int
    """The first one's place in the NamedTuple, and ..."""
    begin: int
    """... among the values one by one."""
    length: int
    group: type[tuple[Any, ...]] | None


@functools.cache
def _runs(arguments: type[tuple[Any, ...]]) -> tuple[_Run, ...]:
    runs: list[_Run] = []
    begin = 0
    for at, hint in enumerate(get_type_hints(arguments).values()):
        group = hint if _is_group(hint) else None
        count = len(fields(group)) if group else 1
        if group is None and runs and runs[-1].group is None:
            runs[-1] = runs[-1]._replace(length=runs[-1].length + 1)
        else:
            runs.append(_Run(at, begin, count, group))
        begin += count
    return tuple(runs)


def flattening(arguments: type[tuple[Any, ...]]) -> Callable[[tuple[Any, ...]], list[Any]]:
    """The function that lists the values of such arguments one by one, as torch operators take them."""
    runs = [(run.at, run.at + run.length, flattening(run.group) if run.group else None) for run in _runs(arguments)]
    if all(members is None for _, _, members in runs):
        return list

    def flat(values: tuple[Any, ...]) -> list[Any]:
        found: list[Any] = []
        for at, end, members in runs:
            found += values[at:end] if members is None else members(values[at])
        return found

    return flat


def grouping(arguments: type[ArgumentsT]) -> Callable[[Sequence[Any]], ArgumentsT]:
    """The function that makes such arguments from their values one by one."""
    runs = [(run.begin, run.begin + run.length, grouping(run.group) if run.group else None) for run in _runs(arguments)]

    def grouped(values: Sequence[Any]) -> ArgumentsT:
        found: list[Any] = []
        for begin, end, group in runs:
            if group is None:
                found += values[begin:end]
            else:
                found.append(group(values[begin:end]))
        return arguments(*found)

    return grouped


def takes(arguments: type[ArgumentsT]) -> Callable[[Callable[[ArgumentsT], ResultT]], Callable[..., ResultT]]:
    """Turn a function of a NamedTuple into one of single values, which torch passes to the kernel of an operator."""

    def decorate(function: Callable[[ArgumentsT], ResultT]) -> Callable[..., ResultT]:
        grouped = grouping(arguments)

        @functools.wraps(function)
        def call(*values: Any) -> ResultT:
            return function(grouped(values))

        return call

    return decorate


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple)


def _schema(arguments: type[tuple[Any, ...]], changes: tuple[str, ...] = ()) -> str:
    words = []
    for name, kind, optional in fields(arguments):
        # torch requires a different letter for the memory of each argument that is changed.
        memory = f"({'abcdefgh'[changes.index(name)]}!)" if name in changes else ""
        kind, many = ("Tensor", "[]") if kind == list[torch.Tensor] else (kind.__name__, "")
        words.append(f"{kind}{memory}{many}{'?' * optional} {name}")
    return f"({', '.join(words)})"


def _returns(results: tuple[str, ...]) -> str:
    return "Tensor" if len(results) == 1 else f"({', '.join(f'Tensor {name}' for name in results)})"
