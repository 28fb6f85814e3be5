"""AdamW with float32 masters of low-precision parameters, and the learning-rate schedule.

The weights of a bfloat16 model have 8 significant bits: an update below 1/256 of a weight is rounded away, and with
the learning rates of RLHF (1e-6) nearly all are. So the optimiser keeps the missing bits of a float32 for each weight,
updates that float32, and rounds it to the model's dtype after each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR

from tlcr import ops
from tlcr.errors import CheckpointError
from tlcr.training.sharding import local, norm_over_shards

LOW_PRECISION = (torch.bfloat16, torch.float16)
MASTERS = {"remainder", "master"}
"""The states that hold what rounding took from a weight."""


def parameter_groups(model: nn.Module, *, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of ``model`` in two groups for ``build_optimizer``: with weight decay, and without.

    Matrices decay; biases, norms and embeddings do not (ours: decay would shrink the vectors of words that are absent
    from the data). A matrix tied to an embedding counts as an embedding.

    Args:
        model: whose parameters.
        learning_rate: of both groups.
        weight_decay: of the first.

    Returns:
        Two groups of {"params", "lr", "weight_decay"}.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter.ndim >= 2 and id(parameter) not in embeddings].append(parameter)
    return [
        {"params": params, "lr": learning_rate, "weight_decay": weight_decay if decays else 0.0}
        for decays, params in groups.items()
        if params
    ]


def build_optimizer(
    groups: Sequence[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019); ``MasterWeightAdamW`` where a parameter is bfloat16 or float16.

    Args:
        groups: {"params", "lr", "weight_decay"} each.
        betas: decay of both moments, by default those of the released code.
        eps: added to the root of the second moment.

    Returns:
        The optimiser.
    """
    groups = [{**group, "params": list(group["params"])} for group in groups]
    parameters = [p for group in groups for p in group["params"]]
    if any(p.dtype in LOW_PRECISION for p in parameters):
        return MasterWeightAdamW(groups, betas=betas, eps=eps)
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=_fused(parameters))


