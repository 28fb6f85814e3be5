"""Preferences, edits, prompts and marked answers from files, folders and hub datasets, as typed records.

Every record is either returned or reported with its file, row and reason; ``DataConfig.on_malformed`` decides whether
a report stops the run.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Generic, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from tlcr.config.schema import DataConfig
from tlcr.data.edit_codes import compare_edit_codes
from tlcr.data.formats import (
    CONTEXT_COLUMNS,
    EDIT_FORMATS,
    PREFERENCE_FORMATS,
    TEMPLATE_COLUMNS,
    marked_answer,
    prompt,
    text_field,
    tlcr_revision,
)
from tlcr.data.records import (
    ASSISTANT,
    Malformed,
    RawEdit,
    RawMarkedAnswer,
    RawPreference,
    RawPrompt,
    Values,
    answer_key,
    prompt_key,
)
from tlcr.data.rendering import rendered_edit, rendered_marked_answer, rendered_preference, rendered_prompt
from tlcr.data.repairs import columns_left_out, repaired
from tlcr.data.sources import Row, read_rows
from tlcr.data.template_notes import template_notes
from tlcr.data.turns import TurnNotes
from tlcr.errors import ConfigError, DataError
from tlcr.text.template_variables import template_variables
from tlcr.text.tokenization import encode_answers
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

LOOKED_AT = 200
"""Number of first records whose prompts are also tokenised alone, to test whether a rollout gets other tokens."""

ANSWERS = ("chosen", "rejected", "revised")
"""Columns that hold answers in the formats that join texts."""

OF_PROMPTS = ("id", "prompt", *CONTEXT_COLUMNS, *TEMPLATE_COLUMNS)
COLUMNS: dict[str, tuple[str, ...]] = {
    "prompts": OF_PROMPTS,
    "preference": (*OF_PROMPTS, "chosen", "rejected"),
    "hh": ("id", "chosen", "rejected"),
    "edits": (*OF_PROMPTS, *ANSWERS),
    "spans": (*OF_PROMPTS, "response", "spans"),
    "tlcr": (
        *("id", "context", "chosen_response", "reject_response", "response", "raw_response"),
        *("rejected_token_edit", "modified_token_edit"),
    ),
}
"""Columns that each format reads; a note names the others that a model may need."""
KNOWN = OF_PROMPTS[1:]
"""Columns that a model may need, whether or not a format reads them."""


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
    """The records of a source, in its order: usable ones, and malformed ones."""

    source: str
    format: str
    records: tuple[T, ...]
    prompt_keys: tuple[str, ...] = ()
    """For each record the key of its prompt (``records.prompt_key``)."""
    answer_keys: tuple[str, ...] = ()
    """For each record the key of its answer (``records.answer_key``)."""
    malformed: tuple[MalformedRecord, ...] = ()
    notes: tuple[str, ...] = ()
    """Further remarks, one line each."""

    def summary(self) -> str:
        """A summary in one line."""
        skipped = f", {len(self.malformed)} malformed and skipped" if self.malformed else ""
        return "; ".join((f"{self.source} ({self.format}): {len(self.records)} records{skipped}", *self.notes))


def read_preferences(
    cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, *, rendered_at: datetime | None = None
) -> ReadResult[PreferencePair]:
    """``cfg.preferences`` as preference pairs.

    Where ``cfg.preferences_format`` is "auto", the columns decide the format:

    - preference: ``prompt``, ``chosen``, ``rejected`` as texts or messages; conversations may hold the prompt
      themselves.
    - hh: ``chosen`` and ``rejected`` as transcripts.
    - tlcr: ``context``, ``chosen_response``, ``reject_response``.

    An ``id`` column names the records; without one, file and row do.

    Args:
        cfg: source, format, and what to do with a malformed record.
        tokenizer: its chat template renders messages.
        rendered_at: what the clock of the chat template shows; None: the time.

    Returns:
        The pairs, and the records that could not be used.

    Raises:
        ConfigError: no source is set, or it holds conversations and the tokenizer has no chat template.
        DataError: the source cannot be read, no record can be used, or a malformed one stops the run.
    """
    table, turns = _preference_table(cfg, tokenizer), TurnNotes(tokenizer, rendered_at)
    read, used = _convert(table, PREFERENCE_FORMATS[table.format], turns.counting(rendered_preference), cfg)
    texts = [(pair.prompt, answer) for pair in read.records for answer in (pair.chosen, pair.rejected)]
    notes = (*read.notes, *turns.notes(), *_joins(texts, tokenizer), *template_notes(used.raws, tokenizer, rendered_at))
    return _reported(replace(read, notes=notes))


def read_edits(
    cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, *, rendered_at: datetime | None = None
) -> ReadResult[EditPair]:
    """``cfg.edits`` as edit pairs.

    Where ``cfg.edits_format`` is "auto", the columns decide the format:

    - edits: ``prompt``, ``rejected``, ``revised`` and perhaps ``chosen``, as texts or messages.
    - tlcr: the published data, ``context``, ``reject_response``, and ``response`` or ``raw_response``.

    A revision that changes nothing is kept, with a note: the rejected answer needs no correction.

    Args:
        cfg: source, format, and what to do with a malformed record.
        tokenizer: its chat template renders messages.
        rendered_at: what the clock of the chat template shows; None: the time.

    Returns:
        The edits, and the records that could not be used.

    Raises:
        ConfigError: as ``read_preferences``.
        DataError: as ``read_preferences``.
    """
    table, turns = _edit_table(cfg, tokenizer), TurnNotes(tokenizer, rendered_at)
    read, used = _convert(table, EDIT_FORMATS[table.format], turns.counting(rendered_edit), cfg)
    pairs = read.records
    texts = [(pair.prompt, answer) for pair in pairs for answer in (pair.rejected, pair.revised)]
    notes = [*read.notes, *turns.notes(), *_joins(texts, tokenizer)]
    notes += template_notes(used.raws, tokenizer, rendered_at)
    unedited = sum(pair.rejected == pair.revised for pair in pairs)
    if unedited:
        notes.append(f"{unedited} of {len(pairs)} revisions change nothing, so all of their labels will be neutral")
    if table.format == "tlcr":
        answers = [
            (text_field(row.values, "reject_response"), tlcr_revision(row.values), row.values) for row in used.rows
        ]
        agreement = compare_edit_codes(answers, tokenizer)
        notes += [agreement] if agreement else []
    return _reported(replace(read, notes=tuple(notes)))


def read_prompts(
    cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, *, rendered_at: datetime | None = None
) -> ReadResult[str]:
    """``cfg.prompts`` (if it is not set, the prompts of ``cfg.preferences``) as complete prompts without repetition.

    Those of ``cfg.preferences`` are read in the format in which ``read_preferences`` reads the pairs. ``cfg.prompts``
    has a ``prompt`` column of texts or messages, or is in a format of ``read_preferences``, which the columns decide.
    Beside answers that are conversations, the prompt is all that comes before the answer, as in preferences and edits.

    Args:
        cfg: source, format, and what to do with a malformed record.
        tokenizer: its chat template renders messages.
        rendered_at: what the clock of the chat template shows; None: the time.

    Returns:
        The prompts, and the records that could not be used.

    Raises:
        ConfigError: as ``read_preferences``.
        DataError: as ``read_preferences``.
    """
    (table, read_one), turns = _prompt_table(cfg, tokenizer), TurnNotes(tokenizer, rendered_at)
    read, used = _convert(table, read_one, turns.counting(rendered_prompt), cfg)
    # Of prompts that are one text for the model, the first key in the alphabet counts, in whatever order they come.
    once = dict(sorted(zip(read.records, read.prompt_keys, strict=True), key=lambda pair: pair[1], reverse=True))
    prompts = tuple(dict.fromkeys(read.records))
    repeated = len(read.records) - len(prompts)
    notes = (f"{repeated} repeated prompts left out",) if repeated else ()
    notes = (*read.notes, *turns.notes(), *notes, *template_notes(used.raws, tokenizer, rendered_at))
    keys = tuple(once[text] for text in prompts)
    return _reported(replace(read, records=prompts, prompt_keys=keys, answer_keys=("",) * len(prompts), notes=notes))


def read_marked_answers(
    source: str, cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, *, rendered_at: datetime | None = None
) -> ReadResult[MarkedAnswer]:
    """Answers with the errors that people marked: ``prompt``, ``response`` and ``spans`` (``formats.marked_answer``).

    Args:
        source: a file, folder or hub dataset.
        cfg: split, and what to do with a malformed record. Its limit is of what is learnt from, and not of these.
        tokenizer: its chat template renders messages.
        rendered_at: what the clock of the chat template shows; None: the time.

    Returns:
        The answers, and the records that could not be used.

    Raises:
        ConfigError: as ``read_preferences``.
        DataError: as ``read_preferences``.
    """
    rows = read_rows(source, split=cfg.split, limit=None)  # without repairs: offsets count the original characters
    columns = _columns(rows)
    if not columns >= {"prompt", "response", "spans"}:
        raise _unknown_columns(source, columns, ["prompt, response, spans (a list of {'start', 'end', 'label'})"])
    table, turns = _Table(source, rows, "spans", _left_out(rows, "spans", tokenizer)), TurnNotes(tokenizer, rendered_at)
    read, used = _convert(table, marked_answer, turns.counting(rendered_marked_answer), cfg)
    joins = _joins([(answer.prompt, answer.response) for answer in read.records], tokenizer)
    notes = (*read.notes, *turns.notes(), *joins, *template_notes(used.raws, tokenizer, rendered_at))
    return _reported(replace(read, notes=notes))


def read_raw_preferences(cfg: DataConfig) -> ReadResult[RawPreference]:
    """``cfg.preferences`` as in their source, for use without the policy's tokenizer.

    Args:
        cfg: source, format, and what to do with a malformed record.

    Returns:
        The pairs, and the records that could not be used.

    Raises:
        ConfigError: as ``read_preferences``.
        DataError: as ``read_preferences``.
    """
    table = _preference_table(cfg)
    read, _ = _convert(table, PREFERENCE_FORMATS[table.format], _as_it_is, cfg)
    return _reported(read)


def read_raw_edits(cfg: DataConfig) -> ReadResult[RawEdit]:
    """``cfg.edits`` as in their source.

    Args:
        cfg: source, format, and what to do with a malformed record.

    Returns:
        The edits, and the records that could not be used.

    Raises:
        ConfigError: as ``read_preferences``.
        DataError: as ``read_preferences``.
    """
    table = _edit_table(cfg)
    read, _ = _convert(table, EDIT_FORMATS[table.format], _as_it_is, cfg)
    return _reported(read)


def read_raw_prompts(cfg: DataConfig) -> ReadResult[RawPrompt]:
    """``cfg.prompts`` (or the prompts of ``cfg.preferences``) as in their source, with repetitions.

    Args:
        cfg: source, format, and what to do with a malformed record.

    Returns:
        The prompts, and the records that could not be used.

    Raises:
        ConfigError: as ``read_preferences``.
        DataError: as ``read_preferences``.
    """
    table, read_one = _prompt_table(cfg)
    read, _ = _convert(table, read_one, _as_it_is, cfg)
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


class _Table(NamedTuple):
    """A source's repaired rows, their format, and notes."""

    source: str
    rows: Sequence[Row]
    format: str
    notes: tuple[str, ...]


