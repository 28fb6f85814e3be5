"""The metrics file: what is written, what a killed process may leave, what resuming drops."""

from __future__ import annotations

import json
import logging

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process

from tlcr.errors import CheckpointError
from tlcr.training.metrics import MetricsLog, read_metrics


def test_rows_keep_their_numbers(tmp_path):
    log = MetricsLog(tmp_path / "new" / "metrics.jsonl")
    log.write(1, {"loss": 0.1 + 0.2, "count": 3})
    log.write(2, {"loss": 1e-300})
    first, second = read_metrics(log.path)
    assert (first["step"], first["loss"], first["count"]) == (1, 0.1 + 0.2, 3)
    assert isinstance(first["count"], int)
    assert second["loss"] == 1e-300
    assert second["time"] >= first["time"] > 1.6e9


def test_a_number_that_is_not_finite_is_null_and_reported_once(tmp_path, caplog):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with caplog.at_level(logging.WARNING):
        log.write(1, {"loss": float("nan")})
        log.write(2, {"loss": float("inf")})
    assert [row["loss"] for row in read_metrics(log.path)] == [None, None]
    assert caplog.text.count("The metric loss is nan") == 1
    json.loads(log.path.read_text().splitlines()[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_rewind_drops_later_rows_and_a_torn_line(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        log.write(step, {"loss": step / 3})
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2, 3, 4, 5]
    log.rewind(3)
    log.write(4, {"loss": 9.0})
    rows = [(row["step"], row["loss"]) for row in read_metrics(log.path)]
    assert rows == [(1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 9.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_zeros_that_a_crash_left_at_the_end_are_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).write(1, {"loss": 2.0})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo' + bytes(40))
    assert [row["step"] for row in read_metrics(path)] == [1]


@pytest.mark.parametrize("line", ['{"step": 1', "[1]", "{}", "\x00\x00", '{"step": ' + "[" * 5000])
def test_a_damaged_line_is_one_sentence(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(line + '\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl is damaged: line 1 .*put that line right"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_rewinding_what_is_not_there_is_nothing(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl").rewind(3)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_with_a_remedy():
    log = MetricsLog("/dev/full")
    with pytest.raises(CheckpointError, match=r"cannot write /dev/full: No space left on device.*free some space"):
        log.write(1, {"loss": 1.0})


class Recorder(GeneralTracker):
    """A tracker that keeps what it is given."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict]] = []

    @property
    def tracker(self):
        return self.rows

    @on_main_process
    def store_init_configuration(self, values):
        pass

    @on_main_process
    def log(self, values, step=None, **kwargs):
        self.rows.append((step, values))


def test_trackers_get_the_same_numbers(tmp_path):
    recorder = Recorder()
    accelerator = Accelerator(log_with=recorder)
    accelerator.init_trackers("tlcr")
    MetricsLog(tmp_path / "metrics.jsonl", accelerator).write(7, {"loss": 0.5})
    assert recorder.rows == [(7, {"loss": 0.5})]
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 0.5
