"""AdamW with float32 masters of low-precision parameters, and the learning-rate schedule.

The weights of a bfloat16 model have 8 significant bits: an update below 1/256 of a weight is rounded away, and with
the learning rates of RLHF (1e-6) nearly all are. So the optimiser keeps a float32 copy, updates that, and rounds it to
the model's dtype after each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

LOW_PRECISION = (torch.bfloat16, torch.float16)


def parameter_groups(model: nn.Module, *, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of ``model`` in two groups for ``build_optimizer``: with weight decay, and without.

    Matrices decay; biases, norms and embeddings do not (ours: decay would pull the vectors of words that the data lack
    to zero, with no evidence against them). A matrix tied to an embedding counts as an embedding.
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
    """AdamW (Loshchilov and Hutter 2019) over ``groups`` of {"params", "lr", "weight_decay"}.

    The betas are those of the released code. Where a parameter is bfloat16 or float16, ``MasterWeightAdamW``.
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

    step: master <- AdamW(master, float32(grad)); parameter <- round(master). Parameters of any other dtype are their
    own masters. ``state_dict`` has the layout of AdamW's, with one more entry, "master", for each such parameter.
    Learning rates are read from ``param_groups``, as schedulers expect.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._adamw: torch.optim.AdamW | None = None  # made at the first step: by then the model is on its device

    def _inner(self) -> torch.optim.AdamW:
        if self._adamw is None:
            groups = [{**group, "params": [self._master(p) for p in group["params"]]} for group in self.param_groups]
            masters = [m for group in groups for m in group["params"]]
            self._adamw = torch.optim.AdamW(groups, fused=_fused(masters))
        return self._adamw

    @staticmethod
    def _master(parameter: Tensor) -> Tensor:
        return parameter.detach().float() if parameter.dtype in LOW_PRECISION else parameter

    def _pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Each low-precision parameter with its master."""
        for group, inner_group in zip(self.param_groups, self._inner().param_groups, strict=True):
            for parameter, master in zip(group["params"], inner_group["params"], strict=True):
                if master is not parameter:
                    yield parameter, master

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        inner = self._inner()
        for group, inner_group in zip(self.param_groups, inner.param_groups, strict=True):
            inner_group.update({key: value for key, value in group.items() if key != "params"})
        for parameter, master in self._pairs():
            master.grad = None if parameter.grad is None else parameter.grad.float()
        inner.step()
        for parameter, master in self._pairs():
            parameter.copy_(master)
            master.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        outer = super().state_dict()
        if self._adamw is None:
            return outer
        state = {index: dict(entries) for index, entries in self._adamw.state_dict()["state"].items()}
        for index, _, master in self._indexed_pairs():
            state.setdefault(index, {})["master"] = master
        return {"state": state, "param_groups": outer["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self._adamw = None
        if not state_dict["state"]:
            return
        inner = self._inner()
        state = {index: dict(entries) for index, entries in state_dict["state"].items()}
        with torch.no_grad():
            for index, _, master in self._indexed_pairs():
                master.copy_(state[index].pop("master"))
        moments = {index: entries for index, entries in state.items() if entries}
        inner.load_state_dict({"state": moments, "param_groups": inner.state_dict()["param_groups"]})

    def _indexed_pairs(self) -> Iterable[tuple[int, Tensor, Tensor]]:
        """Each low-precision parameter and its master, with the index that ``state_dict`` gives them."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        index = {id(p): i for i, p in enumerate(parameters)}
        for parameter, master in self._pairs():
            yield index[id(parameter)], parameter, master


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients so that their joint 2-norm is at most ``max_norm``; returns the norm before, a scalar.

    The norm is taken in float32 (float64 for float64 gradients), which torch.nn.utils.clip_grad_norm_ does not do for
    bfloat16. NaN and infinity pass through to the norm: the caller decides. No gradient at all has the norm 0.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    if not with_grad:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(p.grad, dtype=_at_least_float32(p.grad)) for p in with_grad]  # type: ignore[arg-type]
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
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
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        x = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return {"cosine": 0.5 * (1.0 + math.cos(math.pi * x)), "linear": 1.0 - x, "constant": 1.0}[schedule]

    return LambdaLR(optimizer, factor)
