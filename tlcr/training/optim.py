"""AdamW with float32 masters of low-precision parameters, and the learning-rate schedule.

The weights of a bfloat16 model have 8 significant bits: an update below 1/256 of a weight is rounded away, and with
the learning rates of RLHF (1e-6) nearly all are. So the optimiser keeps the missing bits of a float32 for each weight,
updates that float32, and rounds it to the model's dtype after each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR

from tlcr import ops
from tlcr.errors import CheckpointError

LOW_PRECISION = (torch.bfloat16, torch.float16)


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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter] or self._begin(parameter)
        state["step"] += 1
        assert parameter.grad is not None
        tensors: dict[str, Tensor] = {"parameter": parameter.detach(), "grad": parameter.grad, **state}
        step = tensors.pop("step")
        pieces = {name: _pieces(tensor) for name, tensor in tensors.items()}
        for values in zip(*pieces.values(), strict=True):
            piece = dict(zip(pieces, values, strict=True))
            if "remainder" in piece:
                ops.adamw_step(
                    **piece,
                    learning_rate=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=int(step),
                )
            else:
                _step_of_torch(piece, step, group)

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        low = parameter.dtype in LOW_PRECISION
        dtype = torch.float32 if low else parameter.dtype
        state["step"] = torch.zeros((), device=_home("step", parameter))
        state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
        if parameter.dtype == torch.bfloat16:
            state["remainder"] = torch.zeros_like(parameter, dtype=torch.int16)
        elif low:
            state["master"] = parameter.detach().float()
        return state

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
            self.state[parameter] = {name: value.to(_home(name, parameter), copy=True) for name, value in state.items()}


def _home(name: str, parameter: Tensor) -> torch.device:
    """The device of a state. ops.adamw_step takes the step as a number; to read it from a GPU would be a wait."""
    return torch.device("cpu") if name == "step" and parameter.dtype == torch.bfloat16 else parameter.device


def _step_of_torch(piece: dict[str, Tensor], step: Tensor, group: dict[str, Any]) -> None:
    """AdamW on a stored master, or on a parameter without one."""
    master = piece.get("master", piece["parameter"])
    adamw(
        [master],
        [piece["grad"].to(master.dtype)],
        [piece["exp_avg"]],
        [piece["exp_avg_sq"]],
        max_exp_avg_sqs=[],
        state_steps=[step - 1],  # which torch increases
        fused=_fused([master]),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    if master is not piece["parameter"]:
        piece["parameter"].copy_(master)


# Elements of a piece: enough for all cores. A float32 copy of a whole embedding would be the largest tensor of all.
PIECE = 1 << 22


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Views of parts of `tensor`; on a GPU the whole tensor, because many small kernels would be slow."""
    tensor = torch.atleast_1d(tensor)
    if tensor.device.type != "cpu" or tensor.numel() <= PIECE:
        return [tensor]
    return tensor.split(max(1, PIECE * tensor.shape[0] // tensor.numel()))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients so that their joint 2-norm is at most ``max_norm``.

    The norm is taken in float32 (float64 for float64 gradients), which ``torch.nn.utils.clip_grad_norm_`` does not do
    for bfloat16. NaN and infinity pass through to the norm: the caller decides.

    Args:
        parameters: whose gradients.
        max_norm: the largest norm allowed.

    Returns:
        The norm before, a scalar; 0 where there is no gradient at all.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    if not with_grad:
        return torch.zeros(())
    pieces = [piece for p in with_grad for piece in _pieces(p.grad)]  # type: ignore[arg-type]
    norms = [torch.linalg.vector_norm(piece, dtype=_at_least_float32(piece)) for piece in pieces]
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    # No test whether scaling is needed: it would wait for the GPU.
    if norm.device.type != "cpu" or not norm <= max_norm:
        torch.nn.utils.clip_grads_with_norm_(with_grad, max_norm, norm)
    return norm


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    *,
    schedule: Literal["cosine", "linear", "constant"],
    total_steps: int,
    warmup_steps: int,
) -> LambdaLR:
    """The learning rate of each group is its own, times a factor that depends on the step s = 0 .. total_steps - 1.

    For s < warmup_steps the factor is (s + 1) / (warmup_steps + 1). Then, with
    x = (s - warmup_steps) / (total_steps - warmup_steps): cosine (1 + cos(pi x)) / 2, linear 1 - x, constant 1.
    No step is taken at rate 0 (ours; transformers' schedules start there, which wastes the only step of a short run).

    Args:
        optimizer: whose learning rates.
        schedule: "cosine", "linear" or "constant".
        total_steps: steps of the whole training.
        warmup_steps: steps until the full rate.

    Returns:
        The schedule.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        x = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return {"cosine": 0.5 * (1.0 + math.cos(math.pi * x)), "linear": 1.0 - x, "constant": 1.0}[schedule]

    return LambdaLR(optimizer, factor)
