"""Recipe: preference pairs to a policy whose log-ratio is a baseline reward for each token: DPO, implicit rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import RunConfig
from tlcr.models.dpo import LOSSES, ReferencedComparison, collate_referenced, with_reference
from tlcr.recipes.fitting import adapt, encode_splits, fit_and_save, micro_batch_size
from tlcr.text.tokenization import encode_comparisons
from tlcr.training.callbacks import Callback
from tlcr.training.sharding import plan, shard_model
from tlcr.training.supervised import FitResult
from tlcr.types import EncodedComparison, PreferencePair

__all__ = ["train_dpo"]


def train_dpo(
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
    """Trains a causal LM by direct preference optimisation; the reference is the model before training.

    The loss of a batch is the mean over its pairs of -log sigmoid(r_chosen - r_rejected), where
    r = cfg.dpo.beta * (log pi(answer | prompt) - log pi_ref(answer | prompt)), in nats. With ``cfg.dpo.loss``
    "outcomes" it is the mean over its answers of -log sigmoid(r) for a chosen and -log sigmoid(-r) for a rejected one.
    Source: Rafailov et al. 2023, eq. 7; Yuan et al. 2024 (implicit process rewards, arXiv 2412.01981); as a reward for
    each token: Zhong et al. 2024 (RTO, arXiv 2404.18922), Cui et al. 2025 (PRIME, arXiv 2502.01456).

    Args:
        cfg: its ``dpo`` section says by which loss, how long and how fast; ``data`` how texts are cut; ``seed`` orders
            the pairs; ``sharding`` whether the model is cut into shards.
        model: a causal LM, trained in place; in shards afterwards where it is cut.
        tokenizer: the model's.
        train: pairs of a chosen and a rejected answer to a prompt.
        held_out: pairs to evaluate on: loss, accuracy, margin and both rewards. May be empty.
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
    # 1. both answers to each prompt, tokenised in context
    encode = partial(encode_comparisons, tokenizer, data=cfg.data)
    splits = encode_splits(encode, train, held_out, model=model, length=_length, limits=cfg.data, stage="DPO")

    # 2. with an adapter, which changes nothing before the first step, and in shards where the config asks for them; and
    # both answers' log-probabilities under this reference (a resumed run loads its weights later)
    adapt(cfg, model, "dpo")
    shard_model(model, plan(cfg.sharding))
    train_pairs, held_out_pairs = (
        with_reference(model, pairs, pad_token_id=tokenizer.pad_token_id, batch_size=micro_batch_size(cfg.dpo))
        for pairs in splits
    )

    # 3. maximise the likelihood of the preferences under the log-ratio, evaluate on the held-out pairs, and 4. write a
    # standard model folder
    return fit_and_save(
        cfg,
        cfg.dpo,
        model=model,
        tokenizer=tokenizer,
        train=train_pairs,
        held_out=held_out_pairs,
        collate=partial(collate_referenced, pad_token_id=tokenizer.pad_token_id),
        loss=partial(LOSSES[cfg.dpo.loss], beta=cfg.dpo.beta),
        length=_length,
        folder=folder,
        resume=resume,
        callbacks=callbacks,
        origin=origin,
    )


def _length(pair: EncodedComparison | ReferencedComparison) -> int:
    return pair.length
