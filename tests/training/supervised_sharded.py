"""What two processes check of supervised training on shards, together. Started by test_supervised_sharded."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.launched import Checks
from tests.training.sharded import full, lm, same, whole
from tlcr.config.schema import LoRAConfig, ModelConfig, TrainingConfig
from tlcr.errors import CheckpointError, TrainingDiverged
from tlcr.models.bidirectional import make_top_layers_bidirectional
from tlcr.models.discriminator import collate_pairs, predict_tokens
from tlcr.models.discriminator import label_loss as discriminator_loss
from tlcr.models.dpo import ReferencedComparison, collate_referenced, dpo_loss, with_reference
from tlcr.models.heads import classification_head
from tlcr.models.inspection import TWO_CLASSES
from tlcr.models.loading import load_sequence_classifier, load_token_classifier
from tlcr.models.lora.adapters import add_adapter
from tlcr.models.reward_model import bradley_terry_loss, collate_comparisons
from tlcr.models.sft import completion_loss
from tlcr.text.padding import collate_completions
from tlcr.training.callbacks import Callback
from tlcr.training.checkpoint import latest_checkpoint
from tlcr.training.distributed import process_index
from tlcr.training.metrics import read_metrics
from tlcr.training.sharding import local, shard_model
from tlcr.training.supervised import Batch, LossParts, fit, mean_loss
from tlcr.training.trained_part import frozen_digest
from tlcr.types import EncodedAnswer, EncodedComparison, LabelledAnswer, LabelledPair

checks = Checks()
LENGTHS = [(2, 3), (1, 9), (5, 2), (3, 6), (1, 1), (4, 7), (2, 2), (6, 4), (3, 7)]  # of prompts and answers
ROWS, MICRO_BATCH = len(LENGTHS), 2
"""Shares of 5 and 4 rows, so 3 and 2 micro-batches: a process has an idle one."""


def answers(seed: int) -> list[EncodedAnswer]:
    generator = torch.Generator().manual_seed(seed)
    return [
        EncodedAnswer(tuple(torch.randint(3, 60, (p + a,), generator=generator).tolist()), p, True) for p, a in LENGTHS
    ]


def comparisons() -> list[EncodedComparison]:
    return [EncodedComparison(*pair) for pair in zip(answers(1), answers(2), strict=True)]


def labelled() -> list[LabelledPair]:
    def sides(seed: int) -> list[LabelledAnswer]:
        found = []
        for row in answers(seed):
            size = len(row.answer_ids)
            found.append(
                LabelledAnswer(
                    "rejected" if seed == 1 else "revised",
                    row,
                    tuple((i + seed) % 3 - 1 for i in range(size)),
                    (True,) * size,
                )
            )
        return found

    return [LabelledPair(str(i), *pair) for i, pair in enumerate(zip(sides(1), sides(2), strict=True))]


def with_a_head(model: PreTrainedModel) -> PreTrainedModel:
    """A new head is zero, and no gradient would pass it."""
    weight = classification_head(model).weight
    with torch.no_grad():
        weight.copy_(torch.sin(torch.arange(weight.numel())).reshape(weight.shape) / 10)
    return model


class Training:
    """One of the four: its model, what it is trained on, and its loss."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        self.dtype, cfg = dtype, ModelConfig()
        pad = partial(partial, pad_token_id=0)
        self.build: Callable[[], PreTrainedModel] = partial(lm, dtype)
        self.loss: Callable[[PreTrainedModel, Batch], LossParts] = completion_loss
        self.examples: Sequence[Any] = answers(1)
        self.collate: Callable[[Any], Batch] = pad(collate_completions)
        if name == "reward model":
            self.build = lambda: with_a_head(load_sequence_classifier(lm(dtype), cfg))
            self.loss, self.examples, self.collate = bradley_terry_loss, comparisons(), pad(collate_comparisons)
        elif name == "DPO":
            self.build = partial(lm, dtype, tie_word_embeddings=True)
            self.loss, self.collate = partial(dpo_loss, beta=0.3), pad(collate_referenced)
            self.examples = [
                ReferencedComparison(pair, -20.0 - i, -22.0 + i / 2) for i, pair in enumerate(comparisons())
            ]
        elif name == "discriminator":
            self.build = self._discriminator
            self.loss, self.examples = discriminator_loss, labelled()
            self.collate = partial(collate_pairs, pad_token_id=0, targets="soft")

    def _discriminator(self) -> PreTrainedModel:
        model = with_a_head(load_token_classifier(lm(self.dtype), ModelConfig(), id2label=TWO_CLASSES))
        make_top_layers_bidirectional(model, 1)
        return model

    def evaluate(self, model: PreTrainedModel) -> dict[str, float]:
        return mean_loss(model, self.examples[:7], collate=self.collate, loss=self.loss, batch_size=2)

    def fit(
        self, model: PreTrainedModel, folder: Path, *callbacks: Callback, resume: bool = False, **changes: Any
    ) -> list[dict[str, Any]]:
        settings: dict[str, Any] = {
            "epochs": 1,
            "batch_size": ROWS,
            "micro_batch_size": MICRO_BATCH,
            "learning_rate": 1e-3,
            "max_grad_norm": 1e9,
            "schedule": "constant",
            "save_every": 2,
        }
        fit(
            model=model,
            examples=self.examples,
            collate=self.collate,
            loss=self.loss,
            cfg=TrainingConfig(**(settings | changes)),
            folder=folder,
            seed=3,
            resume=resume,
            evaluate=self.evaluate,
            callbacks=callbacks,
        )
        return read_metrics(folder / "metrics.jsonl")


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {key: figure for key, figure in row.items() if not key.startswith("time")}


