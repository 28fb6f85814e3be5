"""Whether an engine of its own has the policy's weights: a short answer to a fixed prompt, scored by the policy too."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tlcr.config.schema import EngineConfig, RolloutConfig
from tlcr.engines.generate import warpers
from tlcr.engines.protocol import Sampling

PROBE_TOKENS = 16
TOLERANCE = 0.1
"""Nats by which half of a probe's log-probabilities may differ from the policy's (ours): bfloat16 costs hundredths,
other weights tenths and more."""
MOVED = 0.01
"""Nats by which the policy's own log-probability of a probe must move before an engine's has to (ours)."""


class Probe(NamedTuple):
    """What an engine answered to the fixed prompt, and what the policy of that time made of it."""

    ids: list[int]
    said_T: Tensor
    scored_T: Tensor


class NotThePolicys(Exception):
    """The engine has other weights: a clause."""


def probe_prompt(policy: PreTrainedModel) -> list[int]:
    """Eight ids from all over the vocabulary."""
    vocabulary: int = policy.config.get_text_config().vocab_size
    return list(range(3, vocabulary, max(1, vocabulary // 8)))[:8]


def probe_sampling(cfg: EngineConfig) -> Sampling:
    """As a rollout samples, for a fixed number of tokens; what asks a chat model differs from question to question."""
    shape = (cfg.temperature, cfg.top_p, cfg.top_k) if isinstance(cfg, RolloutConfig) else (1.0, 1.0, 0)
    return Sampling(PROBE_TOKENS, *shape, (), 0, batch_size=1, logprobs=True)


def check_probe(
    policy: PreTrainedModel, sampling: Sampling, ids: list[int], logprobs: list[float], before: Probe | None
) -> Probe:
    """Raises NotThePolicys unless an answer to the probe has the policy's own log-probabilities.

    Args:
        policy: whole, with the weights that the engine should have.
        sampling: of the probe.
        ids: the engine's answer.
        logprobs: what it says of each.
        before: the probe of the weights before; None: there were none.

    Returns:
        The probe, for the next time; the one from before where neither has moved.
    """
    said_T, scored_T = torch.tensor(logprobs), _scored(policy, ids, sampling)
    if before is not None and before.ids == ids and torch.equal(before.said_T, said_T):
        moved = float((scored_T - before.scored_T).abs().max())
        if moved > MOVED:
            raise NotThePolicys(
                f"took no new weights: the policy's log-probabilities of a probe have moved by {moved:.3g} nats "
                "and its own not at all"
            )
        return before
    if not _near(said_T, scored_T):
        if _near(said_T, _scored(policy, ids, Sampling(1, 1.0, 1.0, 0, (), 0, 1))):
            raise NotThePolicys(
                "gives log-probabilities from before temperature and truncation; start it with --logprobs-mode "
                "processed_logprobs"
            )
        gap = float((said_T - scored_T).abs().median())
        raise NotThePolicys(
            f"does not have the policy's weights: log-probabilities of a probe differ by {gap:.3g} nats"
        )
    return Probe(ids, said_T, scored_T)


@torch.no_grad()
def _scored(policy: PreTrainedModel, ids: list[int], sampling: Sampling) -> Tensor:
    prompt = probe_prompt(policy)
    tokens_1L = torch.tensor([prompt + ids], device=policy.device)
    logits_TV = policy(input_ids=tokens_1L, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    logprobs_TV = warpers(sampling)(tokens_1L, logits_TV).log_softmax(dim=-1)  # type: ignore[arg-type]
    return logprobs_TV.gather(1, tokens_1L[0, len(prompt) :, None]).squeeze(1).cpu()


def _near(a_T: Tensor, b_T: Tensor) -> bool:
    return float((a_T - b_T).abs().median()) <= TOLERANCE
