"""`tlcr revise` as users run it: files in, a server that is real, files out, and labels of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the endpoint is an extra")

from tests.chat.chat_server import ChatServer, completion, held, mended, rejected_of, revision, serving
from tests.http_server import Reply
from tlcr.chat import endpoint as endpoint_module
from tlcr.cli import main as cli
from tlcr.config.loading import load_config
from tlcr.config.schema import ReviserConfig, RunConfig
from tlcr.errors import BudgetExhausted, ConfigError, DataError, EndpointError
from tlcr.experiment.pipeline import rehearse_revisions, run, stage

ROOT = Path(__file__).parents[2]
WORDS = ("soup", "tea", "bread", "film", "song", "cake", "wine", "play")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "BACKOFF", lambda state: 0.01)
    monkeypatch.setenv("TLCR_PROGRESS", "0")


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serving(ChatServer()) as started:
        yield started


def hh(word: str) -> dict[str, str]:
    turn = f"\n\nHuman: How was the {word}?\n\nAssistant:"
    return {
        "chosen": f"{turn} I enjoyed it very much, thanks.",
        "rejected": f"{turn} The {word} was bad but the {word} is what it is.",
    }


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def settings(folder: Path, server: ChatServer | None, **changes: Any) -> dict[str, Any]:
    values = {
        "output_dir": str(folder / "run"),
        "data.preferences": write_jsonl(folder / "hh.jsonl", [hh(word) for word in WORDS]),
        "reviser.backend": "endpoint",
        "reviser.endpoint.model": "m",
        "reviser.endpoint.base_url": server.address if server else "http://127.0.0.1:9/v1",
        "reviser.endpoint.retries": 1,
        "reviser.endpoint.concurrency": 1,
        "reviser.max_new_tokens": 100,
    }
    return {**values, **{name.replace("__", "."): value for name, value in changes.items()}}


def config(folder: Path, server: ChatServer | None, **changes: Any) -> RunConfig:
    return load_config(None, settings(folder, server, **changes))


def by(**special: Reply) -> Any:
    """Behave, but answer requests about these words so."""

    def behave(request: dict[str, Any]) -> Reply:
        for word, reply in special.items():
            if word in rejected_of(request):
                return reply
        return mended(request)

    return behave


def outcomes(folder: Path) -> Counter[str]:
    found = json.loads((folder / "run" / "revisions" / "statistics.json").read_text())["outcomes"]
    return Counter({name: count for name, count in found.items() if count})


def test_from_transcripts_to_labels(tmp_path: Path, server: ChatServer) -> None:
    """The word that the reviser replaced, and no other, is negative before and positive after."""
    cfg = config(tmp_path, server)
    stage(cfg, "revisions")
    made = read_jsonl(tmp_path / "run" / "revisions" / "revisions.jsonl")
    assert [record["revised"] for record in made] == [f" The {w} was good but the {w} is what it is." for w in WORDS]
    assert made[0]["prompt"] == "\n\nHuman: How was the soup?\n\nAssistant:"
    assert made[0]["id"] == "hh.jsonl:1" and made[0]["comparison"] == "it is kinder"
    stage(cfg, "labels")
    labelled = read_jsonl(tmp_path / "run" / "labels" / "labels.jsonl")
    assert sorted(pair["id"] for pair in labelled) == [f"hh.jsonl:{k + 1}" for k in range(8)]
    for pair in labelled:
        for side, word, label in (("rejected", "bad", "negative"), ("revised", "good", "positive")):
            sided = pair[side]
            text, edited = "".join(sided["tokens"][:-1]), set()
            start = 0
            for token, found in zip(sided["tokens"][:-1], sided["labels"], strict=False):
                if found != "neutral":
                    assert found == label
                    edited.update(range(start, start + len(token)))
                start += len(token)
            at = text.index(word)
            # The tokenizer of the embedded task spells unknown words, so letters that both words share may be kept.
            assert edited and edited <= set(range(at - 1, at + len(word)))


def test_every_outcome_is_counted_and_set_aside_with_its_reason(tmp_path: Path, server: ChatServer) -> None:
    server.behave = by(
        soup=Reply(completion(revision(""))),
        tea=Reply(completion(revision("I enjoyed it very much, thanks."))),
        bread=Reply(completion(revision("Let us talk of another thing, if you do not mind at all, my friend!"))),
        film=Reply(completion("I'm sorry, but I can't help with that.")),
        song=Reply(completion('{"comparison": "it is', finish_reason="length")),
        cake=Reply(completion("The cake was good.")),
        wine=Reply({"error": {"message": "filtered"}}, 400),
    )
    cfg = config(tmp_path, server)
    stage(cfg, "revisions")
    expected = ("empty", "copied", "rewritten", "refusal", "truncated", "unreadable", "declined", "revised")
    assert outcomes(tmp_path) == Counter(expected)
    aside = read_jsonl(tmp_path / "run" / "revisions" / "set_aside.jsonl")
    assert [(record["id"], record["outcome"]) for record in aside] == [
        (f"hh.jsonl:{k + 1}", name) for k, name in enumerate(expected[:-1])
    ]
    assert all(record["detail"] for record in aside)
    assert re.fullmatch(r"Error code: 400 - .*\bfiltered\b.*", aside[-1]["detail"])  # the client's own words
    (made,) = read_jsonl(tmp_path / "run" / "revisions" / "revisions.jsonl")
    assert made["revised"] == " The play was good but the play is what it is."


@pytest.mark.parametrize("keep", [False, True])
def test_what_the_reviser_left_as_it_was_is_kept_on_request(keep: bool, tmp_path: Path, server: ChatServer) -> None:
    unchanged = Reply(completion(revision("The soup was bad but the soup is what it is.")))
    server.behave = by(soup=unchanged)
    stage(config(tmp_path, server, reviser__keep_unchanged=keep), "revisions")
    assert outcomes(tmp_path) == {"unchanged": 1, "revised": 7}
    made = read_jsonl(tmp_path / "run" / "revisions" / "revisions.jsonl")
    assert len(made) == 7 + keep
    if keep:
        assert made[0]["revised"] == made[0]["rejected"]


def test_what_is_done_is_skipped_and_a_change_asks_only_what_was_never_asked(
    tmp_path: Path, server: ChatServer
) -> None:
    stage(config(tmp_path, server, data__limit=3), "revisions")
    stage(config(tmp_path, server, data__limit=3), "revisions")
    assert len(server.requests) == 3
    stage(config(tmp_path, server, data__limit=5), "revisions")
    assert len(server.requests) == 5
    with pytest.raises(DataError, match=r"none of the 5 answers is a usable revision \(5 rewritten, one because: 8%"):
        stage(config(tmp_path, server, data__limit=5, reviser__max_changed=0.01), "revisions")
    stage(config(tmp_path, server, data__limit=5, reviser__endpoint__concurrency=3), "revisions")
    assert len(server.requests) == 5
    stage(config(tmp_path, server, data__limit=5, reviser__temperature=0.5), "revisions")
    assert len(server.requests) == 10


def test_pairs_without_an_answer_stop_the_run_once_the_others_are_written(tmp_path: Path, server: ChatServer) -> None:
    server.behave = by(tea=Reply({"error": {"message": "oops"}}, 500))
    with pytest.raises(EndpointError, match=r"1 of 8 pairs got no answer.*500.*oops.*same command"):
        stage(config(tmp_path, server), "revisions")
    assert len(read_jsonl(tmp_path / "run" / "revisions" / "revisions.jsonl")) == 7
    asked = len(server.requests)
    server.behave = mended
    stage(config(tmp_path, server), "revisions")
    assert len(server.requests) == asked + 1
    assert outcomes(tmp_path) == {"revised": 8}


def test_pairs_without_an_answer_can_be_left_out(tmp_path: Path, server: ChatServer) -> None:
    server.behave = by(tea=Reply({"error": {"message": "oops"}}, 500))
    stage(config(tmp_path, server, reviser__on_unanswered="skip"), "revisions")
    assert outcomes(tmp_path) == {"revised": 7, "unanswered": 1}


def test_a_cap_stops_the_run_or_on_request_cuts_it_short(tmp_path: Path, server: ChatServer) -> None:
    with pytest.raises(BudgetExhausted, match="5 requests were sent and max_requests is 5"):
        stage(config(tmp_path, server, reviser__endpoint__max_requests=5), "revisions")
    assert len(server.requests) == 5
    capped = {"reviser__endpoint__max_requests": 5, "reviser__on_unanswered": "skip"}
    stage(config(tmp_path, server, **capped), "revisions")
    assert len(server.requests) == 5
    assert outcomes(tmp_path) == {"revised": 5, "unanswered": 3}
    stage(config(tmp_path, server, **capped), "revisions")
    assert len(server.requests) == 5
    capped["reviser__endpoint__max_requests"] = 7
    stage(config(tmp_path, server, **capped), "revisions")
    assert len(server.requests) == 7
    assert outcomes(tmp_path) == {"revised": 7, "unanswered": 1}


def test_pairs_that_changed_in_their_file_are_asked_alone(
    tmp_path: Path, server: ChatServer, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config(tmp_path, server)
    stage(cfg, "revisions")
    asked = len(server.requests)
    source = Path(str(cfg.data.preferences))
    with source.open("a", encoding="utf-8") as file:
        file.write(json.dumps(hh("book")) + "\n")
    caplog.set_level("INFO", logger="tlcr")
    caplog.clear()
    stage(cfg, "revisions")
    assert len(server.requests) == asked + 1
    assert sum(outcomes(tmp_path).values()) == asked + 1
    assert caplog.text.count("are others now; they are made again") == 1 and "skipped" not in caplog.text
    # what was made of them would no longer fit: then they are kept, and it is said
    done = tmp_path / "run" / "labels" / "done.json"
    done.parent.mkdir()
    done.write_text("{}", encoding="utf-8")
    with source.open("a", encoding="utf-8") as file:
        file.write(json.dumps(hh("door")) + "\n")
    stage(cfg, "revisions")
    assert len(server.requests) == asked + 1
    assert "the revisions are kept, since labels were made of them" in caplog.text


def test_what_fails_the_checks_is_asked_for_again_as_often_as_allowed(tmp_path: Path, server: ChatServer) -> None:
    lazy = Reply(completion(revision("The soup was bad but the soup is what it is.")))
    server.behave = by(soup=lazy)
    server.script = [lazy, *[mended] * 7]
    cfg = config(tmp_path, server, reviser__attempts=3, reviser__temperature=0.7)
    stage(cfg, "revisions")
    asked = Counter(rejected_of(request).split()[1] for request in server.requests)
    assert asked == {**dict.fromkeys(WORDS, 1), "soup": 3}
    assert outcomes(tmp_path) == {"revised": 7, "unchanged": 1}
    server.behave = mended
    stage(config(tmp_path, server, reviser__attempts=4, reviser__temperature=0.7), "revisions")
    assert len(server.requests) == 11
    assert outcomes(tmp_path) == {"revised": 8}


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (
            [{"prompt": "Q: soup?", "chosen": " It is nice.", "rejected": " It is a bad soup.", "id": "seven"}],
            {"id": "seven", "prompt": "Q: soup?", "rejected": " It is a bad soup.", "revised": " It is a good soup."},
        ),
        (
            [
                {
                    "prompt": [{"role": "user", "content": "soup?"}],
                    "chosen": [{"role": "assistant", "content": "It is nice."}],
                    "rejected": [{"role": "assistant", "content": "It is a bad soup."}],
                }
            ],
            {"prompt": [{"role": "user", "content": "soup?"}], "revised": "It is a good soup."},
        ),
        (
            [{"context": "###Human: soup?", "chosen_response": "nice", "reject_response": "It is a bad soup."}],
            {"prompt": "\n\nHuman: soup?", "revised": " It is a good soup."},
        ),
    ],
)
def test_every_format_of_preferences_comes_out_as_edits_that_can_be_read(
    records: list[dict[str, Any]], expected: dict[str, Any], tmp_path: Path, server: ChatServer, tiny_tokenizer
) -> None:
    """Conversations stay conversations: the template of the policy is applied when the edits are read."""
    from dataclasses import replace

    from tlcr.data.readers import read_edits, read_preferences

    source = write_jsonl(tmp_path / "pairs.jsonl", records)
    cfg = config(tmp_path, server, data__preferences=source)
    stage(cfg, "revisions")
    path = tmp_path / "run" / "revisions" / "revisions.jsonl"
    (made,) = read_jsonl(path)
    assert made.items() >= expected.items()
    templated = tiny_tokenizer.__class__(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<eos>")
    templated.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
    (edit,) = read_edits(replace(cfg.data, edits=str(path)), templated).records
    (preference,) = read_preferences(cfg.data, templated).records
    assert (edit.id, edit.rejected, edit.chosen) == (preference.id, preference.rejected, preference.chosen)
    if isinstance(made["prompt"], list):
        assert edit.prompt == preference.prompt == "<user> soup?\n<assistant>"


# ---- files


def test_revisions_of_others_are_matched_by_content(tmp_path: Path) -> None:
    """In another order, under other ids, with other white space, some missing, some of other pairs, one twice."""
    edits = [
        {
            "id": str(k),
            "prompt": f"Human:  How was the {word}?",
            "rejected": f"The {word} was bad but\nthe {word} is what it is.",
            "revised": f"The {word} was {how} but the {word} is what it is.",
        }
        for k, (word, how) in enumerate([("tea", "bad"), ("soup", "poor"), ("milk", "good"), ("soup", "good")])
    ]
    source = write_jsonl(tmp_path / "edits.jsonl", edits)
    cfg = load_config(None, settings(tmp_path, None) | {"reviser.backend": "files", "reviser.files": source})
    stage(cfg, "revisions")
    assert outcomes(tmp_path) == {"revised": 1, "unchanged": 1, "missing": 6}
    (made,) = read_jsonl(tmp_path / "run" / "revisions" / "revisions.jsonl")
    assert (made["id"], made["revised"]) == ("hh.jsonl:1", " The soup was good but the soup is what it is.")
    assert not (tmp_path / "run" / "revisions" / "answers.sqlite").exists()


def test_revisions_in_the_published_format_are_taken(tmp_path: Path) -> None:
    record = {
        "context": "###Human: How was the soup?\n\n###Assistant:",
        "reject_response": "The soup was bad but the soup is what it is.",
        "raw_response": "rude\n<|Start Of Modified Response|>\nThe soup was good but the soup is what it is.",
    }
    source = write_jsonl(tmp_path / "published.jsonl", [record])
    cfg = load_config(None, settings(tmp_path, None) | {"reviser.backend": "files", "reviser.files": source})
    stage(cfg, "revisions")
    (made,) = read_jsonl(tmp_path / "run" / "revisions" / "revisions.jsonl")
    assert made["revised"] == " The soup was good but the soup is what it is."


def test_files_of_other_preferences_are_an_error(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "edits.jsonl", [{"prompt": "a", "rejected": "b", "revised": "c"}])
    cfg = load_config(None, settings(tmp_path, None) | {"reviser.backend": "files", "reviser.files": source})
    with pytest.raises(DataError, match=r"none of the 1 revisions in .*edits.jsonl belongs to a pair"):
        stage(cfg, "revisions")


# ---- settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reviser.backend": "endpoint"}, "name the model there: endpoint.model"),
        ({"reviser.backend": "local"}, "name a model that follows instructions: model.path"),
        ({"reviser.backend": "files"}, "reviser.backend is 'files' and files is None"),
        ({"reviser.files": "x"}, "reviser.backend is 'none' and files is 'x'"),
        ({"reviser.attempts": 2}, "reviser.attempts is 2 at temperature 0"),
        ({"reviser.endpoint.max_cost": 1.0}, "no cost can be known without prices"),
        ({"reviser.endpoint.prompt_price": 1.0}, "name both, or neither"),
        ({"reviser.endpoint.extra_body": "{"}, "reviser.endpoint.extra_body is not JSON"),
        (
            {"reviser.backend": "endpoint", "reviser.endpoint.model": "m", "data.edits": "x"},
            "edits are read, or a reviser makes them; drop one",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, values)
    assert message in str(caught.value) and "RunConfig" not in str(caught.value)


def test_without_a_back_end_the_message_names_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reviser\.backend is none; set it to endpoint, local or files"):
        stage(load_config(None, {"output_dir": str(tmp_path)}), "revisions")


def test_under_a_launcher_of_several_processes_it_is_to_run_before(tmp_path: Path, server, monkeypatch) -> None:
    monkeypatch.setattr("tlcr.experiment.pipeline.process_count", lambda: 2)
    with pytest.raises(ConfigError, match="run 'tlcr revise' with this config first, without the launcher"):
        stage(config(tmp_path, server), "revisions")
    assert server.requests == []


def test_what_does_not_change_a_revision_is_not_among_what_decides_it() -> None:
    plain = ReviserConfig().decisive()
    for same in ({"cache": "x"}, {"batch_size": 3}):
        assert ReviserConfig(**same).decisive() == plain
    for other in ({"max_changed": 0.5}, {"keep_unchanged": True}, {"max_new_tokens": 7}, {"answer_format": "marker"}):
        assert ReviserConfig(**other).decisive() != plain


def test_labels_before_revisions_say_which_command_comes_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run 'tlcr revise' with this config first"):
        stage(config(tmp_path, None), "labels")


def test_labels_of_other_revisions_are_not_taken_for_these(tmp_path: Path, server: ChatServer) -> None:
    cfg = config(tmp_path, server, data__limit=4)
    stage(cfg, "revisions")
    stage(cfg, "labels")
    stage(cfg, "labels")
    server.behave = by(soup=Reply(completion(revision("The soup was fine but the soup is what it is."))))
    again = config(tmp_path, server, data__limit=4, reviser__temperature=0.5)
    stage(again, "revisions")
    with pytest.raises(ConfigError, match=r"was made with other settings.*revisions was"):
        stage(again, "labels")


def test_a_word_that_is_the_server_s_key_is_no_edit(
    tmp_path: Path, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "ollama")
    server.behave = lambda request: Reply(completion(revision(rejected_of(request))))
    source = write_jsonl(tmp_path / "words.jsonl", [hh("ollama")])
    stage(config(tmp_path, server, data__preferences=source, reviser__keep_unchanged=True), "revisions")
    assert outcomes(tmp_path) == {"unchanged": 1}


# ---- dry run


def test_a_dry_run_shows_and_counts_and_asks_and_writes_nothing(tmp_path: Path, server: ChatServer, capsys) -> None:
    prices = {"reviser__endpoint__prompt_price": 10.0, "reviser__endpoint__answer_price": 20.0}
    cfg = config(tmp_path, server, **prices)
    rehearse_revisions(cfg, show=2)
    shown = capsys.readouterr().out
    assert "How was the soup?" in shown and "How was the tea?" in shown and "How was the bread?" not in shown
    assert "8 pairs, 0 answered before, 8 questions to m" in shown
    assert server.requests == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hh.jsonl"]
    stage(config(tmp_path, server, data__limit=3), "revisions")
    sent = sum(len(request["messages"][0]["content"].encode()) for request in server.requests)
    rehearse_revisions(cfg, show=0)
    shown = capsys.readouterr().out
    assert "8 pairs, 3 answered before, 5 questions to m" in shown
    assert "How was" not in shown
    about, most = (float(word) for word in shown.splitlines()[-1].replace(",", "").split() if word[0].isdigit())
    assert 0 < about < most
    prompt_tokens = int(shown.partition("about ")[2].split()[0])
    assert prompt_tokens == pytest.approx(5 / 3 * sent / 4, rel=0.02)
    bytes_of_five = 5 / 3 * sent * 10 / 1e6
    assert most >= bytes_of_five + 5 * 100 * 20 / 1e6


@pytest.mark.parametrize(("limit", "cut"), [(159, 8), (160, 7), (161, 0)])
def test_a_dry_run_says_how_many_answers_will_be_cut_off(limit: int, cut: int, tmp_path: Path, capsys) -> None:
    """One rejected answer has 43 bytes, the others 45 or 47: 10 or 11 tokens, and 150 for the reasoning."""
    rehearse_revisions(config(tmp_path, None, reviser__max_new_tokens=limit), show=0)
    shown = capsys.readouterr().out
    assert (f"{cut} answers will probably be cut off" in shown) == (cut > 0)
    assert ("cut off" in shown) == (cut > 0)


def test_a_dry_run_needs_no_key(tmp_path: Path, monkeypatch, capsys) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    values = settings(tmp_path, None)
    del values["reviser.endpoint.base_url"]
    assert cli.main(["revise", "--dry-run", *flags(values)]) == 0
    assert "no cost is known" in capsys.readouterr().out
    assert cli.main(["revise", *flags(values)]) == 2
    assert "OPENAI_API_KEY holds no API key" in capsys.readouterr().err
    absent = {**values, "data.preferences": str(tmp_path / "absent.jsonl")}
    assert cli.main(["revise", "--dry-run", *flags(absent)]) == 2
    assert "absent.jsonl" in capsys.readouterr().err


# ---- the command


def flags(values: dict[str, Any]) -> list[str]:
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


@pytest.mark.slow
def test_a_command_that_is_killed_and_called_again_asks_for_the_rest_only(tmp_path: Path, server: ChatServer) -> None:
    """SIGKILL when five answers have been sent and the sixth question is waiting for its own."""
    hold = threading.Event()

    def behave(request: dict[str, Any]) -> Reply:
        return held(mended(request), hold) if len(server.requests) == 6 else mended(request)

    server.behave = behave
    command = [sys.executable, "-m", "tlcr", "revise", *flags(settings(tmp_path, server))]
    environment = {**os.environ, "TLCR_PROGRESS": "1"}
    killed = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while len(server.requests) < 6 and killed.poll() is None and time.monotonic() - began < 300:  # imports take longest
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait(30)
    hold.set()
    first = {rejected_of(request) for request in server.requests[:5]}
    assert len(server.requests) == 6 and len(first) == 5
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rest = [rejected_of(request) for request in server.requests[6:]]
    assert len(rest) == 3 and not first & set(rest)
    assert "revise: 8/8" in done.stderr and "8 pairs, 8 revised" in done.stderr
    assert outcomes(tmp_path) == {"revised": 8}


def test_the_command_s_errors_are_one_line(tmp_path: Path, server: ChatServer, capsys) -> None:
    server.behave = lambda request: Reply({"error": {"message": "bad key", "code": "invalid_api_key"}}, 401)
    assert cli.main(["revise", *flags(settings(tmp_path, server))]) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("tlcr: error: ") and "bad key" in shown and "OPENAI_API_KEY" in shown


@pytest.mark.slow
def test_a_whole_run_revises_before_it_labels(tmp_path: Path, server: ChatServer) -> None:
    """The embedded task, its rejected answers revised by the server: every stage up to the discriminator."""

    def behave(request: dict[str, Any]) -> Reply:
        words = rejected_of(request).split()
        return Reply(completion(revision(" ".join([*words[:-2], *words[-1:]]))))

    server.behave = behave
    values = settings(tmp_path, server)
    del values["data.preferences"]
    small = {
        "data.embedded_pairs": 40,
        "data.max_prompt_tokens": 48,
        "data.max_answer_tokens": 48,
        "sft.epochs": 1,
        "reward_model.epochs": 1,
        "discriminator.epochs": 1,
        "rollout.max_new_tokens": 8,
        "ppo.updates": 1,
        "ppo.batch_size": 4,
        "ppo.minibatch_size": 4,
        "evaluation.prompts": 4,
        "reviser.endpoint.concurrency": 4,
    }
    run(load_config(None, values | small))
    assert len(server.requests) == 40
    folder = tmp_path / "run"
    assert outcomes(tmp_path)["revised"] == len(read_jsonl(folder / "labels" / "labels.jsonl")) > 30
    assert (folder / "discriminator" / "done.json").exists() and (folder / "report.html").exists()
    run(load_config(None, values | small), resume=True)
    assert len(server.requests) == 40
