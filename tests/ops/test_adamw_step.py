"""adamw_step: AdamW in float64 beside it, and the halves of a float32 that its weights and remainders are."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import INF, NAN, Backend, assert_no_worse_than_reference, backends, interpreted, strided
from tests.preloaded import run
from tlcr import ops
from tlcr.errors import ConfigError, ShapeError
from tlcr.ops import _library
from tlcr.ops.adamw import join_master, split_master

OPTIONS: dict[str, Any] = {"learning_rate": 0.01, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
LISTS = ("parameters", "grads", "exp_avgs", "exp_avg_sqs", "remainders")
# Around the widths of registers and, under the interpreter, of tiles and chunks; no axes, and nothing.
SHAPES = ((1,), (7,), (3, 0), (15,), (16,), (17,), (), (33, 31), (64,), (128,), (63, 65))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter takes a tile in a millisecond: small ones give lists that have many."""
    if _library.has_triton() and _library.interpreting():
        from tlcr.kernels import adamw

        monkeypatch.setattr(adamw, "TILE", 64)
        monkeypatch.setattr(adamw, "CHUNK", 256)


def example(*shape: int) -> dict[str, Tensor]:
    """A state as it is in the middle of a training run, the master not that of a rounded weight."""
    tensors = {
        "parameters": torch.empty(shape, dtype=torch.bfloat16),
        "grads": torch.randn(shape).bfloat16(),
        "exp_avgs": torch.randn(shape),
        "exp_avg_sqs": torch.rand(shape) + 0.01,
        "remainders": torch.empty(shape, dtype=torch.int16),
    }
    split_master(torch.randn(shape), tensors["parameters"], tensors["remainders"])
    return tensors


State = dict[str, Tensor]
"""The tensors of one parameter, by the names of the lists."""


def truth(state: State, step: int, options: dict[str, Any] = OPTIONS) -> State:
    """The docstring's formulas in float64."""
    (beta1, beta2), rate = options["betas"], options["learning_rate"]
    g, m, v = (state[name].double() for name in ("grads", "exp_avgs", "exp_avg_sqs"))
    master = join_master(state["parameters"], state["remainders"]).double()
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    denominator = (v / (1 - beta2**step)).sqrt() + options["eps"]
    master = (1 - rate * options["weight_decay"]) * master - rate * m / (1 - beta1**step) / denominator
    return {"exp_avgs": m, "exp_avg_sqs": v, "masters": master}


def lists(states: list[State]) -> dict[str, list[Tensor]]:
    return {name: [state[name] for state in states] for name in LISTS}


def all_stepped(states: list[State], backend: Backend, step: int, **options: Any) -> list[State]:
    """What one call makes of copies of the states."""
    copies = [{name: tensor.to(backend.device, copy=True) for name, tensor in state.items()} for state in states]
    assert ops.adamw_step(**lists(copies), **{**OPTIONS, **options}, step=step, impl=backend.impl) is None
    return [{name: tensor.cpu() for name, tensor in state.items()} for state in copies]


def stepped(state: State, backend: Backend, step: int, **options: Any) -> State:
    return all_stepped([state], backend, step, **options)[0]


def results(state: State) -> State:
    return {
        "exp_avgs": state["exp_avgs"],
        "exp_avg_sqs": state["exp_avg_sqs"],
        "masters": join_master(state["parameters"], state["remainders"]),
    }


def assert_same_bits(found: State, wanted: State) -> None:
    for name in LISTS:
        assert torch.equal(found[name], wanted[name]), name


@backends("adamw_step")
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_a_step_is_that_of_the_formula(backend: Backend, step: int) -> None:
    states = [example(*shape) for shape in SHAPES]
    for state, after in zip(states, all_stepped(states, backend, step), strict=True):
        true = truth(state, step)
        plain = results(stepped(state, Backend("cpu", "reference"), step))
        for name, got in results(after).items():
            assert_no_worse_than_reference(got, plain[name], true[name])
        # The weight is what is left of the master in 8 bits; the gradient is not touched.
        assert torch.equal(after["grads"], state["grads"])
        master = results(after)["masters"]
        assert bool(((after["parameters"].double() - master.double()).abs() <= master.double().abs() * 2**-8).all())


@backends("adamw_step")
def test_a_list_is_updated_as_one_by_one(backend: Backend) -> None:
    """To the last bit, whatever stands beside a tensor, before it and behind it."""
    states = [example(*shape) for shape in SHAPES]
    alone = [stepped(state, backend, 2) for state in states]
    for found, wanted in zip(all_stepped(states, backend, 2), alone, strict=True):
        assert_same_bits(found, wanted)
    for found, wanted in zip(all_stepped(states[::-1], backend, 2)[::-1], alone, strict=True):
        assert_same_bits(found, wanted)


