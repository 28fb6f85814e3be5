"""fused_reward and reward_from_hidden."""

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
    row_lengths,
    strided,
    to_device,
)
from tlcr import ops
from tlcr.errors import ConfigError, ShapeError

LN3 = math.log(3)
KINDS = [("continuous", 0.0), ("discrete", 0.0), ("discrete", 0.4), ("discrete", 1.0)]


def truth(
    logits: Tensor,
    mask: Tensor,
    *,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    terminal: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    clip: float | None = None,
    kind: str = "continuous",
    band: float = 0.0,
) -> Tensor:
    """The docstring's formula, token by token, on Python floats."""
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    for b in range(mask.shape[0]):
        last = None
        for t in range(mask.shape[1]):
            if not mask[b, t]:
                continue
            weights = [math.exp(float(x) / temperature) for x in logits[b, t].double()]
            confidence = (weights[-1] - weights[0]) / sum(weights)
            if kind == "discrete":
                confidence = 0.0 if abs(confidence) <= band else math.copysign(1.0, confidence)
            reward = scale * confidence
            if clip is not None:
                reward = max(-clip, min(clip, reward))
            if kl is not None:
                reward -= kl_coef * float(kl[b, t])
            rewards[b, t] = reward
            last = t
        if last is not None and terminal is not None:
            rewards[b, last] += float(terminal[b])
    return rewards


def example(classes: int = 2, dtype: torch.dtype = torch.float32, batch: int = 3, length: int = 7) -> dict[str, Tensor]:
    mask = torch.rand(batch, length) < 0.6
    mask[-1] = False
    return {
        "logits": 2 * torch.randn(batch, length, classes).to(dtype),
        "mask": mask,
        "kl": torch.randn(batch, length).to(dtype),
        "terminal": torch.randn(batch).to(dtype),
    }


OPTIONS: list[dict[str, Any]] = [
    {},
    {"kl_coef": 0.3, "scale": 2.5, "temperature": 1.7},
    {"kl_coef": -0.1, "scale": 3.0, "clip": 0.8},
    {"kind": "discrete"},
    {"kind": "discrete", "band": 0.4, "scale": 0.5, "kl_coef": 0.2, "clip": 5},
]


@backends("fused_reward")
def test_hand_worked(backend: Backend) -> None:
    # p = (1/4, 3/4), (3/4, 1/4), masked, (1/2, 1/2): c = 0.5, -0.5, -, 0; the answer ends at t = 3.
    logits = torch.tensor([[[0.0, LN3], [LN3, 0.0], [9.0, NAN], [1.0, 1.0], [NAN, NAN]]])
    mask = torch.tensor([[True, True, False, True, False]])
    kl = torch.tensor([[0.1, 0.2, INF, 0.4, NAN]])
    arguments = to_device({"logits": logits, "mask": mask, "kl": kl, "terminal": torch.tensor([7.0])}, backend.device)
    rewards = ops.fused_reward(**arguments, kl_coef=0.5, scale=4, clip=1.5, impl=backend.impl)
    wanted = [[1.5 - 0.05, -1.5 - 0.1, 0.0, 0.0 - 0.2 + 7.0, 0.0]]
    assert_close(rewards, wanted)
    assert not rewards.requires_grad
    with pytest.raises(AssertionError):
        assert_close(rewards.roll(1, dims=1), wanted)
    with pytest.raises(AssertionError):
        assert_close(rewards * (1 + 1e-4), wanted)


@backends("fused_reward")
def test_hand_worked_three_classes(backend: Backend) -> None:
    # The eighths below are the probabilities; c is the last less the first.
    p = torch.tensor([[[1.0, 2.0, 5.0], [5.0, 2.0, 1.0], [3.0, 4.0, 1.0]]], device=backend.device) / 8
    mask = torch.ones(1, 3, dtype=torch.bool, device=backend.device)
    assert_close(ops.fused_reward(p.log(), mask, impl=backend.impl), [[0.5, -0.5, -0.25]])
    discrete = ops.fused_reward(p.log(), mask, kind="discrete", band=0.3, impl=backend.impl)
    assert_close(discrete, [[1.0, -1.0, 0.0]])


