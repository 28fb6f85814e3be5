"""TRL: a reward function for its trainers, and a mixin with which GRPOTrainer keeps a reward for every token.

    from trl import GRPOConfig, GRPOTrainer
    from tlcr.hosts.client import RewardClient
    from tlcr.hosts.trl import TokenReward, TokenRewardMixin

    class Trainer(TokenRewardMixin, GRPOTrainer): ...

    reward = TokenReward(RewardClient("http://localhost:8000"), tokenizer)
    Trainer(model=..., reward_funcs=[reward], args=GRPOConfig(...), train_dataset=...).train()

TRL's loss takes advantages (B,) or (B, T), the second "to support subclasses". Column t is completion token t; prompts
are padded on the left, completions on the right.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tlcr.errors import ConfigError, HostError, HostWarning
from tlcr.hosts.contract import Account, Item, Scorer, checked
from tlcr.hosts.guard import require

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from tlcr.hosts.advantages import Baseline, Normalise

__all__ = ["TESTED", "TokenReward", "TokenRewardMixin"]

TESTED = ">=1.11.0,<=1.16.0"
"""The versions of TRL that this module was run with, both ends among them."""

NAMES = {
    "trl:GRPOTrainer._generate": "self, prompts",
    "trl:GRPOTrainer._calculate_rewards": "self, inputs, prompts, completions, completion_ids_list",
    "trl:GRPOTrainer._generate_and_score_completions": "self, inputs",
    "trl:GRPOTrainer._compute_loss": "self, model, inputs",
}

PROMPT_COLUMN, MASK_COLUMN = "prompt_token_ids", "completion_token_mask"
"""Columns that the mixin adds to those of the dataset: the ids and the mask that no reward function is given."""


class TokenReward:
    """A reward function: its number for an answer is the mean of its tokens' rewards, and it keeps the rewards.

    A stock ``GRPOTrainer`` or ``RLOOTrainer`` takes the number. With ``TokenRewardMixin`` every token is paid its own
    reward, and the number is only logged, as ``rewards/token_reward/mean``.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reduce: Literal["mean", "sum"] = "mean",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """A reward function on a scorer.

        Args:
            scorer: ``tlcr.hosts.client.RewardClient`` or ``tlcr.hosts.local.LocalScorer``.
            tokenizer: the policy's, as the trainer has it. A stock trainer gives reward functions no ids of prompts;
                they are then encoded as it encodes them. The mixin gives the ids.
            reduce: the number of an answer for a stock trainer.
            chat_template_kwargs: those of the trainer's config, if it has any.

        Raises:
            ConfigError: ``reduce`` is something else.

        Warns:
            HostWarning: ``reduce`` is a sum, which pays for length.
        """
        if reduce not in ("mean", "sum"):
            raise ConfigError(f"reduce is {reduce!r}; wanted mean or sum")
        if reduce == "sum":
            warnings.warn(
                "a sum of token rewards pays for length: where rewards are above 0 on average, longer answers win. "
                "Take reduce='mean', or TokenRewardMixin, which keeps every token's reward",
                HostWarning,
                stacklevel=2,
            )
        self.scorer, self.tokenizer, self.reduce = scorer, tokenizer, reduce
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._checked = False
        self.__name__ = "token_reward"  # what TRL's metrics call it
        self.scored: list[tuple[Item, list[float]]] | None = None
        """The answers of the last call with their rewards, in its order."""

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Scores the answers, as TRL calls a reward function.

        Args:
            prompts: texts or messages.
            completions: the same, which only tell whether there are tools.
            completion_ids: the sampled ids.
            log_metric: takes the figures of ``tlcr.hosts.contract.Account``.
            log_extra: takes a column ``token_rewards`` for the table of completions.
            **columns: the other columns; the mixin's two are read.

        Returns:
            One number for each answer: the mean, or the sum, of the rewards of its counted tokens; 0 for none.

        Raises:
            HostError: the prompts have images, tools spoke and no mask says where, the discriminator has another
                tokenizer, or the scorer breaks the contract.
        """
        self.scored = None
        self._require_one_vocabulary()
        if any(columns.get(name) is not None for name in ("image", "images")):
            raise HostError("the prompts have images, and a discriminator of tokens cannot read them")
        masks: Sequence[Sequence[int] | None] = columns.get(MASK_COLUMN) or [None] * len(completion_ids)
        if MASK_COLUMN not in columns and any(_has_tools(completion) for completion in completions):
            raise HostError(
                "answers hold messages of tools, and a stock trainer does not tell a reward function which tokens are "
                "theirs; train with class Trainer(TokenRewardMixin, GRPOTrainer), which does"
            )
        prompt_ids = columns.get(PROMPT_COLUMN) or self.prompt_ids(prompts)
        items = [
            Item(list(prompt), list(ids), mask)
            for prompt, ids, mask in zip(prompt_ids, completion_ids, masks, strict=True)
        ]
        rewards = checked(self.scorer.token_rewards(items), items)
        self.scored = list(zip(items, rewards, strict=True))
        if log_metric is not None:
            figures = Account().add(rewards, [item.counted for item in items]).figures()
            for name, value in figures.items():
                log_metric(name, value)
        if log_extra is not None:
            log_extra("token_rewards", [[round(reward, 3) for reward in row] for row in rewards])
        sums = [sum(row) for row in rewards]
        return sums if self.reduce == "sum" else [s / max(sum(i.counted), 1) for s, i in zip(sums, items, strict=True)]

    def _require_one_vocabulary(self) -> None:
        """Asks the scorer once whether the policy's ids mean to it what they mean to the policy."""
        check = None if self._checked else getattr(self.scorer, "check_tokenizer", None)
        if check is not None:
            check(self.tokenizer)
        self._checked = True

    def prompt_ids(self, prompts: Sequence[Any]) -> list[list[int]]:
        """The ids of prompts, encoded as TRL's trainers encode them.

        Args:
            prompts: texts, or messages for the chat template.

        Returns:
            One list of ids for each prompt.
        """
        if all(isinstance(prompt, str) for prompt in prompts):
            ids: Any = self.tokenizer(text=list(prompts))["input_ids"]
        else:
            rendered: Any = self.tokenizer.apply_chat_template(
                conversation=list(prompts),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **self.chat_template_kwargs,
            )
            ids = rendered["input_ids"]
        return [list(row) for row in ids]


