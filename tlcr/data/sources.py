"""Rows from a local file, a folder or a hub dataset, each with its place in the source.

Text files, also those of a folder, are read by the standard library's json and csv, which know line numbers and keep
every value as written; Parquet, Arrow and hub names by ``datasets``, which also says what files a folder has. Only hub
datasets are cached; local sources are read in place, without any download.
"""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import datasets
import pyarrow

from tlcr.data.places import (
    BUILDERS,
    JSON_SUFFIXES,
    SEPARATORS,
    SUFFIXES,
    find_source,
    inner_suffix,
    kind_of_file,
    nearest_name,
)
from tlcr.errors import DataError
from tlcr.text.files import open_text, parse_json

__all__ = ["Row", "read_rows"]

logger = logging.getLogger("tlcr")

NO_DATA = {"dataset_infos.json", "dataset_info.json", "config.json"}
"""JSON about data."""
OF_FOLDERS = {"name", "version", "data_dir", "data_files", "description"}
"""What the configuration of a folder says of the folder, and not of how its files are read."""
LONGEST_CELL = 2**31 - 1
"""Characters; the largest number that the csv module takes on every platform."""


@dataclass(frozen=True)
class Row:
    """One record as read. ``number`` counts records from 1; ``line`` is the record's line in a text file.

    ``problem`` is the reason why the record could not be read and has no values.
    """

    file: str
    number: int
    line: int | None
    values: Mapping[str, Any]
    problem: str | None = None


def read_rows(source: str, *, split: str, limit: int | None) -> list[Row]:
    """The records of a file, a folder, or a hub dataset.

    Files end in .jsonl, .ndjson, .json (one record a line, or a list of records), .csv, .tsv (with a header), each also
    with .gz, or in .parquet or .arrow. Folders are what ``Dataset.save_to_disk`` wrote, or hold data files that
    ``datasets`` recognises.

    Args:
        source: a path, or "owner/name:configuration".
        split: for folders and hub datasets.
        limit: read only this many first records; None: all.

    Returns:
        The records with their places.

    Raises:
        DataError: the source does not exist, is empty or damaged, or is of an unknown kind.
    """
    path = find_source(source)
    if path is not None and path.is_file():
        found = list(islice(_file_rows(path), limit))
    elif path is not None:
        found = _dataset_rows(source, lambda cache: _folder_rows(source, path, split, cache), limit)
    else:
        name, _, configuration = source.partition(":")
        found = _dataset_rows(
            source, lambda _: _rows_of(source, datasets.load_dataset(name, configuration or None, split=split)), limit
        )
    if not found:
        raise DataError(f"{source} is empty: it holds no record; name a source with at least one")
    return found


def _file_rows(path: Path) -> Iterator[Row]:
    suffix = kind_of_file(path)
    if suffix in BUILDERS:
        kind, files = BUILDERS[suffix], str(path)

        def load(cache: str) -> Iterator[Row]:
            data = datasets.load_dataset(kind, data_files=files, split="train", streaming=True, cache_dir=cache)
            return _rows_of(path.name, data)

        yield from _dataset_rows(path.name, load)
        return
    with open_text(path) as file:
        yield from (_json_rows(path, file) if suffix in JSON_SUFFIXES else _table_rows(path, file, SEPARATORS[suffix]))


def _json_rows(path: Path, file: IO[str]) -> Iterator[Row]:
    number = 0
    for line_number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        if number == 0 and line.lstrip().startswith("["):
            yield from _json_list(path, line_number - 1, line + file.read())
            return
        number += 1
        try:
            value = parse_json(line)
        except ValueError as error:
            yield Row(path.name, number, line_number, {}, f"invalid JSON ({error}); a line holds one whole record")
        else:
            yield _json_row(path, number, line_number, value)


def _json_list(path: Path, lines_before: int, text: str) -> Iterator[Row]:
    try:
        values = parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {lines_before + error.lineno}: invalid JSON ({error.msg}, column {error.colno}); mend it"
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: invalid JSON ({error}); mend it") from error
    for number, value in enumerate(values, start=1):
        yield _json_row(path, number, None, value)


def _json_row(path: Path, number: int, line: int | None, value: object) -> Row:
    if isinstance(value, dict):
        return Row(path.name, number, line, value)
    return Row(
        path.name, number, line, {}, f"the record is a JSON {type(value).__name__}, not an object with named fields"
    )


def _table_rows(path: Path, file: IO[str], separator: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_CELL)  # the csv module's own limit is 131,072 characters
    reader = csv.reader(file, delimiter=separator, strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {line}: not readable as {path.suffix} ({error}); quote cells that hold quotes, "
                "separators or line ends, or write the file as .jsonl"
            ) from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = cells
            if twice := [name for name, times in Counter(header).items() if times > 1]:
                raise DataError(f"{path}, line {line}: the header names {twice[0]!r} twice; give each column its name")
            continue
        number += 1
        if len(cells) != len(header):
            problem = f"{len(cells)} cells, where the header names {len(header)} columns"
            yield Row(path.name, number, line, {}, problem)
        else:
            yield Row(path.name, number, line, dict(zip(header, cells, strict=True)))


