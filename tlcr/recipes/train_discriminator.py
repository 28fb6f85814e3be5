"""Recipe: token labels to a trained, calibrated and measured discriminator (paper, 3.2)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
from tlcr.files import atomic_write, write_json
from tlcr.models.bidirectional import make_top_layers_bidirectional
from tlcr.models.discriminator import (
    collate_pairs,
    label_loss,
    labels_of,
    predict_tokens,
    score_answers,
    temperature_of,
)
from tlcr.models.loading import load_token_classifier
from tlcr.models.lora.files import save_trained
from tlcr.recipes.fitting import adapt, check_lengths, fit_tracked, micro_batch_size
from tlcr.text.truncation import note_cuts
from tlcr.training.callbacks import Callback
from tlcr.training.distributed import on_main_process
from tlcr.training.sharding import plan, shard_model
from tlcr.training.supervised import FitResult
from tlcr.types import LabelledPair, PreferencePair

__all__ = ["TrainedDiscriminator", "train_discriminator"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedDiscriminator:
    """The model, on its device and in evaluation mode, with its calibration and evaluation.

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
    *,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[LabelledPair],
    held_out: Sequence[LabelledPair],
    held_out_preferences: Sequence[PreferencePair] = (),
    folder: str | Path,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    origin: Mapping[str, Any] | None = None,
) -> TrainedDiscriminator:
    """Trains a token classifier on a copy of a causal LM's backbone, calibrates it and measures it.

    The loss is the cross entropy of each answer token's classes with the target of its label (positive 1, negative 0,
    neutral 1/2 where ``cfg.discriminator.targets`` is "soft"), the mean over the tokens of either side of an edit, both
    sides with equal weight. Source: the paper, section 3.2; calibration by one temperature (Guo et al. 2017) is ours.

    Args:
        cfg: its ``discriminator`` section says what the targets are, how long and how fast; ``data`` how texts are cut;
            ``model`` how the classifier is loaded; ``seed`` orders the pairs; ``sharding`` whether it is cut into
            shards.
        backbone: a causal LM, the SFT model's in the paper, whose layers are copied; it stays as it is.
        tokenizer: the backbone's.
        train: rejected answers and their revisions, with a label for each token.
        held_out: labelled pairs to fit the temperature on and to measure on. May be empty where
            ``cfg.discriminator.calibrate`` is off.
        held_out_preferences: adds the pairwise accuracy of chosen over rejected answers. May be empty.
        folder: gets ``metrics.jsonl`` and ``checkpoints/`` while training, then the model with its tokenizer (it loads
            anywhere with ``AutoModelForTokenClassification.from_pretrained``, and with its bidirectional layers through
            ``load_discriminator``), calibration.json, evaluation.json and reliability.png.
        resume: continue from the newest checkpoint in ``folder``; bit for bit on one process on the CPU.
        callbacks: told of every step, evaluation and checkpoint.
        origin: names what ``backbone`` is and how it was read: a checkpoint of another origin, as of other examples, is
            refused. None: the examples alone are compared.

    Returns:
        The model, on its device and in evaluation mode, with how its training ended, calibration and evaluation.

    Raises:
        DataError: nothing was edited; calibration is on and nothing is held out; or an answer with its prompt is longer
            than the model can read. All before training.
        ConfigError: the tracker is not installed, or the launcher asks for another kind of parallelism.
        CheckpointError: there is a checkpoint but ``resume`` is False, or it belongs to another run; the disk is full.
        TrainingDiverged: a loss or a gradient is not finite; the state before that step is saved.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, with the state saved.
    """
    settings, folder = cfg.discriminator, Path(folder)
    _check(settings, train, held_out)
    check_lengths(backbone, [_length(pair) for pair in (*train, *held_out)])

    # 1. the classifier: the backbone of the SFT model under a new head; in shards where the config asks for them
    model = load_token_classifier(backbone, cfg.model, id2label=labels_of(settings.targets))
    make_top_layers_bidirectional(model, settings.bidirectional_layers)
    adapt(cfg, model, "discriminator")
    shard_model(model, plan(cfg.sharding))

    # 2. minimise the cross entropy with the labels' targets, both sides of an edit with equal weight
    batch_size = 2 * micro_batch_size(settings)
    predict = partial(predict_tokens, pad_token_id=tokenizer.pad_token_id, batch_size=batch_size)
    measure = partial(evaluate_predictions, targets=settings.targets)

    def held_out_metrics(model: PreTrainedModel) -> dict[str, float]:
        return measure(predict(model, held_out), temperature=1.0, calibrated=False).defined

    fitted = fit_tracked(
        cfg,
        settings,
        model=model,
        examples=train,
        collate=partial(collate_pairs, pad_token_id=tokenizer.pad_token_id, targets=settings.targets),
        loss=label_loss,
        length=_length,
        evaluate=held_out_metrics if held_out else None,
        folder=folder,
        resume=resume,
        callbacks=callbacks,
        origin=origin,
    )

    # 3. calibrate: fit one temperature
    calibration = evaluation = None
    if held_out:
        predictions = predict(model, held_out)
        if settings.calibrate:
            calibration = fit_temperature(predictions, settings.targets)
            model.config.tlcr_temperature = calibration.temperature
            if calibration.at_bound:
                logger.warning(
                    "the discriminator's temperature ended at its bound %.3g: its scores on the %d held-out tokens are "
                    "no better than chance, or perfect; look at %s before you use it as a reward",
                    calibration.temperature,
                    calibration.tokens,
                    Path(folder) / "evaluation.json",
                )

        # 4. evaluate on held-out edits
        evaluation = measure(predictions, temperature=temperature_of(model), calibrated=settings.calibrate)
        if held_out_preferences:
            accuracy = _preference_accuracy(model, tokenizer, held_out_preferences, cfg, batch_size)
            evaluation.metrics["pairwise_accuracy_preferences"] = accuracy

    # 5. a model folder, with the temperature in its config
    save_trained(model, tokenizer, folder)
    on_main_process(partial(_write, folder, calibration, evaluation))
    return TrainedDiscriminator(model, fitted, calibration, evaluation)


def _length(pair: LabelledPair) -> int:
    """Tokens of the longer side with its prompt."""
    return max(len(pair.rejected.encoded.ids), len(pair.revised.encoded.ids))


def _check(settings: DiscriminatorConfig, train: Sequence[LabelledPair], held_out: Sequence[LabelledPair]) -> None:
    edited = any(any(side.labels) for pair in train for side in (pair.rejected, pair.revised))
    if not edited:
        raise DataError(
            f"none of the {len(train)} training pairs has an edited token, so there is nothing to learn; "
            "check that data.edits names pairs of a rejected answer and its revision that differ"
        )
    if settings.calibrate and not held_out:
        raise DataError(
            "discriminator.calibrate is on, but no pair is held out to fit the temperature on; set data.held_out above "
            "0, bring more edits, or set discriminator.calibrate to false"
        )


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
    sides = zip(scores[0::2], scores[1::2], strict=True)
    note_cuts(zip([pair.prompt for pair in pairs], sides, strict=True), cfg.data, stage="held-out preferences")
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
