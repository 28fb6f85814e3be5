"""The client beside both servers: the golden answers at every token, and one sentence where a server fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import http_server
from tlcr.errors import HostError
from tlcr.hosts import client as module
from tlcr.hosts.client import RewardClient, rewards_of_logits, vocabulary_fingerprint
from tlcr.hosts.contract import Item

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))
HOSTS = Path(__file__).parents[2] / "docs" / "hosts"
PAGES = [HOSTS / f"{name}.md" for name in ("openrlhf", "skyrl", "slime", "swift", "verl")]
Reply = tuple[int, Any, dict[str, str]]


@contextmanager
def answering(reply: Callable[[str, Any, dict[str, str]], Reply]) -> Iterator[str]:
    """A server that answers what ``reply`` says of path, body and heads; status 0: it is gone in mid-request."""

    def handle(path: str, body: Any, headers: Mapping[str, str]) -> http_server.Reply:
        status, answer, heads = reply(path, body or None, {name.lower(): value for name, value in headers.items()})
        if status == 0:
            raise ConnectionError(path)
        return http_server.Reply(answer, status, heads)

    with http_server.listening(handle) as url:
        yield url


INFO = {
    "labels": ["negative", "positive"],
    "limits": {"items": 2, "request_tokens": 12},
    "tokenizer": {"fingerprint": "f"},
}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that the client would have made."""
    pauses: list[float] = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    return pauses


def echo(path: str, body: Any, heads: dict[str, str]) -> Reply:
    """``tlcr serve`` whose reward of a token is its id / 100."""
    if path == "/v1/info":
        return 200, INFO, {}
    return 200, {"data": [{"rewards": [one / 100 for one in item["response_ids"]]} for item in body["items"]]}, {}


def test_requests_are_split_and_put_together_in_order() -> None:
    seen: list[list[list[int]]] = []

    def reply(path: str, body: Any, heads: dict[str, str]) -> Reply:
        if body is not None:
            seen.append([item["response_ids"] for item in body["items"]])
        return echo(path, body, heads)

    items = [
        Item([1], [2, 3]),
        Item([1], []),
        Item([1], [4]),
        Item([1], [5], mask=[0]),
        Item([1] * 9, [6, 7, 8]),
        Item([], [9]),
    ]
    with answering(reply) as url:
        found = RewardClient(url).token_rewards(items)
    assert found == [[0.02, 0.03], [], [0.04], [0.0], [0.06, 0.07, 0.08], [0.09]]
    assert seen == [[[2, 3], [4]], [[5]], [[6, 7, 8]], [[9]]]  # two items, and twelve tokens, at the most


@pytest.mark.parametrize(
    ("limits", "sent"),
    [
        ({"items": 2}, ["ab", "cd", "e"]),
        ({"items": 9, "request_tokens": 200}, ["ab", "c", "de"]),
        ({"items": 9, "body_bytes": 200}, ["ab", "c", "de"]),
        ({"items": 9, "body_bytes": 60}, ["a", "b", "c", "d", "e"]),
        ({"body_bytes": 10**9}, ["abcde"]),
        ({}, ["abcde"]),
    ],
)
def test_texts_are_split_by_their_length_and_put_together_in_order(limits: dict[str, int], sent: list[str]) -> None:
    """By bytes, of which a text has no fewer than tokens; one that is longer by itself goes alone."""
    seen: list[str] = []
    bodies: list[int] = []

    def reply(path: str, body: Any, heads: dict[str, str]) -> Reply:
        if path == "/v1/info":
            return 200, {**INFO, "limits": limits}, {}
        seen.append("".join(item["response"] for item in body["items"]))
        bodies.append(int(heads["content-length"]))
        data = [{"rewards": [ord(item["response"]) / 1000], "offsets": [[0, 1]]} for item in body["items"]]
        return 200, {"data": data}, {}

    answers = [
        {"prompt": "x" * 30, "response": "a"},
        {"messages": [{"role": "user", "content": "x" * 30}], "response": "b"},
        {"prompt": "é" * 40, "response": "c"},
        {"prompt": "", "response": "d", "ended": False},
        {"prompt": "x", "response": "e"},
    ]
    with answering(reply) as url:
        found = RewardClient(url).text_rewards(answers)
    assert seen == sent
    assert [one.rewards for one in found] == [[0.097], [0.098], [0.099], [0.1], [0.101]]
    assert all(size <= limits.get("body_bytes", size) for size, part in zip(bodies, seen, strict=True) if len(part) > 1)


