"""What is particular to Triton's kernels: tiles and their borders, offsets that lie, rows that know of no other row.

tests/ops/conftest.py makes GAE's tile 8 under the interpreter; the other tiles are made small here, so that inputs of a
few tokens cross many borders.
"""

import importlib.util
from decimal import Context, Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import NAN, assert_close, assert_no_worse_than_reference, to_device
from tlcr import ops

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
on_triton = pytest.mark.parametrize(
    "device",
    [status.device for status in ops.available() if status.op == "fused_gae" and "triton" in status.usable],
)


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are powers of 2; a tile of 1 would be no tile."""
    from tlcr.kernels import gae, ppo_loss, reward

    for module, name, size in (
        (gae, "TILE", 8),
        (gae, "MOMENTS_TILE", 2),
        (gae, "WHITEN_TILE", 4),
        (ppo_loss, "TILE", 8),
        (ppo_loss, "FINISH_ROWS", 2),
        (reward, "TILE", 8),
    ):
        monkeypatch.setattr(module, name, size)


def gae_inputs(batch: int, length: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    mask = torch.rand(batch, length) < 0.7
    return {
        "rewards": torch.randn(batch, length, dtype=dtype).masked_fill(~mask, NAN),
        "values": torch.randn(batch, length, dtype=dtype).masked_fill(~mask, NAN),
        "mask": mask,
    }


def gae_truth(inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    return ops.fused_gae(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}, **options)


@on_triton
@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 41])
def test_gae_over_the_borders_of_tiles(device: str, length: int, tiny_tiles: None) -> None:
    inputs = gae_inputs(5, length)
    # A gap that is a tile and more; a row without any token; one without any gap.
    inputs["mask"][0, 3:20] = False
    inputs["mask"][1] = False
    inputs["mask"][2] = True
    inputs["rewards"].nan_to_num_(0.5)
    inputs["values"].nan_to_num_(0.25)
    for options in ({"gamma": 0.97, "lam": 0.9}, {"lam": 1.0, "whiten": True}):
        got = ops.fused_gae(**to_device(inputs, device), **options, impl="triton")
        for result, true in zip(got, gae_truth(inputs, **options, impl="reference"), strict=True):
            assert_close(result, true)


@on_triton
def test_gae_with_the_tile_of_every_day(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tlcr.kernels import gae

    monkeypatch.setattr(gae, "TILE", 1024)
    inputs = gae_inputs(1, 1025, torch.float32)
    got = ops.fused_gae(**to_device(inputs, device), impl="triton")
    plain = ops.fused_gae(**inputs, impl="reference")
    for result, same_dtype, true in zip(got, plain, gae_truth(inputs, impl="reference"), strict=True):
        assert_no_worse_than_reference(result, same_dtype, true)


@on_triton
@pytest.mark.parametrize("whiten", [False, True])
def test_gae_keeps_its_digits_at_a_long_horizon(device: str, whiten: bool) -> None:
    # 1 - lam of a rounded lam has 5 digits, and values that are large beside the advantages would show it.
    inputs = gae_inputs(2, 60, torch.float32)
    inputs["values"] += 100
    options: dict[str, Any] = {"gamma": 0.9999, "lam": 0.9991, "whiten": whiten}
    got = ops.fused_gae(**to_device(inputs, device), **options, impl="triton")
    plain = ops.fused_gae(**inputs, **options, impl="reference")
    for result, same_dtype, true in zip(got, plain, gae_truth(inputs, **options, impl="reference"), strict=True):
        assert_no_worse_than_reference(result, same_dtype, true)


@on_triton
def test_a_row_knows_of_no_other_row_and_of_no_padding(device: str, tiny_tiles: None) -> None:
    inputs = to_device(gae_inputs(3, 21, torch.float32), device)
    whole = ops.fused_gae(**inputs, impl="triton")
    wider = {k: torch.cat([v, torch.zeros_like(v[:, :19])], dim=1) for k, v in inputs.items()}
    padded = ops.fused_gae(**wider, impl="triton")
    shuffled = ops.fused_gae(**{k: v[[2, 0, 1]] for k, v in inputs.items()}, impl="triton")
    alone = [ops.fused_gae(**{k: v[b : b + 1] for k, v in inputs.items()}, impl="triton") for b in range(3)]
    flat = {k: torch.cat([v.flatten(), v[0, :1]]) for k, v in inputs.items()}
    offsets = torch.tensor([0, 21, 42, 63], dtype=torch.int32, device=device)
    packed = ops.fused_gae(**flat, cu_seqlens=offsets, impl="triton")
    for i, result in enumerate(whole):
        assert torch.equal(padded[i][:, :21], result)
        assert torch.equal(shuffled[i], result[[2, 0, 1]])
        assert torch.equal(torch.cat([one[i] for one in alone]), result)
        assert torch.equal(packed[i][:-1].view(3, 21), result)


@on_triton
@pytest.mark.parametrize("gap", [0, 1, 20])
def test_the_terminal_reward_finds_the_last_token(device: str, gap: int, tiny_tiles: None) -> None:
    # Row t ends at token t, with a gap before it: in the same tile, and in tiles that lie behind.
    length = 26
    position = torch.arange(length)
    mask = (position <= position.unsqueeze(1)) & ~(
        (position < position.unsqueeze(1)) & (position >= position.unsqueeze(1) - gap)
    )
    logits = torch.randn(length, length, 2, dtype=torch.float64).masked_fill(~mask.unsqueeze(-1), NAN)
    arguments = {"logits": logits, "mask": mask, "terminal": torch.randn(length, dtype=torch.float64) + 10}
    got = ops.fused_reward(**to_device(arguments, device), impl="triton")
    assert_close(got, ops.fused_reward(**arguments, impl="reference"))
    assert torch.equal(got.cpu() > 5, position == position.unsqueeze(1))


@on_triton
@pytest.mark.parametrize("aggregate", ["token", "sequence"])
@pytest.mark.parametrize("length", [7, 8, 9, 25])
def test_the_loss_adds_up_over_tiles_and_rows(device: str, length: int, aggregate: str, tiny_tiles: None) -> None:
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "entropy", "kl")
    tensors = {name: 0.5 * torch.randn(5, length, dtype=torch.float64) for name in names}
    mask = torch.rand(5, length) < 0.6
    mask[3] = False
    options: dict[str, Any] = {"aggregate": aggregate, "entropy_coef": 0.1, "kl_coef": 0.2, "dual_clip": 2.0}

    def run(impl: Any, device: str) -> tuple[Any, tuple[Tensor, ...]]:
        inputs = {name: tensor.detach().to(device).requires_grad_() for name, tensor in tensors.items()}
        result = ops.ppo_loss(**inputs, mask=mask.to(device), **options, impl=impl)
        trained = [inputs[name] for name in ("logprobs", "values", "entropy", "kl")]
        return result, torch.autograd.grad(result.loss, trained)

    wanted, wanted_grads = run("reference", "cpu")
    got, grads = run("triton", device)
    for result, true in zip((*got, *grads), (*wanted, *wanted_grads), strict=True):
        assert_close(result, true.detach())


@on_triton
def test_every_result_is_the_same_on_repeat(device: str, tiny_tiles: None) -> None:
    inputs = to_device(gae_inputs(5, 30, torch.float32), device)
    first, second = (ops.fused_gae(**inputs, whiten=True, impl="triton")[0] for _ in range(2))
    assert torch.equal(first, second)


@on_triton
def test_the_power_series_meets_the_difference(device: str) -> None:
    # r - 1 - log r on both sides of where its formula changes, each alone in a row.
    log_ratio = torch.tensor([-30.0, -0.51, -0.5, -0.49, -1e-3, -1e-9, 0.0, 1e-9, 0.3, 0.5, 0.500001, 3.0])
    for dtype in (torch.float32, torch.float64):
        for value in log_ratio.to(dtype):
            one = value.reshape(1, 1).to(device)
            got = ops.ppo_loss(one, 0 * one, 0 * one, one == one, impl="triton").approx_kl
            with localcontext(Context(prec=50)):
                exact = Decimal(float(value))
                wanted = float(exact.exp() - 1 - exact)
            assert_close(got, wanted)
