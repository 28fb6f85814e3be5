"""Scores: policy, reference and value model applied to a rollout's tokens before the update."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from tlcr.models.actor_critic import ActorCritic
from tlcr.ppo.microbatches import MicroBatches
from tlcr.types import PolicyScores, Rollout


@torch.no_grad()
def score_rollout(
    actor_critic: ActorCritic,
    reference: PreTrainedModel,
    rollout: Rollout,
    *,
    temperature: float,
    micro_batch_size: int | None,
    exact_kl: bool,
) -> PolicyScores:
    """Log-probabilities of every action under policy and reference at the sampling temperature, values and entropies.

    The log-probabilities of sampling are not used: a forward pass with a key-value cache rounds differently from that
    of the update, and the ratio compares the two.

    Args:
        actor_critic: policy and value model.
        reference: the reference model of the KL.
        rollout: the answers.
        temperature: the sampling temperature of the answers.
        micro_batch_size: rows of one forward pass at most; None: no limit.
        exact_kl: also compute KL(policy || reference) over the vocabulary.

    Returns:
        The scores, (B, T) float32 (float64 for float64 models), in nats, 0 where not counted; no gradient.
    """
    shape, device = rollout.mask_BT.shape, rollout.mask_BT.device
    wide = next(actor_critic.parameters()).dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    logprobs_BT, ref_logprobs_BT, values_BT, entropy_BT, kl_BT = (
        torch.zeros(shape, dtype=dtype, device=device) for _ in range(5)
    )
    for batch in MicroBatches(rollout).split(micro_batch_size):
        output = actor_critic(
            batch.ids_BL,
            batch.attention_mask_BL,
            batch.response_length,
            temperature=temperature,
            reference=reference if exact_kl else None,
        )
        ref_scored_BT = output.ref_logprobs_BT
        if ref_scored_BT is None:
            ref_scored_BT = actor_critic.reference_logprobs(
                reference, batch.ids_BL, batch.attention_mask_BL, batch.response_length, temperature=temperature
            )
        batch.put(output.logprobs_BT, logprobs_BT)
        batch.put(ref_scored_BT, ref_logprobs_BT)
        batch.put(output.values_BT, values_BT)
        batch.put(output.entropy_BT, entropy_BT)
        if exact_kl:
            batch.put(output.kl_BT, kl_BT)
    return PolicyScores(logprobs_BT, ref_logprobs_BT, values_BT, entropy_BT, kl_BT if exact_kl else None)
