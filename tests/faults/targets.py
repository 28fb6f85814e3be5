"""What is fuzzed: every reader of what others wrote, from bytes to commands. Each target takes what hypothesis draws,
and ends in a result or in an error of tlcr's; anything else is a find."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st

from tlcr import ops
from tlcr.chat.endpoint import _read
from tlcr.chat.types import Answer
from tlcr.cli import main as cli
from tlcr.config.loading import knobs, load_config
from tlcr.config.schema import DataConfig, ModelConfig, RunConfig
from tlcr.data.formats import TextPreference
from tlcr.data.readers import read_edits, read_marked_answers, read_preferences, read_prompts
from tlcr.errors import TlcrError
from tlcr.hosts import contract
from tlcr.judging.formats import read_answers, read_benchmark
from tlcr.judging.verdicts import read_grade, read_ruling
from tlcr.models.loading import load_tokenizer
from tlcr.reviser.checks import check_answer
from tlcr.serving import protocols
from tlcr.text import rendering
from tlcr.text.tokenization import encode_answer, render_prompt
from tlcr.text.turns import apply_template
from tlcr.training.checkpoint import latest_checkpoint
from tlcr.training.done import done_config
from tlcr.training.metrics import read_metrics

Draw = Callable[[st.SearchStrategy[Any]], Any]

# ---- what is drawn

TEXT = st.text(max_size=30) | st.sampled_from(
    ["", " ", "\ud83d", "\x00", "Human: a\n\nAssistant: b", "[" * 200, "é\u2028x"]
)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
"""Readers refuse half of a surrogate pair before anything is tokenised."""
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**70, -1, 10**4000, 1e308])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
FIELDS = (
    *("prompt", "chosen", "rejected", "revised", "response", "messages", "id", "system", "history", "tools", "label"),
    *(
        "completion",
        "question",
        "answer",
        "instruction",
        "output",
        "conversations",
        "spans",
        "errors",
        "turns",
        "choices",
    ),
    *("role", "content", "from", "value", "question_id", "model_id", "generator", "score", "documents"),
)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "from", "value", "name"]), TEXT | JSON, max_size=3), max_size=4
)
RECORDS = st.dictionaries(st.sampled_from(FIELDS), TEXT | MESSAGES | JSON, max_size=6)
PAIRS = st.fixed_dictionaries(
    {"prompt": TEXT | MESSAGES, "chosen": TEXT | MESSAGES, "rejected": TEXT | MESSAGES},
    optional={"revised": TEXT, "id": JSON, "system": TEXT, "history": JSON, "tools": JSON},
)


WORDS = st.sampled_from(["good", "bad food", "Not bad.", "é", " x", "a b c d"])
GOOD = st.fixed_dictionaries(
    {"prompt": WORDS, "chosen": WORDS, "rejected": WORDS, "revised": WORDS, "response": WORDS, "spans": st.just([])},
    optional={"id": TEXT, "system": WORDS, "tools": JSON, "score": NUMBERS},
)
"""Records that most readers take, so that a little damage gets past the first check."""
LINES = st.lists(GOOD, min_size=1, max_size=4) | st.lists(PAIRS | RECORDS | JSON, max_size=4)


def written(value: Any) -> bytes:
    """JSON as programs write it, also that which python's own refuses to write."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def damaged(draw: Draw, data: bytes) -> bytes:
    """The bytes, or the same with a few of them changed, cut or repeated."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(0, 3))):
        at, part = draw(st.integers(0, max(len(changed), 1) - 1)), draw(st.binary(max_size=6))
        way = draw(st.sampled_from(["insert", "replace", "cut", "repeat"]))
        if way == "insert":
            changed[at:at] = part
        elif way == "replace":
            changed[at : at + len(part)] = part
        elif way == "cut":
            del changed[at:]
        else:
            changed[at:at] = changed[at : at + 40] * 3
    return bytes(changed)


@contextmanager
def file_of(data: bytes, name: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        yield str(path)


@cache
def tokenizer() -> Any:
    """A tiny byte-level tokenizer with a chat template."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the food was good and bad"], vocab_size=300, special_tokens=["<pad>", "<eos>"])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    return made


# ---- readers of data


def _readers(path: str, draw: Draw) -> None:
    read = draw(st.sampled_from(["preferences", "edits", "prompts", "spans"]))
    if read == "preferences":
        read_preferences(DataConfig(preferences=path), tokenizer())
    elif read == "edits":
        read_edits(DataConfig(edits=path), tokenizer())
    elif read == "prompts":
        read_prompts(DataConfig(prompts=path), tokenizer())
    else:
        read_marked_answers(path, DataConfig(), tokenizer())


