"""The protocol of engines: token ids of prompts to token ids of answers, with their log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    temperature: 0 takes the most probable token. top_p, top_k: truncation of the distribution; 1 and 0 are none.
    end_ids: each ends an answer, as its last token. batch_size: answers under way at a time. logprobs: whether
    log-probabilities are wanted; they cost a pass over the logits of every token.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    end_ids: tuple[int, ...]
    pad_id: int
    batch_size: int
    logprobs: bool = False


class Answer(NamedTuple):
    """An answer as an engine gives it. What follows its first end of sequence, if anything, does not belong to it."""

    ids_T: Tensor
    """Integers (T,), on the policy's device."""
    logprobs_T: Tensor | None
    """Of each token in the distribution that it was drawn from (T,), nats, float32; None where not asked for."""


class Engine(Protocol):
    """Samples answers from a policy."""

    def refresh(self) -> None:
        """Takes the policy's weights of now. Every process calls it, before a rollout from a policy that changed.

        Raises:
            BackendUnavailable: the engine does not take them.
        """
        ...

    def close(self) -> None:
        """Lets go of what the engine holds outside of this process."""
        ...

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator | None = None
    ) -> list[Answer]:
        """One answer for each prompt, in their order.

        Args:
            prompts: token ids, at least one for each prompt.
            sampling: how to sample.
            generator: the source of randomness; None: torch's global state, on the policy's device.

        Returns:
            The answers.

        Raises:
            BackendUnavailable: some prompts got no answer.
        """
        ...


class InProcess:
    """An engine that reads the policy's own weights in every call, so that there is nothing to take or to let go."""

    def refresh(self) -> None:
        """See ``Engine``."""

    def close(self) -> None:
        """See ``Engine``."""


@contextmanager
def drawing_from(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Torch's global state seeded by a generator, and afterwards as it was; for None it is left alone."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