def _fused(parameters: Iterable[Tensor]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


class MasterWeightAdamW(torch.optim.Optimizer):
    """AdamW whose moments and weights are float32 where the model's parameters are bfloat16 or float16.

    step: master <- AdamW(master, float32(grad)); parameter <- round(master). Parameters of any other dtype are
    updated directly. Moments are in ``state`` under AdamW's names. Learning rates are read from ``param_groups``, as
    schedulers expect.

    The master of a bfloat16 parameter is not stored a second time: bfloat16 is the upper half of a float32, so the
    lower half (``state[p]["remainder"]``, int16) restores it bit for bit, in 2 bytes instead of 4. float16 has another
    exponent range, so a float32 is stored (``state[p]["master"]``).

    A sharded parameter's states are sharded as it is. Each process updates its own part: nothing is communicated.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            split: _States = []
            stored: _States = []
            direct: _States = []
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if "step" not in state:
                        self._begin(parameter, state)
                    form = split if "remainder" in state else stored if "master" in state else direct
                    own = {name: local(value) for name, value in state.items()}
                    form.append((local(parameter), local(parameter.grad), own))
            for step, states in ((_step_split, split), (_step_stored, stored), (_step_directly, direct)):
                if states:
                    step(states, group)
        return loss

    def _begin(self, parameter: Tensor, state: dict[str, Tensor]) -> None:
        low = parameter.dtype in LOW_PRECISION
        dtype = torch.float32 if low else parameter.dtype
        state["step"] = torch.zeros((), device=_home("step", parameter))
        state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
        if state.keys() & MASTERS:  # of a training before this one
            return
        if parameter.dtype == torch.bfloat16:
            state["remainder"] = torch.zeros_like(parameter, dtype=torch.int16)
        elif low:
            state["master"] = parameter.detach().float()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Unlike torch's, leaves every state in the dtype it was saved in: the moments would become bfloat16."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, state in state_dict["state"].items():
            parameter = parameters[index]
            if "remainder" in state and parameter.dtype != torch.bfloat16:
                raise CheckpointError(
                    f"the saved optimiser holds half a master for a parameter of shape {tuple(parameter.shape)} that "
                    f"was bfloat16 and is {parameter.dtype} now; resume with the tlcr and model.dtype that began this "
                    "run, or begin it again"
                )
            if parameter.dtype in LOW_PRECISION and state and not state.keys() & MASTERS:
                raise CheckpointError(
                    f"the saved optimiser holds no master for a parameter of shape {tuple(parameter.shape)} that is "
                    f"{parameter.dtype} now; resume with the model.dtype that began this run, or begin it again"
                )
            self.state[parameter] = {name: value.to(_home(name, parameter), copy=True) for name, value in state.items()}


def begin_again(optimizer: torch.optim.Optimizer) -> None:
    """Takes AdamW back to before its first step. What rounding took from a weight of 16 bits is kept: trainings of a
    few small steps each would else lose nearly all of theirs (ours).

    Args:
        optimizer: one of ``build_optimizer``.
    """
    for state in optimizer.state.values():
        for name in state.keys() - MASTERS:
            del state[name]


def state_bytes(parameter: Tensor) -> int:
    """The bytes that the optimiser of ``build_optimizer`` keeps for a parameter, on all processes that share it."""
    return parameter.numel() * 2 * max(parameter.element_size(), 4) + master_bytes(parameter)


def master_bytes(parameter: Tensor) -> int:
    """Those of them that ``begin_again`` leaves."""
    return parameter.numel() * {torch.bfloat16: 2, torch.float16: 4}.get(parameter.dtype, 0)


def _home(name: str, parameter: Tensor) -> torch.device:
    """The device of a state. ops.adamw_step takes the step as a number; to read it from a GPU would be a wait."""
    return torch.device("cpu") if name == "step" and parameter.dtype == torch.bfloat16 else parameter.device


_States = list[tuple[Tensor, Tensor, dict[str, Tensor]]]
"""This process's parts of a group's parameters, of their gradients and of their states."""


def _step_split(states: _States, group: dict[str, Any]) -> None:
    """bfloat16 parameters: those of one device together, which have all taken as many steps, but for the rare one that
    had no gradient in some."""
    steps = [state["step"] for *_, state in states]
    torch._foreach_add_(steps, 1)
    together: dict[tuple[torch.device, float], list[tuple[Tensor, ...]]] = {}
    for (parameter, grad, state), step in zip(states, torch.stack(steps).tolist(), strict=True):
        tensors = parameter, grad, state["exp_avg"], state["exp_avg_sq"], state["remainder"]
        together.setdefault((parameter.device, step), []).extend(_pieces(*tensors))
    for (_, step), rows in together.items():
        ops.adamw_step(
            *zip(*rows, strict=True),
            learning_rate=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=int(step),
        )


def _step_stored(states: _States, group: dict[str, Any]) -> None:
    """float16 parameters, one by one: their gradients are needed as float32, and all at once would be as much memory
    as the masters."""
    for parameter, grad, state in states:
        tensors = parameter, grad, state["master"], state["exp_avg"], state["exp_avg_sq"]
        for weights, gradient, master, mean, square in _pieces(*tensors):
            _step_of_torch([master], [gradient.float()], [mean], [square], [state["step"].clone()], group)
            weights.copy_(master)
        state["step"] += 1


def _step_directly(states: _States, group: dict[str, Any]) -> None:
    """Parameters that need no masters, all at once."""
    parameters: list[Tensor] = [parameter for parameter, *_ in states]
    grads = [grad for _, grad, _ in states]
    means, squares, steps = ([state[name] for *_, state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    _step_of_torch(parameters, grads, means, squares, steps, group)


def _step_of_torch(
    parameters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    group: dict[str, Any],
) -> None:
    """AdamW on parameters that are their own masters, or on masters; `steps` are increased."""
    # On a CPU, torch's fused form takes for granted that its tensors are contiguous.
    tensors = [*parameters, *grads, *exp_avgs, *exp_avg_sqs]
    adamw(
        parameters,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs=[],
        state_steps=steps,
        fused=_fused(parameters) and all(t.is_cuda or t.is_contiguous() for t in tensors),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


# Elements of a piece: enough for all cores. A float32 copy of a whole embedding would be the largest tensor of all.
PIECE = 1 << 22


def _pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Views of the same parts of tensors of one shape; on a GPU the whole tensors, because many small kernels would be
    slow."""
    first = tensors[0]
    if first.numel() <= PIECE or first.device.type != "cpu":
        return [tensors]
    rows = max(1, PIECE * first.shape[0] // first.numel())
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _gradients(parameters: Iterable[nn.Parameter]) -> dict[torch.dtype, list[Tensor]]:
    """This process's parts of all gradients by dtype: torch takes a list at once, in few launches on a GPU, where it
    is of one dtype."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            found.setdefault(parameter.grad.dtype, []).append(local(parameter.grad))
    return found


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The joint 2-norm of all gradients, in float32 (float64 for float64 gradients).

    ``torch.nn.utils.get_total_norm`` rounds the norm of each bfloat16 gradient to bfloat16. NaN and infinity pass
    through to the norm: the caller decides. Nothing waits for a GPU.

    Where the parameters are sharded, all of them are, and every process calls it: the parts' square sums are added.

    Args:
        parameters: whose gradients.

    Returns:
        The norm, a scalar; 0 where there is no gradient at all.
    """
    parameters = list(parameters)
    norms: list[Tensor] = []
    for dtype, grads in _gradients(parameters).items():
        pieces = [piece for grad in grads for (piece,) in _pieces(grad)]
        norms += torch._foreach_norm(pieces, 2, torch.promote_types(dtype, torch.float32))
    if not norms:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return norm_over_shards(norm, parameters[0])


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float, max_norm: float) -> None:
    """Multiplies all gradients by max_norm / (norm + 1e-6), as torch does, where their norm is above ``max_norm``.

    Args:
        parameters: whose gradients.
        norm: their ``gradient_norm``, on the host: gradients that are short enough are not touched.
        max_norm: the largest norm allowed.
    """
    if not norm > max_norm:
        return
    for dtype, grads in _gradients(parameters).items():
        # A number: by a tensor on the GPU, torch would multiply bfloat16 gradients one by one.
        known = torch.tensor(norm, dtype=torch.promote_types(dtype, torch.float32))
        torch._foreach_mul_(grads, (max_norm / (known + 1e-6)).item())


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiplies all gradients by a number.

    Args:
        parameters: whose gradients.
        factor: the number.
    """
    for grads in _gradients(parameters).values():
        torch._foreach_mul_(grads, factor)


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    *,
    schedule: Literal["cosine", "linear", "constant"],
    total_steps: int,
    warmup_steps: int,
    first_step: int = 0,
    warming_groups: int | None = None,
) -> LambdaLR:
    """The learning rate of each group is its own, times a factor that depends on the step s = 0 .. total_steps - 1.

    For s < first_step + warmup_steps the factor is (max(s - first_step, 0) + 1) / (warmup_steps + 1). Then, with
    w = first_step + warmup_steps (0 without a warm-up) and x = (s - w) / (total_steps - w): cosine
    (1 + cos(pi x)) / 2, linear 1 - x, constant 1.
    No step is taken at rate 0 (ours; transformers' schedules start there, which wastes the only step of a short run).

    Args:
        optimizer: whose learning rates.
        schedule: "cosine", "linear" or "constant".
        total_steps: steps of the whole training.
        warmup_steps: steps until the full rate.
        first_step: the first step that trains the groups that warm up.
        warming_groups: how many groups warm up, the first ones; the others have their full rate at once. None: all.

    Returns:
        The schedule.
    """

    def factor(step: int, warmup: int) -> float:
        began = first_step + warmup if warmup else 0
        if step < began:
            return (max(step - first_step, 0) + 1) / (warmup + 1)
        x = min((step - began) / max(total_steps - began, 1), 1.0)
        return {"cosine": 0.5 * (1.0 + math.cos(math.pi * x)), "linear": 1.0 - x, "constant": 1.0}[schedule]

    groups = len(optimizer.param_groups)
    warming = groups if warming_groups is None else warming_groups
    return LambdaLR(optimizer, [partial(factor, warmup=warmup_steps if g < warming else 0) for g in range(groups)])
