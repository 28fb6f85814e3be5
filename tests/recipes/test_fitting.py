"""What the supervised recipes share: each resumes, listens, watches what is held out and leaves a model folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerFast

from tests.recipes.test_train_sft import PAIRS
from tlcr.config.schema import DataConfig, DPOConfig, RewardModelConfig, RunConfig, TrainingConfig
from tlcr.errors import DataError
from tlcr.models.sft import completion_loss
from tlcr.recipes.fitting import check_lengths, encode_splits, fit_and_save, micro_batch_size
from tlcr.recipes.train_dpo import train_dpo
from tlcr.recipes.train_reward_model import train_reward_model
from tlcr.recipes.train_sft import train_sft
from tlcr.text.padding import collate_completions
from tlcr.training.callbacks import Callback
from tlcr.training.metrics import read_metrics
from tlcr.training.supervised import FitResult
from tlcr.types import EncodedAnswer, PreferencePair

LM = Callable[..., PreTrainedModel]
Tokenizer = PreTrainedTokenizerFast
STEPS: dict[str, Any] = {"epochs": 2, "batch_size": 2, "micro_batch_size": 1, "learning_rate": 1e-2, "save_every": 0}
CFG = RunConfig(sft=TrainingConfig(**STEPS), reward_model=RewardModelConfig(**STEPS), dpo=DPOConfig(**STEPS))
RECIPES: list[tuple[Callable[..., FitResult], str, set[str]]] = [
    (train_sft, "model", {"loss", "perplexity"}),
    (train_reward_model, "backbone", {"loss", "accuracy", "margin"}),
    (train_dpo, "model", {"loss", "accuracy", "margin", "reward_chosen", "reward_rejected"}),
]


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step, self.evaluations = step, [0]

    def on_step(self, step: int, metrics: Mapping[str, float]) -> bool:
        return step == self.step

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        self.evaluations.append(step)


@pytest.mark.parametrize(("recipe", "given", "figures"), RECIPES, ids=["sft", "reward_model", "dpo"])
def test_a_stopped_recipe_resumes_to_the_same_model_folder(
    tmp_path: Path,
    tiny_causal_lm: LM,
    tiny_tokenizer: Tokenizer,
    recipe: Callable[..., FitResult],
    given: str,
    figures: set[str],
) -> None:
    def train(name: str, **options: Any) -> FitResult:
        models = {given: tiny_causal_lm(seed=4)}
        data = {"train": PAIRS[:5], "held_out": PAIRS[5:]}
        return recipe(CFG, **models, **data, tokenizer=tiny_tokenizer, folder=tmp_path / name, **options)

    whole = train("whole")
    stop = StopAt(4)
    stopped = train("cut", callbacks=[stop])
    assert stopped.stopped and (stopped.steps, whole.steps) == (4, 6) and stop.evaluations == [0, 3, 4]
    resumed = train("cut", resume=True)
    assert resumed.evaluation == whole.evaluation and resumed.evaluation.keys() == figures
    one, other = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert (tmp_path / "cut" / "tokenizer.json").is_file()


@pytest.mark.parametrize(("recipe", "given", "figures"), RECIPES, ids=["sft", "reward_model", "dpo"])
def test_what_no_model_reads_stops_a_recipe_before_training(
    tmp_path: Path,
    tiny_causal_lm: LM,
    tiny_tokenizer: Tokenizer,
    recipe: Callable[..., FitResult],
    given: str,
    figures: set[str],
) -> None:
    """The long pair is the held-out one."""
    long = replace(PAIRS[5], chosen=" Good!" * 200)
    cfg = replace(CFG, data=DataConfig(max_answer_tokens=2000))
    models = {given: tiny_causal_lm(max_position_embeddings=64)}
    with pytest.raises(DataError, match=r"an answer with its prompt has \d+ tokens, and the model reads at most 64"):
        recipe(cfg, **models, train=PAIRS[:5], held_out=[long], tokenizer=tiny_tokenizer, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


ANSWERS = [EncodedAnswer((5, 9, 17 + i, 23, 2), 3, True) for i in range(5)]


def fit_answers(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, **options: Any) -> FitResult:
    given: dict[str, Any] = {"train": ANSWERS[:3], "held_out": ANSWERS[3:], "loss": completion_loss, **options}
    return fit_and_save(
        CFG,
        CFG.sft,
        model=model,
        tokenizer=tokenizer,
        collate=lambda answers: collate_completions(answers, pad_token_id=0),
        length=lambda answer: len(answer.ids),
        folder=folder,
        resume=False,
        callbacks=(),
        **given,
    )


def test_nothing_held_out_is_nothing_to_watch(tmp_path: Path, tiny_causal_lm: LM, tiny_tokenizer: Tokenizer) -> None:
    watched = fit_answers(
        tiny_causal_lm(), tiny_tokenizer, tmp_path / "a", further=lambda figures: {"twice": 2 * figures["loss"]}
    )
    assert watched.evaluation["twice"] == 2 * watched.evaluation["loss"]
    alone = fit_answers(tiny_causal_lm(), tiny_tokenizer, tmp_path / "b", held_out=[])
    assert alone.evaluation == {} and not any(
        "eval" in key for key in read_metrics(tmp_path / "b" / "metrics.jsonl")[-1]
    )


def test_evaluation_reads_no_more_at_a_time_than_training(
    tmp_path: Path, tiny_causal_lm: LM, tiny_tokenizer: Tokenizer
) -> None:
    seen: list[tuple[bool, int]] = []

    def loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> Any:
        seen.append((model.training, len(batch["ids"])))
        return completion_loss(model, batch)

    fit_answers(tiny_causal_lm(), tiny_tokenizer, tmp_path, loss=loss)
    assert set(seen) == {(True, 1), (False, 1)}
    assert micro_batch_size(replace(CFG.sft, micro_batch_size=None)) == 2


def test_both_splits_are_measured(tiny_causal_lm: LM) -> None:
    model = tiny_causal_lm(max_position_embeddings=6)
    short, fitting, long = (EncodedAnswer(tuple(range(length)), 1, True) for length in (2, 6, 7))

    def encode(pairs: Sequence[PreferencePair]) -> list[EncodedAnswer]:
        return [{"short": short, "fitting": fitting, "long": long}[pair.chosen] for pair in pairs]

    def pairs(*names: str) -> list[PreferencePair]:
        return [PreferencePair(name, "p", name, "r") for name in names]

    options: dict[str, Any] = {"model": model, "length": lambda row: len(row.ids), "limits": CFG.data, "stage": "SFT"}
    found = encode_splits(encode, pairs("short"), pairs("fitting", "short"), **options)
    assert found == ([short], [fitting, short])
    for train, held_out in ((pairs("long"), []), ([], pairs("long"))):
        with pytest.raises(DataError, match="an answer with its prompt has 7 tokens, and the model reads at most 6"):
            encode_splits(encode, train, held_out, **options)
    check_lengths(model, [])
