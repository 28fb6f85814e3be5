"""Recipe: preferred answers to a supervised fine-tuned policy."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import RunConfig
from tlcr.models.sft import completion_loss
from tlcr.recipes.fitting import adapt, encode_splits, fit_and_save
from tlcr.text.padding import collate_completions
from tlcr.text.tokenization import encode_answers
from tlcr.training.callbacks import Callback
from tlcr.training.sharding import plan, shard_model
from tlcr.training.supervised import FitResult
from tlcr.types import EncodedAnswer, PreferencePair

__all__ = ["train_sft"]

LARGEST_LOSS = math.log(sys.float_info.max)
"""Nats per token, of which the perplexity is still a number."""


def train_sft(
    cfg: RunConfig,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[PreferencePair],
    held_out: Sequence[PreferencePair],
    folder: str | Path,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    origin: Mapping[str, Any] | None = None,
) -> FitResult:
    """Trains a causal LM on the chosen answers: the policy that every later stage starts from.

    The loss of a batch is the mean of -log p(token) in nats over all its answer tokens; prompt tokens have no loss.
    Source: supervised fine-tuning as in Ouyang et al. 2022 (InstructGPT), 3.5; the mean over tokens is ours.

    Args:
        cfg: its ``sft`` section says how long and how fast; ``data`` how texts are cut; ``seed`` orders the examples;
            ``sharding`` whether the model is cut into shards.
        model: a causal LM, trained in place; in shards afterwards where it is cut.
        tokenizer: the model's.
        train: pairs; only the prompt and the chosen answer are used.
        held_out: pairs to evaluate on: loss, and perplexity = exp(loss). May be empty.
        folder: gets ``metrics.jsonl`` and ``checkpoints/`` while training, then the model with its tokenizer.
        resume: continue from the newest checkpoint in ``folder``; bit for bit on one process on the CPU.
        callbacks: told of every step, evaluation and checkpoint.
        origin: names what ``model`` is and how it was read: a checkpoint of another origin, as of other examples, is
            refused. None: the examples alone are compared.

    Returns:
        How the training ended: steps, metrics of the last one, the last evaluation, seconds.

    Raises:
        DataError: there is no pair to train on, or an answer with its prompt is longer than the model can read.
        ConfigError: the tracker is not installed, or the launcher asks for another kind of parallelism.
        CheckpointError: there is a checkpoint but ``resume`` is False, or it belongs to another run; the disk is full.
        TrainingDiverged: a loss or a gradient is not finite; the state before that step is saved.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, with the state saved.
    """
    # 1. prompt and preferred answer as one text; an answer that was not cut ends with the end-of-sequence token
    encode, length = partial(_encode, tokenizer=tokenizer, cfg=cfg), _length
    train_answers, held_out_answers = encode_splits(
        encode, train, held_out, model=model, length=length, limits=cfg.data, stage="SFT"
    )

    # 2. adapters instead of all weights, and one shard for each process, where the config asks for them
    adapt(cfg, model, "sft")
    shard_model(model, plan(cfg.sharding))

    # 3. maximise the likelihood of the answers, evaluate on the held-out pairs, and 4. write a standard model folder
    return fit_and_save(
        cfg,
        cfg.sft,
        model=model,
        tokenizer=tokenizer,
        train=train_answers,
        held_out=held_out_answers,
        collate=partial(collate_completions, pad_token_id=tokenizer.pad_token_id),
        loss=completion_loss,
        length=length,
        further=_perplexity,
        folder=folder,
        resume=resume,
        callbacks=callbacks,
        origin=origin,
    )


def _encode(pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, cfg: RunConfig) -> list[EncodedAnswer]:
    return encode_answers(
        tokenizer,
        [pair.prompt for pair in pairs],
        [pair.chosen for pair in pairs],
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        max_answer_tokens=cfg.data.max_answer_tokens,
    )


def _length(answer: EncodedAnswer) -> int:
    return len(answer.ids)


def _perplexity(figures: Mapping[str, float]) -> dict[str, float]:
    loss = figures["loss"]
    return {"perplexity": math.inf if loss > LARGEST_LOSS else math.exp(loss)}
