"""SkyRL: a generator that pays every token of what SkyRL's own generator sampled, an estimator, and an entry point.

SkyRL takes rewards as one list for each answer. ``trainer.override_entrypoint=tlcr.hosts.skyrl`` on the command line of
``skyrl.train.entrypoints.main_base`` is all that a run needs; code with an entry point of its own wraps its generator
in ``TokenRewardGenerator``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import ray
import torch
from loguru import logger
from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.generators.base import GeneratorInterface
from torch import Tensor

from tlcr.errors import HostError
from tlcr.hosts.advantages import group_reward_to_go
from tlcr.hosts.contract import Account, Item, Scorer
from tlcr.hosts.guard import require
from tlcr.hosts.payment import mean_at_end, numbered, summing
from tlcr.hosts.remote import rewards_of, scorer_at

__all__ = ["NAMES", "TESTED", "TokenRewardExp", "TokenRewardGenerator", "group_advantages", "main"]

TESTED = ">=0.3.0,<=0.3.0"
NAMES = {
    "skyrl.train.generators.base:GeneratorInterface.generate": "self, input_batch",
    "skyrl.train.entrypoints.main_base:BasePPOExp.get_generator": "self, cfg, tokenizer, inference_engine_client",
    "skyrl.train.trainer:RayPPOTrainer.postprocess_generator_output": "self, generator_output, uids",
    "skyrl.train.config:SkyRLTrainConfig.from_cli_overrides": None,
    "skyrl.train.utils:validate_cfg": "cfg",
    "skyrl.train.utils.utils:initialize_ray": "cfg",
    "skyrl.backends.skyrl_train.utils.ppo_utils:AdvantageEstimatorRegistry.register": "name, func",
}
"""What this module overrides or calls."""

SUMMING = ("grpo", "rloo", "maxrl")
ESTIMATOR = "tlcr_group"


class TokenRewardGenerator(GeneratorInterface):
    """A generator of SkyRL, whose answers come with a reward for each token.

    What the environment pays, once or at each token, is kept and added: it is the outcome of the answer. In evaluation
    the environment's rewards stand alone, so that SkyRL's pass@n keeps its meaning.
    """

    def __init__(
        self,
        inner: GeneratorInterface,
        scorer: Scorer,
        *,
        tokenizer: Any = None,
        scale: float = 1.0,
        mean: bool = False,
    ) -> None:
        """Wraps a generator.

        Args:
            inner: what samples and plays the environment.
            scorer: what gives rewards.
            tokenizer: the policy's, which the server's is compared with; None: not compared.
            scale: what rewards of tokens are multiplied by before the environment's are added.
            mean: pay the mean of an answer's rewards at its last token, for estimators that add them up.
        """
        self.inner, self.scorer, self.tokenizer = inner, scorer, tokenizer
        self.scale, self.mean = scale, mean

    async def generate(self, input_batch: Any) -> Any:
        """Samples a batch and scores it.

        Args:
            input_batch: of SkyRL.

        Returns:
            SkyRL's output, whose ``rewards`` are one list for each answer.

        Raises:
            HostError: an answer has no token, rewards do not fit, or SkyRL trains on steps instead of answers.
        """
        output = await self.inner.generate(input_batch)
        metadata = input_batch.get("batch_metadata")
        if metadata is not None and metadata.training_phase == "eval":
            return output
        if output.get("is_last_step") is not None:
            raise HostError(
                "with generator.step_wise_trajectories SkyRL reads the last step's rewards alone; set it to false"
            )
        answers, masks = output["response_ids"], output["loss_masks"]
        if not all(answers):
            raise HostError(
                "SkyRL sampled an answer without a token, and has no place for its reward; set "
                "generator.sampling_params.min_tokens, or append_eos_token_after_stop_str_in_multi_turn"
            )
        items = [Item(*row) for row in zip(output["prompt_token_ids"], answers, masks, strict=True)]
        rewards = await rewards_of(self.scorer, items, self.tokenizer)
        figures = Account().add(rewards, masks).figures()
        output["rollout_metrics"] = {
            **(output.get("rollout_metrics") or {}),
            **{f"tlcr/{name}": value for name, value in figures.items()},
            "tlcr/environment/mean_answer": sum(map(_total, output["rewards"])) / len(answers),
        }
        paid = [mean_at_end(row, mask) if self.mean else row for row, mask in zip(rewards, masks, strict=True)]
        output["rewards"] = [
            _plus([self.scale * reward for reward in row], environment)
            for row, environment in zip(paid, output["rewards"], strict=True)
        ]
        return output


def _total(environment: float | Sequence[float]) -> float:
    return sum(environment) if isinstance(environment, Sequence) else float(environment)


def _plus(rewards: list[float], environment: float | Sequence[float]) -> list[float]:
    """The environment's rewards on top, where SkyRL itself lays them: each at its token, or one at the last token."""
    if not isinstance(environment, Sequence):
        return [*rewards[:-1], rewards[-1] + float(environment)]
    if len(environment) != len(rewards):
        raise HostError(
            f"SkyRL's environment paid {len(environment)} rewards for {len(rewards)} tokens; wanted one each"
        )
    return [ours + theirs for ours, theirs in zip(rewards, environment, strict=True)]


