"""fused_gae, padded and packed."""

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
from tlcr.errors import ConfigError, DataError, ShapeError
from tlcr.ops.gae import FUSED_GAE, GAEArguments


def row_truth(
    rewards: list[float], values: list[float], mask: list[bool], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """The sum of discounted deltas over the counted tokens, written out forwards instead of as a recurrence."""
    counted = [t for t, counts in enumerate(mask) if counts]
    deltas = []
    for k, t in enumerate(counted):
        following = values[counted[k + 1]] if k + 1 < len(counted) else 0.0
        deltas.append(rewards[t] + gamma * following - values[t])
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    for k, t in enumerate(counted):
        advantages[t] = sum((gamma * lam) ** (m - k) * deltas[m] for m in range(k, len(counted)))
        returns[t] = advantages[t] + values[t]
    return advantages, returns


def truth(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95, whiten: bool = False
) -> tuple[Tensor, Tensor]:
    rows = [
        row_truth(r, v, m, gamma, lam)
        for r, v, m in zip(rewards.double().tolist(), values.double().tolist(), mask.tolist(), strict=True)
    ]
    advantages = torch.tensor([row[0] for row in rows], dtype=torch.float64).reshape(mask.shape)
    returns = torch.tensor([row[1] for row in rows], dtype=torch.float64).reshape(mask.shape)
    if whiten:
        counted = advantages[mask]
        advantages = torch.where(mask, (advantages - counted.mean()) / counted.var(correction=0).sqrt(), 0.0)
    return advantages, returns


def example(batch: int = 4, length: int = 9, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    mask = torch.rand(batch, length) < 0.7
    mask[-1:] = False
    return {
        "rewards": torch.randn(batch, length).to(dtype),
        "values": torch.randn(batch, length).to(dtype),
        "mask": mask,
    }


def pack(inputs: dict[str, Tensor], lengths: list[int]) -> dict[str, Tensor]:
    """The first `lengths[b]` positions of every row, end to end."""
    packed = {k: torch.cat([row[:n] for row, n in zip(v, lengths, strict=True)]) for k, v in inputs.items()}
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return packed | {"cu_seqlens": ends.to(torch.int32)}


@backends("fused_gae")
def test_hand_worked(backend: Backend) -> None:
    # Token 1 does not count: V_next of token 0 is V_2 = 4. gamma = 1/2, lam = 1/2:
    # delta_3 = 3 - 2 = 1, delta_2 = 1 + 1 - 4 = -2, delta_0 = 2 + 2 - 1 = 3
    # A_3 = 1, A_2 = -2 + 1/4 = -1.75, A_0 = 3 - 1.75 / 4 = 2.5625
    rewards = torch.tensor([[2.0, NAN, 1.0, 3.0, INF]])
    values = torch.tensor([[1.0, INF, 4.0, 2.0, NAN]])
    mask = torch.tensor([[True, False, True, True, False]])
    inputs = to_device({"rewards": rewards, "values": values, "mask": mask}, backend.device)
    advantages, returns = ops.fused_gae(**inputs, gamma=0.5, lam=0.5, impl=backend.impl)
    wanted = [[2.5625, 0.0, -1.75, 1.0, 0.0]]
    assert_close(advantages, wanted)
    assert_close(returns, [[3.5625, 0.0, 2.25, 3.0, 0.0]])
    assert not advantages.requires_grad and not returns.requires_grad
    with pytest.raises(AssertionError):
        assert_close(advantages.roll(1, dims=1), wanted)
    with pytest.raises(AssertionError):
        assert_close(advantages * (1 + 1e-4), wanted)


@backends("fused_gae")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 1.0), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("whiten", [False, True])
def test_against_the_sum(backend: Backend, dtype: torch.dtype, gamma: float, lam: float, whiten: bool) -> None:
    inputs = example(dtype=dtype)
    options: dict[str, Any] = {"gamma": gamma, "lam": lam, "whiten": whiten}
    wanted = truth(**inputs, **options)
    got = ops.fused_gae(**to_device(inputs, backend.device), **options, impl=backend.impl)
    spread = ops.fused_gae(
        **to_device({k: strided(v) for k, v in inputs.items()}, backend.device), **options, impl=backend.impl
    )
    for result, of_strided, true in zip(got, spread, wanted, strict=True):
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(result, true)
        assert_close(of_strided, true)


@backends("fused_gae")
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lengths", [[9, 4, 0, 6], [1, 1, 1, 1], [0, 0, 9, 0]])
def test_packed(backend: Backend, whiten: bool, dtype: torch.dtype, lengths: list[int]) -> None:
    inputs = example(dtype=dtype)
    inputs["mask"][-1, ::2] = True
    padded = inputs | {"mask": inputs["mask"] & (torch.arange(9) < torch.tensor(lengths).unsqueeze(1))}
    wanted = pack(dict(enumerate(truth(**padded, gamma=0.97, whiten=whiten))), lengths)
    packed = pack(inputs, lengths)
    got = ops.fused_gae(**to_device(packed, backend.device), gamma=0.97, whiten=whiten, impl=backend.impl)
    assert_close(got[0], wanted[0])
    assert_close(got[1], wanted[1])


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MASKS: dict[str, Any] = {
    "all": lambda shape: torch.ones(shape, dtype=torch.bool),
    "prefix": lambda shape: torch.arange(shape[1]) < torch.randint(shape[1] + 1, (shape[0], 1)),
    "hole": lambda shape: (torch.arange(shape[1]) - shape[1] // 2).abs().expand(shape) > shape[1] // 4,
    "few": lambda shape: torch.rand(shape) < 0.1,
    "most": lambda shape: torch.rand(shape) < 0.9,
    "alternate": lambda shape: (torch.arange(shape[1]) % 2 == 0).expand(shape),
}


def plain_rows(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, whiten: bool
) -> tuple[Tensor, Tensor]:
    """The loop that trainers carry, in the dtype of its inputs, and their whitening."""
    advantage = following = torch.zeros_like(rewards[:, 0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        step = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage
        advantage = torch.where(mask[:, t], step, advantage)
        following = torch.where(mask[:, t], values[:, t], following)
        columns.append(advantage)
    advantages = torch.where(mask, torch.stack(columns[::-1], dim=1), 0.0)
    returns = torch.where(mask, advantages + values, 0.0)
    if whiten:
        counted = advantages[mask]
        whitened = (advantages - counted.mean()) / counted.var(correction=0).sqrt()
        advantages = torch.where(mask, whitened, 0.0)
    return advantages, returns


# Under the interpreter every two values of two arguments meet.
@crossed(
    "fused_gae",
    lambda dtype, kind, packed, whiten: (dtype + kind + packed + 2 * whiten) % 4 == 0,
    dtype=DTYPES,
    kind=list(MASKS),
    packed=[False, True],
    whiten=[False, True],
)
def test_every_length_as_accurate_as_a_plain_loop(
    backend: Backend, dtype: torch.dtype, kind: str, packed: bool, whiten: bool
) -> None:
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    options: dict[str, Any] = {"gamma": 0.99, "lam": 0.95, "whiten": whiten}
    for length in row_lengths(backend):
        mask = MASKS[kind]((5, length))
        if whiten and mask.sum() < 2:
            continue
        # What does not count is NaN where the truth has 0, which are the same to an honest kernel.
        clean = {name: torch.where(mask, torch.randn(5, length), 0.0).to(dtype) for name in ("rewards", "values")}
        dirty = {name: tensor.masked_fill(~mask, NAN) for name, tensor in clean.items()}
        inputs: dict[str, Any] = dirty | {"mask": mask}
        if packed:
            inputs = pack(inputs, [length] * 5)
        got = ops.fused_gae(**to_device(inputs, backend.device), **options, impl=backend.impl)
        wide = {name: tensor.double() for name, tensor in clean.items()}
        true = truth(**wide, mask=mask, **options)
        plain = plain_rows(**{k: v.to(arithmetic) for k, v in clean.items()}, mask=mask, **options)
        for result, of_plain, wanted in zip(got, plain, true, strict=True):
            assert result.dtype == arithmetic
            if dtype == torch.float64:
                assert_close(result.view(5, length), wanted)
            else:
                assert_no_worse_than_reference(result.view(5, length), of_plain, wanted, slack=4)
            assert not result.view(5, length).cpu()[~mask].any()


@backends("fused_gae")
@pytest.mark.parametrize("length", [1, 9, 64, 1000])
def test_repeats_bitwise_and_a_row_does_not_depend_on_the_others(backend: Backend, length: int) -> None:
    if interpreted(backend) and length > 64:
        pytest.skip("tests/ops/test_triton.py has long rows")
    inputs = to_device(example(7, length), backend.device)
    packed = to_device(pack(inputs, [length] * 7), backend.device)
    together = ops.fused_gae(**inputs, impl=backend.impl)
    end_to_end = ops.fused_gae(**packed, impl=backend.impl)
    for again in (together, ops.fused_gae(**inputs, impl=backend.impl)):
        assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))
    for row in (0, 3, 6):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        alone = ops.fused_gae(**one, impl=backend.impl)
        for result, among, of_packed in zip(alone, together, end_to_end, strict=True):
            assert torch.equal(result[0], among[row])
            assert_close(of_packed[row * length : (row + 1) * length], among[row])
    whitened = ops.fused_gae(**inputs, whiten=True, impl=backend.impl)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whitened, ops.fused_gae(**inputs, whiten=True, impl=backend.impl), strict=True)
    )


