"""What a step of training allocates, found by taking it with tensors that have a shape and no memory.

torch's fake tensors run the real code of a model, forward and backward, and compute nothing. Every allocation is
counted when it is made and when it is freed, so the peak is that of the model's own architecture, attention and
checkpointing, and no formula of activations is needed. The code is that of this process's CPU, or what a GPU would run
(``for_gpu``): there transformers' own layers and torch's fused attention. Sharded models are sharded here too, among
processes that exist in name only, so that what is gathered, reduced and freed is counted where it happens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForTokenClassification, DynamicCache, PreTrainedModel

from tlcr.config.schema import Adapted, LoRAConfig, ModelConfig
from tlcr.experiment.allocations import Allocations
from tlcr.models import classifiers, inspection
from tlcr.models.actor_critic import ActorCritic
from tlcr.models.attention import NAME as FOR_CPUS
from tlcr.models.discriminator import classify
from tlcr.models.heads import backbone, classification_head, use_float32_head
from tlcr.models.logits import answer_logprobs
from tlcr.models.lora.adapters import add_adapter
from tlcr.models.lora.roles import Roles
from tlcr.models.packing import Packing
from tlcr.models.preparing import prepared
from tlcr.training.sharding import (
    REPLICATE,
    SHARD,
    Sharding,
    as_forward,
    gathered,
    local,
    shard,
    shard_all,
    shard_model,
)

__all__ = ["Simulator", "Step", "forward", "held_of_shards", "processes_in_name"]


@dataclass(frozen=True)
class Step:
    """One forward pass, and perhaps its backward pass.

    kind: "language model" (the log-probabilities of the last ``answer`` tokens), "token classifier", "sequence
    classifier", "policy and values" (of the last ``answer`` tokens); in sampling "prompt", which fills the cache, and
        "next token", the last one of the answers.
    rows, columns: the rectangle of tokens.
    stage: who trains it, a role of lora.roles; of a token classifier always the discriminator.
    trains: with the backward pass.
    again: gradients of an earlier micro-batch are there, so a parameter's gradient exists twice for a moment.
    reference: also the exact KL to a reference.
    packed: the rows stand end to end in one, without an attention mask.
    """

    kind: str
    rows: int
    columns: int
    stage: Adapted = "sft"
    answer: int = 1
    outputs: int = 1
    trains: bool = True
    again: bool = False
    reference: bool = False
    packed: bool = False
    shared_values: bool = False
    chunk_tokens: int | None = None


class Simulator:
    """Peaks of steps of one architecture; each step is taken once.

    Args:
        model: the causal language model, on the meta device.
        cfg: its dtype, attention and gradient checkpointing.
        for_gpu: as a GPU would run it.
        shards: how many processes share a model, after how many groups of them there are where these are several; None:
            each process has whole models.
        reduce_dtype: in which gradients of shards are summed.
        lora: which models are trained by adapters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cfg: ModelConfig,
        *,
        for_gpu: bool,
        shards: tuple[int, ...] | None = None,
        reduce_dtype: str = "float32",
        lora: LoRAConfig | None = None,
    ) -> None:
        self._model, self._cfg, self._for_gpu = model, cfg, for_gpu
        self._shards, self._reduce_dtype = shards, getattr(torch, reduce_dtype)
        self._lora = LoRAConfig() if lora is None else lora
        self._peaks: dict[Step, int] = {}

    def peak(self, step: Step) -> int:
        """The most bytes that are allocated at once beyond weights, and beyond gradients where ``step.again``.

        Gradients that the step itself makes are among them. Of sharded models the weights are this process's shards,
        and what is gathered of the others counts.
        """
        if step not in self._peaks:
            modules = self._modules(step)
            with processes_in_name(self._shards, self._reduce_dtype) as sharding, FakeTensorMode():
                self._peaks[step] = _peak(step, modules, sharding, for_gpu=self._for_gpu)
        return self._peaks[step]

    # ---- models on the meta device, as they would be trained

    def _modules(self, step: Step) -> list[nn.Module]:
        """What runs the step, and a reference. Of sharded models the policy is sampled from as a part of its root."""
        if step.kind in ("token classifier", "sequence classifier"):
            classifier = self._classifier(step.outputs)
            return [self._adapted(classifier, "discriminator" if step.kind == "token classifier" else step.stage)]
        policy = self._as_trained(self._model)
        if step.kind == "language model":
            return [self._adapted(policy, step.stage)]
        if step.kind in SAMPLING and self._shards is None:
            return [policy]
        reference, value_model = None, None
        if self._lora.trains("policy"):
            roles = Roles(policy, self._lora, seed=0)
            reference = roles.reference
            if self._lora.trains("value") and not step.shared_values:
                value_model = roles.classifier("value", {0: "value"})
        if value_model is None and not step.shared_values:
            value_model = self._classifier(1)
        actor_critic = ActorCritic(policy, value_model, chunk_tokens=step.chunk_tokens)
        if not step.reference:
            return [actor_critic]
        return [actor_critic, reference or self._as_trained(self._model).requires_grad_(False)]

    def _adapted(self, model: PreTrainedModel, name: Adapted) -> PreTrainedModel:
        if self._lora.trains(name):
            add_adapter(model, self._lora, name, seed=0)
        return model

    def _classifier(self, outputs: int) -> PreTrainedModel:
        config = deepcopy(self._model.config)
        config.num_labels = outputs
        kind = classifiers.new_class(AutoModelForTokenClassification, self._model, config)
        with torch.device("meta"):
            classifier = kind(config)
        return self._as_trained(classifier, head=True)

    def _as_trained(self, meta: PreTrainedModel, *, head: bool = False) -> PreTrainedModel:
        model: PreTrainedModel = deepcopy(meta).to(getattr(torch, self._cfg.dtype))
        attention = inspection.attention_for(self._cfg, type(model), deepcopy(model.config))
        model.set_attn_implementation("sdpa" if self._for_gpu and attention == FOR_CPUS else attention)
        if head:
            use_float32_head(model)
        return prepared(model, self._cfg, device=torch.device("cuda" if self._for_gpu else "cpu"))


