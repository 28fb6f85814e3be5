"""verl: agent loops that pay every token, an advantage estimator, and a manager for a discriminator that verl serves.

verl's V1 trainer keeps what an agent loop calls ``rm_scores``, one number for each response token, up to the advantage
estimator; its own loops write one number at the last token. The loops here write the discriminator's rewards. Importing
this module registers all three with verl; the entry point ``verl.plugins`` imports it in every process of a run, by
``verl_plugin``. ``docs/hosts/verl.md`` has the config that a user pastes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput
from verl.experimental.agent_loop.agent_loop import register as register_agent_loop
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.experimental.reward_loop.reward_manager import register as register_reward_manager
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.trainer.ppo.core_algos import register_adv_est

from tlcr.errors import HostError
from tlcr.hosts.advantages import group_reward_to_go
from tlcr.hosts.client import config_for_vllm
from tlcr.hosts.contract import Account, Item, checked
from tlcr.hosts.payment import mean_at_end, numbered, summing
from tlcr.hosts.remote import number, rewards_of, scorer_at

__all__ = [
    "DenseOutput",
    "TokenRewardManager",
    "TokenRewardSingleTurn",
    "TokenRewardTools",
    "compute_score",
    "group_advantages",
]

SUMMING = (
    "grpo",
    "grpo_vectorized",
    "grpo_passk",
    "rloo",
    "rloo_vectorized",
    "reinforce_plus_plus_baseline",
    "opo",
    "gpg",
    "gdpo",
)

logger = logging.getLogger(__name__)


class DenseOutput(AgentLoopOutput):
    """An agent loop's output with a reward for every response token.

    Attributes:
        token_rewards: one for each of ``response_ids``, 0 where ``response_mask`` is 0.
        with_outcome: add verl's own reward, which its reward loop writes at the last token.
    """

    token_rewards: list[float]
    with_outcome: bool

    def as_dict(self) -> dict[str, Any]:
        """What verl stores of the answer.

        Returns:
            The fields of ``AgentLoopOutput.as_dict``, with float32 ``rm_scores`` of one number for each response token.

        Raises:
            HostError: the answer was changed after it was scored.
        """
        fields = super().as_dict()
        rewards_T = torch.tensor(fields.pop("token_rewards"), dtype=torch.float32)
        if rewards_T.shape != fields["response_mask"].shape:
            raise HostError(
                f"an answer of verl has {len(fields['response_mask'])} tokens and {len(rewards_T)} rewards; score it "
                "after the last change to response_ids"
            )
        if fields.pop("with_outcome") and "rm_scores" in fields:
            rewards_T = rewards_T + fields["rm_scores"]
        fields["rm_scores"] = rewards_T
        return fields


class _TokenRewards(AgentLoopBase):
    """What the two loops share: run verl's loop, then score what it answered."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options: Mapping[str, Any] = self.config.get("tlcr") or {}
        self.scale = number("tlcr.scale", options.get("scale", 1.0))
        self.mean, self.with_outcome = (bool(options.get(name, False)) for name in ("mean", "with_outcome"))
        unknown = set(options) - {"url", "scale", "mean", "with_outcome"}
        if unknown:
            raise HostError(
                f"verl's config has no tlcr.{sorted(unknown)[0]}; there are url, scale, mean and with_outcome"
            )
        estimator = (self.config.get("algorithm") or {}).get("adv_estimator")
        if estimator in SUMMING and not self.mean:
            _warn_of_sums(estimator)
        self.scorer = scorer_at(options.get("url"), named_by="+tlcr.url in verl's config")

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """Samples an answer and scores it.

        Args:
            sampling_params: as verl gives them.
            **kwargs: the prompt, as verl gives it.

        Returns:
            The answer with a reward for each token.

        Raises:
            HostError: the answer has no token, or its rewards do not fit it. verl logs it and leaves the answer out.
        """
        output = await super().run(sampling_params, **kwargs)
        if not output.response_ids:
            raise HostError(
                "verl sampled an answer without a token, and has no place for its reward; make it longer by "
                "min_tokens, or keep the end of sequence in the answer"
            )
        item = Item(output.prompt_ids, output.response_ids, output.response_mask)
        (rewards,) = await rewards_of(self.scorer, [item], self.tokenizer)
        account = Account().add([rewards], [output.response_mask]).figures()
        if self.mean:
            rewards = mean_at_end(rewards, output.response_mask)
        paid = [self.scale * reward for reward in rewards]
        fields = {name: getattr(output, name) for name in output.model_fields_set | {"extra_fields"}}
        dense = DenseOutput(**fields, token_rewards=paid, with_outcome=self.with_outcome)
        if not self.with_outcome:
            dense.reward_score = sum(paid)  # a number that stands here keeps verl from asking for another
            dense.extra_fields["reward_extra_info"] = account
        return dense


@lru_cache
def _warn_of_sums(estimator: str) -> None:
    """Once a process: verl builds a loop for each answer."""
    remedy = (
        "algorithm.adv_estimator tlcr_group, gae and reinforce_plus_plus keep them; +tlcr.mean=true pays their mean"
    )
    logger.warning(summing("verl", estimator, remedy))


@register_agent_loop("tlcr_single_turn")
class TokenRewardSingleTurn(_TokenRewards, SingleTurnAgentLoop):
    """verl's ``single_turn_agent``, with a reward for every token."""


@register_agent_loop("tlcr_tools")
class TokenRewardTools(_TokenRewards, ToolAgentLoop):
    """verl's ``tool_agent``, with a reward for every token that the policy wrote and 0 for what tools said."""


