"""slime: three functions that its flags name. ``docs/hosts/slime.md`` has the command line.

    --custom-rm-path tlcr.hosts.slime.reward --reward-key score
    --custom-reward-post-process-path tlcr.hosts.slime.post_process
    --custom-advantage-function-path tlcr.hosts.slime.advantages

slime hands a reward from the sampler to the trainer under one key, which takes a list as well as a number. With
``--advantage-estimator ppo`` the list has the tokens' rewards, and GAE reads the critic. With any other it has
advantages already: the answers to a prompt are together only where they are sampled. slime is no package on an index,
so that it has no version to ask for; what is relied on is looked at in what slime hands over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from tlcr.errors import HostError
from tlcr.hosts.advantages import group_reward_to_go
from tlcr.hosts.contract import Account, Item
from tlcr.hosts.remote import rewards_of, scorer_at

__all__ = ["COMMIT", "REWARDS", "advantages", "post_process", "reward"]

COMMIT = "624b824a898ab0ec1fcb4d373004c7f3852bf515"
"""What the functions were written and run against."""

SCORE, REWARDS = "score", "token_rewards"
"""Where ``sample.reward`` has the number, which is also where slime's own rewards have theirs, and the list."""

_SAMPLE = ("tokens", "response_length", "loss_mask", "reward", "group_index")
_DATA = ("rewards", "kl", "loss_masks", "response_lengths")


async def reward(args: Any, sample: Any, **unused: Any) -> Any:
    """Scores an answer, or a list of them as slime gives with ``--group-rm``: ``--custom-rm-path``.

    Where ``--rm-type`` is set, slime's own reward is asked as well and added at the last token that counts:
    advantages skip the others, such as what a tool put out.

    Args:
        args: slime's.
        sample: slime's, sampled; or several.
        **unused: what slime may add.

    Returns:
        What slime keeps as ``sample.reward``: ``score``, the mean reward of a token plus slime's own; the list; figures
        of it. For several samples a list of these.

    Raises:
        HostError: rewards do not fit the answer, slime's own reward is no number, or ``--reward-key score`` is missing.
    """
    if isinstance(sample, (list, tuple)):
        return list(await asyncio.gather(*(reward(args, one) for one in sample)))
    _require(sample, _SAMPLE, "Sample")
    if args.reward_key != SCORE:
        raise HostError(
            f"--reward-key is {args.reward_key!r}, and slime cannot log a dictionary; set --reward-key {SCORE}"
        )
    item, mask = _item(sample)
    (rewards,) = await rewards_of(scorer_at(), [item])
    figures = Account().add([rewards], [mask]).figures()
    outcome = await _outcome(args, sample)
    counted = [place for place, counts in enumerate(mask) if counts]
    if counted and outcome:
        rewards = [*rewards]
        rewards[counted[-1]] += outcome
    return {SCORE: figures["reward/mean_token"] + outcome, "outcome": outcome, REWARDS: rewards, **figures}


def _item(sample: Any) -> tuple[Item, list[int]]:
    length = sample.response_length
    if not 0 <= length < len(sample.tokens):
        raise HostError(
            f"a sample of slime has {len(sample.tokens)} tokens and a response of {length}; wanted a prompt before it"
        )
    start = len(sample.tokens) - length
    mask = [1] * length if sample.loss_mask is None else list(sample.loss_mask)
    return Item(sample.tokens[:start], sample.tokens[start:], mask), mask


async def _outcome(args: Any, sample: Any) -> float:
    """slime's own reward for the answer, by ``--rm-type``; 0 where none is named."""
    metadata = sample.metadata if isinstance(getattr(sample, "metadata", None), dict) else {}
    if not (metadata.get("rm_type") or getattr(args, "rm_type", None)):
        return 0.0
    from slime.rollout.rm_hub import async_rm

    theirs, plain = copy(args), copy(sample)
    theirs.custom_rm_path = plain.custom_rm_path = None
    found = await async_rm(theirs, plain)
    # "dapo" gives a dictionary, and a server what it likes
    value: Any = found.get(SCORE) if isinstance(found, dict) else found
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise HostError(
            f"slime's own reward, by --rm-type, is {found!r}; wanted a number, or a dictionary with one under {SCORE!r}"
        )
    return float(value)


