"""A comparison has one trial for every arm, KL coefficient and seed, and each trial has its own folder."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from tlcr.config.schema import Arm, KLConfig, RewardConfig, RunConfig
from tlcr.config.trials import folder_of, read_folder, trials_of
from tlcr.errors import ConfigError


def test_without_arms_there_is_one_trial_a_seed() -> None:
    cfg = RunConfig(seeds=(3, 4), reward=RewardConfig(kind="sign"), kl=KLConfig(coef=0.3))
    trials = trials_of(cfg)
    assert [(t.arm.name, t.kl_coef, t.seed, str(t.folder)) for t in trials] == [
        ("sign", 0.3, 3, "sign/seed-3"),
        ("sign", 0.3, 4, "sign/seed-4"),
    ]
    assert trials[0].config(cfg).reward == cfg.reward and trials[0].config(cfg).kl == cfg.kl


def test_a_grid_goes_seed_by_seed_and_coefficient_by_coefficient() -> None:
    arms = (Arm("a"), Arm("b", RewardConfig(kind="sequence"), kl_coefs=(0.01,)), Arm("c", kl_coefs=(0.5, 0.2, 0.1)))
    cfg = RunConfig(seeds=(0, 1), kl_coefs=(0.1, 0.4), arms=arms)
    trials = trials_of(cfg)
    first = ["a/kl-0.1/seed-0", "b/seed-0", "c/kl-0.5/seed-0", "a/kl-0.4/seed-0", "c/kl-0.2/seed-0", "c/kl-0.1/seed-0"]
    assert [str(trial.folder) for trial in trials] == first + [name.replace("seed-0", "seed-1") for name in first]
    assert len({trial.folder for trial in trials}) == len(trials)
    seen = trials[1].config(cfg)
    assert (seen.kl.coef, seen.reward.kind, seen.arms, seen.kl_coefs) == (0.01, "sequence", (), ())
    assert trials[3].config(cfg).kl.coef == 0.4


@pytest.mark.parametrize("kl_coef", [None, 0.0, 0.1, 1e-5, 0.30000000000000004])
def test_a_folder_says_whose_it_is(kl_coef: float | None) -> None:
    folder = folder_of("an-arm.v2", kl_coef, 12)
    assert read_folder(PurePosixPath(folder)) == ("an-arm.v2", kl_coef, 12)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RunConfig(kl_coefs=(0.1, 0.1)), r"RunConfig\.kl_coefs has 0\.1 twice"),
        (lambda: RunConfig(kl_coefs=(-1.0,)), r"RunConfig\.kl_coefs has -1\.0; each must be at least 0"),
        (lambda: Arm("a", kl_coefs=(0.2, 0.2)), r"Arm\.kl_coefs has 0\.2 twice"),
        (lambda: RunConfig(kl_coefs=(0.1, 0.2), kl=KLConfig(target=0.5)), r"kl\.target 0\.5 adapts each of them"),
        (
            lambda: RunConfig(arms=(Arm("a", kl_coefs=(0.2,)),), kl=KLConfig(target=0.5)),
            r"kl\.target 0\.5 adapts each of them",
        ),
    ],
)
def test_coefficients_that_cannot_be_compared(make: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()  # type: ignore[operator]
