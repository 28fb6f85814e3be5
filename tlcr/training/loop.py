"""What every training shares, supervised or PPO: steps that are counted, logged, evaluated, saved, stopped and resumed.

Each training defines its step and the further contents of its checkpoints; this module does the rest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tlcr.errors import CheckpointError
from tlcr.training.background import BackgroundSave
from tlcr.training.callbacks import Callback, asks_to_stop
from tlcr.training.checkpoint import Contents, as_plain, contents, load_checkpoint, start_or_resume, write_checkpoint
from tlcr.training.disk import checkpoint_bytes, checkpoints_at_a_time, require_room
from tlcr.training.distributed import any_process, on_all_processes, on_main_process
from tlcr.training.interrupt import StopSignals
from tlcr.training.metrics import MetricsLog
from tlcr.training.optim import master_bytes
from tlcr.training.progress import Progress

logger = logging.getLogger(__name__)

Answers = list[bool | None]


def settings_without(cfg: Any, free_to_change: Sequence[str]) -> dict[str, Any]:
    """The settings of a config section that a resumed run must share with its checkpoint, in plain values."""
    return {name: value for name, value in as_plain(cfg).items() if name not in free_to_change}


class TrainingLoop:
    """The steps of one training: its progress, figures, time over all sittings, log and checkpoints.

    Attributes:
        step: steps done (optimiser steps; PPO: updates), over all sittings.
        metrics: what the last step logged, with the evaluation where there was one.
        evaluation: the figures of the last evaluation, without the prefix "eval/".
        log: ``metrics.jsonl`` in the folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        evaluate_every: int,
        save_every: int,
        keep_checkpoints: int,
        accelerator: Accelerator,
        models: Mapping[str, nn.Module],
        optimizer: Optimizer,
        masters: Mapping[str, Optimizer] | None = None,
        scheduler: LRScheduler,
        identity: Mapping[str, Any],
        config: Any,
        evaluate: Callable[[], dict[str, float]] | None,
        callbacks: Sequence[Callback],
        own_state: Callable[[], Mapping[str, Any]] = dict,
        save_in_background: bool = False,
    ) -> None:
        """Starts at step 0; ``start`` continues from a checkpoint.

        Args:
            folder: gets ``metrics.jsonl`` and ``checkpoints/``.
            total_steps: steps of the whole training, those of earlier sittings included.
            evaluate_every: steps from one evaluation to the next; 0: after the last step only, where there is always
                one, also where a callback ends the training early.
            save_every: steps from one checkpoint to the next; 0: none, unless the training is stopped in between.
            keep_checkpoints: how many of the newest checkpoints to keep.
            accelerator: the processes that share the training.
            models: unwrapped modules, whole or sharded, by the names that they have in a checkpoint.
            optimizer: kept in the checkpoints.
            masters: further optimisers by name, which keep no more than masters between two steps: they are in the
                checkpoints where they have some.
            scheduler: stepped once after each step.
            identity: what must be equal in a checkpoint and in this training to resume: "settings", which may be
                nested, and other names beside it. JSON must be able to hold it.
            config: the run's whole config, stored in the checkpoints for their readers.
            evaluate: figures by name; called by every process.
            callbacks: told of every step, evaluation and checkpoint.
            own_state: further state for the checkpoints, which JSON can hold; ``start`` returns it.
            save_in_background: whether to go on while a checkpoint is written, from copies in host memory.
        """
        self.folder, self.total_steps = folder, total_steps
        self.scheduler = scheduler
        self.log = MetricsLog(folder / "metrics.jsonl", accelerator)
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.evaluation: dict[str, float] = {}
        self._evaluated: int | None = None
        self._evaluate_every, self._save_every, self._keep_checkpoints = evaluate_every, save_every, keep_checkpoints
        self._models, self._identity, self._config = models, identity, config
        kept = {name: other for name, other in (masters or {}).items() if any(map(master_bytes, _parameters_of(other)))}
        self._optimizers = {"optimizer": optimizer, **kept}
        self._evaluate, self._callbacks, self._own_state = evaluate, callbacks, own_state
        self._saved: tuple[int, Path] | None = None
        self._save_in_background, self._background, self._writing_step = save_in_background, BackgroundSave(), 0
        self._seconds_before, self._started = 0.0, time.monotonic()

    # ---- the steps

    def start(self, *, resume: bool) -> dict[str, Any] | None:
        """Continues from the newest checkpoint, or empties the log and starts at step 0.

        Args:
            resume: whether to continue from a checkpoint that is there.

        Returns:
            The state of the checkpoint; None where there is none.

        Raises:
            CheckpointError: there is a checkpoint but ``resume`` is False, or the checkpoint is of another training or
                of a step after the last; or checkpoints do not fit on the disk.
        """
        path = start_or_resume(self.folder / "checkpoints", resume=resume)
        self._require_room()
        if path is None:
            self.log.rewind(-1)
            return None
        loaded = load_checkpoint(
            path,
            models=self._models,
            optimizers=self._optimizers,
            schedulers={"scheduler": self.scheduler},
            identity=self._identity,
        )
        if loaded.step > self.total_steps:
            raise CheckpointError(
                f"the checkpoint {path} was saved after step {loaded.step}, and this training is to end after "
                f"{self.total_steps}: set ppo.updates to at least {loaded.step}, or delete {path.parent} to start again"
            )
        state = loaded.state
        self.take_up(
            loaded.step, metrics=state["metrics"], evaluation=state["evaluation"], seconds=float(state["seconds"])
        )
        self._evaluated = state.get("evaluated")  # earlier versions did not record it
        self._saved = loaded.step, path
        self.log.rewind(loaded.step)
        logger.info("%s: resuming after step %d from %s", self.folder.name, loaded.step, path)
        return state

    def take_up(self, step: int, *, metrics: dict[str, float], evaluation: dict[str, float], seconds: float) -> None:
        """Sets the figures to those at which an earlier sitting ended."""
        self.step, self.metrics, self.evaluation, self._seconds_before = step, metrics, evaluation, seconds

    def run(self, take_step: Callable[[], dict[str, float]], *, label: str, shown: tuple[str, ...] = ()) -> bool:
        """Takes the steps that are left. What the training leaves behind is its caller's to write: no checkpoint is
        made for the end, where nothing would resume from it.

        Args:
            take_step: changes the models once and returns the metrics of that step.
            label: what the progress bar calls the training.
            shown: the metrics that the progress bar shows; without, the first few.

        Returns:
            True where a callback ended the training early.

        Raises:
            KeyboardInterrupt: on Ctrl-C or SIGTERM, with the state saved.
            CheckpointError: a checkpoint could not be written; one in the background after a later step.
        """
        stopped = False
        with StopSignals() as signals, Progress(label, self.total_steps, self.step, keys=shown) as progress:
            try:
                while self.step < self.total_steps and not stopped:
                    metrics = take_step()
                    self.scheduler.step()
                    self.step += 1
                    stopped = any_process(asks_to_stop(self._finish_step(metrics, progress)))
                    self._take_completed(self._background.completed())
                    if signals.received():
                        raise signals.stopped(self.step, self.save())
                    if self._save_every and self.step % self._save_every == 0:
                        self._save_regularly()
                self._take_completed(self._background.wait())
                self._evaluate_end()
                if signals.received():
                    raise signals.stopped(self.step, self.save())
            except BaseException as error:
                self._background.wait_after(error)
                raise
        return stopped

    def _finish_step(self, metrics: dict[str, float], progress: Progress) -> Answers:
        """Evaluates where that is due and logs the step; returns what the callbacks returned."""
        answers: Answers = []
        self.metrics = metrics  # the evaluation may look at them
        every = self._evaluate_every
        if self._evaluate is not None and (self.step == self.total_steps or (every and self.step % every == 0)):
            answers += self.evaluate()
            self.metrics = metrics | self.evaluation_metrics
        self.log.write(self.step, self.metrics)
        return answers + [callback.on_step(self.step, self.metrics) for callback in (progress, *self._callbacks)]

    def _evaluate_end(self) -> None:
        """Evaluates what the training leaves behind, where its last step was not one after which that was due: it was
        stopped early, or resumed where it now ends."""
        if self._evaluate is not None and self._evaluated != self.step:
            self.evaluate()
            self.metrics = self.metrics | self.evaluation_metrics
            self.log.rewind(self.step - 1)
            self.log.write(self.step, self.metrics)

    def evaluate(self) -> Answers:
        """Evaluates if there is an evaluation; returns what the callbacks returned."""
        if self._evaluate is None:
            return []
        self.evaluation, self._evaluated = self._evaluate(), self.step
        return [callback.on_evaluate(self.step, self.evaluation) for callback in self._callbacks]

    @property
    def evaluation_metrics(self) -> dict[str, float]:
        """The last evaluation under the names that metrics.jsonl has for it."""
        return {f"eval/{name}": figure for name, figure in self.evaluation.items()}

    def end(self) -> None:
        """Has the log on the disk, before a record says that all is done, and tells the callbacks."""
        self.log.sync()
        for callback in self._callbacks:
            callback.on_end(self.step, self.metrics)

    @property
    def seconds(self) -> float:
        """Wall-clock time since the training began, over all sittings."""
        return self._seconds_before + time.monotonic() - self._started

    # ---- checkpoints

    def save(self) -> Path:
        """Saves the state after the last step as a checkpoint; a second call for the same step writes nothing. One that
        is being written in the background is completed before."""
        self._take_completed(self._background.wait())
        if self._saved is None or self._saved[0] != self.step:
            self._take_saved(self.step, self.save_to(self.folder / "checkpoints", keep=self._keep_checkpoints))
        assert self._saved is not None
        return self._saved[1]

    def save_to(self, folder: Path, *, keep: int) -> Path:
        """Saves the same state in another folder, from which nothing resumes; no callback is called for it."""
        self._take_completed(self._background.wait())
        self.log.sync()
        return write_checkpoint(folder, self._contents(), keep=keep)

    def _save_regularly(self) -> None:
        if not self._save_in_background:
            self.save()
            return
        self._take_completed(self._background.wait())
        self.log.sync()
        self._background.begin(self.folder / "checkpoints", self._contents(), keep=self._keep_checkpoints)
        self._writing_step = self.step

    def _take_completed(self, path: Path | None) -> None:
        """Takes note of a checkpoint that was written in the background, if it is complete."""
        if path is not None:
            self._take_saved(self._writing_step, path)

    def _take_saved(self, step: int, path: Path) -> None:
        self._saved = step, path
        for callback in self._callbacks:
            callback.on_save(step, path)

    def _contents(self) -> Contents:
        return on_all_processes(
            lambda: contents(
                self.step,
                models=self._models,
                optimizers=self._optimizers,
                schedulers={"scheduler": self.scheduler},
                state={
                    "identity": self._identity,
                    **self._own_state(),
                    "metrics": self.metrics,
                    "evaluation": self.evaluation,
                    "evaluated": self._evaluated,
                    "seconds": self.seconds,
                },
                tensors={},
                config=self._config,
            )
        )

    def _require_room(self) -> None:
        """Says what checkpoints take, before the first step: that hours of work find no room is known in time."""
        optimizer, *others = self._optimizers.values()
        one = checkpoint_bytes(self._models, _parameters_of(optimizer))
        one += sum(master_bytes(parameter) for other in others for parameter in _parameters_of(other))
        number = checkpoints_at_a_time(
            total_steps=self.total_steps, save_every=self._save_every, keep=self._keep_checkpoints
        )

        def look() -> None:
            logger.info("%s", require_room(self.folder / "checkpoints", one=one, number=number, where=str(self.folder)))

        on_main_process(look)


def _parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