@backends("fused_reward")
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_against_the_formula(backend: Backend, classes: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    inputs = example(classes, dtype)
    wanted = truth(**inputs, **options)
    got = ops.fused_reward(**to_device(inputs, backend.device), **options, impl=backend.impl)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(got, wanted)
    spread = to_device({name: strided(value) for name, value in inputs.items()}, backend.device)
    assert torch.equal(ops.fused_reward(**spread, **options, impl=backend.impl), got)


@backends("fused_reward")
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_every_length_as_accurate_as_plain_torch(
    backend: Backend, classes: int, dtype: torch.dtype, spread: float
) -> None:
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    for length in row_lengths(backend):
        logits, mask = (spread * torch.randn(4, length, classes)).to(dtype), torch.rand(4, length) < 0.7
        inputs = {"logits": logits.masked_fill(~mask.unsqueeze(-1), NAN), "mask": mask}
        got = ops.fused_reward(**to_device(inputs, backend.device), temperature=1.3, impl=backend.impl)
        p = torch.softmax(logits.to(arithmetic) / 1.3, dim=-1)
        plain = torch.where(mask, p[..., -1] - p[..., 0], 0.0)
        wanted = truth(logits, mask, temperature=1.3)
        if dtype == torch.float64:
            assert_close(got, wanted, magnitude=1.0)
        else:
            assert_no_worse_than_reference(got, plain, wanted, slack=4)


@backends("fused_reward")
@pytest.mark.parametrize("classes", [2, 3])
def test_extreme_logits(backend: Backend, classes: int) -> None:
    # All equal, peaked either way, huge, huge and negative, and almost equal at a great size.
    first = torch.tensor([[0.0, 500.0, 0.0, 1e30, -1e30, 1e4, -3e38]], device=backend.device)
    last = torch.tensor([[0.0, 0.0, 500.0, 1e30, -1e30, 1e4 + 1e-3, 3e38]], device=backend.device)
    between = torch.full_like(first, -INF)
    logits = torch.stack([first, last] if classes == 2 else [first, between, last], dim=-1)
    mask = torch.ones(1, 7, dtype=torch.bool, device=backend.device)
    wanted = ((last.double() - first.double()) / 2).tanh()
    assert_close(ops.fused_reward(logits, mask, impl=backend.impl), wanted, ulps=2)


@backends("fused_reward")
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("kind", "band"), KINDS)
def test_nan_and_inf_that_count_are_seen_where_they_are(backend: Backend, classes: int, kind: Any, band: float) -> None:
    logits = torch.randn(2, 40, classes, device=backend.device)
    mask = torch.ones(2, 40, dtype=torch.bool, device=backend.device)
    broken = torch.zeros(2, 40, dtype=torch.bool)
    for n, poison in enumerate((NAN, INF)):
        for c in range(classes):
            logits[n, 3 * c + 1, c] = logits[n, 38 - c, c] = poison
            broken[n, 3 * c + 1] = broken[n, 38 - c] = True
    got = ops.fused_reward(logits, mask, kind=kind, band=band, clip=0.5, impl=backend.impl)
    assert torch.equal(got.isnan().cpu(), broken)


@backends("fused_reward")
@pytest.mark.parametrize("classes", [2, 3])
def test_repeats_bitwise_and_a_row_does_not_depend_on_the_others(backend: Backend, classes: int) -> None:
    inputs = to_device(example(classes, torch.float32, 5, 37), backend.device)
    together = ops.fused_reward(**inputs, kl_coef=0.1, impl=backend.impl)
    assert torch.equal(ops.fused_reward(**inputs, kl_coef=0.1, impl=backend.impl), together)
    for row in range(5):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        assert torch.equal(ops.fused_reward(**one, kl_coef=0.1, impl=backend.impl)[0], together[row])


@backends("fused_reward")
def test_what_does_not_count_leaves_no_trace(backend: Backend) -> None:
    inputs = example()
    options = {"kl_coef": 0.3}
    clean = ops.fused_reward(**to_device(inputs, backend.device), **options, impl=backend.impl)
    for poison in (NAN, INF, -INF):
        dirty = dict(inputs)
        dirty["logits"] = inputs["logits"].masked_fill(~inputs["mask"].unsqueeze(-1), poison)
        dirty["kl"] = inputs["kl"].masked_fill(~inputs["mask"], poison)
        dirty["terminal"] = inputs["terminal"].masked_fill(~inputs["mask"].any(dim=-1), poison)
        got = ops.fused_reward(**to_device(dirty, backend.device), **options, impl=backend.impl)
        assert torch.equal(got, clean)


@backends("fused_reward")
def test_infinite_logits_are_certainty(backend: Backend) -> None:
    logits = torch.tensor([[[-INF, 0.0], [0.0, -INF]]], device=backend.device)
    mask = torch.ones(1, 2, dtype=torch.bool, device=backend.device)
    assert_close(ops.fused_reward(logits, mask, impl=backend.impl), [[1.0, -1.0]])