def test_many_long_texts_are_no_request_that_a_server_refuses() -> None:
    """``tlcr serve`` as it starts by default answers 413 to more bytes or tokens than it can hold."""
    limits = {"items": 1024, "body_bytes": 16 << 20, "request_tokens": 524288}

    def reply(path: str, body: Any, heads: dict[str, str]) -> Reply:
        if path == "/v1/info":
            return 200, {**INFO, "limits": limits}, {}
        tokens = sum(len(item["prompt"] + item["response"]) for item in body["items"])
        if tokens > limits["request_tokens"] or int(heads["content-length"]) > limits["body_bytes"]:
            return 413, {"error": "split it"}, {}
        return 200, {"data": [{"rewards": [0.5], "offsets": [[0, 1]]} for _ in body["items"]]}, {}

    with answering(reply) as url:
        found = RewardClient(url).text_rewards([{"prompt": "x" * 9000, "response": "y"}] * 100)
    assert len(found) == 100


@pytest.mark.parametrize("answer", [{"prompt": b"bytes", "response": ""}, "a text"])
def test_an_answer_that_cannot_be_sent_is_named(answer: Any) -> None:
    with (
        answering(echo) as url,
        pytest.raises(HostError, match=r"answers\[1\] cannot be sent as JSON .*; wanted texts"),
    ):
        RewardClient(url).text_rewards([{"prompt": "", "response": ""}, answer])


@pytest.mark.parametrize("case", GOLDEN["items"], ids=range(len(GOLDEN["items"])))
def test_vllm_gives_the_golden_rewards(case: dict[str, Any]) -> None:
    """vLLM's rows of logits stand for prompt and answer; the answer's are the last."""
    asked: list[Any] = []

    def reply(path: str, body: Any, heads: dict[str, str]) -> Reply:
        if path == "/v1/models":
            return 200, {"data": [{"id": "d", "root": "/nowhere/d", "max_model_len": 64}]}, {}
        if path != "/pooling":
            return 404, {"detail": "Not Found"}, {}
        asked.append(body)
        return 200, {"data": [{"index": 0, "object": "pooling", "data": case["logits"]}]}, {}

    item = Item(case["prompt_ids"], case["response_ids"], case["mask"])
    with answering(reply) as url:
        (found,) = RewardClient(url, temperature=GOLDEN["temperature"]).token_rewards([item])
    assert found == pytest.approx(case["rewards"], abs=1e-9)
    if len(case["response_ids"]):
        (body,) = asked
        assert body == {"model": "d", "input": [[*case["prompt_ids"], *case["response_ids"]]], "use_activation": False}
        shifted = [0.0, *case["rewards"][:-1]]
        assert shifted == case["rewards"] or found != pytest.approx(shifted, abs=1e-6)


