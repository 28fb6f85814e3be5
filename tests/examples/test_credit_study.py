"""The study of length and credit: its theory against sampled rewards, its runs end to end, and its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from examples.credit_study import results, study, theory, variance
from tlcr import ops
from tlcr.config.stages import TRAINED
from tlcr.errors import ConfigError
from tlcr.types import Rewards

LAMS = (0.0, 0.7, 1.0)


def advantages_of(rewards_BT: np.ndarray, values_BT: np.ndarray, lam: float) -> np.ndarray:
    mask_BT = torch.ones(rewards_BT.shape, dtype=torch.bool)
    given = (torch.from_numpy(rewards_BT), torch.from_numpy(values_BT), mask_BT)
    return ops.fused_gae(*given, gamma=1.0, lam=lam, whiten=False)[0].numpy()


# ---- the theory


def test_loading_by_hand() -> None:
    # T = 2, lambda 0.5, half of the sum known: A_1 = .5 (d1 + .5 d2) + .5 * .5 (d1 + d2), A_2 = .5 d2 + .5 (d1 + d2)
    assert theory.loading(2, 0.5, known=0.5) == pytest.approx(np.array([[0.75, 0.5], [0.5, 1.0]]))
    assert theory.loading(3, 0.5) == pytest.approx(np.array([[1, 0.5, 0.25], [0, 1, 0.5], [0, 0, 1]]))
    # (mean of .75 and 1)^2 / mean of the rows' sums of squares
    assert theory.squared_correlation([2], 0.5, known=0.5) == pytest.approx(0.875**2 / ((0.8125 + 1.25) / 2))


@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("known", [0.0, 0.6, 1.0])
def test_the_sum_at_the_end_has_the_advantages_that_the_theory_says(lam: float, known: float) -> None:
    generator = np.random.default_rng(0)
    d_BT = generator.standard_normal((4000, 12))
    # the value before a token: the share of the rewards before it that the model knows; those to come are unforeseeable
    values_BT = known * (np.cumsum(d_BT, axis=1) - d_BT)
    rewards_BT = np.zeros_like(d_BT)
    rewards_BT[:, -1] = d_BT.sum(axis=1)
    advantages_BT = advantages_of(rewards_BT, values_BT, lam)
    assert advantages_BT == pytest.approx(d_BT @ theory.loading(12, lam, known=known).T, abs=1e-9)
    measured = variance.squared_correlation(advantages_BT.ravel(), d_BT.ravel())
    assert measured == pytest.approx(theory.squared_correlation([12], lam, known=known), rel=0.05, abs=0.003)


@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("persistence", [0.0, 0.8, 1.0])
def test_an_error_of_the_value_lowers_the_correlation_as_the_theory_says(lam: float, persistence: float) -> None:
    generator = np.random.default_rng(1)
    d_BT = generator.standard_normal((20000, 9))
    error_BT = np.empty_like(d_BT)
    error_BT[:, 0] = generator.standard_normal(len(d_BT))
    for t in range(1, 9):
        fresh = np.sqrt(1 - persistence**2) * generator.standard_normal(len(d_BT))
        error_BT[:, t] = persistence * error_BT[:, t - 1] + fresh
    advantages_BT = advantages_of(d_BT, np.sqrt(0.5) * error_BT, lam)
    measured = variance.squared_correlation(advantages_BT.ravel(), d_BT.ravel())
    predicted = theory.squared_correlation([9], lam, error=0.5, persistence=persistence)
    assert measured == pytest.approx(predicted, rel=0.06)


def test_length_costs_the_sum_at_the_end_and_not_the_reward_at_every_token() -> None:
    def ratio(tokens: int, lam: float) -> float:
        return theory.squared_correlation([tokens], lam) / theory.squared_correlation([tokens], lam, known=0.0)

    assert ratio(64, 1.0) == pytest.approx(2, rel=0.02) and ratio(256, 1.0) == pytest.approx(2, rel=0.02)
    assert ratio(256, 0.95) > 10 * ratio(32, 0.95) > 50
    dense = [theory.squared_correlation([tokens], 0.7) for tokens in (32, 256)]
    assert dense[0] == pytest.approx(dense[1], rel=0.03)


def test_the_page_says_what_the_theory_gives() -> None:
    text = " ".join((Path(__file__).parents[2] / "docs" / "results" / "length.md").read_text("utf-8").split())
    short, long = ([f"{theory.squared_correlation([length], lam):.2f}" for lam in (0.7, 0.95)] for length in (64, 256))
    said = f"At lambda 0.7 the share is {short[0]} for 64 tokens and {long[0]} for 256, at 0.95 it is {short[1]} and"
    assert f"{said} {long[1]}." in text
    left = theory.squared_correlation([256], 0.95, known=0.0)
    of = round(theory.squared_correlation([256], 0.95) / left, -1)
    assert f"a share of {left:.4f} is left, a {of:.0f}th of what the reward at every token has" in text


def test_the_share_that_a_value_model_knows_is_found() -> None:
    generator = np.random.default_rng(2)
    before, place = generator.standard_normal(5000), generator.uniform(0, 30, 5000)
    values = 0.3 * before - 0.05 * place + 0.4 + generator.standard_normal(5000)
    assert variance.share_known(values, before, place) == pytest.approx(0.3, abs=0.05)


def test_kl_that_is_paid_by_then_is_no_part_of_what_a_value_model_could_know() -> None:
    """Values that follow the discriminator's rewards exactly know all of it, though KL goes along with them."""
    generator = np.random.default_rng(3)
    dense_BT = generator.standard_normal((200, 20))
    kl_BT = -0.5 * np.abs(dense_BT) + 0.4 * dense_BT
    at_each = Rewards(torch.tensor(dense_BT + kl_BT), {"dense": torch.tensor(dense_BT), "kl": torch.tensor(kl_BT)})
    mask_BT = np.arange(20) < generator.integers(5, 21, (200, 1))
    before_BT = np.cumsum(dense_BT, axis=1) - dense_BT
    assert variance.known_by(before_BT, at_each, mask_BT) == pytest.approx(1.0)
    assert variance.known_by(0.5 * before_BT + 3.0, at_each, mask_BT) == pytest.approx(0.5)