def _dataset_rows(source: str, load: Callable[[str], Iterator[Row]], limit: int | None = None) -> list[Row]:
    """Rows that ``load`` reads by datasets, with a cache folder that is deleted after reading."""
    try:
        with _quiet_datasets(), TemporaryDirectory() as cache:
            return list(islice(load(cache), limit))
    except DataError:
        raise
    except ConnectionError as error:
        raise DataError(
            f"{source!r} is neither a file nor a folder{nearest_name(Path(source))}, and as a hub dataset it cannot be "
            f"had: {_first_line(error)}; check the name, or download it first and name the folder"
        ) from error
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"cannot read {source}: {_first_line(error)}; check that the file is whole, the name and data.split"
        ) from error


def _rows_of(source: str, data: Any) -> Iterator[Row]:
    features = data.features or {}
    for number, values in enumerate(_undecoded(data), start=1):
        kept = {name: _without_added_nulls(value, features.get(name)) for name, value in values.items()}
        yield Row(source, number, None, kept)


def _without_added_nulls(value: Any, feature: Any) -> Any:
    """A value without the fields that Arrow adds to a mapping because others of the same column have them.

    Which of these nulls the source had itself cannot be told.
    """
    if isinstance(value, Mapping) and isinstance(feature, Mapping):
        return {name: _without_added_nulls(part, feature.get(name)) for name, part in value.items() if part is not None}
    if isinstance(value, list) and hasattr(feature, "feature"):
        return [_without_added_nulls(part, feature.feature) for part in value]
    return value


def _undecoded(data: Any) -> Any:
    """The data set without decoding of images, sounds and videos: tlcr reads only text and needs no decoders."""
    for name, feature in (data.features or {}).items():
        if _is_decoded(feature):
            data = data.cast_column(name, type(feature)(decode=False))
        elif _is_decoded(getattr(feature, "feature", None)):
            data = data.cast_column(name, type(feature)(type(feature.feature)(decode=False)))
    return data


def _is_decoded(feature: Any) -> bool:
    """Whether a feature is an image or the like. ``Json`` of newer versions decodes to plain values."""
    return hasattr(feature, "decode") and not isinstance(feature, getattr(datasets, "Json", ()))


def _folder_rows(source: str, path: Path, split: str, cache: str) -> Iterator[Row]:
    if (path / "dataset_dict.json").is_file():
        parts = datasets.load_from_disk(str(path))
        if split not in parts:
            raise DataError(f"{path} has no split {split!r}; set data.split to one of {', '.join(sorted(parts))}")
        return _rows_of(source, parts[split])
    if (path / "state.json").is_file():
        return _rows_of(source, datasets.load_from_disk(str(path)))
    builder = datasets.load_dataset_builder(str(path), cache_dir=cache)
    _note_files_left_out(path, {Path(file) for files in builder.config.data_files.values() for file in files})
    if texts := _text_files(builder.config, split):
        return _rows_of_texts(source, texts)
    return _rows_of(source, builder.as_streaming_dataset(split=split))


def _text_files(config: Any, split: str) -> list[Path]:
    """The split's files, where all are text that this module reads; datasets would guess a type for each column.

    None of a folder whose README.md says how its files are to be read, such as with another separator.
    """
    files = [Path(file) for name, found in config.data_files.items() if name == split for file in found]
    known = all(file.is_file() and _is_text_of_records(file) for file in files)
    options = [field for field in fields(config) if field.name not in OF_FOLDERS]
    as_usual = {SEPARATORS.get(inner_suffix(file)) for file in files} <= {getattr(config, "sep", None)} and all(
        getattr(config, option.name) == option.default for option in options if option.name != "sep"
    )
    return files if known and as_usual else []


def _is_text_of_records(path: Path) -> bool:
    """Whether this module reads the file. ``datasets`` also reads JSON whose objects go on over several lines."""
    suffix = inner_suffix(path)
    if suffix != ".json":
        return suffix in (*JSON_SUFFIXES, *SEPARATORS)
    with open_text(path) as file:
        first = next((line for line in file if line.strip()), "")
    if first.lstrip().startswith("["):
        return True
    try:
        parse_json(first)
    except ValueError:
        return False
    return True


def _rows_of_texts(source: str, files: Iterable[Path]) -> Iterator[Row]:
    """The files' records, numbered through all of them, as datasets counts them."""
    for number, row in enumerate(chain.from_iterable(map(_file_rows, files)), start=1):
        where = row.file if row.line is None else f"{row.file}, line {row.line}"
        problem = None if row.problem is None else f"{where}: {row.problem}"
        yield Row(source, number, None, row.values, problem)


def _note_files_left_out(folder: Path, read: set[Path]) -> None:
    """``datasets`` reads a folder as files of one kind, the most frequent one, and says nothing of the others."""
    read = {path.resolve() for path in read}
    left = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.name not in NO_DATA and path.resolve() not in read
    )
    if left:
        kinds = ", ".join(sorted({path.suffix for path in read}))
        logger.warning(
            "%s is read as files of one kind (%s), and %d others are left out, such as %s: put each kind into a folder "
            "of its own, or write them as one kind",
            folder,
            kinds,
            len(left),
            left[0].name,
        )


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Switches off progress bars and log lines of ``datasets``: tlcr reports its errors."""
    verbosity, bars_were_off = datasets.utils.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(verbosity)
        if not bars_were_off:
            datasets.enable_progress_bars()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
