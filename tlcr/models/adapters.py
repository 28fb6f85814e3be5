"""Low-rank adapters (LoRA) by peft: one on a model that is trained alone, or one for each role over frozen weights.

An adapted linear layer computes x W' + (alpha / rank) x A' B', with W frozen, A (rank, in) and B (out, rank) trained
(Hu et al. 2021, arXiv 2106.09685). B starts at zero, so that an untrained adapter changes nothing. A and B are float32
whatever the dtype of W, and AdamW trains them as they are. Adapters have no dropout: PPO's ratios compare two passes of
one policy, which must be the same function.

peft is imported inside the functions that need it: tlcr does without where ``lora.rank`` is null.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from tlcr.config.schema import LoRAConfig
from tlcr.errors import CheckpointError, ConfigError
from tlcr.files import atomic_write, write_json
from tlcr.models import classifiers
from tlcr.models.four_bits import BITS, dequantised, is_quantised, quantise
from tlcr.models.heads import backbone, classification_head, has_linear_head, name_of_head, use_float32_head
from tlcr.models.loading import enable_gradient_checkpointing, save_model
from tlcr.models.stored import is_unread, stored_parameters, without_adapters
from tlcr.training.distributed import is_main_process, on_main_process, process_device
from tlcr.training.sharding import fill_tensor, forget_when_cut, has_shards, whole, whole_state
from tlcr.training.trained_part import TrainedPart, digest

REFERENCE = "reference"
"""The role of the frozen weights alone."""
FOLDER = "adapter"
"""Where a model's folder keeps the adapter that was merged into it."""
PEFT_CONFIG, PEFT_WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
PEFT_PREFIX = "base_model.model."
"""What peft writes before the name of every weight."""


def missing_peft() -> ConfigError | None:
    """The error for adapters where peft is not installed; None where it is."""
    if find_spec("peft") is not None:
        return None
    from tlcr.distribution import install_command  # it reads the metadata of packages

    return ConfigError(f"lora.rank needs the package peft, and it is not installed; {install_command('lora')}")


# ---- one adapter


def add_adapter(model: PreTrainedModel, cfg: LoRAConfig, name: str, *, seed: int) -> None:
    """Freezes a model, in place, but for its classification head, and puts an adapter on the layers of its backbone,
    and on its output head where ``cfg.targets`` names it.

    Args:
        model: a causal LM or a classifier, on its device.
        cfg: rank, alpha and target layers.
        name: of the adapter.
        seed: decides A, with the name; no other random number is drawn.

    Raises:
        ConfigError: peft is not installed, the backbone has no layer of a name in ``cfg.targets``, or the output head
            that it names is the model's embedding too; or the model's weights cannot be in 4 bits, or are already.
    """
    model.requires_grad_(False)
    _require_plain(model)
    if cfg.base_bits is not None and backbone(model).device.type != "meta":
        _keep_in_four_bits(model)
    _inject(backbone(model), _peft_config(model, cfg), name)
    if _name_of_output(model) in cfg.targets:
        _inject_into_head(model, _peft_config(model, cfg), name)
    _initialise(model, name, seed, _home(model))
    for parameter in (*_adapter_parameters(model, name), *_head_parameters(model)):
        parameter.requires_grad_(True)
    model._tlcr_adapter = name  # type: ignore[assignment]


def adapter_of(model: PreTrainedModel) -> str | None:
    """The name of the adapter that a model was given by ``add_adapter`` or that its role has; None: it has none."""
    role = role_of(model)
    return getattr(model, "_tlcr_adapter", None) if role is None else role.name


def adapts_output(model: PreTrainedModel) -> bool:
    """Whether a causal LM's output head has an adapter, so that its weight alone does not say what it computes."""
    return hasattr(model.get_output_embeddings(), "base_layer")


