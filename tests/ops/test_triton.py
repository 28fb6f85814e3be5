"""What is particular to Triton's kernels: tiles and their borders, offsets that lie, rows that know of no other row.

tests/ops/conftest.py makes GAE's tiles small under the interpreter; the others are made small here, so that inputs of a
few tokens cross many borders.
"""

import importlib.util
from decimal import Context, Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import NAN, assert_close, assert_no_worse_than_reference, from_address, to_device
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
        (gae, "MOMENTS_TILE", 2),
        (gae, "WHITEN_TILE", 4),
        (ppo_loss, "TOKENS", 8),
        (ppo_loss, "SHORTEST", 4),
        (ppo_loss, "GROUP", 2),
        (ppo_loss, "PROGRAMS", 4),
        (ppo_loss, "FINISH_ROWS", 2),
        (reward, "GROUPS", {2: 2, 4: 2, 8: 2}),
        (reward, "GROUP_OF_THREE_CLASSES", 2),
        (reward, "THREADS", 4),
        (reward, "SHORTEST", 4),
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
@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 32, 41])
def test_gae_over_the_borders_of_tiles(device: str, length: int, tiny_tiles: None) -> None:
    # Five rows: of 8 tokens at most, two to a program, and of the last program's one does not exist.
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
@pytest.mark.parametrize("gamma", [0.0, 1e-6, 0.9, 1.0])
@pytest.mark.parametrize("lam", [0.0, 1e-6, 0.9, 1.0])
def test_gae_keeps_its_digits_for_any_gamma_and_lambda(device: str, gamma: float, lam: float) -> None:
    inputs = gae_inputs(3, 33, torch.float32)
    options = {"gamma": gamma, "lam": lam}
    got = ops.fused_gae(**to_device(inputs, device), **options, impl="triton")
    plain = ops.fused_gae(**inputs, **options, impl="reference")
    for result, same_dtype, true in zip(got, plain, gae_truth(inputs, **options, impl="reference"), strict=True):
        assert_no_worse_than_reference(result, same_dtype, true)