# ---- the runs


SMALL: dict[str, Any] = {
    "config": "examples/quickstart.yaml",
    "overrides": {
        "arms": [],
        "seeds": [0],
        "data.embedded_pairs": 60,
        "data.max_prompt_tokens": 64,
        "sft.epochs": 1,
        "discriminator.epochs": 1,
        "ppo.updates": 2,
        "ppo.batch_size": 4,
        "ppo.minibatch_size": 4,
        "ppo.epochs": 1,
        "ppo.evaluate_every": 1,
        "evaluation.prompts": 6,
    },
    "lengths": {16: 12},
    "lams": [0.7],
    "values": {"policy": {}, "fast": {"ppo.value_learning_rate": 1.0e-3}},
    "seeds": [0],
    "placements": {
        "continuous": {
            "kl_coef": {16: 0.15, 64: 0.3},
            "per_answer": False,
            "reward": {"kind": "continuous", "centre": True},
        },
        "sum-at-end": {"kl_coef": {16: 0.1}, "per_answer": True, "reward": {"kind": "sum_at_end", "centre": True}},
    },
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "output_dir": str(folder / "out"), **changes}, sort_keys=False))
    return path


@pytest.mark.slow
def test_a_small_study_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    assert study.main([str(path)]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["placement"], row["value"]) for row in found["ends"]] == [
        ("continuous", "fast"),
        ("continuous", "policy"),
        ("sum-at-end", "fast"),
        ("sum-at-end", "policy"),
    ]
    assert len(found["best"]) == 2 and [gap["other"] for gap in found["gaps"]] == ["sum-at-end"]
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| 16 | continuous | 0.7 | policy |" in table and (tmp_path / "out" / "gap.svg").is_file()

    done = tmp_path / "out" / "length-16" / "ppo" / "continuous+lam-0.7+fast" / "seed-0" / TRAINED
    before = done.stat().st_mtime_ns
    assert study.main([str(path)]) == 0 and done.stat().st_mtime_ns == before  # what is done is not done again

    capsys.readouterr()
    assert variance.main([str(path)]) == 0
    rows = json.loads((tmp_path / "out" / "variance.json").read_text())
    assert {row["placement"] for row in rows} == {"continuous", "sum-at-end"} and len(rows) == 4
    assert all(0 <= row["measured"]["mean"] <= 1 and 0 < row["predicted"]["mean"] <= 1 for row in rows)
    assert "| 16 | sum-at-end | 0.7 | fast |" in capsys.readouterr().out


