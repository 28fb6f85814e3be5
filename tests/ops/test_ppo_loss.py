"""ppo_loss."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import (
    INF,
    NAN,
    Backend,
    assert_close,
    assert_no_worse_than_reference,
    backends,
    crossed,
    interpreted,
    row_lengths,
    strided,
    to_device,
)
from tlcr import ops
from tlcr.errors import ConfigError, ShapeError
from tlcr.ops import PPOLoss, _extension

TRAINED = ("logprobs", "values", "entropy", "kl")


def truth(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    value_clip: float | None = 0.2,
    value_coef: float = 1.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    aggregate: str = "token",
    denominator: float | None = None,
) -> dict[str, float]:
    """The docstring's formulas, token by token, on Python floats."""
    rows: list[list[dict[str, float]]] = []
    ratio_max = 0.0
    for b in range(mask.shape[0]):
        rows.append([])
        for t in range(mask.shape[1]):
            if not mask[b, t]:
                continue
            log_ratio = float(logprobs[b, t].double() - old_logprobs[b, t].double())
            ratio, advantage = math.exp(log_ratio), float(advantages[b, t])
            near = min(max(ratio, 1 - clip), 1 + (clip if clip_high is None else clip_high))
            policy = max(-advantage * ratio, -advantage * near)
            if dual_clip is not None and advantage < 0:
                policy = min(policy, -dual_clip * advantage)
            token = {
                "policy": policy,
                "clip_fraction": float(-advantage * near > -advantage * ratio),
                "approx_kl": ratio - 1 - log_ratio,
                "value": 0.0,
                "value_clip_fraction": 0.0,
                "entropy": 0.0 if entropy is None else float(entropy[b, t]),
                "kl": 0.0 if kl is None else float(kl[b, t]),
            }
            if values is not None and returns is not None:
                value, target = float(values[b, t]), float(returns[b, t])
                token["value"] = 0.5 * (value - target) ** 2
                if value_clip is not None and old_values is not None:
                    old = float(old_values[b, t])
                    near_loss = 0.5 * (old + min(max(value - old, -value_clip), value_clip) - target) ** 2
                    token["value_clip_fraction"] = float(abs(value - old) > value_clip and near_loss > token["value"])
                    token["value"] = max(token["value"], near_loss)
            rows[-1].append(token)
            ratio_max = max(ratio_max, ratio)
    counted = [token for row in rows for token in row]
    full = [row for row in rows if row]
    result = {"ratio_max": ratio_max}
    for name in ("policy", "value", "entropy", "kl", "clip_fraction", "value_clip_fraction", "approx_kl"):
        if aggregate == "token":
            terms = [token[name] for token in counted]
        else:
            terms = [math.fsum(token[name] for token in row) / len(row) for row in full]
        result[name] = math.fsum(terms) / (denominator or max(len(terms), 1))
    result["loss"] = result["policy"] + value_coef * result["value"]
    result["loss"] += kl_coef * result["kl"] - entropy_coef * result["entropy"]
    return result


def example(
    batch: int = 5, length: int = 8, dtype: torch.dtype = torch.float32, masked: float = 0.3
) -> dict[str, Tensor]:
    shape = (batch, length)
    old_logprobs, old_values = torch.randn(shape) - 2, torch.randn(shape)
    tensors = {
        "logprobs": old_logprobs + 0.4 * torch.randn(shape),
        "old_logprobs": old_logprobs,
        "advantages": torch.randn(shape),
        "values": old_values + 0.4 * torch.randn(shape),
        "old_values": old_values,
        "returns": old_values + torch.randn(shape),
        "entropy": torch.rand(shape),
        "kl": torch.rand(shape),
    }
    mask = torch.rand(shape) >= masked
    mask[-1:] = False
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | {"mask": mask}


