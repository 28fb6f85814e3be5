"""adamw_step: AdamW in float64 beside it, and the halves of a float32 that its weights and remainders are."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import INF, NAN, Backend, assert_no_worse_than_reference, backends, interpreted, strided
from tlcr import ops
from tlcr.errors import ConfigError, ShapeError
from tlcr.ops.adamw import join_master, split_master

OPTIONS: dict[str, Any] = {"learning_rate": 0.01, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
IN_PLACE = ("parameter", "exp_avg", "exp_avg_sq", "remainder")


def example(*shape: int) -> dict[str, Tensor]:
    """A state as it is in the middle of a training run, the master not that of a rounded weight."""
    tensors = {
        "parameter": torch.empty(shape, dtype=torch.bfloat16),
        "grad": torch.randn(shape).bfloat16(),
        "exp_avg": torch.randn(shape),
        "exp_avg_sq": torch.rand(shape) + 0.01,
        "remainder": torch.empty(shape, dtype=torch.int16),
    }
    split_master(torch.randn(shape), tensors["parameter"], tensors["remainder"])
    return tensors


def truth(state: dict[str, Tensor], step: int, options: dict[str, Any] = OPTIONS) -> dict[str, Tensor]:
    """The docstring's formulas in float64."""
    (beta1, beta2), rate = options["betas"], options["learning_rate"]
    g, m, v = (state[name].double() for name in ("grad", "exp_avg", "exp_avg_sq"))
    master = join_master(state["parameter"], state["remainder"]).double()
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    denominator = (v / (1 - beta2**step)).sqrt() + options["eps"]
    master = (1 - rate * options["weight_decay"]) * master - rate * m / (1 - beta1**step) / denominator
    return {"exp_avg": m, "exp_avg_sq": v, "master": master}


def stepped(state: dict[str, Tensor], backend: Backend, step: int, **options: Any) -> dict[str, Tensor]:
    """What a step makes of a copy of the state."""
    copies = {name: tensor.to(backend.device, copy=True) for name, tensor in state.items()}
    assert ops.adamw_step(**copies, **{**OPTIONS, **options}, step=step, impl=backend.impl) is None
    return {name: tensor.cpu() for name, tensor in copies.items()}


def results(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "exp_avg": state["exp_avg"],
        "exp_avg_sq": state["exp_avg_sq"],
        "master": join_master(state["parameter"], state["remainder"]),
    }


@backends("adamw_step")
@pytest.mark.parametrize("step", [1, 2, 1000])
@pytest.mark.parametrize("shape", [(1,), (7,), (15,), (16,), (17,), (33, 31), (), (3, 0)])
def test_a_step_is_that_of_the_formula(backend: Backend, shape: tuple[int, ...], step: int) -> None:
    state = example(*shape)
    true = truth(state, step)
    plain = results(stepped(state, Backend("cpu", "reference"), step))
    after = stepped(state, backend, step)
    for name, got in results(after).items():
        assert_no_worse_than_reference(got, plain[name], true[name])
    # The weight is what is left of the master in 8 bits; the gradient is not touched.
    assert torch.equal(after["grad"], state["grad"])
    master = results(after)["master"]
    assert bool(((after["parameter"].double() - master.double()).abs() <= master.double().abs() * 2**-8).all())


@backends("adamw_step")
def test_many_weights_are_updated_each_once(backend: Backend) -> None:
    """Over the tiles of a GPU and the threads of a CPU, whose borders are nowhere near a register's."""
    state = example(3_001 if interpreted(backend) else 200_003)
    true = truth(state, 3)
    plain = results(stepped(state, Backend("cpu", "reference"), 3))
    for name, got in results(stepped(state, backend, 3)).items():
        assert_no_worse_than_reference(got, plain[name], true[name])


