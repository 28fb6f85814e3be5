"""Notes on models: what is unusual about one, logged once in a run, which may load it many times."""

from __future__ import annotations

import logging

logger = logging.getLogger("tlcr")

_said: set[str] = set()


def forget_notes() -> None:
    """Lets every note be logged again: for the next run of this process."""
    _said.clear()


def note(message: str) -> None:
    """Logs a warning that has not been logged since ``forget_notes``."""
    if message not in _said:
        _said.add(message)
        logger.warning("%s", message)