def test_coefficients_follow_the_length(tmp_path: Path) -> None:
    read = study.read_study(write(tmp_path, lengths={16: 12, 64: 50}))
    coefs = {(tokens, cell.arm.name): cell.kl_coef for tokens in (16, 64) for cell in read.cells(tokens)}
    assert (coefs[16, "continuous"], coefs[64, "continuous"]) == (0.15, 0.3)
    assert coefs[64, "sum-at-end"] == pytest.approx(0.1 * 27 / 64)
    assert read.run_config(64).rollout.max_new_tokens == 152 and read.run_config(64).data.embedded_words == 50


def test_a_whole_lambda_names_its_runs_as_they_are_read(tmp_path: Path) -> None:
    read = study.read_study(write(tmp_path, lams=[1]))
    for cell in read.cells(16):
        placement, lam, value = results.read_name(cell.folder.parts[0])
        assert results.name_of(placement, lam, value) == cell.folder.parts[0] and lam == 1.0


def test_gaps_are_taken_within_a_seed_at_the_kl_that_both_reached() -> None:
    def run(seed: int, kl: float, gold: float) -> results.SeedRun:
        ends = {"gold_per_token": 0.0, "kl_per_token": 0.0}, {"gold_per_token": gold, "kl_per_token": kl}
        return results.SeedRun("x", None, seed, *ends, ends)  # type: ignore[arg-type]

    gap = results._gap([run(0, 1.0, 1.0), run(1, 1.0, 0.8)], [run(0, 1 / 16, 0.05), run(1, 1 / 16, 0.02)])
    assert gap["kl"] == 1 / 16 and gap["at_kl"]["difference"] == pytest.approx((0.075 + 0.08) / 2)  # an eighth
    assert gap["at_end"]["difference"] == pytest.approx((0.95 + 0.78) / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lams": []}, "lams is empty"),
        ({"lams": 0.7}, "lams is 0.7; wanted a list"),
        ({"placements": ["continuous"]}, "wanted a mapping"),
        ({"placements": {"x": {"kl_coef": {8: 0.15}}}}, "wanted the keys kl_coef, per_answer, reward"),
        ({"values": {"odd": {"ppo.value_learning_rate": -1.0}}}, "value_learning_rate"),
        ({"lengths": {8: 6, 16: 12}}, "coefficient from there on, as {8: 0.15}"),
        ({"placements": {"x": {"kl_coef": 0.15, "per_answer": False, "reward": {}}}}, "kl_coef is 0.15"),
        ({"placements": {"x": {"kl_coef": {}, "per_answer": False, "reward": {}}}}, "kl_coef is {}"),
        ({"more": 1}, "has the keys"),
    ],
)
def test_a_wrong_study_is_refused_before_hours_of_work(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study.read_study(write(tmp_path, **changes))


def test_the_study_that_comes_with_the_examples_is_read() -> None:
    shipped = study.read_study(Path(study.__file__).with_name("study.yaml"))
    assert {cell.kl_coef for cell in shipped.cells(16) if cell.arm.name == "continuous"} == {0.15}


def test_a_length_that_the_study_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main([str(write(tmp_path)), "--lengths", "17"]) == 2
    assert "--lengths names [17]" in capsys.readouterr().err


def test_a_run_that_the_study_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The name of the placement alone would train models and no policy."""
    assert study.main([str(write(tmp_path)), "--only", "continuous"]) == 2
    assert "--only names continuous; there are continuous+lam-" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
