"""The variables that launchers set, and those that only look so."""

from __future__ import annotations

import os

import pytest

from tlcr.training.launcher import (
    RANKS,
    RANKS_ON_A_NODE,
    SIZES,
    SIZES_OF_A_NODE,
    launched_processes,
    launched_rank,
    processes_of_a_node,
    without_launcher,
)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SIZES, *RANKS, *SIZES_OF_A_NODE, *RANKS_ON_A_NODE):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, (1, 0)),
        ({"WORLD_SIZE": "2", "RANK": "1"}, (2, 1)),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, (4, 3)),
        ({"PMI_SIZE": "3", "PMI_RANK": "0"}, (3, 0)),
        ({"WORLD_SIZE": "1", "RANK": "0"}, (1, 0)),
        ({"WORLD_SIZE": "4"}, (1, 0)),  # set for a script that starts processes later
        ({"RANK": "2"}, (1, 0)),
        ({"WORLD_SIZE": "all", "RANK": "0"}, (1, 0)),
        ({"WORLD_SIZE": "", "RANK": "", "PMI_SIZE": "2", "PMI_RANK": "1"}, (2, 1)),
    ],
)
def test_a_launcher_sets_a_size_and_a_rank(
    variables: dict[str, str], found: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (launched_processes(), launched_rank()) == found


def test_a_process_that_is_to_work_alone_gets_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "as it was")
    left = without_launcher()
    assert left["KEPT"] == "as it was" and not {"WORLD_SIZE", "RANK", "LOCAL_RANK"} & left.keys()
    assert left == {name: value for name, value in os.environ.items() if name in left}


def test_how_many_processes_share_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes_of_a_node() == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "5")
    assert processes_of_a_node() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert processes_of_a_node() == 4
