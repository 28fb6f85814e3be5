"""TRL's GRPO with the discriminator's mean, and with its reward for every token, beside tlcr's PPO.

    tlcr run examples/trl_comparison/comparison.yaml                       # models and PPO
    python -m examples.trl_comparison.compare runs/trl_comparison --arms grpo-scalar grpo-tokens
    tlcr report runs/trl_comparison

All arms start from the SFT model of the run, take the prompts of its PPO, ask its discriminator, and see as many
answers with as many optimiser steps as its PPO. They are evaluated where PPO is, on the same held-out prompts with the
same random numbers. What an arm has finished is skipped, so that the command continues what was interrupted.

Writes ppo/<arm>/seed-<k>/ into the run's folder, as PPO does: metrics.jsonl, evaluation.json, policy/, arm.json.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from examples.study import command
from tlcr.config.schema import RunConfig
from tlcr.config.stages import TRAINED
from tlcr.data import embedded
from tlcr.evaluation.evaluate import PolicyEvaluation, evaluate_policy, write_evaluation
from tlcr.experiment.frozen_models import load_reference
from tlcr.experiment.opening import reopen_run
from tlcr.experiment.run_folder import RunFolder
from tlcr.hosts.local import LocalScorer
from tlcr.hosts.trl import TokenReward, TokenRewardMixin
from tlcr.models.actor_critic import ActorCritic
from tlcr.models.loading import load_causal_lm
from tlcr.ppo.rollout import generate, seeded_generator
from tlcr.ppo.scores import score_rollout
from tlcr.training.checkpoint import as_plain
from tlcr.types import PolicyScores, Rollout

logger = logging.getLogger("tlcr.study")

ARMS: dict[str, dict[str, Any]] = {
    "grpo-scalar": {},
    "grpo-tokens": {"normalise": "batch"},
    "grpo-tokens-mean": {"normalise": "batch", "per_token": True},
}
"""The arguments of TokenRewardMixin; without any, a stock GRPOTrainer takes the mean reward of an answer."""

ANSWERS = 8
"""Answers to a prompt: GRPO's group."""


class TokenTrainer(TokenRewardMixin, GRPOTrainer):
    """GRPO with an advantage for every token."""


class Evaluations(TrainerCallback):
    """Evaluates the policy before training, after every so many rounds of answers, and at the end."""

    def __init__(self, run: RunFolder, every: int, steps_per_round: int) -> None:
        self.run, self.every, self.steps_per_round = run, every, steps_per_round
        self.reference = load_reference(run)
        self.done: dict[int, PolicyEvaluation] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.evaluate(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        update, rest = divmod(state.global_step, self.steps_per_round)
        due = self.every > 0 and update % self.every == 0
        if rest == 0 and (due or state.global_step == state.max_steps):
            self.evaluate(model, update)

    def evaluate(self, policy: Any, update: int) -> None:
        """As tlcr evaluates its own policies: the same prompts, the same random numbers, the exact KL."""
        run, cfg = self.run, self.run.cfg
        generator, was_training = seeded_generator("evaluation", cfg.seed, 0), policy.training
        actor_critic = ActorCritic(policy, None)

        def sample(prompts: Sequence[str]) -> Rollout:
            return generate(
                policy,
                run.tokenizer,
                prompts,
                cfg.rollout,
                max_prompt_tokens=cfg.data.max_prompt_tokens,
                generator=generator,
            )

        def score(rollout: Rollout) -> PolicyScores:
            return score_rollout(
                actor_critic,
                self.reference,
                rollout,
                temperature=cfg.rollout.temperature,
                micro_batch_size=cfg.rollout.batch_size,
                exact_kl=True,
            )

        with torch.no_grad():
            self.done[update] = evaluate_policy(
                run.prompts.held_out,
                tokenizer=run.tokenizer,
                generate=sample,
                score=score,
                scorer=embedded.score,
                batch_size=cfg.rollout.batch_size,
                samples=cfg.evaluation.samples,
            )
        policy.train(was_training)


def grpo_config(cfg: RunConfig, folder: Path, seed: int, beta: float) -> tuple[GRPOConfig, int]:
    """TRL's config with as many answers and optimiser steps as the run's PPO, and the steps of one round."""
    rows, answers, epochs = cfg.ppo.minibatch_size, cfg.ppo.batch_size, cfg.ppo.epochs
    steps = answers // rows * epochs
    config = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        steps_per_generation=answers // rows,
        num_iterations=epochs,
        num_generations=ANSWERS,
        max_steps=cfg.ppo.updates * steps,
        max_completion_length=cfg.rollout.max_new_tokens,
        temperature=cfg.rollout.temperature,
        learning_rate=cfg.ppo.learning_rate,
        lr_scheduler_type="constant",
        beta=beta,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=steps,
        disable_tqdm=True,
    )
    return config, steps


def train(run: RunFolder, arm: str, seed: int, beta: float) -> Mapping[str, Any]:
    """One arm with one seed; returns the evaluations before and after."""
    cfg, folder = run.cfg, run.path / "ppo" / arm / f"seed-{seed}"
    config, steps = grpo_config(cfg, folder / "trl", seed, beta)
    evaluations = Evaluations(run, cfg.ppo.evaluate_every, steps)
    options = ARMS[arm]
    kind = TokenTrainer if options else GRPOTrainer
    trainer = kind(
        model=load_causal_lm(run.policy_source, device=run.device),
        processing_class=run.tokenizer,
        reward_funcs=[TokenReward(LocalScorer(run.discriminator_folder), run.tokenizer)],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": list(run.prompts.train)}),
        callbacks=[evaluations],
        **options,
    )
    trainer.train()
    done = evaluations.done
    rows = {update: {f"eval/{name}": x for name, x in found.metrics().items()} for update, found in done.items()}
    for row in trainer.state.log_history:
        if "loss" in row:
            kept = {name: value for name, value in row.items() if "/" in name and isinstance(value, (int, float))}
            rows.setdefault(row["step"] // steps, {}).update(kept)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as written:
        for update in sorted(rows):
            written.write(json.dumps({"step": update, **rows[update]}) + "\n")
    trainer.save_model(str(folder / "policy"))
    before, after = done[0], done[max(done)]
    write_evaluation(folder, before, after)
    return {"before": before.to_json(), "after": after.to_json()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains every arm with every seed of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a finished run of tlcr with PPO")
    parser.add_argument("--arms", nargs="+", default=["grpo-scalar", "grpo-tokens"], choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the run")
    parser.add_argument("--beta", type=float, default=0.05, help="TRL's coefficient of the KL in the loss")
    given = parser.parse_args(arguments)

    def work() -> None:
        run = reopen_run(Path(given.run))
        for seed in given.seeds or run.cfg.seeds:
            for arm in given.arms:
                folder = run.path / "ppo" / arm / f"seed-{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                settings = {"arm": ARMS[arm], "beta": given.beta, "ppo": as_plain(run.cfg.ppo)}
                run.once(folder, settings, partial(train, run, arm, seed, given.beta), record=TRAINED)
                logger.info("%s, seed %s: done", arm, seed)

    return command(work)


if __name__ == "__main__":
    raise SystemExit(main())