def group_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Any],
    grpo_norm_by_std: bool = True,
    gamma: float = 1.0,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """``tlcr.hosts.advantages.group_reward_to_go`` as an estimator of SkyRL, named ``tlcr_group``.

    SkyRL aligns answers to the right; the baseline compares the same tokens of an answer, counted from its beginning.

    Args:
        token_level_rewards: (B, T), the answers in the last columns.
        response_mask: (B, T), 1 at the answer's tokens.
        index: (B,) the prompt of each answer.
        grpo_norm_by_std: of SkyRL's config; divides the advantages of a group by their root mean square.
        gamma: of SkyRL's config.
        **unused: what SkyRL gives to all estimators besides: values, lambd, config.

    Returns:
        The advantages (B, T), twice: without a critic nobody reads returns.
    """
    width = response_mask.shape[1]
    first_B = width - response_mask.long().sum(dim=1)
    columns_T = torch.arange(width, device=response_mask.device)
    to_left_BT = (columns_T + first_B[:, None]) % width
    to_right_BT = (columns_T - first_B[:, None]) % width
    advantages_BT = group_reward_to_go(
        token_level_rewards.gather(1, to_left_BT),
        response_mask.bool().gather(1, to_left_BT),
        numbered(index),
        gamma=gamma,
        normalise="group" if grpo_norm_by_std else "none",
    ).gather(1, to_right_BT)
    return advantages_BT, advantages_BT


if ESTIMATOR not in AdvantageEstimatorRegistry.list_available():
    AdvantageEstimatorRegistry.register(ESTIMATOR, group_advantages)


class TokenRewardExp(BasePPOExp):
    """SkyRL's experiment with the generator wrapped. Subclass it to set the two options.

    Attributes:
        scale: what rewards of tokens are multiplied by.
        mean: pay the mean of an answer's rewards at its last token.
    """

    scale = 1.0
    mean = False

    def get_generator(self, cfg: Any, tokenizer: Any, inference_engine_client: Any) -> GeneratorInterface:
        """SkyRL's own generator, wrapped.

        Args:
            cfg: SkyRL's config.
            tokenizer: the policy's.
            inference_engine_client: of SkyRL.

        Returns:
            The generator.

        Raises:
            HostError: the config has SkyRL train on steps, or no server is named.
        """
        if cfg.generator.step_wise_trajectories:
            raise HostError("rewards of tokens need generator.step_wise_trajectories=false; SkyRL drops them otherwise")
        algorithm = cfg.trainer.algorithm
        if algorithm.advantage_estimator in SUMMING and not self.mean:
            remedy = (
                "gae, reinforce++ and tlcr_group keep them (trainer.algorithm.advantage_estimator); or pay the mean: "
                "TokenRewardExp.mean = True"
            )
            logger.warning(summing("SkyRL", algorithm.advantage_estimator, remedy))
        if algorithm.zero_variance_filter:
            logger.warning("SkyRL's trainer.algorithm.zero_variance_filter does nothing where tokens are paid")
        inner = super().get_generator(cfg, tokenizer, inference_engine_client)
        return TokenRewardGenerator(inner, scorer_at(), tokenizer=tokenizer, scale=self.scale, mean=self.mean)


def main(experiment: type[TokenRewardExp] = TokenRewardExp) -> None:
    """What SkyRL's ``main_base`` calls where ``trainer.override_entrypoint`` names this module.

    Args:
        experiment: what is run, ``TokenRewardExp`` or a subclass of it.
    """
    from skyrl.train.config import SkyRLTrainConfig
    from skyrl.train.utils import validate_cfg
    from skyrl.train.utils.utils import initialize_ray

    require("SkyRL", "skyrl", TESTED, NAMES)
    arguments = [one for one in sys.argv[1:] if not one.startswith("trainer.override_entrypoint=")]
    cfg = SkyRLTrainConfig.from_cli_overrides(arguments)
    validate_cfg(cfg)
    scorer_at()  # a missing address is said before GPUs are claimed
    initialize_ray(cfg)
    ray.get(_run.remote(experiment, cfg))


@ray.remote(num_cpus=1)
def _run(experiment: type[TokenRewardExp], cfg: Any) -> None:
    experiment(cfg).run()


if __name__ == "__main__":
    from tlcr.hosts.skyrl import main as main_by_name  # Ray finds classes by their module, which is not __main__

    main_by_name()
