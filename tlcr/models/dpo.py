"""Policies whose log-ratio is a reward: direct preference optimisation (Rafailov et al. 2023) and its relatives.

The policy that maximises a reward under a KL penalty has r(x, a) = beta log pi(a | x) / pi_ref(a | x), up to a term
that depends on the prompt only. DPO fits that r to comparisons; an implicit process reward model (Yuan et al. 2024,
arXiv 2412.01981) fits it to what each answer is by itself, good or bad. Either way the log-ratio of each token is a
reward for that action, which PPO can use (RTO, Zhong et al. 2024, arXiv 2404.18922; PRIME, Cui et al. 2025, arXiv
2502.01456).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softplus
from transformers import PreTrainedModel

from tlcr.models.logits import answer_logprobs
from tlcr.text.padding import collate_completions
from tlcr.training.distributed import process_count, process_index, sum_over_processes
from tlcr.training.sharding import as_forward, device_of, is_sharded
from tlcr.training.supervised import LossParts, ranking_loss
from tlcr.types import EncodedComparison


@dataclass(frozen=True)
class ReferencedComparison:
    """A preference pair with the reference's log-probability of either answer, in nats."""

    comparison: EncodedComparison
    ref_chosen: float
    ref_rejected: float

    @property
    def length(self) -> int:
        return self.comparison.length


def collate_referenced(pairs: Sequence[ReferencedComparison], *, pad_token_id: int) -> dict[str, Tensor]:
    """The chosen answers, then the rejected ones, as rows padded on the right.

    Args:
        pairs: comparisons with their log-probabilities under the reference.
        pad_token_id: the id that fills padding.

    Returns:
        ``ids`` and ``attention_mask`` (2B, L), ``answer_mask`` (2B, K) over the last K columns, ``ref_logprobs`` (2B,).
    """
    answers = [pair.comparison.chosen for pair in pairs] + [pair.comparison.rejected for pair in pairs]
    references = [pair.ref_chosen for pair in pairs] + [pair.ref_rejected for pair in pairs]
    return {**collate_completions(answers, pad_token_id=pad_token_id), "ref_logprobs": torch.tensor(references)}


def dpo_loss(model: PreTrainedModel, batch: dict[str, Tensor], *, beta: float) -> LossParts:
    """``ranking_loss`` of r_chosen - r_rejected (DPO, eq. 7), where::

        r = beta (log pi(a | x) - log pi_ref(a | x))

    The log-probability of an answer is the sum over its tokens, its end of sequence among them.

    Args:
        model: the policy that is trained.
        batch: what ``collate_referenced`` returns.
        beta: strength of the KL penalty: a smaller beta lets the policy move farther from the reference.

    Returns:
        The sums of the loss. Statistics beside those of ``ranking_loss`` are reward_chosen and reward_rejected, the
        means of r. Where both fall while the margin grows, both answers lose probability.
    """
    return _ranked(model, batch, beta)[0]


def outcome_loss(model: PreTrainedModel, batch: dict[str, Tensor], *, beta: float) -> LossParts:
    """The cross entropy of each answer by itself, with r = beta (log pi(a | x) - log pi_ref(a | x)) as its logit::

        -log sigmoid(r_chosen) - log sigmoid(-r_rejected)

    Source: Yuan et al. 2024 (arXiv 2412.01981), their cross-entropy loss; a chosen answer is good and a rejected one
    bad. Unlike the loss of DPO it says where 0 is: a good answer gains probability, whatever the other one does.

    Args:
        model: the policy that is trained.
        batch: what ``collate_referenced`` returns.
        beta: factor on the log-ratio.

    Returns:
        The sums of the loss over answers, two of a pair, with the statistics of ``dpo_loss``. Accuracy is that of the
        pairs, so that both losses can be compared.
    """
    parts, chosen_B, rejected_B = _ranked(model, batch, beta)
    return replace(
        parts, total=softplus(-chosen_B).sum() + softplus(rejected_B).sum(), weight=len(chosen_B) + len(rejected_B)
    )


LOSSES: dict[str, Callable[..., LossParts]] = {"pairs": dpo_loss, "outcomes": outcome_loss}
"""By the names of ``dpo.loss``."""


@torch.no_grad()
def with_reference(
    model: PreTrainedModel, comparisons: Sequence[EncodedComparison], *, pad_token_id: int, batch_size: int
) -> list[ReferencedComparison]:
    """The comparisons with ``model``'s log-probabilities, computed once: training does not need the reference.

    Args:
        model: the reference.
        comparisons: tokenised preference pairs.
        pad_token_id: what stands in padding.
        batch_size: comparisons at a time on a process; the processes share the work.

    Returns:
        The comparisons in their order.
    """
    totals_N2 = torch.zeros(len(comparisons), 2, dtype=torch.float64)
    mine = range(process_index(), len(comparisons), process_count())
    by_length = sorted(mine, key=lambda i: -comparisons[i].length)
    device = device_of(model)
    # Each forward pass of a sharded model is one of all processes: one that has fewer rows repeats the first.
    own = math.ceil(len(comparisons) / process_count()) if is_sharded(model) else len(by_length)
    for start in range(0, own, batch_size):
        rows = by_length[start : start + batch_size]
        answers = [comparisons[i].chosen for i in rows or [0]] + [comparisons[i].rejected for i in rows or [0]]
        batch = {
            name: tensor.to(device) for name, tensor in collate_completions(answers, pad_token_id=pad_token_id).items()
        }
        totals_B = as_forward(model, partial(_answer_totals, model, batch)).double().cpu()
        if rows:
            totals_N2[rows] = torch.stack(totals_B.chunk(2), dim=1)
    return [
        ReferencedComparison(comparison, *totals)
        for comparison, totals in zip(comparisons, sum_over_processes(totals_N2).tolist(), strict=True)
    ]


def _ranked(model: PreTrainedModel, batch: dict[str, Tensor], beta: float) -> tuple[LossParts, Tensor, Tensor]:
    """The loss of DPO with its statistics, and r of the chosen and of the rejected answers."""
    rewards_B = beta * (_answer_totals(model, batch) - batch["ref_logprobs"])
    chosen_B, rejected_B = rewards_B.chunk(2)
    parts, pairs = ranking_loss(chosen_B - rejected_B), len(chosen_B)
    rewards = {
        "reward_chosen": (chosen_B.sum().detach(), pairs),
        "reward_rejected": (rejected_B.sum().detach(), pairs),
    }
    return replace(parts, statistics={**parts.statistics, **rewards}), chosen_B, rejected_B


def _answer_totals(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """(B,) the log-probability of each answer."""
    answer_mask_BK = batch["answer_mask"]
    logprobs_BK = answer_logprobs(model, batch["ids"], batch["attention_mask"], answer_mask_BK.shape[1])
    return torch.where(answer_mask_BK, logprobs_BK, 0.0).sum(dim=1)