@backends("adamw_step")
def test_without_a_rate_every_float32_stays_what_it_was(backend: Backend) -> None:
    """Among them middles, which go to the larger magnitude, the least normal number, the largest finite one and
    infinity."""
    bits = torch.tensor(
        [0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000, 0x00800000, 0x7F7FFFFF, 0x7F800000]
    )
    bits = torch.cat([bits, torch.randint(0x00800000, 0x7F800000, (1_000,))])
    masters = torch.cat([bits, bits - 2**31]).to(torch.int32).view(torch.float32)
    state = example(*masters.shape)
    split_master(masters, state["parameter"], state["remainder"])
    after = stepped(state, backend, 1, learning_rate=0.0)
    assert torch.equal(results(after)["master"], masters)
    assert torch.equal(after["parameter"], state["parameter"])
    assert torch.equal(after["remainder"], state["remainder"])
    assert after["parameter"][:8].view(torch.int16).tolist() == [
        0x3F80, 0x3F80, 0x3F81, 0x3F81, 0x3F82, 0x0080, 0x7F80, 0x7F80
    ]  # fmt: skip
    middle = (masters.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(after["parameter"][~middle], masters[~middle].bfloat16())


@backends("adamw_step")
def test_a_gradient_that_is_no_number_shows_in_the_weight(backend: Backend) -> None:
    """And in no other. The bits of some NaN, rounded like a number, would be -0."""
    state = example(40)
    state["grad"][5] = NAN
    state["grad"][17] = INF  # m / sqrt(v) is inf / inf
    after = stepped(state, backend, 1)
    clean = stepped({**state, "grad": state["grad"].nan_to_num(0.0, 0.0)}, backend, 1)
    wrong = torch.zeros(40, dtype=torch.bool)
    wrong[[5, 17]] = True
    assert torch.equal(after["parameter"].isnan(), wrong)
    assert torch.equal(results(after)["master"].isnan(), wrong)
    assert torch.equal(after["parameter"][~wrong], clean["parameter"][~wrong])
    assert bool(stepped(after, backend, 2)["parameter"].isnan()[wrong].all())


@backends("adamw_step")
def test_gaps_in_memory(backend: Backend) -> None:
    """Views with strides are changed where they lie."""
    state = example(5, 6)
    wanted = stepped(state, backend, 2)
    views = {name: strided(tensor.to(backend.device)) for name, tensor in state.items()}
    assert not views["parameter"].is_contiguous()
    ops.adamw_step(**views, **OPTIONS, step=2, impl=backend.impl)
    found = results({name: view.cpu() for name, view in views.items()})
    for name, result in results(wanted).items():
        torch.testing.assert_close(found[name], result, rtol=1e-6, atol=1e-7)


@backends("adamw_step")
def test_the_same_bits_on_every_call(backend: Backend) -> None:
    state = example(1_000)
    first, second = (stepped(state, backend, 2) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in IN_PLACE)


def test_the_first_step_by_hand() -> None:
    """With fresh moments it is -rate (sign(g) + weight_decay w), whatever the betas: 2 - 0.1 (1 + 0.5 * 2)."""
    state = {name: torch.zeros_like(tensor) for name, tensor in example(2).items()}
    state["parameter"] = torch.tensor([2.0, -3.0]).bfloat16()
    state["grad"] = torch.tensor([4.0, -0.5]).bfloat16()
    ops.adamw_step(**state, learning_rate=0.1, weight_decay=0.5, eps=0.0, step=1)
    torch.testing.assert_close(results(state)["master"], torch.tensor([1.8, -3 + 0.1 * (1 + 0.5 * 3)]))
    assert math.isclose(state["exp_avg"][0], 0.1 * 4.0, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"parameter": torch.zeros(3)}, ShapeError, "parameter has dtype torch.float32, wanted torch.bfloat16"),
        ({"exp_avg": torch.zeros(3).bfloat16()}, ShapeError, "exp_avg has dtype torch.bfloat16, wanted torch.float32"),
        ({"remainder": torch.zeros(4, dtype=torch.int16)}, ShapeError, r"remainder has shape \(4,\), wanted \(3,\)"),
        ({"grad": None}, ShapeError, "grad is a NoneType, wanted a torch.Tensor"),
        ({"step": 0}, ConfigError, "step is 0, wanted the number of this step, an int from 1"),
        ({"betas": (0.9, 0.95, 0.99)}, ConfigError, r"betas is \(0.9, 0.95, 0.99\), wanted two Python numbers"),
        ({"betas": 0.9}, ConfigError, r"betas is 0.9, wanted two Python numbers"),
        ({"betas": (0.9, 1.0)}, ConfigError, r"betas\[1\] is 1, wanted a number >= 0 and < 1"),
        ({"learning_rate": -1.0}, ConfigError, "learning_rate is -1, wanted a number >= 0"),
        ({"eps": NAN}, ConfigError, "eps is nan"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"adamw_step: {message}"):
        ops.adamw_step(**{**example(3), **OPTIONS, "step": 1, **changes})
