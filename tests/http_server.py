"""A real HTTP server on a free port, whose replies may break off, hang or come byte by byte."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What a server does with one request.

    body: what it sends, as JSON unless it is bytes. cut: bytes that it promises and does not send. hang_s: seconds
    before it answers. dribble_s: seconds that it lets pass after each byte.
    """

    body: Any = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int = 0
    hang_s: float = 0.0
    dribble_s: float = 0.0


Handle = Callable[[str, Any, Mapping[str, str]], Reply]
"""(path, JSON of the request, its headers) to the reply; a request without a body is {}."""


class HttpServer:
    """Serves `handle` from its making until it is closed; each request in a thread."""

    def __init__(self, handle: Handle) -> None:
        self._listener = _Listener(("127.0.0.1", 0), _handler(handle))
        self._thread = threading.Thread(
            target=self._listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._listener.server_address[1]}"

    def kill(self) -> None:
        """Closes its port, as if its process had been killed; from any thread, also from one that answers."""
        self._listener.shutdown()
        self._listener.server_close()

    def join(self) -> None:
        """Returns when it serves no more."""
        self._thread.join()


@contextmanager
def listening(handle: Handle) -> Iterator[str]:
    """The address of a server."""
    server = HttpServer(handle)
    try:
        yield server.address
    finally:
        server.kill()
        server.join()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that was killed resets its connections


def _handler(handle: Handle) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            reply = handle(self.path, json.loads(raw) if raw else {}, self.headers)
            if reply.hang_s:
                time.sleep(reply.hang_s)
            body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.close_connection = self.close_connection or reply.cut > 0
            try:
                self.send_response(reply.status)
                for name, value in {**({"Content-Type": "application/json"} if body else {}), **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                for piece in _pieces(body[: len(body) - reply.cut], reply.dribble_s):
                    self.wfile.write(piece)
            except OSError:  # the client has hung up, as it should on time-outs
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _pieces(body: bytes, dribble_s: float) -> Iterator[bytes]:
    if not dribble_s:
        yield body
        return
    for place in range(len(body)):
        yield body[place : place + 1]
        time.sleep(dribble_s)
