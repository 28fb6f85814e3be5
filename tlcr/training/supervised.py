"""The loop of SFT, the reward model and the discriminator.

One step: draw the batch, sum the loss over micro-batches and processes, divide the gradient by the weight of the whole
batch, clip, step. So the step does not depend on how the batch is cut: 1 x 8, 8 x 1 and two processes give the same, up
to rounding. Gradients of bfloat16 weights are summed in bfloat16, where many small micro-batches round more than few.
"""

from __future__ import annotations

import hashlib
import math
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import PreTrainedModel

from tlcr.config.schema import TrainingConfig, undecisive
from tlcr.errors import DataError, TrainingDiverged
from tlcr.training.accelerator import check_parallelism, without_sync
from tlcr.training.callbacks import Callback
from tlcr.training.checkpoint import as_plain
from tlcr.training.distributed import process_count, process_index, sum_over_processes
from tlcr.training.loop import TrainingLoop, settings_without
from tlcr.training.optim import (
    build_optimizer,
    build_scheduler,
    clip_gradients,
    gradient_norm,
    parameter_groups,
    scale_gradients,
)
from tlcr.training.sharding import as_forward, device_of, is_sharded
from tlcr.training.trained_part import frozen_digest, trained_part

E = TypeVar("E")
Batch = dict[str, Tensor]
KEEP_CHECKPOINTS = 2
SUM, COUNT = "sum of ", "count of "
FREE_TO_CHANGE = ("enabled", "evaluate_every", "path", *undecisive(TrainingConfig))


@dataclass(frozen=True)
class LossParts:
    """SUMS over the examples of a micro-batch, so that micro-batches and processes add up.

    The loss of a batch is (sum of ``total``) / (sum of ``weight``); ``total`` is a scalar with a gradient, ``weight``
    how much it counts for: tokens, answers, pairs. ``statistics`` maps a metric's name to its own (sum, count).
    """

    total: Tensor
    weight: Tensor | float
    statistics: Mapping[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)


def ranking_loss(margin_B: Tensor) -> LossParts:
    """The sum over pairs of -log sigmoid(margin), and the number of pairs (Bradley and Terry 1952).

    Args:
        margin_B: (B,), the score of the chosen answer less that of the rejected one.

    Returns:
        The sums. Statistics are accuracy, the share of pairs ranked as people did (a tie is half right), and margin.
    """
    pairs = len(margin_B)
    right = (margin_B > 0).sum() + 0.5 * (margin_B == 0).sum()
    statistics = {"accuracy": (right, pairs), "margin": (margin_B.sum().detach(), pairs)}
    return LossParts(softplus(-margin_B).sum(), pairs, statistics)


Loss = Callable[[PreTrainedModel, Batch], LossParts]


@dataclass(frozen=True)
class FitResult:
    """How a stage ended: optimiser steps done, metrics of the last one, the last evaluation, seconds over all runs.

    ``stopped`` is True where a callback asked to end early.
    """

    steps: int
    metrics: dict[str, float]
    evaluation: dict[str, float]
    seconds: float
    stopped: bool


