"""What holds for all ops: the names and signatures, the choice of an implementation, no wait for the device, errors."""

import inspect
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch

from tlcr import errors, ops
from tlcr.errors import BackendUnavailable, ConfigError, TlcrError

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
        "parameter, grad, exp_avg, exp_avg_sq, remainder, *, learning_rate, betas=(0.9, 0.999), eps=1e-08, "
        "weight_decay=0.0, step, impl='auto'"
    ),
    "rms_norm": "x, weight, *, eps, impl='auto'",
    "gated_silu": "gate, up, *, impl='auto'",
    "token_labels": "rejected_ids, revised_ids",
}


@pytest.mark.parametrize("op", SIGNATURES)
def test_signatures_are_those_of_the_design(op: str) -> None:
    signature = inspect.signature(getattr(ops, op))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    wanted = f"({SIGNATURES[op]})"
    assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == wanted


def test_public_names() -> None:
    results = {"OpStatus", "PPOLoss", "TokenLabel", "TokenScores"}
    assert set(ops.__all__) == {*SIGNATURES, *results, "available", "build_info"}


def calls(device: str) -> dict[str, Any]:
    """One call of every op, with everything that it can take."""
    pair = torch.rand(2, 3, device=device)
    mask = torch.ones(2, 3, dtype=torch.bool, device=device)
    ids = torch.zeros(2, 3, dtype=torch.long, device=device)
    logits = torch.rand(2, 3, 5, device=device)
    cu_seqlens = torch.zeros(2, dtype=torch.int32, device=device)
    reward = {"kl": pair, "kl_coef": 0.1, "terminal": pair[:, 0], "kind": "discrete", "band": 0.1, "clip": 1.0}
    trained = {"values": pair, "old_values": pair, "returns": pair, "entropy": pair, "kl": pair}
    weights = torch.zeros(2, 3, dtype=torch.bfloat16, device=device)
    remainder = torch.zeros(2, 3, dtype=torch.int16, device=device)
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
            weights, weights, pair.clone(), pair.clone(), remainder, learning_rate=0.1, weight_decay=0.1, step=1, **impl
        ),
        "rms_norm": lambda **impl: ops.rms_norm(pair, pair[0], eps=1e-6, **impl),
        "gated_silu": lambda **impl: ops.gated_silu(pair, pair, **impl),
    }


OPS = tuple(calls("cpu"))


@pytest.mark.parametrize("op", OPS)
def test_no_wait_for_the_device(op: str) -> None:
    """Tensors on the meta device have no values: whoever reads one there fails."""
    calls("meta")[op](impl="reference")
    with pytest.raises(RuntimeError):
        torch.zeros((), device="meta").item()


@pytest.mark.parametrize("op", OPS)
def test_auto_is_an_implementation_that_runs(op: str) -> None:
    status = next(status for status in ops.available() if (status.op, status.device) == (op, "cpu"))
    assert status.auto in status.usable and "reference" in status.usable
    assert set(status.usable) | set(status.reasons) == {"reference", "cpp", "triton", "cuda"}
    assert not set(status.usable) & set(status.reasons)
    calls("cpu")[op]()
    for impl in status.usable:
        calls("cpu")[op](impl=impl)


@pytest.mark.parametrize("op", OPS)
def test_named_implementation_is_never_replaced(op: str) -> None:
    status = next(status for status in ops.available() if (status.op, status.device) == (op, "cpu"))
    for impl, reason in status.reasons.items():
        with pytest.raises(BackendUnavailable) as caught:
            calls("cpu")[op](impl=impl)
        assert str(caught.value).startswith(f"{op}: impl={impl!r} is unavailable: {reason}; use impl='auto'")


@pytest.mark.parametrize("op", OPS)
def test_unknown_implementation(op: str) -> None:
    with pytest.raises(ConfigError, match=f"{op}: impl='fast' is unknown, choose from 'auto', 'reference', 'cpp'"):
        calls("cpu")[op](impl="fast")


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_survive_pickling_and_are_standard_ones(name: str) -> None:
    kind = getattr(errors, name)
    copy = pickle.loads(pickle.dumps(kind("what came, what was wanted")))
    assert type(copy) is kind and str(copy) == "what came, what was wanted"
    if not issubclass(kind, RuntimeWarning):
        assert issubclass(kind, TlcrError)
        assert kind is TlcrError or issubclass(kind, ValueError | RuntimeError | ConnectionError)


def test_results_survive_pickling() -> None:
    loss = calls("cpu")["ppo_loss"]()
    assert pickle.loads(pickle.dumps(loss)).loss == loss.loss


def test_importing_the_ops_loads_no_backend() -> None:
    code = "import sys, tlcr.ops; sys.exit('triton' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
