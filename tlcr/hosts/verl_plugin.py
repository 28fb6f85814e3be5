"""What the entry point ``verl.plugins`` loads in every process that imports verl: it registers tlcr's names.

verl swallows what a plugin raises. This one says it before, once a process, in verl's own log.
"""

from __future__ import annotations

import logging

from tlcr.hosts.guard import require

__all__ = ["NAMES", "TESTED"]

TESTED = ">=0.9.0,<=0.9.1"
"""The first verl with the V1 trainer, and the newest one that the tests ran with."""

_AGENT, _MANAGER = "verl.experimental.agent_loop", "verl.experimental.reward_loop.reward_manager"
NAMES = {
    f"{_AGENT}.agent_loop:AgentLoopOutput.as_dict": "self",
    f"{_AGENT}.agent_loop:register": "agent_name",
    f"{_AGENT}.single_turn_agent_loop:SingleTurnAgentLoop.run": "self, sampling_params",
    f"{_AGENT}.tool_agent_loop:ToolAgentLoop.run": "self, sampling_params",
    f"{_MANAGER}:register": "name",
    f"{_MANAGER}.base:RewardManagerBase.__init__": "self, config, tokenizer, compute_score",
    f"{_MANAGER}.base:RewardManagerBase.assemble_rm_scores": "data, scores",
    "verl.trainer.ppo.core_algos:register_adv_est": "name_or_enum",
}
"""What ``tlcr.hosts.verl`` overrides or calls."""

try:
    require("verl", "verl", TESTED, NAMES)
    import tlcr.hosts.verl  # noqa: F401  (it registers)
except Exception as error:
    logging.getLogger(__name__).error("tlcr is not registered with verl: %s", error)
    raise
