"""`tlcr judge` as users run it, against a real server: honest, biased, and broken judges."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the endpoint is an extra")

from tests.chat.chat_server import ChatServer, completion, serving
from tests.http_server import Reply
from tlcr.chat import endpoint as endpoint_module
from tlcr.cli import main as cli
from tlcr.judging.formats import BenchmarkQuestion, write_alpaca_eval, write_fastchat

GOOD, BAD = "a good reply", "a bad reply, which is twice as long"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "BACKOFF", lambda state: 0.01)
    monkeypatch.setenv("TLCR_PROGRESS", "0")


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serving(ChatServer()) as started:
        yield started


def questions(count: int, turns: int = 1) -> list[BenchmarkQuestion]:
    """Question 7 asks 'q7?', and then 'more of q7?'; categories take turns."""
    return [
        BenchmarkQuestion(id, ("math", "writing")[id % 2], (f"q{id}?", f"more of q{id}?")[:turns])
        for id in range(count)
    ]


def bench(folder: Path, a: list[tuple[str, ...]], b: list[tuple[str, ...]]) -> list[str]:
    """Files of FastChat, and the arguments that name them: models 'ours' and 'theirs'."""
    asked = questions(len(a), len(a[0]))
    rows = [{"question_id": q.id, "category": q.category, "turns": list(q.turns)} for q in asked]
    (folder / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_fastchat(folder / "ours.jsonl", asked, a, "ours")
    write_fastchat(folder / "theirs.jsonl", asked, b, "theirs")
    return [
        *(str(folder / f"{name}.jsonl") for name in ("ours", "theirs")),
        "--prompts",
        str(folder / "question.jsonl"),
    ]


def judge(folder: Path, server: ChatServer, arguments: list[str], *more: str) -> int:
    common = ["--endpoint.model", "m", "--endpoint.base_url", server.address, "--endpoint.retries", "1"]
    return cli.main(["judge", *arguments, *common, "--output_dir", str(folder / "judged"), "--resamples", "100", *more])


def results(folder: Path, name: str = "ours--theirs") -> dict[str, Any]:
    return json.loads((folder / "judged" / name / "results.json").read_text())


def verdicts(folder: Path, name: str = "ours--theirs") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "judged" / name / "verdicts.jsonl").read_text().splitlines()]


def shown(request: dict[str, Any]) -> tuple[str, str]:
    """What a request shows as first and as second."""
    text = request["messages"][-1]["content"]
    found = [re.search(rf"<{tag}>\n(.*?)\n</{tag}>", text, re.DOTALL) for tag in ("first", "second")]
    assert found[0] is not None and found[1] is not None
    return found[0][1], found[1][1]


def says(winner: str) -> Reply:
    return Reply(completion(json.dumps({"comparison": "because", "winner": winner})))


def preferring(prefers: Callable[[str], float]) -> Callable[[dict[str, Any]], Reply]:
    """A judge without a bias for positions: the reply of more merit wins."""

    def behave(request: dict[str, Any]) -> Reply:
        first, second = map(prefers, shown(request))
        return says("tie" if first == second else "first" if first > second else "second")

    return behave


honest = preferring(lambda text: GOOD in text)


def test_an_honest_judge_s_verdicts_are_counted_from_the_first_file_s_side(tmp_path: Path, server, capsys) -> None:
    server.behave = honest
    ours = [(GOOD,), (GOOD,), (GOOD,), (BAD,), (GOOD,)]
    theirs = [(BAD,), (BAD,), (BAD,), (GOOD,), (GOOD,)]
    assert judge(tmp_path, server, bench(tmp_path, ours, theirs)) == 0
    found = results(tmp_path)
    assert [found[name] for name in ("wins", "ties", "losses", "judged")] == [3, 1, 1, 5]
    assert found["win_rate"]["value"] == 0.7
    low, high = found["win_rate"]["interval"]
    assert low < 0.7 < high
    assert found["orders"]["with_ties"] == 1.0 and found["orders"]["kappa"] == 1.0
    assert found["orders"]["inconsistent"] == 0
    assert found["orders"]["said"] == {"first": 0.4, "second": 0.4, "tie": 0.2}
    assert [found["categories"][name]["wins"] for name in ("math", "writing")] == [2, 1]
    assert found["mean_length"] == {
        "model_a": (4 * len(GOOD) + len(BAD)) / 5,
        "model_b": (3 * len(BAD) + 2 * len(GOOD)) / 5,
    }
    rows = verdicts(tmp_path)
    assert [row["winner"] for row in rows] == ["model_a"] * 3 + ["model_b", "tie"]
    assert (rows[3]["ruling_ab"], rows[3]["ruling_ba"]) == ("second", "first")
    assert len(server.requests) == 9  # of two equal replies, the orders are one request
    report = (tmp_path / "judged" / "ours--theirs" / "report.md").read_text()
    assert report == capsys.readouterr().out
    assert "| all | 3 | 1 | 1 | 70.0 % [" in report and "| math | 2 | 1 | 0 |" in report
    assert "The win rate does not tell the two models apart" in report
    assert judge(tmp_path, server, bench(tmp_path, ours, theirs)) == 0
    assert len(server.requests) == 9


def test_what_the_judge_is_asked(tmp_path: Path, server: ChatServer) -> None:
    server.behave = honest
    judge(tmp_path, server, bench(tmp_path, [(f"  {GOOD}\n",)], [(BAD,)]))
    assert sorted(map(shown, server.requests)) == [(BAD, GOOD), (GOOD, BAD)]
    sent = server.requests[0]
    assert "<request>\nq0?\n</request>" in sent["messages"][0]["content"]
    assert sent["response_format"]["json_schema"]["schema"]["properties"]["winner"]["enum"] == [
        "first",
        "second",
        "tie",
    ]
    assert list(sent["response_format"]["json_schema"]["schema"]["properties"]) == ["comparison", "winner"]
    assert sent["temperature"] == 0.0


def test_a_judge_that_always_likes_what_stands_first_is_found_out(tmp_path: Path, server, capsys) -> None:
    server.behave = lambda request: says("first")
    assert judge(tmp_path, server, bench(tmp_path, [(GOOD,)] * 12, [(BAD,)] * 12)) == 0
    found = results(tmp_path)
    assert [found[name] for name in ("wins", "ties", "losses")] == [0, 12, 0]
    assert found["orders"]["inconsistent"] == 12
    assert found["orders"]["with_ties"] == 0.0 and found["orders"]["kappa"] == 0.0
    assert found["orders"]["said"] == {"first": 1.0, "second": 0.0, "tie": 0.0}
    assert found["win_rate"]["value"] == found["length_controlled"]["value"] == 0.5
    assert found["length_controlled"]["interval"] is None
    assert "hardly more than chance" in capsys.readouterr().out


def test_a_bias_for_length_is_taken_out(tmp_path: Path, server: ChatServer) -> None:
    """Two models that are equally good; ours is longer more often than not, and the judge likes that.

    The judge draws from the very model that is fitted, with evenly spread draws for each question.
    """
    count, bias = 120, 2.5
    spread = [(k * 0.6180339887) % 1 for k in range(count)]
    sizes = [
        (300 + round(600 * ((k * 0.7548776662) % 1)), 300 + round(300 * ((k * 0.5698402910) % 1))) for k in range(count)
    ]
    differences = [a - b for a, b in sizes]
    mean = sum(differences) / count
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1))

    def behave(request: dict[str, Any]) -> Reply:
        found = re.search(r"<request>\nq(\d+)\?", request["messages"][-1]["content"])
        assert found is not None
        number = int(found[1])
        term = math.tanh(differences[number] / deviation)
        ours_wins = spread[number] < 1 / (1 + math.exp(-bias * term))
        ours_first = shown(request)[0].startswith("o")
        return says("first" if ours_wins == ours_first else "second")

    server.behave = behave
    arguments = bench(tmp_path, [("o" * a,) for a, _ in sizes], [("t" * b,) for _, b in sizes])
    assert judge(tmp_path, server, arguments, "--endpoint.concurrency", "16") == 0
    found = results(tmp_path)
    assert found["win_rate"]["interval"][0] > 0.55
    low, high = found["length_controlled"]["interval"]
    assert low < 0.5 < high
    assert found["length_controlled"]["value"] == pytest.approx(0.5, abs=0.08)
    assert found["length_controlled"]["length"] > 1.5
    assert found["orders"]["kappa"] == 1.0


def test_each_turn_is_judged_within_its_own_conversation(tmp_path: Path, server: ChatServer) -> None:
    """Our first replies are good and our second ones bad. Each side's second turn shows its own first reply."""

    def behave(request: dict[str, Any]) -> Reply:
        first, second = (text.rpartition("to be judged:\n")[2] for text in shown(request))
        return says("first" if GOOD in first else "second" if GOOD in second else "tie")

    server.behave = behave
    assert judge(tmp_path, server, bench(tmp_path, [(GOOD, BAD)] * 3, [(BAD, GOOD)] * 3)) == 0
    found = results(tmp_path)
    assert (found["questions"], found["comparisons"]) == (3, 6)
    assert [found["turns"][turn]["win_rate"]["value"] for turn in ("1", "2")] == [1.0, 0.0]
    later = [request for request in server.requests if "more of q1?" in request["messages"][0]["content"]]
    assert len(later) == 2 and "<request>" not in later[0]["messages"][0]["content"]
    of_ours = (
        f"User:\nq1?\n\nAssistant:\n{GOOD}\n\nUser:\nmore of q1?\n\nThe assistant's last reply, to be judged:\n{BAD}"
    )
    assert of_ours in shown(later[0]) and of_ours in shown(later[1]) and shown(later[0]) == shown(later[1])[::-1]


