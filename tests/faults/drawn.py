"""What the fuzzer draws: values of every kind, records that a reader takes, and bytes that are a little damaged.

Most inputs have to get past the first check, so that the code behind it is reached: records begin as good ones, and
then one of them, one field or some bytes are wrong.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

CORPUS = Path(__file__).parent / "corpus"
"""A folder for each kind of input: small files that reach deep, and those that were found to break something."""

# ---- values

TEXT = st.text(max_size=30) | st.sampled_from(
    ["", " ", "\ud83d", "\x00", "Human: a\n\nAssistant: b", "[" * 200, "é\u2028x"]
)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
"""Readers refuse half of a surrogate pair before anything is tokenised."""
WORDS = st.sampled_from(["good", "bad food", "Not bad.", "é", " x", "a b c d", "Why not?\n"])
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**70, -1, 10**4000, 1e308])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "from", "value", "name"]), TEXT | JSON, max_size=3), max_size=4
)

# ---- records

TURNS = st.lists(WORDS, min_size=1, max_size=5).map(
    lambda texts: [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(texts[: len(texts) // 2 * 2 - 1] or texts[:1])
    ]
)
"""A conversation that a user ends."""
CONTEXT = {"system": WORDS, "history": st.lists(st.tuples(WORDS, WORDS).map(list), max_size=2)}
OPTIONAL = {"id": WORDS | st.integers(0, 3), **CONTEXT}


def _other(word: str) -> str:
    return f"{word} not"


def _pair(prompts: st.SearchStrategy[Any], *names: str) -> st.SearchStrategy[dict[str, Any]]:
    """A prompt and answers to it that differ."""
    answers = {name: WORDS.map(_other if number % 2 else str.strip) for number, name in enumerate(names)}
    return st.fixed_dictionaries({"prompt": prompts, **answers}, optional=OPTIONAL)


def _transcript(question: str, answers: tuple[str, str]) -> dict[str, str]:
    start = f"\n\nHuman: {question}\n\nAssistant: "
    return {"chosen": start + answers[0], "rejected": start + _other(answers[1])}


def _spans(answer: str, places: list[tuple[int, int]]) -> dict[str, Any]:
    inside = sorted((min(place), max(place)) for place in places if max(place) <= len(answer) and len(set(place)) == 2)
    return {"response": answer, "spans": [{"start": start, "end": end} for start, end in inside]}


PUBLISHED = st.fixed_dictionaries(
    {
        "context": WORDS.map("###Human: {}###Assistant:".format),
        "chosen_response": WORDS,
        "reject_response": WORDS.map(_other),
        "response": WORDS,
    },
    optional={
        "rejected_token_edit": st.just(["U", "S", "D"]),
        "modified_token_edit": st.sampled_from([["U", "S", "A"], ["A", "U", "S"], ["U"]]),
        "raw_response": WORDS.map("thoughts\n\n<|Start Of Modified Response|>\n{}".format),
    },
)
"""Records of the published TLCR data."""
GOOD: dict[str, list[st.SearchStrategy[dict[str, Any]]]] = {
    "preferences": [
        _pair(WORDS, "chosen", "rejected"),
        _pair(TURNS, "chosen", "rejected"),
        st.builds(_transcript, WORDS, st.tuples(WORDS, WORDS)),
        PUBLISHED,
    ],
    "edits": [_pair(WORDS, "rejected", "revised"), _pair(TURNS, "rejected", "revised", "chosen"), PUBLISHED],
    "prompts": [
        st.fixed_dictionaries({"prompt": WORDS}, optional=OPTIONAL),
        st.fixed_dictionaries({"prompt": TURNS}, optional=OPTIONAL),
        _pair(WORDS, "chosen", "rejected"),
        PUBLISHED,
    ],
    "marked answers": [
        st.builds(
            lambda prompt, marked: {"prompt": prompt, **marked},
            prompts,
            st.builds(_spans, WORDS, st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=3)),
        )
        for prompts in (WORDS, TURNS)
    ],
    "benchmarks": [
        st.fixed_dictionaries({"instruction": WORDS}, optional={"dataset": WORDS, "input": st.just("")}),
        st.fixed_dictionaries(
            {"question_id": st.integers(0, 99) | WORDS, "turns": st.lists(WORDS, min_size=1, max_size=1)},
            optional={"category": WORDS, "reference": st.lists(WORDS, max_size=1)},
        ),
        st.fixed_dictionaries(
            {"question_id": st.integers(0, 99), "turns": st.lists(WORDS, min_size=2, max_size=2)},
            optional={"category": WORDS, "reference": st.lists(WORDS, max_size=2)},
        ),
    ],
    "answers to benchmarks": [
        st.fixed_dictionaries({"instruction": WORDS, "output": WORDS, "generator": st.just("m")}),
        st.fixed_dictionaries(
            {
                "question_id": st.integers(0, 99),
                "model_id": st.just("m"),
                "choices": st.lists(st.fixed_dictionaries({"turns": st.lists(WORDS, max_size=2)}), min_size=1),
            },
            optional={"answer_id": TEXT, "tstamp": NUMBERS},
        ),
    ],
}
"""Records that each reader takes: a list for each of its formats."""


def records(draw: Draw, reader: str, ways: Sequence[int] | None = None) -> list[Any]:
    """Good records of one format of a reader; in three of five files something of them is not. ways: these formats."""
    formats = GOOD[reader]
    made = draw(st.lists(formats[draw(st.sampled_from(ways or range(len(formats))))], min_size=1, max_size=4))
    wrong = draw(st.sampled_from(["", "", "field", "name", "record"]))
    at = draw(st.integers(0, len(made) - 1)) if wrong else 0
    if wrong == "record":
        made[at] = draw(MESSAGES | JSON)
    elif wrong:
        record = dict(made[at])
        name = draw(st.sampled_from(sorted(record)) | TEXT if wrong == "field" else st.sampled_from(sorted(record)))
        if wrong == "field":
            record[name] = draw(TEXT | MESSAGES | JSON)
        else:
            del record[name]
        made[at] = record
    return made


def one_wrong(draw: Draw, value: Any) -> Any:
    """A value of JSON in which one part, however deep, is another or missing."""
    if not (isinstance(value, (dict, list)) and value) or not draw(st.integers(0, 3)):
        return draw(JSON | st.sampled_from([[], {}, None, "a", -1]))
    if isinstance(value, dict):
        name = draw(st.sampled_from(sorted(value)))
        if not draw(st.integers(0, 4)):
            return {key: item for key, item in value.items() if key != name}
        return {**value, name: one_wrong(draw, value[name])}
    at = draw(st.integers(0, len(value) - 1))
    return [one_wrong(draw, item) if number == at else item for number, item in enumerate(value)]


# ---- bytes


def written(value: Any) -> bytes:
    """JSON as programs write it, also that which python's own refuses to write."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def damaged(draw: Draw, data: bytes) -> bytes:
    """In two of three cases the bytes as they are; else the same with a few of them changed, cut or repeated."""
    changed = bytearray(data)
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 3]))):
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