@dataclass(frozen=True)  # a NamedTuple cannot be generic before Python 3.11
class _Used(Generic[RawT]):
    """The rows and the raw records that were used."""

    rows: list[Row]
    raws: list[RawT]


def _convert(
    table: _Table, read: Callable[[str, Values], RawT], render: Callable[[RawT], T], cfg: DataConfig
) -> tuple[ReadResult[T], _Used[RawT]]:
    """The records, the malformed ones, and what the records were made from."""
    source, rows = table.source, table.rows
    records: list[T] = []
    raws: list[RawT] = []
    malformed, used = [], []
    for row in rows:
        try:
            if row.problem:
                raise Malformed(row.problem)
            raw = read(_id(row), row.values)
            records.append(render(raw))
            raws.append(raw)
            used.append(row)
        except DataError as reason:
            malformed.append(MalformedRecord(row.file, row.number, row.line, str(reason)))
    if not records:
        raise DataError(
            f"none of the {len(rows)} records of {source} can be used, such as {malformed[0]}; mend them, or name "
            "another source or format"
        )
    if malformed and cfg.on_malformed == "raise":
        raise DataError(
            f"{malformed[0]}; {len(malformed)} of {len(rows)} records of {source} are malformed; mend them, or set "
            "data.on_malformed=skip to go on without them"
        )
    for record in malformed[:REPORTED]:
        logger.warning("skipped %s", record)
    if len(malformed) > REPORTED:
        logger.warning("skipped %d more malformed records of %s", len(malformed) - REPORTED, source)
    found = ReadResult(
        source,
        table.format,
        tuple(records),
        prompt_keys=tuple(prompt_key(raw.prompt) for raw in raws),
        answer_keys=tuple(map(answer_key, raws)),
        malformed=tuple(malformed),
        notes=(*table.notes, *_without_prompt(raws)),
    )
    return found, _Used(used, raws)