def test_the_temperature_of_vllm_is_read_where_its_folder_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"tlcr_temperature": 2.5}), encoding="utf-8")

    def reply(root: str) -> Callable[[str, Any, dict[str, str]], Reply]:
        models = {"data": [{"id": "d", "root": root, "max_model_len": 64}]}
        return lambda path, body, heads: (200, models, {}) if path == "/v1/models" else (404, {}, {})

    with answering(reply(str(tmp_path))) as url:
        assert RewardClient(url).info()["temperature"] == 2.5
    with (
        answering(reply("hub/name")) as url,
        pytest.raises(HostError, match=r"give it: RewardClient\(url, temperature="),
    ):
        RewardClient(url).token_rewards([])


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"tlcr_bidirectional_layers": 2}, "the top 2 layers of .* are bidirectional, and vLLM .* 'tlcr serve"),
        (
            {"id2label": {"0": "positive", "1": "negative"}},
            r"has the labels \['positive', 'negative'\]; wanted negative",
        ),
    ],
)
def test_a_folder_that_vllm_scores_otherwise_is_refused(config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """vLLM says nothing of it: whoever gives the temperature has the folder looked at too."""

    def reply(path: str, body: Any, heads: dict[str, str]) -> Reply:
        if path == "/v1/models":
            return 200, {"data": [{"id": "d", "root": str(tmp_path), "max_model_len": 64}]}, {}
        return (404, {}, {}) if body is None else (200, {"data": [{"data": [[0.0, 1.0]] * 2}]}, {})

    (tmp_path / "config.json").write_text(json.dumps({"tlcr_temperature": 2.5, **config}), encoding="utf-8")
    for temperature in (None, 1.0):
        with answering(reply) as url, pytest.raises(HostError, match=sentence):
            RewardClient(url, temperature=temperature).token_rewards([Item([1], [2])])
    (tmp_path / "config.json").write_text(
        json.dumps({"tlcr_bidirectional_layers": 0, "id2label": {"0": "negative", "1": "positive"}}), encoding="utf-8"
    )
    with answering(reply) as url:
        assert RewardClient(url).token_rewards([Item([1], [2])]) == [[pytest.approx(0.46211716)]]


def test_a_busy_server_is_asked_again_after_what_it_says(no_pauses: list[float]) -> None:
    left = [429, 503, 0]

    def reply(path: str, body: Any, heads: dict[str, str]) -> Reply:
        if body is not None and left:
            status = left.pop(0)
            return status, {"error": "busy"}, {"retry-after": "7"} if status == 429 else {}
        return echo(path, body, heads)

    with answering(reply) as url:
        assert RewardClient(url).token_rewards([Item([1], [2])]) == [[0.02]]
    assert len(no_pauses) == 3 and 7 <= no_pauses[0] <= 10.5 and all(0 < pause <= 60 for pause in no_pauses)


def test_a_server_that_stays_busy_is_given_up(no_pauses: list[float]) -> None:
    replies = {"/v1/info": (200, INFO, {})}
    with answering(lambda path, *_: replies.get(path, (429, {"error": "full"}, {"retry-after": "9999"}))) as url:
        client = RewardClient(url, tries=3)
        for _ in range(2):  # it is there: the next request waits for its turn too
            with pytest.raises(HostError, match="answers 429: full; given up after 3 tries"):
                client.token_rewards([Item([1], [2])])
    assert len(no_pauses) == 4 and max(no_pauses) <= 60


def test_no_server_is_one_sentence() -> None:
    with answering(echo) as url:
        pass
    with pytest.raises(
        HostError, match=r"cannot be reached: .*refused.*; given up after 2 tries. Is the reward server"
    ):
        RewardClient(url, tries=2).token_rewards([Item([1], [2])])


def test_many_answers_give_a_server_up_in_the_time_of_one(no_pauses: list[float]) -> None:
    with answering(echo) as url:
        pass
    client = RewardClient(url, tries=4)

    def ask(number: int) -> str:
        with pytest.raises(HostError, match="cannot be reached") as caught:
            client.token_rewards([Item([1], [2])])
        return str(caught.value)

    with ThreadPoolExecutor(8) as threads:
        said = list(threads.map(ask, range(32)))
    assert len(no_pauses) == 3, "one series of four tries"
    assert {re.sub(r".*; given up after (.*)\. Is.*", r"\1", one) for one in said} == {"4 tries", "one try"}


def test_a_server_that_was_given_up_is_waited_for_again_after_a_minute(
    no_pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, statuses = [1000.0], []

    def reply(path: str, body: Any, heads: dict[str, str]) -> Reply:
        status = 200 if path == "/v1/info" or not statuses else statuses.pop(0)
        return echo(path, body, heads) if status == 200 else (status, {"error": "away"}, {})

    def ask(*given: int) -> str:
        """What comes of a request to a server that answers so, and in how many pauses."""
        statuses[:], no_pauses[:] = given, []
        try:
            return f"{client.token_rewards([Item([1], [2])])} in {len(no_pauses)}"
        except HostError as error:
            return f"{error} in {len(no_pauses)}"

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=no_pauses.append)
    monkeypatch.setattr(module, "time", clock)  # the client's alone
    with answering(reply) as url:
        client = RewardClient(url, tries=3)
        for seconds, tries in ((0, "3 tries"), (30, "one try"), (29, "one try"), (1, "3 tries"), (59, "one try")):
            now[0] += seconds
            assert f"given up after {tries}." in ask(502, 502, 502)
        assert ask(429, 200) == "[[0.02]] in 1"  # it is back, and was full
        assert "given up after 3 tries." in ask(504, 502, 504)
        assert ask(200) == "[[0.02]] in 0"
        assert ask(504, 200) == "[[0.02]] in 1"  # an answer ends the minute
        assert "given up after 3 tries." in ask(503, 503, 503)
        assert "given up after 3 tries." in ask(503, 503, 503)  # full, or starting: others wait for their turn too


def test_how_long_a_server_may_be_away(no_pauses: list[float]) -> None:
    """The pages of the trainers say one to two minutes."""
    with answering(echo) as url:
        pass
    with pytest.raises(HostError, match="given up after 8 tries"):
        RewardClient(url).token_rewards([Item([1], [2])])
    assert 60 < sum(no_pauses) < 120
    shortest = sum(min(2.0**attempt / 2, module.LONGEST_WAIT / 2) for attempt in range(7))
    assert shortest == 61.5
    assert all("one to two minutes" in page.read_text(encoding="utf-8").lower() for page in PAGES)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ((400, {"error": "items[0] has the id 9"}, {}), "answers 400: items[0] has the id 9"),
        ((400, {"error": {"message": "too long"}}, {}), "answers 400: too long"),
        ((500, b"<html>oops</html>", {}), "answers 500: <html>oops</html>"),
        ((401, {"error": "token"}, {}), "answers 401: token"),
        ((200, b"not json", {}), "answers what is not JSON"),
        ((200, b"[" * 100_000, {}), "answers what is not JSON"),
        ((200, {"data": [{"rewards": None}]}, {}), "the rewards of answer 0 are a NoneType"),
        ((200, {"data": []}, {}), "was sent 1 answers and has 0 entries under 'data'"),
        ((200, [], {}), "was sent 1 answers and has none under 'data'"),
        ((200, {"data": [{"rewards": [0.1, 0.2]}]}, {}), "answer 0 has 1 tokens and 2 rewards"),
        ((200, b'{"data": [{"rewards": [NaN]}]}', {}), "the reward of token 0 of answer 0 is nan"),
        ((200, {"data": [{"rewards": [3.5]}]}, {}), "the reward of token 0 of answer 0 is 3.5"),
        ((200, {"data": [{"scores": [0.5]}]}, {}), "has no rewards"),
    ],
)
def test_what_a_server_may_answer_wrongly(answer: Reply, sentence: str) -> None:
    replies = {"/v1/info": (200, INFO, {})}
    with answering(lambda path, *_: replies.get(path, answer)) as url, pytest.raises(HostError) as caught:
        RewardClient(url).token_rewards([Item([1], [2])])
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (b'{"rewards": [0.5, NaN], "offsets": [[0, 1], [1, 2]]}', "the reward of token 1 of answer 0 is nan"),
        (b'{"rewards": [7.5], "offsets": [[0, 1]]}', "the reward of token 0 of answer 0 is 7.5"),
        (
            b'{"rewards": [0.5], "offsets": [[0, 1], [1, 2]]}',
            "gives 1 rewards and 2 offsets for answer 0; is this tlcr serve?",
        ),
        (b'{"rewards": null, "offsets": []}', "answers in a form that neither tlcr serve nor vLLM has"),
        (b'{"rewards": [0.5]}', "answers in a form that neither tlcr serve nor vLLM has"),
        (b'{"rewards": [0.5], "offsets": [0]}', "answers in a form that neither tlcr serve nor vLLM has"),
    ],
)
def test_what_a_server_may_answer_wrongly_of_a_text(row: bytes, sentence: str) -> None:
    replies = {"/v1/info": (200, INFO, {})}
    answer: Reply = (200, b'{"data": [' + row + b"]}", {})
    with answering(lambda path, *_: replies.get(path, answer)) as url, pytest.raises(HostError) as caught:
        RewardClient(url).text_rewards([{"prompt": "a", "response": "b"}])
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([[0.1, 0.2]], "gives 1 rows of logits for the 2 tokens of answer 0"),
        ([[0.1], [0.2]], "wanted 2 or 3 finite numbers"),
        ([[0.1, 0.2], [float("nan"), 0.0]], "wanted 2 or 3 finite numbers"),
        (0.5, "gives no rows of logits"),
    ],
)
def test_what_a_vllm_may_answer_wrongly(data: Any, sentence: str) -> None:
    replies = {"/v1/models": (200, {"data": [{"id": "d", "root": "d"}]}, {}), "/v1/info": (404, {}, {})}
    answer = (200, {"data": [{"index": 0, "data": data}]}, {})
    with answering(lambda path, *_: replies.get(path, answer)) as url, pytest.raises(HostError, match=sentence):
        RewardClient(url, temperature=1.0).token_rewards([Item([1], [2])])


