"""ms-swift: a GRPO trainer whose advantages are per token, and a reward function that reports their mean.

A plugin file of one line, ``import tlcr.hosts.swift``, and ``--external_plugins FILE --reward_funcs tlcr
--reward_weights 0``. ms-swift puts the plugin's folder at the head of the path, so that the file must be the user's
own: beside this module it would hide ms-swift's packages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from swift.rewards.orm import ORM, orms
from swift.rlhf_trainers import GRPOTrainer
from swift.rlhf_trainers.utils import encode_sample
from swift.trainers.trainer_factory import TrainerFactory
from torch import Tensor

from tlcr.errors import HostError
from tlcr.hosts.advantages import group_reward_to_go
from tlcr.hosts.contract import Account, Item
from tlcr.hosts.guard import require
from tlcr.hosts.payment import numbered
from tlcr.hosts.remote import rewards_of, scorer_at

__all__ = ["NAMES", "TESTED", "TokenRewardGRPOTrainer", "TokenRewardMean", "lay_out", "register"]

TESTED = ">=4.6.0,<=4.6.0"
_TRAINER = "swift.rlhf_trainers:GRPOTrainer"
NAMES = {
    f"{_TRAINER}._score_completions": "self, samples",
    f"{_TRAINER}._postprocess_batch": "self, samples, batch_encoded_inputs",
    f"{_TRAINER}._template_context": None,
    f"{_TRAINER}.split_by_mini_batches": "self, samples",
    "swift.rlhf_trainers.utils:encode_sample": "sample, template",
    "swift.rl_core.data:GRPOBatch": None,
    "swift.rewards.orm:orms": None,
    "swift.trainers.trainer_factory:TrainerFactory.TRAINER_MAPPING": None,
}
"""What this module overrides or calls."""

REWARDS, MASK, IDS = "tlcr_token_rewards", "tlcr_mask", "tlcr_ids"
"""Where a sample of ms-swift carries its rewards, one a token of the answer, which of them count, and their ids."""

PLUGIN = "tlcr"
"""The name of the reward function."""

NORMALISE = {"group": "group", "batch": "batch", "none": "none", "True": "group", "False": "none"}
"""``--scale_rewards`` of ms-swift, in the words of ``group_reward_to_go``."""


class TokenRewardMean(ORM):
    """The mean reward of an answer's tokens, for ms-swift's logs; with weight 0, since the trainer pays each token."""

    def __call__(self, completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """Reports what the trainer scored.

        Args:
            completions: the answers' texts.
            **kwargs: what ms-swift gives reward functions; the trainer's rewards among it.

        Returns:
            One number for each answer.

        Raises:
            HostError: another trainer asks, which would pay answers and no token.
        """
        rewards, masks = kwargs.get(REWARDS), kwargs.get(MASK)
        if rewards is None or masks is None:
            raise HostError(
                "the reward function tlcr reports what tlcr's GRPO trainer scored, and another trainer asks; use "
                "--rlhf_type grpo without Megatron and without Ray"
            )
        return [sum(row) / max(sum(mask), 1) for row, mask in zip(rewards, masks, strict=True)]


class TokenRewardGRPOTrainer(GRPOTrainer):
    """ms-swift's GRPO trainer, which adds the reward-to-go of every token, centred in its group, to its own advantages.

    ms-swift's own come from ``--reward_funcs``, one number for an answer; ``--scale_rewards`` normalises both.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weights = dict(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True))
        paid = [name for name, weight in weights.items() if name == TokenRewardMean.__name__ and weight]
        if paid:
            raise HostError(
                "--reward_weights pays the mean of the rewards beside the rewards themselves; give the function tlcr "
                "the weight 0, as in --reward_funcs tlcr --reward_weights 0"
            )
        if self.template.sequence_parallel_size > 1:
            raise HostError("tlcr pays whole answers; set --sequence_parallel_size 1")
        if self.template.padding_free:
            raise HostError("tlcr finds tokens by their column in padded rows; set --padding_free false")
        if self.dynamic_sample:
            raise HostError("--dynamic_sample drops groups by rewards of answers, which are 0 here; set it to false")
        self.scorer = scorer_at()

    def _score_completions(self, samples: list[Any]) -> list[Any]:
        items = []
        with self._template_context(self.template):
            for sample in samples:
                encoded = encode_sample(sample, self.template)
                items.append(_item(encoded["input_ids"], encoded["labels"]))
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        rewards = asyncio.run(rewards_of(self.scorer, items, tokenizer))
        for sample, item, row in zip(samples, items, rewards, strict=True):
            mask = item.counted
            counted = [token for token, counts in zip(item.response_ids, mask, strict=True) if counts]
            sample.extra.update({REWARDS: row, MASK: mask, IDS: counted})
        mode = "train" if self.model.training else "eval"
        for name, value in Account().add(rewards, [item.counted for item in items]).figures().items():
            self._metrics[mode][f"tlcr/{name}"].append(value)
        return list(super()._score_completions(samples))

    def _postprocess_batch(self, samples: list[Any], batch_encoded_inputs: list[dict[str, Any]]) -> None:
        super()._postprocess_batch(samples, batch_encoded_inputs)
        local = [(sample.prompt_id, sample.extra[REWARDS], sample.extra[MASK]) for sample in samples]
        everywhere = gather_object(local)
        sizes = gather_object([len(local)])
        start = sum(sizes[: self.accelerator.process_index])
        advantages = group_advantages(everywhere, str(self.scale_rewards))[start : start + len(samples)]
        paid = dict(zip(map(id, samples), advantages, strict=True))
        chunks = self.split_by_mini_batches(samples)
        for chunk, batch in zip(chunks, batch_encoded_inputs, strict=True):
            grpo_batch = batch["grpo_batch"]
            ids_BL = batch["model_inputs"]["input_ids"]
            width = grpo_batch.completion_mask.shape[1]
            grpo_batch.advantages = grpo_batch.advantages + lay_out(
                [paid[id(sample)] for sample in chunk],
                [sample.extra[IDS] for sample in chunk],
                grpo_batch.completion_mask,
                ids_BL[:, ids_BL.shape[1] - width :],
            ).to(grpo_batch.advantages)


