"""The runs of several folders count once each, and as one arm only where they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples import study
from tlcr.errors import DataError


def write(folder: Path, place: str, kl_coef: float) -> Path:
    """A run's folder with an evaluated PPO run, below ppo/ at ``place``."""
    own = folder / "ppo" / place
    own.mkdir(parents=True)
    (folder / "config.yaml").write_text("arms: []\n")
    (own / "evaluation.json").write_text(json.dumps({"before": {}, "after": {}}))
    (own / "arm.json").write_text(json.dumps({"config": {"kl": {"coef": kl_coef}}}))
    return folder


def test_runs_of_several_folders_are_put_together(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", "q/seed-0", 0.1), write(tmp_path / "b", "q/seed-1", 0.1)
    write(b, "dense/kl-0.1/seed-0", 0.1)
    found = [(run.arm, run.kl_coef, run.seed) for run in study.runs_of([a, b])]
    assert found == [("q", None, 0), ("dense", 0.1, 0), ("q", None, 1)]
    assert study.runs_of([a])[0].kl_coef is None


def test_a_run_that_comes_twice_is_refused(tmp_path: Path) -> None:
    """It would count as two seeds."""
    a, b = write(tmp_path / "a", "q/kl-0.1/seed-0", 0.1), write(tmp_path / "b", "q/seed-0", 0.1)
    for folders in ([a, a], [a, b]):
        with pytest.raises(DataError, match=r"two runs are of arm 'q', coefficient 0\.1, seed 0"):
            study.runs_of(folders)


def test_a_run_without_its_record_is_named(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", "q/seed-0", 0.1), write(tmp_path / "b", "q/seed-1", 0.1)
    (b / "ppo" / "q" / "seed-1" / "arm.json").unlink()
    with pytest.raises(DataError, match=r"seed-1/arm\.json is not there: the run did not end"):
        study.runs_of([a, b])


def test_runs_of_one_coefficient_join_those_of_several(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", "q/seed-0", 0.1), write(tmp_path / "b", "q/kl-0.1/seed-1", 0.1)
    write(b, "q/kl-0.4/seed-1", 0.4)
    assert [(run.kl_coef, run.seed) for run in study.runs_of([a, b])] == [(0.1, 0), (0.1, 1), (0.4, 1)]


def test_an_arm_of_another_coefficient_is_another_arm(tmp_path: Path) -> None:
    """Their mean would be of neither."""
    a, b = write(tmp_path / "a", "q/seed-0", 0.1), write(tmp_path / "b", "q/seed-1", 0.4)
    with pytest.raises(DataError, match=r"arm 'q' was trained at other KL coefficients \(0\.1, 0\.4\) in one of"):
        study.runs_of([a, b])