def own_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters that belong to a model alone.

    Args:
        model: any model.

    Returns:
        All of its parameters; of a model of ``Roles`` those of its adapter and its classification head.
    """
    return list(own_named_parameters(model).values())


def own_named_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """``own_parameters`` by their names in the model."""
    role = role_of(model)
    if role is None:
        return dict(model.named_parameters())
    own = {id(parameter) for parameter in (*_adapter_parameters(model, role.name), *_head_parameters(model))}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}


def own_part(model: PreTrainedModel) -> nn.Module:
    """A module of ``own_parameters`` under their names: the model itself where it shares none."""
    return model if role_of(model) is None else TrainedPart(own_named_parameters(model))


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The frozen parameters of a module that are no adapter's, under the names that they have without adapters."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not _is_adapters(name):
            yield without_adapters(name), parameter


def base_digest(model: PreTrainedModel, base_bits: int | None = None) -> str:
    """The digest of the weights of a model's backbone that an adapter was trained on, or is to be used with.

    Args:
        model: a causal LM or a classifier, with adapters or without.
        base_bits: as the digest of the weights in so few bits; None: of the weights as they are.

    Returns:
        The same for two models with the same backbone, whatever stands on it. Weights that are in 4 bits are known by
        those that the codes were computed from, which does not depend on the device that did it.
    """
    body = backbone(model)
    if (known := getattr(body, "_tlcr_base_digest", None)) is not None:
        return str(known)
    if is_unread(model):
        prefix = f"{_name_of_backbone(model)}."
        stored = ((name, weight) for name, weight in stored_parameters(model) if name.startswith(prefix))
        found = digest((name.removeprefix(prefix), weight) for name, weight in stored)
    else:
        named = body.named_parameters()
        found = digest((without_adapters(name), weight) for name, weight in named if not _is_adapters(name))
    return found if base_bits is None else hashlib.sha256(f"{found} {base_bits} bits".encode()).hexdigest()


def _require_plain(model: PreTrainedModel) -> None:
    """Refuses weights that someone else quantised: what an adapter adds could not be merged into them."""
    if all(parameter.is_floating_point() for parameter in backbone(model).parameters()):
        return
    raise ConfigError(
        f"the weights of {model.name_or_path or type(model).__name__!r} are quantised already, and adapters could not "
        "be merged into them; name the model that they were made from, and set lora.base_bits: 4"
    )


def _keep_in_four_bits(model: PreTrainedModel) -> None:
    body, known = backbone(model), base_digest(model, BITS)
    quantise(body)
    body._tlcr_base_digest = known  # type: ignore[assignment]


# ---- roles


@dataclass(frozen=True)
class Role:
    """What a model of ``Roles`` is: the roles that share its backbone, and which of them it plays."""

    roles: Roles
    name: str


class Roles:
    """Several models over one copy of frozen weights: the reference is these alone, every other has an adapter.

    ``policy`` and ``reference`` are causal LMs, ``classifier`` makes the value model and the discriminator. All are
    models of transformers, which differ in their head and in which adapter their backbone runs with. A backbone enters
    its role by itself whenever it is called: by a head, by ``generate``, or alone. So no caller can forget to.

    peft's ``set_adapter`` is not used. It freezes the adapter that it leaves: between the forward passes of policy and
    value model it would take the gradient from the policy, silently. Here a switch changes nothing but which adapter
    runs. Gradient checkpointing computes layers again in the backward pass, long after other roles ran; each layer
    then runs in the role that its forward pass had.
    """

    def __init__(self, model: PreTrainedModel, cfg: LoRAConfig, *, seed: int) -> None:
        """Makes policy and reference.

        Args:
            model: the causal LM whose weights are shared and frozen; it becomes the policy. Where its weights are to be
                read into shards, ``shard_all`` reads them, for all roles.
            cfg: rank, alpha and target layers of the adapters that are trained.
            seed: decides the first weights of the adapters.

        Raises:
            ConfigError: peft is not installed, or no layer has a name in ``cfg.targets``.
        """
        self._cfg, self._seed = cfg, seed
        self._active: str | None = None
        self._plain = _on_meta(type(model), deepcopy(model.config))
        self._shared, self._home = backbone(model), _home(model)
        add_adapter(model, cfg, "policy", seed=seed)
        self._layers = [layer for _, layer in _layers(self._shared)]
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            enable_gradient_checkpointing(model, self._checkpointed)
        self.reference = self._play(_twin(model), REFERENCE)
        if adapts_output(model) and (head := _name_of_output(model)) is not None:
            self.reference.set_submodule(head, model.get_submodule(f"{head}.base_layer"))
        self.policy = self._play(model, "policy")

    @property
    def role(self) -> str | None:
        """The role of the last forward pass."""
        return self._active

    @contextmanager
    def as_role(self, role: str) -> Iterator[None]:
        """Runs the shared layers in a role; what is trained stays as it is.

        Args:
            role: the name of an adapter, or "reference".
        """
        before = self._active
        self._switch(role)
        try:
            yield
        finally:
            if before is not None:
                self._switch(before)

    def classifier(self, role: str, id2label: Mapping[int, str], *, trained: bool = True) -> PreTrainedModel:
        """A token classifier over the shared layers, with an adapter and a float32 head of zeros of its own.

        Args:
            role: names the adapter.
            id2label: its labels.
            trained: whether adapter and head are trained, or stay as they are.

        Returns:
            The classifier, on the device of the shared weights.
        """
        model = self._new_classifier(id2label)
        _inject(self._shared, _peft_config(model, self._cfg), role)
        _initialise(self._shared, role, self._seed, self._home)
        return self._completed(model, role, trained)

    def load_classifier(self, role: str, folder: str | Path) -> PreTrainedModel:
        """A frozen token classifier from an adapter's folder that ``save_adapter`` wrote.

        Args:
            role: the name that its adapter gets here.
            folder: the adapter's folder.

        Returns:
            The classifier, with what its config was given in training, such as a temperature.

        Raises:
            CheckpointError: the folder lacks something, or was trained on other weights.
        """
        about = read_base(folder)
        if about.get("sha256") != base_digest(self.policy):
            raise CheckpointError(
                f"the adapter in {folder} was trained on other weights than those of {self.policy.name_or_path!r}; "
                "name the model that it was trained on, or train it again"
            )
        model = self._new_classifier({int(index): label for index, label in about["id2label"].items()})
        for name, value in about["config"].items():
            setattr(model.config, name, value)
        _inject(self._shared, read_peft_config(folder), role)
        _initialise(self._shared, role, self._seed, self._home)
        self._completed(model, role, trained=False)
        load_adapter(model, folder)
        return model

    def _new_classifier(self, id2label: Mapping[int, str]) -> PreTrainedModel:
        config = deepcopy(self._plain.config)
        config.id2label = dict(id2label)
        config.label2id = {label: index for index, label in id2label.items()}
        config.classifier_dropout = 0.0
        model = _on_meta(classifiers.new_class(AutoModelForTokenClassification, self._plain, config), config)
        use_float32_head(model)
        head = classification_head(model)
        wide = torch.promote_types(self._shared.dtype, torch.float32)
        for name, parameter in list(head.named_parameters()):
            setattr(head, name, nn.Parameter(torch.zeros(parameter.shape, dtype=wide, device=self._home)))
        return model.eval()

    def _completed(self, model: PreTrainedModel, role: str, trained: bool) -> PreTrainedModel:
        self._play(model, role)
        for parameter in own_parameters(model):
            parameter.requires_grad_(trained)
        self._layers, self._active = [layer for _, layer in _layers(self._shared)], None  # peft activates what it adds
        return model

    def _play(self, model: PreTrainedModel, role: str) -> PreTrainedModel:
        """Gives a model a backbone of its own, whose layers are the shared ones and which runs them in a role."""
        body = _twin(self._shared)
        forward = type(body).forward.__get__(body)

        @functools.wraps(forward)
        def in_role(*args: Any, **kwargs: Any) -> Any:
            self._switch(role)
            return forward(*args, **kwargs)

        body.forward = in_role
        model.set_submodule(_name_of_backbone(model), body)
        model._tlcr_role = Role(self, role)  # type: ignore[assignment]
        return model

    def _switch(self, role: str) -> None:
        """Every forward pass begins with it, so that nothing has to be restored after one."""
        if role == self._active:
            return
        for layer in self._layers:
            layer._active_adapter, layer._disable_adapters = [role], role == REFERENCE
        self._active = role

    def _checkpointed(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The contexts of a layer's forward pass and of its repetition: the second enters the role of the first."""
        role = self._active
        assert role is not None
        return nullcontext(), self._in_turn(role)

    @contextmanager
    def _in_turn(self, role: str) -> Iterator[None]:
        self._switch(role)
        yield


