"""Trainings of tiny models whose allocations are counted, for the tests of estimates."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerBase

from benchmarks.clocks import allocations
from tlcr.config.loading import load_config
from tlcr.config.schema import RunConfig
from tlcr.data.splits import Split
from tlcr.experiment.architecture import Architecture, Machine, build_on_meta
from tlcr.experiment.arm import _Evaluation
from tlcr.experiment.frozen_models import FrozenModels
from tlcr.experiment.memory import Estimate, estimate_run
from tlcr.models.actor_critic import ActorCritic, build_value_model
from tlcr.models.loading import load_causal_lm
from tlcr.models.lora.roles import Roles
from tlcr.recipes.train_ppo import train_ppo
from tlcr.rewards.sources import CallableSource
from tlcr.types import EncodedAnswer

PROMPT, ANSWER, ROWS = 24, 40, 8
CLOSE = 0.05


def measured(train: Callable[[], object], *models: nn.Module) -> int:
    """The bytes of the models, and the largest sum of what torch's CPU allocator gave and did not take back."""
    own = {id(parameter): parameter.nbytes for model in models for parameter in model.parameters()}  # some are shared
    gc.collect()  # what an earlier test left is not to be taken back while this is measured
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        train()
    return sum(own.values()) + max(itertools.accumulate(allocations(recorded), initial=0))


def config(folder: Path, changes: dict[str, Any]) -> RunConfig:
    return load_config(
        None,
        {
            "model.path": str(folder),
            "data.max_prompt_tokens": PROMPT,
            "data.max_answer_tokens": ANSWER,
            "rollout.max_new_tokens": ANSWER,
            **changes,
        },
    )


def estimate(cfg: RunConfig, stage: str) -> Estimate:
    estimates = estimate_run(cfg, Architecture(build_on_meta(cfg.model)), Machine(gpu=False))
    return next(estimate for estimate in estimates if estimate.stage == stage)


def answers(count: int) -> list[EncodedAnswer]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 400, (count, PROMPT + ANSWER), generator=generator).tolist()
    # One is shorter: a batch without padding would need no mask.
    return [EncodedAnswer(tuple(row[: len(row) - (n == 1)]), PROMPT, True) for n, row in enumerate(ids)]


PPO = {
    "reward.kind": "callable",
    "reward.callable": "tests.ppo.helpers:reward_low_ids",
    "ppo.updates": 2,
    "ppo.batch_size": 2 * ROWS,
    "ppo.minibatch_size": ROWS,
    "ppo.save_every": 0,
    "evaluation.prompts": ROWS,
}


def peak_of_ppo(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> int:
    """What a whole run takes at its peak, on this process, with its evaluations."""
    if cfg.lora.trains("policy"):
        roles = Roles(load_causal_lm(cfg.model), cfg.lora, seed=0)
        policy, reference, value_model = roles.policy, roles.reference, roles.classifier("value", {0: "value"})
    else:
        policy, reference = load_causal_lm(cfg.model), load_causal_lm(cfg.model)
        value_model = build_value_model(cfg.ppo, cfg.model, policy=policy)
    actor_critic = ActorCritic(policy, value_model, chunk_tokens=cfg.ppo.chunk_tokens)
    # What is written at the end, merged or gathered, is made in the host's memory, whatever device the run is on.
    actor_critic.save = lambda *_: None  # type: ignore[method-assign]
    prompts = [tokenizer.decode(answer.ids[:PROMPT]) for answer in answers(max(2 * ROWS, cfg.evaluation.prompts))]
    run: Any = SimpleNamespace(
        cfg=cfg, tokenizer=tokenizer, embedded=False, prompts=Split(prompts, prompts[: cfg.evaluation.prompts])
    )
    evaluation = _Evaluation(run, cfg, FrozenModels(), reference, 0, folder)
    given = {
        "actor_critic": actor_critic,
        "reference": reference,
        "tokenizer": tokenizer,
        "reward_source": CallableSource(str(cfg.reward.callable)),
        "prompts": prompts[: 2 * ROWS],
        "evaluate": lambda actor_critic, _: evaluation(actor_critic).metrics(),
        "folder": folder,
        "seed": 0,
    }
    return measured(lambda: train_ppo(cfg, **given), actor_critic, reference)
