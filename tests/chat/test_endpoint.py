"""The endpoint, against a real server that misbehaves: what is repeated, what is counted, what is paid."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the endpoint is an extra")

from tests.chat.chat_server import ChatServer, closed_port, completion, held, mended, rejected_of, revision, serving
from tests.http_server import Reply
from tlcr.chat import Answer, AnswerStore, Message, NoAnswer, Question, ask, stored
from tlcr.chat import endpoint as endpoint_module
from tlcr.chat.budget import Budget
from tlcr.chat.endpoint import Endpoint
from tlcr.config.schema import EndpointConfig
from tlcr.errors import BudgetExhausted, CheckpointError, ConfigError, DataError, EndpointError

SOON = {"Retry-After": "0"}
BUSY = Reply({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, 429, SOON)


def question(text: str = "bad soup", **changes: Any) -> Question:
    content = f"<dispreferred>\n{text}\n</dispreferred>"
    values: dict[str, Any] = {"messages": (Message("user", content),), "max_new_tokens": 50, "temperature": 0.0}
    return Question(**{**values, "schema": {"title": "revision", "type": "object"}, **changes})


def config(server: ChatServer, **changes: Any) -> EndpointConfig:
    values: dict[str, Any] = {"model": "m", "base_url": server.address, "timeout": 5.0, "retries": 3}
    return EndpointConfig(**{**values, **changes})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AnswerStore]:
    with AnswerStore(tmp_path / "answers.sqlite") as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "BACKOFF", lambda state: 0.01)
    monkeypatch.setenv("TLCR_PROGRESS", "0")


def ask_one(server: ChatServer, store: AnswerStore, **changes: Any) -> Answer | NoAnswer:
    return ask(Endpoint(config(server, **changes), store), [question()], store, label="test")[0]


def test_an_answer_comes_with_its_tokens_and_is_asked_for_once(store: AnswerStore, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with serving(ChatServer()) as server:
        model = Endpoint(config(server, key_variable="MY_KEY", extra_body='{"seed": 7}'), store)
        first = ask(model, [question(), question(), question("bad tea")], store, label="test")
        again = ask(model, [question("bad tea"), question()], store, label="test")
    assert first[0] == first[1] == again[1] == Answer(revision("good soup"), "stop", 30, 20)
    assert again[0] == first[2] == Answer(revision("good tea"), "stop", 30, 20)
    assert len(server.requests) == 2
    assert server.keys == {"Bearer sk-secret"}
    sent = server.requests[0]
    assert (sent["model"], sent["max_tokens"], sent["temperature"], sent["seed"]) == ("m", 50, 0.0, 7)
    assert sent["response_format"]["json_schema"]["schema"] == {"title": "revision", "type": "object"}


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 51},
        {"temperature": 0.5},
        {"attempt": 1},
        {"template": "revise-2"},
        {"schema": None},
        {"messages": (Message("user", "<dispreferred>\nbad soup \n</dispreferred>"),)},
    ],
)
def test_whatever_an_answer_depends_on_is_in_its_key(changes: dict[str, Any]) -> None:
    identity = {"endpoint": "m"}
    assert question(**changes).key(identity) != question().key(identity)
    assert question().key({"endpoint": "n"}) != question().key(identity) == question().key(dict(identity))


BROKEN = {
    "429": BUSY,
    "500": Reply({"error": {"message": "oops"}}, 500),
    "502 with a page": Reply(b"<html>bad gateway</html>", 502, {"Content-Type": "text/html"}),
    "half an answer": Reply(completion(revision("good soup")), cut=40),
    "nothing at all": Reply(b"", cut=0, headers={"Content-Type": "application/json"}),
    "half of the JSON": Reply(json.dumps(completion("x")).encode()[:50]),
    "a page": Reply(b"<html>hello</html>", 200, {"Content-Type": "text/html"}),
    "a list": Reply([1, 2]),
    "an error with status 200": Reply({"error": {"message": "overloaded"}}),
    "no choices": Reply({**completion("x"), "choices": []}),
    "choices of another shape": Reply({**completion("x"), "choices": [{"text": "x"}]}),
    "half of a surrogate pair": Reply(completion("a \ud83d b")),
    "JSON nested too deeply": Reply(b'{"choices": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "choices that are no list": Reply({**completion("x"), "choices": {"0": 1}}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_may_pass_is_asked_again(name: str, store: AnswerStore) -> None:
    with serving(ChatServer(script=[BROKEN[name], BROKEN[name]])) as server:
        answer = ask_one(server, store)
    assert isinstance(answer, Answer) and answer.text == revision("good soup")
    assert len(server.requests) == 3
    assert store.totals()[0] == 3


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_pass_is_no_answer_and_nothing_is_kept_of_it(name: str, store: AnswerStore) -> None:
    with serving(ChatServer(lambda request: BROKEN[name])) as server:
        answer = ask_one(server, store, retries=1)
    assert isinstance(answer, NoAnswer) and not answer.final and "(2 times)" in answer.reason
    assert len(server.requests) == 2
    with serving(ChatServer()) as server:
        assert isinstance(ask_one(server, store), Answer)


@pytest.mark.parametrize("count", [2**70, -5, True, "many"])
def test_a_count_that_no_answer_can_have_costs_what_the_request_may_cost(count: object, store: AnswerStore) -> None:
    usage = {"prompt_tokens": count, "completion_tokens": 20}
    prices = {"prompt_price": 1e6, "answer_price": 1e6}
    with serving(ChatServer(lambda request: Reply(completion(revision("good soup"), usage=usage)))) as server:
        answer = ask_one(server, store, **prices)
    assert isinstance(answer, Answer) and answer.prompt_tokens is None
    assert store.totals() == (1, question().prompt_tokens_bound + question().max_new_tokens)


KEY = "sk-my-own-secret"


@pytest.mark.parametrize("status", [200, 400, 401, 429, 500])
def test_a_server_that_repeats_the_key_shows_it_to_nobody(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In an answer, in what is said of a failed one, and in every file."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    said = f"your header was Authorization: Bearer {KEY}"
    body = completion(said) if status == 200 else {"error": {"message": "x" * 270 + said}}
    reply = Reply(body, status, SOON)
    with serving(ChatServer(lambda request: reply)) as server, AnswerStore(tmp_path / "answers.sqlite") as store:
        try:
            shown = repr(ask_one(server, store, retries=1))
        except EndpointError as error:
            shown = str(error)
    assert server.keys == {f"Bearer {KEY}"}
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert "sk-my" not in shown + caplog.text and b"sk-my" not in kept
    assert "[hidden]" in shown or status != 200


@pytest.mark.parametrize(("key", "asked"), [("ollama", "How was it?"), (KEY, f"What does {KEY} mean?")])
def test_a_key_that_is_a_word_stays_in_an_answer(
    key: str, asked: str, store: AnswerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not in what is said of a failed one."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    replies = [Reply(completion(f"It is {key}.")), Reply({"error": {"message": f"no {key} here"}}, 400)]
    with serving(ChatServer(script=replies)) as server:
        model = Endpoint(config(server, concurrency=1), store)
        questions = [question(text, schema=None) for text in (asked, f"{asked}?")]
        answer, failed = ask(model, questions, store, label="test")
    assert isinstance(answer, Answer) and answer.text == f"It is {key}."
    assert isinstance(failed, NoAnswer) and key not in failed.reason and "no [hidden] here" in failed.reason


def test_a_password_in_the_address_of_the_environment_is_refused(
    store: AnswerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:my-password@localhost:1/v1")
    with pytest.raises(ConfigError, match="OPENAI_BASE_URL holds a user name or password") as caught:
        ask(Endpoint(EndpointConfig(model="m"), store), [question()], store, label="test")
    assert "my-password" not in str(caught.value)


def test_a_server_that_hangs_is_given_up(store: AnswerStore) -> None:
    release = threading.Event()
    with serving(ChatServer(script=[lambda _: held(Reply(completion("late")), release)])) as server:
        answer = ask_one(server, store, timeout=1.5)
        release.set()
    assert isinstance(answer, Answer) and answer.text == revision("good soup")
    assert len(server.requests) == 2


def test_a_server_that_dribbles_is_given_up_too(store: AnswerStore) -> None:
    """A byte every 0.1 s: a time-out that starts anew with every byte would wait for the end of it."""
    with serving(ChatServer(script=[Reply(completion("late"), dribble_s=0.1)])) as server:
        answer = ask_one(server, store, timeout=1.5)
    assert isinstance(answer, Answer) and answer.text == revision("good soup")
    assert len(server.requests) == 2


def test_a_server_that_is_not_there_is_no_answer(store: AnswerStore, caplog: pytest.LogCaptureFixture) -> None:
    server = ChatServer()
    server.address = f"http://127.0.0.1:{closed_port()}/v1"
    prices = {"prompt_price": 1.0, "answer_price": 1.0}
    answer = ask_one(server, store, retries=1, **prices)
    assert isinstance(answer, NoAnswer) and not answer.final
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("tlcr")]
    assert said.startswith(f"{server.address}/ gave no answer: the connection failed")
    assert "repeated up to 1 times" in said
    assert store.totals() == (2, 0.0)  # what never reached a server costs nothing


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_waited_for_by_everyone(as_date: bool, store: AnswerStore) -> None:
    """Of two requests under way, one is refused and then the other answered; whatever comes next has waited."""
    both, refused, refused_at, asked_at = threading.Event(), threading.Event(), [0.0], []

    def behave(request: dict[str, Any]) -> Reply:
        asked_at.append(time.monotonic())
        if rejected_of(request) == "bad a" and not refused.is_set():
            both.wait(10)
            refused_at[0] = time.monotonic()
            refused.set()
            wait = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "1"
            return Reply({"error": {"message": "slow down"}}, 429, {"Retry-After": wait})
        if rejected_of(request) == "bad b":  # whichever of the two comes first waits for the other
            both.set()
            refused.wait(10)
            time.sleep(0.3)
        return mended(request)

    with serving(ChatServer(behave)) as server:
        model = Endpoint(config(server, concurrency=2, timeout=20.0), store)
        answers = ask(model, [question(f"bad {name}") for name in "abcd"], store, label="test")
    assert all(isinstance(answer, Answer) for answer in answers)
    assert len(asked_at) == 5
    assert min(asked_at[2:]) - refused_at[0] >= 0.95  # a date has whole seconds: 2 s ahead is at least 1


def test_a_server_that_asks_for_a_day_ends_the_run(store: AnswerStore) -> None:
    limit = Reply({"error": {"message": "daily limit"}}, 429, {"Retry-After": "86400"})
    with serving(ChatServer(lambda request: limit)) as server, pytest.raises(EndpointError, match="wait for 86400 s"):
        ask_one(server, store)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "code"), [(401, "invalid_api_key"), (402, None), (404, "model_not_found"), (429, "insufficient_quota")]
)
def test_what_holds_for_every_request_ends_the_run_at_once(status: int, code: str | None, store: AnswerStore) -> None:
    reply = Reply({"error": {"message": "no such thing", "code": code}}, status, SOON)
    with serving(ChatServer(lambda request: reply)) as server:
        model = Endpoint(config(server, concurrency=1), store)
        with pytest.raises(EndpointError, match=f"{status}.*no such thing.*OPENAI_API_KEY"):
            ask(model, [question(f"bad {k}") for k in range(5)], store, label="test")
    assert len(server.requests) == 1


def test_a_server_that_takes_no_schema_is_asked_without_from_then_on(store: AnswerStore) -> None:
    def behave(request: dict[str, Any]) -> Reply:
        if "response_format" in request:
            return Reply({"error": {"message": "response_format is not supported"}}, 400)
        return mended(request)

    with serving(ChatServer(behave)) as server:
        model = Endpoint(config(server, concurrency=1), store)
        answers = ask(model, [question(f"bad {k}") for k in range(4)], store, label="test")
    assert all(isinstance(answer, Answer) for answer in answers)
    assert ["response_format" in request for request in server.requests] == [True, False, False, False, False]


def test_a_request_that_is_refused_for_its_content_is_dropped_and_the_others_keep_their_schema(
    store: AnswerStore,
) -> None:
    def behave(request: dict[str, Any]) -> Reply:
        if "awful" in request["messages"][-1]["content"]:
            return Reply({"error": {"message": "filtered", "code": "content_filter"}}, 400)
        return mended(request)

    texts = ["bad 0", "awful", "bad 1"]
    with serving(ChatServer(behave)) as server:
        model = Endpoint(config(server, concurrency=1), store)
        first, filtered, last = ask(model, [question(text) for text in texts], store, label="test")
    assert isinstance(first, Answer) and isinstance(last, Answer)
    assert isinstance(filtered, NoAnswer) and filtered.final and "filtered" in filtered.reason
    assert "response_format" in server.requests[-1]


def test_a_server_that_only_fails_ends_the_run(store: AnswerStore) -> None:
    with serving(ChatServer(lambda request: BROKEN["500"])) as server:
        model = Endpoint(config(server, concurrency=1, retries=0), store)
        with pytest.raises(EndpointError, match="10 questions in a row"):
            ask(model, [question(f"bad {k}") for k in range(100)], store, label="test")
    assert len(server.requests) == 10


@pytest.mark.parametrize(
    ("changes", "finish", "text"),
    [
        ({"finish_reason": "length"}, "length", "half"),
        ({"finish_reason": "content_filter"}, "refusal", "half"),
        ({"refusal": "I will not"}, "refusal", "half"),
    ],
)
def test_how_an_answer_ended_is_kept_with_it(changes: dict[str, Any], finish: str, text: str, store) -> None:
    with serving(ChatServer(lambda request: Reply(completion("half", **changes)))) as server:
        assert ask_one(server, store) == ask_one(server, store) == Answer(text, finish, 30, 20)  # type: ignore[arg-type]
    assert len(server.requests) == 1


def test_a_refusal_without_text_is_a_refusal(store: AnswerStore) -> None:
    with serving(ChatServer(lambda request: Reply(completion(None, refusal="I will not")))) as server:
        assert ask_one(server, store) == Answer("I will not", "refusal", 30, 20)


# ---- how many at a time, how fast, how much


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_than_allowed_are_under_way_and_so_many_are(concurrency: int, store: AnswerStore) -> None:
    """Each request is held until as many as allowed are there; were one more let in, the server would see it."""
    full = threading.Event()

    def behave(request: dict[str, Any]) -> Reply:
        if server.under_way >= concurrency:
            full.set()
        full.wait(10)
        time.sleep(0.02)
        return mended(request)

    with serving(ChatServer(behave)) as server:
        model = Endpoint(config(server, concurrency=concurrency), store)
        answers = ask(model, [question(f"bad {k}") for k in range(4 * concurrency)], store, label="test")
    assert all(isinstance(answer, Answer) for answer in answers)
    assert server.most_under_way == concurrency


def test_requests_are_spaced_to_the_rate(store: AnswerStore) -> None:
    asked: list[float] = []

    def behave(request: dict[str, Any]) -> Reply:
        asked.append(time.monotonic())
        return mended(request)

    with serving(ChatServer(behave)) as server:
        model = Endpoint(config(server, requests_per_minute=300.0), store)
        ask(model, [question(f"bad {k}") for k in range(6)], store, label="test")
    assert asked[-1] - asked[0] >= 0.9  # five gaps of 0.2 s; a machine that is slow only makes it more


def test_tokens_are_held_to_their_rate_and_a_question_beyond_it_still_gets_through(store: AnswerStore) -> None:
    one = question().prompt_tokens_estimate + question().max_new_tokens
    asked: list[float] = []

    def behave(request: dict[str, Any]) -> Reply:
        asked.append(time.monotonic())
        return mended(request)

    with serving(ChatServer(behave)) as server:
        # Room for two at once; the third has to wait until one has leaked out of the bucket's 60 s.
        model = Endpoint(config(server, tokens_per_minute=2.0 * one + 1), store)
        questions = [question("bad 0"), question("bad 1")]
        assert all(isinstance(answer, Answer) for answer in ask(model, questions, store, label="test"))
        small = Endpoint(config(server, tokens_per_minute=one - 1.0), store)
        assert isinstance(ask(small, [question("bad 2")], store, label="test")[0], Answer)
    with serving(ChatServer(behave)) as server:
        fast = Endpoint(config(server, tokens_per_minute=60.0 * one), store)
        asked.clear()
        ask(fast, [question(f"bad {k:02}") for k in range(10, 72)], store, label="test")
    assert len(asked) == 62 and asked[-1] - asked[0] >= 0.9  # sixty at once, then one a second


PRICES = {"prompt_price": 1000.0, "answer_price": 2000.0}
COST = (30 * 1000 + 20 * 2000) / 1_000_000
"""Of an answer with the server's usage, 30 and 20 tokens."""


