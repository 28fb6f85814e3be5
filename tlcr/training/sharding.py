"""Parameters cut into shards, one for each process, by torch's ``fully_shard`` (FSDP2).

Each decoder layer is a unit: its parameters are gathered before its forward pass and freed after it, and its gradients
are summed into shards in the backward pass. Everything else (embeddings, norms, heads) belongs to the root, the module
that is called. One rule holds for all code that meets a sharded module: a parameter is read inside a forward pass of
its root, equally often on every process, or inside ``gathered``.

Every function here takes a module that is not sharded too, and then does nothing.
"""

from __future__ import annotations

import logging
import types
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, TypeVar, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from tlcr.config.schema import ShardingConfig
from tlcr.errors import ConfigError
from tlcr.training.distributed import on_all_processes, process_count, process_device
from tlcr.training.launcher import processes_of_a_node, requested_sharding

logger = logging.getLogger(__name__)

T = TypeVar("T")
SHARD, REPLICATE = "shard", "replicate"
"""Names of the mesh's dimensions: over the first a model is cut, over the second it is repeated."""
ROOT, INSIDE, FILL, CHECKS = "_tlcr_root", "_tlcr_inside", "_tlcr_fill", "_tlcr_checks"
"""What a module remembers: the root around it, whether that is in ``as_forward``, and what was left to do until it is
cut (``fill_when_cut``, ``check_when_cut``)."""


@dataclass(frozen=True)
class Sharding:
    """How models are cut: the processes that share one, the dtype in which their gradients meet, and where shards lie.

    mesh: (processes,) of one dimension "shard"; for ``hybrid`` (replicas, processes of a replica).
    """

    mesh: DeviceMesh
    reduce_dtype: torch.dtype
    offload: bool

    @property
    def parts(self) -> int:
        """Processes among which one model is cut."""
        return self.mesh[SHARD].size()


