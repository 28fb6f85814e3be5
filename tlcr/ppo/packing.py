"""Whether PPO packs rows: the setting, the models' attention, and what they make of packed rows."""

from __future__ import annotations

import logging
from typing import Literal

from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from tlcr.errors import ConfigError
from tlcr.models.actor_critic import ActorCritic
from tlcr.models.probes import packing_fault
from tlcr.training.sharding import gathered

__all__ = ["packs_rows"]


def packs_rows(
    setting: Literal["auto", "always", "never"], actor_critic: ActorCritic, reference: PreTrainedModel
) -> bool:
    """Whether policy, value model and reference are to read packed rows.

    Each model is tried on a few tokens (`tlcr.models.probes.packing_fault`), on the device that it stands on.

    Args:
        setting: ``ppo.packing``. "auto" packs where all models run flash attention on a GPU and pass the trial; a
            model that fails it is noted.
        actor_critic: policy and value model.
        reference: the reference model.

    Returns:
        True: rows are packed.

    Raises:
        ConfigError: the setting is "always", and a model cannot read packed rows.
    """
    models = {"policy": actor_critic.policy, "reference": reference}
    if actor_critic.value_model is not None:
        models["value model"] = actor_critic.value_model
    if setting == "never" or (setting == "auto" and not all(map(_runs_flash, models.values()))):
        return False
    for role, model in models.items():
        with gathered(actor_critic, reference, only=model):
            fault = packing_fault(model)
        if fault is None:
            continue
        found = f"the {role}, a {type(model).__name__} with attention {model.config._attn_implementation}, {fault}"
        if setting == "always":
            raise ConfigError(f"ppo.packing is 'always', but {found}; set ppo.packing to never")
        logging.getLogger("tlcr").warning("rows are padded, not packed (ppo.packing: auto): %s", found)
        return False
    return True


def _runs_flash(model: PreTrainedModel) -> bool:
    return model.device.type != "cpu" and is_flash_attention_requested(model.config)
