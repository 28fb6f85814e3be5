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
    strided,
    to_device,
)
from tlcr import ops
from tlcr.errors import ConfigError, ShapeError

LN3 = math.log(3)


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
def test_as_accurate_as_plain_torch(backend: Backend) -> None:
    inputs = example(3, torch.float32, 16, 33)
    p = torch.softmax(inputs["logits"], dim=-1)
    plain = torch.where(inputs["mask"], p[..., 2] - p[..., 0], 0.0)
    got = ops.fused_reward(**to_device({k: inputs[k] for k in ("logits", "mask")}, backend.device), impl=backend.impl)
    assert_no_worse_than_reference(got, plain, truth(inputs["logits"], inputs["mask"]))


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
        ({"kl": torch.zeros(3, 8)}, ShapeError, r"kl has shape \(3, 8\), wanted \(3, 7\) to match mask"),
        ({"terminal": torch.zeros(3, 1)}, ShapeError, r"terminal has shape \(3, 1\), wanted \(3,\)"),
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