TRAININGS = ("SFT", "reward model", "DPO", "discriminator")


class Gradients(Callback):
    """The whole gradients of the last step."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.found: dict[str, Tensor] = {}

    def on_step(self, step: int, metrics: Any) -> None:
        self.found = {name: whole(p.grad).clone() for name, p in self.model.named_parameters() if p.grad is not None}


def cut(model: PreTrainedModel) -> PreTrainedModel:
    shard_model(model, full())
    return model


@checks
def a_step_has_the_loss_and_gradients_of_one_process(folder: Path) -> None:
    for name in TRAININGS:
        training = Training(name)
        takes_the_step_of_one_process(training, training.build, folder / f"step of {name}")


@checks
def adapters_take_the_step_of_one_process_and_resume(folder: Path) -> None:
    """And nothing else has a gradient, or is in a checkpoint."""
    for name in TRAININGS:
        for dtype in (torch.float64, torch.bfloat16):
            training = Training(name, dtype)

            def build(training: Training = training) -> PreTrainedModel:
                model = training.build()
                add_adapter(model, LoRAConfig(rank=3), "adapter", seed=0)
                with torch.no_grad():
                    for key, parameter in model.named_parameters():
                        if "lora_B" in key:
                            parameter.copy_(torch.sin(torch.arange(parameter.numel())).reshape(parameter.shape) / 10)
                return model

            if dtype == torch.float64:
                takes_the_step_of_one_process(training, build, folder / f"step of {name} by an adapter")
            elif name in ("SFT", "discriminator"):
                stop_and_resume(training, build, folder / f"{name} by an adapter twice")


def takes_the_step_of_one_process(training: Training, build: Callable[[], PreTrainedModel], folder: Path) -> None:
    alone, model = build(), cut(build())
    share = sum(local(p).numel() for p in model.parameters()) / sum(p.numel() for p in alone.parameters())
    assert share < 0.6
    parts = training.loss(alone, training.collate(training.examples))
    # Llama's norms are float32 in a float64 model: a gradient that is divided before the backward pass, and not
    # after it, is rounded otherwise there
    parts.total.backward()
    truth = {name: p.grad / float(parts.weight) for name, p in alone.named_parameters() if p.requires_grad}
    gradients = Gradients(model)
    row = training.fit(model, folder, gradients)[0]
    assert row["loss"] == pytest.approx(parts.total.item() / float(parts.weight), rel=1e-9), folder.name
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten().double() for gradient in truth.values()]))
    assert norm > 0
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-9), folder.name
    assert gradients.found.keys() == truth.keys()
    for key, wanted in truth.items():
        error = (gradients.found[key] - wanted).norm() / wanted.norm()
        assert error < 1e-9, (folder.name, key, error)


@checks
def a_whole_training_is_that_of_data_parallelism(folder: Path) -> None:
    """Batches of 4, 4 and 1 rows, so that a process has no share; clipped; twice over all rows; and evaluated."""
    changes: dict[str, Any] = {"epochs": 2, "batch_size": 4, "micro_batch_size": 1, "max_grad_norm": 0.5}
    changes |= {"evaluate_every": 2, "schedule": "cosine"}
    for name in TRAININGS:
        training = Training(name)
        copies, model = training.build(), cut(training.build())
        wanted = training.fit(copies, folder / f"copies of {name}", **changes)
        found = training.fit(model, folder / f"shards of {name}", **changes)
        assert len(wanted) == len(found) == 6
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.keys() == theirs.keys()
            figures = [key for key in theirs if not key.startswith("time")]
            assert [ours[key] for key in figures] == pytest.approx([theirs[key] for key in figures], rel=1e-6), name
        assert any("eval/loss" in row for row in found)
        for ours, theirs in zip(model.parameters(), copies.parameters(), strict=True):
            torch.testing.assert_close(whole(ours.detach()), theirs.detach(), rtol=1e-4, atol=1e-6)


@checks
def bfloat16_trains_with_masters_in_shards(folder: Path) -> None:
    training = Training("SFT", torch.bfloat16)
    copies, model = training.build(), cut(training.build())
    changes: dict[str, Any] = {"epochs": 3, "learning_rate": 1e-2}
    wanted = training.fit(copies, folder / "bfloat16 copies", **changes)
    found = training.fit(model, folder / "bfloat16 shards", **changes)
    losses = [[row["loss"] for row in rows] for rows in (wanted, found)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[1][-1] < 0.98 * losses[1][0]


@checks
def what_is_measured_is_what_one_process_measures(folder: Path) -> None:
    """Unequal numbers of batches, functions that no process shares out, and a reference that both share out."""
    for name in TRAININGS:
        training = Training(name)
        alone, model = training.build(), cut(training.build())
        assert training.evaluate(model) == pytest.approx(training.evaluate(alone), rel=1e-9)
    alone, model = (with_a_head(m) for m in (training.build(), training.build()))
    cut(model)
    logits = [predict_tokens(m, labelled(), pad_token_id=0, batch_size=4).logits_NC for m in (alone, model)]
    assert torch.equal(*logits)
    same(model, alone)  # and in shards again

    alone, model = lm(), cut(lm())
    for rows in (comparisons(), comparisons()[:1], []):
        ours, theirs = (with_reference(m, rows, pad_token_id=0, batch_size=2) for m in (model, alone))
        assert ours == theirs


@checks
def a_step_reaches_the_next_evaluation(folder: Path) -> None:
    """The root's own parameters must not stay gathered over a step on the shards."""
    training = Training("SFT")
    model = cut(training.build())
    training.evaluate(model)
    rows = training.fit(model, folder / "fresh", epochs=3, learning_rate=1e-2)
    assert len({row["eval/loss"] for row in rows}) == 3
    fresh = training.build()
    fresh.load_state_dict({name: whole(p.detach()) for name, p in model.named_parameters()})
    assert rows[-1]["eval/loss"] == pytest.approx(training.evaluate(fresh)["loss"], rel=1e-12)