def test_turns_of_a_question_do_not_narrow_the_interval(tmp_path: Path, server: ChatServer) -> None:
    server.behave = lambda request: says("tie")
    judge(tmp_path, server, bench(tmp_path, [(GOOD, GOOD)] * 4, [(BAD, BAD)] * 4))
    two_turns = results(tmp_path)
    judge(tmp_path, server, bench(tmp_path, [(GOOD,)] * 4, [(BAD,)] * 4))
    assert results(tmp_path)["win_rate"] == two_turns["win_rate"]


def test_a_correct_reply_is_shown_where_the_benchmark_has_one(tmp_path: Path, server: ChatServer) -> None:
    server.behave = honest
    arguments = bench(tmp_path, [(GOOD, GOOD)], [(BAD, BAD)])
    row = {"question_id": 0, "category": "math", "turns": ["q0?", "more of q0?"], "reference": ["It is 4.", "It is 5."]}
    (tmp_path / "question.jsonl").write_text(json.dumps(row))
    judge(tmp_path, server, arguments)
    texts = [request["messages"][0]["content"] for request in server.requests]
    assert {("It is 4." in text, "It is 5." in text) for text in texts} == {(True, False), (False, True)}
    assert all(("It is 5." in text) == ("more of q0?" in text) for text in texts)


