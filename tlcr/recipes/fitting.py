"""What the supervised recipes share: examples that fit the model, the fit with its tracker, and the model folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import Adapted, RunConfig, TrainingConfig
from tlcr.models.lora.adapters import add_adapter
from tlcr.models.lora.files import save_trained
from tlcr.models.positions import DATA_LIMITS, check_fits
from tlcr.text.truncation import Limits, note_cuts
from tlcr.training.accelerator import open_accelerator
from tlcr.training.callbacks import Callback
from tlcr.training.supervised import Batch, FitResult, Loss, fit, mean_loss
from tlcr.types import EncodedAnswer, EncodedComparison, PreferencePair

E = TypeVar("E")
T = TypeVar("T", bound=EncodedAnswer | EncodedComparison)


def encode_splits(
    encode: Callable[[Sequence[PreferencePair]], list[T]],
    train: Sequence[PreferencePair],
    held_out: Sequence[PreferencePair],
    *,
    model: PreTrainedModel,
    length: Callable[[T], int],
    limits: Limits,
    stage: str,
) -> tuple[list[T], list[T]]:
    """Both splits as token ids; logs what the limits cut, under the stage's name. Raises DataError where an example is
    longer than ``model`` can read."""
    trained, kept = encode(train), encode(held_out)
    answers = [(e,) if isinstance(e, EncodedAnswer) else (e.chosen, e.rejected) for e in (*trained, *kept)]
    note_cuts(zip([pair.prompt for pair in (*train, *held_out)], answers, strict=True), limits, stage=stage)
    check_lengths(model, [length(example) for example in (*trained, *kept)])
    return trained, kept


def check_lengths(model: PreTrainedModel, lengths: Sequence[int]) -> None:
    """Raises DataError where an answer with its prompt, of one of these numbers of tokens, is longer than ``model``
    can read."""
    check_fits(model, max(lengths, default=0), "an answer with its prompt", DATA_LIMITS)


def adapt(cfg: RunConfig, model: PreTrainedModel, name: Adapted) -> None:
    """Puts an adapter on the model, in place, where ``cfg.lora`` says that it is trained by one."""
    if cfg.lora.trains(name):
        add_adapter(model, cfg.lora, name, seed=cfg.seed)


def micro_batch_size(settings: TrainingConfig) -> int:
    """How many examples one forward pass takes, in training and in evaluation."""
    return settings.micro_batch_size or settings.batch_size


def fit_tracked(
    cfg: RunConfig,
    settings: TrainingConfig,
    *,
    model: PreTrainedModel,
    examples: Sequence[E],
    collate: Callable[[Sequence[E]], Batch],
    loss: Loss,
    length: Callable[[E], int],
    evaluate: Callable[[PreTrainedModel], Mapping[str, float]] | None,
    folder: str | Path,
    resume: bool,
    callbacks: Sequence[Callback],
    origin: Mapping[str, Any] | None = None,
) -> FitResult:
    """``fit`` by one section of a run's config, under the run's tracker."""
    with open_accelerator(cfg, folder) as accelerator:
        return fit(
            model=model,
            examples=examples,
            collate=collate,
            loss=loss,
            cfg=settings,
            folder=folder,
            seed=cfg.seed,
            resume=resume,
            evaluate=evaluate,
            callbacks=callbacks,
            accelerator=accelerator,
            length=length,
            config=cfg,
            origin=origin,
        )


def fit_and_save(
    cfg: RunConfig,
    settings: TrainingConfig,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[E],
    held_out: Sequence[E],
    collate: Callable[[Sequence[E]], Batch],
    loss: Loss,
    length: Callable[[E], int],
    folder: str | Path,
    resume: bool,
    callbacks: Sequence[Callback],
    origin: Mapping[str, Any] | None = None,
    further: Callable[[Mapping[str, float]], Mapping[str, float]] = lambda figures: {},
) -> FitResult:
    """Minimises ``loss`` over ``train``, evaluates it on ``held_out``, and writes a standard model folder.

    An adapter is merged into it. further: computes further figures from the loss and its statistics.
    """

    def held_out_loss(model: PreTrainedModel) -> dict[str, float]:
        figures = mean_loss(model, held_out, collate=collate, loss=loss, batch_size=micro_batch_size(settings))
        return {**figures, **further(figures)}

    result = fit_tracked(
        cfg,
        settings,
        model=model,
        examples=train,
        collate=collate,
        loss=loss,
        length=length,
        evaluate=held_out_loss if held_out else None,
        folder=folder,
        resume=resume,
        callbacks=callbacks,
        origin=origin,
    )
    save_trained(model, tokenizer, folder)
    return result