@pytest.mark.parametrize(
    "replies",
    [
        {"/v1/info": {**INFO, "limits": ["items"]}},
        {"/v1/info": {**INFO, "limits": {"items": "many"}}},
        {"/v1/info": {**INFO, "limits": {"body_bytes": "many"}}},
        {"/v1/models": {"data": {"id": "d"}}},
        {"/v1/models": {"data": [{"name": "d"}]}},
        {"/v1/models": {"data": [{"id": "d"}]}, "/pooling": {"data": [{"data": [[0.1, 0.2], None]}]}},
    ],
)
def test_a_server_of_another_form_is_one_sentence(replies: dict[str, Any]) -> None:
    def reply(path: str, *_: Any) -> Reply:
        return (200, replies[path], {}) if path in replies else (404, {}, {})

    with answering(reply) as url, pytest.raises(HostError) as caught:
        RewardClient(url, temperature=1.0).token_rewards([Item([1], [2])])
    assert url in str(caught.value) and "\n" not in str(caught.value)


def test_a_vllm_is_found_behind_a_router_that_hides_statuses() -> None:
    """verl's answers 500 where the vLLM behind it has no route."""

    def reply(path: str, body: Any, heads: dict[str, str]) -> Reply:
        if path == "/v1/models":
            return 200, {"data": [{"id": "d", "root": "d", "max_model_len": 64}]}, {}
        if path == "/pooling":
            return 200, {"data": [{"index": 0, "object": "pooling", "data": [[0.0, 0.0], [0.0, 0.0]]}]}, {}
        return 500, b"Internal Server Error", {}

    with answering(reply) as url:
        assert RewardClient(url, temperature=1.0).token_rewards([Item([1], [2])]) == [[0.0]]