def gradients(inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """The gradient of the loss with respect to each trained input, 0 where it takes no part."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in TRAINED}
    loss = ops.ppo_loss(**inputs | leaves, **options).loss
    found = torch.autograd.grad(loss, tuple(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(TRAINED, found, strict=True))


def assert_matches(got: PPOLoss, wanted: dict[str, float]) -> None:
    for name, result in got._asdict().items():
        assert result.shape == (), name
        assert_close(result, wanted[name], magnitude=1.0)


COEFFICIENTS: dict[str, Any] = {"value_coef": 0.7, "entropy_coef": 0.01, "kl_coef": 0.05}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"clip": 0.1, "clip_high": 0.3},
    {"dual_clip": 1.5},
    {"value_clip": None},
    {"value_clip": 0.05},
    {"aggregate": "sequence"},
    {"denominator": 17},
    {"aggregate": "sequence", "denominator": 3.0, "dual_clip": 3.0},
]


@backends("ppo_loss")
def test_hand_worked(backend: Backend) -> None:
    # r = 1.5, 0.5, 0.5, 1 with A = 1, 1, -1, 2 and clip 0.2: losses -1.2 (clipped), -0.5, 0.8 (clipped), -2.
    ratio = torch.tensor([[1.5, 0.5, NAN], [0.5, 1.0, INF]])
    inputs = to_device(
        {
            "logprobs": ratio.log() - 1,
            "old_logprobs": torch.tensor([[-1.0, -1.0, INF], [-1.0, -1.0, NAN]]),
            "advantages": torch.tensor([[1.0, 1.0, NAN], [-1.0, 2.0, INF]]),
            "mask": torch.tensor([[True, True, False], [True, True, False]]),
            # V - V_old = 0.5, 0.1, -1, 0 and R = 1, 0, 0, 3 at V_old = 0: losses of V 0.25, 0.01, 1, 9; near V_old
            # V is 0.2, 0.1, -0.2, 0 with losses 0.64 (clipped), 0.01, 0.04, 9.
            "values": torch.tensor([[0.5, 0.1, NAN], [-1.0, 0.0, NAN]]),
            "old_values": torch.tensor([[0.0, 0.0, NAN], [0.0, 0.0, INF]]),
            "returns": torch.tensor([[1.0, 0.0, NAN], [0.0, 3.0, INF]]),
            "entropy": torch.tensor([[1.0, 2.0, NAN], [3.0, 4.0, NAN]]),
            "kl": torch.tensor([[0.4, 0.3, INF], [0.2, 0.1, NAN]]),
        },
        backend.device,
    )
    options: dict[str, Any] = {"value_coef": 0.5, "entropy_coef": 0.1, "kl_coef": 2.0, "impl": backend.impl}
    got = ops.ppo_loss(**inputs, **options)
    policy, value = (-1.2 - 0.5 + 0.8 - 2) / 4, 0.5 * (0.64 + 0.01 + 1 + 9) / 4
    wanted = {
        "loss": policy + 0.5 * value - 0.1 * 2.5 + 2.0 * 0.25,
        "policy": policy,
        "value": value,
        "entropy": 2.5,
        "kl": 0.25,
        "clip_fraction": 0.5,
        "value_clip_fraction": 0.25,
        "approx_kl": (0.5 - math.log(1.5) + 2 * (math.log(2) - 0.5) + 0) / 4,
        "ratio_max": 1.5,
    }
    assert_matches(got, wanted)
    grads = gradients(inputs, **options)
    assert_close(grads["logprobs"], [[0.0, -0.125, 0.0], [0.0, -0.5, 0.0]])
    assert_close(grads["values"], [[0.0, 0.0125, 0.0], [-0.125, -0.375, 0.0]])
    assert_close(grads["entropy"], [[-0.025, -0.025, 0.0]] * 2)
    assert_close(grads["kl"], [[0.5, 0.5, 0.0]] * 2)
    for name, result in got._asdict().items():
        with pytest.raises(AssertionError):
            assert_close(result * (1 + 1e-4), wanted[name], magnitude=0.0)
    shifted = ops.ppo_loss(**inputs | {"advantages": inputs["advantages"].roll(1, dims=0)}, **options)
    with pytest.raises(AssertionError):
        assert_matches(shifted, wanted)


@backends("ppo_loss")
def test_a_value_that_moved_within_its_bounds_is_not_clipped(backend: Backend) -> None:
    """old + (new - old) is rounded, and then further from the return than new is for a part of the tokens."""
    values, old_values, returns, logprobs = torch.randn(4, 3, 40).unbind()
    values, old_values = 0.01 * values, old_values.clamp(-0.1, 0.1)  # so different that their difference is rounded
    assert bool((old_values + (values - old_values) != values).any())
    mask = torch.ones(3, 40, dtype=torch.bool)
    inputs = {"values": values, "old_values": old_values, "returns": returns}
    inputs = to_device(inputs | dict.fromkeys(("logprobs", "old_logprobs", "advantages"), logprobs), backend.device)
    got = ops.ppo_loss(**inputs, mask=mask.to(backend.device), value_clip=0.2, impl=backend.impl)
    assert float(got.value_clip_fraction) == 0.0


@backends("ppo_loss")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_against_the_formula(backend: Backend, dtype: torch.dtype, options: dict[str, Any]) -> None:
    inputs = example(dtype=dtype)
    options = COEFFICIENTS | options
    wanted = truth(**inputs, **options)
    arguments = to_device(inputs, backend.device)
    got = ops.ppo_loss(**arguments, **options, impl=backend.impl)
    assert got.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_matches(got, wanted)
    assert_matches(ops.ppo_loss(**{k: strided(v) for k, v in arguments.items()}, **options, impl=backend.impl), wanted)


@backends("ppo_loss")
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(backend: Backend, options: dict[str, Any]) -> None:
    inputs = to_device(example(3, 4, torch.float64), backend.device)
    leaves = tuple(inputs[name].requires_grad_() for name in TRAINED)

    def function(*trained: Tensor) -> Tensor:
        named = dict(zip(TRAINED, trained, strict=True))
        return ops.ppo_loss(**inputs | named, **COEFFICIENTS | options, impl=backend.impl).loss

    assert torch.autograd.gradcheck(function, leaves, fast_mode=interpreted(backend))


# Under the interpreter half of them: all options, each with two dtypes.
@crossed("ppo_loss", lambda dtype, options: (dtype + options) % 2 == 0, dtype=DTYPES, options=OPTIONS)
def test_every_length(backend: Backend, dtype: torch.dtype, options: dict[str, Any]) -> None:
    options = COEFFICIENTS | options
    for length in row_lengths(backend):
        inputs = example(5, length, dtype)
        arguments = to_device(inputs, backend.device)
        assert_matches(ops.ppo_loss(**arguments, **options, impl=backend.impl), truth(**inputs, **options))
        wide = {name: tensor.double() if name != "mask" else tensor for name, tensor in inputs.items()}
        wanted = gradients(wide, **options, impl="reference")
        for name, grad in gradients(arguments, **options, impl=backend.impl).items():
            assert grad.dtype == dtype
            assert_close(grad, wanted[name])


@backends("ppo_loss")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"dual_clip": 2.0}, {"clip": 0.0}, {"clip_high": 0.5, "value_clip": 0.25}])
def test_gradients_at_every_edge(backend: Backend, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Ties, bounds and caps, met exactly and passed by a hair: the branch taken is the one that autograd takes."""
    low, high = 1 - options.get("clip", 0.2), 1 + options.get("clip_high", options.get("clip", 0.2))
    # On which side of a bound exp(log(bound)) falls is a matter of its rounding; exp(0) is 1 everywhere.
    edges, hair = torch.tensor([low, 1.0, high, 2.0], dtype=dtype).log(), 32 * torch.finfo(dtype).eps
    exact = torch.tensor([0.0, -200.0, -5.0, 39.0, 40.0, 41.0, 500.0, NAN], dtype=dtype)
    log_ratios = torch.cat([edges + hair, edges - hair, exact])
    log_ratio, advantage = torch.cartesian_prod(log_ratios, torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=dtype)).T
    moves = torch.tensor([-1.0, -0.25, -0.2, -0.1, 0.0, 0.1, 0.2, 0.25, 1.0, NAN], dtype=dtype)
    moves = torch.cat([moves, moves.nextafter(moves + 1), moves.nextafter(moves - 1)])
    move, target = torch.cartesian_prod(moves, torch.tensor([-0.5, 0.0, 0.1, 0.6, 2.0], dtype=dtype)).T

    def row(x: Tensor) -> Tensor:
        """One row, so long that every edge meets whole registers and the rest."""
        return x.repeat(-(-163 // x.numel()))[:163].unsqueeze(0)

    policy = {"logprobs": row(log_ratio), "advantages": row(advantage)}
    value = {"values": row(move), "returns": row(target)}
    inputs = policy | value | {"old_logprobs": torch.zeros(1, 163, dtype=dtype), "mask": torch.ones(1, 163).bool()}
    inputs |= {"old_values": inputs["old_logprobs"], "entropy": inputs["values"], "kl": inputs["values"]}
    # The sums are NaN, for there are NaNs among the tokens; the gradients are each token's own.
    wanted = gradients(inputs, **COEFFICIENTS, **options, impl="reference")
    got = gradients(to_device(inputs, backend.device), **COEFFICIENTS, **options, impl=backend.impl)
    for name, grad in got.items():
        assert torch.equal(grad.isnan().cpu(), wanted[name].isnan()), name
        torch.testing.assert_close(
            grad.cpu(), wanted[name], rtol=64 * torch.finfo(dtype).eps, atol=0.0, equal_nan=True, msg=name
        )


@backends("ppo_loss")
@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_each_gradient_alone_is_the_same_as_together(backend: Backend, aggregate: str) -> None:
    inputs = to_device(example(4, 37), backend.device)
    options: dict[str, Any] = COEFFICIENTS | {"aggregate": aggregate, "impl": backend.impl}
    together = gradients(inputs, **options)
    for name in TRAINED:
        leaf = inputs[name].clone().requires_grad_()
        (alone,) = torch.autograd.grad(ops.ppo_loss(**inputs | {name: leaf}, **options).loss, leaf)
        assert alone.any() and torch.equal(alone, together[name])


@backends("ppo_loss")
@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_repeats_bitwise_and_a_row_does_not_depend_on_the_others(backend: Backend, aggregate: str) -> None:
    inputs = to_device(example(6, 37), backend.device)
    # With a denominator a row's gradients are its own.
    options: dict[str, Any] = COEFFICIENTS | {"aggregate": aggregate, "denominator": 11, "impl": backend.impl}
    whole, whole_grads = ops.ppo_loss(**inputs, **options), gradients(inputs, **options)
    assert all(torch.equal(a, b) for a, b in zip(ops.ppo_loss(**inputs, **options), whole, strict=True))
    for row in range(6):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        for name, grad in gradients(one, **options).items():
            assert torch.equal(grad[0], whole_grads[name][row])


@backends("ppo_loss")
@pytest.mark.parametrize("shape", [(1, 1_000_000), (1000, 1000)])
def test_many_tokens_as_accurate_as_plain_torch(backend: Backend, shape: tuple[int, int]) -> None:
    if interpreted(backend):
        shape = (min(shape[0], 10), min(shape[1], 10_000))
    inputs = example(*shape)
    inputs["mask"][:] = True
    inputs["returns"] += 5  # a mean far from 0, so that rounding cannot hide behind cancellation
    got = ops.ppo_loss(**to_device(inputs, backend.device), **COEFFICIENTS, impl=backend.impl)
    wide = {name: tensor.double() if name != "mask" else tensor for name, tensor in inputs.items()}
    true = ops.ppo_loss(**wide, **COEFFICIENTS, impl="reference")
    plain = ops.ppo_loss(**inputs, **COEFFICIENTS, impl="reference")
    for result, of_plain, wanted in zip(got, plain, true, strict=True):
        assert_no_worse_than_reference(result, of_plain, wanted)


@backends("ppo_loss")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_come_back_in_the_dtype_of_their_input(backend: Backend, dtype: torch.dtype) -> None:
    inputs = to_device(example(dtype=dtype), backend.device)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    wanted = gradients(wide, **COEFFICIENTS, impl="reference")
    for name, grad in gradients(inputs, **COEFFICIENTS, impl=backend.impl).items():
        assert grad.dtype == dtype
        assert_close(grad, wanted[name])


@backends("ppo_loss")
def test_as_accurate_as_plain_torch(backend: Backend) -> None:
    inputs = example(16, 128)
    mask = inputs["mask"]
    log_ratio = inputs["logprobs"] - inputs["old_logprobs"]
    ratio, advantages = log_ratio.exp(), inputs["advantages"]
    plain = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))[mask].mean()
    got = ops.ppo_loss(**to_device(inputs, backend.device), impl=backend.impl)
    wanted = truth(**inputs)
    assert_no_worse_than_reference(got.policy, plain, torch.tensor(wanted["policy"], dtype=torch.float64), slack=8)
    # Near r = 1, r - 1 - log r is all cancellation unless it is formed with expm1.
    inputs["logprobs"] = inputs["old_logprobs"] + 1e-3 * torch.randn(16, 128)
    got = ops.ppo_loss(**to_device(inputs, backend.device), impl=backend.impl)
    assert abs(float(got.approx_kl) / truth(**inputs)["approx_kl"] - 1) < 1e-2


