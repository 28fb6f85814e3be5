"""What holds for all ops: the names and signatures, the choice of an implementation, no wait for the device, errors."""

import inspect
import pickle
import subprocess
import sys

import pytest
import torch

from tests.ops.examples import SIGNATURES, calls
from tlcr import errors, ops
from tlcr.errors import BackendUnavailable, ConfigError, TlcrError


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