def role_of(model: nn.Module) -> Role | None:
    """The role of a model of ``Roles``; None for any other model."""
    return getattr(model, "_tlcr_role", None)


# ---- folders


def save_trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """``save_model``, which for a model with an adapter writes the merged weights, and the adapter in ``adapter/``.

    Every process calls it.

    Args:
        model: the model to save; it stays as it is.
        tokenizer: its tokenizer.
        folder: where to write.
    """
    if adapter_of(model) is None:
        save_model(model, tokenizer, folder)
        return
    save_adapter(model, Path(folder) / FOLDER)
    save_model(model, tokenizer, folder, weights=merged_weights(model))


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of the whole model that computes what a model with an adapter does, up to one rounding.

    An adapted layer's weight is W + (alpha / rank) B A, added in float32 and rounded once to the dtype of W. The model
    is not touched: merging into it and taking that back would leave other weights than before. Every process calls it.

    Args:
        model: a model with an adapter.

    Returns:
        All weights by their names without adapters, on the CPU where they differ from the model's own: on the main
        process; an empty mapping on the others.
    """
    name = adapter_of(model)
    assert name is not None
    state = whole_state(model) if has_shards(model) else model.state_dict()
    if not is_main_process():
        return {}
    weights = {without_adapters(key): weight for key, weight in state.items() if not _is_adapters(key)}
    weights |= _dequantised(model, weights)
    for path, layer in _layers(model, name):
        base, (down, up) = weights[f"{path}.weight"], (state[f"{path}.lora_{part}.{name}.weight"] for part in "AB")
        weights[f"{path}.weight"] = _merged(base, down, up, layer, name).cpu()
    return weights


def _dequantised(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of layers in 4 bits as numbers; what else ``weights`` has of such layers is taken out of it."""
    layers = {path: layer for path, layer in model.named_modules() if is_quantised(layer)}
    found = {}
    for path, layer in layers.items():
        name = without_adapters(f"{path}.weight")
        for key in [key for key in weights if key.startswith(f"{name}.")]:
            del weights[key]
        found[name] = dequantised(layer).cpu()
    return found


