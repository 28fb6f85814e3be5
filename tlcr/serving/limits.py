"""What a client may ask for: how large a body, how fast, and how many at once. Every refusal is one sentence."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from tlcr.errors import TlcrError
from tlcr.text.files import parse_json as json_of

__all__ = ["Bodies", "Refused", "TimedProtocol", "drain", "parse_json"]

MIB = 2**20
TOO_MANY_BODIES = "the server is reading as many requests as it has memory for; come again later"
BODIES_AT_ONCE = 4
"""How many bodies of the largest size a worker holds at the same time; more smaller ones."""


class Refused(TlcrError, ValueError):
    """A request that is not served: the status of HTTP, and in how many seconds to come again where that may help."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class Bodies:
    """Reads the bodies of requests within limits of size, of time, and of what all of them hold together."""

    def __init__(self, *, max_bytes: int, seconds: float) -> None:
        self.max_bytes, self.seconds = max_bytes, seconds
        self.held, self.most_held = 0, BODIES_AT_ONCE * max_bytes

    @asynccontextmanager
    async def of(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request, counted as held until the block is left.

        Args:
            request: the request.

        Yields:
            Its bytes.

        Raises:
            Refused: it is too large (413), too slow (408), or too much is held for other requests (429).
        """
        body = bytearray()
        try:
            await asyncio.wait_for(self._read(request, body), self.seconds)
        except Refused:
            self.held -= len(body)
            body.clear()
            await drain(request, self.seconds)
            raise
        except asyncio.TimeoutError as error:
            self.held -= len(body)
            raise Refused(
                408, f"the request's body did not arrive within {self.seconds:g} seconds; send it faster or smaller"
            ) from error
        except BaseException:
            self.held -= len(body)
            raise
        try:
            yield bytes(body)
        finally:
            self.held -= len(body)

    async def _read(self, request: Request, body: bytearray) -> None:
        stated = int(request.headers.get("content-length") or 0)  # h11 refuses what is no number
        if stated > self.max_bytes:
            raise Refused(413, self._too_large(f"{stated / MIB:.1f} MiB"))
        if self.held + stated > self.most_held:
            raise Refused(429, TOO_MANY_BODIES, 1)
        async for chunk in request.stream():
            if len(body) + len(chunk) > self.max_bytes:
                raise Refused(413, self._too_large(f"more than {self.max_bytes / MIB:.0f} MiB"))
            if self.held + len(chunk) > self.most_held:
                raise Refused(429, TOO_MANY_BODIES, 1)
            self.held += len(chunk)
            body += chunk

    def _too_large(self, size: str) -> str:
        return (
            f"the request's body has {size}, and this server reads at most {self.max_bytes / MIB:.0f} MiB; split the "
            "request, or start the server with a larger --max-body-mib"
        )


async def drain(request: Request, seconds: float) -> None:
    """Throws away what a client still sends, for a while: it reads a refusal only when it is done.

    Args:
        request: one whose body was not read to its end.
        seconds: how long.
    """
    if "100-continue" in request.headers.get("expect", ""):
        return  # it waits for a word before it sends

    async def read() -> None:
        more = True
        while more:
            message = await request.receive()
            more = message.get("more_body", False)

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), seconds)


def parse_json(body: bytes | bytearray) -> dict[str, Any]:
    """A request's JSON object. Raises Refused (400) where the body is none."""
    try:
        value = json_of(body.decode())
    except ValueError as error:  # bytes that are no UTF-8 raise one too
        raise Refused(400, f"the request's body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refused(400, f"the request's body is a JSON {type(value).__name__}; wanted an object")
    return value


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP, without connections whose client never finishes the head of a request or never reads answers."""

    seconds = 30.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = self.loop.call_later(self.seconds, self._give_up)
        self._close_timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        reading = self.cycle is not None and not self.cycle.response_complete
        if reading and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        elif not reading and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.seconds, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._close_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._close_timer = None
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # A client that said "Connection: close": the connection is closed when it has read the answer, and uvicorn
        # sets no time for that.
        if self.transport.is_closing() and self._close_timer is None:
            self._close_timer = self.loop.call_later(self.seconds, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # nobody reads the answer
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _give_up(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
