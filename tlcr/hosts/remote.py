"""The reward server of this process: where an adaptor sends its answers, and how it waits for them.

Trainers build an adaptor anew for each answer, in many processes; each process has one client here for each server.
What an adaptor is told by the trainer's own config comes before the environment. Standard library only.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from tlcr.errors import HostError
from tlcr.hosts.contract import Item, Scorer, checked

__all__ = ["TEMPERATURE", "TOKEN", "TRIES", "URL", "number", "rewards_of", "scorer_at"]

URL, TOKEN = "TLCR_REWARD_URL", "TLCR_REWARD_TOKEN"
"""The environment variables with the server's address, and with its bearer token if it wants one."""
TEMPERATURE, TRIES = "TLCR_REWARD_TEMPERATURE", "TLCR_REWARD_TRIES"
"""The discriminator's temperature, for a vLLM that does not share a disk with the trainer; how often to ask."""

THREADS = 64
"""How many requests one process has on their way; an asynchronous trainer has one for each answer."""


def scorer_at(url: str | None = None, *, named_by: str = "") -> Scorer:
    """The client for a server, which is not asked anything yet.

    Args:
        url: its address; None: that of the environment variable ``TLCR_REWARD_URL``.
        named_by: how else this trainer's users name the address, for the message.

    Returns:
        The same object for the same address, as long as the process lives.

    Raises:
        HostError: nobody named an address, or a variable is not the number that it should be.
    """
    address = url or os.environ.get(URL)
    if not address:
        also = f"{named_by} or " if named_by else ""
        raise HostError(
            f"no reward server is named; start one by 'tlcr serve --discriminator FOLDER' and set {also}{URL} in the "
            "environment of every process of the trainer to its address, http://HOST:PORT"
        )
    environment = os.environ.get
    return _client(address, environment(TOKEN), environment(TEMPERATURE), environment(TRIES))


@lru_cache
def _client(url: str, token: str | None, temperature: str | None, tries: str | None) -> Scorer:
    from tlcr.hosts.client import RewardClient

    options: dict[str, Any] = {}
    if temperature is not None:
        options["temperature"] = number(TEMPERATURE, temperature)
    if tries is not None:
        options["tries"] = int(number(TRIES, tries))
    return RewardClient(url, token=token, **options)


async def rewards_of(scorer: Scorer, items: Sequence[Item], tokenizer: Any = None) -> list[list[float]]:
    """Scores answers in a thread, so that the trainer's event loop goes on sampling.

    Args:
        scorer: who scores.
        items: the answers; those without a token are not sent.
        tokenizer: the policy's; a server that tells what its ids mean has to mean the same. None: not looked at.

    Returns:
        What ``contract.checked`` lets through: one list for each item.

    Raises:
        HostError: a reward is missing or is none, the server is gone, or its tokenizer is another.
    """
    asked = [item for item in items if len(item.response_ids)]
    if not asked:
        return [[] for _ in items]
    found = iter(await asyncio.get_running_loop().run_in_executor(_threads(), _ask, scorer, asked, tokenizer))
    return [next(found) if len(item.response_ids) else [] for item in items]


def _ask(scorer: Any, items: Sequence[Item], tokenizer: Any) -> list[list[float]]:
    if tokenizer is not None:
        _require_same_ids(scorer, tokenizer)
    return checked(scorer.token_rewards(items), items)


_alike: set[tuple[Scorer, str, int]] = set()
"""Which tokenizers were compared with a server's. By name: Ray hands an actor a new copy with each call."""


def _require_same_ids(scorer: Any, tokenizer: Any) -> None:
    check = getattr(scorer, "check_tokenizer", None)
    plain = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor of images and text
    known = (scorer, str(getattr(plain, "name_or_path", "")), int(getattr(plain, "vocab_size", 0)))
    if check is not None and known not in _alike:
        check(plain)
        _alike.add(known)


@lru_cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="tlcr-rewards")


def number(name: str, value: Any) -> float:
    """A finite number that a user wrote.

    Args:
        name: of what.
        value: a number, or its text.

    Returns:
        The number.

    Raises:
        HostError: it is not a finite number.
    """
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not abs(found) < float("inf"):
        raise HostError(f"{name} is {value!r}; wanted a finite number")
    return found
