"""What a PPO run keeps between its rounds, and how it is saved, resumed and ended. The algorithm is in train_ppo."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import PPOConfig, RunConfig
from tlcr.errors import CheckpointError, ConfigError
from tlcr.models.actor_critic import ActorCritic
from tlcr.ppo.kl import build_kl_controller
from tlcr.ppo.rollout import PromptStream
from tlcr.rewards.composition import RunningMean
from tlcr.rewards.sources import RewardSource
from tlcr.training.callbacks import Callback
from tlcr.training.checkpoint import as_plain, is_done, load_checkpoint, mark_done, save_checkpoint, start_or_resume
from tlcr.training.distributed import sum_over_processes
from tlcr.training.metrics import MetricsLog, read_metrics
from tlcr.training.optim import build_optimizer, build_scheduler, parameter_groups

logger = logging.getLogger(__name__)

Evaluate = Callable[[ActorCritic, int], Mapping[str, float]]
"""(policy and value model, updates done) to figures by name."""

# A resumed run may go on longer, save and evaluate more often, and cut its batches in another way.
FREE_TO_CHANGE = ("updates", "save_every", "keep_checkpoints", "evaluate_every", "micro_batch_size", "chunk_tokens")


@dataclass(frozen=True)
class PPOResult:
    """How a PPO run ended.

    updates: rounds done. metrics: those of the last one. evaluation: the last evaluation, without the prefix "eval/".
    seconds: over all sittings. stopped: a callback asked to end early.
    """

    policy_folder: Path
    value_folder: Path
    updates: int
    metrics: dict[str, float]
    evaluation: dict[str, float]
    seconds: float
    stopped: bool


class PPORun:
    """Models on their devices, optimiser, controllers, cursor and log of one run."""

    def __init__(
        self,
        cfg: RunConfig,
        *,
        actor_critic: ActorCritic,
        reference: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reward_source: RewardSource,
        prompts: Sequence[str],
        folder: Path,
        seed: int,
        callbacks: Sequence[Callback],
        evaluate: Evaluate | None,
    ) -> None:
        if reference is actor_critic.policy:
            raise ConfigError("the reference is the policy itself, so every KL would be 0; pass a second copy of it")
        self.cfg, self.tokenizer, self.reward_source = cfg, tokenizer, reward_source
        self.folder, self.seed, self.callbacks, self._evaluate = Path(folder), seed, callbacks, evaluate
        self.accelerator = _accelerator(cfg, self.folder)
        check_sizes(cfg.ppo, self.accelerator.num_processes)
        device = self.accelerator.device
        self.reference = reference.requires_grad_(False).eval().to(device)
        self.actor_critic = actor_critic.eval().to(device)
        self.optimizer = build_optimizer(_parameter_groups(self.actor_critic, cfg))
        self.parallel = self.accelerator.prepare_model(self.actor_critic)
        self.scheduler = build_scheduler(
            self.optimizer,
            schedule=cfg.ppo.schedule,
            total_steps=cfg.ppo.updates,
            warmup_steps=cfg.ppo.warmup_updates,
        )
        self.kl_controller = build_kl_controller(cfg.kl)
        self.centre = RunningMean(reduce=sum_over_processes) if cfg.reward.centre else None
        self.prompts = PromptStream(prompts, seed)
        self.log = MetricsLog(self.folder / "metrics.jsonl", self.accelerator)
        self.update = 0
        self.metrics: dict[str, float] = {}
        self.evaluation: dict[str, float] = {}
        self._identity = _identity(cfg, prompts, seed, self.accelerator.num_processes)
        self._seconds_before, self._started = 0.0, time.monotonic()
        self._saved: tuple[int, Path] | None = None

    # ---- rounds

    def take_prompts(self) -> list[str]:
        """This process's share of the next round's prompts."""
        prompts = self.prompts.take(self.cfg.ppo.batch_size)
        return prompts[self.accelerator.process_index :: self.accelerator.num_processes]

    @property
    def warms_up_values(self) -> bool:
        return self.update < self.cfg.ppo.value_warmup_updates

    def learning_rates(self) -> dict[str, float]:
        rates = self.scheduler.get_last_lr()
        return {"policy/learning_rate": float(rates[0]), "value/learning_rate": float(rates[-1])}

    def finish_round(self, metrics: dict[str, float]) -> list[bool | None]:
        """Count the round, log it, evaluate where that is due; returns what the callbacks answered."""
        self.scheduler.step()
        self.update += 1
        answers: list[bool | None] = []
        every = self.cfg.ppo.evaluate_every
        if self.update == self.cfg.ppo.updates or (every and self.update % every == 0):
            answers += self.evaluate()
            metrics = metrics | {f"eval/{name}": figure for name, figure in self.evaluation.items()}
        self.metrics = metrics
        self.log.write(self.update, metrics)
        return answers + [callback.on_step(self.update, metrics) for callback in self.callbacks]

    def evaluate(self) -> list[bool | None]:
        """Evaluate the policy; returns what the callbacks answered."""
        if self._evaluate is None:
            return []
        self.evaluation = dict(self._evaluate(self.actor_critic, self.update))
        return [callback.on_evaluate(self.update, self.evaluation) for callback in self.callbacks]

    def begin(self, resume: bool) -> bool:
        """Continue from the newest checkpoint, or evaluate the policy as it comes and begin.

        Returns whether there is anything left to do: a finished run is loaded, not repeated.
        """
        if (self.folder / "done.json").is_file():
            self._load_finished(resume)
            return False
        path = start_or_resume(self.folder / "checkpoints", resume=resume)
        if path is not None:
            self._load(path)
            return True
        self.log.rewind(-1)
        self.evaluate()
        if self.evaluation:
            self.log.write(0, {f"eval/{name}": figure for name, figure in self.evaluation.items()})
        return True

    # ---- states

    @property
    def save_is_due(self) -> bool:
        every = self.cfg.ppo.save_every
        return bool(every) and self.update % every == 0

    def save(self) -> Path:
        """A checkpoint of the state between two rounds."""
        if self._saved is None or self._saved[0] != self.update:
            path = self._save_to(self.folder / "checkpoints", keep=self.cfg.ppo.keep_checkpoints)
            self._saved = self.update, path
            for callback in self.callbacks:
                callback.on_save(self.update, path)
        return self._saved[1]

    def save_diverged(self) -> Path:
        """The state in which training broke off, apart from the checkpoints that a resumed run starts from."""
        return self._save_to(self.folder / "diverged", keep=1)

    def _save_to(self, folder: Path, keep: int) -> Path:
        return save_checkpoint(
            folder,
            self.update,
            models={"actor_critic": self.actor_critic},
            optimizers={"optimizer": self.optimizer},
            schedulers={"scheduler": self.scheduler},
            state={
                "identity": self._identity,
                "cursor": self.prompts.cursor,
                "kl_controller": self.kl_controller.state_dict(),
                "centre": None if self.centre is None else self.centre.state_dict(),
                "reward_source": self.reward_source.state_dict(),
                "metrics": self.metrics,
                "evaluation": self.evaluation,
                "seconds": self.seconds,
            },
            tensors={},
            config=self.cfg,
            keep=keep,
        )

    def _load(self, path: Path) -> None:
        loaded = load_checkpoint(
            path,
            models={"actor_critic": self.actor_critic},
            optimizers={"optimizer": self.optimizer},
            schedulers={"scheduler": self.scheduler},
        )
        state = loaded.state
        for name, wanted in self._identity.items():
            if state["identity"][name] != wanted:
                raise CheckpointError(
                    f"the checkpoint {path} belongs to a run with other {name}: it has {state['identity'][name]!r}, "
                    f"this run {wanted!r}; restore them, or name another output_dir"
                )
        self.update, self.metrics, self.evaluation = loaded.step, state["metrics"], state["evaluation"]
        self.prompts.cursor = state["cursor"]
        self.kl_controller.load_state_dict(state["kl_controller"])
        if self.centre is not None:
            self.centre.load_state_dict(state["centre"])
        self.reward_source.load_state_dict(state["reward_source"])
        self._seconds_before = state["seconds"]
        self._saved = self.update, path
        self.log.rewind(self.update)
        logger.info("Resuming from %s", path)

    def _load_finished(self, resume: bool) -> None:
        if not resume or not is_done(self.folder, self._done_config):
            found = " of other settings, prompts or seed; restore them" if resume else "; pass --resume"
            raise CheckpointError(
                f"{self.folder} holds a finished run{found} to load what it trained, name another output_dir, or "
                "delete that folder to train again"
            )
        trained = ActorCritic.load(self.cfg.model.saved_in(self.folder / "policy"), self.folder / "value")
        self.actor_critic.load_state_dict(trained.state_dict())
        done = json.loads((self.folder / "done.json").read_text(encoding="utf-8"))
        last = read_metrics(self.log.path)[-1]
        self.update, self.metrics, self._seconds_before = last["step"], done["metrics"], done["seconds"]
        self.evaluation = {key.removeprefix("eval/"): figure for key, figure in last.items() if key.startswith("eval/")}

    @property
    def _done_config(self) -> dict[str, Any]:
        return {**self._identity, "updates": self.cfg.ppo.updates}

    @property
    def seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def end(self, *, stopped: bool) -> PPOResult:
        """Write policy and value model for others to load, and mark the run as done."""
        self.actor_critic.save(self.tokenizer, self.folder / "policy", self.folder / "value")
        for callback in self.callbacks:
            callback.on_end(self.update, self.metrics)
        for tracker in self.accelerator.trackers:  # not end_training: it would part the processes for good
            tracker.finish()
        mark_done(self.folder, config=self._done_config, metrics=self.metrics, seconds=self.seconds)
        return self.result(stopped=stopped)

    def result(self, *, stopped: bool) -> PPOResult:
        return PPOResult(
            self.folder / "policy",
            self.folder / "value",
            self.update,
            self.metrics,
            self.evaluation,
            self.seconds,
            stopped,
        )


def check_sizes(ppo: PPOConfig, num_processes: int) -> None:
    """Raise ConfigError where batches cannot be cut and shared evenly."""
    if ppo.batch_size % ppo.minibatch_size or ppo.minibatch_size % num_processes:
        raise ConfigError(
            f"ppo.batch_size is {ppo.batch_size} and ppo.minibatch_size {ppo.minibatch_size}, on {num_processes} "
            "process(es); make the batch a multiple of the minibatch, and the minibatch a multiple of the processes"
        )


def _accelerator(cfg: RunConfig, folder: Path) -> Accelerator:
    # Only where a network sits out some updates does DDP have to look for what took part.
    partial = cfg.ppo.value_warmup_updates > 0 or cfg.ppo.value_coef == 0
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=None if cfg.tracker == "none" else cfg.tracker,
        project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=partial, broadcast_buffers=False)],
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ConfigError(
            f"tlcr trains with plain data parallelism, and the launcher asks for {accelerator.distributed_type.value}; "
            "run 'accelerate launch' without DeepSpeed, FSDP or Megatron"
        )
    if cfg.tracker != "none":
        accelerator.init_trackers("tlcr")
    return accelerator


def _parameter_groups(actor_critic: ActorCritic, cfg: RunConfig) -> list[dict[str, Any]]:
    critic = actor_critic.value_head if actor_critic.value_model is None else actor_critic.value_model
    assert critic is not None
    decay = cfg.ppo.weight_decay
    return [
        *parameter_groups(actor_critic.policy, learning_rate=cfg.ppo.learning_rate, weight_decay=decay),
        *parameter_groups(critic, learning_rate=cfg.ppo.value_learning_rate, weight_decay=decay),
    ]


def _identity(cfg: RunConfig, prompts: Sequence[str], seed: int, num_processes: int) -> dict[str, Any]:
    """What a checkpoint must share with this run for the one to continue the other."""
    ppo = {name: value for name, value in as_plain(cfg.ppo).items() if name not in FREE_TO_CHANGE}
    return {
        "settings": {"ppo": ppo, **{name: as_plain(getattr(cfg, name)) for name in ("reward", "kl", "rollout")}},
        "prompts": hashlib.sha256("\0".join(prompts).encode()).hexdigest(),
        "seed": seed,
        "processes": num_processes,
    }
