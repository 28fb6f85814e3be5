"""The sequence reward model as a source: one score for a whole answer."""

from __future__ import annotations

from collections.abc import Sequence

from tlcr.reward_model import sequence_scores
from tlcr.reward_sources.judge import Judge, counted, padded, read_as_text
from tlcr.reward_sources.protocol import Stateless
from tlcr.types import RewardSignal, Rollout


class SequenceRewardSource(Stateless):
    """A sequence reward model's score of each answer, (B,), read at the answer's last token.

    With the policy's tokenizer it reads the policy's ids; with another, the text that `DiscriminatorSource` describes.
    The last token is the end of sequence where the policy ended its answer, else the last token of the cut answer.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self._same = judge.shares_tokens

    def __call__(self, rollout: Rollout) -> RewardSignal:
        judge = self.judge
        if self._same:
            sequences: Sequence[Sequence[int]] = counted(rollout.ids_BL, rollout.attention_mask_BL)
        else:
            sequences = [answer.encoded.ids for answer in read_as_text(judge, rollout)]
        ids_BL, mask_BL = padded(sequences, judge.tokenizer)
        device = judge.model.device
        terminal_B = sequence_scores(
            judge.model, ids_BL.to(device), mask_BL.to(device), micro_batch_size=judge.micro_batch_size
        )
        return RewardSignal(terminal_B=terminal_B.float().to(rollout.mask_BT.device))
