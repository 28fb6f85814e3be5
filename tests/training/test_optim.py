"""The optimiser against float32 AdamW and by hand, the schedules by hand, the gradient norm in float32."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tlcr.errors import CheckpointError
from tlcr.training import optim
from tlcr.training.optim import (
    MasterWeightAdamW,
    build_optimizer,
    build_scheduler,
    clip_gradients,
    gradient_norm,
    parameter_groups,
    scale_gradients,
)


def group(parameter: torch.Tensor, lr: float = 1e-5, weight_decay: float = 0.0) -> dict:
    return {"params": [parameter], "lr": lr, "weight_decay": weight_decay}


def descend(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        assert parameter.grad is None


def master_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.Tensor:
    """The float32 weights: the parameter's bits above those of the remainder."""
    bits = parameter.detach().float().view(torch.int32) + optimizer.state[parameter]["remainder"]
    return bits.view(torch.float32)


def test_updates_far_below_the_resolution_of_bfloat16_accumulate():
    """400 updates of 1e-5 move a weight of 1 by 0.004, one unit of bfloat16; each alone rounds to nothing."""
    masters = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    descend(build_optimizer([group(masters)]), masters, 400)
    assert masters.tolist() == [1 - 2**-8] * 3
    plain = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    descend(torch.optim.AdamW([plain], lr=1e-5, weight_decay=0.0), plain, 400)
    assert plain.tolist() == [1.0] * 3  # what happens without them


def assert_follows(ours: torch.optim.Optimizer, low: torch.Tensor, full: torch.Tensor) -> None:
    """The master is what AdamW arrives at in float32, but for last bits, and the weight is what 8 bits keep of it."""
    master = master_of(ours, low)
    torch.testing.assert_close(master, full.detach(), rtol=1e-6, atol=1e-7)
    error = (low.detach().double() - master.double()).abs()
    assert bool((error <= master.double().abs() * 2**-8).all())


def test_the_masters_follow_float32_adamw():
    start = torch.randn(50).bfloat16()
    low, full = nn.Parameter(start.clone()), nn.Parameter(start.float())
    other = nn.Parameter(torch.randn(7))  # a float32 parameter in the same optimiser is its own master
    alone = nn.Parameter(other.detach().clone())
    ours = build_optimizer([group(low, 1e-3, 0.1), group(other, 1e-2)])
    theirs = torch.optim.AdamW([group(full, 1e-3, 0.1), group(alone, 1e-2)], betas=(0.9, 0.95), fused=True)
    assert isinstance(ours, MasterWeightAdamW)
    for _ in range(20):
        gradient = torch.randn(50).bfloat16()
        low.grad, full.grad = gradient.clone(), gradient.float()
        other.grad = alone.grad = torch.randn(7)
        ours.step()
        theirs.step()
        assert_follows(ours, low, full)
        assert torch.equal(other, alone)


