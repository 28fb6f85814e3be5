"""A policy trained by DPO as a source: its log-ratio to the reference for each token."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.errors import ConfigError
from tlcr.models.logits import answer_logprobs
from tlcr.rewards.sources.frozen_model import FrozenModel, read, same_tokenizer
from tlcr.rewards.sources.protocol import Stateless
from tlcr.types import RewardSignal, Rollout


class LogRatioSource(Stateless):
    """r_t = beta (log pi_dpo(a_t | x, a_<t) - log pi_ref(a_t | x, a_<t)), in rewards of the DPO objective, (B, T).

    frozen.model is pi_dpo; reference is pi_ref, the model that DPO started from; both use the policy's tokenizer.
    Source: reinforced token optimisation, RTO (Zhong et al. 2024, arXiv 2404.18922), which adds a reward model's score
    at the last token (`reward.sequence_coef`). beta: `dpo.beta`, by which `reward.scale` is multiplied.

    Raises ConfigError where pi_dpo has another tokenizer: log-probabilities of other tokens cannot reward the policy's.
    """

    def __init__(self, frozen: FrozenModel, reference: PreTrainedModel, beta: float) -> None:
        check_same_tokenizer(frozen.policy_tokenizer, frozen.tokenizer)
        self.frozen, self.reference, self.beta = frozen, reference, beta
        self.models = frozen.model, reference

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> RewardSignal:
        reading, mask_BT = read(self.frozen, rollout), rollout.mask_BT
        size = self.frozen.micro_batch_size or max(len(mask_BT), 1)
        ratios_BL = torch.zeros(reading.ids_BL.shape, device=reading.ids_BL.device)
        # from the first column of any answer; nothing predicts column 0, which belongs to a prompt
        columns = ratios_BL.shape[1] - max(1, int(reading.answer_BL.any(dim=0).int().argmax()))
        for start in range(0, len(mask_BT), size):
            rows = slice(start, start + size)
            dpo_bK, ref_bK = (
                answer_logprobs(model, reading.ids_BL[rows], reading.mask_BL[rows], columns)
                for model in (self.frozen.model, self.reference)
            )
            ratios_BL[rows, -columns:] = dpo_bK - ref_bK
        dense_BT = reading.credit(self.beta * ratios_BL, rollout)
        return RewardSignal(dense_BT=dense_BT.to(mask_BT.device))


def check_same_tokenizer(policy: PreTrainedTokenizerBase, dpo: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError where DPO's policy has another tokenizer than the policy that is rewarded."""
    if not same_tokenizer(policy, dpo):
        raise ConfigError(
            "reward.kind 'dpo' compares the probabilities of the policy's own tokens, but the model in dpo.path has "
            "another tokenizer; name one trained from the policy's model"
        )
