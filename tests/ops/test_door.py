"""What holds for all ops: the names and signatures, the choice of an implementation, no wait for the device, errors."""

import inspect
import pickle
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.examples import CALLS, SIGNATURES, call_inputs, calls
from tests.preloaded import run
from tlcr import errors, ops
from tlcr.errors import BackendUnavailable, ConfigError, ShapeError, TlcrError
from tlcr.ops import _checks


@pytest.mark.parametrize("op", SIGNATURES)
def test_signatures_are_those_of_the_design(op: str) -> None:
    signature = inspect.signature(getattr(ops, op))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    wanted = f"({SIGNATURES[op]})"
    assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == wanted


OPS = tuple(op.name for op in ops.OPS)


def test_public_names() -> None:
    results = {"OpStatus", "PPOLoss", "TokenLabel", "TokenScores"}
    assert set(ops.__all__) == {*OPS, "token_labels", *results, "available", "build_info"}
    assert set(SIGNATURES) == {*OPS, "token_labels"}


@pytest.mark.parametrize("op", OPS)
def test_no_wait_for_the_device(op: str) -> None:
    """Tensors on the meta device have no values: whoever reads one there fails."""
    calls("meta")[op](impl="reference")
    with pytest.raises(RuntimeError):
        torch.zeros((), device="meta").item()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_a_call_of_fake_tensors_runs_forward_and_backward(op: str, impl: str) -> None:
    """They say that they are on the CPU, and have no memory: `tlcr doctor` takes a step with them."""
    call, differentiated = CALLS[op]
    with FakeTensorMode():
        calls("cpu")[op](impl=impl)
        inputs = call_inputs(7, "cpu")
        leaves = [inputs[name].requires_grad_() for name in differentiated]
        result = call(inputs, impl)
        if leaves:
            gradients = torch.autograd.grad(result, leaves)
            assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves]