@backends("ppo_loss")
@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e30])
def test_what_does_not_count_leaves_no_trace(backend: Backend, poison: float) -> None:
    inputs = example(2, 8) if interpreted(backend) else example()
    options: dict[str, Any] = COEFFICIENTS | {"dual_clip": 2.0, "impl": backend.impl}
    clean = to_device(inputs, backend.device)
    wanted, of_clean = ops.ppo_loss(**clean, **options), gradients(clean, **options)
    for name, tensor in inputs.items():
        if name == "mask":
            continue
        dirty = to_device(inputs | {name: tensor.masked_fill(~inputs["mask"], poison)}, backend.device)
        for result, true in zip(ops.ppo_loss(**dirty, **options), wanted, strict=True):
            assert torch.equal(result, true), name
        for trained, grad in gradients(dirty, **options).items():
            assert torch.equal(grad, of_clean[trained]), name
            assert not grad[~clean["mask"]].any()


@backends("ppo_loss")
@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_parts_of_a_batch_add_up(backend: Backend, aggregate: str) -> None:
    rows = 3 if interpreted(backend) else 6
    inputs = to_device(example(rows, 7), backend.device)
    mask = inputs["mask"]
    count = mask.sum() if aggregate == "token" else mask.any(dim=-1).sum()
    options: dict[str, Any] = COEFFICIENTS | {"aggregate": aggregate, "impl": backend.impl}
    whole = ops.ppo_loss(**inputs, **options)
    whole_grads = gradients(inputs, **options)
    for denominator in (float(count), count, count.double().reshape(1)):
        for bounds in ([(0, 1), (1, rows)], [(b, b + 1) for b in range(rows)]):
            parts = [{k: v[low:high] for k, v in inputs.items()} for low, high in bounds]
            losses = [ops.ppo_loss(**part, **options, denominator=denominator) for part in parts]
            for name in PPOLoss._fields[:-1]:
                total = torch.stack([getattr(loss, name) for loss in losses]).sum()
                assert_close(total, getattr(whole, name), magnitude=1.0)
            grads = [gradients(part, **options, denominator=denominator) for part in parts]
            for name in TRAINED:
                assert_close(torch.cat([grad[name] for grad in grads]), whole_grads[name])


