"""The sequence reward model as a source: one score for a whole answer, and ways to distribute it over the tokens.

Each way also returns the score itself, which `reward.sequence_coef` weights: the published mixtures with the score at
the end need no second pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tlcr.models.probes import require_decoder
from tlcr.models.reward_model import prefix_scores, scores_and_attention, sequence_scores
from tlcr.rewards.sources.frozen_model import FrozenModel, Reading, read
from tlcr.rewards.sources.protocol import Stateless
from tlcr.types import RewardSignal, Rollout


class SequenceRewardSource(Stateless):
    """A sequence reward model's score R of each answer, (B,).

    A decoder is read at the answer's last token. Any other model, such as an encoder, pools as it was trained to.

    With the policy's tokenizer it reads the policy's ids; with another, the text that `DiscriminatorSource` describes.
    The last token is the end of sequence where the policy ended its answer, else the last token of the cut answer.
    """

    def __init__(self, frozen: FrozenModel) -> None:
        self.frozen, self.models = frozen, (frozen.model,)

    def __call__(self, rollout: Rollout) -> RewardSignal:
        return RewardSignal(terminal_B=_scores(self.frozen, read(self.frozen, rollout)).to(rollout.mask_BT.device))


class UniformSource(Stateless):
    """The score in equal parts: r_t = R / n for each of the n counted tokens of an answer (ABC's baseline)."""

    def __init__(self, frozen: FrozenModel) -> None:
        self.frozen, self.models = frozen, (frozen.model,)

    def __call__(self, rollout: Rollout) -> RewardSignal:
        mask_BT = rollout.mask_BT
        scores_B = _scores(self.frozen, read(self.frozen, rollout)).to(mask_BT.device)
        share_B = scores_B / mask_BT.sum(dim=1).clamp(min=1)
        return RewardSignal(dense_BT=torch.where(mask_BT, share_B[:, None], 0.0), sequence_B=scores_B)


class AttentionSource(Stateless):
    """The score divided by the reward model's attention: r_t = R a_t / sum_s a_s over the answer's tokens.

    a_t is the attention that the model's last layer, in the mean over its heads, pays to token t from the position that
    the score is read at, that position itself included. The rewards of an answer sum to R. Source: attention-based
    credit, ABC (Chan et al. 2024, arXiv 2402.00782), which pays beta of it and (1 - beta) R at the last token: its
    beta of 0.5 is `reward.scale` 0.5 with `reward.sequence_coef` 0.5.
    """

    def __init__(self, frozen: FrozenModel) -> None:
        require_decoder(frozen.model, "reward.kind 'attention'")
        self.frozen, self.models = frozen, (frozen.model,)

    def __call__(self, rollout: Rollout) -> RewardSignal:
        frozen, reading = self.frozen, read(self.frozen, rollout)
        scores_B, attention_BL = scores_and_attention(
            frozen.model, reading.ids_BL, reading.mask_BL, micro_batch_size=frozen.micro_batch_size
        )
        attention_BL = torch.where(reading.answer_BL, attention_BL, 0.0)
        # a row without an answer has no attention to divide; dividing by 1 keeps its zeros
        total_B1 = attention_BL.sum(dim=1, keepdim=True)
        share_BL = attention_BL / torch.where(total_B1 > 0, total_B1, 1.0)
        return _signal(scores_B, scores_B[:, None] * share_BL, reading, rollout)


class PrefixDifferenceSource(Stateless):
    """What each token added to the score: r_t = R(x, a_<=t) - R(x, a_<t), where R(x) is the score of the prompt alone.

    The rewards of an answer sum to R(x, a) - R(x). Every prefix is scored by the model that was trained on whole
    answers, in one pass. Source: reward redistribution, RED (Li et al. 2024, arXiv 2411.08302), which mixes it with the
    score at the last token: `reward.scale` and `reward.sequence_coef`.
    """

    def __init__(self, frozen: FrozenModel) -> None:
        require_decoder(frozen.model, "reward.kind 'prefix_difference'")
        self.frozen, self.models = frozen, (frozen.model,)

    def __call__(self, rollout: Rollout) -> RewardSignal:
        frozen, reading = self.frozen, read(self.frozen, rollout)
        scores_BL = prefix_scores(
            frozen.model, reading.ids_BL, reading.mask_BL, micro_batch_size=frozen.micro_batch_size
        )
        # The score of an empty input is 0; only a prompt without tokens for the frozen model needs it.
        before_BL = pad(scores_BL[:, :-1], (1, 0))
        credit_BL = torch.where(reading.answer_BL, scores_BL - before_BL, 0.0)
        last_B1 = (reading.mask_BL.sum(dim=1, keepdim=True) - 1).clamp(min=0)
        return _signal(scores_BL.gather(1, last_B1)[:, 0], credit_BL, reading, rollout)


def _scores(frozen: FrozenModel, reading: Reading) -> Tensor:
    return sequence_scores(frozen.model, reading.ids_BL, reading.mask_BL, micro_batch_size=frozen.micro_batch_size)


def _signal(scores_B: Tensor, credit_BL: Tensor, reading: Reading, rollout: Rollout) -> RewardSignal:
    device = rollout.mask_BT.device
    return RewardSignal(dense_BT=reading.credit(credit_BL, rollout).to(device), sequence_B=scores_B.to(device))
