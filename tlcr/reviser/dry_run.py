"""What revising would ask and cost, without asking anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tlcr.chat.estimate import Estimate, estimate, rehearsal
from tlcr.chat.types import BYTES_PER_TOKEN
from tlcr.config.schema import ReviserConfig
from tlcr.data.records import TextPreference
from tlcr.errors import ConfigError
from tlcr.reviser.files import content_key
from tlcr.reviser.revise import questions_of

__all__ = ["dry_run", "estimate_revisions"]

REASONING_TOKENS = 150
"""Comparison and reason together, in an estimate of an answer's length; the revision is taken as long as the answer."""


def estimate_revisions(pairs: Sequence[TextPreference], cfg: ReviserConfig, cache: Path) -> Estimate:
    """What is left to ask of a model for these pairs, given what ``cache`` holds (which may not exist)."""
    lengths = [REASONING_TOKENS + len(pair.rejected.encode()) // BYTES_PER_TOKEN for pair in pairs]
    return estimate(questions_of(pairs, cfg), lengths, cfg, cache)


def dry_run(pairs: Sequence[TextPreference], cfg: ReviserConfig, cache: Path, *, show: int) -> str:
    """The first ``show`` requests as text, and what all of them come to. Sends and writes nothing.

    Raises ConfigError for a backend that asks nothing.
    """
    if cfg.backend not in ("endpoint", "local"):
        raise ConfigError(f"reviser.backend is {cfg.backend}, which asks nothing; a dry run is for endpoint and local")
    shown = [
        (f"{pair.id} ({content_key(pair.prompt, pair.rejected)[:12]})", question)
        for pair, question in zip(pairs[:show], questions_of(pairs[:show], cfg), strict=True)
    ]
    found = estimate_revisions(pairs, cfg, cache)
    parts = rehearsal(shown, found, cfg, what=f"{len(pairs)} pairs")
    if found.cut:
        parts.append(
            f"{found.cut} answers will probably be cut off at {cfg.max_new_tokens} tokens, and set aside; raise "
            "reviser.max_new_tokens"
        )
    if cfg.attempts > 1:
        parts.append(f"up to {cfg.attempts} times that, for revisions that fail the checks (reviser.attempts)")
    return "\n".join(parts) + "\n"