@backends("adamw_step")
def test_many_weights_are_updated_each_once(backend: Backend) -> None:
    """Over the tiles of a GPU and the threads of a CPU, whose borders are nowhere near a register's."""
    sizes = (1_001, 0, 2_003, 5) if interpreted(backend) else (200_003, 0, 4_096, 7, 70_001, 1)
    states = [example(size) for size in sizes]
    for state, after in zip(states, all_stepped(states, backend, 3), strict=True):
        true, plain = truth(state, 3), results(stepped(state, Backend("cpu", "reference"), 3))
        for name, got in results(after).items():
            assert_no_worse_than_reference(got, plain[name], true[name])


@backends("adamw_step")
def test_chunks_of_every_day(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    if interpreted(backend):
        from tlcr.kernels import adamw

        monkeypatch.setattr(adamw, "TILE", 1024)
        monkeypatch.setattr(adamw, "CHUNK", 4096)
    states = [example(size) for size in (4_096, 9_001, 576)]
    for state, after in zip(states, all_stepped(states, backend, 3), strict=True):
        true, plain = truth(state, 3), results(stepped(state, Backend("cpu", "reference"), 3))
        for name, got in results(after).items():
            assert_no_worse_than_reference(got, plain[name], true[name])


@backends("adamw_step")
@pytest.mark.parametrize("at", [1, 3, 8])
def test_the_same_bits_wherever_a_weight_lies(backend: Backend, at: int) -> None:
    """Memory that begins in the middle of a register, or where 16 bytes are not read at once."""
    state = example(1_000)
    wanted = stepped(state, backend, 2)
    views = {name: torch.zeros(1_100, dtype=tensor.dtype, device=backend.device) for name, tensor in state.items()}
    views = {name: view[at : at + 1_000] for name, view in views.items()}
    for name, view in views.items():
        view.copy_(state[name])
    ops.adamw_step(**lists([views]), **OPTIONS, step=2, impl=backend.impl)
    assert_same_bits({name: view.cpu() for name, view in views.items()}, wanted)


@backends("adamw_step")
def test_tensors_that_move_between_steps(backend: Backend) -> None:
    """Where they lie is remembered on a GPU, and found anew for the one that moved. Nobody else's memory is written."""
    states = [{name: tensor.to(backend.device) for name, tensor in example(300).items()} for _ in range(3)]
    wanted = [{name: tensor.to("cpu", copy=True) for name, tensor in state.items()} for state in states]
    for step, name in enumerate(LISTS, 1):
        left = states[1][name]
        states[1] = states[1] | {name: left.clone()}
        left.fill_(1)
        ops.adamw_step(**lists(states), **OPTIONS, step=step, impl=backend.impl)
        wanted = [stepped(state, backend, step) for state in wanted]
        assert bool((left == 1).all())
        for found, state in zip(states, wanted, strict=True):
            assert_same_bits({name: tensor.cpu() for name, tensor in found.items()}, state)


@backends("adamw_step")
def test_lists_of_nothing(backend: Backend) -> None:
    assert ops.adamw_step([], [], [], [], [], learning_rate=0.1, step=1, impl=backend.impl) is None
    (after,) = all_stepped([example(0, 3)], backend, 1)
    assert after["parameters"].shape == (0, 3)


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
    split_master(masters, state["parameters"], state["remainders"])
    after = stepped(state, backend, 1, learning_rate=0.0)
    assert torch.equal(results(after)["masters"], masters)
    assert torch.equal(after["parameters"], state["parameters"])
    assert torch.equal(after["remainders"], state["remainders"])
    assert after["parameters"][:8].view(torch.int16).tolist() == [
        0x3F80, 0x3F80, 0x3F81, 0x3F81, 0x3F82, 0x0080, 0x7F80, 0x7F80
    ]  # fmt: skip
    middle = (masters.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(after["parameters"][~middle], masters[~middle].bfloat16())


@backends("adamw_step")
def test_a_gradient_that_is_no_number_shows_in_the_weight(backend: Backend) -> None:
    """And in no other. The bits of some NaN, rounded like a number, would be -0."""
    state = example(40)
    state["grads"][5] = NAN
    state["grads"][17] = INF  # m / sqrt(v) is inf / inf
    after = stepped(state, backend, 1)
    clean = stepped({**state, "grads": state["grads"].nan_to_num(0.0, 0.0)}, backend, 1)
    wrong = torch.zeros(40, dtype=torch.bool)
    wrong[[5, 17]] = True
    assert torch.equal(after["parameters"].isnan(), wrong)
    assert torch.equal(results(after)["masters"].isnan(), wrong)
    assert torch.equal(after["parameters"][~wrong], clean["parameters"][~wrong])
    assert bool(stepped(after, backend, 2)["parameters"].isnan()[wrong].all())


@backends("adamw_step")
def test_gaps_in_memory(backend: Backend) -> None:
    """Views with strides are changed where they lie, others beside them too; what lies in the gaps stays."""
    states = [example(5, 6), example(40), example(5, 6)]
    wanted = all_stepped(states, backend, 2)
    views = [{name: tensor.to(backend.device) for name, tensor in state.items()} for state in states]
    views[0] = {name: strided(tensor) for name, tensor in views[0].items()}
    views[2]["exp_avgs"] = strided(views[2]["exp_avgs"])  # one of five is enough
    assert not views[0]["parameters"].is_contiguous()
    ops.adamw_step(**lists(views), **OPTIONS, step=2, impl=backend.impl)
    for found, state in zip(views, wanted, strict=True):
        for name, result in results(state).items():
            torch.testing.assert_close(results(found)[name].cpu(), result, rtol=1e-6, atol=1e-7)
    base = views[0]["parameters"]._base
    assert base is not None and bool((base[::2] == 0).all() and (base[:, ::2] == 0).all())


@backends("adamw_step")
@pytest.mark.parametrize("name", ["parameters", "exp_avgs", "exp_avg_sqs"])
@pytest.mark.parametrize("laid_out", [Tensor.contiguous, strided])
def test_a_backward_pass_through_what_was_there_before_is_refused(
    backend: Backend, name: str, laid_out: Callable[[Tensor], Tensor]
) -> None:
    """As torch does for its own operators: the gradient would be that of other numbers."""
    states = [{key: laid_out(tensor.to(backend.device)) for key, tensor in example(5, 6).items()} for _ in range(2)]
    kept = states[1][name].requires_grad_()
    square = (kept * kept).sum()
    ops.adamw_step(**lists(states), **OPTIONS, step=2, impl=backend.impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@backends("adamw_step")
def test_what_is_changed_counts_its_versions(backend: Backend) -> None:
    state = {name: tensor.to(backend.device) for name, tensor in example(40).items()}
    before = {name: tensor._version for name, tensor in state.items()}
    ops.adamw_step(**lists([state]), **OPTIONS, step=2, impl=backend.impl)
    assert {name for name, tensor in state.items() if tensor._version > before[name]} == {*LISTS} - {"grads"}


@backends("adamw_step")
def test_tensors_of_inference_mode_are_changed_in_it(backend: Backend) -> None:
    """They have no versions."""
    states = [example(40), example(7)]
    wanted = all_stepped(states, backend, 2)
    with torch.inference_mode():
        found = all_stepped(states, backend, 2)
        assert found[0]["exp_avgs"].is_inference()
    for one, other in zip(found, wanted, strict=True):
        assert_same_bits(one, other)


@backends("adamw_step")
def test_columns_of_one_matrix_are_parameters_of_their_own(backend: Backend) -> None:
    state = example(6, 8)
    wanted = stepped(state, backend, 2)
    whole = {name: tensor.to(backend.device) for name, tensor in state.items()}
    halves = [{name: tensor[:, at::2] for name, tensor in whole.items()} for at in (0, 1)]
    ops.adamw_step(**lists(halves), **OPTIONS, step=2, impl=backend.impl)
    for name, result in results(wanted).items():
        torch.testing.assert_close(results(whole)[name].cpu(), result, rtol=1e-6, atol=1e-7)


@backends("adamw_step")
def test_the_same_bits_on_every_call(backend: Backend) -> None:
    state = example(1_000)
    first, second = (stepped(state, backend, 2) for _ in range(2))
    assert_same_bits(first, second)


ON_THREADS = """
import hashlib, torch
from tests.ops import test_adamw_step as tests
for threads in (1, 3):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    states = [tests.example(size) for size in (100_003, 5, 0, 300_001, 4_096, 12_289)]
    tests.ops.adamw_step(**tests.lists(states), **tests.OPTIONS, step=2)
    parts = [tensor.view(torch.uint8).numpy().tobytes() for state in states for tensor in state.values()]
    print(hashlib.sha256(b"".join(parts)).hexdigest())
"""


def test_threads_share_the_lists_and_change_no_bit() -> None:
    done = run(ON_THREADS, Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    one, three = done.stdout.split()
    assert one == three


def test_the_first_step_by_hand() -> None:
    """With fresh moments it is -rate (sign(g) + weight_decay w), whatever the betas: 2 - 0.1 (1 + 0.5 * 2)."""
    state = {name: torch.zeros_like(tensor) for name, tensor in example(2).items()}
    state["parameters"] = torch.tensor([2.0, -3.0]).bfloat16()
    state["grads"] = torch.tensor([4.0, -0.5]).bfloat16()
    ops.adamw_step(**lists([state]), learning_rate=0.1, weight_decay=0.5, eps=0.0, step=1)
    torch.testing.assert_close(results(state)["masters"], torch.tensor([1.8, -3 + 0.1 * (1 + 0.5 * 3)]))
    assert math.isclose(state["exp_avgs"][0], 0.1 * 4.0, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"parameters": torch.zeros(3)}, ShapeError, r"parameters\[1\] has dtype torch.float32, wanted torch.bfloat16"),
        (
            {"exp_avgs": torch.zeros(3).bfloat16()},
            ShapeError,
            r"exp_avgs\[1\] has dtype torch.bfloat16, wanted",
        ),
        ({"remainders": torch.zeros(4).short()}, ShapeError, r"remainders\[1\] has shape \(4,\), wanted \(3,\)"),
        ({"grads": None}, ShapeError, r"grads\[1\] is a NoneType, wanted a torch.Tensor"),
        ({"parameters": None}, ShapeError, r"parameters\[1\] is a NoneType, wanted a torch.Tensor"),
        (
            {"exp_avgs": torch.zeros(3, device="meta")},
            ShapeError,
            r"exp_avgs\[1\] is on meta but parameters\[0\] is on",
        ),
        ({"grads": torch.zeros(3).bfloat16().to_sparse()}, ShapeError, r"grads\[1\] has layout torch.sparse_coo"),
        ({"step": 0}, ConfigError, "step is 0, wanted the number of this step, an int from 1"),
        ({"betas": (0.9, 0.95, 0.99)}, ConfigError, r"betas is \(0.9, 0.95, 0.99\), wanted two Python numbers"),
        ({"betas": 0.9}, ConfigError, r"betas is 0.9, wanted two Python numbers"),
        ({"betas": (0.9, 1.0)}, ConfigError, r"betas\[1\] is 1, wanted a number >= 0 and < 1"),
        ({"learning_rate": -1.0}, ConfigError, "learning_rate is -1, wanted a number >= 0"),
        ({"eps": NAN}, ConfigError, "eps is nan"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {**lists([example(2), example(3)]), **OPTIONS, "step": 1}
    for name, value in changes.items():
        arguments[name] = [arguments[name][0], value] if name in LISTS else value
    with pytest.raises(error, match=f"adamw_step: {message}"):
        ops.adamw_step(**arguments)


def test_lists_that_differ_in_length_are_refused() -> None:
    given = lists([example(2), example(3)])
    with pytest.raises(ShapeError, match="grads has 1 tensors, wanted 2, one for each of parameters"):
        ops.adamw_step(**given | {"grads": given["grads"][:1]}, **OPTIONS, step=1)


def test_memory_that_would_be_changed_twice_is_refused() -> None:
    """The results would depend on which thread comes first."""
    pool = torch.zeros(200)
    first, second = example(100), example(100)
    cases = {
        r"parameters\[0\] and parameters\[2\]": [first, second, first],
        r"exp_avgs\[0\] and exp_avg_sqs\[1\]": [
            first | {"exp_avgs": pool[:100]},
            second | {"exp_avg_sqs": pool[99:199]},
        ],
        r"grads\[0\] and remainders\[1\]": [
            first | {"grads": pool[:50].view(torch.bfloat16)},
            second | {"remainders": pool[20:70].view(torch.int16)},
        ],
        r"exp_avgs\[0\] and exp_avg_sqs\[0\]": [first | {"exp_avgs": pool[::2], "exp_avg_sqs": pool[::2]}],
    }
    for names, states in cases.items():
        with pytest.raises(ShapeError, match=f"adamw_step: {names} share memory, wanted memory of its own"):
            ops.adamw_step(**lists(states), **OPTIONS, step=1)


def test_memory_that_is_only_read_may_be_shared() -> None:
    """And what touches another's memory without having a part of it."""
    pool = torch.zeros(201)
    grads = torch.randn(100).bfloat16()
    states = [example(100) | {"grads": grads}, example(100) | {"grads": grads}, example(50) | {"grads": grads[25:75]}]
    states[0] |= {"exp_avgs": pool[:100], "exp_avg_sqs": pool[100:200]}
    states.append(example(0) | {"exp_avgs": pool[50:50]})
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    ops.adamw_step(**lists(states), **OPTIONS, step=1)
    for found, state in zip(states, before, strict=True):
        assert_same_bits(found, stepped(state, Backend("cpu", "auto"), 1))