def _without_prompt(raws: Sequence[RawT]) -> tuple[str, ...]:
    blank = sum(isinstance(raw.prompt, str) and not raw.prompt.strip() for raw in raws)
    if not blank:
        return ()
    return (f"{blank} of {len(raws)} prompts are empty: what answers them is text without a prompt",)


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


def _table(
    source: str,
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    format_of: Callable[[Sequence[Row]], str],
) -> _Table:
    """The repaired rows of a source, their format, and a note for each repair and for unread columns."""
    rows, notes = repaired(read_rows(source, split=cfg.split, limit=cfg.limit), ANSWERS)
    format = format_of(rows)
    return _Table(source, rows, format, (*notes, *_left_out(rows, format, tokenizer)))


def _left_out(rows: Sequence[Row], format: str, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, ...]:
    """The note on unread columns. Other formats read the answers, and a chat template the columns that it names."""
    named = () if tokenizer is None else template_variables(tokenizer)
    return columns_left_out(rows, {*COLUMNS[format], *ANSWERS, "response", *named}, KNOWN)


def _preference_table(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> _Table:
    source, named = _required(cfg.preferences, "preferences"), cfg.preferences_format
    return _table(source, cfg, tokenizer, lambda rows: _preference_format(source, rows) if named == "auto" else named)


def _prompt_table(
    cfg: DataConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[_Table, Callable[[str, Values], RawPrompt]]:
    """The source of prompts, and the function that reads one of its records."""
    if cfg.prompts is None and cfg.preferences is not None:
        table = _preference_table(cfg, tokenizer)  # in their format: the prompts are those that the pairs have
    else:
        source = _required(cfg.prompts, "prompts")
        table = _table(source, cfg, tokenizer, lambda rows: _prompt_format(source, rows))
    if table.format == "prompts":
        return table, lambda _, values: prompt(values)

    formats: Mapping[str, Callable[[str, Values], RawPreference | RawEdit]] = {**EDIT_FORMATS, **PREFERENCE_FORMATS}

    def read_one(id: str, values: Values) -> RawPrompt:
        record = formats[table.format](id, values)
        return RawPrompt(record.prompt, record.template)

    return table, read_one


def _edit_table(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> _Table:
    source, named = _required(cfg.edits, "edits"), cfg.edits_format
    return _table(source, cfg, tokenizer, lambda rows: _edit_format(source, rows) if named == "auto" else named)


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


def _prompt_format(source: str, rows: Sequence[Row]) -> str:
    columns = _columns(rows)
    if "prompt" not in columns:
        return _preference_format(source, rows, also="prompt (text, or a list of messages)")
    # A conversation may hold turns that the column has not, and a text is there a user's message.
    for format, answers in (("preference", ("chosen", "rejected")), ("edits", ("rejected", "revised"))):
        are_conversations = any(isinstance(row.values.get(name), list) for row in rows for name in answers)
        if columns.issuperset(answers) and are_conversations:
            return format
    return "prompts"


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


def _joins(texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Notes on the boundary between prompt and answer, from (prompt, answer) pairs."""
    return (*_glued(texts), *_straddled(texts, tokenizer))


def _straddled(texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """A note where one token holds the prompt's end and the answer's beginning: in a rollout the prompt is alone."""
    if not tokenizer.is_fast:
        return ()  # encode_answers raises for such a tokenizer
    some = [(prompt, answer) for prompt, answer in texts[:LOOKED_AT] if prompt]
    prompts, answers = [prompt for prompt, _ in some], [answer for _, answer in some]
    together = encode_answers(
        tokenizer, prompts, answers, max_prompt_tokens=sys.maxsize, max_answer_tokens=None, end_of_sequence=False
    )
    alone = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"] if prompts else []
    other = [
        text
        for text, row, ids in zip(some, together, alone, strict=True)
        if list(row.ids[: row.answer_start]) != list(ids)
    ]
    if not other:
        return ()
    prompt, answer = other[0]
    return (
        f"{len(other)} of the first {len(some)} answers share a token with the end of their prompt "
        f"(...{prompt[-12:]!r} + {answer[:12]!r}...), so that training meets other tokens than a rollout, which has "
        "the prompt alone: move white space from the end of the prompt to the beginning of the answer",
    )


def _glued(texts: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """A note where answers continue the prompt's last word, which is always a mistake."""
    glued = [text for text in texts if re.fullmatch("[A-Za-z0-9]{2}", text[0][-1:] + text[1][:1])]
    if not glued:
        return ()
    prompt, answer = glued[0]
    return (
        f"{len(glued)} of {len(texts)} answers run on inside the prompt's last word "
        f"(...{prompt[-12:]}{answer[:12]}...): end the prompt or begin the answer with white space",
    )
