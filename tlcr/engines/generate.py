"""The engine that every model and machine has: transformers' `generate`, a batch of prompts at a time.

A batch takes as many steps as its longest answer; the rows of shorter ones are computed until then. With a static cache
each step has the same shapes. On a GPU transformers then compiles it and replays it as one CUDA graph; elsewhere the
static cache is only a slower one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tlcr.engines.protocol import Answer, InProcess, Sampling, drawing_from
from tlcr.text.padding import pad_left
from tlcr.training.profiling import part


@contextmanager
def generating_with(model: PreTrainedModel, sampling: GenerationConfig) -> Iterator[None]:
    """Replaces the model's generation config: `generate` would fill every unset field of ``sampling`` from it."""
    own = model.generation_config
    model.generation_config = sampling
    try:
        yield
    finally:
        model.generation_config = own


class Generate(InProcess):
    """``generate`` of transformers.

    Args:
        policy: the model.
        static_cache: keep keys and values in tensors of fixed size.
        choices: the only answers, as ids with their end of sequence; empty: any.
    """

    def __init__(
        self, policy: PreTrainedModel, *, static_cache: bool = False, choices: Sequence[Sequence[int]] = ()
    ) -> None:
        self._policy, self._static_cache, self._choices = policy, static_cache, choices

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator | None = None
    ) -> list[Answer]:
        """See ``Engine``."""
        config = generation_config(sampling)
        if sampling.logprobs and sampling.temperature > 0:  # then the recorder shapes the distribution
            config = generation_config(replace(sampling, temperature=1.0, top_p=1.0, top_k=0))
        if self._static_cache:
            config.cache_implementation = "static"
        answers = [Answer(torch.empty(0), None)] * len(prompts)
        # Prompts of like length share a batch: less padding.
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        with drawing_from(generator, self._policy.device), generating_with(self._policy, config):
            for start in range(0, len(prompts), sampling.batch_size):
                rows = by_length[start : start + sampling.batch_size]
                with part("rollout: generate"):
                    batch = self._batch([prompts[row] for row in rows], sampling)
                for row, answer in zip(rows, batch, strict=True):
                    answers[row] = answer
        return answers

    def _batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        ids_BP, mask_BP = pad_left(prompts, sampling.pad_id)
        device = self._policy.device
        recorder = _LogProbs(sampling)
        options: dict[str, Any] = {"logits_processor": LogitsProcessorList([recorder])} if sampling.logprobs else {}
        if self._choices:
            options["prefix_allowed_tokens_fn"] = partial(self._following, ids_BP.shape[1], sampling.pad_id)
        # A part of a sharded model is whole here. transformers would keep step with the other processes, which may have
        # other numbers of batches: without synced_gpus=False it waits for messages that never come.
        sampled_BL: Tensor = self._policy.generate(  # type: ignore[operator]
            input_ids=ids_BP.to(device), attention_mask=mask_BP.long().to(device), synced_gpus=False, **options
        )
        answers_BT = sampled_BL[:, ids_BP.shape[1] :]
        if not sampling.logprobs:
            return [Answer(ids_T, None) for ids_T in answers_BT]
        return [Answer(*row) for row in zip(answers_BT, recorder.of(answers_BT), strict=True)]

    def _following(self, prompt: int, pad_id: int, row: int, ids_L: Tensor) -> list[int]:
        """The tokens that may follow an answer's first ones, behind so many columns of its prompt."""
        begun = ids_L[prompt:].tolist()
        found = {way[len(begun)] for way in self._choices if way[: len(begun)] == begun and len(way) > len(begun)}
        return sorted(found) or [pad_id]  # of a row that ended before the others


class _LogProbs(LogitsProcessor):
    """Keeps the log-probability of every token that is drawn, in the distribution that it is drawn from.

    It shapes that distribution too, as transformers would: transformers does so after all processors that it is given.
    A token is known when the next one is asked for, so the distribution of one step at a time is held.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._warpers = warpers(sampling)
        self._last_BV: Tensor | None = None
        self._drawn_B: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._last_BV is not None:
            self._drawn_B.append(self._last_BV.gather(1, input_ids[:, -1:]).squeeze(1))
        scores = self._warpers(input_ids, scores)  # type: ignore[arg-type]
        self._last_BV = scores.float().log_softmax(dim=-1)
        return scores

    def of(self, answers_BT: Tensor) -> Tensor:
        assert self._last_BV is not None
        last_B = self._last_BV.gather(1, answers_BT[:, -1:]).squeeze(1)
        return torch.stack([*self._drawn_B, last_B], dim=1)


def warpers(sampling: Sampling) -> LogitsProcessorList:
    """What makes the distribution that tokens are drawn from of logits; nothing for temperature 0 but the logits."""
    found = LogitsProcessorList()
    if sampling.temperature not in (0.0, 1.0):
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.temperature > 0 and sampling.top_k > 0:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.temperature > 0 and sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    return found


def generation_config(sampling: Sampling) -> GenerationConfig:
    """These settings as transformers takes them; nothing but them shapes the distribution."""
    random = sampling.temperature > 0
    return GenerationConfig(
        do_sample=random,
        temperature=sampling.temperature if random else None,
        top_p=sampling.top_p if random else None,
        top_k=sampling.top_k if random else None,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.end_ids),
        pad_token_id=sampling.pad_id,
        use_cache=True,
    )
