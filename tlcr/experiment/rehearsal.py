"""A config made small enough for a CPU: the same stages, models of the same architecture and the same settings, on data
of the embedded task, one optimiser step each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from tlcr.config.schema import Arm, RefreshConfig, ReviserConfig, RewardConfig, RunConfig, TrainingConfig
from tlcr.config.trials import arms_of
from tlcr.data import embedded
from tlcr.models.miniature import miniature
from tlcr.models.saving import save_model

__all__ = ["in_small", "processes_in_small"]

PAIRS = 48
HELD_OUT = 0.2
PROMPT, ANSWER, NEW, CHUNK, RANK = 32, 24, 8, 32, 4
SUPERVISED = ("sft", "reward_model", "q_model", "dpo", "discriminator")
OF_A_GROUP = 2
"""Processes among which a model is cut, and groups of ``hybrid``: the fewest that exchange anything."""


def processes_in_small(cfg: RunConfig, gpus: int) -> tuple[int, int]:
    """How many processes rehearse a run on ``gpus`` GPUs, and how many of them stand for one node."""
    if gpus == 1:
        return 1, 1
    return (2 * OF_A_GROUP, OF_A_GROUP) if cfg.sharding.kind == "hybrid" else (OF_A_GROUP, OF_A_GROUP)


def in_small(cfg: RunConfig, model: PreTrainedConfig, folder: Path, *, processes: int) -> RunConfig:
    """Writes a small model and data into a folder, and returns the config of the rehearsal.

    What decides which code runs stays: stages, rewards, dtype, adapters, sharding, checkpointing of gradients, pieces
    of batches and logits, packing, checkpoints. What only decides how long it takes becomes small. Models that the
    config names as trained ones are trained here too. The reviser is left out: its edits are there.

    Args:
        cfg: the run.
        model: the config of its model.
        folder: where the rehearsal writes.
        processes: that share it.

    Returns:
        The config; its ``output_dir`` is in the folder.
    """
    tokenizer = embedded.build_tokenizer(cfg.seed)
    save_model(miniature(model, tokenizer, seed=cfg.seed), tokenizer, folder / "model")
    preferences, edits = embedded.generate_pairs(PAIRS, cfg.seed)
    pairs = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in preferences]
    _write(folder / "preferences.jsonl", pairs)
    _write(folder / "edits.jsonl", [{"prompt": e.prompt, "rejected": e.rejected, "revised": e.revised} for e in edits])
    ppo, rollout = cfg.ppo, cfg.rollout
    minibatch, new_tokens = 2 * processes, min(rollout.max_new_tokens, NEW)
    small: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "seeds": cfg.seeds[:1],
        "models_per_seed": False,
        "kl_coefs": (),
        "tracker": "none",
        "parallel": 1,
        "reward": _small_reward(cfg.reward, new_tokens),
        "arms": _arms(cfg, new_tokens),
        "model": replace(
            cfg.model.saved_in(folder / "model"),
            attn_implementation="eager" if cfg.model.attn_implementation == "eager" else "auto",
            trust_remote_code=False,
        ),
        "lora": replace(cfg.lora, rank=None if cfg.lora.rank is None else min(cfg.lora.rank, RANK)),
        "sharding": replace(cfg.sharding, replicas=None),
        "data": replace(
            cfg.data,
            preferences=str(folder / "preferences.jsonl"),
            preferences_format="auto",
            edits=str(folder / "edits.jsonl"),
            edits_format="auto",
            prompts=None,
            limit=None,
            held_out=HELD_OUT,
            shares=(),
            max_prompt_tokens=min(cfg.data.max_prompt_tokens, PROMPT),
            max_answer_tokens=min(cfg.data.max_answer_tokens, ANSWER),
        ),
        "reviser": ReviserConfig(),
        "rollout": replace(
            rollout,
            engine="paged" if rollout.engine == "paged" else "generate",
            server=(),
            ahead=0,
            environment=None,
            max_new_tokens=new_tokens,
            batch_size=min(rollout.batch_size, minibatch),
        ),
        "ppo": replace(
            ppo,
            updates=1,
            warmup_updates=0,
            value_warmup_updates=0,
            epochs=1,
            batch_size=minibatch,
            minibatch_size=minibatch,
            micro_batch_size=None if ppo.micro_batch_size is None else 1,
            chunk_tokens=None if ppo.chunk_tokens is None else min(ppo.chunk_tokens, CHUNK),
            save_every=min(ppo.save_every, 1),
            evaluate_every=1 if ppo.keep_best else 0,
        ),
        "evaluation": replace(cfg.evaluation, prompts=minibatch, samples=1, scorer=None),
        **{name: _one_step(getattr(cfg, name)) for name in SUPERVISED},
    }
    small["discriminator"] = replace(
        small["discriminator"], bidirectional_layers=min(cfg.discriminator.bidirectional_layers, 1)
    )
    return replace(cfg, **small)


def _one_step(cfg: TrainingConfig) -> TrainingConfig:
    """The whole data as one batch, in pieces where the stage takes pieces."""
    trained_elsewhere: dict[str, Any] = {"path": None} if hasattr(cfg, "path") else {}
    return replace(
        cfg,
        epochs=1,
        batch_size=PAIRS,
        micro_batch_size=None if cfg.micro_batch_size is None else PAIRS // 4,
        save_every=min(cfg.save_every, 1),
        evaluate_every=0,
        **trained_elsewhere,
    )


def _small_reward(reward: RewardConfig, new_tokens: int) -> RewardConfig:
    """Without a refresh, which asks a reviser, and for answers of at most so many tokens."""
    buffer = None if reward.overlong_buffer is None else min(reward.overlong_buffer, new_tokens)
    return replace(reward, refresh=RefreshConfig(), overlong_buffer=buffer)


def _arms(cfg: RunConfig, new_tokens: int) -> tuple[Arm, ...]:
    """One arm for each set of models that the rewards ask."""
    kept: dict[object, Arm] = {}
    for arm in arms_of(cfg):
        asked = cfg.uses_discriminator, cfg.uses_reward_model, cfg.uses_q_model, cfg.uses_dpo
        reward = _small_reward(arm.reward, new_tokens)
        kept.setdefault((*(uses(reward) for uses in asked), reward.compat), replace(arm, reward=reward, kl_coefs=()))
    return tuple(kept.values())


def _write(path: Path, records: Iterable[object]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