def corpus(kind: str) -> list[Path]:
    """The files of a folder of the corpus."""
    return sorted((CORPUS / kind).iterdir())


def from_corpus(draw: Draw, kind: str) -> tuple[str, bytes]:
    """The name and the bytes of one of them."""
    path = draw(st.sampled_from(corpus(kind)))
    return path.name, path.read_bytes()


def json_lines(draw: Draw, rows: Sequence[Any]) -> tuple[str, bytes]:
    return ".jsonl", b"\n".join(map(written, rows))


def json_list(draw: Draw, rows: Sequence[Any]) -> tuple[str, bytes]:
    return ".json", written(rows)


def table(draw: Draw, rows: Sequence[Any]) -> tuple[str, bytes]:
    """Cells hold texts, and JSON where the record holds something else; now and then a cell is too many."""
    separator, ending = draw(st.sampled_from([(",", ".csv"), ("\t", ".tsv")]))
    usable = [row for row in rows if isinstance(row, dict)]
    head = list(dict.fromkeys(name for row in usable for name in row)) or ["prompt"]
    lines = [[*head, *draw(st.sampled_from([[], [], [], [], head[:1]]))]]
    for row in usable:
        cells = [row.get(name, "") for name in head]
        lines.append([cell if isinstance(cell, str) else written(cell).decode("utf-8", "replace") for cell in cells])
    file = io.StringIO(newline="")
    # Python 3.10 writes no NUL: another character stands for it meanwhile.
    csv.writer(file, delimiter=separator).writerows([[cell.replace("\0", "\ue000") for cell in line] for line in lines])
    return ending, file.getvalue().replace("\ue000", "\0").encode("utf-8", "surrogatepass")


def parquet(draw: Draw, rows: Sequence[Any]) -> tuple[str, bytes]:
    """Of values that have one type in each column; else a table that is always the same."""
    return ".parquet", _parquet(written([row for row in rows if isinstance(row, dict)])) or _parquet(
        b'[{"prompt":"a"}]'
    )


@cache
def _parquet(rows: bytes) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(json.loads(rows)), file)
    except (pa.ArrowException, ValueError, OverflowError, TypeError):
        return b""
    return file.getvalue()


FILES: dict[str, Callable[[Draw, Sequence[Any]], tuple[str, bytes]]] = {
    "JSON lines": json_lines,
    "JSON": json_list,
    "tables": table,
    "Parquet": parquet,
}
"""Kinds of files, each with the ending and the bytes of some records."""


@contextmanager
def file_of(data: bytes, name: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        yield str(path)


def packed(draw: Draw, ending: str, data: bytes) -> tuple[str, bytes]:
    """Text files now and then as .gz, whose bytes are damaged then."""
    if ending != ".parquet" and draw(st.sampled_from([False] * 5 + [True])):
        return f"{ending}.gz", damaged(draw, gzip.compress(data, 1, mtime=0))
    return ending, damaged(draw, data)


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
