"""Prompts for engines of their own, and what the policy itself says of their answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedModel

from tlcr.engines import Answer, Sampling
from tlcr.engines.generate import warpers

PROMPTS = [[5, 9, 30], [7, 44, 12, 90, 33], [8], [61, 62], list(range(100, 119)), [5, 9, 31, 7], [99, 3, 14]]
ENDS = tuple(range(2, 131, 8))


def sampling(**changes: Any) -> Sampling:
    return dataclasses.replace(Sampling(8, 1.0, 1.0, 0, ENDS, 0, batch_size=4, logprobs=True), **changes)


def worst(policy: PreTrainedModel, answers: list[Answer], how: Sampling | None = None) -> float:
    """How far their log-probabilities are from those of a forward pass, in the distribution that is drawn from."""
    shape, found = warpers(how or sampling()), []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt + answer.ids_T.tolist()])
        with torch.no_grad():
            logits_TV = policy(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        logprobs_TV = shape(ids, logits_TV).log_softmax(-1)
        assert answer.logprobs_T is not None and answer.logprobs_T.shape == answer.ids_T.shape
        found.append((answer.logprobs_T - logprobs_TV.gather(1, ids[0, len(prompt) :, None])[:, 0]).abs().max())
    return float(max(found))
