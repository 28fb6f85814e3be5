"""A real HTTP server that speaks the OpenAI chat protocol, and misbehaves as told."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What the server does with one request.

    body: what it sends, as JSON unless it is bytes. cut: bytes that it promises and does not send. hold: an event that
    it waits for before it answers. dribble_s: seconds that it lets pass after each byte.
    """

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0
    hold: threading.Event | None = None
    dribble_s: float = 0.0


def completion(text: str | None, **changes: Any) -> dict[str, Any]:
    """A chat completion; ``changes`` replace finish_reason, refusal, or usage."""
    usage = changes.get("usage", {"prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 50})
    message = {"role": "assistant", "content": text, "refusal": changes.get("refusal")}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "served",
        "choices": [{"index": 0, "message": message, "finish_reason": changes.get("finish_reason", "stop")}],
        **({"usage": usage} if usage is not None else {}),
    }


def revision(revised: str) -> str:
    return json.dumps({"comparison": "it is kinder", "reason": "one word is rude", "revised": revised})


def rejected_of(request: dict[str, Any]) -> str:
    """The rejected answer that a request asks to revise."""
    found = re.search(r"<dispreferred>\n(.*?)\n</dispreferred>", request["messages"][-1]["content"], re.DOTALL)
    assert found is not None
    return found[1]


def mended(request: dict[str, Any]) -> Reply:
    """A good revision: the word 'bad' becomes 'good'."""
    return Reply(completion(revision(rejected_of(request).replace("bad", "good"))))


Behaviour = Callable[[dict[str, Any]], Reply]


class ChatServer:
    """What it was asked, and what it does about it: ``behave(request)``, or ``script`` first, one reply a request."""

    def __init__(self, behave: Behaviour = mended, script: Sequence[Reply | Behaviour] = ()) -> None:
        self.behave, self.script = behave, list(script)
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.under_way = self.most_under_way = 0
        self.answered: Counter[str] = Counter()
        self.keys: set[str | None] = set()
        self._lock = threading.Lock()
        self.address = ""

    def handle(self, request: dict[str, Any], key: str | None) -> Reply:
        with self._lock:
            self.requests.append(request)
            self.keys.add(key)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            scripted = self.script.pop(0) if self.script else self.behave
        reply = scripted if isinstance(scripted, Reply) else scripted(request)
        if reply.hold is not None:
            reply.hold.wait(30)
        return reply

    def finished(self, request: dict[str, Any], reply: Reply) -> None:
        with self._lock:
            self.under_way -= 1
            if reply.status == 200 and not reply.cut:
                self.answered[request["messages"][-1]["content"]] += 1


@contextmanager
def serving(server: ChatServer) -> Iterator[ChatServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = server.handle(request, self.headers.get("Authorization"))
            body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            server.finished(request, reply)
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                for piece in _pieces(body[: len(body) - reply.cut], reply.dribble_s):
                    self.wfile.write(piece)
            except OSError:  # the client has hung up, as it should on time-outs
                self.close_connection = True
            if reply.cut:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that was killed resets its connections

    listener = Listener(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    server.address = f"http://127.0.0.1:{listener.server_address[1]}/v1"
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


def _pieces(body: bytes, dribble_s: float) -> Iterator[bytes]:
    if not dribble_s:
        yield body
        return
    for place in range(len(body)):
        yield body[place : place + 1]
        time.sleep(dribble_s)


def closed_port() -> int:
    """A port of this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