@checks
def what_diverges_on_one_process_ends_both(folder: Path) -> None:
    training = Training("SFT")
    model = cut(training.build())
    before = [local(p).clone() for p in model.parameters()]
    plain = training.loss

    def poisoned(model: PreTrainedModel, batch: Batch) -> LossParts:
        parts = plain(model, batch)
        return LossParts(parts.total * torch.nan, parts.weight) if process_index() == 1 else parts

    training.loss = poisoned
    training.evaluate = lambda model: {}  # type: ignore[method-assign]
    with pytest.raises(TrainingDiverged, match=r"step 1 has the loss nan .* saved in .*/step-000000"):
        training.fit(model, folder / "diverges")
    saved = latest_checkpoint(folder / "diverges" / "checkpoints")
    assert saved is not None and saved.name == "step-000000" and (saved / "shards").is_dir()
    for parameter, start in zip(model.parameters(), before, strict=True):
        assert torch.equal(local(parameter), start)


class StopOneProcess(Callback):
    """Tells the second process to stop after a step; it alone gets the signal."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, step: int, metrics: Any) -> None:
        if step == self.step and process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


SIX_STEPS: dict[str, Any] = {"epochs": 2, "batch_size": 4, "schedule": "cosine", "learning_rate": 1e-2}


def stop_and_resume(training: Training, build: Callable[[], PreTrainedModel], folder: Path) -> None:
    """Straight to the end, and stopped within an epoch, between two checkpoints that were due: bit for bit the same."""
    straight, resumed = cut(build()), cut(build())
    wanted = training.fit(straight, folder / "straight", **SIX_STEPS)
    with pytest.raises(KeyboardInterrupt, match=r"after step 3; the state is saved in .*step-000003"):
        training.fit(cut(build()), folder / "stopped", StopOneProcess(3), **SIX_STEPS)
    found = training.fit(resumed, folder / "stopped", resume=True, **SIX_STEPS)
    assert [without_times(row) for row in found] == [without_times(row) for row in wanted]
    for (name, ours), theirs in zip(resumed.named_parameters(), straight.parameters(), strict=True):
        assert torch.equal(local(ours), local(theirs)), name


@checks
def a_training_that_was_stopped_ends_as_one_that_was_not(folder: Path) -> None:
    for name in TRAININGS:
        training = Training(name, torch.bfloat16)
        stop_and_resume(training, training.build, folder / f"{name} twice")


@checks
def frozen_weights_stay_out_of_checkpoints_and_must_be_the_same(folder: Path) -> None:
    training = Training("SFT", torch.bfloat16)

    def build(change: float = 0.0) -> PreTrainedModel:
        model = training.build()
        with torch.no_grad():
            model.model.embed_tokens.weight[-1, -1] += change
        for part in (model.model.embed_tokens, model.model.layers[0].mlp):
            part.requires_grad_(False)
        return model

    assert frozen_digest(cut(build())) == frozen_digest(build())
    stop_and_resume(training, build, folder / "frozen")
    with pytest.raises(CheckpointError, match=r"belongs to a run with other frozen \(frozen was .* and is .*\)"):
        training.fit(cut(build(1.0)), folder / "frozen" / "stopped", resume=True, **SIX_STEPS)


if __name__ == "__main__":
    checks.run(Path(sys.argv[1]))
