"""The study of how gold is read between points, on runs whose gold is a known power of the KL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples import reading
from tlcr.errors import DataError


def write_run(folder: Path, arm: str, seed: int, points: list[tuple[float, float]]) -> None:
    """An evaluated PPO run with these evaluations, (KL, gold) per token."""
    own = folder / "ppo" / arm / f"seed-{seed}"
    own.mkdir(parents=True)
    values = [{"kl_per_token": kl, "gold_per_token": gold} for kl, gold in points]
    (own / "evaluation.json").write_text(json.dumps({"before": values[0], "after": values[-1]}))
    rows = [{"step": step, **{f"eval/{name}": value for name, value in v.items()}} for step, v in enumerate(values)]
    (own / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(text: str) -> dict[tuple[str, ...], list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {tuple(row[:3]): row[3:] for row in rows}


def test_the_power_that_gold_follows_misses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On its way gold is the power 3/4 of the KL, and among the ends of the coefficients it is the root."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("arms: [{name: a}]")
    for coef, end in ((0.4, 0.25), (0.2, 1.0), (0.1, 4.0)):
        shares = (0.0, 1 / 16, 0.3, 1.0)
        write_run(folder, f"a/kl-{coef}", 0, [(end * x, end**0.5 * x**0.75) for x in shares])
    assert reading.main([str(folder)]) == 0
    rows = rows_of(capsys.readouterr().out)
    # the ends are (0, 0), (1/4, 1/2), (1, 1), (4, 2): read straight in KL, the first is 1/4 and the second 9/10
    ends = rows["run", "a", "ends"]
    assert (ends[0], ends[2], ends[3]) == ("0.000", "0.250", "1")
    assert (ends[4], ends[6], ends[7]) == ("0.000", "0.200", "1")
    way = rows["run", "a", "evaluations, 0.2"]
    assert way[1] == way[5] == "0.000" and way[3] == way[7] == "1"
    assert float(way[0]) > 0.03 and float(way[2]) > 0.03
    assert rows["all, per token", "all", "ends"] == ends
    assert [rows["all, per token", "all", "evaluations"][place] for place in (1, 3, 5, 7)] == [
        "0.000",
        "3",
        "0.000",
        "3",
    ]


def test_a_point_that_is_not_between_its_neighbours_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", "a", 0, [(0.0, 0.0), (0.5, 0.1), (0.4, 0.2), (0.3, 0.3), (1.0, 0.4)])
    assert reading.main([str(tmp_path / "run")]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert ("run", "a", "evaluations") not in rows
    assert rows["all, per token", "all", "evaluations"][3] == rows["all, per token", "all", "evaluations"][7] == "0"


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="holds no evaluated PPO run"):
        reading.of_run(tmp_path)
    assert reading.main([str(tmp_path)]) == 2
    assert "holds no evaluated PPO run" in capsys.readouterr().err
