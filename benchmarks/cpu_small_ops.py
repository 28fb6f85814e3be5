"""How long fused_gae, fused_reward and ppo_loss take on one thread of a CPU, beside what one would write in torch.

    python benchmarks/cpu_small_ops.py
    python benchmarks/cpu_small_ops.py --rounds 51 --only fused_gae --json small_ops.json
    ATEN_CPU_CAPABILITY=avx2 python benchmarks/cpu_small_ops.py

Float32. Rivals of fused_gae: the loop over time that trainers carry; sums within chunks as one matrix product, then a
loop over chunks; log-step doubling; a convolution with the powers of gamma lam, cut off at 1e-7. Each stands in the
cases that it can do: the product and the convolution know no token inside a row that does not count. Processor time,
not wall-clock, of whole calls; the rivals take turns. No wrong answer is timed: every result and gradient is first
compared with the reference in float64.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_time import Timing, alternate, machine, table, write_json
from rich.console import Console
from torch import Tensor
from torch.nn.functional import conv1d, pad

from tlcr import ops

LAM = 0.95  # gamma is 1
CHUNK = 128
CUT_OFF = 1e-7
TURN = 0.01  # seconds
LARGEST_ERROR = 1e-4  # of the largest true value

Function = Callable[..., tuple[Tensor, ...]]
Inputs = dict[str, Tensor]


def tlcr_op(op: str, impl: str = "cpp", **inputs: Tensor) -> tuple[Tensor, ...]:
    """The results that are timed and checked: of ppo_loss the loss and the gradients of what is trained."""
    results = getattr(ops, op)(**inputs, impl=impl)
    if op == "ppo_loss":
        return with_gradients(results.loss, inputs)
    return (results,) if isinstance(results, Tensor) else results


def with_gradients(loss: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss, (inputs["logprobs"], inputs["values"])))


def results_from(advantages: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask is None:
        return advantages, advantages + values
    return torch.where(mask, advantages, 0.0), torch.where(mask, advantages + values, 0.0)


def loop(rewards: Tensor, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    advantage = following = torch.zeros_like(rewards[:, 0])
    advantages = []
    for t in reversed(range(rewards.shape[1])):
        step = rewards[:, t] + following - values[:, t] + LAM * advantage
        if mask is None:
            advantage, following = step, values[:, t]
        else:
            advantage = torch.where(mask[:, t], step, advantage)
            following = torch.where(mask[:, t], values[:, t], following)
        advantages.append(advantage)
    return results_from(torch.stack(advantages[::-1], dim=1), values, mask)


def deltas(rewards: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """With every token counted, or all those from some position on left out."""
    if mask is not None:
        rewards, values = rewards * mask, values * mask
    return rewards + pad(values[:, 1:], (0, 1)) - values


def chunked(rewards: Tensor, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    delta = deltas(rewards, values, mask)
    position = torch.arange(CHUNK)
    distance = position.unsqueeze(1) - position
    powers = torch.where(distance >= 0, LAM ** distance.clamp(min=0).to(delta.dtype), 0.0)
    local = delta.unflatten(1, (-1, CHUNK)) @ powers
    to_end = LAM ** (CHUNK - position).to(delta.dtype)
    following = torch.zeros_like(delta[:, :1])
    advantages = []
    for n in reversed(range(local.shape[1])):
        advantages.append(local[:, n] + to_end * following)
        following = advantages[-1][:, :1]
    return results_from(torch.cat(advantages[::-1], dim=1), values, mask)


def convolution(rewards: Tensor, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    delta = deltas(rewards, values, mask)
    size = min(delta.shape[1], math.ceil(math.log(CUT_OFF) / math.log(LAM)))
    powers = LAM ** torch.arange(size).to(delta.dtype)
    advantages = conv1d(pad(delta, (0, size - 1)).unsqueeze(1), powers.view(1, 1, -1)).squeeze(1)
    return results_from(advantages, values, mask)


def doubling(rewards: Tensor, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if mask is None:
        y, shift = deltas(rewards, values, None), 1
        while shift < y.shape[1]:
            y, shift = y + LAM**shift * pad(y[:, shift:], (0, shift)), 2 * shift
        return results_from(y, values, None)
    # A token that does not count hands on the value and the advantage behind it.
    value_from_here, known = torch.where(mask, values, 0.0), mask
    shift = 1
    while shift < values.shape[1]:
        value_from_here = torch.where(known, value_from_here, pad(value_from_here[:, shift:], (0, shift)))
        known, shift = known | pad(known[:, shift:], (0, shift)), 2 * shift
    y = torch.where(mask, rewards + pad(value_from_here[:, 1:], (0, 1)) - values, 0.0)
    decay, shift = torch.where(mask, torch.full_like(y, LAM), 1.0), 1
    while shift < y.shape[1]:
        y = y + decay * pad(y[:, shift:], (0, shift))
        decay, shift = decay * pad(decay[:, shift:], (0, shift)), 2 * shift
    return results_from(y, values, mask)


def padded(rival: Function, lengths: list[int], rewards: Tensor, values: Tensor, **_: Tensor) -> tuple[Tensor, ...]:
    """Packed tokens by way of rows: what one does whose GAE knows rows only."""
    rows = [torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True) for x in (rewards, values)]
    mask = torch.arange(rows[0].shape[1]) < torch.tensor(lengths).unsqueeze(1)
    return tuple(result[mask] for result in rival(*rows, mask))


def plain_reward(
    logits: Tensor, mask: Tensor, kl: Tensor, kl_coef: float, terminal: Tensor, clip: float
) -> tuple[Tensor]:
    p = torch.softmax(logits, dim=-1)
    rewards = torch.where(mask, (p[..., -1] - p[..., 0]).clamp(-clip, clip) - kl_coef * kl, 0.0)
    last = mask.sum(dim=1, keepdim=True) - 1
    return (rewards.scatter_add(1, last, terminal.unsqueeze(1)),)


def plain_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
) -> tuple[Tensor, ...]:
    """The loss, and the statistics that trainers log."""
    log_ratio = logprobs - old_logprobs
    ratio, count = log_ratio.exp(), mask.sum()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    near = old_values + (values - old_values).clamp(-0.2, 0.2)
    far_loss, near_loss = (values - returns).square(), (near - returns).square()

    def mean(x: Tensor) -> Tensor:
        return (x * mask).sum() / count

    policy, value = mean(torch.max(unclipped, clipped)), 0.5 * mean(torch.max(far_loss, near_loss))
    with torch.no_grad():
        clip_fraction, value_clip_fraction = mean((clipped > unclipped).float()), mean((near_loss > far_loss).float())
        approx_kl, ratio_max = mean(torch.expm1(log_ratio) - log_ratio), (ratio * mask).amax()
    return policy + value, clip_fraction, value_clip_fraction, approx_kl, ratio_max


def trained(loss: Function, **inputs: Tensor) -> tuple[Tensor, ...]:
    return with_gradients(loss(**inputs)[0], inputs)


def compiled(function: Function) -> Function:
    return torch.compile(function, dynamic=False)


def cases(batch: int, length: int) -> dict[str, tuple[str, Inputs, dict[str, Any], dict[str, Function]]]:
    """By name: the op, its tensors, its other arguments and its rivals."""
    shape = (batch, length)
    pair = {"rewards": torch.randn(shape), "values": torch.randn(shape)}
    lengths = torch.randint(length // 4, length + 1, (batch,))
    prefix = torch.arange(length) < lengths.unsqueeze(1)
    inside = torch.rand(shape) < 0.8
    # Sequences of all lengths, as many tokens in all as there are in the rows.
    starts = torch.randperm(batch * length - 1)[: batch - 1].sort().values + 1
    ends = pad(starts, (0, 1), value=batch * length)
    packed_lengths = ends.diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()
    offsets = {"cu_seqlens": pad(ends, (1, 0)).int()}
    rows = {"loop": loop, "doubling, compiled": compiled(doubling)}
    fast = rows | {"chunks": chunked, "chunks, compiled": compiled(chunked), "convolution": convolution}
    kl, terminal = torch.randn(shape), torch.randn(batch)
    options = {"kl_coef": 0.1, "clip": 0.9}
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
    loss = {name: 0.3 * torch.randn(shape) for name in names} | {"mask": prefix}
    reward = {"mask": prefix, "kl": kl, "terminal": terminal}
    rewarded = {"eager": plain_reward, "compiled": compiled(plain_reward)}
    return {
        "fused_gae": ("fused_gae", pair, {"lam": LAM}, fast),
        "fused_gae, padded rows": ("fused_gae", pair | {"mask": prefix}, {"lam": LAM}, fast),
        "fused_gae, holes": ("fused_gae", pair | {"mask": inside}, {"lam": LAM}, rows),
        "fused_gae, packed": (
            "fused_gae",
            {name: x.flatten() for name, x in pair.items()} | offsets,
            {"lam": LAM},
            {"loop over padded rows": partial(padded, loop, packed_lengths)},
        ),
        "fused_reward, 2 classes": (
            "fused_reward",
            {"logits": torch.randn(*shape, 2), **reward},
            options,
            {name: partial(f, **options) for name, f in rewarded.items()},
        ),
        "fused_reward, 3 classes": (
            "fused_reward",
            {"logits": torch.randn(*shape, 3), **reward},
            options,
            {name: partial(f, **options) for name, f in rewarded.items()},
        ),
        "ppo_loss and gradients": (
            "ppo_loss",
            loss,
            {},
            {"eager": partial(trained, plain_loss), "compiled": partial(trained, compiled(plain_loss))},
        ),
    }


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same, in another dtype; what ppo_loss trains asks for its gradient."""
    result = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    for name in ("logprobs", "values") if "logprobs" in result else ():
        result[name] = result[name].detach().requires_grad_()
    return result