@backends("fused_gae")
def test_packed_without_mask_and_with_a_loose_end(backend: Backend) -> None:
    # Position 3 lies behind the last sequence.
    rewards = torch.tensor([1.0, 2.0, 3.0, NAN], device=backend.device)
    cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32, device=backend.device)
    inputs: dict[str, Any] = {"cu_seqlens": cu_seqlens, "lam": 1.0, "impl": backend.impl}
    advantages, returns = ops.fused_gae(rewards, torch.zeros_like(rewards), **inputs)
    assert_close(advantages, [3.0, 2.0, 3.0, 0.0])
    assert_close(returns, [3.0, 2.0, 3.0, 0.0])
    whitened, _ = ops.fused_gae(rewards, torch.zeros_like(rewards), whiten=True, **inputs)
    assert_close(whitened, [0.5**0.5, -(2**0.5), 0.5**0.5, 0.0])


@backends("fused_gae")
def test_one_broken_sequence_does_not_reach_its_neighbours(backend: Backend) -> None:
    inputs = example(3, 5)
    inputs["mask"][:] = True
    clean = ops.fused_gae(**to_device(inputs, backend.device), impl=backend.impl)
    inputs["rewards"][1, 2] = NAN
    padded = ops.fused_gae(**to_device(inputs, backend.device), impl=backend.impl)
    packed = ops.fused_gae(**to_device(pack(inputs, [5, 5, 5]), backend.device), impl=backend.impl)
    for result, of_packed, wanted in zip(padded, packed, clean, strict=True):
        assert result[1, :3].isnan().all()
        assert of_packed[5:8].isnan().all()
        for row in (0, 2):
            assert torch.equal(result[row], wanted[row])
            assert_close(of_packed[5 * row : 5 * row + 5], wanted[row])