def _item(ids: Sequence[int], labels: Sequence[int]) -> Item:
    """What ms-swift encoded; a label of -100 stands at each token that the policy did not write."""
    counted = [label != -100 for label in labels]
    if True not in counted or counted[0]:
        raise HostError(
            "ms-swift encoded an answer without a token of its own, or a prompt without any; look at "
            "--max_completion_length and --truncation_strategy"
        )
    start, end = counted.index(True), len(counted) - counted[::-1].index(True)
    return Item(ids[:start], ids[start:end], counted[start:end])


def group_advantages(answers: Sequence[tuple[str, list[float], list[bool]]], scale_rewards: str) -> list[Tensor]:
    """The advantage of every token that counts.

    Args:
        answers: of all processes: the prompt's name, the rewards of the answer's tokens, and which of them count.
        scale_rewards: of ms-swift's config: group, batch or none.

    Returns:
        For each answer one number for each of its tokens that count.

    Raises:
        HostError: ms-swift names another way to scale.
    """
    if scale_rewards not in NORMALISE:
        raise HostError(f"--scale_rewards is {scale_rewards!r}; tlcr knows group, batch and none")
    pad = torch.nn.utils.rnn.pad_sequence
    rewards_BT = pad([torch.tensor(rewards, dtype=torch.float64) for _, rewards, _ in answers], batch_first=True)
    mask_BT = pad([torch.tensor(mask, dtype=torch.bool) for _, _, mask in answers], batch_first=True)
    group = numbered(name for name, _, _ in answers)
    advantages_BT = group_reward_to_go(rewards_BT, mask_BT, group, normalise=NORMALISE[scale_rewards])  # type: ignore[arg-type]
    return [row[mask] for row, mask in zip(advantages_BT, mask_BT, strict=True)]


def lay_out(values: Sequence[Tensor], ids: Sequence[Sequence[int]], mask_BT: Tensor, ids_BT: Tensor) -> Tensor:
    """Puts values at their tokens in ms-swift's frame, after a look whether the tokens are the same.

    Args:
        values: for each answer one number for each counted token.
        ids: these tokens.
        mask_BT: ms-swift's completion mask.
        ids_BT: the ids in the same columns.

    Returns:
        (B, T), 0 where the mask is.

    Raises:
        HostError: another token stands where a value belongs.
    """
    laid_BT = torch.zeros(mask_BT.shape, dtype=torch.float32, device=mask_BT.device)
    for row, (value, expected) in enumerate(zip(values, ids, strict=True)):
        counted_T = mask_BT[row].bool()
        found = ids_BT[row][counted_T].tolist()
        if found != list(expected):
            raise HostError(
                f"ms-swift's batch has {len(found)} tokens of answer {row} where {len(expected)} were scored, or "
                "others in their places; see the versions that tlcr was tested with"
            )
        laid_BT[row, counted_T] = value.to(laid_BT)
    return laid_BT


def register() -> None:
    """Names the reward function and the trainer to ms-swift, in this process."""
    require("ms-swift", "ms-swift", TESTED, NAMES)
    orms.update({PLUGIN: TokenRewardMean})
    trainer = f"{TokenRewardGRPOTrainer.__module__}.{TokenRewardGRPOTrainer.__name__}"
    TrainerFactory.TRAINER_MAPPING.update(grpo=trainer)


register()