def check(name: str, function: Function, inputs: Inputs, true: tuple[Tensor, ...]) -> float:
    """The largest error of the results, against float64."""
    found = max(
        float((got.double() - wanted).abs().max() / wanted.abs().max())
        for got, wanted in zip(function(**inputs), true, strict=True)
    )
    if not found <= LARGEST_ERROR:
        raise SystemExit(f"{name} is wrong, and so not timed: relative error {found:.1e}, wanted {LARGEST_ERROR:.0e}")
    return found


def take_turns(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """The time of one call, from turns of as many calls as fill TURN seconds: one alone is too short to be timed, and
    finds the caches as its rival left them."""
    calls = {}
    for name, function in functions.items():
        begin = time.thread_time()
        function()
        calls[name] = max(1, round(TURN / (time.thread_time() - begin)))

    def turn(function: Callable[[], object], times: int) -> None:
        for _ in range(times):
            function()

    turns = {name: partial(partial, turn, function, calls[name]) for name, function in functions.items()}
    per_call = {}
    for name, timing in alternate(turns, rounds).items():
        lower, upper = timing.quartiles
        n = calls[name]
        per_call[name] = Timing(timing.median / n, (lower / n, upper / n), [value / n for value in timing.rounds])
    return per_call


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry for each case and rival."""
    torch.manual_seed(args.seed)
    entries = []
    for batch, length in args.shapes:
        for case, (op, tensors, options, rivals) in cases(batch, length).items():
            if not case.startswith(args.only):
                continue
            inputs = cast(tensors, torch.float32)
            true = tlcr_op(op, "reference", **cast(tensors, torch.float64), **options)
            functions = {"tlcr": partial(tlcr_op, op, **options), **rivals}
            errors = {name: check(f"{case}: {name}", f, inputs, true) for name, f in functions.items()}
            timings = take_turns({name: partial(f, **inputs) for name, f in functions.items()}, args.rounds)
            for name, timing in timings.items():
                entry = {"case": case, "shape": [batch, length], "implementation": name, "error": errors[name]}
                entries.append(entry | {"ratio": timing.median / timings["tlcr"].median, **timing._asdict()})
    return entries


def show(entries: list[dict[str, Any]], where: dict[str, Any]) -> None:
    console = Console()
    title = "float32, one thread, processor time of whole calls"
    console.print(table(title, entries, milliseconds=".3f", ratio=".1f"))
    console.print(where)


def shape(text: str) -> tuple[int, int]:
    batch, length = map(int, text.split("x"))
    if length % CHUNK != 0:
        raise argparse.ArgumentTypeError(f"the length is {length}, wanted a multiple of {CHUNK} for the chunked rival")
    return batch, length


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sizes = [(64, 1024), (512, 2048)]
    parser.add_argument("--shapes", type=shape, nargs="+", default=sizes, help="rows x tokens, such as 64x1024")
    parser.add_argument("--only", default="", help="the cases whose name begins so")
    parser.add_argument("--rounds", type=int, default=21, help="how often each is timed, after one that is not")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="a file for everything that was measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    where, entries = machine(), measure(args)
    show(entries, where)
    write_json(args, where, entries)


if __name__ == "__main__":
    main()