def bound_of(q: Question) -> float:
    return (q.prompt_tokens_bound * 1000 + q.max_new_tokens * 2000) / 1_000_000


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_cap_on_money_stops_before_it_is_crossed_and_a_higher_one_goes_on(
    concurrency: int, store: AnswerStore
) -> None:
    questions = [question(f"bad {k:02}") for k in range(20)]
    cap = 5 * COST + bound_of(questions[0]) - 1e-9  # five answers, and not room for the sixth
    with serving(ChatServer()) as server:
        model = Endpoint(config(server, concurrency=concurrency, max_cost=cap, **PRICES), store)
        with pytest.raises(BudgetExhausted, match="max_cost"):
            ask(model, questions, store, label="test")
        assert len(server.requests) == 5
        assert store.totals() == (5, pytest.approx(5 * COST))
        with pytest.raises(BudgetExhausted):
            ask(model, questions, store, label="test")
        assert len(server.requests) == 5
        free = Endpoint(config(server, max_cost=1000.0, **PRICES), store)
        assert all(isinstance(answer, Answer) for answer in ask(free, questions, store, label="test"))
    assert len(server.requests) == 20
    assert set(server.answered.values()) == {1}


@pytest.mark.parametrize("fails", ["settle_request", "drop_request"])
def test_who_waits_for_a_request_that_the_store_cannot_record_gets_on(
    fails: str, store: AnswerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*values: Any, **named: Any) -> None:
        raise ConfigError("the disk is full")

    async def two_requests() -> None:
        budget = Budget(EndpointConfig(model="m", max_cost=bound_of(question()), **PRICES), store)
        first = await budget.reserve("a", question())
        second = asyncio.create_task(budget.reserve("b", question()))
        await asyncio.sleep(0)
        assert not second.done(), "there is room for one"
        monkeypatch.setattr(store, fails, full)
        with pytest.raises(ConfigError, match="full"):
            await (budget.settle(first, billed=False) if fails == "settle_request" else budget.give_back(first))
        await asyncio.wait_for(second, 30)

    asyncio.run(two_requests())


