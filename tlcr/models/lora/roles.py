"""Several models over one copy of frozen weights, each with an adapter of its own."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForTokenClassification, PreTrainedModel
from transformers.initialization import no_init_weights

from tlcr.config.schema import LoRAConfig
from tlcr.errors import CheckpointError
from tlcr.models import classifiers
from tlcr.models.heads import backbone, classification_head, name_of_backbone, use_float32_head
from tlcr.models.lora.adapters import Role, adapts_output, add_adapter, base_digest, own_parameters
from tlcr.models.lora.files import load_adapter, read_base, read_peft_config
from tlcr.models.lora.peft_layers import adapted_layers, home_of, initialise, inject, name_of_output, peft_config
from tlcr.models.preparing import enable_gradient_checkpointing
from tlcr.training.sharding import forget_when_cut

REFERENCE = "reference"
"""The role of the frozen weights alone."""


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
        self._shared, self._home = backbone(model), home_of(model)
        add_adapter(model, cfg, "policy", seed=seed)
        self._layers = [layer for _, layer in adapted_layers(self._shared)]
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            enable_gradient_checkpointing(model, self._checkpointed)
        self.reference = self._play(_twin(model), REFERENCE)
        if adapts_output(model) and (head := name_of_output(model)) is not None:
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
        inject(self._shared, peft_config(model, self._cfg), role)
        initialise(self._shared, role, self._seed, self._home)
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
        inject(self._shared, read_peft_config(folder), role)
        initialise(self._shared, role, self._seed, self._home)
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
        self._layers = [layer for _, layer in adapted_layers(self._shared)]
        self._active = None  # peft activates what it adds
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
        model.set_submodule(name_of_backbone(model), body)
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


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another module of the same class with the same parts, which can be replaced in it alone. What the model remembers
    to do when it is cut, it alone does."""
    twin = copy(model)
    forget_when_cut(twin)
    for name in vars(nn.Module()):
        if isinstance(own := vars(model).get(name), (dict, set)):
            vars(twin)[name] = copy(own)
    return twin


def _on_meta(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = kind._from_config(config, attn_implementation=config._attn_implementation)
    return model
