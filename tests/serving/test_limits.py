"""Clients that ask for too much, too slowly or without the token; and what the server holds meanwhile."""

from __future__ import annotations

import gc
import json
import logging
import math
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch

from tests.serving.conftest import Running, reader_of, running
from tlcr.errors import ConfigError
from tlcr.models.discriminator import Opinion
from tlcr.serving import app, reading
from tlcr.serving.limits import MIB, parse_json
from tlcr.serving.model import ServedModel
from tlcr.serving.settings import TOKEN_VARIABLE, ServerSettings, read_token

ITEMS = "/v1/token_rewards"
ONE = {"items": [{"prompt_ids": [5], "response_ids": [6]}]}


class Gate(ServedModel):
    """A model that works only while its gate is open, and counts the batches that it was given."""

    def __init__(self, served: ServedModel) -> None:
        self.__dict__ |= served.__dict__
        self.open, self.batches = threading.Event(), 0

    def opinions(self, rows: Sequence[Any]) -> list[Opinion]:
        self.batches += 1
        assert self.open.wait(60)
        return super().opinions(rows)


@contextmanager
def behind_a_gate(served: ServedModel, **settings: Any) -> Iterator[tuple[Running, Gate]]:
    gate = Gate(served)
    with running(gate, **settings) as server:
        try:
            yield server, gate
        finally:
            gate.open.set()


