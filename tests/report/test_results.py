"""Results: gold read off at matched KL, paired over seeds, from a run's files; all worked out by hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.report.run_folders import MACHINE, add_stages, evaluation, write_run
from tlcr.errors import DataError
from tlcr.report.results import (
    POWER,
    SeedRun,
    collect_results,
    compared_per,
    frontier,
    gold_at_kl,
    gold_at_matched_kl,
    mean_over_seeds,
    paired_difference,
    paths,
    write_results,
)


def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"update": i, "kl_per_token": kl, "gold_per_token": gold} for i, (kl, gold) in enumerate(points)]


def place(x: float) -> float:
    """The KL that lies at x on the scale on which ways are straight."""
    return x ** (1 / POWER)


def test_gold_at_a_kl_by_hand() -> None:
    path = curve((0.0, 0.1), (place(0.2), 0.3), (place(0.6), 0.5))
    for x, gold in ((0.0, 0.1), (0.1, 0.2), (0.2, 0.3), (0.5, 0.45), (0.6, 0.5)):
        assert gold_at_kl(path, place(x)) == pytest.approx(gold)
    assert gold_at_kl(path, place(0.61)) is None
    assert gold_at_kl([], 0.1) is None
    assert gold_at_kl(curve((0.0, 0.0), (4.0, 1.0)), 1.0, power=0.5) == pytest.approx(0.5)


def test_a_kl_that_was_estimated_may_be_negative() -> None:
    assert gold_at_kl(curve((-place(0.1), 0.1), (place(0.3), 0.5)), place(0.1)) == pytest.approx(0.3)


def test_arms_that_gain_the_same_for_their_distance_are_equal_however_far_their_ends_are() -> None:
    """A line that is straight in KL would put the arm with the farther end below the other."""
    near, far = curve((0.0, 0.0), (place(0.5), 0.5), (1.0, 1.0)), curve((0.0, 0.0), (place(2.0), 2.0))
    for x in (0.1, 0.5, 0.7):
        assert gold_at_kl(near, place(x)) == pytest.approx(x) == gold_at_kl(far, place(x))


def test_a_run_that_comes_back_counts_as_it_first_passed() -> None:
    path = curve((0.0, 0.0), (place(0.4), 0.4), (place(0.2), 0.9), (place(0.8), 0.1))
    assert gold_at_kl(path, place(0.3)) == pytest.approx(0.3)
    assert gold_at_kl(path, place(0.5)) == pytest.approx(0.9 - 0.8 * (0.5 - 0.2) / 0.6)


def test_evaluations_without_gold_are_passed_over() -> None:
    path: list[dict[str, Any]] = [*curve((0.0, 0.0)), {"update": 1, "kl_per_token": 0.1}, *curve((place(0.4), 0.4))]
    assert gold_at_kl(path, place(0.2)) == pytest.approx(0.2)


def test_seeds_that_did_not_get_there_are_left_out() -> None:
    curves = {0: curve((0, 0), (1, 1)), 1: curve((0, 0), (place(0.6), 1.2))}
    assert gold_at_matched_kl(curves, place(0.7)) == {0: pytest.approx(0.7)}
    assert gold_at_matched_kl(curves, place(0.3)) == {0: pytest.approx(0.3), 1: pytest.approx(0.6)}


def test_differences_are_taken_within_a_seed() -> None:
    """Seeds vary by 10, arms within a seed by 1 on average: only pairing sees it."""
    ours, theirs = {0: 10.0, 1: 21.5, 2: 30.5, 9: 99.0}, {0: 9.0, 1: 20.0, 2: 30.0}
    found = paired_difference(ours, theirs)
    assert found is not None
    assert found["seeds"] == [0, 1, 2]
    assert found["difference"] == pytest.approx(1.0)
    assert found["sd"] == pytest.approx(0.5)
    half = 4.302652729911275 * 0.5 / math.sqrt(3)  # the 97.5 % point of Student's t with 2 degrees of freedom
    assert found["interval"] == pytest.approx([1 - half, 1 + half])
    single = paired_difference({0: 1.0}, {0: 0.5})
    assert single is not None and single["interval"] is None and single["difference"] == 0.5
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def runs(**arms: list[list[dict[str, float]]]) -> list[SeedRun]:
    return [
        SeedRun(arm, None, seed, path[0], path[-1], tuple(path))
        for arm, paths in arms.items()
        for seed, path in enumerate(paths)
    ]


def test_the_frontier_compares_where_both_have_been() -> None:
    found = frontier(
        runs(
            continuous=[curve((0, 0), (0.6, 0.6), (1.0, 1.0)), curve((0, 0), (0.6, 0.9), (0.8, 1.2))],
            discrete=[curve((0, 0), (0.6, 0.3), (0.9, 0.45)), curve((0, 0), (0.6, 0.3))],
            sequence=[curve((0, 0), (0.2, 0.02)), curve((0, 0), (0.1, 0.02))],
        )
    )
    assert found is not None
    assert found["reached"] == {"continuous": 0.8, "discrete": 0.6, "sequence": 0.1}
    assert [level["kl"] for level in found["levels"]] == pytest.approx([0.15, 0.3, 0.6])  # of what half have reached
    last = found["levels"][-1]["arms"]
    assert last["continuous"]["mean"] == pytest.approx((0.6 + 0.9) / 2)
    assert last["discrete"]["mean"] == pytest.approx(0.3)
    assert last["sequence"] is None  # one of its seeds got to 0.2, which would speak for both
    assert [level["arms"]["sequence"] for level in found["levels"]] == [None] * 3
    against_discrete, against_sequence = found["comparisons"]
    assert (against_discrete["other"], against_discrete["kl"]) == ("discrete", 0.6)
    assert against_discrete["difference"] == pytest.approx(((0.6 - 0.3) + (0.9 - 0.3)) / 2)
    assert (against_sequence["other"], against_sequence["kl"]) == ("sequence", 0.1)


def test_the_sides_of_a_difference_are_of_its_seeds() -> None:
    """A third seed of the first arm alone, as in a run that is not at its end, would turn the sides round."""
    found = frontier(runs(a=[curve((0, 0), (1.0, gold)) for gold in (1, 1, 4)], b=[curve((0, 0), (1.0, 1.45))] * 2))
    assert found is not None
    (against,) = found["comparisons"]
    assert (against["seeds"], against["difference"]) == ([0, 1], pytest.approx(-0.45))
    assert (against["arm_gold"]["mean"], against["arm_gold"]["seeds"]) == (pytest.approx(1.0), 2)
    assert against["other_gold"]["mean"] == pytest.approx(1.45)


@pytest.mark.parametrize(
    ("evaluation", "per"),
    [
        (None, "token"),
        ({"scorer": None, "per": None}, "token"),
        ({"scorer": "scorer.py:score"}, "answer"),
        ({"scorer": "scorer.py:score", "per": "token"}, "token"),
        ({"scorer": None, "per": "answer"}, "answer"),
    ],
)
def test_a_scorer_of_answers_is_compared_per_answer_unless_told_otherwise(evaluation: dict | None, per: str) -> None:
    assert compared_per({"evaluation": evaluation}) == per


def test_per_answer_the_longer_ones_have_moved_further() -> None:
    """Equal per token, "long" has twice the tokens: at the KL of an answer it is compared where it was half the way."""
    ways = {
        arm: [
            {
                "update": step,
                "kl_per_token": k,
                "gold_per_token": k,
                "kl_per_answer": n * k,
                "gold_per_answer": n * k * k,
            }
            for step, k in enumerate((0.0, 0.5, 1.0))
        ]
        for arm, n in (("short", 10), ("long", 20))
    }
    found = frontier(runs(short=[ways["short"]], long=[ways["long"]]), per="answer")
    assert found is not None and found["reached"] == {"short": 10, "long": 20}
    (against,) = found["comparisons"]
    assert (against["kl"], against["arm_gold"]["mean"], against["other_gold"]["mean"]) == (10, 10, 5)


def trial(arm: str, kl_coef: float | None, seed: int, kl: float, gold: float) -> SeedRun:
    """A run that ended there; on its way it was elsewhere."""
    way = curve((0.0, 0.1 * seed), (9.0, -9.0), (kl, gold))
    return SeedRun(arm, kl_coef, seed, way[0], way[-1], tuple(way))


def test_over_several_coefficients_the_way_is_from_end_to_end() -> None:
    """From the reference to where training ended under the largest coefficient, then the next: not through training."""
    grid = [
        *(
            trial("a", coef, seed, kl, kl * (1 + seed))
            for coef, kl in ((0.1, place(0.6)), (0.02, 1.0))
            for seed in (0, 1)
        ),
        *(trial("b", coef, seed, kl, kl / 2) for coef, kl in ((0.02, place(0.8)), (0.1, 0.16)) for seed in (0, 1)),
        trial("c", None, 0, 0.5, 0.7),
    ]
    found = paths(grid)
    assert [(p["stop"], p["kl_per_token"], p["gold_per_token"]) for p in found["a"][1]] == [
        (0, 0.0, 0.1),
        (1, place(0.6), 2 * place(0.6)),
        (2, 1.0, 2.0),
    ]
    assert [p["kl_per_token"] for p in found["b"][0]] == [0.0, 0.16, place(0.8)]
    assert [p["kl_per_token"] for p in found["c"][0]] == [0.0, 9.0, 0.5]  # a single coefficient: its training
    front = frontier(grid[:-1])
    assert front is not None and front["reached"] == {"a": 1.0, "b": place(0.8)}
    (against,) = front["comparisons"]
    assert (against["kl"], against["seeds"]) == (place(0.8), [0, 1])
    assert against["arm_gold"]["mean"] == pytest.approx(1.5 * (place(0.6) + 1.0) / 2)  # half way
    assert against["other_gold"]["mean"] == pytest.approx(place(0.8) / 2)


def test_the_interval_of_a_mean_is_students() -> None:
    mean = mean_over_seeds([1.0, 2.0, 6.0])
    assert mean is not None and mean.mean == 3.0 and mean.sd == pytest.approx(math.sqrt(7))
    half = 4.302652729911275 * math.sqrt(7 / 3)
    assert mean.interval == pytest.approx((3 - half, 3 + half))
    single, equal = mean_over_seeds([4.0]), mean_over_seeds([4.0, 4.0])
    assert single is not None and single.interval is None
    assert equal is not None and equal.interval == (4.0, 4.0)
    assert mean_over_seeds([]) is None


def test_a_grid_is_read_from_its_folders(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"zeta": 0.6, "alpha": 0.3}, seeds=(0, 1), kl_coefs=(0.2, 0.05))
    results = collect_results(folder)
    rows = [(row["name"], row["kl_coef"]) for row in results["arms"]]
    assert rows == [("zeta", 0.05), ("zeta", 0.2), ("alpha", 0.05), ("alpha", 0.2)]
    assert [seed["folder"] for seed in results["arms"][1]["seeds"]] == ["zeta/kl-0.2/seed-0", "zeta/kl-0.2/seed-1"]
    kls = [point["kl_per_token"] for point in results["paths"]["zeta"][0]]
    assert kls == sorted(kls) and len(kls) == 3
    assert results["frontier"]["comparisons"][0]["other"] == "alpha"


def test_a_run_of_an_arms_single_coefficient_stands_under_it_when_there_are_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its way would be training's, and that of the others from end to end."""
    folder = write_run(tmp_path / "run", {"zeta": 0.6, "alpha": 0.3}, seeds=(0, 1), kl_coefs=(0.2, 0.05))
    wanted = collect_results(folder)
    named, alone = (folder / "ppo" / "zeta" / place for place in ("kl-0.2/seed-0", "seed-0"))
    shutil.copytree(named, alone)
    (alone / "arm.json").write_text(json.dumps({"config": {"kl": {"coef": 0.2}}}))
    assert collect_results(folder) == wanted
    assert "seed-0 is left out of the report: its KL coefficient has a folder of its own" in caplog.text
    shutil.rmtree(named)
    found = collect_results(folder)
    assert found["frontier"] == wanted["frontier"] and found["paths"] == wanted["paths"]
    (row,) = (row for row in found["arms"] if (row["name"], row["kl_coef"]) == ("zeta", 0.2))
    assert [seed["folder"] for seed in row["seeds"]] == ["zeta/seed-0", "zeta/kl-0.2/seed-1"]


