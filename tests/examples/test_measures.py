"""The further measures of a comparison, on runs written here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples import measures
from tlcr.errors import DataError

SCORER = "def shouting(prompts, responses):\n    return [float(r.isupper()) for r in responses]\n"


def write_run(folder: Path, arm: str, seed: int, *, gold: float, kl: float, after: list[str], kept: int = 2) -> None:
    """An evaluated PPO run of two prompts: gold and KL per answer from 0 in a straight line."""
    own = folder / "ppo" / arm / f"seed-{seed}"
    own.mkdir(parents=True)
    values = [
        {"gold_per_answer": g, "gold_per_token": g, "kl_per_answer": k, "kl_per_token": k, "answers": 2}
        for g, k in ((0.0, 0.0), (gold, kl))
    ]
    (own / "evaluation.json").write_text(json.dumps({"before": values[0], "after": values[1]}))
    rows = [{"step": step, **{f"eval/{name}": value for name, value in v.items()}} for step, v in enumerate(values)]
    (own / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = {"before": ["a b", "c d"], "after": after}
    lines = [
        {"when": when, "prompt": f"p{index}", "response": text}
        for when, own_texts in texts.items()
        for index, text in enumerate(own_texts[:kept])
    ]
    (own / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_words_said_again_count_within_an_answer_only() -> None:
    assert measures.repeated_share([], ["so so Good", "so bad"]) == pytest.approx(1 / 5)
    assert measures.repeated_share([], ["a A a a", ""]) == pytest.approx(3 / 4)
    assert measures.repeated_share([], ["", ""]) == 0


def test_pairs_said_again_count_over_all_answers() -> None:
    assert measures.distinct_pairs([], ["a b a", "A B"]) == pytest.approx(2 / 3)
    assert measures.distinct_pairs([], ["a b", "b a"]) == 1
    assert measures.distinct_pairs([], ["a", ""]) == 0


def test_the_table_holds_every_measure_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("arms: [{name: ours}, {name: theirs}]")
    (tmp_path / "scorer.py").write_text(SCORER)
    for seed, extra in enumerate((0.0, 0.2)):
        write_run(tmp_path, "ours", seed, gold=0.8 + extra, kl=4.0, after=["A A", "b c"])
        write_run(tmp_path, "theirs", seed, gold=0.3 + extra, kl=2.0, after=["x y z", "x y z"])
    measures.main([str(tmp_path), "--scorer", f"{tmp_path / 'scorer.py'}:shouting"])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    head = ["arm", "gold", "KL, nats", "shouting", *measures.TEXT_MEASURES]
    place = rows.index(head)
    assert rows[place + 2] == ["before", "0.000", "0.000", "0.000", "0.000", "1.000", "2.000"]
    # mean 0.9 of 0.8 and 1.0; Student's t of one degree of freedom: 12.706 times the standard error, 0.1
    assert rows[place + 3][:2] == ["ours", "0.900 [\u22120.371, 2.171]"]
    means = [cell.split(" ")[0] for cell in rows[place + 3][2:]]
    assert means == ["4.000", "0.500", "0.250", "1.000", "2.000"]
    assert [cell.split(" ")[0] for cell in rows[place + 4][2:]] == ["2.000", "0.000", "0.000", "0.500", "3.000"]


def test_a_further_scorer_is_compared_at_matched_kl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of "ours" shouts at 4 nats, so an eighth of that at a sixteenth of them, where all of "theirs" does."""
    (tmp_path / "config.yaml").write_text("arms: [{name: ours}, {name: theirs}]")
    (tmp_path / "scorer.py").write_text(SCORER)
    for seed in (0, 1):
        write_run(tmp_path, "ours", seed, gold=0.0, kl=4.0, after=["A A", "b c"])
        write_run(tmp_path, "theirs", seed, gold=0.0, kl=0.25, after=["X", "Y"])
    figures = tmp_path / "figures"
    measures.main([str(tmp_path), "--scorer", f"{tmp_path / 'scorer.py'}:shouting", "--figures", str(figures)])
    assert "shouting per answer" in (figures / "shouting.svg").read_text(encoding="utf-8")
    _, matched = capsys.readouterr().out.split("shouting at matched KL", 1)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in matched.splitlines()]
    assert ["arm", "0.062", "0.125", "0.250"] in rows  # shares of the KL that half of the arms reached
    assert ["ours", "0.022 [0.022, 0.022]", "0.037 [0.037, 0.037]", "0.062 [0.062, 0.062]"] in rows
    assert ["theirs", "0.354 [0.354, 0.354]", "0.595 [0.595, 0.595]", "1.000 [1.000, 1.000]"] in rows
    assert ["theirs", "0.250", "0.062", "1.000", "\u22120.938 [\u22120.938, \u22120.938]"] in rows


def test_gold_is_compared_along_training_with_one_coefficient_of_each_arm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two coefficients the larger, whose run ends at gold 0.4 and 2 nats, and is read on the way of one run."""
    (tmp_path / "config.yaml").write_text("arms: [{name: ours}, {name: theirs}]")
    for arm, gold in (("ours", 0.4), ("theirs", 0.2)):
        write_run(tmp_path, f"{arm}/kl-0.1", 0, gold=9.0, kl=8.0, after=["a", "b"])
        write_run(tmp_path, f"{arm}/kl-0.2", 0, gold=gold, kl=2.0, after=["a", "b"])
    assert measures.main([str(tmp_path), "--along-training", "2", "--figures", str(tmp_path / "figures")]) == 0
    assert (tmp_path / "figures" / "gold.svg").is_file()
    _, along = capsys.readouterr().out.split("Gold along training", 1)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in along.splitlines()]
    assert ["ours", "0.141", "0.238", "0.400"] in rows and ["theirs", "2.000", "0.400", "0.200", "0.200"] in rows
    assert measures.main([str(tmp_path), "--along-training", "3"]) == 2
    assert "ours, theirs have no coefficient of that place" in capsys.readouterr().err


def test_answers_that_were_not_kept_are_missed(tmp_path: Path) -> None:
    write_run(tmp_path, "ours", 0, gold=1.0, kl=1.0, after=["a", "b"], kept=1)
    with pytest.raises(DataError, match=r"has 1 answers of 2; set evaluation\.samples"):
        measures.print_measures(tmp_path, [])


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="holds no evaluated PPO run"):
        measures.print_measures(tmp_path, [])
    assert measures.main([str(tmp_path)]) == 2
    assert "holds no evaluated PPO run" in capsys.readouterr().err
