"""PPO rounds of the task with TRL's PPOTrainer; started by `benchmarks.ppo_step`.

The trainer is used as it comes. Its phases are told apart by what it calls between them: `batch_generation` ends the
rollout, `gc.collect` the scoring (which includes its reward model), `numpy.random.permutation` begins the update.
"""

from __future__ import annotations

import itertools
import tempfile
import time
import types
import warnings
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.ppo_step.task import PHASES, Task, causal_lm, prompts_of, scorer, tokenizer_of, write_result


class Clock(TrainerCallback):
    """Notes when each phase of a round ended."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []
        self._marks: dict[str, float] = {}

    def mark(self, name: str) -> None:
        self._marks.setdefault(name, now())

    def mark_scored(self) -> None:
        """Garbage is also collected before a round's answers are generated."""
        if "generated" in self._marks:
            self.mark("scored")

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        end, marks = now(), self._marks
        times = [marks["begin"], marks["generated"], marks["scored"], marks["rewarded"], end]
        seconds = [later - earlier for earlier, later in itertools.pairwise(times)]
        self.rounds.append({**dict(zip(PHASES, seconds, strict=True)), "total": end - times[0]})
        self._begin()

    def _begin(self) -> None:
        self._marks = {"begin": now()}


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
        clock.mark("generated")
        return result

    def garbage(*args: Any) -> int:
        found = int(collect(*args))
        clock.mark_scored()
        return found

    def permuted(*args: Any) -> Any:
        clock.mark("rewarded")
        return permutation(*args)

    ppo_trainer.batch_generation = batch_generation
    ppo_trainer.gc = types.SimpleNamespace(collect=garbage)
    ppo_trainer.np = types.SimpleNamespace(random=types.SimpleNamespace(permutation=permuted))


def main() -> None:
    warnings.simplefilter("ignore")
    task, result = Task.from_argv()
    torch.set_num_threads(task.threads)
    tokenizer = tokenizer_of(task)
    tokenizer.padding_side = "left"
    clock = Clock()
    watch_phases(clock)
    prompts = prompts_of(task, tokenizer, task.batch)
    rows = {"input_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]}
    with tempfile.TemporaryDirectory() as folder:
        cfg = PPOConfig(
            output_dir=folder,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-6,
            total_episodes=task.batch * task.rounds,
            per_device_train_batch_size=task.micro_batch,
            gradient_accumulation_steps=task.minibatch // task.micro_batch,
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
            model=causal_lm(task, tokenizer),
            ref_model=causal_lm(task, tokenizer),
            reward_model=scorer(task, tokenizer).eval(),
            value_model=scorer(task, tokenizer),
            train_dataset=Dataset.from_dict(rows),
            callbacks=[clock],
        )
        trainer.train()
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    write_result(result, clock.rounds, versions)


if __name__ == "__main__":
    main()
