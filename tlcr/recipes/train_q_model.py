"""Recipe: preference pairs to a token-level Q function (Q-RM), a rival of the discriminator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import RunConfig
from tlcr.models.loading import load_sequence_classifier
from tlcr.models.q_model import collate_answers, q_loss
from tlcr.recipes.fitting import adapt, encode_splits, fit_and_save
from tlcr.text.tokenization import encode_comparisons
from tlcr.training.callbacks import Callback
from tlcr.training.sharding import plan, shard_model
from tlcr.training.supervised import FitResult
from tlcr.types import EncodedComparison, PreferencePair

__all__ = ["train_q_model"]


def train_q_model(
    cfg: RunConfig,
    *,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[PreferencePair],
    held_out: Sequence[PreferencePair],
    folder: str | Path,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    origin: Mapping[str, Any] | None = None,
) -> FitResult:
    """Trains a value Z(s_t, a_t) of every token on a copy of a causal LM's backbone, from comparisons of answers alone.

    The loss of a batch is the mean over its pairs of -log sigmoid(beta * (mean of Z over the chosen answer's tokens -
    mean of Z over the rejected one's) - margin). Source: Q-RM (Chen et al. 2025, arXiv 2505.23363), by its released
    code. ``load_sequence_classifier(folder, cfg.model)`` loads the result.

    Args:
        cfg: its ``q_model`` section has beta, margin, how long and how fast; ``data`` how texts are cut; ``model`` how
            the classifier is loaded; ``seed`` orders the pairs; ``sharding`` whether it is cut into shards.
        backbone: a causal LM, the SFT model's in the paper, whose layers are copied; it stays as it is.
        tokenizer: the backbone's.
        train: pairs of a chosen and a rejected answer to a prompt.
        held_out: pairs to evaluate on: loss, accuracy and margin of the means. May be empty.
        folder: gets ``metrics.jsonl`` and ``checkpoints/`` while training, then the model with its tokenizer.
        resume: continue from the newest checkpoint in ``folder``; bit for bit on one process on the CPU.
        callbacks: told of every step, evaluation and checkpoint.
        origin: names what ``backbone`` is and how it was read: a checkpoint of another origin, as of other examples, is
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
    # 1. both answers to each prompt, tokenised in context
    encode = partial(encode_comparisons, tokenizer, data=cfg.data)
    train_pairs, held_out_pairs = encode_splits(
        encode, train, held_out, model=backbone, length=_length, limits=cfg.data, stage="Q model"
    )

    # 2. the classifier: the causal LM's backbone under one output; in shards where the config asks for them
    model = load_sequence_classifier(backbone, cfg.model)
    model.config.pad_token_id = tokenizer.pad_token_id
    adapt(cfg, model, "q_model")
    shard_model(model, plan(cfg.sharding))

    # 3. maximise the likelihood of the preferences under the means, evaluate on the held-out pairs, and 4. write a
    # standard model folder
    return fit_and_save(
        cfg,
        cfg.q_model,
        model=model,
        tokenizer=tokenizer,
        train=train_pairs,
        held_out=held_out_pairs,
        collate=partial(collate_answers, pad_token_id=tokenizer.pad_token_id),
        loss=partial(q_loss, beta=cfg.q_model.beta, margin=cfg.q_model.margin),
        length=_length,
        folder=folder,
        resume=resume,
        callbacks=callbacks,
        origin=origin,
    )


def _length(pair: EncodedComparison) -> int:
    return pair.length
