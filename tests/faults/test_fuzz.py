"""Every target of the fuzzer with some inputs, and that it finds what is wrong. `make fuzz` takes a minute."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

pytest.importorskip("openai", reason="the answers of an endpoint are read by its client, an extra")

from tests.faults import drawn, fuzz, targets
from tlcr.errors import DataError


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in targets.TARGETS if name != "chat templates"])
def test_whatever_comes_is_read_or_refused_in_a_sentence(name: str) -> None:
    counts: Counter[str] = Counter()
    found = fuzz.round_of(name, 1, 30, counts)
    assert found is None, found
    # one that refuses whatever is drawn, or nothing of it, shows nothing
    assert 0 < counts[f"{name}: accepted"] < counts[name] >= 30


FILES = [path for kind in (*targets.READERS, *targets.BENCHMARKS, "configs") for path in drawn.corpus(kind)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}: {path.name}")
def test_what_was_found_once_is_read_or_refused_in_a_sentence(path: Path) -> None:
    readers = {
        **{name: partial(targets.READERS[name], str(path)) for name in targets.READERS},
        **{name: lambda _, read=read: read(path) for name, read in targets.BENCHMARKS.items()},
        "configs": lambda _: targets.load_config(path),
    }
    for malformed in ("raise", "skip"):
        fuzz.attempt(lambda _: readers[path.parent.name](malformed), None)  # noqa: B023 - called at once


@pytest.mark.parametrize("error", [KeyError("a"), RecursionError(), AssertionError("x"), DataError(" ")])
def test_what_is_no_sentence_is_a_find(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def target(draw: Any) -> None:
        if draw(st.integers()) > 1000:
            raise error

    monkeypatch.setitem(targets.TARGETS, "planted", target)
    found = fuzz.round_of("planted", 0, 200, Counter())
    assert found is not None and ("1001" in found or type(error).__name__ in found)
