"""OpenRLHF: an experience maker that pays every action, and the launcher that puts it into OpenRLHF's trainer.

``python -m tlcr.hosts.openrlhf FLAGS`` takes the flags of ``openrlhf.cli.train_ppo_ray`` and runs it. OpenRLHF builds
its experience maker by name inside a Ray actor; the launcher hands Ray a subclass of that actor which changes the name
first. ``openrlhf_agent`` scores the answers.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import ray
import torch
from openrlhf.trainer.ppo_utils import experience_maker
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.utils.logging_utils import init_logger
from torch import Tensor

from tlcr.errors import HostError
from tlcr.hosts.guard import require
from tlcr.hosts.openrlhf_agent import OUTCOME, REWARDS

__all__ = ["NAMES", "TESTED", "TokenRewardExperienceMaker", "install", "launch", "paying"]

TESTED = ">=0.11.0,<=0.11.2"
NAMES = {
    "openrlhf.utils.agent:SingleTurnAgentExecutor.execute": (
        "self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images"
    ),
    "openrlhf.trainer.ppo_utils.experience_maker:compute_reward": ("r, kl_coef, kl, action_mask, reward_clip_range"),
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.compute_advantages_and_returns": (
        "self, experiences"
    ),
    "openrlhf.trainer.ppo_trainer:RemoteExperienceMaker": None,
    "openrlhf.trainer.ppo_trainer:PPOTrainer.__ray_metadata__.modified_class": None,
    "openrlhf.trainer.ppo_trainer_async:PPOTrainerAsync.__ray_metadata__.modified_class": None,
    "openrlhf.trainer.ppo_trainer_async:TrainingActor.__ray_metadata__.modified_class": None,
}
"""What this module and ``openrlhf_agent`` override or replace."""

UNCENTRED = ("rloo", "group_norm", "dr_grpo", "flash_reinforce")
"""Estimators whose baseline is one of whole answers, and that do not normalise afterwards."""

UNHEARD = ("--reward.remote_url", "--reward.model_name_or_path")
"""Flags that OpenRLHF drops without a word where an agent gives the rewards."""

logger = init_logger(__name__)


class TokenRewardExperienceMaker(RemoteExperienceMaker):
    """OpenRLHF's experience maker, whose per-action reward is its own, KL among it, plus the token's.

    r'_a = r_a + token reward of the action, where r_a has the outcome at the last action and the KL penalty at each.
    All of OpenRLHF's estimators then see dense rewards. Source: ours.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.advantage_estimator in UNCENTRED:
            logger.warning(
                "the baseline of --algo.advantage.estimator %s is one of whole answers, so that rewards of tokens stay "
                "uncentred; gae, reinforce and reinforce_baseline normalise them over the batch",
                self.advantage_estimator,
            )

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
        """Takes the rewards out of ``info`` and has OpenRLHF compute advantages with them.

        Args:
            experiences: of OpenRLHF, each of B answers.

        Returns:
            The same, with advantages and returns.

        Raises:
            HostError: an answer was not scored, or its rewards do not stand where its actions do.
        """
        rewards = []
        for experience in experiences:
            rewards_BA, outcome_B = (experience.info.pop(name, None) for name in (REWARDS, OUTCOME))
            if rewards_BA is None or outcome_B is None:
                raise HostError(
                    "OpenRLHF brought an answer without rewards of tokens; run it by 'python -m tlcr.hosts.openrlhf', "
                    "and with an executor of your own put tlcr.hosts.openrlhf_agent.TokenRewards before its base"
                )
            rewards.append(_aligned(rewards_BA, experience.action_mask))
            experience.rewards = outcome_B
        with _paid_as_well(rewards):
            return super().compute_advantages_and_returns(experiences)