@torch.no_grad()
def whole_weights(model: PreTrainedModel, *, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model one after the other, for an engine: whole, and merged where there is an adapter.

    They are those of ``merged_weights``, or of the state dictionary of a model without an adapter. One at a time is
    gathered from its shards or merged, and the model is not touched. Every process iterates.

    Args:
        model: any model; of a sharded one that is not inside ``gathered`` each weight is gathered in its turn.
        merged: False gives the weights that the adapter stands on, without it.

    Yields:
        Name and tensor; tied weights once, as they are named first.
    """
    adapter = adapter_of(model)
    layers = {} if adapter is None else dict(_layers(model, adapter))
    parameters = dict(model.named_parameters())
    for key, parameter in parameters.items():
        if _is_adapters(key):
            continue
        path, module = key.removesuffix(".base_layer.weight"), model.get_submodule(key.rpartition(".")[0])
        weight = dequantised(module) if is_quantised(module) and key.endswith(".weight") else whole(parameter.detach())
        if merged and path != key and path in layers:
            down, up = (whole(parameters[f"{path}.lora_{part}.{adapter}.weight"].detach()) for part in "AB")
            weight = _merged(weight, down, up, layers[path], adapter)
        yield without_adapters(key), weight
    for path, module in model.named_modules():
        for key, buffer in module.named_buffers(path, recurse=False):
            if key.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield without_adapters(key), buffer


def _merged(base: Tensor, down: Tensor, up: Tensor, layer: Any, adapter: str | None) -> Tensor:
    wide = torch.promote_types(base.dtype, torch.float32)
    delta = (up.to(wide) @ down.to(wide)) * layer.scaling[adapter]
    return (base.to(delta.device, wide) + (delta.T if layer.fan_in_fan_out else delta)).to(base.dtype)


def save_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Writes a model's adapter, and its classification head, as peft does: ``PeftModel.from_pretrained`` loads it.

    ``base.json`` beside it says what weights it was trained on. Every process calls it.

    Args:
        model: a model with an adapter.
        folder: where to write.
    """
    folder, body = Path(folder), backbone(model)
    weights, sha256 = adapter_weights(model), base_digest(model)

    def write() -> None:
        write_adapter(model, weights, folder)
        dtype = str(body.dtype).removeprefix("torch.")
        about: dict[str, Any] = {"path": _source(model), "dtype": dtype, "sha256": sha256}
        if hasattr(body, "_tlcr_base_digest"):
            about["base_bits"] = BITS
        if has_linear_head(model):
            own = {key: value for key, value in vars(model.config).items() if key.startswith("tlcr_")}
            about |= {"id2label": model.config.id2label, "config": own}
        write_json(folder / BASE, about)

    on_main_process(write)


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's adapter, and its classification head, on the CPU, whole, by the names that peft has for them.

    Args:
        model: a model with an adapter. Where it is sharded every process calls, or has it inside ``gathered``.

    Returns:
        The weights.
    """
    name = adapter_of(model)
    assert name is not None
    return {key: whole(weight.detach()).cpu().contiguous() for key, weight in _peft_weights(model, name).items()}


def write_adapter(model: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes an adapter as peft does, on this process.

    Args:
        model: the model that has it.
        weights: of ``adapter_weights``.
        folder: where to write.
    """
    name = adapter_of(model)
    assert name is not None
    config = deepcopy(_peft_configs(backbone(model))[name])
    config.task_type, config.inference_mode = _task(model), True
    config.base_model_name_or_path = _source(model)
    config.target_modules = sorted({path.rpartition(".")[2] for path, _ in _layers(model, name)})
    config.modules_to_save = [name_of_head(model)] if has_linear_head(model) else None
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / PEFT_WEIGHTS) as aside:
        save_file(dict(weights), aside, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def load_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Fills a model's adapter and head from a folder of peft, in place.

    Args:
        model: a model with an adapter of the same layers and rank.
        folder: the adapter's folder.

    Raises:
        CheckpointError: there is no adapter, or it is of other layers, another rank or another head.
    """
    name, file = adapter_of(model), Path(folder) / PEFT_WEIGHTS
    assert name is not None
    if not file.is_file():
        raise CheckpointError(f"no adapter in {folder}: wanted {PEFT_WEIGHTS} and {PEFT_CONFIG}, as peft writes them")
    stored, own = load_file(file), _peft_weights(model, name)
    other = sorted(set(stored) ^ set(own)) or [key for key in own if stored[key].shape != own[key].shape]
    if other:
        raise CheckpointError(
            f"the adapter in {folder} does not fit {type(model).__name__}: {len(other)} of its weights are missing, "
            f"left over or of another shape, such as {other[0]}; it was trained with another lora.rank, lora.targets "
            "or model"
        )
    for key, weight in own.items():
        fill_tensor(weight, stored[key])


def attach_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Puts the adapter of a folder of peft on a model that has none.

    Args:
        model: the model that it was trained on.
        folder: the adapter's folder.

    Raises:
        CheckpointError: it does not fit the model.
        ConfigError: peft is not installed, or the adapter is no LoRA that can be merged.
    """
    model.requires_grad_(False)
    _require_plain(model)
    config = read_peft_config(folder)
    if read_base(folder).get("base_bits") is not None:
        _keep_in_four_bits(model)
    _inject(backbone(model), config, "default")
    if _name_of_output(model) in config.target_modules:
        _inject_into_head(model, config, "default")
    _initialise(model, "default", 0, _home(model))
    model._tlcr_adapter = "default"  # type: ignore[assignment]
    load_adapter(model, folder)


def read_peft_config(folder: str | Path) -> Any:
    """The ``LoraConfig`` of an adapter's folder.

    Args:
        folder: the adapter's folder.

    Returns:
        peft's config.

    Raises:
        CheckpointError: the folder holds none.
        ConfigError: peft is not installed, or the adapter is of another kind than LoRA on linear layers.
    """
    _require_peft()
    from peft import LoraConfig, PeftConfig

    if not (Path(folder) / PEFT_CONFIG).is_file():
        raise CheckpointError(f"no adapter in {folder}: wanted {PEFT_CONFIG}, as peft writes it")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig) or config.use_dora or config.bias != "none":
        raise ConfigError(
            f"the adapter in {folder} is no plain LoRA (peft_type {config.peft_type.value}, use_dora, bias): tlcr adds "
            "products of two matrices to weights, and nothing else; merge it by peft's merge_and_unload"
        )
    config.inference_mode = False
    return config