def post_process(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[list[float]]]:
    """Makes of a batch what travels to the trainer: ``--custom-reward-post-process-path``.

    Args:
        args: slime's: ``advantage_estimator``; without a critic ``gamma``, and ``grpo_std_normalization`` with
            ``rewards_normalization``, which divide the advantages of a group by their root mean square.
        samples: of slime, scored; ``group_index`` is equal for answers to one prompt.

    Returns:
        The scores, for slime's logs, and for each answer a list of one number for each response token.

    Raises:
        HostError: an answer was not scored or changed since, or slime would drop the lists.
    """
    _require_settings(args)
    for sample in samples:
        if not isinstance(sample.reward, dict) or REWARDS not in sample.reward:
            raise HostError(
                f"sample {sample.index} of slime has the reward {sample.reward!r} and no {REWARDS!r}; set "
                "--custom-rm-path tlcr.hosts.slime.reward"
            )
        if len(sample.reward[REWARDS]) != sample.response_length:
            raise HostError(
                f"sample {sample.index} of slime has {sample.response_length} tokens and {len(sample.reward[REWARDS])} "
                "rewards; nothing may change an answer after it is scored"
            )
    scores = [float(sample.reward[SCORE]) for sample in samples]
    rewards = [list(sample.reward[REWARDS]) for sample in samples]
    if args.advantage_estimator == "ppo":
        return scores, rewards
    if any(sample.group_index is None for sample in samples):
        raise HostError(
            "a sample of slime has no group_index; without a critic tlcr compares the answers to one prompt"
        )
    lengths = [len(row) for row in rewards]
    is_scaled = args.rewards_normalization and args.grpo_std_normalization
    advantages_BT = group_reward_to_go(
        _padded([torch.tensor(row, dtype=torch.float64) for row in rewards]),
        _padded([torch.tensor(_item(sample)[1]) for sample in samples]),
        torch.tensor([sample.group_index for sample in samples]),
        gamma=args.gamma,
        normalise="group" if is_scaled else "none",
    )
    return scores, [row[:length].tolist() for row, length in zip(advantages_BT, lengths, strict=True)]


def advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """Sets ``advantages`` and ``returns`` of a batch: ``--custom-advantage-function-path``.

    With a critic: GAE of r_t - kl_coef KL_t, which skips tokens that do not count. Without: what ``post_process`` sent.

    Args:
        args: slime's: ``advantage_estimator``, ``gamma``, ``lambd``, ``kl_coef``.
        rollout_data: slime's; one tensor for each answer under ``kl``, ``values`` and ``loss_masks``.

    Raises:
        HostError: a list does not fit its answer, or slime split answers over several processes.
    """
    _require_settings(args)
    missing = [name for name in _DATA if rollout_data.get(name) is None]
    if missing:
        raise HostError(f"slime's rollout_data has no {missing[0]!r}; tlcr was run with slime at {COMMIT[:7]}")
    kl, lengths = rollout_data["kl"], rollout_data["response_lengths"]
    for number, (row, length, like) in enumerate(zip(rollout_data["rewards"], lengths, kl, strict=True)):
        found = len(row) if isinstance(row, (list, tuple, Tensor)) else "no"
        if found != length or len(like) != length:
            raise HostError(
                f"answer {number} of slime has {length} tokens, {found} rewards and {len(like)} log-ratios; set "
                "--custom-reward-post-process-path tlcr.hosts.slime.post_process"
            )
    sent = [
        torch.as_tensor(row, dtype=torch.float32, device=k.device)
        for row, k in zip(rollout_data["rewards"], kl, strict=True)
    ]
    if args.advantage_estimator != "ppo":
        if args.kl_coef:
            raise HostError("without a critic tlcr pays no KL inside the reward; set --kl-coef 0 and --use-kl-loss")
        rollout_data["advantages"], rollout_data["returns"] = sent, list(sent)
        return
    values = rollout_data.get("values")
    if values is None:
        raise HostError("--advantage-estimator ppo of slime came without values; is the critic configured?")
    from tlcr.ops import fused_gae

    masks = rollout_data["loss_masks"]
    advantages_BT, returns_BT = fused_gae(
        _padded([row - args.kl_coef * k for row, k in zip(sent, kl, strict=True)]),
        _padded([value.float() for value in values]),
        _padded(list(masks)).bool(),
        gamma=args.gamma,
        lam=args.lambd,
    )
    rollout_data["advantages"] = [row[:length] for row, length in zip(advantages_BT, lengths, strict=True)]
    rollout_data["returns"] = [row[:length] for row, length in zip(returns_BT, lengths, strict=True)]


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _require(thing: Any, names: Sequence[str], what: str) -> None:
    missing = [name for name in names if not hasattr(thing, name)]
    if missing:
        raise HostError(f"slime's {what} has no {missing[0]!r}; tlcr was run with slime at {COMMIT[:7]}")


def _require_settings(args: Any) -> None:
    """Refuses what would drop or misplace lists."""
    if getattr(args, "context_parallel_size", 1) > 1:
        raise HostError(
            "slime splits answers over --context-parallel-size processes; tlcr pays whole answers: set it to 1"
        )
    if getattr(args, "megatron_config_path", None) and args.advantage_estimator == "ppo":
        raise HostError(
            "with --megatron-config-path slime's critic ignores --custom-advantage-function-path; name the critic by "
            "slime's other flags"
        )
