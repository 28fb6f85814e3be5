"""The ends of training are read from the tables of reports, each arm from the first that has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import frontier
from tlcr.errors import DataError

TABLE = """Held-out prompts; mean [95 % interval] over seeds 0, 1.

| arm | KL coefficient | gold per token | own reward per token | KL, nats per token | tokens an answer |
|---|---|---|---|---|---|
| {arm} | 0.1 | \N{MINUS SIGN}0.2 [\N{MINUS SIGN}0.3, 0.1] | 0.3 | 1.5 [1.0, 2.0] | 29.7 |
| {arm} | 0.4 | 0.1 | 0.1 | 0.25 [0.2, 0.3] | 22.5 |

| arm | 0.1 |
|---|---|
| {arm} | 0.9 |
"""


def test_an_end_is_the_mean_of_its_row() -> None:
    assert frontier.ends(TABLE.format(arm="continuous")) == {"continuous": [(1.5, -0.2), (0.25, 0.1)]}


def test_a_run_with_a_single_coefficient_names_none() -> None:
    table = TABLE.format(arm="continuous")
    for one in (" KL coefficient |", " 0.1 |", " 0.4 |"):
        table = table.replace(f"continuous |{one}", "continuous |").replace(f"arm |{one}", "arm |")
    table = table.replace("---|---|---|---|---|---", "---|---|---|---|---", 1)
    assert frontier.ends(table) == {"continuous": [(1.5, -0.2), (0.25, 0.1)]}


def test_all_arms_are_drawn_each_from_the_first_table_that_has_it(tmp_path: Path) -> None:
    first, second = tmp_path / "a.md", tmp_path / "b.md"
    first.write_text(TABLE.format(arm="continuous"), encoding="utf-8")
    second.write_text(TABLE.replace("1.5", "9.5").format(arm="continuous") + TABLE.format(arm="q"), encoding="utf-8")
    frontier.main([str(tmp_path / "out.svg"), str(first), str(second)])
    drawn = (tmp_path / "out.svg").read_text(encoding="utf-8")
    assert drawn == frontier.plot({"continuous": [(1.5, -0.2), (0.25, 0.1)]})
    second.write_text(TABLE.format(arm="q"), encoding="utf-8")
    frontier.main([str(tmp_path / "out.svg"), str(first), str(second)])
    drawn = (tmp_path / "out.svg").read_text(encoding="utf-8")
    assert ">continuous<" in drawn and ">q<" in drawn


def test_a_file_without_the_table_is_refused() -> None:
    with pytest.raises(DataError, match="no table with the columns arm, gold per token"):
        frontier.ends("| arm | gold |\n|---|---|\n| q | 1 |\n")