def read_base(folder: str | Path) -> dict[str, Any]:
    """``base.json`` of an adapter's folder; empty where another program wrote the adapter."""
    path = Path(folder) / BASE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# ---- peft


def _require_peft() -> None:
    if (error := missing_peft()) is not None:
        raise error


def _peft_config(model: PreTrainedModel, cfg: LoRAConfig) -> Any:
    """peft's config of the adapters of a model's backbone."""
    _require_peft()
    from peft import LoraConfig

    assert cfg.rank is not None
    targets: str | list[str] = "all-linear" if "all-linear" in cfg.targets else list(cfg.targets)
    conv = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2's weights are (in, out)
    options: dict[str, Any] = {"lora_alpha": cfg.alpha, "lora_dropout": 0.0, "fan_in_fan_out": conv}
    return LoraConfig(r=cfg.rank, target_modules=targets, **options)


def _name_of_output(model: PreTrainedModel) -> str | None:
    """The name of a causal LM's output head, such as lm_head; None where it has none."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def _inject_into_head(model: PreTrainedModel, config: Any, name: str) -> None:
    """Adds an adapter without values to the output head, as ``_inject`` does to a backbone."""
    path = _name_of_output(model)
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise ConfigError(
            f"lora.targets names {path}, but in {type(model).__name__} the output head is the embedding "
            "(tie_word_embeddings): merged weights would have to be two matrices; leave it out"
        )
    config = copy(config)
    config.target_modules, config.fan_in_fan_out = {path}, False
    _inject(model, config, name)


def _inject(body: PreTrainedModel, config: Any, name: str) -> None:
    """Adds an adapter without values to the layers of a backbone; what is trained stays as it was."""
    from peft.tuners.lora import LoraModel

    wanted = config.target_modules
    trained = {id(parameter): parameter.requires_grad for parameter in body.parameters()}
    try:
        LoraModel(body, config, name, low_cpu_mem_usage=True)
    except ValueError as error:
        linear = {path.rpartition(".")[2] for path, m in body.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
        raise ConfigError(
            f"{type(body).__name__} has no linear layer named {' or '.join(map(repr, wanted))} to adapt; name some of "
            f"{', '.join(sorted(linear))} in lora.targets, or all-linear"
        ) from error
    del body.peft_config  # peft would take it for an adapter of another kind when it adds the next
    _peft_configs(body)[name] = config
    for parameter in body.parameters():
        parameter.requires_grad_(trained.get(id(parameter), False))


def _home(model: PreTrainedModel) -> torch.device:
    """Where the adapters and heads of a model are made: no file has them, so they have values before it is read."""
    return process_device() if is_unread(model) else backbone(model).device


def _initialise(model: PreTrainedModel, name: str, seed: int, device: torch.device) -> None:
    """A uniform, as nn.Linear's weights are, and B zero (Hu et al. 2021; peft). A is drawn on the CPU, so that it does
    not depend on the device."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    for _, layer in _layers(model, name):
        base = layer.base_layer.weight
        dtype = torch.promote_types(base.dtype, torch.float32)
        down, up = layer.lora_A[name], layer.lora_B[name]
        a = torch.empty(down.weight.shape, dtype=dtype)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        b = torch.zeros(up.weight.shape, dtype=dtype, device=device)
        down.weight = nn.Parameter(a.to(device), requires_grad=False)
        up.weight = nn.Parameter(b, requires_grad=False)