@backends("fused_gae")
def test_no_mask_counts_everything(backend: Backend) -> None:
    inputs = to_device(example(), backend.device)
    full = inputs | {"mask": torch.ones_like(inputs["mask"])}
    del inputs["mask"]
    for got, wanted in zip(
        ops.fused_gae(**inputs, impl=backend.impl), ops.fused_gae(**full, impl=backend.impl), strict=True
    ):
        assert torch.equal(got, wanted)


@backends("fused_gae")
def test_lambda_one_is_the_return_less_the_value(backend: Backend) -> None:
    inputs = example(2, 300, torch.float64)
    inputs["mask"][:] = True
    advantages, returns = ops.fused_gae(**to_device(inputs, backend.device), lam=1.0, impl=backend.impl)
    to_go = inputs["rewards"].flip(-1).cumsum(-1).flip(-1)
    assert_close(returns, to_go, ulps=1024)
    assert_close(advantages, to_go - inputs["values"], ulps=1024)


@backends("fused_gae")
@pytest.mark.parametrize("packed", [False, True])
def test_long_rows_as_accurate_as_a_plain_loop(backend: Backend, packed: bool) -> None:
    inputs = example(2, 257)
    inputs["mask"][:] = True
    advantage, following, plain = torch.zeros(2), torch.zeros(2), []
    for t in reversed(range(257)):
        delta = inputs["rewards"][:, t] + following - inputs["values"][:, t]
        advantage, following = delta + 0.95 * advantage, inputs["values"][:, t]
        plain.append(advantage)
    arguments = pack(inputs, [257, 257]) if packed else inputs
    got, _ = ops.fused_gae(**to_device(arguments, backend.device), impl=backend.impl)
    assert_no_worse_than_reference(got.view(2, 257), torch.stack(plain[::-1], dim=1), truth(**inputs)[0])