@backends("ppo_loss")
@pytest.mark.parametrize("aggregate", ["token", "sequence"])
@pytest.mark.parametrize("denominator", [None, "zero", 4])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3)])
def test_nothing_counts(backend: Backend, aggregate: str, denominator: Any, shape: tuple[int, int]) -> None:
    inputs = to_device(example(*shape, masked=1.0), backend.device)
    assert not inputs["mask"].any()
    if denominator == "zero":
        denominator = torch.zeros((), device=backend.device)
    options: dict[str, Any] = {"aggregate": aggregate, "denominator": denominator, "impl": backend.impl}
    assert not any(result.any() for result in ops.ppo_loss(**inputs, **options, **COEFFICIENTS))
    assert not any(grad.any() for grad in gradients(inputs, **options, **COEFFICIENTS).values())


@backends("ppo_loss")
def test_only_the_loss_carries_a_gradient_and_only_to_what_is_trained(backend: Backend) -> None:
    inputs = to_device(example(), backend.device)
    floats = [tensor.requires_grad_() for tensor in inputs.values() if tensor.is_floating_point()]
    got = ops.ppo_loss(**inputs, **COEFFICIENTS, impl=backend.impl)
    assert [name for name, result in got._asdict().items() if result.requires_grad] == ["loss"]
    got.loss.backward()
    trained = [name for name, tensor in inputs.items() if tensor.is_floating_point() and tensor.grad is not None]
    assert len(floats) == 8 and sorted(trained) == sorted(TRAINED)