def json_lines(draw: Draw) -> None:
    lines = draw(LINES)
    with file_of(damaged(draw, b"\n".join(map(written, lines))), "a.jsonl") as path:
        _readers(path, draw)


def json_list(draw: Draw) -> None:
    with file_of(damaged(draw, written(draw(LINES | JSON))), "a.json") as path:
        _readers(path, draw)


def tables(draw: Draw) -> None:
    head = draw(st.just(["prompt", "chosen", "rejected", "revised"]) | st.lists(st.sampled_from(FIELDS), max_size=5))
    cell = WORDS if draw(st.booleans()) else TEXT
    rows = draw(st.lists(st.lists(cell, min_size=len(head), max_size=len(head) + draw(st.integers(0, 1))), max_size=4))
    separator, ending = draw(st.sampled_from([(",", ".csv"), ("\t", ".tsv")]))
    quoted = (separator.join(f'"{cell}"' for cell in row) for row in [head, *rows])
    with file_of(damaged(draw, "\n".join(quoted).encode("utf-8", "surrogatepass")), f"a{ending}") as path:
        _readers(path, draw)


@cache
def _parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"], "revised": ["g", "h"]})
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def parquet(draw: Draw) -> None:
    with file_of(damaged(draw, _parquet()), "a.parquet") as path:
        _readers(path, draw)


def benchmarks(draw: Draw) -> None:
    lines = draw(st.lists(RECORDS | JSON, max_size=3))
    listed = draw(st.booleans())
    data = written(lines) if listed else b"\n".join(map(written, lines))
    with file_of(damaged(draw, data), draw(st.sampled_from(["a.json", "a.jsonl"]))) as path:
        draw(st.sampled_from([read_benchmark, read_answers]))(path)


# ---- configs


@cache
def _knobs() -> list[str]:
    return [knob.path for knob in knobs(RunConfig)]


VALUES = st.sampled_from(
    [
        *(
            "1",
            "-1",
            "0",
            ".inf",
            ".nan",
            "1e400",
            "null",
            "true",
            "[]",
            "{}",
            "[1, 2]",
            "{a: b}",
            "text",
            "'",
            "!!python/x",
        ),
        *(
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
            "|\n x",
            "{kind: x}",
        ),
    ]
)


def configs(draw: Draw) -> None:
    lines = []
    for name in draw(
        st.lists(st.sampled_from(_knobs()) | st.sampled_from(["arms", "ppo", "seeds", "nothing"]), max_size=5)
    ):
        lines.append(f"{name}: {draw(VALUES | JSON.map(lambda v: json.dumps(v, default=str)))}")
    with file_of(damaged(draw, "\n".join(lines).encode("utf-8", "surrogatepass")), "a.yaml") as path:
        load_config(path)


_parsers = cache(cli.build_parser)


def commands(draw: Draw) -> None:
    name = draw(st.sampled_from(sorted(cli.HANDLERS)))
    flags = [f"--{draw(st.sampled_from(_knobs()))}" for _ in range(draw(st.integers(0, 3)))]
    words = [word for flag in flags for word in (flag, draw(VALUES | TEXT))]
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
            "{{ messages[0].content }}",
            "{% for m in messages %}",
            "{% endfor %}",
            "{% if x %}",
            "{% endif %}",
            "{{ 1/0 }}",
        ),
        *(
            "{{ 10 ** 10 ** 9 }}",
            "{{ 'x' * 10 ** 11 }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ x.y.z }}",
        ),
        *(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{{ raise_exception('no') }}",
        ),
        *("{{ messages | tojson }}", "{{ ''.__class__.__mro__ }}", "{% include 'a' %}", "{% set x = namespace(a=1) %}"),
        *(
            "{{ '%0999999999d' | format(1) }}",
            "{{ 'a' | center(10 ** 10) }}",
            "{{ strftime_now('%Y') }}",
            "{% break %}",
        ),
        *(
            "{{ range(99999) | list | string | length }}",
            "{{ messages | map(attribute='content') | join }}",
            "{#",
            "{{",
        ),
        *("{{ cycler('a').__init__.__globals__ }}", "{{ lipsum(n=10 ** 6) }}", "{% generation %}a{% endgeneration %}"),
    ]
)


def templates(draw: Draw) -> None:
    from copy import copy

    rendering.SECONDS = 1  # the child that renders is forked after this
    own = copy(tokenizer())
    own.chat_template = "".join(draw(st.lists(PIECES | st.text(max_size=5), max_size=4)))
    apply_template(
        own,
        draw(MESSAGES),
        draw(st.dictionaries(st.sampled_from(["x", "tools"]), JSON, max_size=1)),
        add_generation_prompt=True,
    )


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