def fit(
    *,
    model: PreTrainedModel,
    examples: Sequence[E],
    collate: Callable[[Sequence[E]], Batch],
    loss: Loss,
    cfg: TrainingConfig,
    folder: str | Path,
    seed: int,
    resume: bool = False,
    evaluate: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
    callbacks: Sequence[Callback] = (),
    accelerator: Accelerator | None = None,
    length: Callable[[E], int] | None = None,
    config: Any = None,
    origin: Mapping[str, Any] | None = None,
) -> FitResult:
    """Trains ``model`` in place for ``cfg.epochs`` passes over ``examples``.

    Args:
        model: what is trained; whole, or cut by ``tlcr.training.sharding.shard``.
        examples: what it is trained on.
        collate: examples to a batch.
        loss: called as ``loss(model, collate(micro_batch))``; see ``LossParts``. It may call any part of the model.
        cfg: passes, sizes, rates and when to evaluate and to save.
        folder: gets ``metrics.jsonl`` and ``checkpoints/``; its name is the label of the progress bar.
        seed: with the number of the epoch it fixes the order of the examples.
        resume: continue from the newest checkpoint, bit for bit on one process on the CPU; without one, start.
        evaluate: called without gradients and in evaluation mode, on every process; its figures are logged as
            eval/<name>. It runs a sharded model equally often on every process (``mean_loss`` does).
        callbacks: told of every step, evaluation and checkpoint.
        accelerator: the processes that share the training; None: one without autocast.
        length: sorts a process's share of each batch, so that the examples of a micro-batch need little padding.
        config: the run's whole config, stored in the checkpoints for their readers (default: ``cfg``).
        origin: names what ``model`` was when it came here; a checkpoint of another origin is refused. None: it is not
            known.

    Returns:
        How the training ended.

    Raises:
        DataError: there are no examples.
        CheckpointError: there is a checkpoint and ``resume`` is False; the one found belongs to other data or settings;
            or the disk is full.
        TrainingDiverged: a loss or gradient is NaN or infinite; the state before that step is saved.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, with the state saved.
    """
    if not examples:
        raise DataError(f"{Path(folder).name}: there are no examples to train on; check the data settings")
    accelerator = accelerator or Accelerator(mixed_precision="no")
    check_parallelism(accelerator)
    run = _Run(
        model,
        examples,
        collate,
        loss,
        cfg,
        Path(folder),
        seed,
        accelerator,
        length,
        config or cfg,
        evaluate,
        callbacks,
        origin,
    )
    return run.train(resume)


def examples_digest(examples: Sequence[Any]) -> str:
    """What identifies examples in their order: the SHA-256 of the whole numbers and texts in them.

    A reference's log-probabilities are no part of it: they follow from its weights, in other bits on another machine.

    Args:
        examples: dataclasses, sequences, mappings, whole numbers and texts, within one another.

    Returns:
        The digest, as 64 hexadecimal digits.
    """
    found = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, int):
            found.update(b"%d;" % value)
        elif isinstance(value, str):
            found.update(b"%d:%b" % (len(value), value.encode("utf-8", "surrogatepass")))
        elif isinstance(value, Mapping):
            take(tuple(value.items()))
        elif is_dataclass(value):
            for name in fields(value):
                take(getattr(value, name.name))
        elif isinstance(value, Sequence):
            found.update(b"[%d]" % len(value))
            try:
                found.update(array("q", value))  # token ids: all at once
            except TypeError:
                for part in value:
                    take(part)

    take(examples)
    return found.hexdigest()


def mean_loss(
    model: PreTrainedModel,
    examples: Sequence[E],
    *,
    collate: Callable[[Sequence[E]], Batch],
    loss: Loss,
    batch_size: int,
) -> dict[str, float]:
    """The loss and its statistics over ``examples``, without gradients; the processes share the work.

    Every process must call it, and each gets the same figures.

    Args:
        model: what is measured.
        examples: what it is measured on.
        collate: examples to a batch.
        loss: as for ``fit``.
        batch_size: examples of one forward pass.

    Returns:
        "loss" and each statistic by its name.
    """
    device = device_of(model)
    training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    for i, counts in _shared_out(math.ceil(len(examples) / batch_size), equally=is_sharded(model)):
        batch = collate(examples[i * batch_size : (i + 1) * batch_size])
        with torch.no_grad():
            parts = as_forward(model, partial(loss, model, {name: x.to(device) for name, x in batch.items()}))
        _add(sums, _flat(parts), counts=counts)
    model.train(training)
    return _reduce(sums)[0]


def _shared_out(batches: int, *, equally: bool) -> list[tuple[int, bool]]:
    """The batches that this process computes, and which of them it counts.

    equally: as many on every process, because each forward pass of a sharded model is one of all processes.
    """
    # Every process needs the names of the statistics, so all compute the first batch and one process counts it.
    own = [(i, True) for i in range(process_index(), batches, process_count())]
    if process_index() > 0 and not equally:
        return [(0, False), *own]
    return [(0, False)] * (math.ceil(batches / process_count()) - len(own)) + own if equally else own


class _LossModule(nn.Module):
    """The loss as a forward pass, so that data parallelism sees every gradient, whichever parts the loss calls."""

    def __init__(self, model: PreTrainedModel, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Batch) -> LossParts:
        return self._loss(self.model, batch)


