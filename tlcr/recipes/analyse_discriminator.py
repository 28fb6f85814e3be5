"""Recipe: measures where a trained discriminator is right and wrong on held-out pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import RunConfig
from tlcr.data.labels import label_pair
from tlcr.errors import DataError
from tlcr.evaluation.discriminator_analysis import (
    AnswerComparison,
    KindRow,
    PlaceRow,
    SpillRow,
    analysed_tokens,
    by_absolute_position,
    by_kind,
    by_relative_position,
    compare_answers,
    rewards_by_answer,
    spill,
)
from tlcr.evaluation.discriminator_metrics import (
    ReliabilityBin,
    can_cross_fit,
    cross_fitted_confidence,
    expected_calibration_error,
    reliability_bins,
    token_rewards,
)
from tlcr.models.discriminator import Targets, is_trained_on, predict_tokens, score_answers, temperature_of
from tlcr.ops import TokenLabel
from tlcr.text.tokenization import token_pieces
from tlcr.text.truncation import note_cuts
from tlcr.types import EditPair, LabelledAnswer, LabelledPair, PreferencePair

__all__ = ["DiscriminatorAnalysis", "EditExample", "ExampleAnswer", "analyse_discriminator"]

EXAMPLE_TOKENS = 40
"""Tokens that a side of the example has at most."""


@dataclass(frozen=True)
class ExampleAnswer:
    """One side of an edit: its text, and the text, label and reward of each counted token."""

    text: str
    tokens: tuple[str, ...]
    labels: tuple[str, ...]
    rewards: tuple[float, ...]


@dataclass(frozen=True)
class EditExample:
    """One edit of the analysed ones, token by token."""

    prompt: str
    rejected: ExampleAnswer
    revised: ExampleAnswer


@dataclass(frozen=True)
class DiscriminatorAnalysis:
    """What `analyse_discriminator` finds. Calibration: bins and expected calibration error at temperature 1 ("before")
    and calibrated ("after"), over the tokens that the loss was trained on.

    comparisons: "revised over rejected" and, where there are preferences, "chosen over rejected".
    example: the first short edit in which something was taken away and put in, to look at; None where there is none.
    """

    pairs: int
    tokens: int
    temperature: float
    targets: str
    bidirectional_layers: int
    kinds: tuple[KindRow, ...]
    relative_positions: tuple[PlaceRow, ...]
    absolute_positions: tuple[PlaceRow, ...]
    spill: tuple[SpillRow, ...]
    calibration_error: dict[str, float | None]
    reliability: dict[str, list[ReliabilityBin]]
    comparisons: dict[str, AnswerComparison]
    example: EditExample | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        return asdict(self)


def analyse_discriminator(
    cfg: RunConfig,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[EditPair],
    preferences: Sequence[PreferencePair] = (),
    calibrated_on_them: bool,
) -> DiscriminatorAnalysis:
    """Measures a discriminator, at its stored temperature, on pairs that it was not trained on.

    Source: the rewards are those of the paper, section 3.3; the measurements are ours.

    Args:
        cfg: its data and labels sections say how pairs are cut and labelled, its discriminator section what the targets
            were and how many pairs are scored at a time.
        model: a token classifier of two or three classes, with its temperature in its config.
        tokenizer: the model's.
        edits: rejected answers and their revisions.
        preferences: chosen and rejected answers, to compare whole answers. May be empty.
        calibrated_on_them: whether the temperature was fitted on these edits; calibration is then measured by
            cross-fitting on two halves, or not at all where a half has nothing to fit on.

    Returns:
        Figures by kind of edit, by position, near edits and of whole answers, with the calibration.

    Raises:
        DataError: there are no edits.
    """
    if not edits:
        raise DataError(
            "there is no edit pair to analyse the discriminator on; hold some out (data.held_out), or name a file"
        )
    settings = cfg.discriminator
    batch_size = 2 * (settings.micro_batch_size or settings.batch_size)
    targets: Targets = "three_class" if model.config.num_labels == 3 else settings.targets

    # 1. labels: as in the model's training, and of whole answers
    pairs, whole = (
        [
            label_pair(
                pair,
                tokenizer,
                max_prompt_tokens=cfg.data.max_prompt_tokens,
                max_answer_tokens=limit,
                end_of_sequence=cfg.labels.end_of_sequence,
            )
            for pair in edits
        ]
        for limit in (cfg.data.max_answer_tokens, sys.maxsize)
    )

    encoded = [(pair.rejected.encoded, pair.revised.encoded) for pair in pairs]
    note_cuts(zip([edit.prompt for edit in edits], encoded, strict=True), cfg.data, stage="analysis of edits")

    # 2. the model's logits for every token
    predictions = predict_tokens(model, pairs, pad_token_id=tokenizer.pad_token_id, batch_size=batch_size)
    rewards_N = token_rewards(predictions.logits_NC, temperature_of(model))
    tokens = analysed_tokens(pairs, whole, rewards_N.numpy())

    # 3. whole answers
    counts = predictions.answer_N.bincount(minlength=2 * len(pairs)).tolist()
    answers = rewards_by_answer(rewards_N.tolist(), counts)
    compared = {
        "revised over rejected": compare_answers(answers[1::2], answers[0::2]),
        "chosen over rejected": _compare_preferences(cfg, model, tokenizer, preferences, batch_size),
    }

    # 4. calibration
    confidences = {"before": (token_rewards(predictions.logits_NC, 1.0) + 1) / 2}
    if hasattr(model.config, "tlcr_temperature"):
        if not calibrated_on_them:
            confidences["after"] = (rewards_N + 1) / 2
        elif can_cross_fit(predictions, targets):
            confidences["after"] = cross_fitted_confidence(predictions, targets)
    used_N = is_trained_on(predictions.labels_N, targets)
    target_N = (predictions.labels_N.float() + 1) / 2
    reliability = {name: reliability_bins(s_N[used_N], target_N[used_N]) for name, s_N in confidences.items()}

    return DiscriminatorAnalysis(
        pairs=len(pairs),
        tokens=len(rewards_N),
        temperature=temperature_of(model),
        targets=targets,
        bidirectional_layers=getattr(model.config, "tlcr_bidirectional_layers", 0),
        kinds=by_kind(tokens),
        relative_positions=by_relative_position(tokens),
        absolute_positions=by_absolute_position(tokens),
        spill=spill(tokens),
        calibration_error={name: expected_calibration_error(bins) for name, bins in reliability.items()},
        reliability=reliability,
        comparisons={name: found for name, found in compared.items() if found is not None},
        example=_example(edits, pairs, answers, tokenizer),
    )


def _example(
    edits: Sequence[EditPair],
    pairs: Sequence[LabelledPair],
    rewards: Sequence[Sequence[float]],
    tokenizer: PreTrainedTokenizerBase,
) -> EditExample | None:
    """The first edit that takes away and puts in, of at most EXAMPLE_TOKENS tokens a side.

    rewards: of the counted tokens of each pair's rejected and revised answer, in turn.
    """
    for number, (edit, pair) in enumerate(zip(edits, pairs, strict=True)):
        sides = (pair.rejected, pair.revised)
        changed = all(any(label != TokenLabel.NEUTRAL for label in side.labels) for side in sides)
        if changed and all(len(side.labels) <= EXAMPLE_TOKENS and side.encoded.complete for side in sides):
            rejected, revised = (
                _example_answer(side, text, rewards[2 * number + place], tokenizer)
                for place, (side, text) in enumerate(zip(sides, (edit.rejected, edit.revised), strict=True))
            )
            return EditExample(edit.prompt, rejected, revised)
    return None


def _example_answer(
    answer: LabelledAnswer, text: str, rewards: Sequence[float], tokenizer: PreTrainedTokenizerBase
) -> ExampleAnswer:
    encoded = answer.encoded
    pieces = token_pieces(tokenizer, encoded.answer_ids, context=encoded.ids[: encoded.answer_start])
    counted = [k for k, counts in enumerate(answer.counted) if counts]
    return ExampleAnswer(
        text,
        tuple(pieces[k] for k in counted),
        tuple(TokenLabel(answer.labels[k]).name.lower() for k in counted),
        tuple(rewards),
    )


def _compare_preferences(
    cfg: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    preferences: Sequence[PreferencePair],
    batch_size: int,
) -> AnswerComparison | None:
    scores = score_answers(
        model,
        tokenizer,
        [(pair.prompt, answer) for pair in preferences for answer in (pair.chosen, pair.rejected)],
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        max_answer_tokens=cfg.data.max_answer_tokens,
        batch_size=batch_size,
    )
    pairs = zip(scores[0::2], scores[1::2], strict=True)
    note_cuts(zip([pair.prompt for pair in preferences], pairs, strict=True), cfg.data, stage="analysis of preferences")
    rewards = [score.rewards for score in scores]
    return compare_answers(rewards[0::2], rewards[1::2])
