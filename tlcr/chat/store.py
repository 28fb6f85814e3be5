"""A store of paid answers and their cost, on disk.

It uses SQLite of the standard library rather than lines appended to a file. A commit is complete or absent, also under
kill -9, which can cut a line; a look-up does not read the whole file; an answer and its cost are written in one
transaction. A lock beside the file (the system releases it whenever the process ends) keeps a second process from
asking, and paying for, the same questions.
"""

from __future__ import annotations

import json
import sqlite3
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from tlcr.chat.types import Answer
from tlcr.errors import ConfigError, DataError
from tlcr.files import unwritable

__all__ = ["AnswerStore"]

# The write-ahead log commits several times faster than the default journal; with exclusive access it needs no
# shared memory, which network file systems do not have. FULL: a commit also survives a power cut.
TABLES = """
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, finish TEXT NOT NULL, prompt_tokens INTEGER, answer_tokens INTEGER,
    template TEXT NOT NULL, model TEXT NOT NULL, time REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS requests (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, cost REAL NOT NULL, settled INTEGER NOT NULL, time REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS checksums (key TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""
# SQLite notices damage to its pages' structure and not to a text. Stores of earlier versions have no checksums.


class AnswerStore:
    """``with AnswerStore(path) as store``. One process at a time; within it, one thread at a time.

    Raises ConfigError where another process has it open, DataError where the file is something else.
    """

    def __init__(self, path: str | Path, *, patience: float = 5.0) -> None:
        """patience: seconds to wait for another program that has locked the file."""
        self.path, self._patience = Path(path), patience
        self._lock = FileLock(f"{self.path}.lock", timeout=0)

    def __enter__(self) -> AnswerStore:
        if self.path.is_dir():
            raise ConfigError(f"{self.path} is a folder; name the file in which answers are to be kept")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise ConfigError(
                f"{self.path} is in use by another tlcr process, which may be asking for the same answers; wait for "
                "it, or name another cache"
            ) from error
        except OSError as error:
            raise unwritable(self.path, error) from error
        try:
            with self._translated():
                self._database = sqlite3.connect(self.path, timeout=self._patience, check_same_thread=False)
            try:
                with self._translated():
                    self._database.executescript(TABLES)
                    self._check_columns()
            except BaseException:
                self._database.close()
                raise
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._database.close()
        self._lock.release()

    def _check_columns(self) -> None:
        """Raises where the tables are those of another program, which ``CREATE TABLE IF NOT EXISTS`` leaves alone."""
        with closing(sqlite3.connect(":memory:")) as ours:
            ours.executescript(TABLES)
            for table in ("answers", "requests"):
                wanted, found = (_columns(database, table) for database in (ours, self._database))
                if found != wanted:
                    raise sqlite3.DatabaseError(f"its table {table} has {', '.join(found)}")

    def get(self, key: str) -> Answer | None:
        """The stored answer to the question of this key; None where there is none."""
        with self._translated():
            found = self._database.execute(
                "SELECT text, finish, prompt_tokens, answer_tokens, value FROM answers LEFT JOIN checksums USING (key) "
                "WHERE key = ?",
                (key,),
            ).fetchone()
            if found is None:
                return None
            *answer, checksum = found
            if checksum not in (None, _checksum(answer)):
                raise sqlite3.DatabaseError("an answer is another than when it was stored")
        return Answer(*answer)

    def put(self, key: str, answer: Answer, *, template: str, model: str) -> None:
        """Store an answer; on return it is on disk."""
        with self._translated(), self._database:
            self._insert(key, answer, template, model)

    def open_request(self, key: str, cost: float) -> int:
        """Record a request and its maximum cost before it is sent; returns its number.

        If the process is killed before it settles the request, the maximum cost stays.
        """
        with self._translated(), self._database:
            cursor = self._database.execute(
                "INSERT INTO requests (key, cost, settled, time) VALUES (?, ?, 0, ?)", (key, cost, time.time())
            )
        return int(cursor.lastrowid or 0)

    def drop_request(self, number: int) -> None:
        """Forget a request that was not sent."""
        with self._translated(), self._database:
            self._database.execute("DELETE FROM requests WHERE id = ?", (number,))

    def settle_request(
        self, number: int, cost: float, *, key: str, answer: Answer | None, template: str, model: str
    ) -> None:
        """Record the actual cost of a request, and store its answer in the same transaction."""
        with self._translated(), self._database:
            self._database.execute("UPDATE requests SET cost = ?, settled = 1 WHERE id = ?", (cost, number))
            if answer is not None:
                self._insert(key, answer, template, model)

    def totals(self) -> tuple[int, float]:
        """Requests that were sent and what they cost, over the whole life of this file."""
        with self._translated():
            requests, cost = self._database.execute("SELECT COUNT(*), COALESCE(SUM(cost), 0) FROM requests").fetchone()
        return int(requests), float(cost)

    def _insert(self, key: str, answer: Answer, template: str, model: str) -> None:
        self._database.execute(
            "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(key, answer.text, answer.finish, answer.prompt_tokens, answer.answer_tokens),
                *(template, model, time.time()),
            ),
        )
        value = _checksum([answer.text, answer.finish, answer.prompt_tokens, answer.answer_tokens])
        self._database.execute("INSERT OR REPLACE INTO checksums VALUES (?, ?)", (key, value))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if not isinstance(error, sqlite3.OperationalError) or "decode" in str(error):
                raise DataError(
                    f"{self.path} is not a store of answers, or is damaged ({error}); name another cache, or move it "
                    "away"
                ) from error
            if "locked" in str(error):
                raise ConfigError(
                    f"{self.path} is locked by another program, such as a viewer of databases; close it there, or name "
                    "another cache"
                ) from error
            raise unwritable(self.path, error) from error


def _checksum(answer: list[str | int | None]) -> int:
    return zlib.crc32(json.dumps(answer).encode())


def _columns(database: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
