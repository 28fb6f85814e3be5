"""Text of files and of standard input, read in one way by all commands.

Text is UTF-8, with or without a byte-order mark, or such text in gzip. Anything else is an error that says what the
bytes look like, because a guessed encoding changes the words without a sign.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tlcr.errors import DataError

__all__ = ["STANDARD_INPUT", "is_lfs_pointer", "open_text", "parse_json", "read_text", "unicode_problem"]

STANDARD_INPUT = "-"
"""The name under which commands read standard input."""

LFS_POINTER = b"version https://git-lfs"
"""How the text begins that a clone without git-lfs has in the place of a large file."""
LFS_POINTER_BYTES = 1024
"""Git LFS pointers are shorter than this (its specification)."""

DEEPEST_JSON = 100
"""Levels of lists and objects in each other. What is deeper is no data, and would exhaust python's stack somewhere."""
GZIP = b"\x1f\x8b"
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte-order marks. UTF-32 stands first, because its little-endian mark begins with that of UTF-16."""


@contextmanager
def open_text(source: str | Path) -> Iterator[TextIO]:
    r"""Opens a text for reading, for a ``with`` statement; errors in its body's reads are of this function, too.

    Args:
        source: a path, or "-" for standard input. Bytes that begin as gzip does, and files that end in .gz, are
            unpacked.

    Yields:
        The text without its byte-order mark. Line ends are as written: ``\r\n`` is not changed.

    Raises:
        DataError: the source is missing, cannot be read, is a damaged gzip file, or is not UTF-8.
    """
    name = "standard input" if source == STANDARD_INPUT else str(source)
    start = b""
    try:
        with _opened(source) as raw:
            start = raw.peek(4)[:4]
            packed = start[:2] == GZIP or name.endswith(".gz")
            content: Any = gzip.GzipFile(fileobj=raw) if packed else raw
            if packed:
                content = io.BufferedReader(content)
                start = content.peek(4)[:4]
            # utf-8-sig: otherwise the mark, which spreadsheets write, would be part of the first word.
            yield io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name} is not a whole gzip file ({error}); download or write it again") from error
    except UnicodeDecodeError as error:
        mark = next((f"; it begins as {kind} does" for sign, kind in MARKS.items() if start.startswith(sign)), "")
        raise DataError(f"{name} is not UTF-8 ({error}{mark}); convert it to UTF-8") from error
    except OSError as error:
        raise DataError(
            f"{name} cannot be read: {error.strerror}; check its permissions, its path and the disk"
        ) from error


def read_text(source: str | Path) -> str:
    """All of the text that ``open_text`` opens, with its errors."""
    with open_text(source) as file:
        return file.read()


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what a clone without git-lfs has in its place. Raises OSError where it cannot be opened."""
    with path.open("rb") as file:
        start = file.read(LFS_POINTER_BYTES)
    return len(start) < LFS_POINTER_BYTES and start.startswith(LFS_POINTER)


def parse_json(text: str) -> Any:
    """The value of a JSON text from outside.

    Args:
        text: the text.

    Returns:
        Its value.

    Raises:
        ValueError: it is no JSON, or holds what python does not read: more than ``DEEPEST_JSON`` levels, a whole number
            of thousands of digits.
    """
    too_deep = ValueError(f"it has more than {DEEPEST_JSON} levels of lists and objects in each other")
    try:
        value = json.loads(text)
    except RecursionError:
        raise too_deep from None
    level = [value]
    for _ in range(DEEPEST_JSON):
        level = [part for whole in level for part in _parts(whole) if isinstance(part, (dict, list))]
        if not level:
            return value
    raise too_deep


def _parts(value: Any) -> Iterable[Any]:
    """What a value of JSON holds; nothing where it is no list and no object."""
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()


def unicode_problem(value: Any) -> str | None:
    r"""What is wrong where a text of a JSON value holds half of a surrogate pair.

    JSON can write one half ("\ud83d") where a program cut a text in the middle of a character. Such text has no UTF-8
    and no tokens.

    Args:
        value: a text, or lists and mappings of values; keys are texts too.

    Returns:
        A predicate for the value's name, with the place from 1 in its text; None where all texts are valid Unicode.
    """
    place = _broken_character(value)
    return None if place is None else f"is not valid Unicode (half of a surrogate pair at character {place + 1})"


def _broken_character(value: Any) -> int | None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return error.start
        return None
    texts = [*(value if isinstance(value, Mapping) else ()), *_parts(value)]
    return next((place for part in texts if (place := _broken_character(part)) is not None), None)


def _opened(source: str | Path) -> io.BufferedReader:
    if source == STANDARD_INPUT:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    return Path(source).open("rb")