def test_whatever_is_no_verdict_is_counted_and_named(tmp_path: Path, server: ChatServer, capsys) -> None:
    special = {
        "q0?": Reply(completion("I'm sorry, but I can't compare these.")),
        "q1?": Reply(completion('{"comparison": "they', finish_reason="length")),
        "q2?": Reply(completion("The first one, clearly.")),
        "q3?": Reply({"error": {"message": "flagged", "code": "content_policy"}}, 400),
        "q4?": Reply(completion(None, refusal="No.", finish_reason="stop")),
    }

    def behave(request: dict[str, Any]) -> Reply:
        text = request["messages"][0]["content"]
        return next((reply for word, reply in special.items() if f"\n{word}\n" in text), None) or honest(request)

    server.behave = behave
    assert judge(tmp_path, server, bench(tmp_path, [(GOOD,)] * 7, [(BAD,)] * 7)) == 0
    found = results(tmp_path)
    assert found["failures"] == {"refusal": 4, "truncated": 2, "unreadable": 2, "declined": 2, "unanswered": 0}
    assert (found["comparisons"], found["judged"], found["wins"], found["rulings"]) == (7, 2, 2, 14)
    assert [row["winner"] for row in verdicts(tmp_path)] == [None] * 5 + ["model_a"] * 2
    assert verdicts(tmp_path)[2]["said"] == ["The first one, clearly."] * 2
    assert "4 refusal, 2 truncated, 2 unreadable, 2 declined" in capsys.readouterr().out


def test_a_judge_of_whom_nothing_can_be_read_is_an_error_that_says_where_to_look(tmp_path, server, capsys) -> None:
    server.behave = lambda request: Reply(completion("Hm."))
    assert judge(tmp_path, server, bench(tmp_path, [(GOOD,)], [(BAD,)])) == 2
    assert "not one answer of the judge could be read" in capsys.readouterr().err
    assert results(tmp_path)["win_rate"] is None and verdicts(tmp_path)[0]["said"] == ["Hm."] * 2