def _has_tools(completion: Any) -> bool:
    return not isinstance(completion, str) and any(message.get("role") == "tool" for message in completion)


class TokenRewardMixin:
    """Stands before ``GRPOTrainer`` among a class's bases and gives every token its own advantage::

        advantages[b, t] = scalar[b] + w * A[b, t]        A: ``tlcr.hosts.advantages.group_reward_to_go``

    ``scalar`` is what TRL makes of the other reward functions, and w the weight of the ``TokenReward`` among
    ``GRPOConfig.reward_weights`` (1 by default). The weight is taken out of TRL's own sum, so that nothing is paid
    twice; TRL's metric ``reward`` is that of the other functions therefore. Groups are whole even where processes
    share them.
    """

    accelerator: Any
    model: Any
    num_generations: int
    num_generations_eval: int
    reward_funcs: Sequence[Any]
    reward_weights: Tensor

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if any(_is_of_trl(base) for base in cls.__mro__):
            _require_fits(cls)

    def __init__(
        self,
        *args: Any,
        gamma: float = 1.0,
        normalise: Normalise = "batch",
        baseline: Baseline = "position",
        per_token: bool = False,
        **options: Any,
    ) -> None:
        """The trainer's own arguments, and those of ``group_reward_to_go``.

        Args:
            *args: the trainer's.
            gamma: the discount.
            normalise: what token advantages are scaled over.
            baseline: what is subtracted from reward-to-go.
            per_token: rewards become shares of their answer's mean.
            **options: the trainer's.

        Raises:
            HostError: this is no GRPOTrainer of a version that fits, its loss takes one advantage an answer, or its
                reward functions do not have one ``TokenReward`` among them.

        Warns:
            HostWarning: importance sampling is by answer, which turns the advantages of tokens into their mean.
        """
        _require_fits(type(self))
        super().__init__(*args, **options)
        self._token_options: dict[str, Any] = {
            "gamma": gamma,
            "normalise": normalise,
            "baseline": baseline,
            "per_token": per_token,
        }
        if getattr(self, "use_liger_kernel", False):
            raise HostError("Liger's GRPO loss takes one advantage for an answer; set use_liger_kernel=False")
        if getattr(self, "importance_sampling_level", "token") == "sequence":
            warnings.warn(
                "importance_sampling_level='sequence' gives every token of an answer the mean of the answer's "
                "advantages, which undoes token rewards; set 'token'",
                HostWarning,
                stacklevel=2,
            )
        found = [i for i, function in enumerate(self.reward_funcs) if isinstance(function, TokenReward)]
        if len(found) != 1:
            raise HostError(
                f"reward_funcs has {len(found)} TokenReward; TokenRewardMixin takes its token rewards from one of them"
            )
        self._token_reward: TokenReward = self.reward_funcs[found[0]]
        self._token_weight = float(self.reward_weights[found[0]])
        self.reward_weights[found[0]] = 0

    def _generate(self, prompts: list[Any]) -> Any:
        generated = super()._generate(prompts)  # type: ignore[misc]
        self._prompt_ids, completion_ids, tool_masks = generated[:3]
        self._masks = tool_masks if tool_masks is not None else [[1] * len(ids) for ids in completion_ids]
        return generated

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        inputs = [
            {**example, PROMPT_COLUMN: prompt, MASK_COLUMN: mask}
            for example, prompt, mask in zip(inputs, self._prompt_ids, self._masks, strict=True)
        ]
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # type: ignore[misc]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._token_reward.scored = None
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        mask_BT = batch["completion_mask"]
        if "tool_mask" in batch:
            mask_BT = mask_BT * batch["tool_mask"]
        dense_BT = self._token_weight * self._token_advantages(batch["completion_ids"])
        batch["advantages"] = (batch["advantages"][:, None] + dense_BT) * mask_BT
        return batch

    def _token_advantages(self, completion_ids_BT: Tensor) -> Tensor:
        """(B, T), of the answers of this process, each compared with its whole group."""
        import torch

        from tlcr.hosts.advantages import group_reward_to_go

        rewards_BT, counts_BT = _as_tensors(self._token_reward.scored, completion_ids_BT)
        B, T = rewards_BT.shape
        # padded to the longest of all processes; every process then computes the same
        wide = self.accelerator.pad_across_processes(torch.stack([rewards_BT, counts_BT]), dim=2)
        all_BT, counted_BT = self.accelerator.gather(wide.transpose(0, 1).contiguous()).unbind(1)
        size = self.num_generations if self.model.training else self.num_generations_eval
        group_B = torch.arange(len(all_BT), device=all_BT.device) // size
        advantages_BT = group_reward_to_go(all_BT, counted_BT, group_B, **self._token_options)
        first = self.accelerator.process_index * B
        return advantages_BT[first : first + B, :T]