def server_requests(draw: Draw) -> None:
    from tlcr.serving.model import ServedModel

    route = draw(
        st.sampled_from(
            [protocols.TokenRewards, protocols.OpenRLHF, protocols.Slime, protocols.LlamaFactory, protocols.Pooling]
        )
    )()
    names = (
        "items",
        "prompt",
        "prompts",
        "response",
        "query",
        "messages",
        "input",
        "model",
        "prompt_ids",
        "response_ids",
        "labels",
    )
    ids = st.lists(st.integers(-2, 400) | NUMBERS | st.booleans(), max_size=4)
    part = st.dictionaries(st.sampled_from(names), TEXT | ids | MESSAGES | JSON, max_size=4)
    body = draw(
        st.dictionaries(st.sampled_from(names), part | st.lists(part | TEXT | ids, max_size=3) | TEXT | ids, max_size=4)
    )
    model = ServedModel.__new__(ServedModel)
    vars(model).update(_served())
    route.rows(model, draw(st.just(body) | REQUESTS), {})


SMALL_IDS = st.lists(st.integers(0, 299), min_size=1, max_size=4)
ITEMS = st.fixed_dictionaries({"prompt": WORDS, "response": WORDS}) | st.fixed_dictionaries(
    {"prompt_ids": SMALL_IDS, "response_ids": SMALL_IDS}
)
REQUESTS = st.fixed_dictionaries(
    {
        "items": st.lists(ITEMS | JSON, min_size=1, max_size=3),
        "prompts": st.lists(WORDS, min_size=1, max_size=2),
        "query": st.lists(WORDS, min_size=1, max_size=2),
        "prompt": WORDS,
        "response": WORDS,
        "messages": st.lists(WORDS, min_size=1, max_size=2),
        "input": WORDS | SMALL_IDS | st.lists(WORDS, min_size=1, max_size=2),
    }
)
"""What every route finds what it wants in."""


@cache
def _served() -> dict[str, Any]:
    return {
        "tokenizer": tokenizer(),
        "name": "m",
        "temperature": 1.0,
        "positions": 64,
        "vocabulary": 300,
        "labels": ["-", "+"],
    }


def endpoint_answers(draw: Draw) -> None:
    """A server's JSON by the client's classes, to an answer, and what the reviser and the judge make of it."""
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
    except ValueError:  # which the endpoint counts as one failed answer
        return
    assert isinstance(answer, Answer)
    check_answer(TextPreference("1", "a", "b c", "b d"), answer, max_changed=0.5)
    read_ruling(answer)
    read_grade(answer)


def scorers(draw: Draw) -> None:
    """What a trainer hands over, and what a scorer gives back."""
    ids = st.lists(st.integers(-3, 9) | st.booleans() | NUMBERS, max_size=4)
    items = [contract.Item(draw(ids), draw(ids)) for _ in range(draw(st.integers(0, 3)))]
    contract.checked(draw(st.lists(st.lists(st.floats() | JSON, max_size=4) | JSON, max_size=3)), items)


# ---- what a run wrote


def records(draw: Draw) -> None:
    """Manifests, records and metrics of another version, of a damaged disk, or of somebody."""
    manifest = {"format": 1, "layout": "whole", "step": 1, "processes": 1, "versions": {}, "files": {}, "state": {}}
    value = draw(st.just(manifest) | JSON | st.fixed_dictionaries(dict.fromkeys(manifest, JSON)))
    data = damaged(draw, written(value))
    with file_of(data, "done.json") as path:
        folder = Path(path).parent
        (folder / "step-000001").mkdir()
        (folder / "step-000001" / "checkpoint.json").write_bytes(data)
        latest_checkpoint(folder)
        (folder / "metrics.jsonl").write_bytes(data + b"\n")
        with contextlib.suppress(TlcrError):
            read_metrics(folder / "metrics.jsonl")
        if draw(st.booleans()):
            done_config(folder, {"a": 1})


# ---- kernels

SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 5, 8]), max_size=4)
TYPES = st.sampled_from(
    [
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.bool,
        torch.float8_e4m3fn,
    ]
)