def _peft_configs(body: PreTrainedModel) -> dict[str, Any]:
    """The configs of a backbone's adapters by name, which backbones of ``Roles`` share."""
    if not hasattr(body, "_tlcr_peft_configs"):
        body._tlcr_peft_configs = {}  # type: ignore[assignment]
    configs: dict[str, Any] = body._tlcr_peft_configs  # type: ignore[assignment]
    return configs


def _layers(module: nn.Module, name: str | None = None) -> list[tuple[str, Any]]:
    """The adapted layers of a module by their paths; name: those alone that have this adapter."""
    found = [(path, m) for path, m in module.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    return [(path, layer) for path, layer in found if name is None or name in layer.lora_A]


def _adapter_parameters(model: PreTrainedModel, name: str) -> list[nn.Parameter]:
    return [part[name].weight for _, layer in _layers(model, name) for part in (layer.lora_A, layer.lora_B)]


def _head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    return list(classification_head(model).parameters()) if has_linear_head(model) else []


def _peft_weights(model: PreTrainedModel, name: str) -> dict[str, nn.Parameter]:
    """Adapter and head under the names that peft has for them."""
    adapter = re.compile(rf"\.(lora_[AB])\.{re.escape(name)}\.weight$")
    head = {id(parameter) for parameter in _head_parameters(model)}
    return {
        PEFT_PREFIX + adapter.sub(r".\1.weight", key): parameter
        for key, parameter in model.named_parameters()
        if adapter.search(key) or id(parameter) in head
    }


def _is_adapters(name: str) -> bool:
    return ".lora_" in name


def _task(model: PreTrainedModel) -> str:
    if not has_linear_head(model):
        return "CAUSAL_LM"
    return "TOKEN_CLS" if "TokenClassification" in type(model).__name__ else "SEQ_CLS"


def _source(model: PreTrainedModel) -> str | None:
    """What the model was loaded from: a hub name, or a folder, which is named from the root."""
    path = model.name_or_path or None
    return os.path.abspath(path) if path and os.path.isdir(path) else path


# ---- modules that share their parts


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another module of the same class with the same parts, which can be replaced in it alone. What the model remembers
    to do when it is cut, it alone does."""
    twin = copy(model)
    forget_when_cut(twin)
    for name in vars(nn.Module()):
        if isinstance(own := vars(model).get(name), (dict, set)):
            vars(twin)[name] = copy(own)
    return twin


def _name_of_backbone(model: PreTrainedModel) -> str:
    body = backbone(model)
    return next(name for name, module in model.named_modules() if module is body)


def _on_meta(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = kind._from_config(config, attn_implementation=config._attn_implementation)
    return model