@backends("fused_reward")
def test_kl_without_weight_is_not_read(backend: Backend) -> None:
    logits = torch.zeros(1, 2, 2, device=backend.device)
    mask = torch.ones(1, 2, dtype=torch.bool, device=backend.device)
    kl = torch.full((1, 2), INF, device=backend.device)
    assert_close(ops.fused_reward(logits, mask, kl=kl, impl=backend.impl), [[0.0, 0.0]])


@backends("fused_reward")
@pytest.mark.parametrize(("batch", "length"), [(0, 5), (3, 0), (0, 0), (1, 1)])
def test_small_shapes(backend: Backend, batch: int, length: int) -> None:
    inputs = example(2, torch.float32, batch + 1, length)
    inputs = {name: value[:batch] for name, value in inputs.items()}
    got = ops.fused_reward(**to_device(inputs, backend.device), kl_coef=0.1, impl=backend.impl)
    assert_close(got, truth(**inputs, kl_coef=0.1))


@backends("fused_reward")
def test_integer_mask(backend: Backend) -> None:
    inputs = to_device(example(), backend.device)
    wanted = ops.fused_reward(**inputs, impl=backend.impl)
    assert torch.equal(ops.fused_reward(**inputs | {"mask": inputs["mask"].long()}, impl=backend.impl), wanted)


@backends("reward_from_hidden")
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_from_hidden(backend: Backend, classes: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    inputs = example(classes, dtype)
    del inputs["logits"]
    hidden = torch.randn(3, 7, 19).to(dtype)
    weight, bias = torch.randn(classes, 19).to(dtype), torch.randn(classes).to(dtype)
    logits = hidden.double() @ weight.double().t() + bias.double()
    wanted = truth(logits, **inputs, **options)
    hidden = hidden.masked_fill(~inputs["mask"].unsqueeze(-1), NAN)
    arguments = to_device({"hidden": hidden, "weight": weight, "bias": bias, **inputs}, backend.device)
    assert_close(ops.reward_from_hidden(**arguments, **options, impl=backend.impl), wanted)
    spread = {name: strided(value) for name, value in arguments.items()}
    assert_close(ops.reward_from_hidden(**spread, **options, impl=backend.impl), wanted)


@backends("reward_from_hidden")
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("kind", "band"), KINDS)
@pytest.mark.parametrize("poison", [NAN, INF])
def test_from_hidden_nan_and_inf_that_count_are_seen_where_they_are(
    backend: Backend, classes: int, kind: Any, band: float, poison: float
) -> None:
    hidden, weight = torch.randn(2, 20, 6), torch.randn(classes, 6)
    broken = torch.zeros(2, 20, dtype=torch.bool)
    broken[0, 3] = broken[1, 17] = broken[1, 18] = True
    hidden[broken] = poison  # the logits are NaN, or infinities, of which one is +inf
    weight[0, 0], weight[-1, 0] = 1.0, -1.0
    hidden[..., 1:] = hidden[..., 1:].nan_to_num(0.0, 0.0)
    inputs = to_device({"hidden": hidden, "weight": weight}, backend.device)
    mask = torch.ones(2, 20, dtype=torch.bool, device=backend.device)
    got = ops.reward_from_hidden(**inputs, mask=mask, kind=kind, band=band, clip=0.5, impl=backend.impl)
    assert torch.equal(got.isnan().cpu(), broken)


@backends("reward_from_hidden")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 3])
def test_from_hidden_every_width_as_accurate_as_plain_torch(backend: Backend, classes: int, dtype: torch.dtype) -> None:
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    mask = torch.rand(3, 17) < 0.8
    for width in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130, 1000):
        hidden, weight = torch.randn(3, 17, width).to(dtype), (torch.randn(classes, width) / width**0.5).to(dtype)
        bias = torch.randn(classes).to(dtype)
        inputs = to_device({"hidden": hidden, "weight": weight, "mask": mask, "bias": bias}, backend.device)
        got = ops.reward_from_hidden(**inputs, impl=backend.impl)
        p = torch.softmax(hidden.to(arithmetic) @ weight.to(arithmetic).t() + bias.to(arithmetic), dim=-1)
        plain = torch.where(mask, p[..., -1] - p[..., 0], 0.0)
        wanted = truth(hidden.double() @ weight.double().t() + bias.double(), mask)
        if dtype == torch.float64:
            assert_close(got, wanted, magnitude=1.0)
        else:
            assert_no_worse_than_reference(got, plain, wanted, slack=4)