@backends("ppo_loss")
def test_gradient_at_a_tie_is_that_of_the_unclipped_side(backend: Backend) -> None:
    # V = 1, V_old = 0, near V_old 0.2, R = 0.6: both sides of the value's max are 0.4^2.
    one = torch.ones(1, 1, dtype=torch.float64, device=backend.device)
    values = one.clone().requires_grad_()
    arguments = {"logprobs": -one, "old_logprobs": -one, "advantages": 0 * one, "mask": one.bool()}
    got = ops.ppo_loss(
        **arguments, values=values, old_values=0 * one, returns=0.6 * one, value_clip=0.2, impl=backend.impl
    )
    (grad,) = torch.autograd.grad(got.loss, values)
    assert_close(grad, [[0.4]])


@backends("ppo_loss")
def test_a_term_without_weight_is_reported_but_takes_no_part(backend: Backend) -> None:
    inputs = to_device(example(), backend.device)
    inputs["kl"] = torch.full_like(inputs["kl"], INF)
    got = ops.ppo_loss(**inputs, value_coef=0.0, impl=backend.impl)
    assert got.kl == INF and got.loss.isfinite() and torch.equal(got.loss, got.policy)
    assert got.value > 0 and got.entropy > 0
    grads = gradients(inputs, value_coef=0.0, impl=backend.impl)
    assert all(grad.isfinite().all() for grad in grads.values()) and not grads["values"].any()