def test_models_of_each_seed_are_those_of_the_first(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"continuous": 0.6}, seeds=(2, 10))
    for seed in (10, 2):
        own = folder / "models" / f"seed-{seed}" / "sft"
        own.mkdir(parents=True)
        (own / "done.json").write_text(json.dumps({"metrics": {"loss": float(seed)}, "seconds": 1.0}))
    assert collect_results(folder)["stages"]["sft"]["metrics"] == {"loss": 2.0}


def test_no_frontier_without_gold_or_without_movement() -> None:
    still = [[{"update": 0, "kl_per_token": 0.0, "gold_per_token": 0.1}]]
    assert frontier(runs(continuous=still)) is None
    assert frontier(runs(continuous=[[{"update": 0, "kl_per_token": 0.5}]])) is None
    assert frontier([]) is None


def test_a_run_is_read_from_its_files(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"zeta": 0.6, "alpha": 0.3}, seeds=(0, 1, 10))
    add_stages(folder)
    results = write_results(folder)
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert [arm["name"] for arm in results["arms"]] == ["zeta", "alpha"]  # as in the config, not by the alphabet
    zeta = results["arms"][0]
    assert [seed["seed"] for seed in zeta["seeds"]] == [0, 1, 10]
    golds = [
        json.loads((folder / "ppo" / "zeta" / f"seed-{s}" / "evaluation.json").read_text())["after"]["gold_per_token"]
        for s in (0, 1, 10)
    ]
    assert zeta["after"]["gold_per_token"]["mean"] == pytest.approx(sum(golds) / 3)
    assert zeta["after"]["gold_per_token"]["seeds"] == 3
    assert [point["update"] for point in zeta["seeds"][0]["curve"]] == [0, 10, 20, 30, 40, 50, 60]
    assert results["versions"] == {"tlcr": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
    assert results["machines"] == [
        {"machine": MACHINE, "stages": ["sft", "reward_model", "discriminator"]},
        {"machine": MACHINE | {"threads": 1}, "stages": ["ppo"]},
    ]
    assert results["stages"]["labels"]["pairs"] == 2000
    assert results["frontier"]["comparisons"][0]["arm"] == "zeta"


def test_runs_that_were_evaluated_otherwise_are_not_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two scorers have two scales: their difference says nothing of the arms."""
    folder = write_run(tmp_path / "run", {"continuous": 0.6, "sequence": 0.4}, seeds=(0, 1))
    places = sorted(folder.glob("ppo/*/seed-*/evaluation.json"))

    def judge(path: Path, scorer: str) -> None:
        settings = {"prompts": 8, "scorer": scorer}
        evaluation = json.loads(path.read_text()) | {"settings": settings, "on_the_way": settings}
        path.write_text(json.dumps(evaluation))

    for path in places:
        judge(path, "b:f" if "continuous" in str(path) else "a:f")
    config = folder / "config.yaml"
    before = config.read_text(encoding="utf-8")
    config.write_text(before + "\nevaluation: {prompts: 8, scorer: b:f}\n", encoding="utf-8")
    assert [arm["name"] for arm in collect_results(folder)["arms"]] == ["continuous"]
    assert caplog.text.count("is left out of the report: it was evaluated with") == 2
    config.write_text(before + "\nevaluation: {prompts: 9, scorer: c:f}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"several settings, none of them those of config.yaml; .* 'tlcr evaluate'"):
        collect_results(folder)
    for path in places:
        judge(path, "a:f")
    assert len(collect_results(folder)["arms"]) == 2  # alike, whatever the config says now


def test_a_run_of_an_older_version_names_no_machine(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"continuous": 0.6}, seeds=(0,))
    (folder / "ppo" / "continuous" / "seed-0" / "done.json").write_text(json.dumps({"versions": {"tlcr": "0.1.0"}}))
    assert collect_results(folder)["machines"] == []


def test_the_curve_ends_with_what_was_written_last(tmp_path: Path) -> None:
    """`tlcr evaluate` writes evaluation.json again; the curve's ends follow it."""
    folder = write_run(tmp_path / "run", {"continuous": 0.6}, seeds=(0,))
    own = folder / "ppo" / "continuous" / "seed-0"
    again = {"before": evaluation(0.0, 0.0), "after": evaluation(7.0, 0.9)}
    (own / "evaluation.json").write_text(json.dumps(again))
    path = collect_results(folder)["arms"][0]["seeds"][0]["curve"]
    assert (path[0]["gold_per_token"], path[-1]["gold_per_token"]) == (0.0, 7.0)
    (own / "metrics.jsonl").unlink()
    assert len(collect_results(folder)["arms"][0]["seeds"][0]["curve"]) == 2


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no run folder"):
        collect_results(tmp_path / "missing")
    folder = write_run(tmp_path / "run", {"continuous": 0.6}, seeds=(0,))
    (folder / "ppo" / "continuous" / "seed-0" / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match=r"evaluation\.json is not valid JSON"):
        collect_results(folder)
    with pytest.raises(DataError, match="holds no run"):
        collect_results(tmp_path)
    (tmp_path / "config.yaml").touch()
    assert collect_results(tmp_path)["arms"] == []
