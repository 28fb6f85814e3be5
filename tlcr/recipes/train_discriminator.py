"""Recipe: token labels to a trained, calibrated and measured discriminator (paper, 3.2)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import DiscriminatorConfig, RunConfig
from tlcr.errors import DataError
from tlcr.evaluation.discriminator_metrics import (
    Calibration,
    DiscriminatorEvaluation,
    evaluate_predictions,
    fit_temperature,
    pairwise_accuracy,
    plot_reliability,
)
from tlcr.models.bidirectional import make_top_layers_bidirectional
from tlcr.models.discriminator import (
    classify,
    collate_pairs,
    discriminator_loss,
    labels_of,
    predict_tokens,
    score_answers,
    temperature_of,
)
from tlcr.models.loading import check_fits, load_token_classifier, save_model
from tlcr.training.accelerator import open_accelerator
from tlcr.training.callbacks import Callback
from tlcr.training.checkpoint import atomic_write, write_json
from tlcr.training.distributed import on_main_process
from tlcr.training.supervised import FitResult, LossParts, fit
from tlcr.types import LabelledPair, PreferencePair

__all__ = ["TrainedDiscriminator", "train_discriminator"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedDiscriminator:
    """The model, on its device and in evaluation mode, and what is known about it.

    calibration is None where it was switched off; evaluation is None without held-out pairs.
    """

    model: PreTrainedModel
    fit: FitResult
    calibration: Calibration | None
    evaluation: DiscriminatorEvaluation | None

    @property
    def metrics(self) -> dict[str, float]:
        """The held-out metrics that are defined (`evaluate_predictions`), and the temperature."""
        found = {} if self.evaluation is None else self.evaluation.defined
        return {**found, "temperature": temperature_of(self.model)}


def train_discriminator(
    cfg: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    backbone_lm: PreTrainedModel,
    labelled_train: Sequence[LabelledPair],
    labelled_held_out: Sequence[LabelledPair],
    folder: str | Path,
    *,
    preference_held_out: Sequence[PreferencePair] = (),
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> TrainedDiscriminator:
    """Trains a token classifier on a copy of `backbone_lm`'s backbone, calibrates it and measures it.

    Writes to `folder` the model (loads anywhere with `AutoModelForTokenClassification.from_pretrained`, and with its
    bidirectional layers through `load_discriminator`), calibration.json, evaluation.json and reliability.png.
    `preference_held_out` adds the pairwise accuracy of chosen over rejected answers.

    Raises DataError before training where nothing was edited, or calibration is on and nothing is held out.
    """
    settings, folder = cfg.discriminator, Path(folder)
    _check(settings, labelled_train, labelled_held_out)
    sides = [side for pair in (*labelled_train, *labelled_held_out) for side in (pair.rejected, pair.revised)]
    check_fits(backbone_lm, max(len(side.encoded.ids) for side in sides), "an answer with its prompt")

    # 1. the classifier: the backbone of the SFT model under a new head
    model = load_token_classifier(backbone_lm, cfg.model, id2label=labels_of(settings.targets))
    make_top_layers_bidirectional(model, settings.bidirectional_layers)

    # 2. minimise the cross entropy with the labels' targets, both sides of an edit weighing the same
    batch_size = 2 * (settings.micro_batch_size or settings.batch_size)
    predict = partial(predict_tokens, pad_token_id=tokenizer.pad_token_id, batch_size=batch_size)
    measure = partial(evaluate_predictions, targets=settings.targets)

    def held_out_metrics(model: PreTrainedModel) -> dict[str, float]:
        return measure(predict(model, labelled_held_out), temperature=1.0, calibrated=False).defined

    with open_accelerator(cfg, folder) as accelerator:
        fitted = fit(
            model=model,
            examples=labelled_train,
            collate=partial(collate_pairs, pad_token_id=tokenizer.pad_token_id, targets=settings.targets),
            loss=_loss,
            cfg=settings,
            folder=folder,
            seed=cfg.seed,
            resume=resume,
            evaluate=held_out_metrics if labelled_held_out else None,
            callbacks=callbacks,
            accelerator=accelerator,
            length=lambda pair: max(len(pair.rejected.encoded.ids), len(pair.revised.encoded.ids)),
            config=cfg,
        )

    # 3. one temperature, so that the confidence can be taken at its word
    calibration = evaluation = None
    if labelled_held_out:
        predictions = predict(model, labelled_held_out)
        if settings.calibrate:
            calibration = fit_temperature(predictions, settings.targets)
            model.config.tlcr_temperature = calibration.temperature
            if calibration.at_bound:
                logger.warning(
                    "the discriminator's temperature ended at its bound %.3g: its scores on the %d held-out tokens are "
                    "no better than chance, or perfect; look at evaluation.json before you use it as a reward",
                    calibration.temperature,
                    calibration.tokens,
                )

        # 4. how good it is on edits it has not seen
        evaluation = measure(predictions, temperature=temperature_of(model), calibrated=settings.calibrate)
        if preference_held_out:
            accuracy = _preference_accuracy(model, tokenizer, preference_held_out, cfg, batch_size)
            evaluation.metrics["pairwise_accuracy_preferences"] = accuracy

    # 5. a model folder, with the temperature in its config
    save_model(model, tokenizer, folder)
    on_main_process(partial(_write, folder, calibration, evaluation))
    return TrainedDiscriminator(model, fitted, calibration, evaluation)


def _check(
    settings: DiscriminatorConfig, labelled_train: Sequence[LabelledPair], labelled_held_out: Sequence[LabelledPair]
) -> None:
    edited = any(any(side.labels) for pair in labelled_train for side in (pair.rejected, pair.revised))
    if not edited:
        raise DataError(
            f"none of the {len(labelled_train)} training pairs has an edited token, so there is nothing to learn; "
            "check that data.edits names pairs of a rejected answer and its revision that differ"
        )
    if settings.calibrate and not labelled_held_out:
        raise DataError(
            "discriminator.calibrate is on, but no pair is held out to fit the temperature on; set data.held_out above "
            "0, bring more edits, or set discriminator.calibrate to false"
        )


def _loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> LossParts:
    """The loss of one micro-batch and, as a statistic, the share of edited tokens on the right side of 0."""
    logits_BLC = classify(model, batch["ids"], batch["attention_mask"])
    total, weight = discriminator_loss(logits_BLC, batch["labels"], batch["weights"])
    edited_BL = (batch["weights"] > 0) & (batch["labels"] != 0)
    margin_N = (logits_BLC[..., -1] - logits_BLC[..., 0])[edited_BL]
    right = (margin_N * batch["labels"][edited_BL] > 0).sum()
    return LossParts(total, weight, {"accuracy_edited": (right, edited_BL.sum())})


def _preference_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    cfg: RunConfig,
    batch_size: int,
) -> float | None:
    answers = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    scores = score_answers(
        model,
        tokenizer,
        answers,
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        max_answer_tokens=cfg.data.max_answer_tokens,
        batch_size=batch_size,
    )
    means = [score.mean_reward for score in scores]
    return pairwise_accuracy(means[0::2], means[1::2])


def _write(folder: Path, calibration: Calibration | None, evaluation: DiscriminatorEvaluation | None) -> None:
    if calibration is not None:
        write_json(folder / "calibration.json", asdict(calibration))
    if evaluation is not None:
        report: dict[str, Any] = evaluation.to_json()
        write_json(folder / "evaluation.json", report)
        with atomic_write(folder / "reliability.png") as aside:
            plot_reliability(evaluation.reliability, aside)
