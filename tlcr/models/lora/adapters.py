"""A model with a low-rank adapter: giving it one, and what of it is its own and what is the frozen base's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedModel

from tlcr.config.schema import LoRAConfig
from tlcr.errors import ConfigError
from tlcr.models.heads import backbone, head_parameters, name_of_backbone
from tlcr.models.lora.four_bits import BITS, quantise
from tlcr.models.lora.peft_layers import (
    adapter_parameters,
    home_of,
    initialise,
    inject,
    inject_into_head,
    is_of_adapter,
    name_of_output,
    peft_config,
)
from tlcr.models.stored import is_unread, stored_parameters, without_adapters
from tlcr.training.trained_part import TrainedPart, digest

if TYPE_CHECKING:
    from tlcr.models.lora.roles import Roles


@dataclass(frozen=True)
class Role:
    """What a model of ``Roles`` is: the roles that share its backbone, and which of them it plays."""

    roles: Roles
    name: str


def role_of(model: nn.Module) -> Role | None:
    """The role of a model of ``Roles``; None for any other model."""
    return getattr(model, "_tlcr_role", None)


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
    require_plain(model)
    if cfg.base_bits is not None and backbone(model).device.type != "meta":
        keep_in_four_bits(model)
    inject(backbone(model), peft_config(model, cfg), name)
    if name_of_output(model) in cfg.targets:
        inject_into_head(model, peft_config(model, cfg), name)
    initialise(model, name, seed, home_of(model))
    for parameter in (*adapter_parameters(model, name), *head_parameters(model)):
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
    own = {id(parameter) for parameter in (*adapter_parameters(model, role.name), *head_parameters(model))}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}


def own_part(model: PreTrainedModel) -> nn.Module:
    """A module of ``own_parameters`` under their names: the model itself where it shares none."""
    return model if role_of(model) is None else TrainedPart(own_named_parameters(model))


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The frozen parameters of a module that are no adapter's, under the names that they have without adapters."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not is_of_adapter(name):
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
        prefix = f"{name_of_backbone(model)}."
        stored = ((name, weight) for name, weight in stored_parameters(model) if name.startswith(prefix))
        found = digest((name.removeprefix(prefix), weight) for name, weight in stored)
    else:
        named = body.named_parameters()
        found = digest((without_adapters(name), weight) for name, weight in named if not is_of_adapter(name))
    return found if base_bits is None else hashlib.sha256(f"{found} {base_bits} bits".encode()).hexdigest()


def require_plain(model: PreTrainedModel) -> None:
    """Refuses weights that someone else quantised: what an adapter adds could not be merged into them."""
    if all(parameter.is_floating_point() for parameter in backbone(model).parameters()):
        return
    raise ConfigError(
        f"the weights of {model.name_or_path or type(model).__name__!r} are quantised already, and adapters could not "
        "be merged into them; name the model that they were made from, and set lora.base_bits: 4"
    )


def keep_in_four_bits(model: PreTrainedModel) -> None:
    """Quantises a backbone in place, which stays known by the weights that it had (``base_digest``)."""
    body, known = backbone(model), base_digest(model, BITS)
    quantise(body)
    body._tlcr_base_digest = known  # type: ignore[assignment]
