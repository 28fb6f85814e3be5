"""What ``tlcr serve`` is told. Imports no large package: the command line checks its flags with it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tlcr.errors import ConfigError

__all__ = ["LOOPBACK", "TOKEN_VARIABLE", "ServerSettings", "read_token"]

TOKEN_VARIABLE = "TLCR_SERVE_TOKEN"
"""The environment variable with the token that clients must send."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Hosts that only this machine reaches."""


def setting(default: Any, help: str, *, path: bool = False, **bounds: Any) -> Any:
    return field(default=default, metadata={"help": help, "path": path, **bounds})


@dataclass(frozen=True)
class ServerSettings:
    """The flags of ``tlcr serve``; every default is ours.

    Raises ConfigError where a number is out of its bounds, or one makes another meaningless.
    """

    discriminator: str = setting("", "a folder written by 'tlcr train discriminator'", path=True)
    host: str = setting("127.0.0.1", "the address to listen on; 0.0.0.0: every one of this machine")
    port: int = setting(8765, "the port to listen on; 0: a free one", ge=0)
    workers: int = setting(1, "processes with a copy of the model each; on several GPUs one for each", ge=1)
    dtype: Literal["float32", "bfloat16"] = setting("float32", "dtype of weights and activations")
    batch_tokens: int = setting(16384, "tokens of one forward pass, padding included", ge=1)
    window_ms: float = setting(2.0, "how long an idle model waits for more answers after the first", ge=0)
    queue_tokens: int = setting(
        524288, "tokens that may wait in a worker; beyond them clients get 429 and when to come again", ge=1
    )
    max_items: int = setting(1024, "answers of one request", ge=1)
    max_body_mib: int = setting(16, "MiB of one request's body", ge=1)
    max_connections: int = setting(1024, "open connections of a worker; beyond them clients get 503", ge=1)
    io_seconds: float = setting(30.0, "how long a client may take to send a request or to fetch an answer", gt=0)
    stop_seconds: float = setting(60.0, "how long accepted requests may go on after the signal to stop", gt=0)
    token_file: str | None = setting(
        None, f"a file with the token that clients must send; or {TOKEN_VARIABLE}", path=True
    )

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value, flag = getattr(self, one.name), f"--{one.name.replace('_', '-')}"
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{flag} is {value:g}; it must be finite")
            if "ge" in one.metadata and value < one.metadata["ge"]:
                raise ConfigError(f"{flag} is {value}; it must be at least {one.metadata['ge']}")
            if "gt" in one.metadata and value <= one.metadata["gt"]:
                raise ConfigError(f"{flag} is {value}; it must be above {one.metadata['gt']}")
        if not self.discriminator:
            raise ConfigError("no discriminator is named: tlcr serve --discriminator FOLDER")
        if self.port > 65535:
            raise ConfigError(f"--port is {self.port}; ports end at 65535")
        if self.queue_tokens < self.batch_tokens:
            raise ConfigError(
                f"--queue-tokens is {self.queue_tokens} and --batch-tokens {self.batch_tokens}: no batch would ever be "
                "full; raise the first or lower the second"
            )


def read_token(settings: ServerSettings, environment: dict[str, str]) -> str | None:
    """The token that clients must send.

    Args:
        settings: with the file's name.
        environment: the process's variables.

    Returns:
        The token, without white space around it; None where neither a file nor the variable is given.

    Raises:
        ConfigError: both are given, the file cannot be read, or the token is empty or not ASCII.
    """
    given = environment.get(TOKEN_VARIABLE)
    if settings.token_file is None and given is None:
        return None
    if settings.token_file is not None and given is not None:
        raise ConfigError(f"both --token-file and {TOKEN_VARIABLE} are given; keep one of them")
    source = TOKEN_VARIABLE if settings.token_file is None else settings.token_file
    if settings.token_file is not None:
        try:
            given = Path(settings.token_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--token-file {settings.token_file} cannot be read: {error}") from error
    token = str(given).strip()
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"the token of {source} is empty or has characters that no HTTP header holds; write one line")
    return token
