"""How long the ops take, and the code that one would write without them.

    pytest benchmarks/test_ops.py --benchmark-only --benchmark-group-by=group

runs on the GPU where torch sees one, else on the CPU; `OMP_NUM_THREADS=1` before it makes CPU figures comparable. Every
case first checks its result and gradient against the reference in float64, so that no wrong answer is ever timed. Not
collected by a bare `pytest`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import assert_close
from tlcr import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = DEVICE == "cuda"
B, T, H, V = (64, 1024, 2048, 128_256) if LARGE else (16, 256, 256, 32_000)
N_SCORED = 8192 if LARGE else 128

Case = tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]


def plain_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The loop over time that trainers carry, carrying over tokens that do not count."""
    advantage = following = torch.zeros_like(rewards[:, 0])
    advantages = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + following - values[:, t]
        step = delta + 0.95 * advantage
        advantage = torch.where(mask[:, t], step, advantage)
        following = torch.where(mask[:, t], values[:, t], following)
        advantages.append(torch.where(mask[:, t], step, 0.0))
    result = torch.stack(advantages[::-1], dim=1)
    return result, torch.where(mask, result + values, 0.0)


def plain_reward(logits: Tensor, mask: Tensor, terminal: Tensor) -> Tensor:
    p = torch.softmax(logits, dim=-1)
    rewards = torch.where(mask, p[..., 1] - p[..., 0], 0.0)
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1, keepdim=True)
    return rewards.scatter_add(1, last, terminal.unsqueeze(1))


def plain_scores(logits: Tensor, token_ids: Tensor, ref_logits: Tensor) -> tuple[Tensor, ...]:
    log_p, log_q = torch.log_softmax(logits, dim=-1), torch.log_softmax(ref_logits, dim=-1)
    at, p = token_ids.unsqueeze(-1), log_p.exp()
    logprobs, ref_logprobs = log_p.gather(-1, at).squeeze(-1), log_q.gather(-1, at).squeeze(-1)
    return logprobs, -(p * log_p).sum(-1), ref_logprobs, (p * (log_p - log_q)).sum(-1)


def plain_hidden_scores(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> tuple[Tensor, ...]:
    return plain_scores(hidden @ weight.t(), token_ids, ref_hidden @ ref_weight.t())


def plain_ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
) -> tuple[Tensor, ...]:
    log_ratio = logprobs - old_logprobs
    ratio, count = log_ratio.exp(), mask.sum()
    policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    near = old_values + (values - old_values).clamp(-0.2, 0.2)
    value = 0.5 * torch.max((values - returns).square(), (near - returns).square())
    total = ((policy + value) * mask).sum() / count
    return (total, ((ratio - 1 - log_ratio) * mask).sum() / count)


def pair_BT() -> Tensor:
    return torch.randn(B, T, device=DEVICE)


def mask_BT() -> Tensor:
    lengths = torch.randint(T // 4, T + 1, (B, 1), device=DEVICE)
    return torch.arange(T, device=DEVICE) < lengths


def inputs_of(op: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The arguments of one op, and those that are trained."""
    ids = torch.randint(V, (N_SCORED,), device=DEVICE)
    if op == "fused_reward":
        terminal = torch.randn(B, device=DEVICE)
        return {"logits": torch.randn(B, T, 2, device=DEVICE), "mask": mask_BT(), "terminal": terminal}, ()
    if op == "fused_gae":
        return {"rewards": pair_BT(), "values": pair_BT(), "mask": mask_BT()}, ()
    if op == "score_tokens":
        logits, ref_logits = torch.randn(2, N_SCORED, V, device=DEVICE)
        return {"logits": logits, "token_ids": ids, "ref_logits": ref_logits}, ("logits",)
    if op == "score_hidden":
        hidden, ref_hidden = torch.randn(2, N_SCORED, H, device=DEVICE)
        weight, ref_weight = torch.randn(2, V, H, device=DEVICE) / H**0.5
        inputs = {"hidden": hidden, "weight": weight, "token_ids": ids}
        return inputs | {"ref_hidden": ref_hidden, "ref_weight": ref_weight}, ("hidden", "weight")
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
    return {name: 0.3 * pair_BT() for name in names} | {"mask": mask_BT()}, ("logprobs", "values")


PLAIN: dict[str, Callable[..., Any]] = {
    "fused_reward": plain_reward,
    "fused_gae": plain_gae,
    "score_tokens": plain_scores,
    "score_hidden": plain_hidden_scores,
    "ppo_loss": plain_ppo_loss,
}


def run(function: Callable[..., Any], inputs: dict[str, Tensor], trained: tuple[str, ...]) -> list[Tensor]:
    """Forward, and backward where something is trained: the differentiable result first, then the gradients."""
    results = function(**inputs)
    first: Tensor = results if isinstance(results, Tensor) else results[0]
    if not trained:
        return [first]
    return [first.detach(), *torch.autograd.grad(first.sum(), [inputs[name] for name in trained])]


def implementations() -> list[Any]:
    cases = [pytest.param(op, "plain", id=f"{op}-plain") for op in PLAIN]
    for status in ops.available():
        if status.device == DEVICE and status.op in PLAIN:
            cases += [pytest.param(status.op, impl, id=f"{status.op}-{impl}") for impl in status.usable]
    return cases


@pytest.mark.parametrize(("op", "impl"), implementations())
def test_op(benchmark: Any, op: str, impl: Any) -> None:
    torch.manual_seed(0)
    inputs, trained = inputs_of(op)
    for name in trained:
        inputs[name].requires_grad_()

    def tlcr_op(**arguments: Tensor) -> Any:
        return getattr(ops, op)(**arguments, impl=impl)

    function = PLAIN[op] if impl == "plain" else tlcr_op

    def few(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The first 16 tokens or rows, so that the truth costs little beside what is timed."""
        kept = tensor.detach() if tensor.shape[0] == V else tensor.detach()[:16]
        return kept.to(dtype) if kept.is_floating_point() else kept

    def small(dtype: torch.dtype) -> dict[str, Tensor]:
        cut = {name: few(tensor, dtype) for name, tensor in inputs.items()}
        return {name: tensor.requires_grad_(name in trained) for name, tensor in cut.items()}

    truth = run(lambda **arguments: getattr(ops, op)(**arguments, impl="reference"), small(torch.float64), trained)
    for result, true in zip(run(function, small(torch.float32), trained), truth, strict=True):
        assert_close(result, true, ulps=1024)

    def step() -> None:
        run(function, inputs, trained)
        if LARGE:
            torch.cuda.synchronize()

    benchmark.group = f"{op} {DEVICE} B={B} T={T} V={V} H={H} scored={N_SCORED} float32"
    benchmark(step)