@backends("fused_gae")
def test_whitening_does_not_depend_on_the_reward_scale(backend: Backend) -> None:
    inputs = to_device(example(), backend.device)
    one, _ = ops.fused_gae(**inputs, whiten=True, impl=backend.impl)
    counted = one[inputs["mask"]].double()
    assert abs(float(counted.mean())) < 1e-6
    assert abs(float(counted.var(correction=0)) - 1) < 1e-6
    for factor in (2.0**-40, 2.0**40):
        scaled = inputs | {name: factor * inputs[name] for name in ("rewards", "values")}
        assert torch.equal(ops.fused_gae(**scaled, whiten=True, impl=backend.impl)[0], one)


@backends("fused_gae")
@pytest.mark.parametrize("broken", [NAN, INF])
def test_a_broken_token_breaks_only_tokens_that_count(backend: Backend, broken: float) -> None:
    """Its row and, whitened, the mean of all; what does not count stays 0 in both results."""
    rewards = torch.tensor([[0.1, broken, 0.2, 0.3], [0.5, 0.6, 0.7, 0.8]])
    mask = torch.tensor([[True, True, False, True], [False, True, False, False]])
    inputs = to_device({"rewards": rewards, "values": torch.zeros_like(rewards), "mask": mask}, backend.device)
    advantages, returns = ops.fused_gae(**inputs, whiten=True, impl=backend.impl)
    assert torch.equal(advantages.isnan().cpu(), mask)
    for result in (advantages, returns):
        assert (result[~inputs["mask"]] == 0).all()


@backends("fused_gae")
def test_whitening_without_spread_gives_zero(backend: Backend) -> None:
    equal = torch.full((3, 1), 0.1, device=backend.device)
    advantages, returns = ops.fused_gae(equal, torch.zeros_like(equal), whiten=True, impl=backend.impl)
    assert_close(advantages, torch.zeros(3, 1))
    assert_close(returns, torch.full((3, 1), 0.1))
    one_token, _ = ops.fused_gae(equal[:1], torch.zeros_like(equal[:1]), whiten=True, impl=backend.impl)
    assert_close(one_token, [[0.0]])


@backends("fused_gae")
def test_whitening_does_not_hide_nan(backend: Backend) -> None:
    rewards = torch.tensor([[1.0, NAN]], device=backend.device)
    advantages, _ = ops.fused_gae(rewards, torch.zeros_like(rewards), whiten=True, impl=backend.impl)
    assert advantages.isnan().all()


@backends("fused_gae")
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)])
def test_small_shapes(backend: Backend, shape: tuple[int, int], whiten: bool) -> None:
    rewards = torch.full(shape, 2.0, device=backend.device)
    advantages, returns = ops.fused_gae(rewards, torch.zeros_like(rewards), whiten=whiten, impl=backend.impl)
    assert_close(advantages, torch.full(shape, 0.0 if whiten else 2.0))
    assert_close(returns, torch.full(shape, 2.0))


