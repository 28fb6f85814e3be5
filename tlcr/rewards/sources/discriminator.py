"""The token discriminator as a source: its logits at every response token."""

from __future__ import annotations

from tlcr.models.discriminator import token_logits
from tlcr.rewards.sources.frozen_model import FrozenModel, opinion_weights, padded, read_as_text
from tlcr.rewards.sources.protocol import Stateless
from tlcr.types import RewardSignal, Rollout


class DiscriminatorSource(Stateless):
    """A token discriminator's logits at every response token, (B, T, C).

    With the policy's tokenizer: the logits at the token's position, where the discriminator has seen the token.

    With another tokenizer, policy token t, which writes the characters [s, e) of the answer, gets the mean of the
    logits of the discriminator's tokens, weighted by how many of those characters each of them writes:

        logits_t = sum_j w_tj logits_j / sum_j w_tj,      w_tj = |[s_t, e_t) and [s_j, e_j)|

    A policy token without characters (a special token, a word-boundary mark) gets logits 0: neutral. The
    policy's end of sequence gets the logits of the discriminator's, where the policy ended its answer. A discriminator
    token may be longer than the policy token; a reward may therefore depend on up to one discriminator token of the
    future. Source: ours.

    What the other tokenizer reads: the rollout's prompt without the policy's special tokens, except those that are
    special to the discriminator too (two models with one chat template), and with the discriminator's own
    beginning-of-sequence token. Roles that the other template writes as words stay in the text.

    It reads the messages of a conversation too, and judges them; what it says of them is not used.
    """

    def __init__(self, frozen: FrozenModel) -> None:
        self.frozen, self.models = frozen, (frozen.model,)

    def __call__(self, rollout: Rollout) -> RewardSignal:
        frozen, read_BT = self.frozen, rollout.read_BT
        device = frozen.model.device
        if frozen.shares_tokens:
            frozen.require_fits(rollout)
            P, L = rollout.prompt_ids_BP.shape[1], rollout.ids_BL.shape[1]
            logits_BTC = token_logits(
                frozen.model,
                rollout.ids_BL.to(device),
                rollout.attention_mask_BL.to(device),
                slice(P, L),
                micro_batch_size=frozen.micro_batch_size,
            )
            return RewardSignal(logits_BTC=logits_BTC.to(read_BT.device))

        answers = read_as_text(frozen, rollout)
        ids_BL, mask_BL = padded([answer.encoded.ids for answer in answers], frozen.tokenizer)
        logits_BLC = token_logits(
            frozen.model,
            ids_BL.to(device),
            mask_BL.to(device),
            slice(0, ids_BL.shape[1]),
            micro_batch_size=frozen.micro_batch_size,
        ).to(read_BT.device)
        logits_BTC = logits_BLC.new_zeros((*read_BT.shape, logits_BLC.shape[-1]))
        for row, answer in enumerate(answers):
            weights = opinion_weights(frozen, answer).to(logits_BLC)
            logits_BTC[row, read_BT[row]] = (
                weights @ logits_BLC[row, answer.encoded.answer_start : len(answer.encoded.ids)]
            )
        return RewardSignal(logits_BTC=logits_BTC)