@register_adv_est("tlcr_group")
def group_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: Sequence[Any] | None = None,
    reward_baselines: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``tlcr.hosts.advantages.group_reward_to_go`` as an estimator of verl: ``algorithm.adv_estimator=tlcr_group``.

    ``algorithm.gamma`` is verl's own; ``+algorithm.tlcr.normalise``, ``.baseline`` and ``.per_token`` are options of
    that function.

    Args:
        token_level_rewards: (B, T), with verl's KL penalty where ``use_kl_in_reward`` is set.
        response_mask: (B, T), 1 where a token counts.
        config: ``algorithm`` of verl's config.
        index: (B,) the prompt of each answer.
        reward_baselines: of ReMax; not used.

    Returns:
        The advantages (B, T), twice: without a critic nobody reads returns.

    Raises:
        HostError: verl did not say which answers belong together, or an option is unknown.
    """
    if index is None:
        raise HostError("verl did not tell tlcr_group which answers belong together (uid); its V1 trainer does")
    options = dict((config.get("tlcr") if config is not None else None) or {})
    unknown = set(options) - {"normalise", "baseline", "per_token"}
    if unknown:
        raise HostError(
            f"algorithm.tlcr has no option {sorted(unknown)[0]!r}; it has normalise, baseline and per_token"
        )
    gamma = 1.0 if config is None else float(config.get("gamma", 1.0))
    mask_BT = response_mask.bool()
    advantages_BT = group_reward_to_go(token_level_rewards, mask_BT, numbered(index), gamma=gamma, **options)
    return advantages_BT, advantages_BT


@register_reward_manager("tlcr")
class TokenRewardManager(RewardManagerBase):
    """Rewards from a discriminator that verl itself serves beside the policy, on the same GPUs.

    verl serves it by vLLM when ``reward.reward_model.enable`` is set, and asks this manager after sampling
    (``enable_resource_pool`` unset): that way alone takes one number for each token. It hands over no mask, so answers
    with tools are refused; the agent loops take them.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        """Looks at the config before anything is sampled.

        Args:
            config: verl's.
            tokenizer: of the policy.
            compute_score: verl's reward function; not used.
            reward_router_address: HOST:PORT of the servers that verl started.
            reward_model_tokenizer: of the discriminator.

        Raises:
            HostError: the config has verl drop the rewards of tokens, the two tokenizers differ, or vLLM would serve
                the discriminator with other rewards.
        """
        super().__init__(config, tokenizer, compute_score)
        model = config.reward.reward_model
        if not model.enable or model.enable_resource_pool:
            raise HostError(
                "the reward manager tlcr needs reward.reward_model.enable=True and enable_resource_pool=False, since "
                "verl's other ways take one number an answer; for a server of your own use the agent loop "
                "tlcr_single_turn"
            )
        if config.actor_rollout_ref.rollout.multi_turn.enable:
            raise HostError(
                "the reward manager tlcr cannot tell what tools said from what the policy said, since verl hands it no "
                "mask; set reward.reward_model.enable=False and use the agent loop tlcr_tools"
            )
        if reward_model_tokenizer is None or tokenizer.get_vocab() != reward_model_tokenizer.get_vocab():
            raise HostError(
                f"the discriminator {model.model_path!r} and the policy do not share a tokenizer, and verl hands over "
                "ids; train the discriminator with the policy's tokenizer"
            )
        config_for_vllm(Path(model.model_path))
        self.scorer = scorer_at(f"http://{reward_router_address}")

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Scores one answer.

        Args:
            data: a batch of one row: ``prompts``, ``responses`` and the ``attention_mask`` of both.

        Returns:
            The rewards of the answer's tokens as ``reward_score``.
        """
        item = _item(data, len(data) - 1)
        (rewards,) = await rewards_of(self.scorer, [item])
        figures = Account().add([rewards], [[1] * len(rewards)]).figures()
        return {"reward_score": rewards, "reward_extra_info": figures}

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: list[list[float]]) -> Tensor:
        """The rewards of a batch.

        Args:
            data: what was scored.
            scores: the ``reward_score`` of each row.

        Returns:
            float32 (B, T), index t at response token t.
        """
        rows = checked(scores, [_item(data, row) for row in range(len(data))])
        answers_BT = data.batch["responses"]
        rewards_BT = torch.zeros_like(answers_BT, dtype=torch.float32)
        for row, rewards in enumerate(rows):
            counted_T = data.batch["attention_mask"][row, -answers_BT.shape[1] :].bool()
            rewards_BT[row, counted_T] = torch.tensor(rewards, device=rewards_BT.device)
        return rewards_BT


def _item(data: Any, row: int) -> Item:
    """One row of a batch of verl, whichever side it is padded on."""
    prompt, answer, mask = (data.batch[name][row] for name in ("prompts", "responses", "attention_mask"))
    counted = mask.bool()
    return Item(prompt[counted[: len(prompt)]].tolist(), answer[counted[len(prompt) :]].tolist())


def compute_score(*args: Any, **kwargs: Any) -> float:
    """What ``reward.custom_reward_function.path`` has to name so that verl asks the manager; nobody calls it.

    Args:
        *args: unused.
        **kwargs: unused.

    Returns:
        Nothing.

    Raises:
        HostError: verl called it, because another reward manager is set.
    """
    raise HostError("tlcr.hosts.verl.compute_score is a name for the config; set reward.reward_manager.name=tlcr")