@backends("reward_from_hidden")
def test_from_hidden_a_token_does_not_depend_on_the_others(backend: Backend) -> None:
    if backend.impl == "reference":
        pytest.skip("a matrix product's order of summation depends on its shape")
    hidden, weight = torch.randn(5, 37, 130, device=backend.device), torch.randn(3, 130, device=backend.device)
    mask = torch.ones(5, 37, dtype=torch.bool, device=backend.device)
    together = ops.reward_from_hidden(hidden, weight, mask, impl=backend.impl)
    assert torch.equal(ops.reward_from_hidden(hidden, weight, mask, impl=backend.impl), together)
    for row in range(5):
        for begin in (0, 3, 36):
            part = hidden[row : row + 1, begin:], weight, mask[row : row + 1, begin:]
            assert torch.equal(ops.reward_from_hidden(*part, impl=backend.impl)[0], together[row, begin:])


@backends("reward_from_hidden")
def test_from_hidden_ignores_autocast(backend: Backend) -> None:
    hidden, weight = torch.randn(2, 5, 8, device=backend.device), torch.randn(2, 8, device=backend.device)
    mask = torch.ones(2, 5, dtype=torch.bool, device=backend.device)
    wanted = ops.reward_from_hidden(hidden, weight, mask, impl=backend.impl)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert torch.equal(ops.reward_from_hidden(hidden, weight, mask, impl=backend.impl), wanted)


@backends("reward_from_hidden")
@pytest.mark.parametrize(("batch", "length"), [(0, 5), (3, 0), (2, 9000)])
def test_from_hidden_shapes(backend: Backend, batch: int, length: int) -> None:
    hidden, weight = torch.randn(batch, length, 4), torch.randn(2, 4)
    mask = torch.rand(batch, length) < 0.9
    logits = hidden.double() @ weight.double().t()
    wanted = torch.where(mask, ((logits[..., 1] - logits[..., 0]) / 2).tanh(), 0.0)
    arguments = to_device({"hidden": hidden, "weight": weight, "mask": mask}, backend.device)
    assert_close(ops.reward_from_hidden(**arguments, impl=backend.impl), wanted)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(3, 7, 4)}, ShapeError, r"logits has shape \(3, 7, 4\), wanted \(B, T, 2\)"),
        ({"logits": torch.zeros(3, 7)}, ShapeError, r"logits has shape \(3, 7\), wanted 3 axes"),
        ({"logits": torch.zeros(3, 7, 2).long()}, ShapeError, r"logits has dtype torch.int64"),
        ({"mask": torch.ones(3, 6).bool()}, ShapeError, r"mask has shape \(3, 6\), wanted \(3, 7\)"),
        (
            {"mask": torch.ones(3, 7)},
            ShapeError,
            r"mask has dtype torch.float32, wanted bool \(True counts\); pass mask.bool\(\)",
        ),
        (
            {"kl": torch.zeros(3, 8)},
            ShapeError,
            r"kl has shape \(3, 8\), wanted \(3, 7\) to match mask; slice or pad it",
        ),
        (
            {"terminal": torch.zeros(3, 1)},
            ShapeError,
            r"terminal has shape \(3, 1\), wanted \(3,\).*one value for each answer$",
        ),
        ({"kl": None, "kl_coef": 0.1}, ConfigError, r"kl_coef is 0.1 but kl is missing; pass kl"),
        ({"kl_coef": NAN}, ConfigError, r"kl_coef is nan"),
        ({"kl_coef": torch.tensor(0.1)}, ConfigError, r"kl_coef is a Tensor, wanted a Python number"),
        ({"temperature": 0.0}, ConfigError, r"temperature is 0, wanted a number > 0"),
        ({"clip": -1.0}, ConfigError, r"clip is -1, wanted a number > 0"),
        ({"kind": "soft"}, ConfigError, r"kind='soft' is unknown, choose from 'continuous', 'discrete'"),
        ({"band": 0.1}, ConfigError, r"band is 0.1 but kind is 'continuous'"),
        ({"kind": "discrete", "band": 2}, ConfigError, r"band is 2, wanted a number >= 0 and <= 1"),
        ({"terminal": torch.zeros(3, device="meta")}, ShapeError, r"terminal is on meta but logits is on cpu"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="fused_reward: " + message):
        ops.fused_reward(**{**example(), **changes})


def test_from_hidden_errors() -> None:
    hidden, mask = torch.zeros(2, 3, 4), torch.ones(2, 3).bool()
    with pytest.raises(ShapeError, match=r"weight has shape \(4, 2\), wanted \(2, 4\)"):
        ops.reward_from_hidden(hidden, torch.zeros(4, 2), mask)
    with pytest.raises(ShapeError, match=r"bias has shape \(3,\), wanted \(2,\)"):
        ops.reward_from_hidden(hidden, torch.zeros(2, 4), mask, bias=torch.zeros(3))