def test_a_judge_that_declines_everything_says_why_in_the_error(tmp_path, server, capsys) -> None:
    server.behave = lambda request: Reply({"error": {"message": "maximum context length is 512"}}, 400)
    assert judge(tmp_path, server, bench(tmp_path, [(GOOD,)], [(BAD,)])) == 2
    said = capsys.readouterr().err
    assert "not one answer of the judge could be read" in said and "without an answer because: " in said
    assert "maximum context length is 512" in said.rpartition("not one answer")[2]


def test_failed_requests_stop_the_run_and_are_all_that_the_next_one_asks(tmp_path, server, capsys) -> None:
    """A server that is down for one question, and slow to answer (429) for all."""
    arguments = bench(tmp_path, [(GOOD,)] * 3, [(BAD,)] * 3)
    busy = Reply({"error": {"message": "slow down"}}, 429, {"Retry-After": "0"})
    server.script = [busy]
    server.behave = lambda request: (
        Reply({"error": {"message": "down"}}, 500) if "q1?" in request["messages"][0]["content"] else honest(request)
    )
    assert judge(tmp_path, server, arguments, "--endpoint.concurrency", "1") == 2
    assert "2 of 6 requests got no answer" in capsys.readouterr().err
    assert not (tmp_path / "judged" / "ours--theirs").exists()
    asked = len(server.requests)
    server.behave = honest
    assert judge(tmp_path, server, arguments) == 0
    assert len(server.requests) == asked + 2 and results(tmp_path)["wins"] == 3


def test_a_cap_holds_and_what_it_left_unasked_is_counted_or_asked_later(tmp_path: Path, server, capsys) -> None:
    server.behave = honest
    arguments = bench(tmp_path, [(GOOD,)] * 4, [(BAD,)] * 4)
    capped = ["--endpoint.max_requests", "5", "--endpoint.concurrency", "1"]
    assert judge(tmp_path, server, arguments, *capped) == 2
    assert "max_requests is 5" in capsys.readouterr().err and len(server.requests) == 5
    assert judge(tmp_path, server, arguments, *capped, "--on_unanswered", "skip") == 0
    found = results(tmp_path)
    assert (found["failures"]["unanswered"], found["judged"], found["requests"]) == (3, 2, 5)
    assert judge(tmp_path, server, arguments) == 0
    assert len(server.requests) == 8 and results(tmp_path)["judged"] == 4


def test_a_dry_run_shows_requests_and_cost_and_asks_nothing(tmp_path: Path, server: ChatServer, capsys) -> None:
    arguments = bench(tmp_path, [(GOOD, GOOD)] * 3, [(BAD, BAD)] * 3)
    prices = ["--endpoint.prompt_price", "2", "--endpoint.answer_price", "8", "--max_new_tokens", "200"]
    assert judge(tmp_path, server, arguments, *prices, "--dry-run", "--show", "3") == 0
    out = capsys.readouterr().out
    assert "6 comparisons in both orders, 0 answered before, 12 questions to m" in out
    assert out.count("---- user") == 3 and "question 0, turn 2, order 1" in out
    assert "1200 answer tokens" in out
    prompt_tokens = int(re.search(r"about (\d+) prompt tokens", out)[1])  # type: ignore[index]
    assert f"about {(2 * prompt_tokens + 8 * 1200) / 1e6:.4f} in the currency" in out
    assert server.requests == [] and not (tmp_path / "judged").exists()


def test_agreement_with_people_and_with_another_judge(tmp_path: Path, server: ChatServer) -> None:
    """The second judge likes long replies, theirs. People like ours on question 0; theirs on 1 and ours on 2, with the
    sides swapped; and one of them says tie on 2."""
    server.behave = honest
    sides = {"model_a": "ours", "model_b": "theirs"}
    swapped = {"model_a": "theirs", "model_b": "ours"}
    people = [
        {"question_id": 0, "turn": 1, "winner": "model_a", "judge": "author_1", **sides},
        {"question_id": 1, "turn": 1, "winner": "model_a", **swapped},
        {"question_id": 2.0, "turn": None, "winner": "model_b", **swapped},
        {"question_id": 2, "turn": 1.0, "winner": "tie", **sides},
        {"question_id": 9, "turn": 1, "winner": "tie", **sides},
        {"question_id": 0, "turn": 1, "winner": "model_b", "model_a": "ours", "model_b": "others"},
    ]
    path = tmp_path / "people.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in people))
    arguments = bench(tmp_path, [(GOOD,)] * 3, [(BAD,)] * 3)
    assert judge(tmp_path, server, arguments) == 0
    first = tmp_path / "first.jsonl"
    (tmp_path / "judged" / "ours--theirs" / "verdicts.jsonl").rename(first)
    server.behave = preferring(len)
    more = ["--temperature", "0.1", "--labels", json.dumps([str(path), str(first)])]
    assert judge(tmp_path, server, arguments, *more) == 0
    found = results(tmp_path)["labels"]
    assert (found[str(path)]["labels"], found[str(path)]["both"]) == (5, 4)
    assert found[str(path)]["with_ties"] == 0.25
    assert (found[str(path)]["decided"], found[str(path)]["without_ties"]) == (3, pytest.approx(1 / 3))
    assert (found[str(first)]["both"], found[str(first)]["with_ties"], found[str(first)]["kappa"]) == (3, 0.0, 0.0)
    assert "first.jsonl | 3 of 3 | 0.0 %" in (tmp_path / "judged" / "ours--theirs" / "report.md").read_text()


