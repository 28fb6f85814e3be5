"""A frozen model that a reward uses, and the text that it reads where its tokenizer differs from the policy's."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.models.positions import ROLLOUT_LIMITS, check_positions, position_limit
from tlcr.text.tokenization import (
    answer_spans,
    character_spans,
    cut_answer,
    decode_text,
    encode_answers,
    render_prompt,
)
from tlcr.text.truncation import CutTexts
from tlcr.types import EncodedAnswer, Rollout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrozenModel:
    """A frozen model with its tokenizer and the limits of its input.

    The prompt keeps its last `max_prompt_tokens`, as in the model's training; `micro_batch_size` answers are scored at
    a time, all of them by default.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    policy_tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    micro_batch_size: int | None = None
    said: set[str] = field(default_factory=set, compare=False, repr=False)
    """The kinds of notes that were logged, each once."""

    @property
    def max_answer_tokens(self) -> int:
        """Answers are as long as the policy made them."""
        return sys.maxsize

    @property
    def name(self) -> str:
        return self.model.name_or_path or type(self.model).__name__

    def note_once(self, kind: str, note: str) -> None:
        """Logs a note where none of its kind was logged for this model."""
        if kind not in self.said:
            self.said.add(kind)
            logger.warning("%s", note)

    @cached_property
    def position_limit(self) -> int | None:
        return position_limit(self.model)

    @cached_property
    def shares_tokens(self) -> bool:
        return same_tokenizer(self.policy_tokenizer, self.tokenizer)

    def require_fits(self, rollout: Rollout) -> None:
        """Raises DataError where a row of the policy's ids is longer than the model has positions."""
        longest = int(rollout.attention_mask_BL.sum(dim=1).max()) if len(rollout.prompts) else 0
        check_positions(
            self.position_limit, longest, "a prompt with its answer", reader=repr(self.name), limits=ROLLOUT_LIMITS
        )


@dataclass(frozen=True)
class Reading:
    """A rollout as the model reads it: rows padded on the right, ids and mask (B, L), and the answers' columns (B, L).

    `weights` map credit from the model's tokens of each answer to the policy's (`credit_weights`); None where the
    tokens are the same. Then the answers' columns are those of actions; else messages of a conversation are among them.
    """

    ids_BL: Tensor
    mask_BL: Tensor
    answer_BL: Tensor
    weights: Sequence[Tensor] | None

    def credit(self, credit_BL: Tensor, rollout: Rollout) -> Tensor:
        """The credit of the model's tokens as (B, T) rewards of the policy's actions; an answer's sum is unchanged.

        That of messages, which no action earned, is lost.

        Args:
            credit_BL: what the model gives each of its tokens.
            rollout: what was read.

        Returns:
            The rewards, 0 where no action is, on the device of the credit.
        """
        mask_BT, read_BT = rollout.mask_BT.to(credit_BL.device), rollout.read_BT.to(credit_BL.device)
        rewards_BT = credit_BL.new_zeros(mask_BT.shape)
        if self.weights is None:
            rewards_BT[mask_BT] = credit_BL[self.answer_BL]
            return rewards_BT
        for row, weights in enumerate(self.weights):
            own = credit_BL[row, self.answer_BL[row]]
            rewards_BT[row, read_BT[row]] = weights.to(own) @ own
        return torch.where(mask_BT, rewards_BT, 0.0)


