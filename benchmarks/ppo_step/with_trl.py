"""PPO rounds of the task with TRL's PPOTrainer; started by `benchmarks.ppo_step`.

The trainer is used as it comes. Its phases are told apart by what it calls between them: `batch_generation` ends the
rollout, `gc.collect` the scoring (which includes its reward model), `numpy.random.permutation` begins the update.

Its batch is `per_device_train_batch_size` times `gradient_accumulation_steps`, and it steps once for so many answers:
where a minibatch is less than the batch, it takes one optimiser step where the others take one for each minibatch. Of
a dataset's last batch accelerate accumulates nothing, so that there are more batches than rounds.
"""

from __future__ import annotations

import itertools
import tempfile
import time
import types
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from torch.profiler import record_function
from transformers import TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.ppo_step.journal import Journal
from benchmarks.ppo_step.profiling import PREFIX, Profile
from benchmarks.ppo_step.task import PHASES, Task, causal_lm, device, prompts_of, scorer, tokenizer_of


class Clock(TrainerCallback):
    """Notes when each phase of a round ended, and lets the profile see the round after the last that counts."""

    def __init__(self, task: Task, journal: Journal) -> None:
        self._journal, self._rounds = journal, task.rounds
        self._profile = None if task.profile is None else Profile(Path(task.profile))
        self._ends: list[float] = []
        self._done = 0
        self._part: record_function | None = None

    def ended(self, phase: str) -> None:
        """Only the first end of a phase counts, and only in its turn."""
        if len(self._ends) - 1 == PHASES.index(phase):
            self._ends.append(now())
            self._journal.phase(phase, self._ends[-1] - self._ends[-2])
            self._enter(None if phase == PHASES[-1] else PHASES[PHASES.index(phase) + 1])

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ended(PHASES[-1])
        seconds = [later - earlier for earlier, later in itertools.pairwise(self._ends)]
        times = {**dict(zip(PHASES, seconds, strict=True)), "total": self._ends[-1] - self._ends[0]}
        self._done += 1
        if self._done <= self._rounds:
            self._journal.round(times)
        if self._done == self._rounds and self._profile is not None:
            self._profile.start()
        elif self._done >= self._rounds:
            if self._profile is not None:
                self._profile.end()
            raise AllDone
        self._begin()

    def _begin(self) -> None:
        self._ends = [now()]
        self._enter(PHASES[0])

    def _enter(self, phase: str | None) -> None:
        if self._part is not None:
            self._part.__exit__(None, None, None)
        self._part = None if phase is None else record_function(PREFIX + phase)
        if self._part is not None:
            self._part.__enter__()


class AllDone(Exception):
    """Ends the training before it generates answers for a table, which nobody asked for."""


def now() -> float:
    """When everything asked of a GPU so far is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def watch_phases(clock: Clock) -> None:
    generation, permutation, collect = (
        ppo_trainer.batch_generation,
        ppo_trainer.np.random.permutation,
        ppo_trainer.gc.collect,
    )

    def batch_generation(*args: Any, **kwargs: Any) -> Any:
        result = generation(*args, **kwargs)
        clock.ended("rollout")
        return result

    def garbage(*args: Any) -> int:
        found = int(collect(*args))
        clock.ended("score")  # in its turn: garbage is also collected before a round's answers are generated
        return found

    def permuted(*args: Any) -> Any:
        clock.ended("reward")
        return permutation(*args)

    ppo_trainer.batch_generation = batch_generation
    ppo_trainer.gc = types.SimpleNamespace(collect=garbage)
    ppo_trainer.np = types.SimpleNamespace(random=types.SimpleNamespace(permutation=permuted))


def main() -> None:
    warnings.simplefilter("ignore")
    task, path = Task.from_argv()
    journal = Journal(path)
    journal.note("imported")
    torch.set_num_threads(task.threads)
    with journal.making("tokenizer and prompts"):
        tokenizer = tokenizer_of(task)
        tokenizer.padding_side = "left"
        prompts = prompts_of(task, tokenizer, task.batch)
    clock = Clock(task, journal)
    watch_phases(clock)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    rows = {"input_ids": ids * (task.rounds + 2)}
    with journal.making("policy and reference"):
        policy, reference = (causal_lm(task, tokenizer) for _ in range(2))
    with journal.making("value model and reward model"):
        value_model, reward_model = scorer(task, tokenizer), scorer(task, tokenizer).eval()
    with tempfile.TemporaryDirectory() as folder:
        cfg = PPOConfig(
            output_dir=folder,
            use_cpu=device().type == "cpu",
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-6,
            total_episodes=task.batch * (task.rounds + 1),
            per_device_train_batch_size=task.micro_batch,
            gradient_accumulation_steps=task.batch // task.micro_batch,
            num_mini_batches=task.batch // task.minibatch,
            local_rollout_forward_batch_size=task.batch,
            num_ppo_epochs=task.epochs,
            response_length=task.response_tokens,
            temperature=1.0,
            kl_coef=0.05,
            num_sample_generations=0,
            gradient_checkpointing=False,
        )
        trainer = PPOTrainer(
            args=cfg,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward_model,
            value_model=value_model,
            train_dataset=Dataset.from_dict(rows),
            callbacks=[clock],
        )
        if trainer.args.batch_size != task.batch:
            raise SystemExit(
                f"TRL takes {trainer.args.batch_size} answers a round, wanted {task.batch}: it would be given the time "
                "of other work; make --batch a multiple of --micro-batch"
            )
        try:
            trainer.train()
        except AllDone:
            versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
            journal.note("end", versions=versions)


if __name__ == "__main__":
    main()
