"""PPO rounds of the task with tlcr; started by `benchmarks.ppo_step`."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["TLCR_PROGRESS"] = "0"
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import tlcr
from benchmarks.ppo_step.journal import Journal
from benchmarks.ppo_step.profiling import Profile
from benchmarks.ppo_step.task import PHASES, Task, causal_lm, device, prompts_of, tokenizer_of
from tlcr.config.schema import DataConfig, KLConfig, ModelConfig, PPOConfig, RewardConfig, RolloutConfig, RunConfig
from tlcr.models.actor_critic import ActorCritic, build_value_model
from tlcr.models.inspection import TWO_CLASSES, attention_for
from tlcr.models.layers import fuse_layers
from tlcr.models.loading import load_causal_lm, load_token_classifier
from tlcr.models.preparing import disable_dropout
from tlcr.recipes.train_ppo import train_ppo
from tlcr.rewards.sources import DiscriminatorSource, FrozenModel
from tlcr.training.callbacks import Callback


def model_config(task: Task) -> ModelConfig:
    return ModelConfig(path=task.model or "", dtype=task.dtype)


def load_with_tlcr(task: Task) -> PreTrainedModel:
    return load_causal_lm(model_config(task), device=device())


def policy_of(task: Task, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A causal language model as tlcr loads it; to one with random weights the same is done."""
    model = causal_lm(task, tokenizer, load_with_tlcr)
    if task.model is None:
        disable_dropout(model)
        fuse_layers(model)
        model.set_attn_implementation(attention_for(model_config(task), type(model), model.config))
    return model


class AllDone(Exception):
    """Ends the training before it writes its models, which nobody asked for."""


class Rounds(Callback):
    """Notes every round, lets the profile see the one after the last that counts, and then ends."""

    def __init__(self, task: Task, journal: Journal, profile: Profile | None) -> None:
        self._task, self._journal, self._profile = task, journal, profile

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        if metrics["length/tokens"] != self._task.response_tokens_per_round:
            wanted = self._task.response_tokens_per_round
            raise SystemExit(f"{metrics['length/tokens']} response tokens, wanted {wanted}")
        if step <= self._task.rounds:
            self._journal.round({name: metrics[f"time/{name}_s"] for name in (*PHASES, "total")})
        if step == self._task.rounds and self._profile is not None:
            self._profile.start()
        elif step >= self._task.rounds:
            if self._profile is not None:
                self._profile.end()
            raise AllDone


class PhasesTo(logging.Handler):
    """Hears of each phase as it ends."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(logging.DEBUG)
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and len(record.args) == 2:
            name, seconds = record.args
            assert isinstance(seconds, float)
            self._journal.phase(str(name), seconds)


def main() -> None:
    warnings.simplefilter("ignore")
    task, path = Task.from_argv()
    journal = Journal(path)
    journal.note("imported")
    phases = logging.getLogger("tlcr.ppo.metrics")
    phases.setLevel(logging.DEBUG)
    phases.addHandler(PhasesTo(journal))
    torch.set_num_threads(task.threads)
    with journal.making("tokenizer and prompts"):
        tokenizer = tokenizer_of(task)
        prompts = prompts_of(task, tokenizer, task.batch)
    with journal.making("policy and reference"):
        policy, reference = (policy_of(task, tokenizer) for _ in range(2))
    # Commits that `benchmarks.compare` measures may be older than the knob.
    engine: dict[str, Any] = {} if task.engine == "generate" else {"engine": task.engine}
    cfg = RunConfig(
        model=model_config(task),
        data=DataConfig(max_prompt_tokens=task.prompt_tokens),
        rollout=RolloutConfig(max_new_tokens=task.response_tokens, batch_size=task.batch, **engine),
        reward=RewardConfig(kind="continuous"),
        kl=KLConfig(coef=0.05),
        ppo=PPOConfig(
            updates=task.rounds + 1,
            batch_size=task.batch,
            minibatch_size=task.minibatch,
            micro_batch_size=task.micro_batch,
            epochs=task.epochs,
            value_model=task.value_model,
            save_every=0,
        ),
    )
    with journal.making("value model and discriminator"):
        value_model = build_value_model(cfg.ppo, cfg.model, policy=policy)
        discriminator = load_token_classifier(policy, cfg.model, id2label=TWO_CLASSES)
    frozen = FrozenModel(discriminator, tokenizer, tokenizer, task.prompt_tokens, task.batch)
    profile = None if task.profile is None else Profile(Path(task.profile))
    with tempfile.TemporaryDirectory() as folder:
        try:
            train_ppo(
                cfg,
                actor_critic=ActorCritic(policy, value_model),
                reference=reference.eval(),
                tokenizer=tokenizer,
                reward_source=DiscriminatorSource(frozen),
                prompts=prompts,
                folder=Path(folder),
                seed=0,
                callbacks=[Rounds(task, journal, profile)],
            )
        except AllDone:
            journal.note("end", versions={"tlcr": tlcr.__version__, "torch": torch.__version__})


if __name__ == "__main__":
    main()
