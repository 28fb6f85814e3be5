"""A reward server for tests inside a trainer's environment: the golden answers, by the protocol of ``tlcr serve``."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import golden


def made_up(ids: list[int]) -> list[float]:
    """A reward for each token that depends on the token and on its place."""
    return [((37 * token + 11 * place) % 41 - 20) / 20 for place, token in enumerate(ids)]


class GoldenServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.rewards: dict[tuple[tuple[int, ...], tuple[int, ...]], list[float]] = {}
        """By prompt and answer, tokens of tools included: the trainer's side is to mask them."""
        self.logits: dict[tuple[int, ...], list[list[float]]] = {}
        """By prompt and answer in one."""
        self.vllm: str | None = None
        """Be a vLLM that serves this folder, instead of tlcr serve."""
        known = golden.load()
        for item in known["items"]:
            self.logits[tuple(item["prompt_ids"] + item["response_ids"])] = item["logits"]
            scored = item["logits"][len(item["prompt_ids"]) :]
            rewards = [golden.reward(pair, known["temperature"]) for pair in scored]
            self.rewards[tuple(item["prompt_ids"]), tuple(item["response_ids"])] = rewards
        self.wrong = ""
        """What is wrong with the answers from now on: "nan", "short" or nothing."""
        self.fingerprint: str | None = None
        """Of the discriminator's tokenizer; None: the server tells nothing of it."""
        self.made_up = False
        """Answer for any ids, by ``made_up``, instead of the golden answers alone."""
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        if self.made_up:
            rows = [made_up(item["response_ids"]) for item in items]
        else:
            rows = [self.rewards[tuple(item["prompt_ids"]), tuple(item["response_ids"])] for item in items]
        if self.wrong == "nan":
            rows = [[float("nan")] * len(row) for row in rows]
        if self.wrong == "short":
            rows = [row[:-1] for row in rows]
        data = [{"rewards": row, "score": sum(row) / max(len(row), 1), "tokens": len(row)} for row in rows]
        return {"data": data, "model": "golden", "temperature": golden.TEMPERATURE}

    def pooling(self, rows: list[list[int]]) -> dict[str, Any]:
        data = [{"index": index, "data": self.logits[tuple(row)]} for index, row in enumerate(rows)]
        return {"object": "list", "data": data}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: GoldenServer

    def do_GET(self) -> None:
        info: dict[str, Any] = {
            "labels": ["negative", "positive"],
            "temperature": golden.TEMPERATURE,
            "model": "golden",
        }
        if self.server.vllm is not None:
            models = {"data": [{"id": "golden", "root": self.server.vllm, "max_model_len": 64}]}
            self._send(*((200, models) if self.path == "/v1/models" else (404, {"detail": "Not Found"})))
            return
        if self.server.fingerprint is not None:
            info["tokenizer"] = {"fingerprint": self.server.fingerprint}
        self._send(200 if self.path == "/v1/info" else 404, info)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_vllm = self.server.vllm is not None
        if self.path != ("/pooling" if is_vllm else "/v1/token_rewards"):
            self._send(404, {"error": f"no route {self.path}"})
            return
        try:
            self._send(200, self.server.pooling(body["input"]) if is_vllm else self.server.answer(body["items"]))
        except KeyError as error:
            self._send(422, {"error": f"not a golden answer: {error}"})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def golden_server() -> Iterator[GoldenServer]:
    server = GoldenServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