@backends("ppo_loss")
def test_an_exploded_ratio_is_clipped_without_nan(backend: Backend) -> None:
    logprobs = torch.tensor([[0.0, 0.0, -1.0]], device=backend.device).requires_grad_()
    old = torch.tensor([[-500.0, -500.0, -1.0]], device=backend.device)
    advantages = torch.tensor([[1.0, 0.0, 1.0]], device=backend.device)
    mask = torch.ones(1, 3, dtype=torch.bool, device=backend.device)
    got = ops.ppo_loss(logprobs, old, advantages, mask, impl=backend.impl)
    assert_close(got.policy, (-1.2 - 0.0 - 1.0) / 3)
    assert 1e17 < got.ratio_max < INF and got.approx_kl.isfinite()
    (grad,) = torch.autograd.grad(got.loss, logprobs)
    assert_close(grad, [[0.0, 0.0, -1 / 3]])


@backends("ppo_loss")
def test_nan_that_counts_is_seen(backend: Backend) -> None:
    inputs = to_device(example(masked=0.0), backend.device)
    inputs["logprobs"][0, 0] = NAN
    got = ops.ppo_loss(**inputs, impl=backend.impl)
    assert got.loss.isnan() and got.ratio_max.isnan() and got.approx_kl.isnan()


@backends("ppo_loss")
def test_policy_alone(backend: Backend) -> None:
    inputs = example()
    inputs = {name: inputs[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")}
    got = ops.ppo_loss(**to_device(inputs, backend.device), impl=backend.impl)
    assert_matches(got, truth(**inputs))
    assert got.value == got.entropy == got.kl == got.value_clip_fraction == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"advantages": torch.zeros(5, 7)},
            ShapeError,
            r"advantages has shape \(5, 7\), wanted \(5, 8\) to match logprobs",
        ),
        ({"logprobs": torch.zeros(8)}, ShapeError, r"logprobs has shape \(8,\), wanted 2 axes \(B, T\)"),
        ({"mask": torch.ones(5, 8)}, ShapeError, r"mask has dtype torch.float32"),
        ({"returns": None}, ConfigError, r"values is given but returns is missing"),
        ({"values": None}, ConfigError, r"values is missing; pass values or neither"),
        ({"old_values": None}, ConfigError, r"value_clip is 0.2 but old_values is missing; pass it or value_clip=None"),
        ({"entropy": None, "entropy_coef": 0.1}, ConfigError, r"entropy_coef is 0.1 but entropy is missing"),
        ({"kl": None, "kl_coef": 0.1}, ConfigError, r"kl_coef is 0.1 but kl is missing"),
        ({"dual_clip": 1.0}, ConfigError, r"dual_clip is 1, wanted a number > 1"),
        ({"clip": -0.1}, ConfigError, r"clip is -0.1, wanted a number >= 0"),
        ({"aggregate": "batch"}, ConfigError, r"aggregate='batch' is unknown, choose from 'token', 'sequence'"),
        ({"denominator": 0}, ConfigError, r"denominator is 0, wanted a number > 0"),
        ({"denominator": torch.ones(2)}, ShapeError, r"denominator has shape \(2,\), wanted one element"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="ppo_loss: .*" + message):
        ops.ppo_loss(**{**example(), **changes})