def until(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def head(length: int, path: str = ITEMS, more: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n{more}\r\n".encode()


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Status and everything that came until the server closed the connection, or the answer's body is there."""
    raw = b""
    while chunk := connection.recv(65536):
        raw += chunk
        top, found, body = raw.partition(b"\r\n\r\n")
        lengths = [line for line in top.lower().splitlines() if line.startswith(b"content-length:")]
        if found and lengths and len(body) >= int(lengths[0].split(b":")[1]):
            break
    return int(raw.split(b" ", 2)[1]) if raw else 0, raw


def is_closed(connection: socket.socket) -> bool:
    """Waits until the server closes a connection on which it says nothing."""
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


# ---- the queue


def test_a_full_queue_refuses_and_goes_on(served: ServedModel) -> None:
    """Forty requests of 50 tokens to a queue of 200: those that fit are answered, others hear when to come again."""
    request = {"items": [{"prompt_ids": [5] * 20, "response_ids": [6] * 30}]}
    with behind_a_gate(served, queue_tokens=200, batch_tokens=100) as (server, gate):
        answers: list[tuple[int, Any, dict[str, str]]] = []
        threads = [threading.Thread(target=lambda: answers.append(server.ask(ITEMS, request))) for _ in range(40)]
        for thread in threads:
            thread.start()
        until(lambda: len(answers) == 36)  # 200 / 50 are held, all others have their answer before one is computed
        for status, body, heads in answers:
            assert status == 429 and body["error"].startswith("the server has as much to do as it holds")
            assert 1 <= int(heads["retry-after"]) <= 60
        until(lambda: gate.batches == 1)  # the model's thread may still be starting
        assert server.app.service.batcher.held == 200
        gate.open.set()
        for thread in threads:
            thread.join(60)
        assert sorted(status for status, _, _ in answers) == [200] * 4 + [429] * 36
        assert server.app.service.batcher.held == 0
        assert server.ask(ITEMS, request)[0] == 200


def test_a_request_that_never_fits_is_told_to_split(served: ServedModel) -> None:
    with running(served, queue_tokens=100, batch_tokens=100) as server:
        item = {"prompt_ids": [5] * 10, "response_ids": [6] * 10}
        # the last item is never read
        status, body, heads = server.ask(ITEMS, {"items": [*[item] * 6, {}]})
        assert status == 413
        assert "has more than 100 tokens, which is all that this server holds; split it" in body["error"]
        assert "retry-after" not in heads
        assert server.ask("/v1/info")[1]["max_tokens"] == 100


def test_a_client_that_leaves_frees_its_place(served: ServedModel) -> None:
    body = json.dumps({"items": [{"prompt_ids": [5] * 20, "response_ids": [6] * 30}]}).encode()
    with behind_a_gate(served, queue_tokens=200, batch_tokens=50, window_ms=0) as (server, gate):
        connections = [server.connect() for _ in range(4)]
        for connection in connections:
            connection.sendall(head(len(body)) + body)
        until(lambda: server.app.service.batcher.held == 200 and gate.batches == 1)
        for connection in connections[1:]:
            connection.close()
        until(lambda: server.app.service.batcher.held == 50)
        assert server.app.service.batcher._waiting == []  # the row that is left is with the model
        counted = server.app.service.metrics.registry.get_sample_value
        until(lambda: counted("tlcr_requests_total", {"route": ITEMS, "status": "499"}) == 3)
        assert counted("tlcr_requests_total", {"route": ITEMS, "status": "500"}) is None
        gate.open.set()
        assert read_answer(connections[0])[0] == 200
        assert server.ask(ITEMS, ONE)[0] == 200
        assert gate.batches == 2  # nothing was computed for those that had left
        connections[0].close()


def test_a_request_that_waits_holds_its_rows_alone(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields that nobody reads may fill a body; the queue counts tokens and knows nothing of them."""
    read: list[weakref.ref[Any]] = []

    class Body(dict[str, Any]):
        pass

    def parse(raw: bytes) -> Any:
        body = Body(parse_json(raw))
        read.append(weakref.ref(body))
        return body

    monkeypatch.setattr(app, "parse_json", parse)
    request = {"query": ["abc"], "prompts": ["a"], "labels": [{}] * 1000}
    with behind_a_gate(served) as (server, gate):
        answers: list[tuple[int, Any, dict[str, str]]] = []
        asking = threading.Thread(target=lambda: answers.append(server.ask("/get_reward", request)))
        asking.start()
        until(lambda: gate.batches == 1)
        until(lambda: gc.collect() is not None and read[0]() is None)
        gate.open.set()
        asking.join(60)
        assert answers[0][0] == 200


# ---- what is read


@contextmanager
def tokenised(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the served tokenizer is called with."""
    kind, texts = type(served.tokenizer), []
    tokenise = kind.__call__

    def call(self: Any, text: Any, *arguments: Any, **named: Any) -> Any:
        texts.append(text)
        return tokenise(self, text, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "__call__", call)
        yield texts


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (ITEMS, {"items": [{"prompt": "a", "response": "b"}] * 1025}),
        ("/get_reward", {"query": ["ab"] * 1025, "prompts": ["a"] * 1025}),
        ("/score_texts?answer_after=a", {"messages": ["ab"] * 1025}),
        ("/pooling", {"input": ["ab"] * 1025}),
    ],
)
def test_answers_are_counted_before_any_is_read(
    server: Running, served: ServedModel, path: str, body: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tokenised(served, monkeypatch) as texts:
        status, answer, _ = server.ask(path, body)
        assert status == 413
        assert answer["error"].startswith("the request has 1025 answers, and this server takes at most 1024; split it")
        assert texts == []
        assert server.ask(ITEMS, {"items": body.get("items", [{"prompt": "a", "response": "b"}])[:1]})[0] == 200
        assert texts != []


LONG = "a b " * 10**5
MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        (ITEMS, {"items": [{"prompt": "a", "response": LONG}]}, "items[0]"),
        (ITEMS, {"items": [{"prompt": LONG, "response": "a"}]}, "items[0]"),
        (ITEMS, {"items": [{"prompt": " " * 10**5, "response": "a"}]}, "items[0]"),
        (ITEMS, {"items": [{"messages": MESSAGES, "response": LONG}]}, "items[0]"),
        (ITEMS, {"items": [{"messages": [{"role": "user", "content": LONG}], "response": "a"}]}, "items[0]"),
        ("/get_reward", {"query": ["a" + LONG], "prompts": ["a"]}, "query[0]"),
        ("/remote_rm", {"prompt": "a", "response": LONG}, "the request"),
        ("/score_texts?answer_after=c", {"messages": ["c" + LONG]}, "messages[0]"),
        ("/pooling", {"input": LONG}, "input"),
        ("/pooling", {"input": [LONG]}, "input[0]"),
    ],
)
def test_a_text_that_must_be_too_long_is_not_tokenised(
    server: Running, served: ServedModel, path: str, body: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tokenised(served, monkeypatch) as texts:
        status, answer, _ = server.ask(path, body)
        assert status == 400 and answer["error"].startswith(f"{place} has at least ")
        assert "tokens with its prompt, and the discriminator reads at most 256" in answer["error"]
        assert all(text == "a" for text in texts)  # by which it is seen whether the tokenizer adds a beginning
    assert server.ask(ITEMS, ONE)[0] == 200


def test_a_row_that_is_too_long_is_refused_before_its_characters_are_found(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(reading, "answer_spans", lambda *arguments: found.append(arguments))
    status, answer, _ = server.ask(ITEMS, {"items": [{"prompt": "a", "response": "b" * 256}]})
    assert status == 400 and answer["error"].startswith("items[0] has 258 tokens with its prompt")
    assert found == []


def test_another_request_is_read_between_the_answers_of_a_long_one(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "STRETCH", 0.0)
    encode, order = reading.encode_answers, []
    with running(served) as server:
        waiting = server.app.service.reading._work_queue

        def encode_in_turn(tokenizer: Any, prompts: Any, answers: Any, **named: Any) -> Any:
            order.append(prompts[0])
            if len(order) == 1:
                until(lambda: waiting.qsize() == 1)
            return encode(tokenizer, prompts, answers, **named)

        monkeypatch.setattr(reading, "encode_answers", encode_in_turn)
        answers: list[Any] = []
        long = {"items": [{"prompt": "long", "response": "a"}] * 3}
        thread = threading.Thread(target=lambda: answers.append(server.ask(ITEMS, long)[0]))
        thread.start()
        until(lambda: order == ["long"])
        assert server.ask(ITEMS, {"items": [{"prompt": "short", "response": "a"}]})[0] == 200
        thread.join(60)
    assert answers == [200] and order == ["long", "short", "long", "long"]


def test_a_client_that_leaves_is_read_no_further(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "STRETCH", 0.0)
    encode, read = reading.encode_answers, []
    body = json.dumps({"items": [{"prompt": "a", "response": "b"}] * 100}).encode()
    with running(served) as server:
        counted = server.app.service.metrics.registry.get_sample_value

        def has_left() -> bool:
            return counted("tlcr_requests_total", {"route": ITEMS, "status": "499"}) == 1

        def encode_until_it_left(tokenizer: Any, prompts: Any, answers: Any, **named: Any) -> Any:
            read.append(prompts[0])
            until(has_left)
            return encode(tokenizer, prompts, answers, **named)

        monkeypatch.setattr(reading, "encode_answers", encode_until_it_left)
        with server.connect() as connection:
            connection.sendall(head(len(body)) + body)
            until(lambda: read == ["a"])
        until(has_left)
        assert server.ask(ITEMS, ONE)[0] == 200  # after what the thread that reads still had to do
        assert server.app.service.bodies.held == 0
    assert read == ["a"]


# ---- bodies


def test_a_body_that_is_too_large_is_not_read(served: ServedModel) -> None:
    with running(served, max_body_mib=1) as server:
        for sent in (b"x" * (3 * MIB), b" " * 100 * MIB):
            status, body, _ = server.ask(ITEMS, sent)
            assert status == 413
            assert body["error"].startswith(f"the request's body has {len(sent) / MIB:.1f} MiB, and this server reads")
            assert server.app.service.bodies.held == 0


def test_a_body_of_unknown_length_is_read_up_to_the_limit(served: ServedModel) -> None:
    with running(served, max_body_mib=1) as server, server.connect() as connection:
        connection.sendall(f"POST {ITEMS} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        for _ in range(40):
            connection.sendall(chunk)
        connection.sendall(b"0\r\n\r\n")
        status, raw = read_answer(connection)
        assert status == 413 and b"more than 1 MiB" in raw
        assert server.app.service.bodies.held == 0


def test_bodies_together_are_bounded(served: ServedModel) -> None:
    """Seven clients begin a request of 1 MiB and hang; the next one finds no room, until they are gone."""
    half = MIB // 2 + 1
    with running(served, max_body_mib=1) as server:
        bodies = server.app.service.bodies
        assert bodies.most_held == 4 * MIB
        hanging = [server.connect() for _ in range(7)]
        for connection in hanging:
            connection.sendall(head(MIB) + b" " * half)
        until(lambda: bodies.held == 7 * half)
        status, body, heads = server.ask(ITEMS, b" " * MIB)
        assert status == 429 and "as many requests as it has memory for" in body["error"]
        assert heads["retry-after"] == "1" and bodies.held == 7 * half
        for connection in hanging:
            connection.close()
        until(lambda: bodies.held == 0)
        assert server.ask(ITEMS, ONE)[0] == 200


def test_half_a_body_ends_after_its_time(served: ServedModel) -> None:
    with running(served) as server, server.connect() as connection:
        server.app.service.bodies.seconds = 0.3
        connection.sendall(head(1000) + b'{"items": [')
        status, raw = read_answer(connection)
        assert status == 408 and b"did not arrive within 0.3 seconds" in raw
        server.app.service.bodies.seconds = 30
        assert server.ask(ITEMS, ONE)[0] == 200
        assert server.app.service.bodies.held == 0


def test_half_a_head_ends_after_its_time(served: ServedModel) -> None:
    with running(served, io_seconds=0.3) as server:
        for begun in (b"", b"POST /v1/token_rewards HTTP/1.1\r\nhost"):
            with server.connect() as connection:
                with suppress(OSError):  # on a busy machine its time may be over before it is sent
                    connection.sendall(begun)
                assert is_closed(connection)


def test_half_a_second_request_ends_too(served: ServedModel) -> None:
    """After an answer a connection stays open; a head that is begun on it and never ended does not keep it so."""
    body = json.dumps(ONE).encode()
    with running(served) as server, server.connect() as connection:
        connection.sendall(head(len(body)) + body)
        assert read_answer(connection)[0] == 200
        (kept,) = server.connections
        kept.seconds = 0.3
        connection.sendall(b"POST /v1")
        assert is_closed(connection)


@pytest.mark.parametrize("more", ["", "connection: close\r\n"])
def test_a_client_that_never_reads_is_let_go(more: str, served: ServedModel) -> None:
    """What the system does not take of an answer of some 10 MB is held by the server, and not for long."""

    class Wordy(Gate):
        def opinions(self, rows: Sequence[Any]) -> list[Opinion]:
            return [Opinion(torch.full((250, 2), math.pi), torch.zeros(250)) for _ in rows]

    body = json.dumps({"input": [[5] * 250] * 1024, "use_activation": False}).encode()
    with running(Wordy(served)) as server, server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        until(lambda: len(server.connections) == 1)
        (left,) = server.connections
        assert left.timeout_keep_alive == 31 and left.seconds == 30  # after io_seconds
        left.timeout_keep_alive = left.seconds = 4
        connection.sendall(head(len(body), "/pooling", more) + body)
        assert connection.recv(1)  # of the head, which goes out before the body is handed to the transport
        until(lambda: left.transport.get_write_buffer_size() > MIB)
        until(lambda: not server.connections)
        assert server.ask(ITEMS, ONE)[0] == 200


def test_disconnects_in_mid_request_leave_nothing(served: ServedModel) -> None:
    body = json.dumps(ONE).encode()
    with running(served) as server:
        for cut in (0, 10, len(head(len(body))) + 3, len(head(len(body)) + body)):
            with server.connect() as connection:
                connection.sendall((head(len(body)) + body)[:cut])
        assert server.ask(ITEMS, ONE)[0] == 200
        until(lambda: server.app.service.batcher.held == 0 and server.app.service.bodies.held == 0)


def test_connections_are_bounded(served: ServedModel) -> None:
    with running(served, max_connections=4) as server:
        idle = [server.connect() for _ in range(4)]
        until(lambda: len(server.connections) == 4)
        assert server.ask(ITEMS, ONE)[0] == 503
        for connection in idle:
            connection.close()
        until(lambda: server.ask(ITEMS, ONE)[0] == 200)


# ---- a model that fails


def test_logits_that_are_not_finite_are_refused_and_others_served(served: ServedModel) -> None:
    class Broken(Gate):
        def opinions(self, rows: Sequence[Any]) -> list[Opinion]:
            found = ServedModel.opinions(self, rows)
            return [
                Opinion(one.logits_TC * float("nan"), one.rewards_T) if 9 in row.ids else one
                for row, one in zip(rows, found, strict=True)
            ]

    with running(Broken(served)) as server:
        status, body, _ = server.ask(ITEMS, {"items": [*ONE["items"], {"prompt_ids": [5], "response_ids": [9]}]})
        assert status == 500 and "gives answer 1 logits that are not finite" in body["error"]
        assert server.ask(ITEMS, ONE)[0] == 200


def test_an_error_of_the_model_is_said_and_the_server_goes_on(
    served: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Gate):
        def opinions(self, rows: Sequence[Any]) -> list[Opinion]:
            if 9 in rows[0].ids:
                raise RuntimeError("no such kernel")
            return ServedModel.opinions(self, rows)

    with running(Failing(served)) as server:
        status, body, _ = server.ask(ITEMS, {"items": [{"prompt_ids": [5], "response_ids": [9]}]})
        assert status == 500 and "RuntimeError: no such kernel" in body["error"]
        assert server.ask(ITEMS, ONE)[0] == 200
    assert "a batch of 1 rows failed" in caplog.text


def test_a_batch_that_does_not_fit_is_halved(served: ServedModel, caplog: pytest.LogCaptureFixture) -> None:
    class Small(Gate):
        def _opinions(self, rows: Sequence[Any]) -> list[Opinion]:
            if len(rows) > 2:
                raise torch.OutOfMemoryError
            return super()._opinions(rows)

    rows = [reader_of(served).row_of_complete_text("a", "b" * n).encoded for n in range(1, 8)]
    halved = Small(served)
    halved.open.set()
    for one, other in zip(served.opinions(rows), halved.opinions(rows), strict=True):
        torch.testing.assert_close(one.rewards_T, other.rewards_T)
    assert "lower --batch-tokens" in caplog.text


# ---- the token


def test_the_token_is_wanted_everywhere_but_for_health(served: ServedModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with running(served, token="s3cret-token") as server:
        token, server.headers = server.headers, {}
        for heads in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "s3cret-token"},
            {"authorization": "Basic ?"},
            {"authorization": "Basic é"},
        ):
            for path in ("/v1/info", "/metrics", "/nothing"):
                status, body, answer = server.ask(path, **heads)
                assert status == 401 and "Authorization: Bearer TOKEN" in body["error"]
                assert answer["www-authenticate"] == "Bearer"
            assert server.ask(ITEMS, ONE, **heads)[0] == 401
        assert server.ask("/health")[0] == 200
        assert server.ask(ITEMS, ONE, **token)[0] == 200
        # what `requests` sends for http://any:s3cret-token@host, for trainers that take a URL and no header
        assert server.ask(ITEMS, ONE, authorization="Basic YW55OnMzY3JldC10b2tlbg==")[0] == 200
        assert "s3cret" not in repr(vars(server.app.service)) + repr(server.app.service.access)
    assert "s3cret" not in caplog.text


def test_where_the_token_comes_from(tmp_path: Any) -> None:
    file = tmp_path / "token"
    file.write_text("abc\n", encoding="utf-8")
    none, named = ServerSettings("d"), ServerSettings("d", token_file=str(file))
    assert read_token(none, {}) is None
    assert read_token(none, {TOKEN_VARIABLE: "x"}) == "x" and read_token(named, {}) == "abc"
    file.write_text("\n", encoding="utf-8")
    for settings, environment, message in (
        (named, {}, "is empty"),
        (none, {TOKEN_VARIABLE: "caf\u00e9"}, "no HTTP header holds"),
        (named, {TOKEN_VARIABLE: "x"}, "keep one of them"),
        (ServerSettings("d", token_file=str(tmp_path / "absent")), {}, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_token(settings, environment)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"discriminator": ""}, "no discriminator is named"),
        ({"port": 70000}, "ports end at 65535"),
        ({"workers": 0}, "--workers is 0; it must be at least 1"),
        ({"io_seconds": 0}, "--io-seconds is 0; it must be above 0"),
        ({"queue_tokens": 10, "batch_tokens": 11}, "no batch would ever be full"),
    ],
)
def test_settings_that_cannot_be_meant(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerSettings(**{"discriminator": "d", **changes})