@backends("fused_gae")
@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_packed_nothing(backend: Backend, offsets: list[int]) -> None:
    nothing = torch.zeros(0, device=backend.device)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=backend.device)
    for result in ops.fused_gae(nothing, nothing, cu_seqlens=cu_seqlens, whiten=True, impl=backend.impl):
        assert result.shape == (0,)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"values": torch.zeros(4, 8)}, ShapeError, r"values has shape \(4, 8\), wanted \(4, 9\) to match rewards"),
        ({"mask": torch.ones(4, 8).bool()}, ShapeError, r"mask has shape \(4, 8\), wanted \(4, 9\)"),
        ({"rewards": torch.zeros(9)}, ShapeError, r"rewards has shape \(9,\), wanted \(B, T\), or packed"),
        ({"cu_seqlens": torch.zeros(2).int()}, ShapeError, r"rewards \(with cu_seqlens\) has shape \(4, 9\), wanted 1"),
        ({"gamma": 1.01}, ConfigError, r"gamma is 1.01, wanted a number >= 0 and <= 1"),
        ({"lam": -0.1}, ConfigError, r"lam is -0.1"),
        ({"rewards": [[1.0]]}, ShapeError, r"rewards is a list, wanted a torch.Tensor"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="fused_gae: " + message):
        ops.fused_gae(**{**example(), **changes})


def test_cu_seqlens_errors() -> None:
    with pytest.raises(ShapeError, match=r"cu_seqlens is torch.int64 of shape \(2,\), wanted int32 \(B \+ 1,\)"):
        ops.fused_gae(torch.zeros(3), torch.zeros(3), cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ShapeError, match=r"cu_seqlens is a list, wanted a torch.Tensor of int32"):
        ops.fused_gae(torch.zeros(3), torch.zeros(3), cu_seqlens=[0, 3])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("offsets", "problem"),
    [
        ([64, 64], "begins with 64"),  # lengths
        ([20, 40, 68], "begins with 20"),  # lengths that ascend
        ([-5, 64], "begins with -5"),
        ([0, 64, 200], "ends with 200"),
        ([0, 129], "ends with 129"),
        ([0, 90, 64, 128], "goes from 90 down to 64"),
        ([0, -1], "goes from 0 down to -1"),
        ([0, 2**31 - 1, -(2**31)], "goes from 2147483647 down to -2147483648"),
        ([1], "begins with 1"),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_offsets_that_are_no_cumulative_lengths_are_refused(impl: Any, offsets: list[int], problem: str) -> None:
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    tokens = torch.zeros(128)
    with pytest.raises(DataError, match=rf"fused_gae: cu_seqlens {problem}, wanted offsets .* at 128 \(N\)"):
        ops.fused_gae(tokens, tokens, cu_seqlens=cu_seqlens, impl=impl)


def test_the_remedy_for_lengths_works() -> None:
    lengths = torch.tensor([64, 0, 60])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    tokens = torch.ones(128)
    advantages, _ = ops.fused_gae(tokens, torch.zeros(128), lam=1.0, cu_seqlens=cu_seqlens)
    assert advantages[[0, 63, 64, 123, 124]].tolist() == [64, 1, 60, 1, 0]


def takes_one_by_one(arguments: GAEArguments) -> Any:
    return torch.ops.tlcr.fused_gae(*arguments)


@backends("fused_gae")
def test_offsets_that_the_python_check_does_not_see_fail_in_the_operator(backend: Backend) -> None:
    if interpreted(backend):
        pytest.skip("Triton's interpreter drops assertions; tests/ops/test_triton_compiled.py looks for them")
    run = FUSED_GAE.reference if backend.impl == "reference" else takes_one_by_one
    tokens = torch.zeros(8, device=backend.device)
    for offsets in ([8, 8], [0, 9], [0, 5, 3], [-1, 8]):
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=backend.device)
        with pytest.raises(Exception, match="cu_seqlens"):
            run(GAEArguments(tokens, tokens, None, 1.0, 0.95, False, cu_seqlens))


@backends("fused_gae")
@pytest.mark.parametrize("whiten", [False, True])
def test_packed_tokens_of_no_sequence_get_nothing(backend: Backend, whiten: bool) -> None:
    inputs = to_device({"rewards": torch.ones(6), "values": torch.ones(6)}, backend.device)
    for offsets in ([0], [0, 0]):
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=backend.device)
        for result in ops.fused_gae(**inputs, cu_seqlens=cu_seqlens, whiten=whiten, impl=backend.impl):
            assert torch.equal(result, torch.zeros_like(result)), offsets