def _as_tensors(scored: list[tuple[Item, list[float]]] | None, completion_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards and mask (B, T) float32, after a look at whether they belong to the completions of the batch."""
    import torch

    if scored is None:
        raise HostError("the trainer did not call its TokenReward for this batch; give the object itself, not wrapped")
    if len(scored) != len(completion_ids_BT):
        raise HostError(f"{len(scored)} answers were scored, and the batch has {len(completion_ids_BT)}")
    rewards_BT = torch.zeros(completion_ids_BT.shape)
    counts_BT = torch.zeros(completion_ids_BT.shape)
    for row, (ids, (item, rewards)) in enumerate(zip(completion_ids_BT.tolist(), scored, strict=True)):
        n = len(item.response_ids)
        if ids[:n] != list(item.response_ids):
            raise HostError(
                f"answer {row} of the batch has other ids than the {n} that were scored; something between the reward "
                "function and the loss reorders or cuts answers"
            )
        rewards_BT[row, :n] = torch.tensor(rewards)
        counts_BT[row, :n] = torch.tensor(item.counted, dtype=torch.float32)
    return rewards_BT.to(completion_ids_BT.device), counts_BT.to(completion_ids_BT.device)


# ---- whether a trainer fits


def _is_of_trl(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "trl"


def _require_fits(cls: type) -> None:
    """Refuses a class that would train on something else than its token rewards."""
    require("TRL", "trl", TESTED, NAMES)
    from trl import GRPOTrainer

    trainer = next((base for base in cls.__mro__ if _is_of_trl(base)), cls)
    if not issubclass(cls, GRPOTrainer):
        raise HostError(
            f"{trainer.__name__} takes one advantage for an answer, not one for a token; write class "
            "Trainer(TokenRewardMixin, GRPOTrainer), or give it a TokenReward as a reward function and no mixin: it "
            "then takes the mean"
        )
    if trainer is not GRPOTrainer and "_compute_loss" in vars(trainer):
        raise HostError(
            f"{trainer.__name__} computes its loss from one advantage for an answer; write class Trainer("
            "TokenRewardMixin, GRPOTrainer)"
        )
    if cls.__mro__.index(TokenRewardMixin) > cls.__mro__.index(GRPOTrainer):
        raise HostError(
            f"TokenRewardMixin stands behind GRPOTrainer among the bases of {cls.__name__}, where it does nothing; "
            "write class Trainer(TokenRewardMixin, GRPOTrainer)"
        )
    # Without this line (B, T) advantages become (B, 1, T), and the loss broadcasts them without an error.
    if "if advantages.dim() == 1:" not in inspect.getsource(GRPOTrainer._compute_loss):
        raise HostError(
            f"the loss of this TRL does not say any more that it takes an advantage for every token; pip install "
            f"'trl{TESTED}'"
        )