def test_servers_that_are_none() -> None:
    with (
        answering(lambda *_: (404, {}, {})) as url,
        pytest.raises(HostError, match=r"neither /v1/info .* nor /v1/models"),
    ):
        RewardClient(url).info()
    with answering(lambda *_: (403, {"error": "not you"}, {})) as url, pytest.raises(HostError, match="403: not you"):
        RewardClient(url).info()
    for labels in (["positive", "negative"], ["LABEL_0"], None):
        info = {**INFO, "labels": labels}
        with answering(lambda *_, info=info: (200, info, {})) as url, pytest.raises(HostError, match="has the labels"):
            RewardClient(url).info()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"url": "localhost:8765"}, "wanted http://HOST:PORT"),
        ({"url": "http://a:port"}, "wanted http://HOST:PORT"),
        ({"url": "http://["}, "wanted http://HOST:PORT"),
        ({"url": "http://a", "token": "of a file\n"}, "a line break or another character"),
        ({"url": "http://a", "tries": 0}, "wanted at least 1"),
        ({"url": "http://a", "temperature": 0.0}, "wanted a finite number above 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(HostError, match=sentence):
        RewardClient(**arguments)


def test_the_token_is_sent_and_never_shown() -> None:
    seen = set()

    def reply(path: str, body: Any, heads: dict[str, str]) -> Reply:
        seen.add(heads.get("authorization"))
        return (401, {"error": "no"}, {}) if path == "/v1/token_rewards" else echo(path, body, heads)

    with answering(reply) as url:
        client = RewardClient(url, token="s3cret")
        with pytest.raises(HostError) as caught:
            client.token_rewards([Item([1], [2])])
    assert seen == {"Bearer s3cret"} and "s3cret" not in f"{client!r}{caught.value}"


def test_an_address_may_hold_the_token() -> None:
    """As URLs alone are given to trainers; a token that is given beside it comes first."""
    seen = []

    def reply(path: str, body: Any, heads: dict[str, str]) -> Reply:
        seen.append(heads.get("authorization"))
        return echo(path, body, heads)

    with answering(reply) as url:
        held = url.replace("http://", "http://any:s3c%2Fret@")
        for client in (
            RewardClient(held),
            RewardClient(held, token="other!"),
            RewardClient(held.replace("s3c%2Fret", "")),
        ):
            assert client.url == url and client.token_rewards([Item([1], [2])]) == [[0.02]]
            assert repr(client) == f"RewardClient({url!r})"
    assert seen == ["Bearer s3c/ret"] * 2 + ["Bearer other!"] * 2 + [None] * 2


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ftp://any:s3cret@host", "'ftp://[hidden]@host'"),
        ("any:s3cret@host:8765", "'[hidden]@host:8765'"),
        ("http://any:s3cret@host:port", "'http://[hidden]@host:port'"),
        ("http://any:s3/cret@host", "'http://[hidden]@host'"),
        ("http://any:s3cret\u2100@host", "'http://[hidden]@host'"),
    ],
)
def test_a_wrong_address_is_told_without_its_token(url: str, shown: str) -> None:
    with pytest.raises(HostError, match=re.escape(f"address is {shown}; wanted http://HOST:PORT, with %2F")) as caught:
        RewardClient(url)
    assert "s3" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "answer",
    [
        (401, {"error": "no such key: s3cret"}, {}),
        (401, {"error": " ".join(["no"] * 166) + " s3cret"}, {}),  # of which 500 characters are shown
        (503, b"Bearer s3cret", {}),
        (200, {**INFO, "labels": ["s3cret"]}, {}),
        (200, {**INFO, "tokenizer": {"fingerprint": "s3cret"}}, {}),
    ],
)
def test_what_a_server_says_is_shown_without_the_token(answer: Reply, tiny_tokenizer: Any) -> None:
    with answering(lambda *_: answer) as url, pytest.raises(HostError) as caught:
        RewardClient(url, token="s3cret", tries=1).check_tokenizer(tiny_tokenizer)
    assert "s3" not in str(caught.value) and url in str(caught.value)


def test_a_policy_with_another_tokenizer_is_refused(tiny_tokenizer: Any) -> None:
    info = {**INFO, "tokenizer": {"fingerprint": vocabulary_fingerprint(tiny_tokenizer)}}
    with answering(lambda *_: (200, info, {})) as url:
        client = RewardClient(url)
        client.check_tokenizer(tiny_tokenizer)

        class Other:
            bos_token_id, eos_token_id = tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id

            def get_vocab(self) -> dict[str, int]:
                return {**tiny_tokenizer.get_vocab(), "more": 9999}

        with pytest.raises(HostError, match="is not that of the discriminator"):
            client.check_tokenizer(Other())


def test_three_labels_and_large_logits() -> None:
    assert rewards_of_logits([[0.0, 5.0, 0.0], [-1e4, 0.0, 1e4]], 2.0) == pytest.approx([0.0, 1.0])


def test_importing_it_imports_the_standard_library_alone() -> None:
    """The hosts pin other versions of what tlcr needs, or lack it."""
    code = (
        "import sys; before = set(sys.modules); import tlcr.hosts.client, tlcr.hosts.contract; "
        "print(sorted({n.partition('.')[0] for n in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['tlcr']"