def test_what_another_judge_said_is_not_replaced(tmp_path: Path, server: ChatServer, capsys) -> None:
    server.behave = honest
    arguments = bench(tmp_path, [(GOOD,)] * 2, [(BAD,)] * 2)
    assert judge(tmp_path, server, arguments) == 0
    folder = tmp_path / "judged" / "ours--theirs"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    verdicts = str(folder / "verdicts.jsonl")
    capsys.readouterr()
    for more, message in (
        (["--endpoint.model", "other"], "would replace it; name another --output_dir"),
        (["--labels", json.dumps([verdicts])], "it would be compared with itself"),
    ):
        assert judge(tmp_path, server, arguments, *more) == 2
        assert message in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    bench(tmp_path, [(GOOD,)] * 3, [(BAD,)] * 3)  # other questions of the same kind
    for dry in ([], ["--dry-run"]):
        assert judge(tmp_path, server, arguments, *dry) == 2
        assert "would replace it; name another --output_dir" in capsys.readouterr().err
    bench(tmp_path, [(GOOD,)] * 2, [(BAD,)] * 2)
    other = ["--endpoint.model", "other", "--output_dir", str(tmp_path / "again"), "--labels", json.dumps([verdicts])]
    assert judge(tmp_path, server, arguments, *other) == 0
    assert judge(tmp_path, server, arguments, "--temperature", "0.1") == 0  # the same judge may be asked otherwise


def test_one_file_is_graded(tmp_path: Path, server: ChatServer, capsys) -> None:
    def behave(request: dict[str, Any]) -> Reply:
        text = request["messages"][0]["content"]
        if "\nq3?\n" in text:
            return Reply(completion("no idea"))
        return Reply(completion(json.dumps({"comparison": "so", "grade": 8 if f"<reply>\n{GOOD}" in text else 3})))

    server.behave = behave
    arguments = bench(tmp_path, [(GOOD,), (BAD,), (GOOD,), (GOOD,)], [(BAD,)] * 4)
    assert judge(tmp_path, server, [arguments[0], *arguments[2:]]) == 0
    found = results(tmp_path, "ours")
    assert found["grade"]["value"] == pytest.approx(19 / 3)
    low, high = found["grade"]["interval"]
    assert 3 <= low < 19 / 3 < high <= 8
    assert (found["replies"], found["judged"], found["failures"]["unreadable"]) == (4, 3, 1)
    assert [found["categories"][name]["grade"]["value"] for name in ("math", "writing")] == [8.0, 3.0]
    assert [row["grade"] for row in verdicts(tmp_path, "ours")] == [8.0, 3.0, 8.0, "unreadable"]
    assert "| all | 3 | 6.33 [" in capsys.readouterr().out


def test_answers_of_alpaca_eval_need_no_prompts_and_are_matched_by_instruction(tmp_path, server) -> None:
    server.behave = honest
    asked = [BenchmarkQuestion(k, "koala", (f"q{k}?",)) for k in range(3)]
    write_alpaca_eval(tmp_path / "a.json", asked, [(GOOD,), (BAD,), (GOOD,)], "ours")
    write_alpaca_eval(tmp_path / "b.json", asked[::-1][:2], [(BAD,), (GOOD,)], "theirs")
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert judge(tmp_path, server, files) == 0
    found = results(tmp_path)
    assert [found[name] for name in ("wins", "ties", "losses")] == [1, 0, 1]