def _tensor(draw: Draw, shape: list[int] | None = None, dtype: torch.dtype | None = None) -> Any:
    if not draw(st.integers(0, 12)):
        return draw(st.sampled_from([None, 1.0, [1.0], "a", float("nan")]))
    if shape is None or not draw(st.integers(0, 6)):
        shape = draw(SHAPES)
    dtype = draw(TYPES) if dtype is None or not draw(st.integers(0, 6)) else dtype
    made = torch.rand(shape).mul(9).sub(2).to(dtype)
    way = draw(st.sampled_from(["", "", "", "", "transposed", "strided", "sparse", "grad", "expanded", "meta"]))
    if way == "transposed" and made.dim() > 1:
        made = made.transpose(0, -1).contiguous().transpose(0, -1)
    elif way == "strided" and made.dim():
        made = torch.stack([made, made], -1)[..., 0]
    elif way == "sparse" and dtype == torch.float32:
        made = made.to_sparse()
    elif way == "grad" and made.is_floating_point() and dtype != torch.float8_e4m3fn:
        made.requires_grad_()
    elif way == "expanded" and made.dim() and made.shape[0]:
        made = made[:1].expand(made.shape)
    elif way == "meta":
        made = made.to("meta")
    return made


def kernels(draw: Draw) -> None:
    """Every op by its C++ and by torch's own, forward and backward, with arguments that mostly do not fit."""
    B, T, V = draw(st.tuples(*(st.sampled_from([0, 1, 2, 3, 7]) for _ in range(3))))
    f32, bf16, mask, ids = torch.float32, torch.bfloat16, torch.bool, torch.int64
    pair = lambda: _tensor(draw, [B, T], f32)  # noqa: E731
    number = lambda: draw(st.sampled_from([0.0, 1.0, 0.5, -1.0, 1e-30, float("nan"), float("inf"), None]))  # noqa: E731
    impl = draw(st.sampled_from(["cpp", "reference"]))
    calls: dict[str, Callable[[], Any]] = {
        "reward": lambda: ops.fused_reward(
            _tensor(draw, [B, T, 2], f32),
            _tensor(draw, [B, T], mask),
            kl=pair(),
            kl_coef=number(),
            clip=number(),
            impl=impl,
        ),
        "gae": lambda: ops.fused_gae(
            pair(),
            pair(),
            _tensor(draw, [B, T], mask),
            gamma=number(),
            lam=number(),
            whiten=draw(st.booleans()),
            impl=impl,
        ),
        "ppo": lambda: ops.ppo_loss(
            pair(),
            pair(),
            pair(),
            _tensor(draw, [B, T], mask),
            values=pair(),
            old_values=pair(),
            returns=pair(),
            impl=impl,
        ),
        "score": lambda: ops.score_tokens(
            _tensor(draw, [B, T, V], f32),
            _tensor(draw, [B, T], ids),
            ref_logits=_tensor(draw, [B, T, V], f32),
            temperature=number(),
            impl=impl,
        ),
        "hidden": lambda: ops.score_hidden(
            _tensor(draw, [B, T, 4], f32),
            _tensor(draw, [V, 4], f32),
            _tensor(draw, [B, T], ids),
            temperature=number(),
            impl=impl,
        ),
        "hidden reward": lambda: ops.reward_from_hidden(
            _tensor(draw, [B, T, 4], f32), _tensor(draw, [2, 4], f32), _tensor(draw, [B, T], mask), impl=impl
        ),
        "rms": lambda: ops.rms_norm(_tensor(draw, [B, T], f32), _tensor(draw, [T], f32), eps=number(), impl=impl),
        "silu": lambda: ops.gated_silu(pair(), pair(), impl=impl),
        "adamw": lambda: ops.adamw_step(
            *([_tensor(draw, [T], kind)] * draw(st.integers(0, 2)) for kind in (bf16, bf16, f32, f32, torch.int16)),
            learning_rate=number(),
            betas=draw(st.sampled_from([(0.9, 0.99), (0.9,), (0.9, 0.9, 0.9), 0.9, (2.0, None)])),
            step=draw(st.sampled_from([1, 0, -1, 2**70, 1.5, None])),
            impl=impl,
        ),
        "labels": lambda: ops.token_labels(
            draw(st.lists(st.integers(-1, 3), max_size=5)), draw(st.lists(st.integers(), max_size=5))
        ),
    }
    found = calls[draw(st.sampled_from(sorted(calls)))]()
    leaves = [
        t for t in (found if isinstance(found, tuple) else [found]) if isinstance(t, torch.Tensor) and t.requires_grad
    ]
    if leaves:
        sum(t.float().sum() for t in leaves).backward()


TARGETS: dict[str, Callable[[Draw], None]] = {
    "JSON lines": json_lines,
    "JSON": json_list,
    "CSV and TSV": tables,
    "Parquet": parquet,
    "benchmarks and answers to them": benchmarks,
    "configs": configs,
    "command lines": commands,
    "chat templates": templates,
    "tokenizers": tokenizers,
    "requests to the server": server_requests,
    "answers of an endpoint": endpoint_answers,
    "scorers of trainers": scorers,
    "records and manifests": records,
    "arguments of the ops": kernels,
}
