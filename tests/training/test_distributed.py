"""Whoever asks for the number of processes has joined them; what several say is said once."""

from __future__ import annotations

import logging
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist

from tlcr.errors import ConfigError, DataError
from tlcr.training import distributed
from tlcr.training.distributed import (
    SaidOnce,
    is_first,
    is_main_process,
    on_all_processes,
    process_count,
    process_device,
    was_asked,
)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the second of two, by the environment."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)


def test_asking_for_the_number_of_processes_joins_them(launched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[str] = []
    monkeypatch.setattr(distributed, "_state", lambda: joined.append("joined"))
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(joined))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert process_count() == 2 and not is_main_process()
    assert joined == ["joined"]


def test_processes_that_cannot_join_are_refused(launched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each would take itself for the only one, and both would write into one folder."""
    monkeypatch.setattr(distributed, "_state", lambda: SimpleNamespace(device=torch.device("mps")))
    with pytest.raises(ConfigError, match=r"started 2 processes, and they cannot share work on mps; set ACCELERATE"):
        process_count()

    def unreachable() -> None:
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(distributed, "_state", unreachable)
    with pytest.raises(ConfigError, match=r"do not find each other \(no route to host\); check MASTER_ADDR"):
        process_device()


def test_without_a_launcher_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # without a rank
    assert process_count() == 1 and is_main_process() and not dist.is_initialized()
    assert is_first("x") and is_first("x") and not was_asked("x")
    assert on_all_processes(lambda: 7) == 7
    with pytest.raises(DataError, match="own"):
        on_all_processes(lambda: (_ for _ in ()).throw(DataError("own")))


class Board:
    """The table that the processes share, in this process."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def add(self, name: str, amount: int) -> int:
        self.asked[name] += amount
        return self.asked[name]

    def check(self, names: list[str]) -> bool:
        return all(name in self.asked for name in names)


def record(text: str, *values: object) -> logging.LogRecord:
    return logging.LogRecord("tlcr", logging.WARNING, __file__, 1, text, values, None)


def test_what_all_say_is_said_once_and_what_one_says_too(launched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board()
    monkeypatch.setattr(distributed, "_noticeboard", lambda: board)
    first, second = SaidOnce(), SaidOnce()
    for texts in ((record("cut %d", 3), record("cut 3"), record("of the first")), (record("cut 3"), record("second"))):
        said = first if len(texts) == 3 else second
        passed = [said.filter(text) for text in texts]
        # the first process has said it twice itself: two different events
        assert passed == ([True, True, True] if said is first else [False, True])
    assert is_first("end") and not is_first("end") and was_asked("end") and not was_asked("other")


def test_without_the_table_a_thing_is_said_twice_and_not_never(launched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise RuntimeError("connection refused")

    monkeypatch.setattr(distributed, "_noticeboard", gone)
    assert is_first("end") and is_first("end") and not was_asked("end")
