"""Scores: policy, reference and value model applied to a rollout's tokens before the update."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from tlcr.models.actor_critic import ActorCritic
from tlcr.ppo.microbatches import MicroBatches
from tlcr.training.profiling import part
from tlcr.types import PolicyScores, Rollout


@torch.no_grad()
def score_rollout(
    actor_critic: ActorCritic,
    reference: PreTrainedModel,
    rollout: Rollout,
    *,
    temperature: float,
    micro_batch_size: int | None,
    micro_batch_tokens: int | None = None,
    packed: bool = False,
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
        micro_batch_tokens: tokens of one forward pass at most; None: ``CPU_TOKENS`` on a CPU, elsewhere no limit.
        packed: the models read rows end to end, without padding (``tlcr.ppo.packing``).
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
    (batches,) = MicroBatches(rollout, rows=micro_batch_size, tokens=micro_batch_tokens, packed=packed).split()
    for batch in batches:
        with part("score: policy and values"):
            output = actor_critic(*batch.tokens, temperature=temperature, reference=reference if exact_kl else None)
        ref_logprobs_N = output.ref_logprobs_N
        if ref_logprobs_N is None:
            with part("score: reference"):
                ref_logprobs_N = actor_critic.reference_logprobs(reference, *batch.tokens, temperature=temperature)
        batch.put(output.logprobs_N, logprobs_BT)
        batch.put(ref_logprobs_N, ref_logprobs_BT)
        batch.put(output.values_N, values_BT)
        batch.put(output.entropy_N, entropy_BT)
        if exact_kl:
            batch.put(output.kl_N, kl_BT)
    return PolicyScores(logprobs_BT, ref_logprobs_BT, values_BT, entropy_BT, kl_BT if exact_kl else None)