def test_a_request_that_the_store_cannot_open_is_not_under_way(
    store: AnswerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(key: str, cost: float) -> int:
        raise ConfigError("the disk is full")

    async def one_request() -> None:
        budget = Budget(EndpointConfig(model="m", max_cost=bound_of(question()), max_requests=1, **PRICES), store)
        with monkeypatch.context() as patched, pytest.raises(ConfigError, match="full"):
            patched.setattr(store, "open_request", full)
            await budget.reserve("a", question())
        await asyncio.wait_for(budget.reserve("a", question()), 30)

    asyncio.run(one_request())


def test_the_cap_on_requests_counts_every_one_that_is_sent(store: AnswerStore) -> None:
    with serving(ChatServer(script=[BUSY, BUSY])) as server:
        model = Endpoint(config(server, concurrency=2, max_requests=5), store)
        with pytest.raises(BudgetExhausted, match="max_requests is 5"):
            ask(model, [question(f"bad {k}") for k in range(9)], store, label="test")
    assert len(server.requests) == 5
    assert sum(server.answered.values()) == 3


def test_what_may_have_been_billed_counts_as_billed(store: AnswerStore) -> None:
    bound = bound_of(question())
    with serving(ChatServer(script=[BROKEN["half an answer"], BROKEN["500"]])) as server:
        ask_one(server, store, **PRICES)
    assert store.totals() == (3, pytest.approx(bound + 0 + COST))


def test_an_answer_without_token_counts_is_charged_at_its_bound(store: AnswerStore) -> None:
    with serving(ChatServer(lambda request: Reply(completion("x", usage=None)))) as server:
        answer = ask_one(server, store, **PRICES)
    assert answer == Answer("x", "stop", None, None)
    assert store.totals() == (1, pytest.approx(bound_of(question())))


def test_a_bound_is_above_what_a_tokenizer_makes_of_the_prompt(tiny_tokenizer) -> None:
    for text in ("plain words", "Ж€漢字 \N{GRINNING FACE}" * 20, "\n\t" * 50):
        asked = question(text)
        assert asked.prompt_tokens_bound >= len(tiny_tokenizer(asked.messages[0].content)["input_ids"]) + 4
        assert asked.prompt_tokens_bound > asked.prompt_tokens_estimate


# ---- kill -9, Ctrl-C, two at a time

ASKING = """
import sys
from tests.chat.test_endpoint import question
from tlcr.chat import AnswerStore, ask
from tlcr.chat.endpoint import Endpoint
from tlcr.config.schema import EndpointConfig
with AnswerStore(sys.argv[1]) as store:
    cfg = EndpointConfig(model="m", base_url=sys.argv[2], concurrency=2, prompt_price=1000.0, answer_price=2000.0)
    ask(Endpoint(cfg, store), [question(f"bad {k:02}") for k in range(8)], store, label="test")
"""


def start_asking(path: Path, server: ChatServer) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", ASKING, str(path), server.address]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], env={**os.environ, "TLCR_PROGRESS": "0"})


def wait_until(condition, what: str) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"waited in vain until {what}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_has_lost_nothing_and_pays_for_nothing_twice(number: signal.Signals, tmp_path: Path) -> None:
    """Four questions are answered and two are under way when the process is ended."""
    path, hold = tmp_path / "answers.sqlite", threading.Event()

    def behave(request: dict[str, Any]) -> Reply:
        reply = mended(request)
        return reply if len(server.requests) <= 4 else held(reply, hold)

    with serving(ChatServer(behave)) as server:
        asking = start_asking(path, server)
        # Two at a time, and who asks again has kept the answer before: when six have asked, four answers are kept.
        wait_until(lambda: len(server.requests) == 6, "four are answered and two are under way")
        asking.send_signal(number)
        if number == signal.SIGTERM:
            time.sleep(2)  # it hears of it; what is under way may then finish, since it will be paid for
            hold.set()
        code = asking.wait(timeout=120)
        hold.set()
        assert code == -signal.SIGKILL if number == signal.SIGKILL else code not in (0, -signal.SIGTERM)
        before = len(server.requests)
        assert before == 6
        done = 4 if number == signal.SIGKILL else 6
        with AnswerStore(path) as store:
            model = Endpoint(EndpointConfig(model="m"), store)
            kept = stored(model, [question(f"bad {k:02}") for k in range(8)], store)
            assert sum(answer is not None for answer in kept) == done
            requests, cost = store.totals()
            under_way = (6 - done) * bound_of(question("bad 00"))
            assert (requests, cost) == (6, pytest.approx(done * COST + under_way))
        assert start_asking(path, server).wait(timeout=180) == 0
    again = [request["messages"][-1]["content"] for request in server.requests[before:]]
    assert len(again) == len(set(again)) == 8 - done
    paid = {request["messages"][-1]["content"] for request in server.requests[: 4 if done == 4 else 6]}
    assert not paid & set(again)


def test_a_store_that_is_in_use_is_not_shared(tmp_path: Path) -> None:
    with AnswerStore(tmp_path / "a"), pytest.raises(ConfigError, match="another tlcr process"):
        AnswerStore(tmp_path / "a").__enter__()
    with AnswerStore(tmp_path / "a"):
        pass


def test_what_cannot_hold_a_store_is_said_as_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; name the file in which answers are to be kept"):
        AnswerStore(tmp_path).__enter__()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*: File exists"):
        AnswerStore(tmp_path / "file" / "a.sqlite").__enter__()

    foreign = tmp_path / "foreign.sqlite"
    with contextlib.closing(sqlite3.connect(foreign)) as database:
        database.executescript("CREATE TABLE answers (question TEXT, reply TEXT)")
    with pytest.raises(DataError, match=r"is not a store of answers.*its table answers has question, reply"):
        AnswerStore(foreign).__enter__()

    locked = tmp_path / "locked.sqlite"
    with AnswerStore(locked):
        pass
    with contextlib.closing(sqlite3.connect(locked)) as viewer:
        viewer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ConfigError, match="is locked by another program, such as a viewer of databases"):
            AnswerStore(locked, patience=0.1).__enter__()
    with AnswerStore(locked):
        pass
    with contextlib.closing(sqlite3.connect(foreign)) as database:
        assert database.execute("SELECT COUNT(*) FROM answers").fetchone() == (0,)