def read(frozen: FrozenModel, rollout: Rollout) -> Reading:
    """The rollout's rows as the model's ids, on the model's device.

    Args:
        frozen: the model that reads.
        rollout: the answers.

    Returns:
        The policy's ids where both share a tokenizer, else the ids of the text that ``DiscriminatorSource`` describes.

    Raises:
        DataError: a row of the policy's ids is longer than the model has positions.
    """
    weights = None
    if frozen.shares_tokens:
        rows: Sequence[Sequence[int]] = counted(rollout.ids_BL, rollout.attention_mask_BL)
        starts = rollout.prompt_mask_BP.sum(dim=1).tolist()
        frozen.require_fits(rollout)
    else:
        answers = read_as_text(frozen, rollout)
        rows, starts = [a.encoded.ids for a in answers], [a.encoded.answer_start for a in answers]
        weights = [credit_weights(frozen, answer) for answer in answers]
    ids_BL, mask_BL = padded(rows, frozen.tokenizer)
    answer_BL = mask_BL & (torch.arange(ids_BL.shape[1]) >= torch.tensor(starts, dtype=torch.long)[:, None])
    if frozen.shares_tokens:
        answer_BL[answer_BL.clone()] = rollout.mask_BT[rollout.read_BT].cpu()
    device = frozen.model.device
    return Reading(ids_BL.to(device), mask_BL.to(device), answer_BL.to(device), weights)


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether ids mean the same in both: equal vocabularies, and the same beginning and end of sequence.

    Names and folders do not decide it: a fine-tuned model often has a copy of its base's tokenizer, and sometimes a
    changed one. The padding token may differ, because no mask is computed from ids.

    Args:
        a: one tokenizer.
        b: the other.

    Returns:
        True where ids of one can be used with the other.
    """
    return a is b or (
        a.eos_token_id == b.eos_token_id and a.bos_token_id == b.bos_token_id and a.get_vocab() == b.get_vocab()
    )


@dataclass(frozen=True)
class TextAnswer:
    """One row of a rollout as text: the policy's tokens, the characters that they write, and the model's tokens.

    `policy_ids` are those of answers and messages; the last of them is the end of sequence where `ended`.
    """

    policy_prompt_ids: list[int]
    policy_ids: list[int]
    ended: bool
    prompt: str
    text: str
    encoded: EncodedAnswer


def read_as_text(frozen: FrozenModel, rollout: Rollout) -> list[TextAnswer]:
    """The rollout as the model's own tokens; `DiscriminatorSource` describes the treatment of special tokens."""
    policy = frozen.policy_tokenizer
    unknown = sorted(_special_tokens(policy) - _special_tokens(frozen.tokenizer), key=len, reverse=True)
    foreign = re.compile("|".join(map(re.escape, unknown)))
    prompts = [render_prompt(frozen.tokenizer, foreign.sub("", prompt)) for prompt in rollout.prompts]
    prompt_ids = counted(rollout.prompt_ids_BP, rollout.prompt_mask_BP)
    answer_ids = counted(rollout.response_ids_BT, rollout.read_BT)
    ended = [flag and len(ids) > 0 for flag, ids in zip(rollout.ended_B.tolist(), answer_ids, strict=True)]
    texts = [decode_text(policy, ids, context=context) for ids, context in zip(answer_ids, prompt_ids, strict=True)]
    encoded = encode_answers(
        frozen.tokenizer, prompts, texts, max_prompt_tokens=frozen.max_prompt_tokens, max_answer_tokens=None
    )
    _note_cut_prompts(frozen, prompts, encoded)
    fitted = [_fit(frozen, row if end else _without_end(row)) for row, end in zip(encoded, ended, strict=True)]
    return list(map(TextAnswer, prompt_ids, answer_ids, ended, prompts, texts, fitted))


def _note_cut_prompts(frozen: FrozenModel, prompts: Sequence[str], encoded: Sequence[EncodedAnswer]) -> None:
    """Says once for each model that its tokens of the policy's prompts are too many."""
    cuts = CutTexts(frozen)
    for prompt, row in zip(prompts, encoded, strict=True):
        cuts.add(prompt, row)
    if cuts.prompts_cut and "limit" not in frozen.said:
        frozen.said.add("limit")
        cuts.report(f"{frozen.name}, whose tokens are not the policy's, in the first rollout with such prompts")


