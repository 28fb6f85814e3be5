"""What is fuzzed: every reader of what others wrote, from bytes to commands. Each target takes what hypothesis draws,
and ends in a result or in an error of tlcr's; anything else is a find."""

from __future__ import annotations

import contextlib
import email.message
import io
import json
import math
import tempfile
import typing
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st

from tests.faults.drawn import (
    FILES,
    GOOD,
    JSON,
    MESSAGES,
    NUMBERS,
    TEXT,
    TURNS,
    UNICODE,
    WORDS,
    Draw,
    corpus,
    damaged,
    file_of,
    from_corpus,
    json_lines,
    json_list,
    one_wrong,
    packed,
    records,
    tokenizer,
    written,
)
from tests.faults.fuzzed_ops import arguments_of_the_ops
from tlcr.chat.endpoint import _read
from tlcr.chat.types import Answer
from tlcr.cli import main as cli
from tlcr.config.loading import Knob, knobs, load_config
from tlcr.config.schema import DataConfig, ModelConfig, RunConfig
from tlcr.data.readers import read_edits, read_marked_answers, read_preferences, read_prompts
from tlcr.data.records import TextPreference
from tlcr.errors import DataError
from tlcr.hosts import contract
from tlcr.hosts.client import RewardClient
from tlcr.judging.formats import read_answers, read_benchmark
from tlcr.judging.verdicts import read_grade, read_ruling
from tlcr.models.tokenizers import load_tokenizer
from tlcr.reviser.checks import check_answer
from tlcr.serving import protocols
from tlcr.serving.limits import parse_json
from tlcr.text import rendering
from tlcr.text.tokenization import encode_answer, render_prompt
from tlcr.text.turns import apply_template
from tlcr.training.checkpoint import MANIFEST, latest_checkpoint, load_checkpoint, save_checkpoint
from tlcr.training.done import check_results, done_config
from tlcr.training.metrics import read_metrics

# ---- readers of data

READERS: dict[str, Callable[[str, Any], object]] = {
    "preferences": lambda path, skip: read_preferences(DataConfig(preferences=path, on_malformed=skip), tokenizer()),
    "edits": lambda path, skip: read_edits(DataConfig(edits=path, on_malformed=skip), tokenizer()),
    "prompts": lambda path, skip: read_prompts(DataConfig(prompts=path, on_malformed=skip), tokenizer()),
    "marked answers": lambda path, skip: read_marked_answers(path, DataConfig(on_malformed=skip), tokenizer()),
}


def data(reader: str, kind: str, draw: Draw) -> None:
    """A file of one kind by one reader: drawn, or damaged from the corpus."""
    if not draw(st.integers(0, 5)):
        names = [path.name for path in corpus(reader) if path.suffix == FILES[kind](draw, [])[0]]
        if names:
            name, bytes_ = from_corpus(draw, reader)
            with file_of(damaged(draw, bytes_), name) as path:
                READERS[reader](path, draw(st.sampled_from(["raise", "skip"])))
            return
    ending, bytes_ = packed(draw, *FILES[kind](draw, records(draw, reader)))
    with file_of(bytes_, f"a{ending}") as path:
        READERS[reader](path, draw(st.sampled_from(["raise", "skip"])))


BENCHMARKS: dict[str, Callable[[str | Path], object]] = {
    "benchmarks": read_benchmark,
    "answers to benchmarks": read_answers,
}


def benchmarks(reader: str, draw: Draw) -> None:
    """AlpacaEval's are lists, FastChat's are lines."""
    if not draw(st.integers(0, 5)):
        name, bytes_ = from_corpus(draw, reader)
    else:
        listed = draw(st.booleans())
        ways = (0,) if listed else range(1, len(GOOD[reader]))
        ending, bytes_ = (json_list if listed else json_lines)(draw, records(draw, reader, ways))
        name = f"a{ending}"
    with file_of(damaged(draw, bytes_), name) as path:
        BENCHMARKS[reader](path)


# ---- configs


