"""Holds the theory of `theory.py` against trained policies and value models.

    python -m examples.credit_study.variance examples/credit_study/study.yaml

Every finished PPO run's policy answers the held-out prompts. Its answers get the reward that its PPO paid, centred on
these answers, and advantages by its own value model. *Measured* is the squared correlation of a token's advantage with
the token's own reward (the discriminator's, less its KL penalty), pooled over tokens. *Known* is the share q of the
rewards before a token that the value model follows: the slope of the value on the sum of what the discriminator gave
them, with the token's place as a second regressor; 1 by definition where the reward stands at every token. The KL
penalty, which no placement moves, is paid by then and no part of that sum. *Predicted* is the theory's figure for these
lengths, this lambda and this share, with a value model that errs in nothing else. Writes variance.json and variance.md
below output_dir.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.credit_study import results, theory
from examples.credit_study.study import Cell, Study, read_study
from examples.study import command
from tlcr.experiment.frozen_models import load_frozen_models, load_reference
from tlcr.experiment.opening import open_run
from tlcr.experiment.run_folder import RunFolder
from tlcr.files import atomic_write, write_json
from tlcr.models.actor_critic import ActorCritic
from tlcr.ppo.advantages import compute_advantages
from tlcr.ppo.kl import kl_of
from tlcr.ppo.rollout import generate, seeded_generator
from tlcr.ppo.scores import score_rollout
from tlcr.report.page import number
from tlcr.report.results import mean_over_seeds
from tlcr.rewards.centre import build_centre
from tlcr.rewards.composition import compose_rewards
from tlcr.types import Rewards

PLACEMENTS = ("continuous", "sum-at-end")
"""Those of which the theory speaks: the same reward, at every token or as a sum."""


def squared_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Of two rows of numbers."""
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def array(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor of any device and dtype."""
    return np.asarray(tensor.double().cpu().numpy())


def share_known(values: np.ndarray, before: np.ndarray, place: np.ndarray) -> float:
    """The slope of the values on the rewards before a token, with its place and a constant beside them."""
    regressors = np.stack([before, place, np.ones_like(place)], axis=1)
    return float(np.linalg.lstsq(regressors, values, rcond=None)[0][0])


def known_by(values_BT: np.ndarray, at_each: Rewards, mask_BT: np.ndarray) -> float:
    """The share of what a sum at the end moves there that these values follow, from the rewards at every token."""
    moved_BT = np.where(mask_BT, array(at_each.parts["dense"]), 0.0)  # KL is paid at every token in both
    before_BT = np.cumsum(moved_BT, axis=1) - moved_BT
    place_BT = np.broadcast_to(np.arange(mask_BT.shape[1], dtype=float), mask_BT.shape)
    return share_known(values_BT[mask_BT], before_BT[mask_BT], place_BT[mask_BT])


def of_cell(run: RunFolder, cell: Cell, dense: Cell) -> dict[str, Any]:
    """The figures of one trained policy. dense: the cell whose reward stands at every token."""
    cfg, folder = cell.config(run.cfg), run.trial_folder(cell)
    frozen, reference = load_frozen_models(run, cfg), load_reference(run)
    actor_critic = ActorCritic.load(cfg.model.saved_in(folder / "policy"), folder / "value", device=run.device).eval()
    rollout = generate(
        actor_critic.policy,
        run.tokenizer,
        run.prompts.held_out,
        cfg.rollout,
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        generator=seeded_generator("variance", run.cfg.seed, 0),
    )
    scores = score_rollout(
        actor_critic,
        reference,
        rollout,
        temperature=cfg.rollout.temperature,
        micro_batch_size=cfg.rollout.batch_size,
        exact_kl=False,
    )
    signal = frozen.source(run, cfg, reference, cell.seed)(rollout)

    def rewards_of(placed: Cell) -> Rewards:
        reward = placed.config(run.cfg).reward
        return compose_rewards(
            signal,
            rollout.mask_BT,
            ended_B=rollout.ended_B,
            kl_BT=kl_of(scores, run.cfg.kl_estimator),
            kl_coef=cell.kl_coef,
            cfg=reward,
            temperature=frozen.temperature,
            centre=build_centre(reward),
        )

    rewards = rewards_of(cell)
    advantages = compute_advantages(
        rewards, scores, rollout.mask_BT, gamma=cfg.ppo.gamma, lam=cell.lam, whiten=False, accelerator=None
    )
    mask = rollout.mask_BT.cpu().numpy()
    at_each = rewards_of(dense)
    own_BT = np.where(mask, array(at_each.rewards_BT), 0.0)
    lengths = mask.sum(axis=1)
    known = 1.0 if cell is dense else known_by(array(scores.values_BT), at_each, mask)
    return {
        "known": known,
        "measured": squared_correlation(array(advantages.advantages_BT)[mask], own_BT[mask]),
        "predicted": theory.squared_correlation([int(n) for n in lengths if n], cell.lam, known=known),
        "tokens": float(lengths.mean()),
    }


def collect(study: Study) -> list[dict[str, Any]]:
    """A row for each length, placement, lambda and value model of which a run has finished; figures over seeds."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for tokens in study.lengths:
        if not study.folder(tokens).is_dir():
            continue
        run = open_run(study.run_config(tokens), resume=True, whole=False)
        by_name = {(cell.folder.parts[0], cell.seed): cell for cell in study.cells(tokens)}
        for (name, seed), cell in by_name.items():
            placement, lam, value = results.read_name(name)
            if placement in PLACEMENTS and run.is_trained(cell):
                dense = by_name[results.name_of(PLACEMENTS[0], lam, value), seed]
                found.setdefault((tokens, name), []).append(of_cell(run, cell, dense))
    rows = []
    for (tokens, name), measured in sorted(found.items()):
        placement, lam, value = results.read_name(name)
        over_seeds = {key: vars(mean_over_seeds([one[key] for one in measured])) for key in measured[0]}
        rows.append({"length": tokens, "placement": placement, "lam": lam, "value": value, **over_seeds})
    return rows


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| tokens | placement | lambda | value model | known | measured | predicted | seeds |", "|---" * 8 + "|"]
    lines += [
        f"| {row['length']} | {row['placement']} | {row['lam']} | {row['value']} | {number(row['known']['mean'])} | "
        f"{number(row['measured']['mean'])} | {number(row['predicted']['mean'])} | {row['measured']['seeds']} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the YAML file of the study, some of whose runs have finished")
    options = parser.parse_args(arguments)

    def work() -> None:
        study = read_study(options.study)
        with torch.no_grad():
            rows = collect(study)
        write_json(Path(study.output_dir) / "variance.json", rows)
        with atomic_write(Path(study.output_dir) / "variance.md") as aside:
            aside.write_text(as_markdown(rows), encoding="utf-8")
        sys.stdout.write(as_markdown(rows))

    return command(work)


if __name__ == "__main__":
    raise SystemExit(main())
