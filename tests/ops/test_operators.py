"""The torch operators behind the implementations: torch's own checks, compiled callers, the dispatch table."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import Backend, assert_close, to_device
from tlcr import ops
from tlcr.errors import DataError
from tlcr.ops import _extension, _library
from tlcr.ops.reference import join_master

B, T, C, V, H = 3, 5, 3, 11, 6


def namespaces() -> list[tuple[str, str]]:
    """Namespace and device of the operators that can run here."""
    found = [] if _extension.unavailable("cpu") else [(_library.NAMESPACE, "cpu")]
    if _library.has_triton() and _library.interpreting():
        found.append((_library.INTERPRETED, "cpu"))
    if torch.cuda.is_available() and not _extension.unavailable("cuda"):
        found.append((_library.NAMESPACE, "cuda"))
    return found


def operators() -> list[Any]:
    """Every operator of every namespace that can run here."""
    return [
        pytest.param(namespace, device, op, id=f"{namespace}-{device}-{op}")
        for namespace, device in namespaces()
        for op in (_library.SCHEMAS if namespace == _library.NAMESPACE else _library.TRITON)
    ]


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
        policy_only = [hidden[0], hidden[1], hidden[2], *[None] * 4, 0.7, None, None]
        cases = [hidden, policy_only]
    elif op == "ppo_loss":
        few = [leaf(B, T), *torch.randn(2, B, T).unbind(), mask_BT(), 0.2, 0.2, None, *[None] * 4]
        cases = [[*ppo_arguments(), True, None, torch.tensor(7.0)]]
        cases.append([*few, 1.0, None, 0.0, None, 0.0, False, 3.0, None])
    elif op == "adamw_step":
        weights, moments = [torch.randn(B, T).bfloat16() for _ in range(2)], [torch.rand(B, T) for _ in range(2)]
        cases = [[*weights, *moments, torch.zeros(B, T, dtype=torch.int16), 0.1, 0.9, 0.95, 1e-8, 0.1, 3]]
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
    else:
        arguments = detached(ppo_arguments())
        _, _, row_weights = run("ppo_loss", [*arguments, False, None, None])
        cases = [[torch.tensor(1.5), row_weights, *arguments, True, True, wants, wants] for wants in (True, False)]
    return [
        [
            value.detach().to(device).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
            for value in case
        ]
        for case in cases
    ]


@pytest.mark.parametrize(("namespace", "device", "op"), operators())
def test_opcheck(namespace: str, device: str, op: str) -> None:
    """torch's own tests: the schema is honoured, the fake agrees with the kernel, gradients are registered rightly."""
    found = getattr(torch.ops, namespace)

    def run(name: str, arguments: list[Any]) -> Any:
        return getattr(found, name)(*to_list(arguments, device))

    for arguments in samples(op, device, run):
        torch.library.opcheck(getattr(found, op).default, arguments)


def to_list(values: list[Any], device: str) -> list[Any]:
    return [value.to(device) if isinstance(value, Tensor) else value for value in values]


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
    names = "parameter", "grad", "exp_avg", "exp_avg_sq", "remainder"
    state = {name: inputs[name].detach().clone() for name in names}
    ops.adamw_step(**state, learning_rate=0.1, weight_decay=0.1, step=2, impl=impl)
    return join_master(state["parameter"], state["remainder"]), state["exp_avg"], state["exp_avg_sq"]


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


def fast_backends() -> list[Any]:
    return [
        pytest.param(status.op, Backend(status.device, impl), id=f"{status.op}-{status.device}-{impl}")
        for status in ops.available()
        for impl in status.usable
        if impl != "reference"
    ]


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
        "parameter": torch.randn(B, length).bfloat16(),
        "grad": torch.randn(B, length).bfloat16(),
        "exp_avg": torch.randn(B, length),
        "exp_avg_sq": torch.rand(B, length) + 0.1,
        "remainder": torch.zeros(B, length, dtype=torch.int16),
    }
    return to_device(inputs, device)


def results_and_gradients(
    call: Callable[[dict[str, Any]], Any], inputs: dict[str, Any], trained: tuple[str, ...]
) -> list[Tensor]:
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in trained}
    result = call(inputs | leaves)
    results = list(result) if isinstance(result, tuple) else [result]
    gradients = list(torch.autograd.grad(results[0], leaves.values())) if trained else []
    return [x.detach() for x in (*results, *gradients)]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own, as inductor starts
@pytest.mark.parametrize(("op", "backend"), fast_backends())
def test_a_compiled_caller_needs_no_graph_break_and_gets_the_same(op: str, backend: Backend) -> None:
    """`torch.compile(fullgraph=True)` of code that calls the door, forward and backward, at two lengths."""
    call, trained = CALLS[op]
    torch.compiler.reset()
    compiled = torch.compile(lambda inputs: call(inputs, backend.impl), fullgraph=True, dynamic=True)
    for length in (4, 7):
        inputs = call_inputs(length, backend.device)
        wanted = results_and_gradients(lambda inputs: call(inputs, backend.impl), inputs, trained)
        for got, want in zip(results_and_gradients(compiled, inputs, trained), wanted, strict=True):
            assert_close(got, want.double())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.skipif(_extension.unavailable("cpu") is not None, reason="no C++ kernels here")
def test_compiled_code_refuses_ids_outside_the_vocabulary() -> None:
    logits, wrong = torch.randn(2, V), torch.tensor([0, V])
    with pytest.raises(DataError, match="token_ids holds 11"):
        ops.score_tokens(logits, wrong, impl="cpp")
    compiled = torch.compile(lambda x, y: ops.score_tokens(x, y, impl="cpp").logprobs, fullgraph=True)
    with pytest.raises(IndexError, match=r"token_ids holds 11, wanted ids in \[0, 11\)"):
        compiled(logits, wrong)


@pytest.mark.parametrize(("op", "backend"), [case for case in fast_backends() if not CALLS[case.values[0]][1]])
def test_what_has_no_gradient_asks_for_none(op: str, backend: Backend) -> None:
    inputs = {
        name: value.requires_grad_() if value.is_floating_point() else value
        for name, value in call_inputs(4, backend.device).items()
    }
    results = CALLS[op][0](inputs, backend.impl)
    assert not any(result.requires_grad for result in (results if isinstance(results, tuple) else [results]))


@pytest.mark.parametrize(("op", "backend"), [case for case in fast_backends() if CALLS[case.values[0]][1]])
def test_second_derivatives_are_refused(op: str, backend: Backend) -> None:
    """Not given as zero: a silent 0 would be a wrong answer."""
    call, (name, *_) = CALLS[op]
    inputs = call_inputs(4, backend.device)
    inputs[name].requires_grad_()
    (gradient,) = torch.autograd.grad(call(inputs, backend.impl).square(), inputs[name], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_every_operator_has_a_kernel_where_it_says_so() -> None:
    """The dispatch table: C++ on the CPU where the extension is, and for CUDA the extension's and Triton's."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in _library.SCHEMAS:
        assert has_kernel(f"tlcr::{op}", "CPU") == (_extension.unavailable("cpu") is None)
        with_triton = op in _library.TRITON and _library.has_triton()
        with_cuda = op.removesuffix("_backward") in _library.CUDA and _extension.unavailable("cuda") is None
        assert has_kernel(f"tlcr::{op}", "CUDA") == (with_triton or with_cuda)
