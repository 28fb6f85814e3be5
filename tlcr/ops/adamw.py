"""`adamw_step`: AdamW over bfloat16 weights with split float32 masters."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tlcr.errors import ConfigError
from tlcr.ops import _checks
from tlcr.ops._spec import Impl, Op


class AdamWArguments(NamedTuple):
    parameter: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    remainder: Tensor
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


def adamw_step(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    remainder: Tensor,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int,
    impl: Impl = "auto",
) -> None:
    """One step of AdamW over bfloat16 weights; their float32 masters are stored as the weights plus remainders.

    bfloat16 is the upper half of a float32, so the master's bits are 2^16 times those of the weight plus the remainder,
    from -2^15 to 2^15 - 1: the weight is the bfloat16 nearest to its master (of two the larger in magnitude), and no
    second copy of it is kept. In place, in float32, with g = grad, t = step, rate = learning_rate:

        m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
        master <- (1 - rate weight_decay) master - rate m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        parameter, remainder <- master

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101; the split master is ours.

    Args:
        parameter: bfloat16, any shape; changed.
        grad: bfloat16, the same shape.
        exp_avg: m, float32, the same shape; changed.
        exp_avg_sq: v, float32, the same shape; changed.
        remainder: int16, the same shape; changed. 0 where training begins.
        learning_rate: >= 0.
        betas: of the moments, 0 <= beta < 1.
        eps: >= 0.
        weight_decay: >= 0.
        step: t, the number of this step, from 1.
        impl: which implementation runs.
    """
    op = "adamw_step"
    given = {"parameter": parameter, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "remainder": remainder}
    low, high = torch.bfloat16, torch.float32
    for (name, tensor), dtype in zip(given.items(), (low, low, high, high, torch.int16), strict=True):
        _checks.dtype(op, name, tensor, dtype)
        _checks.same_shape(op, parameter.shape, "parameter", "pass what belongs to this parameter", **{name: tensor})
    device = _checks.same_device(op, **given)
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise ConfigError(f"{op}: step is {step!r}, wanted the number of this step, an int from 1")
    beta1, beta2 = _checks.pair(op, "betas", betas, least=0, below=1)
    learning_rate = _checks.number(op, "learning_rate", learning_rate, least=0)
    eps = _checks.number(op, "eps", eps, least=0)
    weight_decay = _checks.number(op, "weight_decay", weight_decay, least=0)
    tensors = parameter, grad, exp_avg, exp_avg_sq, remainder
    options = learning_rate, beta1, beta2, eps, weight_decay
    ADAMW_STEP(impl, device, AdamWArguments(*tensors, *options, step))


@torch.no_grad()
def _reference(a: AdamWArguments) -> None:
    master, gradient = join_master(a.parameter, a.remainder), a.grad.float()
    # torch's fused form assumes without a check that its tensors are contiguous.
    fused = all(
        x.is_contiguous() and x.device.type in ("cpu", "cuda") for x in (master, gradient, a.exp_avg, a.exp_avg_sq)
    )
    adamw(
        [master],
        [gradient],
        [a.exp_avg],
        [a.exp_avg_sq],
        max_exp_avg_sqs=[],
        state_steps=[torch.tensor(a.step - 1.0, device=master.device if fused else "cpu")],  # which torch increases
        fused=fused,
        amsgrad=False,
        beta1=a.beta1,
        beta2=a.beta2,
        lr=a.learning_rate,
        weight_decay=a.weight_decay,
        eps=a.eps,
        maximize=False,
    )
    split_master(master, a.parameter, a.remainder)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 whose upper half is nearly the weight's bits: nearly, as the remainder may be negative."""
    master = weight.float()
    master.view(torch.int32).add_(remainder)
    return master


def split_master(master: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """weight <- the bfloat16 nearest to master, of two the larger in magnitude; remainder <- the difference of their
    bits. The remainder of a NaN is 0: a number added to its bits could make it a number."""
    bits = torch.where(master.isnan(), torch.nan, master).view(torch.int32)
    remainder.copy_(bits)  # the lower 16 bits, as a number from -2^15 to 2^15 - 1 ...
    weight.copy_((bits - remainder).view(torch.float32))  # ... without which the upper 16 are the nearest bfloat16


ADAMW_STEP = Op(
    door=adamw_step,
    arguments=AdamWArguments,
    results=(),
    reference=_reference,
    fake=lambda arguments: None,
    changes=("parameter", "exp_avg", "exp_avg_sq", "remainder"),
    cpp=True,
    triton="tlcr.kernels.adamw",
)
