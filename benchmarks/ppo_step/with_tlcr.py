"""PPO rounds of the task with tlcr; started by `benchmarks.ppo_step`."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

os.environ["TLCR_PROGRESS"] = "0"
import torch
from transformers import PreTrainedModel

import tlcr
from benchmarks.ppo_step.task import PHASES, Task, causal_lm, prompts_of, tokenizer_of, write_result
from tlcr.config.schema import DataConfig, KLConfig, ModelConfig, PPOConfig, RewardConfig, RolloutConfig, RunConfig
from tlcr.models.actor_critic import ActorCritic, build_value_model
from tlcr.models.loading import TWO_CLASSES, load_causal_lm, load_token_classifier
from tlcr.recipes.train_ppo import train_ppo
from tlcr.rewards.sources import DiscriminatorSource, FrozenModel
from tlcr.training.metrics import read_metrics


def model_config(task: Task) -> ModelConfig:
    return ModelConfig(path=task.model or "", dtype=task.dtype)


def load_with_tlcr(task: Task) -> PreTrainedModel:
    return load_causal_lm(model_config(task))


def main() -> None:
    warnings.simplefilter("ignore")
    task, result = Task.from_argv()
    torch.set_num_threads(task.threads)
    tokenizer = tokenizer_of(task)
    policy, reference = (causal_lm(task, tokenizer, load_with_tlcr) for _ in range(2))
    separate = task.value_model == "separate"
    cfg = RunConfig(
        model=model_config(task),
        data=DataConfig(max_prompt_tokens=task.prompt_tokens),
        rollout=RolloutConfig(max_new_tokens=task.response_tokens, batch_size=task.batch),
        reward=RewardConfig(kind="continuous"),
        kl=KLConfig(coef=0.05),
        ppo=PPOConfig(
            updates=task.rounds,
            batch_size=task.batch,
            minibatch_size=task.minibatch,
            micro_batch_size=task.micro_batch,
            epochs=task.epochs,
            value_model="separate" if separate else "shared",
            save_every=0,
        ),
    )
    value_model = build_value_model(cfg.ppo, cfg.model, policy=policy)
    discriminator = load_token_classifier(policy, cfg.model, id2label=TWO_CLASSES)
    frozen = FrozenModel(discriminator, tokenizer, tokenizer, task.prompt_tokens, task.batch)
    with tempfile.TemporaryDirectory() as folder:
        train_ppo(
            cfg,
            actor_critic=ActorCritic(policy, value_model),
            reference=reference.eval(),
            tokenizer=tokenizer,
            reward_source=DiscriminatorSource(frozen),
            prompts=prompts_of(task, tokenizer, task.batch),
            folder=Path(folder),
            seed=0,
        )
        logged = [row for row in read_metrics(Path(folder) / "metrics.jsonl") if "time/total_s" in row]
    for row in logged:
        if row["length/tokens"] != task.response_tokens_per_round:
            raise SystemExit(f"{row['length/tokens']} response tokens, wanted {task.response_tokens_per_round}")
    rounds = [{name: row[f"time/{name}_s"] for name in (*PHASES, "total")} for row in logged]
    versions = {"tlcr": tlcr.__version__, "torch": torch.__version__}
    write_result(result, rounds, versions)


if __name__ == "__main__":
    main()