@pytest.mark.parametrize("shape", [(optim.PIECE // 8 + 3, 24), (2 * optim.PIECE + 5,), (3, optim.PIECE), ()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_are_updated_in_pieces_as_if_they_were_whole(shape, dtype):
    start = torch.randn(shape).to(dtype)
    low, full = nn.Parameter(start.clone()), nn.Parameter(start.float())
    rest = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))  # makes it the optimiser of low precision in any case
    ours = build_optimizer([group(low, 1e-2, 0.1), group(rest)])
    theirs = torch.optim.AdamW([group(full, 1e-2, 0.1)], betas=(0.9, 0.95), fused=True)
    for _ in range(3):
        gradient = torch.randn(shape).to(dtype)
        low.grad, full.grad = gradient.clone(), gradient.float()
        ours.step()
        theirs.step()
    if dtype == torch.bfloat16:
        assert_follows(ours, low, full)
    else:
        assert torch.equal(ours.state[low]["master"] if dtype == torch.float16 else low, full)
    assert ours.state[low]["step"] == 3


def test_parameters_step_together_as_if_each_were_alone():
    """Of every dtype and size, one with gaps in memory, one that has no gradient in some steps, one that moves."""
    shapes = [(5, 7), (), (0, 3), (64,), (3, 33), (1000,)]
    dtypes = [torch.bfloat16] * 6 + [torch.float16] * 2 + [torch.float32] * 3 + [torch.float64]
    together = [nn.Parameter(torch.randn(shapes[i % 6]).to(dtype)) for i, dtype in enumerate(dtypes)]
    together.append(nn.Parameter(torch.randn(6, 4).bfloat16().t()))
    apart = [nn.Parameter(parameter.detach().clone()) for parameter in together]
    ours = build_optimizer([group(together[0], 1e-2, 0.1) | {"params": together}])
    theirs = [MasterWeightAdamW([group(parameter, 1e-2, 0.1)], (0.9, 0.95), 1e-8) for parameter in apart]
    for step in range(4):
        for i, (parameter, alone) in enumerate(zip(together, apart, strict=True)):
            skipped = i == 3 and step in (0, 2)
            alone.grad = None if skipped else torch.randn(parameter.shape).to(parameter.dtype)
            parameter.grad = None if skipped else alone.grad.clone()
        together[4].data = together[4].data.clone()
        ours.step()
        for optimizer in theirs:
            optimizer.step()
    for parameter, alone, optimizer in zip(together, apart, theirs, strict=True):
        assert torch.equal(parameter, alone)
        assert ours.state[parameter].keys() == optimizer.state[alone].keys()
        for name, value in optimizer.state[alone].items():
            assert torch.equal(ours.state[parameter][name], value)
    assert [ours.state[together[i]]["step"].item() for i in (0, 3, 6, 8)] == [4, 2, 4, 4]


def test_the_first_step_by_hand():
    """AdamW's first step is -lr (sign(g) |g| / (|g| + eps) + weight_decay w), whatever the betas."""
    parameter = nn.Parameter(torch.tensor([2.0, -3.0], dtype=torch.float64))
    optimizer = build_optimizer([group(parameter, lr=0.1, weight_decay=0.5)])
    parameter.grad = torch.tensor([4.0, 0.001], dtype=torch.float64)
    optimizer.step()
    truth = [2.0 - 0.1 * 0.5 * 2.0 - 0.1, -3.0 + 0.1 * 0.5 * 3.0 - 0.1]
    torch.testing.assert_close(parameter.detach(), torch.tensor(truth, dtype=torch.float64), rtol=0, atol=2e-6)


def test_state_continues_where_it_was_saved():
    first = nn.Parameter(torch.randn(20).bfloat16())
    skipped = nn.Parameter(torch.randn(4).bfloat16())  # never gets a gradient: has no state
    optimizer = build_optimizer([group(first, 1e-3), group(skipped)])
    descend(optimizer, first, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    dtypes = {name: entry.dtype for name, entry in saved["state"][0].items()}
    assert dtypes.pop("remainder") == torch.int16
    assert set(dtypes.values()) == {torch.float32}
    second, skipped_2 = nn.Parameter(first.detach().clone()), nn.Parameter(skipped.detach().clone())
    again = build_optimizer([group(second, 7.0), group(skipped_2)])
    again.load_state_dict(saved)
    assert again.param_groups[0]["lr"] == 1e-3
    descend(optimizer, first, 50)
    descend(again, second, 50)
    assert torch.equal(first, second)
    assert torch.equal(master_of(optimizer, first), master_of(again, second))
    fresh = nn.Parameter(first.detach().clone())  # without the state the run would go elsewhere
    descend(build_optimizer([group(fresh, 1e-3)]), fresh, 50)
    assert not torch.equal(first, fresh)


@pytest.mark.parametrize("now", [torch.bfloat16, torch.float16])
def test_states_of_a_float32_training_are_refused(now):
    before = nn.Parameter(torch.randn(20))
    optimizer = build_optimizer([group(before)])
    descend(optimizer, before, 1)
    again = build_optimizer([group(nn.Parameter(before.detach().to(now)))])
    with pytest.raises(CheckpointError, match=r"holds no master for a parameter .* resume with the model.dtype that"):
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_it_works_prepared_by_accelerate_and_under_a_scheduler():
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = Accelerator().prepare(build_optimizer([group(parameter, lr=0.5)]))
    scheduler = build_scheduler(optimizer, schedule="linear", total_steps=2, warmup_steps=0)
    descend(optimizer, parameter, 1)
    torch.testing.assert_close(parameter.detach(), torch.full((2,), 0.5, dtype=torch.bfloat16))
    scheduler.step()
    descend(optimizer, parameter, 1)
    torch.testing.assert_close(parameter.detach(), torch.full((2,), 0.25, dtype=torch.bfloat16))  # at half the rate


def test_only_matrices_that_are_no_embeddings_decay(tiny_causal_lm, tiny_gpt2):
    llama = tiny_causal_lm()
    names = {id(p): name for name, p in llama.named_parameters()}
    decays, rest = parameter_groups(llama, learning_rate=1e-3, weight_decay=0.1)
    assert (decays["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)].split(".")[-2] for p in rest["params"]} == {
        "embed_tokens",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    assert len(decays["params"]) + len(rest["params"]) == len(names)
    gpt2 = tiny_gpt2()  # its output layer is tied to the embedding
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    decays, rest = parameter_groups(gpt2, learning_rate=1e-3, weight_decay=0.1)
    assert id(gpt2.lm_head.weight) in {id(p) for p in rest["params"]}
    assert all(p.ndim == 2 for p in decays["params"])
    gpt2.transformer.wte.weight.requires_grad_(False)
    assert len(parameter_groups(gpt2, learning_rate=1e-3, weight_decay=0.1)[1]["params"]) == len(rest["params"]) - 1


@pytest.mark.parametrize(
    ("schedule", "after_warmup"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5 * (1 + math.cos(math.pi * x)) for x in (0, 0.25, 0.5, 0.75)]),
    ],
)
def test_schedules_by_hand(schedule, after_warmup):
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = build_optimizer([group(parameters[0], lr=1.0), group(parameters[1], lr=10.0)])
    scheduler = build_scheduler(optimizer, schedule=schedule, total_steps=6, warmup_steps=2)
    rates = []
    for _ in range(6):
        rates.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    assert [rate[0] for rate in rates] == pytest.approx([1 / 3, 2 / 3, *after_warmup])
    assert [rate[1] for rate in rates] == pytest.approx([10 * rate[0] for rate in rates])
    assert min(rate[0] for rate in rates) > 0  # no step is wasted


def with_gradients(*gradients: torch.Tensor) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_clipped_to_their_joint_norm(dtype):
    parameters = with_gradients(torch.tensor([3.0, 0.0], dtype=dtype), torch.tensor([4.0], dtype=dtype))
    unused = nn.Parameter(torch.zeros(1, dtype=dtype))
    norm = gradient_norm([*parameters, unused])
    assert norm.item() == 5.0
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    clip_gradients([*parameters, unused], norm.item(), 1.0)
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.8], dtype=dtype))
    before, norm = parameters[1].grad.clone(), gradient_norm(parameters).item()
    for max_norm in (norm, 10.0):  # short ones are left alone
        clip_gradients(parameters, norm, max_norm)
        assert torch.equal(parameters[1].grad, before)