class _ShardedLoss(_LossModule):
    """The loss as a forward pass of a sharded model."""

    def forward(self, batch: Batch) -> LossParts:
        # what is a tensor in the result tells when the backward pass begins
        total, parts = as_forward(self.model, lambda: ((found := self._loss(self.model, batch)).total, found))
        return replace(parts, total=total)


class _Run:
    """One call of ``fit``; defines its step."""

    def __init__(
        self,
        model: PreTrainedModel,
        examples: Sequence[Any],
        collate: Callable[[Sequence[Any]], Batch],
        loss: Loss,
        cfg: TrainingConfig,
        folder: Path,
        seed: int,
        accelerator: Accelerator,
        length: Callable[[Any], int] | None,
        config: Any,
        evaluate: Callable[[PreTrainedModel], Mapping[str, float]] | None,
        callbacks: Sequence[Callback],
        origin: Mapping[str, Any] | None,
    ) -> None:
        self.model, self.examples, self.collate, self.cfg = model, examples, collate, cfg
        self.seed, self.accelerator, self.length = seed, accelerator, length
        self.steps_per_epoch = math.ceil(len(examples) / cfg.batch_size)
        total_steps = cfg.epochs * self.steps_per_epoch
        optimizer = build_optimizer(
            parameter_groups(model, learning_rate=cfg.learning_rate, weight_decay=cfg.weight_decay)
        )
        self.module: nn.Module
        self.optimizer: torch.optim.Optimizer
        if is_sharded(model):
            self.module, self.optimizer = _ShardedLoss(model, loss), optimizer
        else:
            self.module, self.optimizer = accelerator.prepare(_LossModule(model, loss), optimizer)
        self.loop = TrainingLoop(
            folder,
            total_steps=total_steps,
            evaluate_every=cfg.evaluate_every or self.steps_per_epoch,
            save_every=cfg.save_every,
            keep_checkpoints=KEEP_CHECKPOINTS,
            accelerator=accelerator,
            models={"model": trained_part(model)},
            optimizer=self.optimizer,
            scheduler=build_scheduler(
                self.optimizer,
                schedule=cfg.schedule,
                total_steps=total_steps,
                warmup_steps=int(cfg.warmup_share * total_steps),
            ),
            identity={
                "settings": settings_without(cfg, FREE_TO_CHANGE),
                "examples": len(examples),
                "seed": seed,
                **({} if (frozen := frozen_digest(model)) is None else {"frozen": frozen}),
                "data": examples_digest(examples),
                **({} if origin is None else {"origin": as_plain(origin)}),
            },
            config=config,
            evaluate=None if evaluate is None else partial(self._evaluate, evaluate),
            callbacks=callbacks,
            save_in_background=cfg.save_in_background,
        )
        self._order: tuple[int, list[int]] = (-1, [])

    # ---- the loop

    def train(self, resume: bool) -> FitResult:
        loop = self.loop
        loop.start(resume=resume)
        stopped = loop.run(self._timed_step, label=loop.folder.name)
        loop.end()
        self.model.eval()
        return FitResult(loop.step, loop.metrics, loop.evaluation, loop.seconds, stopped)

    def _timed_step(self) -> dict[str, float]:
        began = time.monotonic()
        metrics = self._train_step()
        return metrics | {"time/step_s": time.monotonic() - began}

    def _train_step(self) -> dict[str, float]:
        """One optimiser step on one batch; returns its metrics."""
        step = self.loop.step + 1
        self.module.train()
        self.optimizer.zero_grad()
        metrics = self._accumulate_gradients()
        norm = gradient_norm(self.model.parameters()).item()
        if not math.isfinite(metrics["loss"]) or not math.isfinite(norm):
            self.optimizer.zero_grad()
            saved = self.loop.save()
            raise TrainingDiverged(
                f"{self.loop.folder.name}: step {step} has the loss {metrics['loss']} and gradient norm {norm}; "
                f"the state before it is saved in {saved}: lower learning_rate (now {self.cfg.learning_rate}), or look "
                "at the data of that step"
            )
        clip_gradients(self.model.parameters(), norm, self.cfg.max_grad_norm)
        rate = float(self.loop.scheduler.get_last_lr()[0])
        self.optimizer.step()
        return metrics | {"grad_norm": norm, "learning_rate": rate, "epoch": step / self.steps_per_epoch}

    def _accumulate_gradients(self) -> dict[str, float]:
        """Leaves the gradient of the whole batch's loss in the parameters; returns the loss and the statistics."""
        micro_batches = self._micro_batches(self._batch())
        sums: dict[str, Tensor] = {}
        for i, (micro_batch, counts) in enumerate(micro_batches):
            batch = {name: value.to(self.accelerator.device) for name, value in self.collate(micro_batch).items()}
            last = i == len(micro_batches) - 1
            with nullcontext() if last else without_sync(self.accelerator, self.module, self.model):
                parts = self.module(batch)
                # Not accelerator.backward: it divides by gradient_accumulation_steps, of a launcher say.
                (parts.total if counts else parts.total * 0.0).backward()
            _add(sums, _flat(parts), counts=counts)
        metrics, weight = _reduce(sums)
        # data parallelism has averaged the gradients of the processes' sums
        scale = self.accelerator.num_processes / weight if weight > 0 else 0.0
        scale_gradients(self.model.parameters(), scale)
        return metrics

    # ---- data

    def _batch(self) -> list[Any]:
        """The examples of the next step: the number of steps done is the data cursor."""
        epoch, index = divmod(self.loop.step, self.steps_per_epoch)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(((self.seed << 20) + epoch) % 2**64)
            self._order = epoch, torch.randperm(len(self.examples), generator=generator).tolist()
        first = index * self.cfg.batch_size
        return [self.examples[i] for i in self._order[1][first : first + self.cfg.batch_size]]

    def _micro_batches(self, batch: list[Any]) -> list[tuple[list[Any], bool]]:
        """This process's share of a batch, cut for its forward passes, and which of them count.

        Every process must take part in the exchange of gradients, so an empty share becomes one example that does not
        count. Every process takes part in each forward pass of a sharded model, so there all cut as many.
        """
        processes = self.accelerator.num_processes
        share = batch[self.accelerator.process_index :: processes]
        if self.length is not None:
            share = sorted(share, key=self.length, reverse=True)
        largest_share = math.ceil(len(batch) / processes)
        size = self.cfg.micro_batch_size or largest_share
        cut = [(share[i : i + size], True) for i in range(0, len(share), size)]
        wanted = math.ceil(largest_share / size) if is_sharded(self.model) else 1
        return [(batch[:1], False)] * (wanted - len(cut)) + cut

    # ---- evaluation

    def _evaluate(self, evaluate: Callable[[PreTrainedModel], Mapping[str, float]]) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            figures = as_forward(self.model, partial(evaluate, self.model))
            return {name: float(value) for name, value in figures.items()}