@backends("ppo_loss")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("factor", [1.0, -0.3, 0.0])
def test_what_is_made_of_the_loss_scales_the_gradients(backend: Backend, dtype: torch.dtype, factor: float) -> None:
    inputs = to_device(example(dtype=dtype), backend.device)
    leaves = {name: inputs[name].clone().requires_grad_() for name in TRAINED}
    loss = ops.ppo_loss(**inputs | leaves, **COEFFICIENTS, impl=backend.impl).loss
    (factor * loss).backward()
    wide = {name: tensor.double() if name != "mask" else tensor for name, tensor in inputs.items()}
    for name, wanted in gradients(wide, **COEFFICIENTS, impl="reference").items():
        got = leaves[name].grad
        assert got is not None and got.dtype == dtype and bool(got.any()) == (factor != 0)
        assert_close(got, factor * wanted)


@backends("ppo_loss")
@pytest.mark.parametrize("factor", [INF, NAN])
@pytest.mark.parametrize("kept", [False, True])
def test_a_factor_without_bounds_reaches_no_token_that_does_not_count(
    backend: Backend, factor: float, kept: bool
) -> None:
    """As a loss scale that overflowed: what counts shows it, and what is masked stays exactly 0."""
    inputs = to_device(example(2, 8), backend.device)
    leaves = {name: inputs[name].clone().requires_grad_() for name in TRAINED}
    loss = ops.ppo_loss(**inputs | leaves, **COEFFICIENTS, impl=backend.impl).loss
    (factor * loss).backward(retain_graph=kept)
    for leaf in leaves.values():
        assert leaf.grad is not None
        assert not leaf.grad[~inputs["mask"]].any()
        assert not leaf.grad[inputs["mask"]].isfinite().all()