def test_clipping_is_that_of_torch_to_the_last_bit():
    """torch.nn.utils.clip_grad_norm_, for dtypes whose norms it takes in float32."""
    gradients = [torch.randn(50, 3), torch.randn(7), torch.randn(1)]
    ours, theirs = with_gradients(*gradients), with_gradients(*gradients)
    wanted = torch.nn.utils.clip_grad_norm_(theirs, 0.7)
    norm = gradient_norm(ours)
    clip_gradients(ours, norm.item(), 0.7)
    assert torch.equal(norm, wanted)
    for parameter, like in zip(ours, theirs, strict=True):
        assert torch.equal(parameter.grad, like.grad)


def test_gradients_of_several_dtypes_have_one_norm():
    gradients = torch.tensor([3.0, 0.0]).bfloat16(), torch.tensor([4.0]), torch.tensor([12.0]).half(), torch.zeros(0)
    parameters = with_gradients(*gradients)
    assert gradient_norm(parameters).item() == 13.0
    clip_gradients(parameters, 13.0, 1.3)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * 0.1)
    scale_gradients(parameters, 10.0)
    assert gradient_norm(parameters).item() == pytest.approx(13.0, rel=1e-2)
    assert gradient_norm([nn.Parameter(torch.zeros(3))]).item() == 0.0


def test_the_norm_of_bfloat16_gradients_is_taken_in_float32():
    (parameter,) = with_gradients(torch.ones(1001, dtype=torch.bfloat16))
    assert gradient_norm([parameter]).item() == pytest.approx(math.sqrt(1001), rel=1e-6)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_reaches_the_norm(wrong):
    assert not math.isfinite(gradient_norm(with_gradients(torch.ones(3), torch.tensor([1.0, wrong]))).item())


def test_the_norm_waits_for_no_device():
    """Tensors on the meta device have no values: whoever reads one there fails."""
    parameters = [nn.Parameter(torch.zeros(5, dtype=dtype, device="meta")) for dtype in (torch.bfloat16, torch.float32)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    assert gradient_norm(parameters).is_meta
