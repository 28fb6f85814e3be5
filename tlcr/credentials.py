"""Keys and passwords: kept out of what is written, shown or logged.

Configs, reports, stores and messages are shared and pasted. So no address in a config may hold a password, and whatever
a server says is kept without the key that it was sent, which some servers repeat in their errors.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from tlcr.errors import ConfigError

__all__ = ["HIDDEN", "SHORTEST_IN_ANSWERS", "VLLM_KEY_VARIABLE", "refuse_credentials", "without_secrets"]

HIDDEN = "[hidden]"
"""Stands in a text where a key stood."""
VLLM_KEY_VARIABLE = "VLLM_API_KEY"
"""The environment variable with the key of a vLLM server, which vLLM reads too."""
SHORTEST_SECRET = 6
"""A shorter key is a word such as "none" or "x", and hiding it would garble what a server says."""
SHORTEST_IN_ANSWERS = 12
"""The same for what a model answers, where "ollama" and "lm-studio" are words too; keys that cost money are longer."""


def refuse_credentials(name: str, address: str | None, key_variable: str) -> None:
    """Refuses an address that holds a user's name or password.

    Args:
        name: what holds the address, for the message.
        address: the address, or None.
        key_variable: the environment variable that is the place for a key.

    Raises:
        ConfigError: ``address`` is ``scheme://user:password@host``; the message does not repeat it.
    """
    if address is None or "@" not in urlsplit(address).netloc:
        return
    host = urlsplit(address).netloc.rpartition("@")[2]
    raise ConfigError(
        f"{name} holds a user name or password before @{host}, which would be written into configs and reports; take "
        f"it out, and put the server's key into the environment variable {key_variable}"
    )


def without_secrets(text: str, *secrets: str | None) -> str:
    """A text from outside as it may be kept and shown.

    Args:
        text: what a server says.
        *secrets: keys that were sent to it; None or shorter than ``SHORTEST_SECRET`` characters is none.

    Returns:
        The text with ``HIDDEN`` in the place of each.
    """
    for secret in secrets:
        if secret is not None and len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, HIDDEN)
    return text