def _aligned(rewards_BA: Tensor, mask_BA: Tensor) -> Tensor:
    """The rewards, after a look whether each stands at an action."""
    if rewards_BA.shape != mask_BA.shape:
        raise HostError(
            f"rewards of tokens are {tuple(rewards_BA.shape)} and OpenRLHF's actions {tuple(mask_BA.shape)}; an "
            "executor of your own must not change observation_tokens after the scoring"
        )
    astray = int(((rewards_BA != 0) & ~mask_BA.bool()).sum())
    if astray or not bool(rewards_BA.isfinite().all()):
        raise HostError(
            f"{astray} rewards stand where OpenRLHF has no action, or are not finite; column p - 1 is the action that "
            "emits the token at p"
        )
    return rewards_BA.float()


@contextmanager
def _paid_as_well(rewards: Sequence[Tensor]) -> Iterator[None]:
    """OpenRLHF calls ``compute_reward`` once for each experience, in their order; until it ends, ours answers."""
    theirs, waiting = experience_maker.compute_reward, list(rewards)

    def compute_reward(*args: Any, **kwargs: Any) -> Tensor:
        reward_BA = theirs(*args, **kwargs)
        if not waiting or waiting[0].shape != reward_BA.shape:
            raise HostError(
                "this OpenRLHF asks for rewards more than once, or in another order; see the versions tested"
            )
        return reward_BA + waiting.pop(0).to(reward_BA)

    experience_maker.compute_reward = compute_reward
    try:
        yield
    finally:
        experience_maker.compute_reward = theirs
    if waiting:
        raise HostError(f"this OpenRLHF left {len(waiting)} experiences without rewards; see the versions tested")


def install() -> None:
    """Has the trainers of this process build the experience maker above; to do it twice changes nothing."""
    trainer: Any = import_module("openrlhf.trainer.ppo_trainer")
    asynchronous: Any = import_module("openrlhf.trainer.ppo_trainer_async")
    if trainer.RemoteExperienceMaker is not TokenRewardExperienceMaker:
        trainer.RemoteExperienceMaker = TokenRewardExperienceMaker
        asynchronous.TrainingActor = paying(asynchronous.TrainingActor)


def paying(actor: Any) -> Any:
    """An actor of OpenRLHF whose process pays every token.

    Args:
        actor: the class, as ``ray.remote`` made it.

    Returns:
        A subclass, as ``ray.remote`` makes it.
    """
    theirs: Any = actor.__ray_metadata__.modified_class

    class Paying(theirs):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            install()
            super().__init__(*args, **kwargs)

    Paying.__name__ = Paying.__qualname__ = theirs.__name__
    return ray.remote(Paying)


def launch(arguments: Sequence[str]) -> None:
    """Runs OpenRLHF's ``train_ppo_ray`` with rewards for every token.

    Args:
        arguments: its flags; ``--train.agent_func_path`` is added where it is not among them.

    Raises:
        HostError: the version of OpenRLHF does not fit, or a flag names a reward that OpenRLHF would not ask for.
    """
    require("OpenRLHF", "openrlhf", TESTED, NAMES)
    flags = list(arguments)
    named = [flag.split("=")[0] for flag in flags if len(flag) > len("--reward.")]
    if unheard := [flag for flag in UNHEARD if any(flag.startswith(name) for name in named)]:  # argparse takes a part
        raise HostError(
            f"OpenRLHF does not ask what {unheard[0]} names where an agent gives the rewards, and tlcr's is one; leave "
            "it out, and write the address into an executor of your own (docs/hosts/openrlhf.md)"
        )
    trainer: Any = import_module("openrlhf.trainer.ppo_trainer")
    asynchronous: Any = import_module("openrlhf.trainer.ppo_trainer_async")
    trainer.PPOTrainer = paying(trainer.PPOTrainer)
    asynchronous.PPOTrainerAsync = paying(asynchronous.PPOTrainerAsync)
    if "--train.agent_func_path" not in named:
        agent = find_spec("tlcr.hosts.openrlhf_agent")
        flags += ["--train.agent_func_path", str(agent.origin if agent is not None else None)]
    sys.argv = ["openrlhf.cli.train_ppo_ray", *flags]
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    from tlcr.hosts.openrlhf import launch as launch_by_name  # Ray finds classes by their module, which is not __main__

    launch_by_name(sys.argv[1:])