@on_triton
@pytest.mark.parametrize("length", [127, 128, 129, 1023, 1024, 1025])
def test_gae_with_the_tiles_of_every_day(device: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    inputs = gae_inputs(1, length, torch.float32)
    got = ops.fused_gae(**to_device(inputs, device), impl="triton")
    plain = ops.fused_gae(**inputs, impl="reference")
    for result, same_dtype, true in zip(got, plain, gae_truth(inputs, impl="reference"), strict=True):
        assert_no_worse_than_reference(result, same_dtype, true)


@on_triton
@pytest.mark.parametrize("length", [33, 48])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_are_shared_out_keep_every_bit(
    device: str, length: int, packed: bool, tiny_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tlcr.kernels import gae

    inputs: dict[str, Any] = to_device(gae_inputs(3, length, torch.float32), device)
    inputs["mask"][0, 10:40] = False
    inputs["mask"][1] = False
    inputs = {name: torch.where(inputs["mask"], x, 0) for name, x in inputs.items()}
    if packed:
        # The middle one is shorter than the number of tiles allows, and behind the last one follows a tail.
        offsets = torch.tensor([0, length, length + 5, 3 * length - 2], dtype=torch.int32, device=device)
        inputs = {name: x.flatten() for name, x in inputs.items()} | {"cu_seqlens": offsets}
    whole = ops.fused_gae(**inputs, impl="triton")
    whitened = ops.fused_gae(**inputs, whiten=True, impl="triton")
    monkeypatch.setattr(gae, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(gae, "SHARED_TILES", 2)
    monkeypatch.setattr(gae, "AHEAD", 2)
    assert gae.plan(3, length, 132).shared
    shared = ops.fused_gae(**inputs, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(shared, whole, strict=True))
    for result, true in zip(shared, gae_truth(inputs, impl="reference"), strict=True):
        assert_close(result, true)
    for result, true in zip(ops.fused_gae(**inputs, whiten=True, impl="triton"), whitened, strict=True):
        assert_close(result, true)


@on_triton
def test_moments_of_many_programs_are_merged_in_two_launches(device: str, tiny_tiles: None) -> None:
    # MOMENTS_TILE is 2: twenty rows of a program each leave ten merged moments, of which whitening takes two at a time.
    inputs = gae_inputs(20, 11)
    got = ops.fused_gae(**to_device(inputs, device), whiten=True, impl="triton")
    for result, true in zip(got, gae_truth(inputs, whiten=True, impl="reference"), strict=True):
        assert_close(result, true)


def test_how_rows_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    from tlcr.kernels.gae import Plan, plan

    monkeypatch.undo()  # the tiles that conftest.py makes small

    for sequences, length, wanted in (
        (65536, 128, Plan(rows=8, tile=128, shared=False)),
        (262144, 64, Plan(rows=8, tile=128, shared=False)),
        (64, 1024, Plan(rows=1, tile=1024, shared=False)),
        (8192, 513, Plan(rows=1, tile=1024, shared=False)),
        (8192, 512, Plan(rows=2, tile=512, shared=False)),
        (8192, 4096, Plan(rows=1, tile=1024, shared=False)),
        (132, 32768, Plan(rows=1, tile=1024, shared=False)),
        (131, 32768, Plan(rows=1, tile=1024, shared=True)),
        (8, 131072, Plan(rows=1, tile=1024, shared=True)),
        (8, 8191, Plan(rows=1, tile=1024, shared=False)),
        (8, 8192, Plan(rows=1, tile=1024, shared=True)),
    ):
        assert plan(sequences, length, 132) == wanted, (sequences, length)
    assert plan(64, 100, 132, packed=True) == Plan(rows=2, tile=512, shared=False)
    # Each tile is a compilation. But for what is shared out, the numbers of rows and multiprocessors are no matter.
    assert {plan(2**20, length, 132).tile for length in range(1, 5000)} == {128, 256, 512, 1024}
    assert {plan(rows, 300, processors)[:2] for rows in (1, 7, 2**20) for processors in (1, 132)} == {(2, 512)}


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
def test_rows_at_any_address(device: str, tiny_tiles: None) -> None:
    # Rows of 16 tokens and more are read in groups, but only at addresses that allow it.
    x = {name: torch.randn(3, 32) for name in ("a", "b", "c", "d", "e", "f")}
    mask = torch.rand(3, 32) < 0.7
    mask[0, 8:24] = False
    pairs = torch.randn(3, 32, 2)

    def run(moved: Any) -> list[Tensor]:
        a, b, c, d, e, f = (moved(tensor.to(device)) for tensor in x.values())
        counts = moved(mask.to(device))
        results = [*ops.fused_gae(a, b, counts, impl="triton")]
        results += [*ops.fused_gae(a, b, counts, whiten=True, impl="triton")]
        logits = moved(pairs.to(device))
        for terminal in (None, torch.ones(3, device=device)):
            reward = ops.fused_reward(logits, counts, kl=c, kl_coef=0.1, terminal=terminal, impl="triton")
            results.append(reward)
        for aggregate in ("token", "sequence"):
            trained = [tensor.requires_grad_() for tensor in (moved(a), moved(d))]
            loss = ops.ppo_loss(
                trained[0], b, c, counts, values=trained[1], old_values=e, returns=f, aggregate=aggregate, impl="triton"
            )
            results += [loss.loss.detach(), *torch.autograd.grad(loss.loss, trained)]
        return results

    aligned = run(torch.clone)
    for offset in (1, 2, 4):
        for got, wanted in zip(run(lambda x, offset=offset: from_address(x, offset)), aligned, strict=True):
            assert_close(got, wanted, ulps=8)


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
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("length", [1, 4, 5, 7, 8, 9, 16, 17, 32])
def test_rewards_over_the_borders_of_tiles(device: str, classes: int, length: int, tiny_tiles: None) -> None:
    # Tiles of 8 tokens at most, of 4 where rows are short. Without a terminal all tokens are one row.
    mask = torch.rand(5, length) < 0.7
    mask[3] = False
    arguments = {
        "logits": torch.randn(5, length, classes, dtype=torch.float64).masked_fill(~mask.unsqueeze(-1), NAN),
        "mask": mask,
        "kl": torch.randn(5, length, dtype=torch.float64).masked_fill(~mask, NAN),
        "terminal": torch.randn(5, dtype=torch.float64),
    }
    for left_out in ((), ("terminal",)):
        given = {name: value for name, value in arguments.items() if name not in left_out}
        got = ops.fused_reward(**to_device(given, device), kl_coef=0.1, impl="triton")
        assert_close(got, ops.fused_reward(**given, kl_coef=0.1, impl="reference"))


@on_triton
@pytest.mark.parametrize("aggregate", ["token", "sequence"])
@pytest.mark.parametrize("length", [3, 4, 7, 8, 9, 16, 25])
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


def test_which_kernel_adds_up_a_row_follows_from_its_width_alone() -> None:
    """A row's bits would otherwise depend on its address: the two variants add up in different orders."""
    from tlcr.kernels.layers import _placed

    for width, is_copied in ((48, True), (47, False)):
        x = from_address(torch.randn(3, width), 1)
        (placed,) = _placed(width, x)
        assert torch.equal(placed, x) and (placed is not x) == is_copied
        assert placed.data_ptr() % 16 == 0 or not is_copied


@pytest.mark.parametrize(("hip", "wanted"), [(None, {"maxnreg": 112}), ("6.4.43482", {})])
def test_a_bound_on_registers_is_asked_of_nvidias_gpus_alone(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, wanted: dict[str, int]
) -> None:
    """For AMD's, Triton refuses a launch with an option that it does not know."""
    from tlcr.kernels.launch import launch_options

    monkeypatch.setattr(torch.version, "hip", hip)
    assert launch_options(warps=4, registers=112) == launch_options(warps=4) | wanted
