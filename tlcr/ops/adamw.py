"""`adamw_step`: AdamW over the bfloat16 weights of a model with split float32 masters."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tlcr.errors import ConfigError, ShapeError
from tlcr.ops import _checks
from tlcr.ops._autograd import count_change
from tlcr.ops._spec import Impl, Op


class AdamWArguments(NamedTuple):
    parameters: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    remainders: list[Tensor]
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


LISTS = ("parameters", "grads", "exp_avgs", "exp_avg_sqs", "remainders")
DTYPES = (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.int16)


def adamw_step(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    remainders: Sequence[Tensor],
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
    second copy of it is kept. In place, in float32, with g = grad, t = step, rate = learning_rate, for each tensor:

        m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
        master <- (1 - rate weight_decay) master - rate m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        parameter, remainder <- master

    Each list has one tensor for each parameter. All tensors that are contiguous are updated together: by one launch on
    a GPU, by one loop that all threads share on a CPU. Any other goes alone, by way of copies. A weight's result is the
    same, to the last bit, whatever else is in the lists.
    Source: Loshchilov and Hutter 2019, arXiv:1711.05101; the split master is ours.

    Args:
        parameters: bfloat16, any shapes; changed.
        grads: bfloat16, the same shapes.
        exp_avgs: m, float32, the same shapes; changed.
        exp_avg_sqs: v, float32, the same shapes; changed.
        remainders: int16, the same shapes; changed. 0 where training begins.
        learning_rate: >= 0.
        betas: of the moments, 0 <= beta < 1.
        eps: >= 0.
        weight_decay: >= 0.
        step: t, the number of this step, from 1.
        impl: which implementation runs.

    Raises:
        ShapeError: the lists differ in length, shapes or device, have another dtype, or a tensor that would be changed
            shares memory with another.
        ConfigError: a number is out of its range.
    """
    op = "adamw_step"
    lists = [list(tensors) for tensors in (parameters, grads, exp_avgs, exp_avg_sqs, remainders)]
    device = _check_lists(op, lists)
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise ConfigError(f"{op}: step is {step!r}, wanted the number of this step, an int from 1")
    beta1, beta2 = _checks.pair(op, "betas", betas, least=0, below=1)
    learning_rate = _checks.number(op, "learning_rate", learning_rate, least=0)
    eps = _checks.number(op, "eps", eps, least=0)
    weight_decay = _checks.number(op, "weight_decay", weight_decay, least=0)
    if not lists[0]:
        return
    arguments = AdamWArguments._make([*lists, learning_rate, beta1, beta2, eps, weight_decay, step])
    ADAMW_STEP(impl, device, arguments)


def _check_lists(op: str, lists: Sequence[list[Tensor]]) -> torch.device:
    """Each tensor must be what belongs to its parameter; returns the device of them all."""
    parameters = lists[0]
    for name, tensors in zip(LISTS, lists, strict=True):
        if len(tensors) != len(parameters):
            raise ShapeError(
                f"{op}: {name} has {len(tensors)} tensors, wanted {len(parameters)}, one for each of parameters"
            )
    if not parameters:
        return torch.device("cpu")
    given = [tensor for tensors in lists for tensor in tensors]
    dtypes = [dtype for dtype in DTYPES for _ in parameters]
    # A model has hundreds of tensors, whose names are not made where all is right.
    if not all(isinstance(tensor, Tensor) for tensor in given):
        _explain(op, lists)
    shapes, device = [tensor.shape for tensor in parameters], parameters[0].device
    if (
        [tensor.dtype for tensor in given] != dtypes
        or [tensor.shape for tensor in given] != shapes * len(LISTS)
        or any(tensor.device != device or tensor.layout is not torch.strided for tensor in given)
    ):
        _explain(op, lists)
    if _checks.has_memory(parameters[0]):
        _check_memory(op, given)
    return device


def _explain(op: str, lists: Sequence[list[Tensor]]) -> None:
    """Raises the error of what is wrong."""
    for i, tensors in enumerate(zip(*lists, strict=True)):
        named = {f"{name}[{i}]": tensor for name, tensor in zip(LISTS, tensors, strict=True)}
        for (name, tensor), dtype in zip(named.items(), DTYPES, strict=True):
            _checks.dtype(op, name, tensor, dtype)
            like = f"parameters[{i}]"
            _checks.same_shape(op, tensors[0].shape, like, "pass what belongs to this parameter", **{name: tensor})
        _checks.same_device(op, **({"parameters[0]": lists[0][0]} | named))
    raise AssertionError("one of the checks fails")


def _check_memory(op: str, given: list[Tensor]) -> None:
    """No tensor that is changed may share memory with another: both would be updated at the same time.

    Of a tensor with gaps, which goes alone, only the first element counts: others may lie in its gaps.
    """
    count = len(given) // len(LISTS)
    elements = np.array([tensor.numel() if tensor.is_contiguous() else 1 for tensor in given])
    begins = np.where(elements > 0, [tensor.data_ptr() for tensor in given], 0)
    sizes = elements * np.repeat([dtype.itemsize for dtype in DTYPES], count)
    ends, is_changed = begins + sizes, np.repeat([name != "grads" for name in LISTS], count)
    order = np.argsort(begins, kind="stable")
    # Of those that begin before, the last end: for a gradient, which may share memory with gradients, of the others.
    reach, reach_of_changed = (np.maximum.accumulate(x[order[:-1]]) for x in (ends, np.where(is_changed, ends, 0)))
    overlaps = begins[order[1:]] < np.where(is_changed[order[1:]], reach, reach_of_changed)
    if not overlaps.any():
        return
    second = order[1:][overlaps].min()
    before = order[: order.tolist().index(second)]
    first = next(i for i in before if ends[i] > begins[second] and (is_changed[i] or is_changed[second]))
    names = [f"{LISTS[i // count]}[{i % count}]" for i in sorted((first, second))]
    raise ShapeError(
        f"{op}: {names[0]} and {names[1]} share memory, wanted memory of its own for every tensor that is changed; "
        "pass each parameter once, with a state of its own"
    )


@torch.no_grad()
def _reference(a: AdamWArguments) -> None:
    for parameter, grad, exp_avg, exp_avg_sq, remainder in zip(*a[: len(LISTS)], strict=True):
        master, gradient = join_master(parameter, remainder), grad.float()
        # torch's fused form takes for granted that its tensors are contiguous. On a GPU it is another formula: there,
        # a step at rate 0 makes NaN of an infinite weight.
        fused = all(x.is_contiguous() and x.device.type == "cpu" for x in (master, gradient, exp_avg, exp_avg_sq))
        adamw(
            [master],
            [gradient],
            [exp_avg],
            [exp_avg_sq],
            max_exp_avg_sqs=[],
            state_steps=[torch.tensor(a.step - 1.0)],  # which torch increases
            fused=fused,
            foreach=False,
            amsgrad=False,
            beta1=a.beta1,
            beta2=a.beta2,
            lr=a.learning_rate,
            weight_decay=a.weight_decay,
            eps=a.eps,
            maximize=False,
        )
        count_change((exp_avg, exp_avg_sq))  # torch's fused form does not
        split_master(master, parameter, remainder)


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
    changes=("parameters", "exp_avgs", "exp_avg_sqs", "remainders"),
    cpp=True,
    triton="tlcr.kernels.adamw",
)
