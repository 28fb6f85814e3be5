"""A tiny discriminator trained from edits to evaluation, on a task where a token's identity decides its label."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from tlcr.config.schema import DataConfig, DiscriminatorConfig, RunConfig
from tlcr.errors import DataError
from tlcr.evaluation.discriminator_metrics import evaluate_predictions
from tlcr.models.discriminator import (
    TokenPredictions,
    load_discriminator,
    predict_tokens,
    score_answers,
    temperature_of,
)
from tlcr.recipes.train_discriminator import TrainedDiscriminator, train_discriminator
from tlcr.training.callbacks import Callback
from tlcr.types import EncodedAnswer, LabelledAnswer, LabelledPair, PreferencePair

Make = Callable[..., PreTrainedModel]
BAD, GOOD, OTHER = range(260, 280), range(280, 300), range(300, 400)


def edits(number: int, seed: int, *, label_next: bool = False) -> list[LabelledPair]:
    """Pairs in which the reviser replaces three bad tokens in four by good ones, and the last one always.

    With `label_next` it is the token before a bad (good) one that is labelled.
    """
    rng = random.Random(seed)
    pairs = []
    for i in range(number):
        prompt = tuple(rng.choices(OTHER, k=rng.randint(1, 5)))
        rejected = [rng.choice(BAD) if rng.random() < 0.3 else rng.choice(OTHER) for _ in range(rng.randint(6, 14))]
        rejected[-1] = rng.choice(BAD)
        edited = [token in BAD and rng.random() < 0.75 for token in rejected[:-1]] + [True]
        revised = [rng.choice(GOOD) if e else token for token, e in zip(rejected, edited, strict=True)]
        sides = []
        for side, ids, label in (("rejected", rejected, -1), ("revised", revised, 1)):
            labels = [label if e else 0 for e in edited]
            if label_next:
                labels = [*labels[1:], 0]
            encoded = EncodedAnswer((*prompt, *ids), len(prompt), complete=False)
            sides.append(LabelledAnswer(side, encoded, tuple(labels), (True,) * len(ids)))  # type: ignore[arg-type]
        pairs.append(LabelledPair(f"{seed}-{i}", *sides))
    return pairs


def config(**changes: object) -> RunConfig:
    values: dict = {"epochs": 2, "batch_size": 16, "learning_rate": 1e-2, "save_every": 0, **changes}
    return RunConfig(discriminator=DiscriminatorConfig(**values), data=DataConfig(max_answer_tokens=16))


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_causal_lm: Make, tiny_tokenizer: PreTrainedTokenizerFast
) -> tuple[TrainedDiscriminator, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run") / "discriminator"
    good, bad = (
        [text for token in tokens if encode(text := tiny_tokenizer.decode([token])) == [token]]
        for encode in [lambda text: tiny_tokenizer(text, add_special_tokens=False)["input_ids"]]
        for tokens in (GOOD, BAD)
    )
    assert len(good) >= 5 and len(bad) >= 5
    preferences = [PreferencePair(chosen, "", chosen, rejected) for chosen, rejected in zip(good, bad, strict=False)]
    result = train_discriminator(
        config(micro_batch_size=8),
        backbone=tiny_causal_lm(),
        tokenizer=tiny_tokenizer,
        train=edits(320, seed=1),
        held_out=edits(80, seed=2),
        held_out_preferences=preferences,
        folder=folder,
    )
    return result, folder


def test_it_learns_which_tokens_a_reviser_changes(trained: tuple[TrainedDiscriminator, Path]) -> None:
    metrics = trained[0].metrics
    assert metrics["auc_positive_negative"] > 0.97
    assert metrics["auc_negative_rest"] > 0.9
    assert metrics["auc_positive_rest"] > 0.9
    assert metrics["f1"] > 0.9
    assert metrics["pairwise_accuracy"] > 0.95
    # good tokens are always a revision; bad ones are left alone now and then, in both answers
    assert metrics["mean_reward_positive"] > 0.9
    assert -0.9 < metrics["mean_reward_negative"] < -0.5
    assert abs(metrics["mean_reward_neutral"]) < 0.2
    assert metrics["ece_after"] < 0.03


def auc_within_rejected(model: PreTrainedModel, pairs: list[LabelledPair], shift: int = 0) -> float:
    """How well scores find the edited tokens of rejected answers: which side it is does not help here."""
    found = predict_tokens(model, pairs, pad_token_id=0, batch_size=64)
    rejected_N = found.answer_N % 2 == 0
    labels_N = found.labels_N[rejected_N].roll(shift)
    within = TokenPredictions(found.logits_NC[rejected_N], labels_N, found.answer_N[rejected_N])
    evaluation = evaluate_predictions(within, temperature=1.0, targets="soft", calibrated=False)
    return evaluation.defined["auc_negative_rest"]


def test_labels_shifted_by_one_token_are_at_chance(trained: tuple[TrainedDiscriminator, Path]) -> None:
    assert auc_within_rejected(trained[0].model, edits(80, seed=2)) > 0.9
    assert abs(auc_within_rejected(trained[0].model, edits(80, seed=2), shift=-1) - 0.5) < 0.1
    assert abs(auc_within_rejected(trained[0].model, edits(80, seed=2), shift=1) - 0.5) < 0.1


def test_it_writes_a_model_that_loads_anywhere_and_its_report(
    trained: tuple[TrainedDiscriminator, Path], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    result, folder = trained
    plain = AutoModelForTokenClassification.from_pretrained(folder).eval()
    AutoTokenizer.from_pretrained(folder)
    assert plain.config.id2label == {0: "negative", 1: "positive"}
    ids = torch.tensor([[350, 261, 281]])
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, result.model(input_ids=ids).logits)
    calibration = json.loads((folder / "calibration.json").read_text())
    model, tokenizer = load_discriminator(folder, config().model)
    assert result.calibration is not None
    assert temperature_of(model) == calibration["temperature"] == result.calibration.temperature != 1.0
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["metrics"]["auc_positive_negative"] == result.metrics["auc_positive_negative"]
    assert evaluation["metrics"]["pairwise_accuracy_preferences"] > 0.9
    assert sum(b["tokens"] for b in evaluation["reliability"]["after"]) == evaluation["metrics"]["tokens"]
    assert (folder / "reliability.png").read_bytes().startswith(b"\x89PNG")
    text = tokenizer.decode([261, 281])
    limits = {"max_prompt_tokens": 8, "max_answer_tokens": 16, "batch_size": 2}
    assert score_answers(model, tokenizer, [("", text)], **limits) == score_answers(
        result.model, tiny_tokenizer, [("", text)], **limits
    )


def test_the_log_has_the_training_and_the_held_out_metrics(trained: tuple[TrainedDiscriminator, Path]) -> None:
    lines = [json.loads(line) for line in (trained[1] / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == trained[0].fit.steps == 40
    assert lines[-1]["accuracy_edited"] > 0.9 > lines[0]["accuracy_edited"]
    assert lines[-1]["eval/auc_positive_negative"] == trained[0].fit.evaluation["auc_positive_negative"]


@pytest.mark.parametrize("targets", ["hard", "three_class"])
def test_the_other_targets_learn_too(
    targets: str, tmp_path: Path, tiny_causal_lm: Make, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    result = train_discriminator(
        config(targets=targets),
        backbone=tiny_causal_lm(),
        tokenizer=tiny_tokenizer,
        train=edits(320, 1),
        held_out=edits(40, 2),
        folder=tmp_path / "d",
    )
    assert result.metrics["auc_positive_negative"] > 0.97
    assert result.metrics["pairwise_accuracy"] > 0.9
    names = list(load_discriminator(tmp_path / "d", config().model)[0].config.id2label.values())
    assert names == (["negative", "positive"] if targets == "hard" else ["negative", "neutral", "positive"])


def test_only_bidirectional_layers_can_judge_by_what_follows(
    tmp_path: Path, tiny_causal_lm: Make, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    auc, held_out = {}, edits(80, 2, label_next=True)
    for layers in (0, 1):
        result = train_discriminator(
            config(epochs=5, bidirectional_layers=layers),
            backbone=tiny_causal_lm(),
            tokenizer=tiny_tokenizer,
            train=edits(320, 1, label_next=True),
            held_out=held_out,
            folder=tmp_path / str(layers),
        )
        auc[layers] = auc_within_rejected(result.model, held_out)
    assert auc[0] < 0.65
    assert auc[1] > 0.8


class _Stop(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step(self, step: int, metrics: Mapping[str, float]) -> bool | None:
        return step == self.at


def test_a_stopped_training_resumes_to_the_same_model(
    tmp_path: Path, tiny_causal_lm: Make, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    cfg = config(epochs=2, bidirectional_layers=1)
    train, held_out = edits(64, 1), edits(16, 2)

    def run(folder: Path, **options: object) -> TrainedDiscriminator:
        return train_discriminator(
            cfg,
            backbone=tiny_causal_lm(),
            tokenizer=tiny_tokenizer,
            train=train,
            held_out=held_out,
            folder=folder,
            **options,  # type: ignore[arg-type]
        )

    whole = run(tmp_path / "whole")
    part = run(tmp_path / "part", callbacks=[_Stop(3)])
    assert part.fit.stopped and part.fit.steps == 3
    resumed = run(tmp_path / "part", resume=True)
    assert resumed.fit.steps == whole.fit.steps == 8
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
        if "norm" in name:
            assert not torch.equal(value, part.model.state_dict()[name])
    assert resumed.metrics == whole.metrics
    assert resumed.calibration == whole.calibration


def test_without_held_out_pairs_it_trains_when_calibration_is_off(
    tmp_path: Path, tiny_causal_lm: Make, tiny_tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> None:
    def run(cfg: RunConfig) -> TrainedDiscriminator:
        return train_discriminator(
            cfg,
            backbone=tiny_causal_lm(),
            tokenizer=tiny_tokenizer,
            train=edits(16, 1),
            held_out=[],
            folder=tmp_path / "d",
        )

    with pytest.raises(DataError, match=r"data\.held_out.*discriminator\.calibrate"):
        run(config())
    result = run(config(calibrate=False, epochs=1))
    assert result.evaluation is None and result.metrics == {"temperature": 1.0} and result.model.device == device
    assert not (tmp_path / "d" / "calibration.json").exists()


def test_pairs_without_an_edit_stop_before_training(
    tmp_path: Path, tiny_causal_lm: Make, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    pair = edits(1, 1)[0]
    same = replace(
        pair,
        rejected=replace(pair.rejected, labels=(0,) * len(pair.rejected.labels)),
        revised=replace(pair.revised, labels=(0,) * len(pair.revised.labels)),
    )
    with pytest.raises(DataError, match="none of the 2 training pairs has an edited token"):
        train_discriminator(
            config(),
            backbone=tiny_causal_lm(),
            tokenizer=tiny_tokenizer,
            train=[same] * 2,
            held_out=[pair],
            folder=tmp_path / "d",
        )
