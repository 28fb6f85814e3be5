"""Estimated peaks against what torch's CPU allocator gave to whole trainings of tiny models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.experiment.measured import ANSWER, CLOSE, PPO, PROMPT, ROWS, answers, config, estimate, measured, peak_of_ppo
from tlcr.config.schema import RunConfig
from tlcr.experiment.architecture import build_on_meta
from tlcr.experiment.simulation import Simulator, Step, forward, processes_in_name
from tlcr.models.actor_critic import ActorCritic, build_value_model
from tlcr.models.discriminator import classify
from tlcr.models.inspection import TWO_CLASSES
from tlcr.models.loading import load_causal_lm, load_sequence_classifier, load_token_classifier
from tlcr.models.lora.roles import Roles
from tlcr.models.reward_model import bradley_terry_loss, collate_comparisons
from tlcr.models.sft import completion_loss
from tlcr.text.padding import collate_completions
from tlcr.training.sharding import shard
from tlcr.training.supervised import LossParts, fit
from tlcr.types import EncodedAnswer, EncodedComparison

UPDATE = Step("policy and values", rows=ROWS, columns=PROMPT + ANSWER, answer=ANSWER)


@pytest.fixture
def folder(tmp_path: Path, tiny_causal_lm: Callable[..., PreTrainedModel], tiny_tokenizer: Any) -> Path:
    path = tmp_path / "model"
    tiny_causal_lm(hidden_size=64, intermediate_size=192, num_hidden_layers=4).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def sft(cfg: RunConfig) -> tuple[PreTrainedModel, dict[str, Any]]:
    examples = {"examples": answers(2 * ROWS), "collate": partial(collate_completions, pad_token_id=0)}
    return load_causal_lm(cfg.model), {**examples, "loss": completion_loss}


def discriminator(cfg: RunConfig) -> tuple[PreTrainedModel, dict[str, Any]]:
    def collate(part: Sequence[EncodedAnswer]) -> dict[str, Tensor]:
        return collate_completions([*part, *part], pad_token_id=0)

    def loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> LossParts:
        return LossParts(classify(model, batch["ids"], batch["attention_mask"]).sum(), 1)

    model = load_token_classifier(load_causal_lm(cfg.model), cfg.model, id2label=TWO_CLASSES)
    return model, {"examples": answers(2 * ROWS), "collate": collate, "loss": loss}


def reward_model(cfg: RunConfig) -> tuple[PreTrainedModel, dict[str, Any]]:
    pairs = [EncodedComparison(one, other) for one, other in itertools.pairwise(answers(2 * ROWS + 1))]
    examples = {"examples": pairs, "collate": partial(collate_comparisons, pad_token_id=0)}
    return load_sequence_classifier(load_causal_lm(cfg.model), cfg.model), {**examples, "loss": bradley_terry_loss}


CHECKPOINTS = {"model.dtype": "bfloat16", "model.gradient_checkpointing": True}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("stage", "prepare", "changes"),
    [
        ("sft", sft, {}),
        ("sft", sft, CHECKPOINTS),
        slow("sft", sft, {"model.dtype": "bfloat16", "sft.micro_batch_size": 2}),
        slow("discriminator", discriminator, {"discriminator.micro_batch_size": 2}),
        slow("discriminator", discriminator, CHECKPOINTS),
        slow("reward model", reward_model, {"model.dtype": "bfloat16"}),
    ],
)
def test_a_supervised_training_takes_what_is_estimated(
    stage: str, prepare: Callable[..., Any], changes: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    section = stage.replace(" ", "_")
    sizes = {f"{section}.batch_size": ROWS, f"{section}.epochs": 1}
    cfg = config(folder, {**sizes, "reward.sequence_coef": 0.1, **changes})
    model, training = prepare(cfg)
    found = measured(
        lambda: fit(model=model, cfg=getattr(cfg, section), folder=tmp_path / "stage", seed=0, **training), model
    )
    assert found == pytest.approx(estimate(cfg, stage).total, rel=CLOSE)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.dtype": "bfloat16"},
        {"ppo.value_model": "shared"},
        {"evaluation.prompts": 64, "ppo.micro_batch_tokens": 10**6, "ppo.micro_batch_size": 2},  # which is the peak
        slow({"ppo.chunk_tokens": 64, **CHECKPOINTS}),
        slow({"ppo.micro_batch_size": 2, "model.dtype": "bfloat16"}),
        slow({"kl.placement": "loss", "kl.estimator": "full"}),
        slow({"ppo.micro_batch_tokens": 10**6, "rollout.batch_size": 4}),
        slow({"ppo.packing": "always"}),
        slow({"lora.rank": 8, "ppo.chunk_tokens": 64, **CHECKPOINTS}),
    ],
)
def test_ppo_takes_what_is_estimated(
    changes: dict[str, Any], folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    cfg = config(folder, {**PPO, **changes})
    found = peak_of_ppo(cfg, tiny_tokenizer, tmp_path / "ppo")
    assert found == pytest.approx(estimate(cfg, "ppo").total, rel=CLOSE)


@pytest.mark.parametrize(
    ("step", "changes", "shards"),
    [
        (UPDATE, {}, (2,)),
        (UPDATE, CHECKPOINTS, (2, 2)),
        (replace(UPDATE, again=True), {"model.dtype": "bfloat16"}, (4,)),
        (replace(UPDATE, trains=False), {}, (2,)),
        (UPDATE, {"lora.rank": 8, **CHECKPOINTS}, (2,)),
        (Step("prompt", rows=ROWS, columns=PROMPT, trains=False), {}, (2,)),
    ],
)
def test_a_step_on_shards_takes_what_is_simulated(
    step: Step, changes: dict[str, Any], shards: tuple[int, ...], folder: Path
) -> None:
    """Real tensors, and other processes in name only: those of gloo free what they exchanged in threads of their own,
    where no profiler looks. What they would have sent is not there, so no number means anything."""
    cfg = config(folder, changes)
    meta = build_on_meta(cfg.model)
    expected = Simulator(meta, cfg.model, for_gpu=False, shards=shards, lora=cfg.lora).peak(step)
    policy = load_causal_lm(cfg.model)
    if cfg.lora.trains("policy"):
        values = Roles(policy, cfg.lora, seed=0).classifier("value", {0: "value"})
    else:
        values = build_value_model(cfg.ppo, cfg.model, policy=policy)
    actor_critic = ActorCritic(policy, values).train(step.trains)
    with processes_in_name(shards, torch.float32) as sharding, torch.set_grad_enabled(step.trains):
        shard(actor_critic, sharding)
        for parameter in actor_critic.parameters() if step.again else ():
            parameter.grad = torch.zeros_like(parameter)
        run = forward(step, actor_critic)

        def take() -> None:
            outputs = run()
            if step.trains:
                torch.stack([output.double().sum() for output in outputs]).sum().backward()

        assert measured(take) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("kind", ["language model", "token classifier", "sequence classifier"])
def test_a_supervised_step_on_shards_is_simulated(kind: str, folder: Path) -> None:
    """Half of what whole models take, and what is gathered of a layer and of embeddings and head."""
    cfg = config(folder, {})
    step = Step(kind, rows=ROWS, columns=PROMPT + ANSWER, answer=ANSWER, again=True)
    model = build_on_meta(cfg.model)
    whole, cut = (Simulator(model, cfg.model, for_gpu=False, shards=shards).peak(step) for shards in (None, (2,)))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert abs(cut - whole) < 1.5 * weights