SAMPLING = ("prompt", "next token")
SUPERVISED = ("language model", "token classifier", "sequence classifier")


def _is_supervised(step: Step) -> bool:
    """Whether a supervised stage takes it, whose loss calls any part of its model."""
    return step.trains and step.kind in SUPERVISED


def _peak(step: Step, modules: Sequence[Any], sharding: Sharding | None, *, for_gpu: bool) -> int:
    """Called with fake tensors on: whatever is made has no memory."""
    for module in modules:
        _give_device(module.train(step.trains))
        if _is_supervised(step):
            shard_model(module, sharding)
    if not _is_supervised(step):
        shard_all(modules, sharding)
    for module in modules:
        for parameter in module.parameters() if step.again else ():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    known = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    known += [tensor.grad for tensor in known if tensor.grad is not None]
    run = forward(step, *modules)
    with torch.set_grad_enabled(step.trains), Allocations(map(local, known), on_cpu=not for_gpu) as allocations:
        outputs = run()
        if step.trains:
            torch.stack([output.double().sum() for output in outputs]).sum().backward()
    return allocations.peak


@contextmanager
def processes_in_name(shards: tuple[int, ...] | None, reduce_dtype: torch.dtype) -> Iterator[Sharding | None]:
    """The sharding of this process among others that do not exist: their part of every exchange is never there."""
    if shards is None:
        yield None
        return
    dist.init_process_group("fake", rank=0, world_size=math.prod(shards), store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", shards, mesh_dim_names=(REPLICATE, SHARD)[-len(shards) :])
        yield Sharding(mesh, reduce_dtype, offload=False)
    finally:
        dist.destroy_process_group()


def held_of_shards(model: PreTrainedModel, shards: tuple[int, ...], reduce_dtype: torch.dtype) -> tuple[int, int]:
    """Cuts a model on the meta device as ``shards`` has it.

    Args:
        model: it stays as it is.
        shards: as for ``Simulator``.
        reduce_dtype: in which gradients are summed.

    Returns:
        The bytes that the first process holds of its parameters, and the number of units that are gathered one by one.
    """
    cut = deepcopy(model)
    with processes_in_name(shards, reduce_dtype) as sharding, FakeTensorMode():
        _give_device(cut)
        shard(cut, sharding)
        held = sum(local(parameter).nbytes for parameter in cut.parameters())
    return held, sum(isinstance(module, FSDPModule) for module in cut.modules())


def forward(step: Step, model: Any, reference: PreTrainedModel | None = None) -> Callable[[], list[Tensor]]:
    """What runs a step forward, and returns what has a gradient."""
    ids_BL = torch.zeros((step.rows, step.columns), dtype=torch.long)
    mask_BL = torch.ones((step.rows, step.columns), dtype=torch.bool)
    actions_N = torch.ones(step.rows * step.answer, dtype=torch.long)
    if step.kind in SAMPLING:
        return _sampling(step, model, ids_BL, mask_BL)

    def run() -> Sequence[Tensor | None]:
        if step.kind == "language model":
            return [answer_logprobs(model, ids_BL, mask_BL, step.answer)]
        if step.kind == "token classifier":
            with nullcontext() if step.trains else gathered(model):  # as who asks a reward source does
                return [classify(model, ids_BL, mask_BL)]
        if step.kind == "sequence classifier":
            inputs = {"input_ids": ids_BL, "attention_mask": mask_BL.long(), "use_cache": False}
            return [classification_head(model)(backbone(model)(**inputs).last_hidden_state[:, -1])]
        if step.packed:
            return model(ids_BL.view(1, -1), _packing(step), actions_N, temperature=1.0, reference=reference)
        return model(ids_BL, mask_BL, actions_N, temperature=1.0, reference=reference)

    def in_forward() -> Sequence[Tensor | None]:
        return as_forward(model, lambda: tuple(run())) if _is_supervised(step) else run()

    return lambda: [o for o in in_forward() if o is not None and (o.requires_grad or not step.trains)]


def _packing(step: Step) -> Packing:
    """Rows of full length; not ``Packing.of``, whose tensors come from numpy and have memory."""
    positions_1L = torch.arange(step.columns).repeat(step.rows).unsqueeze(0)
    return Packing(positions_1L, torch.arange(step.rows + 1, dtype=torch.int32) * step.columns, step.columns)


def _give_device(model: nn.Module) -> None:
    """Replaces tensors on the meta device by fake ones on the CPU, tied ones by one."""
    made: dict[Tensor, Tensor] = {}

    def made_for(tensor: Tensor) -> Tensor:
        if tensor not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            made[tensor] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return made[tensor]

    for module in model.modules():
        own: Sequence[Mapping[str, Tensor | None]] = (module._parameters, module._buffers)
        for tensors in own:
            for name, tensor in list(tensors.items()):
                if tensor is not None and tensor.is_meta:
                    setattr(module, name, made_for(tensor))


def _sampling(step: Step, root: Any, ids_BL: Tensor, mask_BL: Tensor) -> Callable[[], list[Tensor]]:
    policy = getattr(root, "policy", root)

    def run() -> list[Tensor]:
        with gathered(root, only=policy):
            if step.kind == "next token":
                return [_next_token(policy, ids_BL, _full_cache(policy, step))]
            inputs = {"input_ids": ids_BL, "attention_mask": mask_BL.long()}
            return [policy(**inputs, use_cache=True, logits_to_keep=1).logits]

    return run


def _full_cache(policy: PreTrainedModel, step: Step) -> DynamicCache:
    """Keys and values of all columns but the last."""
    config = policy.config.get_text_config()
    cache = DynamicCache(config=policy.config)
    for layer in range(config.num_hidden_layers):
        shape = (step.rows, _key_value_heads(config), step.columns - 1, _head_width(config))
        cache.update(torch.empty(shape, dtype=policy.dtype), torch.empty(shape, dtype=policy.dtype), layer)
    return cache


def _next_token(policy: PreTrainedModel, ids_BL: Tensor, cache: DynamicCache | None) -> Tensor:
    """The last token of answers that are sampled: one forward pass and one draw."""
    # transformers renamed the argument, and warns of the old name
    name = "cache" if "cache" in signature(type(policy).forward).parameters else "past_key_values"
    output = policy(input_ids=ids_BL[:, -1:], attention_mask=torch.ones_like(ids_BL), use_cache=True, **{name: cache})
    logits_BV = output.logits[:, -1].to(copy=True, dtype=torch.float32)
    return torch.multinomial((logits_BV / 1.0).softmax(dim=-1), 1)


def _key_value_heads(config: Any) -> int:
    """Heads of keys and values in one layer of a model of that config."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _head_width(config: Any) -> int:
    """Values of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
