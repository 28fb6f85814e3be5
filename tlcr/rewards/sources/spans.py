"""Which span of its answer each token belongs to, for rewards that are constant over a span."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tlcr.rewards.sources.frozen_model import counted
from tlcr.rewards.sources.protocol import RewardSource, models_of
from tlcr.text.tokenization import character_spans, decode_text
from tlcr.types import RewardSignal, Rollout


class SpanSource:
    """A source plus the number of each token's span.

    A span of the answer ends where a match of `span_end` ends. A token belongs to the span in which it starts; the end
    of sequence, where the policy chose it, is a span of its own. Source: ours, for credit that is coarser than tokens
    and finer than answers, as people's span labels are (Wu et al. 2023, arXiv 2306.01693).
    """

    def __init__(self, source: RewardSource, tokenizer: PreTrainedTokenizerBase, span_end: str) -> None:
        self.source, self.tokenizer, self.span_end = source, tokenizer, re.compile(span_end)
        self.models = models_of(source)

    def __call__(self, rollout: Rollout) -> RewardSignal:
        read_BT = rollout.read_BT.cpu()
        spans_BT = torch.zeros(read_BT.shape, dtype=torch.long)
        prompts = counted(rollout.prompt_ids_BP, rollout.prompt_mask_BP)
        answers = counted(rollout.response_ids_BT, read_BT)
        for row, (prompt, ids, ended) in enumerate(zip(prompts, answers, rollout.ended_B.tolist(), strict=True)):
            spans_BT[row, read_BT[row]] = torch.tensor(self._spans(prompt, ids, ended), dtype=torch.long)
        return replace(self.source(rollout), spans_BT=spans_BT.to(rollout.mask_BT.device))

    def _spans(self, prompt: list[int], ids: list[int], ended: bool) -> list[int]:
        text = decode_text(self.tokenizer, ids, context=prompt)
        ends = [match.end() for match in self.span_end.finditer(text)]
        # Spans in which no token starts (a match inside a token) get no number: numbers stay below the token count.
        starts = [bisect_right(ends, start) for start, _ in character_spans(self.tokenizer, ids, context=prompt)]
        numbers = {start: number for number, start in enumerate(dict.fromkeys(starts))}
        spans = [numbers[start] for start in starts]
        if ended and spans:
            spans[-1] = len(spans) - 1
        return spans

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.source.load_state_dict(state)