def _flat(parts: LossParts) -> dict[str, Tensor]:
    """All sums of a micro-batch as float64 scalars on one device, without gradient."""
    flat = {"total": parts.total, "weight": parts.weight}
    for name, (amount, count) in parts.statistics.items():
        flat[SUM + name], flat[COUNT + name] = amount, count
    device = parts.total.device
    return {name: torch.as_tensor(v, dtype=torch.float64, device=device).detach() for name, v in flat.items()}


def _add(sums: dict[str, Tensor], parts: dict[str, Tensor], *, counts: bool) -> None:
    for name, value in parts.items():
        value = value if counts else torch.zeros_like(value)
        sums[name] = sums[name] + value if name in sums else value


def _reduce(sums: dict[str, Tensor]) -> tuple[dict[str, float], float]:
    """The loss and the statistics over all processes, and the weight. Without weight the loss is 0; a statistic without
    counts is left out."""
    totals = dict(zip(sums, sum_over_processes(torch.stack(list(sums.values()))).tolist(), strict=True))
    total, weight = totals["total"], totals["weight"]
    metrics = {"loss": total / weight if weight > 0 else 0.0}
    for key, amount in totals.items():
        name = key.removeprefix(SUM)
        if name != key and totals[COUNT + name] > 0:
            metrics[name] = amount / totals[COUNT + name]
    return metrics, weight