def test_an_answer_that_the_disk_changed_is_noticed_and_older_stores_are_read(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    with AnswerStore(path) as store:
        store.put("k", Answer("good", "stop", 1, 2), template="t", model="m")
        assert store.get("k") == Answer("good", "stop", 1, 2)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE answers SET text = 'gooe'")
    with AnswerStore(path) as store, pytest.raises(DataError, match=r"damaged .an answer is another than when it was"):
        store.get("k")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DROP TABLE checksums")
    with AnswerStore(path) as store:
        assert store.get("k") == Answer("gooe", "stop", 1, 2)


def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes, which are long enough to be taken for something else than an empty file\n" * 20)
    before = path.read_bytes()
    store = AnswerStore(path)
    with pytest.raises(DataError, match="not a store of answers"), store:
        pass
    assert path.read_bytes() == before
    path.unlink()
    with AnswerStore(path):  # neither the file nor its lock is held by the one that failed
        pass


def test_without_a_key_or_a_server_of_ones_own_the_message_says_what_to_do(store, monkeypatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        ask(Endpoint(EndpointConfig(model="m"), store), [question()], store, label="test")


def test_it_works_where_an_event_loop_is_running_already(store: AnswerStore) -> None:
    """A notebook, say."""
    import asyncio

    async def cell() -> Answer | NoAnswer:
        return ask_one(server, store)

    with serving(ChatServer()) as server:
        assert isinstance(asyncio.run(cell()), Answer)


def test_the_progress_shows_money_spent_and_money_left(store: AnswerStore, monkeypatch) -> None:
    from tlcr.chat.ask import Progress

    seen: list[tuple[int, dict[str, float]]] = []
    monkeypatch.setattr(Progress, "on_step", lambda self, step, metrics: seen.append((step, dict(metrics))))
    with serving(ChatServer()) as server:
        model = Endpoint(config(server, concurrency=1, **PRICES), store)
        ask(model, [question("bad 0")], store, label="test")
        seen.clear()
        ask(model, [question(f"bad {k}") for k in range(4)], store, label="test")
    assert [step for step, _ in seen] == [2, 3, 4]
    assert [figures["spent"] for _, figures in seen] == pytest.approx([2 * COST, 3 * COST, 4 * COST])
    assert [figures["to_spend"] for _, figures in seen] == pytest.approx([2 * COST, COST, 0])