@backends("ppo_loss")
def test_every_pass_over_a_graph_that_is_kept_gives_gradients_of_its_own(backend: Backend) -> None:
    """Kernels may keep the gradients themselves: what a caller does with those of one pass must not reach the next."""
    inputs = to_device(example(4, 37), backend.device)
    wanted = gradients(inputs, **COEFFICIENTS, impl=backend.impl)
    leaves = {name: inputs[name].clone().requires_grad_() for name in TRAINED}
    loss = ops.ppo_loss(**inputs | leaves, **COEFFICIENTS, impl=backend.impl).loss
    for _ in range(2):
        found = torch.autograd.grad(loss, leaves.values(), retain_graph=True)
        for got, want in zip(found, wanted.values(), strict=True):
            assert torch.equal(got, want)
            got.fill_(NAN)
    loss.backward(retain_graph=True)
    loss.backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and torch.equal(leaf.grad, 2 * wanted[name])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@backends("ppo_loss")
@pytest.mark.parametrize("first", ["plain", "recorded", "batched"])
def test_a_graph_that_is_not_kept_gives_gradients_once(backend: Backend, first: str) -> None:
    inputs = to_device(example(4, 37), backend.device)
    leaves = [inputs[name].requires_grad_() for name in TRAINED]
    loss = ops.ppo_loss(**inputs, **COEFFICIENTS, impl=backend.impl).loss
    one = torch.ones(2 if first == "batched" else (), device=backend.device)
    how = {"create_graph": first == "recorded", "is_grads_batched": first == "batched", "retain_graph": False}
    torch.autograd.grad(loss, leaves, one, **how)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.skipif(_extension.unavailable("cpu") is not None, reason="no C++ kernels here")
def test_many_incoming_gradients_at_once() -> None:
    """The factor of the gradients that C++ keeps is then no number that could be read."""
    inputs = example(3, 9)
    wanted = gradients(inputs, **COEFFICIENTS, impl="cpp")
    leaves = {name: inputs[name].clone().requires_grad_() for name in TRAINED}
    loss = ops.ppo_loss(**inputs | leaves, **COEFFICIENTS, impl="cpp").loss
    got = torch.autograd.grad(loss, leaves.values(), torch.tensor([1.0, 4.0]), is_grads_batched=True)
    for both, want in zip(got, wanted.values(), strict=True):
        assert torch.equal(both, torch.stack([want, 4 * want]))


@pytest.mark.skipif(_extension.unavailable("cpu") is not None, reason="no C++ kernels here")
@pytest.mark.parametrize("aggregate", ["token", "sequence"])
@pytest.mark.parametrize("denominator", [None, 7.0])
def test_gradients_with_the_results_are_those_of_the_backward_pass(aggregate: str, denominator: float | None) -> None:
    """The eager way and the compiled one: the same bits, of results and of gradients."""
    a = example(5, 163)
    arguments: list[Any] = [a["logprobs"], a["old_logprobs"], a["advantages"], a["mask"], 0.2, 0.3, 3.0]
    arguments += [a["values"], a["old_values"], a["returns"], 0.2, 0.5, a["entropy"], 0.01, a["kl"], 0.1]
    of_all = [aggregate == "sequence", denominator, None]
    loss, stats, row_weights = torch.ops.tlcr.ppo_loss(*arguments, *of_all)
    wanted = torch.ops.tlcr.ppo_loss_backward(torch.tensor(1.0), row_weights, *arguments, *[True] * 4)
    got = torch.ops.tlcr.ppo_loss_with_gradients(*arguments, *of_all, *[True] * 4)
    assert torch.equal(loss, got[0])
    for one, other in zip(got, (*stats, *wanted), strict=True):
        assert torch.equal(one, other)
