"""What is read from an op's spec: the schema and the fakes of its operators, and how gradients pass them."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tlcr import ops
from tlcr.ops._spec import Gradient, Op, fields, flattening, grouping, names, takes


class Options(NamedTuple):
    scale: float
    offset: Tensor | None
    count: int | None


class Arguments(NamedTuple):
    x: Tensor
    options: Options
    flag: bool


class Backward(NamedTuple):
    g_y: Tensor
    g_z: Tensor | None
    arguments: Arguments
    z: Tensor
    wants_x: bool
    wants_offset: bool


GRADIENT = Gradient(of=("x", "offset"), arguments=Backward, absent="z")


def an_op(**changes: Any) -> Op[Any, Any]:
    def door() -> None: ...

    values: dict[str, Any] = {
        "door": door,
        "arguments": Arguments,
        "results": ("y", "z"),
        "reference": lambda arguments: arguments,
        "fake": lambda arguments: arguments,
    }
    return Op(**(values | changes))


def test_a_schema_has_the_fields_of_a_group_one_by_one() -> None:
    (operator,) = an_op().operators
    arguments = "Tensor x, float scale, Tensor? offset, int? count, bool flag"
    assert (operator.name, operator.schema) == ("door", f"({arguments}) -> (Tensor y, Tensor z)")
    forward, backward = an_op(gradient=GRADIENT).operators
    assert (forward.schema, backward.name) == (operator.schema, "door_backward")
    wanted = f"(Tensor g_y, Tensor? g_z, {arguments}, Tensor z, bool wants_x, bool wants_offset)"
    assert backward.schema == f"{wanted} -> (Tensor x, Tensor offset)"


@pytest.mark.parametrize(("results", "returns"), [((), "()"), (("y",), "Tensor"), (("y", "z"), "(Tensor y, Tensor z)")])
def test_a_schema_says_what_comes_back(results: tuple[str, ...], returns: str) -> None:
    assert an_op(results=results).operators[0].schema.endswith(f") -> {returns}")


def test_a_schema_says_which_arguments_are_changed() -> None:
    (operator,) = an_op(results=(), changes=("x", "offset")).operators
    assert operator.schema == "(Tensor(a!) x, float scale, Tensor(b!)? offset, int? count, bool flag) -> ()"
    assert str(torch._C.parse_schema(operator.name + operator.schema)) == operator.name + operator.schema


def test_a_list_of_tensors_is_one_argument() -> None:
    class Lists(NamedTuple):
        xs: list[Tensor]
        ys: list[Tensor]
        flag: bool

    (operator,) = an_op(arguments=Lists, results=(), changes=("ys",)).operators
    assert operator.schema == "(Tensor[] xs, Tensor(a!)[] ys, bool flag) -> ()"
    assert str(torch._C.parse_schema(operator.name + operator.schema)) == operator.name + operator.schema
    arguments = Lists([torch.zeros(1)], [torch.zeros(2), torch.zeros(3)], True)
    assert flattening(Lists)(arguments) == [*arguments]
    assert grouping(Lists)([*arguments]) == arguments


def test_arguments_go_through_torch_one_by_one_and_come_back_as_they_were() -> None:
    arguments = Arguments(torch.zeros(2), Options(0.5, None, 3), True)
    values = flattening(Arguments)(arguments)
    assert values[1:] == [0.5, None, 3, True] and values[0] is arguments.x
    assert grouping(Arguments)(values) == arguments
    nested = ["g_y", None, *values, "z", True, False]
    assert grouping(Backward)(nested) == ("g_y", None, arguments, "z", True, False)
    assert flattening(Backward)(grouping(Backward)(nested)) == nested
    assert takes(Arguments)(lambda given: given)(*values) == arguments
    assert names(Backward) == ("g_y", "g_z", *names(Arguments), "z", "wants_x", "wants_offset")


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_gradients_are_like_their_inputs_or_have_no_elements(given: bool, wanted: bool) -> None:
    x, z = torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.float64)
    offset = torch.zeros(5) if given else None
    arguments = Arguments(x, Options(1.0, offset, None), False)
    g_x, g_offset = GRADIENT.fake(Backward(z, None, arguments, z, wanted, wanted and given))
    assert (g_x.shape, g_x.dtype) == ((2, 3) if wanted else (0,), torch.bfloat16)
    assert g_offset.shape == ((5,) if wanted and given else (0,))
    assert g_offset.dtype == (torch.float32 if given else torch.float64)


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_the_names_in_a_spec_are_those_of_its_arguments_and_results(op: Op[Any, Any]) -> None:
    """What is kept for the backward pass is found by its name, so no name may stand for two things."""
    known = (*names(op.arguments), *op.results)
    assert getattr(ops, op.name) is op.door
    assert set(op.changes) <= set(names(op.arguments))
    assert not (op.triton and op.cuda), "one implementation per op and device"
    if op.gradient is None:
        return
    assert len(set(known)) == len(known)
    assert set(op.gradient.of) <= set(names(op.arguments))
    for name, _, _ in fields(op.gradient.arguments):
        assert name.removeprefix("g_").removeprefix("wants_") in known


def test_no_op_is_listed_twice() -> None:
    listed = [operator.name for op in ops.OPS for operator in op.cpp_operators]
    assert len(set(listed)) == len(listed)
