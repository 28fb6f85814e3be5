"""The trials of a comparison: every arm at every KL coefficient with every seed, each a separate PPO run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from tlcr.config.schema import Arm, RunConfig

__all__ = ["Trial", "arms_of", "folder_of", "read_folder", "trials_of"]

KL_FOLDER = "kl-"


@dataclass(frozen=True)
class Trial:
    """One PPO run of a comparison: a reward, a KL coefficient and a seed.

    `folder` is where it writes, below the run's ppo/: <arm>/seed-<k>, or <arm>/kl-<coefficient>/seed-<k> where the arm
    is tried at several.
    """

    arm: Arm
    kl_coef: float
    seed: int
    folder: PurePosixPath

    def config(self, cfg: RunConfig) -> RunConfig:
        """The config of this trial, from that of the run."""
        kl = replace(cfg.kl, coef=self.kl_coef)
        ppo = cfg.ppo if self.arm.gamma is None else replace(cfg.ppo, gamma=self.arm.gamma)
        return replace(cfg, reward=self.arm.reward, kl=kl, ppo=ppo, kl_coefs=(), arms=())


def arms_of(cfg: RunConfig) -> tuple[Arm, ...]:
    """The arms to train; without `arms`, one that the config's own reward describes."""
    return cfg.arms or (Arm(name=cfg.reward.kind, reward=cfg.reward),)


def trials_of(cfg: RunConfig) -> list[Trial]:
    """Every trial; seed by seed and coefficient by coefficient, so that early results can be compared."""
    arms = [(arm, arm.kl_coefs or cfg.kl_coefs or (cfg.kl.coef,)) for arm in arms_of(cfg)]
    return [
        Trial(arm, coefs[index], seed, folder_of(arm.name, coefs[index] if len(coefs) > 1 else None, seed))
        for seed in cfg.seeds
        for index in range(max(len(coefs) for _, coefs in arms))
        for arm, coefs in arms
        if index < len(coefs)
    ]


def folder_of(arm: str, kl_coef: float | None, seed: int) -> PurePosixPath:
    """Where a trial writes below ppo/; kl_coef: None where the arm has a single one."""
    folder = PurePosixPath(arm)
    return (folder if kl_coef is None else folder / f"{KL_FOLDER}{kl_coef}") / f"seed-{seed}"


def read_folder(folder: PurePosixPath) -> tuple[str, float | None, int]:
    """The inverse: arm, KL coefficient and seed of a trial's folder."""
    kl_coef = float(folder.parts[1].removeprefix(KL_FOLDER)) if len(folder.parts) > 2 else None
    return folder.parts[0], kl_coef, int(folder.name.removeprefix("seed-"))