@cache
def _knobs() -> list[Knob]:
    return [knob for knob in knobs(RunConfig) if knob.path != "arms"]


VALUES = st.sampled_from(
    [
        *("1", "-1", "0", ".inf", ".nan", "1e400", "null", "true", "[]", "{}", "[1, 2]", "{a: b}", "text", "'"),
        *(
            "!!python/x",
            "*a",
            "&a [*a]",
            "2026-01-01",
            "1_000",
            "0x10",
            "0o7",
            "1:30",
            "'\\0'",
            '"\\ud83d"',
            "~",
            "- 1",
        ),
        *("|\n x", "{kind: x}"),
    ]
)


def _fitting(draw: Draw, hint: Any, facts: Any) -> Any:
    """A value that a knob of this type takes, unless another knob forbids it."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return draw(st.sampled_from(arguments))
    if typing.get_origin(hint) is tuple:
        return [_fitting(draw, arguments[0], facts) for _ in range(draw(st.integers(0, 2)))]
    if arguments:
        return _fitting(draw, draw(st.sampled_from(arguments)), facts)
    low = facts.get("ge") if facts.get("ge") is not None else facts.get("gt")
    high = facts.get("le")
    if hint is int:
        return draw(st.integers(math.floor(low or 0) + 1, int(high) if high else 1000))
    if hint is float:
        return draw(st.floats((low or 0.0) + 1e-3, high or 1e3))
    return {bool: draw(st.booleans()), type(None): None, str: draw(st.sampled_from(["a", "model-b", "runs/é"]))}[hint]


def configs(draw: Draw) -> None:
    """Knobs with values that mostly fit, a strange one among them in half of the files, or a file of the corpus."""
    if draw(st.integers(0, 3)):
        chosen = draw(st.lists(st.sampled_from(_knobs()), max_size=4, unique_by=lambda knob: knob.path))
        lines = [f"{k.path}: {json.dumps(_fitting(draw, k.type, k.metadata))}" for k in chosen]
        if draw(st.booleans()):
            name = draw(st.sampled_from(_knobs()).map(lambda knob: knob.path) | st.sampled_from(["arms", "ppo", "no"]))
            lines.append(f"{name}: {draw(VALUES | JSON.map(lambda value: json.dumps(value, default=str)))}")
        bytes_ = "\n".join(lines).encode("utf-8", "surrogatepass")
    else:
        _, bytes_ = from_corpus(draw, "configs")
    with file_of(damaged(draw, bytes_), "a.yaml") as path:
        load_config(path)


_parsers = cache(cli.build_parser)


def commands(draw: Draw) -> None:
    name = draw(st.sampled_from(sorted(cli.HANDLERS)) | st.just("run"))
    words = []
    for knob in draw(st.lists(st.sampled_from(_knobs()), max_size=3)):
        fits = written(_fitting(draw, knob.type, knob.metadata)).decode().strip('"')
        words += [f"--{knob.path}", fits if draw(st.integers(0, 3)) else draw(VALUES | TEXT)]
    silent = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()))
    with silent[0], silent[1], mock.patch.object(cli, "build_parser", _parsers):  # it takes a second
        try:
            parsed = cli._parse([name, *words, *draw(st.lists(VALUES | TEXT, max_size=1))])
        except SystemExit:  # --help
            return
        if parsed["command"] in ("run", "train"):
            load_config(None, cli._overrides(parsed[parsed["command"]]))


# ---- templates and tokenizers

PIECES = st.sampled_from(
    [
        *(
            "{{ 1/0 }}",
            "{{ 10 ** 10 ** 9 }}",
            "{{ 'x' * 10 ** 11 }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        ),
        *("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ x.y.z }}", "{#", "{{"),
        *("{{ raise_exception('no') }}", "{{ messages | tojson }}", "{{ ''.__class__.__mro__ }}", "{% include 'a' %}"),
        *("{% set x = namespace(a=1) %}", "{{ '%0999999999d' | format(1) }}", "{{ 'a' | center(10 ** 10) }}"),
        *("{{ strftime_now('%Y') }}", "{% break %}", "{{ range(99999) | list | string | length }}"),
        *("{{ messages | map(attribute='content') | join }}", "{{ cycler('a').__init__.__globals__ }}"),
        *("{{ lipsum(n=10 ** 6) }}", "{% generation %}a{% endgeneration %}", "{% if x %}", "{% endif %}"),
    ]
)
HARMLESS = st.sampled_from(
    [
        *("{{ messages[0].content }}", "{% for m in messages %}{{ m['role'] }}: {{ m.content | trim }}\n{% endfor %}"),
        *("{% if add_generation_prompt %}assistant:{% endif %}", "{{ eos_token }}", "a", "{{ x | default('') }}"),
    ]
)


def templates(draw: Draw) -> None:
    from copy import copy

    rendering.SECONDS = 1  # the child that renders is forked after this
    own = copy(tokenizer())
    pieces = draw(st.lists(HARMLESS, max_size=4))
    if draw(st.booleans()):
        pieces.insert(draw(st.integers(0, len(pieces))), draw(PIECES | st.text(max_size=5)))
    own.chat_template = "".join(pieces)
    values = draw(st.dictionaries(st.sampled_from(["x", "tools"]), JSON, max_size=1))
    apply_template(own, draw(TURNS | MESSAGES), values, add_generation_prompt=draw(st.booleans()))


def tokenizers(draw: Draw) -> None:
    """Texts through a whole tokenizer, or the files of one that are damaged."""
    if draw(st.integers(0, 4)):
        prompt, answer = draw(UNICODE), draw(UNICODE)
        encode_answer(tokenizer(), prompt, answer, max_prompt_tokens=8, max_answer_tokens=draw(st.integers(1, 9)))
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer().save_pretrained(folder)
        path = Path(folder) / draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
        path.write_bytes(damaged(draw, path.read_bytes()))
        render_prompt(load_tokenizer(ModelConfig(path=folder)), [{"role": "user", "content": "Hi"}])


# ---- what servers and their clients say


STRANGE = st.sampled_from(
    [b"[" * 10**5, b'{"data": 1' + b"0" * 5000 + b"}", b"", b"\xff", b'{"data": "\\ud83d"}', b"NaN"]
)
"""What parsers of JSON stumble over."""


def server_requests(draw: Draw) -> None:
    """Bodies of requests, mostly such as their route wants."""
    from tlcr.serving.reading import Reader

    name = draw(st.sampled_from(sorted(REQUESTS)))
    body = draw(REQUESTS[name])
    if draw(st.booleans()):
        body = one_wrong(draw, body)
    reader = Reader(tokenizer(), 300, max_items=3, longest_row=64)
    query = draw(st.sampled_from([{}, {"answer_after": "A:"}]))
    bytes_ = damaged(draw, written(body)) if draw(st.integers(0, 19)) else draw(STRANGE)
    list(protocols.ROUTES[name].rows(reader, parse_json(bytes_), query))


SMALL_IDS = st.lists(st.integers(0, 299), min_size=1, max_size=4)
TEXTS = st.fixed_dictionaries({"prompt": WORDS, "response": WORDS}, optional={"ended": st.booleans()})
IDS = st.fixed_dictionaries({"prompt_ids": SMALL_IDS, "response_ids": SMALL_IDS})
TEMPLATE = {"tools": st.lists(JSON, max_size=2), "documents": JSON, "chat_template_kwargs": JSON}
ITEMS = TEXTS | IDS | st.fixed_dictionaries({"messages": TURNS, "response": WORDS}, optional=TEMPLATE)
REQUESTS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "/v1/token_rewards": st.fixed_dictionaries({"items": st.lists(ITEMS, min_size=1, max_size=3)}),
    "/get_reward": st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=2).map(
        lambda pairs: {"query": [a + b for a, b in pairs], "prompts": [a for a, _ in pairs]}
    ),
    "/remote_rm": st.fixed_dictionaries({"prompt": WORDS | TURNS, "response": WORDS, "label": JSON}),
    "/score_texts": st.lists(st.tuples(WORDS, WORDS).map("A: ".join), min_size=1, max_size=2).map(
        lambda texts: {"messages": texts}
    ),
    "/pooling": st.fixed_dictionaries({"input": WORDS | SMALL_IDS | st.lists(WORDS, min_size=1, max_size=2)}),
}
"""What every route finds what it wants in."""


def endpoint_answers(draw: Draw) -> None:
    """A server's JSON by the client's classes, to an answer, and what the reviser and the judge make of it. Whatever it
    is, it is one answer or one failed answer, and what was refused of it is counted."""
    from openai._models import construct_type
    from openai.types.chat import ChatCompletion

    text = draw(
        TEXT
        | JSON.map(lambda value: json.dumps(value, default=str))
        | st.sampled_from(["[" * 10**5, '{"revised": "a"', "[[A]]"])
    )
    message = draw(st.fixed_dictionaries({"content": st.just(text) | JSON, "refusal": st.none() | JSON}) | JSON)
    choice = draw(
        st.fixed_dictionaries(
            {"message": st.just(message), "finish_reason": st.sampled_from(["stop", "length", None]) | JSON}
        )
        | JSON
    )
    whole = {
        "choices": draw(st.just([choice]) | JSON),
        "usage": draw(st.fixed_dictionaries({"prompt_tokens": JSON, "completion_tokens": JSON}) | JSON),
    }
    try:
        answer = _read(construct_type(value=whole, type_=ChatCompletion))
    except ValueError as error:
        raise DataError(f"the endpoint counts it as one failed answer: {error!s:.80}") from error
    assert isinstance(answer, Answer)
    check_answer(TextPreference("1", "a", "b c", "b d"), answer, max_changed=0.5)
    read_ruling(answer)
    read_grade(answer)


def reward_servers(draw: Draw) -> None:
    """What tlcr serve or a vLLM might answer to the client inside a trainer."""
    rewards = draw(st.lists(st.lists(st.floats(-1, 1), max_size=3), min_size=1, max_size=2))
    logits = [[[1.0, value] for value in row] for row in rewards]
    answers: dict[str, Any] = {
        "/v1/info": {"labels": ["negative", "positive"], "limits": {"items": 8, "request_tokens": 99}, "tokenizer": {}},
        "/v1/token_rewards": {"data": [{"rewards": row, "offsets": [[0, 1]]} for row in rewards if row]},
        "/v1/models": {"data": [{"id": "m", "root": "m", "max_model_len": 8}]},
        "/pooling": {"data": [{"index": index, "data": rows} for index, rows in enumerate(filter(None, logits))]},
    }
    if vllm := draw(st.booleans()):
        del answers["/v1/info"]
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(answers)))
        answers[name] = one_wrong(draw, answers[name])
    bodies = {path: damaged(draw, written(answer)) for path, answer in answers.items()}
    if not draw(st.integers(0, 9)):
        bodies[draw(st.sampled_from(sorted(bodies)))] = draw(STRANGE)

    def open_(request: urllib.request.Request, timeout: float) -> io.BytesIO:
        path = urllib.parse.urlsplit(request.full_url).path
        if path not in bodies:
            raise urllib.error.HTTPError(path, 404, "no route", email.message.Message(), io.BytesIO(b"{}"))
        return io.BytesIO(bodies[path])

    client = RewardClient("http://localhost:1", tries=1, temperature=1.0 if vllm else None)
    with mock.patch.object(urllib.request, "urlopen", open_):
        client.token_rewards([contract.Item([], [1] * len(row)) for row in rewards])


def scorers(draw: Draw) -> None:
    """What a trainer hands over, and what a scorer gives back: as many numbers as tokens, or something else."""
    ids = st.lists(st.integers(0, 9), max_size=4)
    pairs = draw(st.lists(st.tuples(ids, ids), max_size=3))
    rewards: Any = [draw(st.lists(st.floats(-1, 1), min_size=len(b), max_size=len(b))) for _, b in pairs]
    wrong = draw(st.sampled_from(["", "", "ids", "row", "rewards"]))
    if wrong == "ids" and pairs:
        pairs[0] = (draw(st.lists(st.integers(-3, 9) | st.booleans() | NUMBERS, max_size=4)), pairs[0][1])
    elif wrong == "row" and rewards:
        rewards[0] = draw(st.lists(st.floats() | JSON, max_size=4) | JSON)
    elif wrong == "rewards":
        rewards = draw(st.lists(JSON, max_size=3))
    contract.checked(rewards, [contract.Item(*pair) for pair in pairs])


# ---- what a run wrote


def run_records(draw: Draw) -> None:
    """Records and metrics of another version, of a damaged disk, or of somebody."""
    record = {"config": {"a": 1}, "metrics": {}, "seconds": 1.0, "versions": {}, "machine": {}, "checksums": {}}
    value = record if draw(st.booleans()) else one_wrong(draw, record)
    rows = draw(
        st.lists(st.fixed_dictionaries({"step": st.integers(0, 9), "loss": st.floats() | st.none()}), max_size=3)
    )
    if not draw(st.integers(0, 3)):
        rows.append(draw(JSON))
    with file_of(damaged(draw, written(value)), "done.json") as path:
        folder = Path(path).parent
        (folder / "metrics.jsonl").write_bytes(damaged(draw, b"".join(written(row) + b"\n" for row in rows)))
        read_metrics(folder / "metrics.jsonl")
        done_config(folder, {"a": 1})
        check_results(folder)


def checkpoints(draw: Draw) -> None:
    """A checkpoint of which one file is damaged is refused, or loads what was saved, to the bit."""
    files = _checkpoint()
    name = draw(st.sampled_from(sorted(files)))
    manifest = json.loads(files[MANIFEST])
    if name == MANIFEST and draw(st.booleans()):
        changed = written(one_wrong(draw, manifest))
    else:
        changed = damaged(draw, files[name])
    with file_of(b"", "other") as path:
        folder = Path(path).parent / "step-000001"
        folder.mkdir()
        for other, bytes_ in {**files, name: changed}.items():
            (folder / other).write_bytes(bytes_)
        if latest_checkpoint(folder.parent) is None:
            raise DataError("passed over, with a warning")
        model, optimizer = _model()
        loaded = load_checkpoint(folder, models={"a": model}, optimizers={"a": optimizer}, schedulers={})
        if name != MANIFEST:  # its own fields have no checksum, and whoever writes there may write anything
            assert loaded.state == {"seen": 3} and loaded.step == 1
        assert all(bool((a == b).all()) for a, b in zip(model.parameters(), _model()[0].parameters(), strict=True))


def _model() -> tuple[Any, Any]:
    """Always the same, with moments of one step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


@cache
def _checkpoint() -> dict[str, bytes]:
    model, optimizer = _model()
    with file_of(b"", "other") as path:
        saved = save_checkpoint(
            Path(path).parent,
            1,
            models={"a": model},
            optimizers={"a": optimizer},
            schedulers={},
            state={"seen": 3},
            tensors={},
            config={"a": 1},
            keep=1,
        )
        return {file.name: file.read_bytes() for file in saved.iterdir()}


TARGETS: dict[str, Callable[[Draw], None]] = {
    **{
        f"{reader} in {kind}": partial(data, reader, kind)
        for reader in READERS
        for kind in FILES
        if (reader, kind) != ("marked answers", "tables")  # their spans are lists, which no cell holds
    },
    **{reader: partial(benchmarks, reader) for reader in BENCHMARKS},
    "configs": configs,
    "command lines": commands,
    "chat templates": templates,
    "tokenizers": tokenizers,
    "requests to the server": server_requests,
    "answers of an endpoint": endpoint_answers,
    "answers of a reward server": reward_servers,
    "scorers of trainers": scorers,
    "records and metrics": run_records,
    "checkpoints": checkpoints,
    "arguments of the ops": arguments_of_the_ops,
}