def small_calls() -> dict[str, Any]:
    """Calls as a training loop makes them, by the module that checks their arguments."""
    pair = torch.rand(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    ids, logits = torch.zeros(2, 3, dtype=torch.long), torch.rand(2, 3, 5)
    value = {"values": pair, "old_values": pair, "returns": pair, "entropy": pair, "entropy_coef": 0.01}
    return {
        "reward": lambda: ops.fused_reward(logits[..., :2], mask, kl=pair, kl_coef=0.1, terminal=pair[:, 0], clip=5.0),
        "gae": lambda: ops.fused_gae(pair, pair, mask, gamma=1.0, lam=0.95, whiten=True),
        "ppo": lambda: ops.ppo_loss(pair, pair, pair, mask, **value),
        "scoring": lambda: ops.score_tokens(logits, ids, ref_logits=logits, temperature=0.7),
        "layers": lambda: (ops.rms_norm(pair, pair[0], eps=1e-6), ops.gated_silu(pair, pair)),
    }


@pytest.mark.parametrize("module", small_calls())
def test_arguments_in_order_cost_one_glance(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the checks runs that make a message."""
    for name in ("floating", "dense", "same_shape", "same_device", "number", "bool_mask"):
        monkeypatch.setattr(_checks, name, lambda *args, **options: pytest.fail("a check that makes a message"))
    small_calls()[module]()


def numbers_of(kind: Callable[[float], Any]) -> dict[str, Any]:
    """The same calls with numbers of another kind, integers as a mask and a denominator with an axis."""
    torch.manual_seed(0)
    pair, mask = torch.rand(2, 4), torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]], dtype=torch.int32)
    ids, logits = torch.zeros(2, 4, dtype=torch.int16), torch.rand(2, 4, 5)
    value = {"values": pair, "old_values": 2 * pair, "returns": pair + 1, "entropy": pair, "entropy_coef": kind(1)}
    options = {"clip": kind(1), "clip_high": kind(2), "dual_clip": kind(3), "value_clip": kind(1), "kl": pair}
    reward = {"kl": pair, "kl_coef": kind(1), "temperature": kind(2), "scale": kind(3), "clip": kind(2)}
    return {
        "fused_reward": lambda **impl: ops.fused_reward(logits[..., :3], mask, **reward, **impl),
        "fused_gae": lambda **impl: ops.fused_gae(pair, pair, mask, gamma=kind(1), lam=kind(0), whiten=True, **impl),
        "ppo_loss": lambda **impl: ops.ppo_loss(
            pair + 0.5, pair, pair, mask, **value, **options, denominator=torch.tensor([3.0]), **impl
        ),
        "score_tokens": lambda **impl: ops.score_tokens(logits, ids, temperature=kind(2), **impl),
        "rms_norm": lambda **impl: ops.rms_norm(pair, pair[0], eps=kind(1), **impl),
    }


@pytest.mark.parametrize("kind", [int, np.float64, Fraction])
@pytest.mark.parametrize("op", numbers_of(float))
def test_unusual_arguments_mean_the_same(op: str, kind: Callable[[float], Any]) -> None:
    """What the glance does not know is looked at closely, and brought into form."""
    for impl in ("auto", "reference"):
        got, want = numbers_of(kind)[op](impl=impl), numbers_of(float)[op](impl=impl)
        for x, y in zip(*(z if isinstance(z, tuple) else (z,) for z in (got, want)), strict=True):
            assert x is y is None or torch.equal(x, y)


FLOAT_ARGUMENTS = {
    "fused_reward": ("logits", "kl", "terminal"),
    "fused_gae": ("rewards", "values"),
    "ppo_loss": ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "entropy", "kl"),
    "score_tokens": ("logits", "ref_logits"),
    "rms_norm": ("x", "weight"),
    "gated_silu": ("gate", "up"),
}


def named(op: str) -> dict[str, Any]:
    pair, mask = torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)
    inputs: dict[str, Any] = dict.fromkeys(FLOAT_ARGUMENTS[op], pair)
    extra: dict[str, dict[str, Any]] = {
        "fused_reward": {"logits": torch.rand(2, 3, 2), "terminal": pair[:, 0], "mask": mask},
        "fused_gae": {"mask": mask},
        "ppo_loss": {"mask": mask},
        "score_tokens": {"logits": torch.rand(2, 3, 5), "ref_logits": torch.rand(2, 3, 5), "token_ids": mask.long()},
        "rms_norm": {"weight": pair[0], "eps": 1e-6},
    }
    return inputs | extra.get(op, {})


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in FLOAT_ARGUMENTS.items() for name in names])
def test_a_tensor_of_another_kind_is_refused_by_name(op: str, name: str, impl: str) -> None:
    inputs = named(op)
    getattr(ops, op)(**inputs, impl=impl)
    for wrong, problem in (
        (inputs[name].to_sparse(), rf"{name} has layout torch.sparse_coo, wanted a dense tensor; pass {name}.to_dense"),
        (
            inputs[name].to(torch.float8_e4m3fn),
            rf"{name} has dtype torch.float8_e4m3fn, wanted a float dtype \(float32",
        ),
        (inputs[name].long(), rf"{name} has dtype torch.int64, wanted a float dtype"),
        ([1.0], rf"{name} is a list, wanted a torch.Tensor"),
        (inputs[name][..., :1], "shape"),
    ):
        with pytest.raises(ShapeError, match=f"^{op}: .*{problem}"):
            getattr(ops, op)(**inputs | {name: wrong}, impl=impl)


@pytest.mark.parametrize(
    ("op", "name"),
    [("fused_gae", "values"), ("ppo_loss", "old_logprobs"), ("rms_norm", "weight"), ("gated_silu", "up")],
)
def test_a_tensor_that_is_missing_is_named(op: str, name: str) -> None:
    with pytest.raises(ShapeError, match=f"^{op}: {name} is a NoneType, wanted a torch.Tensor"):
        getattr(ops, op)(**named(op) | {name: None})


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
    assert run(code, Path(__file__).parents[2]).returncode == 0


GIVEN: dict[str, dict[str, Any]] = {
    "fused_gae": {"rewards": torch.zeros(1, 2), "values": torch.zeros(1, 2)},
    "fused_reward": {"logits": torch.zeros(1, 2, 2), "mask": torch.ones(1, 2, dtype=torch.bool)},
    "reward_from_hidden": {
        "hidden": torch.zeros(1, 2, 3),
        "weight": torch.zeros(2, 3),
        "mask": torch.ones(1, 2, dtype=torch.bool),
    },
    "score_tokens": {"logits": torch.zeros(2, 5), "token_ids": torch.zeros(2, dtype=torch.long)},
    "score_hidden": {
        "hidden": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "token_ids": torch.zeros(2, dtype=torch.long),
    },
    "ppo_loss": {
        **dict.fromkeys(("logprobs", "old_logprobs", "advantages"), torch.zeros(1, 2)),
        "mask": torch.ones(1, 2, dtype=torch.bool),
    },
    "gated_silu": {"gate": torch.zeros(2, 3), "up": torch.zeros(2, 3)},
}


@pytest.mark.parametrize(("op", "missing"), [(op, name) for op, given in GIVEN.items() for name in given])
@pytest.mark.parametrize("instead", [None, [[0.0]], "zeros"])
def test_what_is_no_tensor_is_named(op: str, missing: str, instead: Any) -> None:
    getattr(ops, op)(**GIVEN[op])
    with pytest.raises(ShapeError, match=f"^{op}: {missing} is a {type(instead).__name__}, wanted a torch.Tensor"):
        getattr(ops, op)(**GIVEN[op] | {missing: instead})