def plan(cfg: ShardingConfig) -> Sharding | None:
    """The sharding that ``cfg`` asks for, over all processes; None for ``kind: none``.

    FSDP version 2 of ``accelerate launch`` counts as ``kind: full`` where ``cfg`` asks for none.

    Args:
        cfg: the run's ``sharding``.

    Returns:
        The plan, the same on every process; None where models stay whole.

    Raises:
        ConfigError: there is one process only, the processes do not fall into ``sharding.replicas`` equal groups, or
            the launcher asks for another kind of sharding.
    """
    cfg = requested_sharding(cfg)
    if cfg.kind == "none":
        return None
    processes = process_count()
    if (problem := cfg.problem(processes, processes_of_a_node())) is not None:
        raise ConfigError(problem)
    replicas = (cfg.replicas or processes // processes_of_a_node()) if cfg.kind == "hybrid" else 1
    shape = (replicas, processes // replicas)[replicas == 1 :]
    names = (REPLICATE, SHARD)[-len(shape) :]
    return Sharding(_mesh(shape, names), getattr(torch, cfg.reduce_dtype), cfg.offload)


@cache
def _mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """One mesh for all models of a run: each has groups of processes of its own, with memory and connections."""
    return init_device_mesh(process_device().type, shape, mesh_dim_names=names)


def shard(root: nn.Module, sharding: Sharding | None) -> None:
    """Cuts the parameters of ``root`` in place; each becomes a ``DTensor`` of which a process holds its part.

    Units are the layers that transformers would not split over devices (``_no_split_modules``), layers whose dtype is
    another than that of the rest, and the root. Gradients of one unit are summed in one dtype; what has none, beside
    parameters that have, may be of any. Call it before the optimiser is made, and after copies of the module are made:
    shards cannot be copied. A module that is sharded already stays as it is. Weights of which ``fill_when_cut`` speaks
    are read now, each process its own.

    Args:
        root: the module whose forward pass will be called; parameters may be on the meta device.
        sharding: the plan; None leaves the module as it is.

    Raises:
        ConfigError: two layers share a parameter.
    """
    if sharding is None or is_sharded(root):
        return
    units = [*_units(root), root]
    _refuse_shared(units)
    for unit in units:
        fully_shard(unit, **_options(unit, sharding))
    _read_weights(root, torch.device("cpu") if sharding.offload else process_device())
    cast(Any, root).run_as_forward = types.MethodType(lambda _root, action: action(), root)
    register_fsdp_forward_method(root, "run_as_forward")
    # A module that is first called through a part of it would take the part for the root.
    as_forward(root, lambda: None)
    reshard(root)
    for module in root.modules():
        for check in vars(module).pop(CHECKS, ()):
            with torch.no_grad():
                as_forward(root, check)


def shard_model(model: nn.Module, sharding: Sharding | None) -> None:
    """``shard`` for a model of which a loss calls any part: its root is a module around it, entered by ``as_forward``.

    Args:
        model: the model, which is from now on called inside ``as_forward`` or ``gathered`` only.
        sharding: the plan; None leaves the model as it is.
    """
    if sharding is None or is_sharded(model):
        return
    around = _Around(model)
    shard(around, sharding)
    vars(model)[ROOT] = around  # not as an attribute: the root would become a part of its part


def shard_all(modules: Iterable[nn.Module], sharding: Sharding | None) -> None:
    """``shard`` for several modules. Those that share parameters, such as roles over one backbone, get one root around
    them, because a layer belongs to one root alone; calling any of them is a forward pass of that root.

    Args:
        modules: called in turn or by one another; those that are sharded already stay as they are.
        sharding: the plan; None leaves them as they are.
    """
    if sharding is None:
        return
    for together in _sharing(module for module in modules if not is_sharded(module)):
        if len(together) == 1:
            shard(together[0], sharding)
            continue
        around = _Around(*together)
        shard(around, sharding)
        for module in together:
            vars(module)[ROOT] = around
            _enter_when_called(module)


def _sharing(modules: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Modules in groups: two of one group have a parameter in common, or each with a third."""
    groups: list[tuple[list[nn.Module], set[int]]] = []
    for module in dict.fromkeys(modules):
        members, own = [module], {id(parameter) for parameter in module.parameters()}
        for group in [group for group in groups if group[1] & own]:
            groups.remove(group)
            members, own = group[0] + members, group[1] | own
        groups.append((members, own))
    return [members for members, _ in groups]


def _enter_when_called(module: nn.Module) -> None:
    forward = module.forward

    @wraps(forward)
    def as_forward_of_root(*args: Any, **kwargs: Any) -> Any:
        return as_forward(module, lambda: forward(*args, **kwargs))

    module.forward = as_forward_of_root


class _Around(nn.Module):
    """A root whose only forward pass is that of ``as_forward``. A model that was its own root would take each call of
    it for a pass of its own."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)


def _root_of(module: nn.Module) -> nn.Module:
    root: nn.Module = vars(module).get(ROOT, module)
    return root


def fill_when_cut(model: nn.Module, fill: Callable[[], None]) -> None:
    """Says how a model on the meta device gets its weights: ``shard`` calls it, so that no process holds it whole.

    Args:
        model: the model, which ``shard`` will get, alone or as a part of a root.
        fill: called once the parameters are shards, with memory and without content, to read each process's own. It
            must not communicate.
    """
    vars(model)[FILL] = fill


def check_when_cut(module: nn.Module, check: Callable[[], object]) -> None:
    """Says what ``shard`` is to call once the weights are there, as a forward pass, after what was said before.

    Args:
        module: the module, which ``shard`` will get, alone or as a part of a root.
        check: refuses a model that does not do what it should.
    """
    vars(module).setdefault(CHECKS, []).append(check)


def forget_when_cut(module: nn.Module) -> None:
    """Takes back what was said of the module itself by ``fill_when_cut`` and ``check_when_cut``."""
    for what in (FILL, CHECKS):
        vars(module).pop(what, None)


@torch.no_grad()
def _read_weights(root: nn.Module, device: torch.device) -> None:
    """Gives memory to what is on the meta device, and fills it."""

    def with_memory(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor

    def fill_all() -> None:
        for fill in unread:
            fill()

    unread: list[Callable[[], None]] = [vars(module).pop(FILL) for module in root.modules() if FILL in vars(module)]
    if unread:
        root._apply(with_memory)
        on_all_processes(fill_all)


def as_forward(root: nn.Module, action: Callable[[], T], *, keep: bool = False) -> T:
    """Runs ``action``, which calls parts of ``root``, as a forward pass of ``root``. Inside another pass of it or a
    ``gathered`` block, and for a module that is no root, ``action`` is called and nothing else happens.

    Args:
        root: a module that was given to ``shard`` or ``shard_model``.
        action: called without arguments. What has gradients in its result is a tensor, or in a tuple or dict.
        keep: without gradients, keep what belongs to the root itself gathered until ``reshard``, because its head is
            read after the pass. With gradients it is kept in any case, until the backward pass.

    Returns:
        What ``action`` returned.
    """
    root = _root_of(root)
    if not is_sharded(root) or vars(root).get(INSIDE) or root in _gathered_now:
        return action()
    vars(root)[INSIDE] = True
    try:
        result: T = cast(Any, root).run_as_forward(action)
    finally:
        vars(root)[INSIDE] = False
    if not keep and not torch.is_grad_enabled():
        reshard(root)
    return result


def is_sharded(module: nn.Module) -> bool:
    """Whether ``module`` was given to ``shard`` or ``shard_model``."""
    return isinstance(_root_of(module), FSDPModule)


def has_shards(module: nn.Module) -> bool:
    """Whether parameters of ``module``, a sharded one or a part of one, are shards at this moment."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes, which is where its inputs belong. Shards that are offloaded lie elsewhere."""
    return process_device() if has_shards(model) else next(model.parameters()).device


def reshard(*roots: nn.Module) -> None:
    """Frees what is gathered. Roots keep their own parameters gathered after a forward pass without a backward pass:
    they take memory, and a step on the shards does not reach them. What a ``gathered`` block holds stays.

    Args:
        *roots: modules that were given to ``shard`` or ``shard_model``.
    """
    for root in map(_root_of, roots):
        for unit in _sharded_units(root):
            if unit not in _gathered_now:
                unit.reshard()


@contextmanager
def gathered(*roots: nn.Module, only: nn.Module | None = None) -> Iterator[None]:
    """Every parameter whole on every process inside: any part may be called, any number of times, and nothing
    communicates. Every process enters it. Blocks may be nested.

    Args:
        *roots: modules that were given to ``shard`` or ``shard_model``; others are left as they are.
        only: a part of the roots. Units outside it stay sharded, which saves their memory.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        for root in map(_root_of, roots):
            stack.enter_context(_gathered(root, set(root.modules() if only is None else only.modules())))
        yield


_gathered_now: WeakSet[FSDPModule] = WeakSet()
"""The units that a ``gathered`` block holds whole."""


@contextmanager
def _gathered(root: nn.Module, wanted: Collection[nn.Module]) -> Iterator[None]:
    units = [u for u in _sharded_units(root) if (u is root or u in wanted) and u not in _gathered_now]
    for unit in units:
        unit.reshard()  # what a forward pass left gathered may be older than the shards
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    _gathered_now.update(units)
    try:
        yield
    finally:
        for unit in units:
            _gathered_now.discard(unit)
            unit.reshard()
            unit.set_reshard_after_forward(unit is not root, recurse=False)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, which shares its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on the device of this process; any other tensor itself. Every process calls it."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Shards that lie in host memory cannot be sent by NCCL.
    return cast(DTensor, tensor.to(process_device())).full_tensor()


def norm_over_shards(norm: Tensor, sharded: Tensor) -> Tensor:
    """The 2-norm of a whole from the norms of its parts: the root of the sum of their squares.

    Processes that hold the same part, in other replicas, are not summed. Every process calls it.

    Args:
        norm: that of this process's part, a scalar.
        sharded: a tensor that is cut as the whole is; of any other, ``norm`` is the norm of the whole.

    Returns:
        The norm of the whole, in the dtype and on the device of ``norm``.
    """
    if not isinstance(sharded, DTensor):
        return norm
    # In float64 the squares of float32 are exact.
    square = norm.to(process_device(), torch.float64).square()
    dist.all_reduce(square, group=sharded.device_mesh.get_group(SHARD))
    return square.sqrt().to(norm)


def part_of(tensor: Tensor) -> slice:
    """The rows of the whole that are this process's: ``fully_shard`` cuts the first dimension as ``torch.chunk`` does.

    Args:
        tensor: a sharded parameter; of any other tensor it is all rows.

    Returns:
        A slice, empty where there are fewer rows than processes.
    """
    rows = tensor.shape[0] if tensor.ndim else 1
    if not isinstance(tensor, DTensor):
        return slice(0, rows)
    mesh = tensor.device_mesh[SHARD]
    each = -(-rows // mesh.size())
    first = min(each * mesh.get_local_rank(), rows)
    return slice(first, min(first + each, rows))


@torch.no_grad()
def fill(own: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies weights into a module, sharded or whole, in place; nothing communicates.

    Args:
        own: the module. Of a sharded one nothing is gathered.
        state: all of its weights by name: whole, or cut as they are.
    """
    for name, weight in own.state_dict().items():
        fill_tensor(weight, state[name])


@torch.no_grad()
def fill_tensor(own: Tensor, source: Tensor) -> None:
    """``fill`` for one tensor.

    Args:
        own: the tensor.
        source: its content, whole or cut as it is.
    """
    local(own).copy_(local(source) if isinstance(source, DTensor) or not source.ndim else source[part_of(own)])


def whole_state(root: nn.Module) -> dict[str, Tensor]:
    """The weights of ``root`` by name, whole, in host memory: on the main process; an empty mapping on the others.

    Every process calls it.

    Args:
        root: a sharded module, or part of one.

    Returns:
        The state dictionary that the module would have without sharding: tied weights are one tensor.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = cast(dict[str, Tensor], get_model_state_dict(root, options=options))
    first: dict[int, str] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if name in state:
            state[name] = state[first.setdefault(id(parameter), name)]
    return state


def _sharded_units(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def _units(root: nn.Module) -> list[nn.Module]:
    """The units below the root, inner ones first."""
    names = {name for module in root.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    # A module stands before what is inside it; the other way round here.
    blocks = [m for m in root.modules() if type(m).__name__ in names and m is not root][::-1]
    if not blocks:
        logger.warning(
            "%s names no layers (_no_split_modules) that could be gathered one at a time: a forward pass gathers all "
            "of it",
            type(root).__name__,
        )
    units: list[nn.Module] = []
    taken: set[nn.Module] = set()
    for block in (*blocks, root):
        own = [module for module in block.modules() if module not in taken]
        taken.update(own)
        parameters = [parameter for module in own for parameter in module.parameters(recurse=False)]
        summed = {parameter for parameter in parameters if parameter.requires_grad} or set(parameters)
        sizes: Counter[torch.dtype] = Counter()
        for parameter in summed:
            sizes[parameter.dtype] += parameter.numel()
        common = max(sizes, key=lambda dtype: sizes[dtype], default=None)
        others = {parameter for parameter in summed if parameter.dtype != common}
        units += [m for m in own if m is not block and others.intersection(m.parameters(recurse=False))]
        units += [] if block is root else [block]
    return units


def _refuse_shared(units: Sequence[nn.Module]) -> None:
    """Raises ConfigError where two units have a parameter in common: each would gather and free it."""
    owners: dict[nn.Parameter, str] = {}
    taken: set[nn.Module] = set()
    names = {module: name for name, module in units[-1].named_modules()}
    for unit in units:
        own = {p: names[m] for m in unit.modules() if m not in taken for p in m.parameters(recurse=False)}
        taken.update(unit.modules())
        for parameter, name in own.items():
            if parameter in owners:
                raise ConfigError(
                    f"{type(units[-1]).__name__} cannot be cut into shards: {owners[parameter]} and {name} share a "
                    "parameter, and their layers are gathered one at a time; set sharding.kind: none"
                )
        owners |= own


def _options(unit: nn.Module, sharding: Sharding) -> dict[str, Any]:
    wide = any(parameter.dtype == torch.float64 for parameter in unit.parameters())
    offload: OffloadPolicy = OffloadPolicy()
    if sharding.offload:
        offload = CPUOffloadPolicy(pin_memory=sharding.mesh.device_type != "cpu")
    return {
        "mesh": sharding.mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=None if wide else sharding.reduce_dtype),
        "offload_policy": offload,
    }