def counted(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The ids of each row where the mask counts."""
    return [row[counts].tolist() for row, counts in zip(ids.cpu(), mask.cpu(), strict=True)]


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def _without_end(encoded: EncodedAnswer) -> EncodedAnswer:
    return EncodedAnswer(ids=encoded.ids[:-1], answer_start=encoded.answer_start, complete=False)


def _fit(frozen: FrozenModel, encoded: EncodedAnswer) -> EncodedAnswer:
    """Cuts to the model's positions: first the prompt's beginning, then the answer's end."""
    limit = frozen.position_limit
    if limit is None or len(encoded.ids) <= limit:
        return encoded
    dropped = min(encoded.answer_start, len(encoded.ids) - limit)
    if dropped:
        frozen.note_once(
            "positions",
            f"{frozen.name} has {limit} positions, and a prompt with its answer has {len(encoded.ids)} tokens: such "
            f"prompts lose their beginning, here {dropped} tokens of it; lower data.max_prompt_tokens or "
            "rollout.max_new_tokens",
        )
    shorter = replace(encoded, ids=encoded.ids[dropped:], answer_start=encoded.answer_start - dropped)
    if len(shorter.ids) > limit:
        frozen.note_once(
            "answers",
            f"an answer has {len(shorter.ids)} tokens for {frozen.name}, which has {limit} positions: what lies beyond "
            "earns nothing, in this answer and all like it; lower rollout.max_new_tokens",
        )
    return cut_answer(shorter, limit - shorter.answer_start)


def opinion_weights(frozen: FrozenModel, answer: TextAnswer) -> Tensor:
    """The weights (policy tokens, the model's tokens) of a mean of scores: a row sums to 1, or is all 0."""
    overlap = _shared_characters(frozen, answer)
    return overlap / overlap.sum(1, keepdim=True).clamp(min=1)


def credit_weights(frozen: FrozenModel, answer: TextAnswer) -> Tensor:
    """The weights that distribute credit: a column sums to 1, so that no credit is lost.

    The credit of a model token that shares no character with the policy's tokens goes to the policy's last token.

    Args:
        frozen: the model that gives the credit.
        answer: one answer in both tokenizers.

    Returns:
        (policy tokens, the model's tokens).
    """
    overlap = _shared_characters(frozen, answer)
    overlap[-1:, overlap.sum(0) == 0] = 1
    return overlap / overlap.sum(0).clamp(min=1)


def _shared_characters(frozen: FrozenModel, answer: TextAnswer) -> Tensor:
    """How many characters each policy token and each of the model's have in common; 1 for the two ends of sequence."""
    policy = character_spans(frozen.policy_tokenizer, answer.policy_ids, context=answer.policy_prompt_ids)
    own = answer_spans(frozen.tokenizer, answer.prompt, answer.text, answer.encoded)
    policy_start, policy_end = torch.tensor(policy, dtype=torch.float64).reshape(-1, 2).unbind(1)
    start, end = torch.tensor(own, dtype=torch.float64).reshape(-1, 2).unbind(1)
    overlap = torch.minimum(policy_end[:, None], end) - torch.maximum(policy_start[:, None], start)
    shared = torch.zeros(len(answer.policy_ids), len(answer.encoded.answer_ids), dtype=torch.float64)
    shared[:, : len(own)] = overlap.clamp(min=0)
    if answer.ended and answer.encoded.complete:
        shared[-1, -1] = 1
    return shared


def padded(sequences: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """ids and mask (B, L), padded on the right; the mask comes from the lengths."""
    longest = max((len(ids) for ids in sequences), default=0)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids_BL = torch.tensor([[*ids, *[fill] * (longest - len(ids))] for ids in sequences], dtype=torch.long)
    mask_BL = torch.arange(longest) < torch.tensor([len(ids) for ids in sequences], dtype=torch.long)[:, None]
    return ids_BL.reshape(len(sequences), longest), mask_BL
