"""What the tests of all ops know of each: its signature and its calls. A new op needs lines here, or the tests fail."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.ops.helpers import to_device
from tlcr import ops
from tlcr.ops.adamw import join_master

B, T, C, V, H = 3, 5, 3, 11, 6


SIGNATURES = {
    "fused_reward": (
        "logits, mask, *, kl=None, kl_coef=0.0, terminal=None, temperature=1.0, scale=1.0, clip=None, "
        "kind='continuous', band=0.0, impl='auto'"
    ),
    "reward_from_hidden": (
        "hidden, weight, mask, *, bias=None, kl=None, kl_coef=0.0, terminal=None, temperature=1.0, scale=1.0, "
        "clip=None, kind='continuous', band=0.0, impl='auto'"
    ),
    "fused_gae": "rewards, values, mask=None, *, gamma=1.0, lam=0.95, whiten=False, cu_seqlens=None, impl='auto'",
    "score_tokens": "logits, token_ids, *, ref_logits=None, temperature=1.0, impl='auto'",
    "score_hidden": (
        "hidden, weight, token_ids, *, bias=None, ref_hidden=None, ref_weight=None, ref_bias=None, temperature=1.0, "
        "chunk_tokens=None, impl='auto'"
    ),
    "ppo_loss": (
        "logprobs, old_logprobs, advantages, mask, *, clip=0.2, clip_high=None, dual_clip=None, values=None, "
        "old_values=None, returns=None, value_clip=0.2, value_coef=1.0, entropy=None, entropy_coef=0.0, kl=None, "
        "kl_coef=0.0, aggregate='token', denominator=None, impl='auto'"
    ),
    "adamw_step": (
        "parameters, grads, exp_avgs, exp_avg_sqs, remainders, *, learning_rate, betas=(0.9, 0.999), eps=1e-08, "
        "weight_decay=0.0, step, impl='auto'"
    ),
    "rms_norm": "x, weight, *, eps, impl='auto'",
    "gated_silu": "gate, up, *, impl='auto'",
    "token_labels": "rejected_ids, revised_ids",
}


def calls(device: str) -> dict[str, Any]:
    """One call of every op, with everything that it can take."""
    pair = torch.rand(2, 3, device=device)
    mask = torch.ones(2, 3, dtype=torch.bool, device=device)
    ids = torch.zeros(2, 3, dtype=torch.long, device=device)
    logits = torch.rand(2, 3, 5, device=device)
    cu_seqlens = torch.zeros(2, dtype=torch.int32, device=device)
    reward = {"kl": pair, "kl_coef": 0.1, "terminal": pair[:, 0], "kind": "discrete", "band": 0.1, "clip": 1.0}
    trained = {"values": pair, "old_values": pair, "returns": pair, "entropy": pair, "kl": pair}
    weights = [torch.zeros(2, n, dtype=torch.bfloat16, device=device) for n in (3, 0, 5)]
    moments = [tensor.float() for tensor in weights]
    rest = [torch.zeros_like(tensor) for tensor in weights], moments, [tensor + 1 for tensor in moments]
    remainders = [tensor.to(torch.int16) for tensor in weights]
    return {
        "fused_reward": lambda **impl: ops.fused_reward(logits[..., :2], mask, **reward, **impl),
        "reward_from_hidden": lambda **impl: ops.reward_from_hidden(logits, logits[0, :2], mask, **reward, **impl),
        "fused_gae": lambda **impl: (
            ops.fused_gae(pair, pair, mask, whiten=True, **impl),
            ops.fused_gae(pair[0], pair[0], mask[0], whiten=True, cu_seqlens=cu_seqlens, **impl),
        ),
        "score_tokens": lambda **impl: ops.score_tokens(logits, ids, ref_logits=logits, temperature=pair, **impl),
        "score_hidden": lambda **impl: ops.score_hidden(
            logits, logits[0], ids % 3, ref_hidden=logits, ref_weight=logits[0], temperature=pair, **impl
        ),
        "ppo_loss": lambda **impl: ops.ppo_loss(
            pair, pair, pair, mask, **trained, dual_clip=2.0, kl_coef=0.1, denominator=pair[0, 0], **impl
        ),
        "adamw_step": lambda **impl: ops.adamw_step(
            weights, *rest, remainders, learning_rate=0.1, weight_decay=0.1, step=1, **impl
        ),
        "rms_norm": lambda **impl: ops.rms_norm(pair, pair[0], eps=1e-6, **impl),
        "gated_silu": lambda **impl: ops.gated_silu(pair, pair, **impl),
    }


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def mask_BT() -> Tensor:
    return torch.arange(T) < torch.tensor([[T], [2], [0]])


def ids() -> Tensor:
    return torch.randint(V, (B, T))


def ppo_arguments() -> list[Any]:
    old, advantages, old_values, returns = torch.randn(4, B, T).unbind()
    trained = [leaf(B, T) for _ in range(4)]
    logprobs, values, entropy, kl = trained
    return [
        *(logprobs, old, advantages, mask_BT(), 0.2, 0.3, 3.0),
        *(values, old_values, returns, 0.2, 0.5, entropy, 0.01, kl, 0.1),
    ]


def score_arguments(*, half: bool) -> list[Any]:
    dtype = torch.bfloat16 if half else torch.float32
    return [leaf(B, T, V, dtype=dtype), ids(), torch.randn(B, T, V).to(dtype), 0.7, None]


def hidden_arguments() -> list[Any]:
    hidden, weight, bias = leaf(B, T, H), leaf(V, H), leaf(V)
    return [hidden, weight, ids(), bias, torch.randn(B, T, H), torch.randn(V, H), None, 1.0, torch.rand(B, T) + 0.5, 4]


def detached(values: list[Any]) -> list[Any]:
    return [value.detach() if isinstance(value, Tensor) else value for value in values]


def samples(op: str, device: str, run: Callable[..., Any]) -> list[list[Any]]:
    """Arguments that between them take every optional part and leave it out."""
    pair = torch.randn(B, T)
    if op == "fused_reward":
        reward = [pair, 0.1, torch.randn(B), 0.7, 2.0, 1.0, False, 0.0]
        cases = [[torch.randn(B, T, C), mask_BT(), *reward]]
        cases.append([torch.randn(B, T, 2).bfloat16(), mask_BT(), None, 0.0, None, 1.0, 1.0, None, True, 0.1])
    elif op == "reward_from_hidden":
        hidden, weight = torch.randn(B, T, H), torch.randn(C, H)
        cases = [[hidden, weight, mask_BT(), torch.randn(C), pair, 0.1, torch.randn(B), 0.7, 2.0, 1.0, False, 0.0]]
        cases.append([hidden.double(), weight, mask_BT(), None, None, 0.0, None, 1.0, 1.0, None, True, 0.1])
    elif op == "fused_gae":
        packed = torch.tensor([0, 2, 2, T], dtype=torch.int32)
        cases = [[pair, torch.randn(B, T), mask_BT(), 0.9, 0.8, True, None]]
        cases.append([pair[0].double(), pair[1], None, 1.0, 0.95, False, packed])
    elif op == "score_tokens":
        policy_only = [leaf(B, T, V), ids(), None, 1.0, torch.rand(B, T) + 0.5]
        cases = [score_arguments(half=False), score_arguments(half=True), policy_only]
    elif op == "score_hidden":
        hidden = hidden_arguments()
        policy_only = [hidden[0], hidden[1], hidden[2], *[None] * 4, 0.7, None, 256]
        cases = [hidden, policy_only]
    elif op == "ppo_loss":
        few = [leaf(B, T), *torch.randn(2, B, T).unbind(), mask_BT(), 0.2, 0.2, None, *[None] * 4]
        cases = [[*ppo_arguments(), True, None, torch.tensor(7.0)]]
        cases.append([*few, 1.0, None, 0.0, None, 0.0, False, 3.0, None])
    elif op == "adamw_step":
        shapes = [(B, T), (0,), (V,)]
        weights = [[torch.randn(shape).bfloat16() for shape in shapes] for _ in range(2)]
        moments = [[torch.rand(shape) for shape in shapes] for _ in range(2)]
        remainders = [torch.zeros(shape, dtype=torch.int16) for shape in shapes]
        cases = [[*weights, *moments, remainders, 0.1, 0.9, 0.95, 1e-8, 0.1, 3]]
    elif op == "rms_norm":
        cases = [[leaf(B, T, H, dtype=dtype), leaf(H, dtype=dtype), 1e-6] for dtype in (torch.float32, torch.bfloat16)]
    elif op == "rms_norm_backward":
        forward = [torch.randn(B, T, H), torch.randn(H)]
        cases = [[torch.randn(B, T, H), *forward, run("rms_norm", [*forward, 1e-6])[1]]]
    elif op == "gated_silu":
        cases = [[leaf(B, T, dtype=dtype), leaf(B, T, dtype=dtype)] for dtype in (torch.float32, torch.bfloat16)]
    elif op == "gated_silu_backward":
        cases = [[pair, torch.randn(B, T), torch.randn(B, T)]]
    elif op == "score_tokens_backward":
        forward = detached(score_arguments(half=False))
        _, entropy, _, kl, stats, ref_stats = run("score_tokens", forward)
        cases = [[pair, None, torch.randn(B, T), *forward, entropy, kl, stats, ref_stats]]
    elif op == "score_hidden_backward":
        forward = detached(hidden_arguments())
        _, entropy, _, kl, stats, ref_stats = run("score_hidden", forward)
        cases = [
            [pair, pair, torch.randn(B, T), *forward, entropy, kl, stats, ref_stats, True, wants, True]
            for wants in (True, False)
        ]
    elif op == "ppo_loss_backward":
        arguments = detached(ppo_arguments())
        _, _, row_weights = run("ppo_loss", [*arguments, False, None, None])
        cases = [[torch.tensor(1.5), row_weights, *arguments, True, True, wants, wants] for wants in (True, False)]
    elif op == "ppo_loss_with_gradients":
        arguments = [*detached(ppo_arguments()), True, None, torch.tensor(7.0)]
        half = [x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
        cases = [[*arguments, True, True, True, True], [*half, True, False, True, False]]
    else:
        raise KeyError(f"no arguments to try {op} with")
    return [[placed(value, device) for value in case] for case in cases]


def placed(value: Any, device: str) -> Any:
    """A tensor, or each tensor of a list, as a leaf on the device; anything else as it is."""
    if isinstance(value, list):
        return [placed(one, device) for one in value]
    if isinstance(value, Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    return value


def reward_call(inputs: dict[str, Any], impl: str) -> Any:
    return ops.fused_reward(inputs["logits"], inputs["mask"], kl=inputs["pair"], kl_coef=0.1, clip=1.0, impl=impl)


def hidden_reward_call(inputs: dict[str, Any], impl: str) -> Any:
    return ops.reward_from_hidden(inputs["hidden"], inputs["head"], inputs["mask"], terminal=inputs["row"], impl=impl)


def gae_call(inputs: dict[str, Any], impl: str) -> Any:
    return ops.fused_gae(inputs["pair"], inputs["values"], inputs["mask"], whiten=True, impl=impl)


def score_call(inputs: dict[str, Any], impl: str) -> Any:
    scores = ops.score_tokens(inputs["policy"], inputs["ids"], ref_logits=inputs["reference"], impl=impl)
    return scores.logprobs.sum() + (scores.entropy * inputs["pair"]).sum() + scores.kl.sum()


def score_hidden_call(inputs: dict[str, Any], impl: str) -> Any:
    scores = ops.score_hidden(inputs["hidden"], inputs["lm_head"], inputs["ids"], temperature=0.7, impl=impl)
    return scores.logprobs.sum() + (scores.entropy * inputs["pair"]).sum()


def loss_call(inputs: dict[str, Any], impl: str) -> Any:
    result = ops.ppo_loss(
        inputs["logprobs"],
        inputs["pair"],
        inputs["pair"],
        inputs["mask"],
        values=inputs["values"],
        old_values=inputs["pair"],
        returns=inputs["pair"],
        impl=impl,
    )
    return result.loss + 0 * result.ratio_max


def adamw_call(inputs: dict[str, Any], impl: str) -> Any:
    names = "parameters", "grads", "exp_avgs", "exp_avg_sqs", "remainders"
    # The second tensor of each list is a part of the first.
    state = {name: [inputs[name].detach().clone(), inputs[name].detach()[0].clone()] for name in names}
    ops.adamw_step(**state, learning_rate=0.1, weight_decay=0.1, step=2, impl=impl)
    masters = [join_master(*halves) for halves in zip(state["parameters"], state["remainders"], strict=True)]
    return (*masters, *state["exp_avgs"], *state["exp_avg_sqs"])


def norm_call(inputs: dict[str, Any], impl: str) -> Any:
    return (ops.rms_norm(inputs["hidden"], inputs["norm"], eps=1e-6, impl=impl) * inputs["hidden"].detach()).sum()


def gate_call(inputs: dict[str, Any], impl: str) -> Any:
    return ops.gated_silu(inputs["pair"], inputs["values"], impl=impl).square().sum()


CALLS = {
    "fused_reward": (reward_call, ()),
    "reward_from_hidden": (hidden_reward_call, ()),
    "fused_gae": (gae_call, ()),
    "score_tokens": (score_call, ("policy",)),
    "score_hidden": (score_hidden_call, ("hidden", "lm_head")),
    "ppo_loss": (loss_call, ("logprobs", "values")),
    "adamw_step": (adamw_call, ()),
    "rms_norm": (norm_call, ("hidden", "norm")),
    "gated_silu": (gate_call, ("pair", "values")),
}


def call_inputs(length: int, device: str) -> dict[str, Any]:
    inputs = {
        "logits": torch.randn(B, length, 2),
        "mask": torch.arange(length) < torch.tensor([[length], [2], [0]]),
        "pair": torch.randn(B, length),
        "row": torch.randn(B),
        "values": torch.randn(B, length),
        "logprobs": torch.randn(B, length),
        "hidden": torch.randn(B, length, H),
        "head": torch.randn(2, H),
        "lm_head": torch.randn(V, H),
        "policy": torch.randn(B, length, V),
        "reference": torch.randn(B, length, V),
        "ids": torch.randint(V, (B, length)),
        "norm": torch.rand(H) + 0.5,
        "parameters": torch.randn(B, length).bfloat16(),
        "grads": torch.randn(B, length).bfloat16(),
        "exp_avgs": torch.randn(B, length),
        "exp_avg_sqs": torch.rand(B, length) + 0.1,
        "remainders": torch.zeros(B, length, dtype=torch.int16),
    }
    return to_device(inputs, device)
