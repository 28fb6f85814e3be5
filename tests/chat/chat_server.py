"""A real HTTP server that speaks the OpenAI chat protocol, and misbehaves as told."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tests.http_server import Reply, listening


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

    def handle(self, path: str, request: dict[str, Any], headers: Mapping[str, str]) -> Reply:
        assert path == "/v1/chat/completions"
        with self._lock:
            self.requests.append(request)
            self.keys.add(headers.get("Authorization"))
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            scripted = self.script.pop(0) if self.script else self.behave
        reply = scripted if isinstance(scripted, Reply) else scripted(request)
        with self._lock:
            self.under_way -= 1
            if reply.status == 200 and not reply.cut:
                self.answered[request["messages"][-1]["content"]] += 1
        return reply


@contextmanager
def serving(server: ChatServer) -> Iterator[ChatServer]:
    with listening(server.handle) as address:
        server.address = f"{address}/v1"
        yield server


def held(reply: Reply, until: threading.Event) -> Reply:
    """The reply, once the event has come; half a minute later at most."""
    until.wait(30)
    return reply


def closed_port() -> int:
    """A port of this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