def test_a_model_run_here_judges_when_it_is_held_to_a_word(tmp_path: Path, tiny_folder: Path) -> None:
    settings = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 2048}))
    arguments = bench(tmp_path, [(GOOD,), (BAD,)], [(BAD,), (GOOD,)])
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    local = ["--backend", "local", "--model.path", str(tiny_folder), "--model.chat_template", template]
    local += ["--answer_format", "word", "--output_dir", str(tmp_path / "judged"), "--resamples", "100"]
    assert cli.main(["judge", *arguments, *local]) == 0
    found = results(tmp_path)
    assert (found["judged"], sum(found["failures"].values())) == (2, 0)
    rows = verdicts(tmp_path)
    assert all(row["said"] == [row["ruling_ab"], row["ruling_ba"]] for row in rows)
    assert {ruling for row in rows for ruling in row["said"]} <= {"first", "second", "tie"}
    assert cli.main(["judge", arguments[0], *arguments[2:], *local]) == 0
    assert all(1 <= row["grade"] <= 10 for row in verdicts(tmp_path, "ours"))


@pytest.mark.parametrize(
    ("files", "more", "message"),
    [
        (["ours", "ours"], [], "are answers of 'ours'; give one another name"),
        (["ours", "theirs"], ["--prompts", "none"], "name the benchmark's question.jsonl: --prompts"),
        (["ours", "alpaca"], [], "in FastChat's format and the other file in AlpacaEval's"),
        (["alpaca"], [], "drop --prompts"),
        (["ours", "theirs", "ours"], [], "3 files of answers are named"),
        (["ours", "other"], [], "answer none of the same questions"),
        (["ours", "short"], [], "answers question 0 in 1 turns, and it has 2"),
        (["ours"], ["--labels", '["people.jsonl"]'], "drop --labels"),
        (["ours", "theirs"], ["--labels", '["people.jsonl"]'], "'winner' is 'a'; it must be model_a, model_b or tie"),
        (["ours", "theirs"], ["--labels", '["empty.jsonl"]'], "no verdict between ours and theirs"),
        (["ours", "theirs"], ["--labels", '["list.jsonl"]'], "list.jsonl:1: 'question_id' is [0]; it must be a whole"),
        (["ours", "theirs"], ["--labels", '["word.jsonl"]'], "word.jsonl:2: 'turn' is 'first'; it must be a whole"),
        (["ours", "theirs"], ["--labels", '["half.jsonl"]'], "half.jsonl:1: 'turn' is 1.5; it must be a whole"),
        (["ours", "theirs"], ["--backend", "local"], "name a model that follows instructions: model.path"),
        (["ours", "theirs"], ["--show", "1"], "--show is about what a dry run shows"),
        (["ours", "theirs"], ["--resamples", "1"], "resamples is 1; it must be at least 100"),
    ],
)
def test_what_cannot_be_judged_is_named(
    files: list[str], more: list[str], message: str, tmp_path: Path, server: ChatServer, capsys, monkeypatch
) -> None:
    bench(tmp_path, [(GOOD, GOOD)], [(BAD, BAD)])
    monkeypatch.chdir(tmp_path)
    write_fastchat(tmp_path / "other.jsonl", [BenchmarkQuestion(5, "x", ("?", "?"))], [("a", "b")], "other")
    write_fastchat(tmp_path / "short.jsonl", questions(1), [("a",)], "short")
    write_alpaca_eval(tmp_path / "alpaca.jsonl", questions(1), [("a",)], "alpaca")
    label = {"question_id": 0, "model_a": "ours", "model_b": "theirs"}
    (tmp_path / "people.jsonl").write_text(json.dumps({**label, "winner": "a"}))
    (tmp_path / "empty.jsonl").write_text(json.dumps({**label, "winner": None}))
    label["winner"] = "tie"
    (tmp_path / "list.jsonl").write_text(json.dumps({**label, "question_id": [0]}))
    (tmp_path / "word.jsonl").write_text(f"{json.dumps(label)}\n{json.dumps({**label, 'turn': 'first'})}")
    (tmp_path / "half.jsonl").write_text(json.dumps({**label, "turn": 1.5}))
    prompts = [] if "--prompts" in more else ["--prompts", "question.jsonl"]
    more = [word for word in more if word not in ("--prompts", "none")]
    assert judge(tmp_path, server, [f"{name}.jsonl" for name in files], *prompts, *more) == 2
    assert message in capsys.readouterr().err
    assert server.requests == []
