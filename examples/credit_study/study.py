"""PPO with four placements of a reward, on answers of several lengths, with several lambdas and value models.

    python -m examples.credit_study.study examples/credit_study/study.yaml

The answers of one length share an SFT model, a discriminator and a reward model: every length is a run's folder below
output_dir, its PPO runs in ppo/. Finished parts are skipped, so that an interrupted study continues. Lengths share
nothing: to work on several at a time, start this with `--lengths` for each.

Writes results.json, results.md and gap.svg below output_dir.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from examples.credit_study import results
from examples.study import command, values_of
from tlcr.config.loading import load_config
from tlcr.config.schema import Arm, RewardConfig, RunConfig
from tlcr.config.trials import Trial
from tlcr.errors import ConfigError
from tlcr.experiment import pipeline
from tlcr.experiment.arm import train_arm
from tlcr.experiment.opening import open_run

logger = logging.getLogger("tlcr.study")

USUAL_TOKENS = 27
"""Tokens of a mean answer of the usual length, for which the coefficients are meant."""
ROOM = 2.4
"""The length limit of an answer, in mean answers, as in the quickstart."""
PLACEMENT = ("kl_coef", "per_answer", "reward")
"""The keys of a placement."""


@dataclass(frozen=True)
class Cell(Trial):
    """One PPO run: a trial of a run's folder whose lambda and value model are its own."""

    lam: float
    value: Mapping[str, Any]

    def config(self, cfg: RunConfig) -> RunConfig:
        changes = {name.removeprefix("ppo."): value for name, value in self.value.items()}
        return replace(super().config(cfg), ppo=replace(cfg.ppo, lam=self.lam, **changes))


@dataclass(frozen=True)
class Study:
    """The content of the YAML file."""

    output_dir: str
    config: str
    overrides: Mapping[str, Any]
    lengths: Mapping[int, int]
    lams: tuple[float, ...]
    values: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    placements: Mapping[str, Mapping[str, Any]]

    def folder(self, tokens: int) -> Path:
        return Path(self.output_dir) / f"length-{tokens}"

    def run_config(self, tokens: int) -> RunConfig:
        """The config of one length's folder."""
        limit = 8 * round(ROOM * tokens / 8)
        own = {
            "output_dir": str(self.folder(tokens)),
            "data.embedded_words": self.lengths[tokens],
            "data.max_answer_tokens": limit,
            "rollout.max_new_tokens": limit,
        }
        return load_config(self.config, {**self.overrides, **own})

    def cells(self, tokens: int, seeds: Sequence[int] = ()) -> Iterator[Cell]:
        """Every PPO run of a length, seed by seed, so that early results can be compared."""
        grid = itertools.product(seeds or self.seeds, self.lams, self.values.items(), self.placements.items())
        for seed, lam, (value_name, value), (name, placement) in grid:
            coef = _from_length(placement["kl_coef"], tokens) * (
                USUAL_TOKENS / tokens if placement["per_answer"] else 1
            )
            reward = RewardConfig(**placement["reward"])
            folder = PurePosixPath(results.name_of(name, lam, value_name)) / f"seed-{seed}"
            yield Cell(Arm(name=name, reward=reward), coef, seed, folder, lam, value)


def _from_length(by_length: Mapping[int, float], tokens: int) -> float:
    """The entry of the greatest length that is not above `tokens`."""
    return by_length[max(length for length in by_length if length <= tokens)]


def read_study(path: Path) -> Study:
    """Read the YAML file. Raises ConfigError with what is missing or unknown."""
    values = values_of(path, Study)
    kinds = {"lengths": Mapping, "lams": list, "values": Mapping, "seeds": list, "placements": Mapping}
    for name, kind in kinds.items():
        if not values[name]:
            raise ConfigError(f"{path}: {name} is empty; name at least one")
        if not isinstance(values[name], kind):
            raise ConfigError(f"{path}: {name} is {values[name]!r}; wanted a {'list' if kind is list else 'mapping'}")
    for name, placement in values["placements"].items():
        if not isinstance(placement, Mapping) or set(placement) != set(PLACEMENT):
            raise ConfigError(f"{path}: placements.{name} is {placement!r}; wanted the keys {', '.join(PLACEMENT)}")
        by_length = placement["kl_coef"]
        if not isinstance(by_length, Mapping) or not by_length or min(by_length) > min(values["lengths"]):
            shortest = min(values["lengths"])
            raise ConfigError(
                f"{path}: placements.{name}.kl_coef is {by_length!r}, and the shortest length {shortest}; give a "
                f"coefficient from there on, as {{{shortest}: 0.15}}"
            )
    study = Study(**{**values, "lams": tuple(float(lam) for lam in values["lams"]), "seeds": tuple(values["seeds"])})
    for tokens in study.lengths:
        cfg = study.run_config(tokens)
        for cell in study.cells(tokens):
            cell.config(cfg)  # a value out of bounds raises here, not hours later
    return study


def work_on(study: Study, lengths: Sequence[int], seeds: Sequence[int], only: Sequence[str]) -> None:
    """Trains the models of these lengths, then every PPO run whose name is in `only`, or all."""
    for tokens in lengths:
        cfg = study.run_config(tokens)
        for stage in ("sft", "reward_model", "labels", "discriminator"):
            pipeline.stage(cfg, stage, resume=True)
        run = open_run(cfg, resume=True, whole=False)
        for cell in study.cells(tokens, seeds):
            if not only or cell.folder.parts[0] in only:
                train_arm(run, cell)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a YAML file such as the one beside this script")
    parser.add_argument("--lengths", type=int, nargs="+", help="work on these lengths of the study only, in tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=(), help="work on these seeds only")
    parser.add_argument(
        "--only", nargs="+", default=(), help="work on these PPO runs only, by the name of their folder"
    )
    options = parser.parse_args(arguments)

    def work() -> None:
        study = read_study(options.study)
        if unknown := set(options.lengths or ()) - set(study.lengths):
            raise ConfigError(f"--lengths names {sorted(unknown)}; the study has {', '.join(map(str, study.lengths))}")
        lengths = options.lengths or list(study.lengths)
        names = {cell.folder.parts[0] for tokens in lengths for cell in study.cells(tokens, options.seeds)}
        if unknown := set(options.only) - names:
            raise ConfigError(f"--only names {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
        work_on(study, lengths, options.seeds, options.only)
        results.write(Path(study.output_dir), list(study.lengths))

    return command(work)


if __name__ == "__main__":
    raise SystemExit(main())
