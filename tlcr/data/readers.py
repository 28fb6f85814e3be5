"""Preferences, edits, prompts and marked answers from files, folders and hub datasets, as typed records.

Every record is either returned or reported with its file, row and reason; ``DataConfig.on_malformed`` says whether a
report stops the run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from tlcr.config.schema import DataConfig
from tlcr.data.edit_codes import compare_edit_codes
from tlcr.data.formats import (
    ASSISTANT,
    EDIT_FORMATS,
    PREFERENCE_FORMATS,
    Malformed,
    RawEdit,
    RawMarkedAnswer,
    RawPreference,
    RawPrompt,
    Values,
    marked_answer,
    prompt,
    prompt_key,
    rendered_edit,
    rendered_marked_answer,
    rendered_preference,
    text_field,
    tlcr_revision,
)
from tlcr.data.sources import Row, read_rows
from tlcr.errors import ConfigError, DataError
from tlcr.text.tokenization import render_prompt
from tlcr.types import EditPair, MarkedAnswer, PreferencePair

__all__ = [
    "MalformedRecord",
    "ReadResult",
    "read_edits",
    "read_marked_answers",
    "read_preferences",
    "read_prompts",
    "read_raw_edits",
    "read_raw_preferences",
    "read_raw_prompts",
]

logger = logging.getLogger("tlcr")

T = TypeVar("T")
RawT = TypeVar("RawT", RawPrompt, RawPreference, RawEdit, RawMarkedAnswer)

REPORTED = 20
"""Malformed records that are logged one by one; ``ReadResult.malformed`` has them all."""


@dataclass(frozen=True)
class MalformedRecord:
    """A record that cannot be used. ``row`` counts records from 1; ``line`` is its line, in text files."""

    file: str
    row: int
    line: int | None
    reason: str

    def __str__(self) -> str:
        where = f"record {self.row}" if self.line is None else f"record {self.row} (line {self.line})"
        return f"{self.file}, {where}: {self.reason}"


@dataclass(frozen=True)
class ReadResult(Generic[T]):
    """What a source held: the records that can be used, in its order, and those that cannot."""

    source: str
    format: str
    records: tuple[T, ...]
    prompt_keys: tuple[str, ...] = ()
    """For each record the words of its prompt (``formats.prompt_key``)."""
    malformed: tuple[MalformedRecord, ...] = ()
    notes: tuple[str, ...] = ()
    """What else a reader of the numbers should know, one line each."""

    def summary(self) -> str:
        """One line for people."""
        skipped = f", {len(self.malformed)} malformed and skipped" if self.malformed else ""
        return "; ".join((f"{self.source} ({self.format}): {len(self.records)} records{skipped}", *self.notes))


def read_preferences(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase) -> ReadResult[PreferencePair]:
    """``cfg.preferences`` as preference pairs.

    The columns tell the formats apart, where ``cfg.preferences_format`` is "auto":

    - preference: ``prompt``, ``chosen``, ``rejected`` as texts or messages; conversations may hold the prompt
      themselves.
    - hh: ``chosen`` and ``rejected`` as transcripts.
    - tlcr: ``context``, ``chosen_response``, ``reject_response``.

    An ``id`` column names the records; else the file and row do.

    Args:
        cfg: source, format, and what to do with a malformed record.
        tokenizer: its chat template renders messages.

    Returns:
        The pairs, and the records that could not be used.

    Raises:
        ConfigError: no source is set, or its conversations meet a tokenizer without a chat template.
        DataError: the source cannot be read, no record can be used, or one is malformed and that is fatal.
    """
    source, rows, name = _preference_rows(cfg)
    read_one = PREFERENCE_FORMATS[name]
    read, _ = _convert(source, rows, name, read_one, lambda raw: rendered_preference(raw, tokenizer), cfg)
    notes = _glued([(pair.prompt, answer) for pair in read.records for answer in (pair.chosen, pair.rejected)])
    return _reported(replace(read, notes=notes))


def read_edits(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase) -> ReadResult[EditPair]:
    """``cfg.edits`` as edit pairs.

    The columns tell the formats apart, where ``cfg.edits_format`` is "auto":

    - edits: ``prompt``, ``rejected``, ``revised`` and perhaps ``chosen``, as texts or messages.
    - tlcr: the published data, ``context``, ``reject_response``, and ``response`` or ``raw_response``.

    A revision that changes nothing is kept, and noted: it says that the rejected answer has nothing to mend.

    Args:
        cfg: source, format, and what to do with a malformed record.
        tokenizer: its chat template renders messages.

    Returns:
        The edits, and the records that could not be used.

    Raises:
        ConfigError: as ``read_preferences``.
        DataError: as ``read_preferences``.
    """
    source, rows, name = _edit_rows(cfg)
    read, used = _convert(source, rows, name, EDIT_FORMATS[name], lambda raw: rendered_edit(raw, tokenizer), cfg)
    pairs = read.records
    notes = list(_glued([(pair.prompt, answer) for pair in pairs for answer in (pair.rejected, pair.revised)]))
    unedited = sum(pair.rejected == pair.revised for pair in pairs)
    if unedited:
        notes.append(f"{unedited} of {len(pairs)} revisions change nothing, so all of their labels will be neutral")
    if name == "tlcr":
        answers = [(text_field(row.values, "reject_response"), tlcr_revision(row.values), row.values) for row in used]
        agreement = compare_edit_codes(answers, tokenizer)
        notes += [agreement] if agreement else []
    return _reported(replace(read, notes=tuple(notes)))


def read_prompts(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase) -> ReadResult[str]:
    """``cfg.prompts`` (or the prompts of ``cfg.preferences``, where it is not set) as complete prompts, each once.

    A source has a ``prompt`` column of texts or messages, or is in a format of ``read_preferences``.

    Args:
        cfg: source, format, and what to do with a malformed record.
        tokenizer: its chat template renders messages.

    Returns:
        The prompts, and the records that could not be used.

    Raises:
        ConfigError: as ``read_preferences``.
        DataError: as ``read_preferences``.
    """
    source, rows, name, read_one = _prompt_rows(cfg)
    read, _ = _convert(source, rows, name, read_one, lambda raw: render_prompt(tokenizer, raw.prompt), cfg)
    once = dict(zip(read.records, read.prompt_keys, strict=True))
    repeated = len(read.records) - len(once)
    notes = (f"{repeated} repeated prompts left out",) if repeated else ()
    return _reported(replace(read, records=tuple(once), prompt_keys=tuple(once.values()), notes=notes))


def read_marked_answers(source: str, cfg: DataConfig, tokenizer: PreTrainedTokenizerBase) -> ReadResult[MarkedAnswer]:
    """Answers with the errors that people marked: ``prompt``, ``response`` and ``spans`` (``formats.marked_answer``).

    Args:
        source: a file, folder or hub dataset.
        cfg: split, limit, and what to do with a malformed record.
        tokenizer: its chat template renders messages.

    Returns:
        The answers, and the records that could not be used.

    Raises:
        ConfigError: as ``read_preferences``.
        DataError: as ``read_preferences``.
    """
    rows = read_rows(source, split=cfg.split, limit=None)
    columns = _columns(rows)
    if not columns >= {"prompt", "response", "spans"}:
        raise _unknown_columns(source, columns, ["prompt, response, spans (a list of {'start', 'end', 'label'})"])
    read, _ = _convert(source, rows, "spans", marked_answer, lambda raw: rendered_marked_answer(raw, tokenizer), cfg)
    notes = _glued([(answer.prompt, answer.response) for answer in read.records])
    return _reported(replace(read, notes=notes))


def read_raw_preferences(cfg: DataConfig) -> ReadResult[RawPreference]:
    """``cfg.preferences`` as the source gives them, for whoever reads them without the policy's tokenizer.

    Args:
        cfg: source, format, and what to do with a malformed record.

    Returns:
        The pairs, and the records that could not be used.

    Raises:
        ConfigError: as ``read_preferences``.
        DataError: as ``read_preferences``.
    """
    source, rows, name = _preference_rows(cfg)
    read, _ = _convert(source, rows, name, PREFERENCE_FORMATS[name], _as_it_is, cfg)
    return _reported(read)


def read_raw_edits(cfg: DataConfig) -> ReadResult[RawEdit]:
    """``cfg.edits`` as the source gives them.

    Args:
        cfg: source, format, and what to do with a malformed record.

    Returns:
        The edits, and the records that could not be used.

    Raises:
        ConfigError: as ``read_preferences``.
        DataError: as ``read_preferences``.
    """
    source, rows, name = _edit_rows(cfg)
    read, _ = _convert(source, rows, name, EDIT_FORMATS[name], _as_it_is, cfg)
    return _reported(read)


def read_raw_prompts(cfg: DataConfig) -> ReadResult[RawPrompt]:
    """``cfg.prompts`` (or the prompts of ``cfg.preferences``) as the source gives them, repeated ones too.

    Args:
        cfg: source, format, and what to do with a malformed record.

    Returns:
        The prompts, and the records that could not be used.

    Raises:
        ConfigError: as ``read_preferences``.
        DataError: as ``read_preferences``.
    """
    source, rows, name, read_one = _prompt_rows(cfg)
    read, _ = _convert(source, rows, name, read_one, _as_it_is, cfg)
    return _reported(read)


def _as_it_is(raw: RawT) -> RawT:
    return raw


def _required(source: str | None, field: str) -> str:
    if not source:
        raise ConfigError(f"data.{field} is not set; name a file, a folder or a hub dataset")
    return source


def _id(row: Row) -> str:
    given = row.values.get("id")
    return f"{row.file}:{row.number}" if given is None or given == "" else str(given)


def _convert(
    source: str,
    rows: Sequence[Row],
    format: str,
    read: Callable[[str, Values], RawT],
    render: Callable[[RawT], T],
    cfg: DataConfig,
) -> tuple[ReadResult[T], list[Row]]:
    """The records, what is malformed, and the rows that the records came from."""
    records, keys, malformed, used = [], [], [], []
    for row in rows:
        try:
            if row.problem:
                raise Malformed(row.problem)
            raw = read(_id(row), row.values)
            records.append(render(raw))
            keys.append(prompt_key(raw.prompt))
            used.append(row)
        except DataError as reason:
            malformed.append(MalformedRecord(row.file, row.number, row.line, str(reason)))
    if malformed and cfg.on_malformed == "raise":
        raise DataError(
            f"{malformed[0]}; {len(malformed)} of {len(rows)} records of {source} are malformed: mend them, or set "
            "data.on_malformed=skip to go on without them"
        )
    for record in malformed[:REPORTED]:
        logger.warning("skipped %s", record)
    if len(malformed) > REPORTED:
        logger.warning("skipped %d more malformed records of %s", len(malformed) - REPORTED, source)
    if not records:
        raise DataError(f"none of the {len(rows)} records of {source} can be used; the first: {malformed[0]}")
    return ReadResult(source, format, tuple(records), tuple(keys), tuple(malformed)), used


def _reported(result: ReadResult[T]) -> ReadResult[T]:
    logger.log(logging.WARNING if result.notes else logging.INFO, "%s", result.summary())
    return result


def _columns(rows: Sequence[Row]) -> set[str]:
    """The columns of the rows that could be read."""
    readable = [row for row in rows if row.problem is None]
    if not readable:
        first = rows[0]
        raise DataError(f"{MalformedRecord(first.file, first.number, first.line, str(first.problem))}; mend the file")
    return {name for row in readable for name in row.values}


def _preference_rows(cfg: DataConfig) -> tuple[str, list[Row], str]:
    """The source of preferences, its rows, and the name of their format."""
    source = _required(cfg.preferences, "preferences")
    rows = read_rows(source, split=cfg.split, limit=cfg.limit)
    return (
        source,
        rows,
        _preference_format(source, rows) if cfg.preferences_format == "auto" else cfg.preferences_format,
    )


def _prompt_rows(cfg: DataConfig) -> tuple[str, list[Row], str, Callable[[str, Values], RawPrompt]]:
    """The source of prompts, its rows, and the name of their format with what reads one."""
    source = _required(cfg.prompts or cfg.preferences, "prompts")
    rows = read_rows(source, split=cfg.split, limit=cfg.limit)
    if _columns(rows) >= {"prompt"}:
        return source, rows, "prompts", lambda _, values: prompt(values)
    name = _preference_format(source, rows, also="prompt (text, or a list of messages)")
    return source, rows, name, lambda id, values: RawPrompt(PREFERENCE_FORMATS[name](id, values).prompt)


def _edit_rows(cfg: DataConfig) -> tuple[str, list[Row], str]:
    source = _required(cfg.edits, "edits")
    rows = read_rows(source, split=cfg.split, limit=cfg.limit)
    return source, rows, _edit_format(source, rows) if cfg.edits_format == "auto" else cfg.edits_format


def _preference_format(source: str, rows: Sequence[Row], also: str | None = None) -> str:
    columns = _columns(rows)
    if columns >= {"chosen", "rejected"}:
        texts = [row.values.get("chosen") for row in rows]
        if "prompt" in columns or any(isinstance(text, list) for text in texts):
            return "preference"
        if any(isinstance(text, str) and ASSISTANT in text for text in texts):
            return "hh"
    if columns >= {"context", "chosen_response", "reject_response"}:
        return "tlcr"
    wanted = ["prompt, chosen, rejected", "chosen, rejected (transcripts or lists of messages)"]
    wanted += ["context, chosen_response, reject_response", *([also] if also else [])]
    raise _unknown_columns(source, columns, wanted)


def _edit_format(source: str, rows: Sequence[Row]) -> str:
    columns = _columns(rows)
    if columns >= {"rejected", "revised"} and (
        "prompt" in columns or any(isinstance(row.values.get("rejected"), list) for row in rows)
    ):
        return "edits"
    if columns >= {"context", "reject_response"} and columns & {"response", "raw_response"}:
        return "tlcr"
    raise _unknown_columns(
        source, columns, ["prompt, rejected, revised", "context, reject_response, response (or raw_response)"]
    )


def _unknown_columns(source: str, columns: Iterable[str], wanted: Sequence[str]) -> DataError:
    return DataError(
        f"{source} has the columns {', '.join(sorted(columns))}; wanted are {'; or '.join(wanted)}: rename the columns"
    )


def _glued(texts: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """A note where answers run on inside the prompt's last word, which is never meant."""
    glued = [text for text in texts if re.fullmatch("[A-Za-z0-9]{2}", text[0][-1:] + text[1][:1])]
    if not glued:
        return ()
    prompt, answer = glued[0]
    return (
        f"{len(glued)} of {len(texts)} answers run on inside the prompt's last word "
        f"(...{prompt[-12:]}{answer[:12]}...): end the prompt or begin the answer with white space",
    )
