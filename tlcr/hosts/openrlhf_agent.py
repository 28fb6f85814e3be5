"""OpenRLHF's executor that scores every token of what it sampled: ``--train.agent_func_path`` of a run.

It runs in the processes of the vLLM engines, and hands the rewards on in ``extra_logs``, the one field that OpenRLHF
carries as a list. A list under ``reward`` would be taken too, and rows of other answers read from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openrlhf.utils.agent import AgentExecutorBase, SingleTurnAgentExecutor

from tlcr.credentials import without_secrets
from tlcr.errors import HostError
from tlcr.hosts.contract import Account, Item
from tlcr.hosts.remote import rewards_of, scorer_at

__all__ = ["OUTCOME", "REWARDS", "AgentExecutor", "TokenRewards"]

REWARDS, OUTCOME = "tlcr_token_rewards", "tlcr_outcome"
"""What ``tlcr.hosts.openrlhf`` finds in ``info``: a reward for every action, and one for the answer as a whole."""


class TokenRewards(AgentExecutorBase):
    """Put before an executor of OpenRLHF: ``class AgentExecutor(TokenRewards, SingleTurnAgentExecutor)``."""

    async def outcome(self, response: Mapping[str, Any]) -> float:
        """A reward for the answer as a whole, beside those of the tokens; yours to override.

        Args:
            response: what the executor returns, ``prompt``, ``label`` and ``observation_tokens`` among it.

        Returns:
            What is paid at the last token; by default the ``reward`` of the executor, 0 where nobody was to give one.

        Raises:
            HostError: the executor was to ask for a reward and got none; OpenRLHF itself logs that and goes on.
        """
        reward, asked = response["reward"], getattr(self, "reward_endpoints", None)
        if reward is None and asked:
            raise HostError(
                f"OpenRLHF's executor got no reward from {', '.join(without_secrets(str(one)) for one in asked)}; its "
                "log says why, at the level of INFO"
            )
        return 0.0 if reward is None else float(reward)

    async def execute(
        self,
        prompt: Any,
        label: Any,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:
        """Samples an answer and scores its tokens; OpenRLHF calls it once for each.

        Args:
            prompt: as OpenRLHF gives it, like all that follows.
            label: the same.
            sampling_params: the same.
            max_length: OpenRLHF keeps so many tokens of prompt and answer, from the left.
            hf_tokenizer: the same.
            llm_engine: the same.
            images: the same.

        Returns:
            The response. Its ``reward`` and ``scores`` are the mean reward of a token plus the outcome, for OpenRLHF's
            logs, evaluation and dynamic filtering; training pays what stands in ``extra_logs``.

        Raises:
            HostError: the answer has no token, its rewards do not fit it, or ``outcome`` raises it. It ends the run.
        """
        response = await super().execute(prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images)
        tokens, ranges = list(response["observation_tokens"]), response["action_ranges"]
        start, end = (ranges[0][0], ranges[-1][1]) if ranges else (len(tokens), len(tokens))
        if not any(last > first for first, last in ranges) or not start:
            raise HostError(
                f"OpenRLHF sampled {end - start} tokens after a prompt of {start}, and wants one of each at least; set "
                "--rollout.max_new_tokens and --data.max_len so that there is room for an answer"
            )
        mask = [0] * (end - start)
        for first, last in ranges:
            mask[first - start : last - start] = [1] * (last - first)
        (rewards,) = await rewards_of(scorer_at(), [Item(tokens[:start], tokens[start:end], mask)], hf_tokenizer)
        actions = [0.0] * (len(tokens) - 1)  # column p - 1 is the action that emits the token at p
        actions[start - 1 : end - 1] = rewards
        outcome = await self.outcome(response)
        figures = Account().add([rewards], [mask]).figures()
        logs = {f"tlcr/{name.replace('/', '_')}": value for name, value in figures.items()}
        response["extra_logs"] = {
            **(response["extra_logs"] or {}),
            **logs,
            REWARDS: actions[: max_length - 1],
            OUTCOME: outcome,
        }
        response["reward"] = response["scores"] = figures["reward/mean_token"] + outcome
        return response


class AgentExecutor(TokenRewards, SingleTurnAgentExecutor):
    """OpenRLHF's single-turn executor, with a reward for every token."""
