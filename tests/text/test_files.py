"""How texts are opened: encodings that are read, those that are refused with a remedy, and standard input."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from tlcr.errors import DataError
from tlcr.text.files import DEEPEST_JSON, open_text, parse_json, read_text, unicode_problem

TEXT = '{"a": "café 🙃"}\r\nzwei\n'
ENCODINGS = {
    "utf-8": lambda text: text.encode(),
    "utf-8 with a byte-order mark": lambda text: text.encode("utf-8-sig"),
    "gzip": lambda text: gzip.compress(text.encode()),
    "gzip with a byte-order mark": lambda text: gzip.compress(text.encode("utf-8-sig")),
}
REFUSED = {
    "utf-16": (lambda text: text.encode("utf-16"), r"is not UTF-8 .*begins as UTF-16 does\); convert it to UTF-8"),
    "utf-32": (lambda text: text.encode("utf-32"), r"is not UTF-8 .*begins as UTF-32 does\); convert it to UTF-8"),
    "utf-16 in gzip": (lambda text: gzip.compress(text.encode("utf-16")), "begins as UTF-16 does"),
    "cp1252": (lambda text: text.replace("🙃", "ü").encode("cp1252"), r"is not UTF-8 .*; convert it to UTF-8"),
    "half of a gzip file": (lambda text: gzip.compress(text.encode() * 9)[:30], "is not a whole gzip file"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_one_text_in_all_its_encodings(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / ("a.txt.gz" if "gzip" in encoding else "a.txt")
    path.write_bytes(ENCODINGS[encoding](TEXT))
    assert read_text(path) == read_text(str(path)) == TEXT
    with open_text(path) as lines:
        assert list(lines) == TEXT.splitlines(keepends=True)


def test_gzip_is_known_by_its_bytes_as_well(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(TEXT.encode()))
    assert read_text(path) == TEXT
    path = path.rename(tmp_path / "plain.gz")
    path.write_text(TEXT)
    with pytest.raises(DataError, match="is not a whole gzip file"):
        read_text(path)


@pytest.mark.parametrize("encoding", REFUSED)
def test_what_is_not_utf8_is_one_line_with_its_remedy(tmp_path: Path, encoding: str) -> None:
    write, message = REFUSED[encoding]
    path = tmp_path / "a.txt"
    path.write_bytes(write(TEXT))
    with pytest.raises(DataError, match=message) as caught:
        read_text(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent cannot be read: No such file or directory; check its permissions, its"):
        read_text(tmp_path / "absent")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_text(tmp_path)
    (tmp_path / "empty").touch()
    assert read_text(tmp_path / "empty") == ""


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_standard_input_is_read_alike_and_stays_open(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "piped").write_bytes(ENCODINGS[encoding](TEXT))
    with (tmp_path / "piped").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert read_text("-") == TEXT
        assert read_text("-") == ""
    (tmp_path / "piped").write_bytes("é".encode("cp1252"))
    with (tmp_path / "piped").open() as stdin, pytest.raises(DataError, match=r"^standard input is not UTF-8"):
        monkeypatch.setattr("sys.stdin", stdin)
        read_text("-")


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ("ab\ud83d", 3),
        ("whole 🙃", None),
        ({"a": [1, {"b": "x\udc00"}]}, 2),
        ({"a": [{"xyz\udc00": 1}]}, 4),
        ({"a": [1, None, ("b", 2.5)]}, None),
        (3, None),
    ],
)
def test_halves_of_characters_are_found_wherever_they_stand(value: object, place: int | None) -> None:
    problem = f"is not valid Unicode (half of a surrogate pair at character {place})"
    assert unicode_problem(value) == (None if place is None else problem)


def test_json_from_outside_is_a_value_or_a_value_error() -> None:
    deep = "[" * DEEPEST_JSON + "1" + "]" * DEEPEST_JSON
    assert parse_json('{"a": [1, "x", null, {"b": []}]}') == {"a": [1, "x", None, {"b": []}]}
    assert parse_json("3") == 3 and str(parse_json(deep)) == deep
    for text, says in {
        f"[{deep}]": f"more than {DEEPEST_JSON} levels",
        '{"a": ' * 200_000: f"more than {DEEPEST_JSON} levels",
        "[" * 200_000 + "]" * 200_000: f"more than {DEEPEST_JSON} levels",
        "9" * 5000: "Exceeds the limit",
        "[1": "Expecting ',' delimiter",
    }.items():
        with pytest.raises(ValueError, match=says):
            parse_json(text)
