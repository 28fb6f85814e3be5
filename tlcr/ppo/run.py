"""The state of a PPO run between its rounds, and how it is saved, resumed and ended. The algorithm is in train_ppo."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import SCORED_KINDS, SHARED_SCORE_KINDS, WHOLE_ANSWER_KINDS, PPOConfig, RunConfig, undecisive
from tlcr.config.stages import DONE
from tlcr.engines import build_engine, resolved
from tlcr.errors import CheckpointError, ConfigError, TrainingDiverged
from tlcr.models.actor_critic import ActorCritic
from tlcr.models.lora.adapters import adapter_of, base_parameters, own_parameters, own_part, role_of
from tlcr.models.lora.files import save_trained
from tlcr.ppo.ahead import Ahead
from tlcr.ppo.best import BEST, BestPolicy, Per
from tlcr.ppo.conversation import Environment
from tlcr.ppo.correction import Correction
from tlcr.ppo.kl import build_kl_controller
from tlcr.ppo.packing import packs_rows
from tlcr.ppo.rollout import PromptStream, check_answers_fit
from tlcr.rewards.asking import ask_source
from tlcr.rewards.centre import build_centre
from tlcr.rewards.sources import RewardSource, models_of
from tlcr.text.truncation import note_cut_prompts
from tlcr.training.callbacks import Callback
from tlcr.training.checkpoint import as_plain, reading
from tlcr.training.distributed import on_all_processes, sum_over_processes
from tlcr.training.done import AGAIN, done_config, mark_done
from tlcr.training.loop import TrainingLoop, settings_without
from tlcr.training.metrics import read_metrics
from tlcr.training.optim import build_optimizer, build_scheduler, parameter_groups
from tlcr.training.sharding import plan, shard_all
from tlcr.training.trained_part import digest, trained_part
from tlcr.types import RewardSignal, Rollout

logger = logging.getLogger(__name__)

Evaluate = Callable[[ActorCritic, int], Mapping[str, float]]
"""(policy and value model, updates done) to figures by name."""


class Refresh(Protocol):
    """Trains the model that a reward source asks, during PPO (``tlcr.recipes.refresh_discriminator``).

    Attributes:
        model: what is trained; a part of PPO's checkpoints.
        optimizer: what trains it. Of its states PPO's checkpoints hold those that are there between two refreshes.
    """

    model: PreTrainedModel
    optimizer: Optimizer

    def due(self, updates: int) -> bool:
        """Whether it follows after this many updates.

        Args:
            updates: how many updates are done.

        Returns:
            True where ``__call__`` is to be called.
        """
        ...

    def __call__(self, rollout: Rollout, updates: int) -> dict[str, float]:
        """Trains the model on the answers of a round.

        Args:
            rollout: the answers.
            updates: how many updates are done, that of this round included.

        Returns:
            Figures by name, for the log.
        """
        ...

    def save(self, folder: Path) -> None:
        """Writes the model.

        Args:
            folder: of the PPO run.
        """
        ...

    def restore(self, folder: Path) -> None:
        """Loads the weights that ``save`` wrote.

        Args:
            folder: of the PPO run.
        """
        ...


FREE_TO_CHANGE = ("updates", "evaluate_every", "keep_best", "best_max_kl", *undecisive(PPOConfig))
"""What a resumed run may change: the results of a round do not depend on it; on updates only by a schedule."""
PAYS_FOR_LENGTH = 0.2
"""Of the mean size of a token's reward: a mean beyond this share of it pays for length, or for its lack (ours)."""
SERVER_WEIGHTS = "server_weights"
"""Folder of a PPO run in which servers find the policy's weights; it is there while they read them."""
SHOWN = ("reward/mean_score", "kl/per_token", "policy/entropy", "length/mean")


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
    """Models on their devices, optimiser, controllers and cursor of one run; its steps are those of ``loop``."""

    def __init__(
        self,
        cfg: RunConfig,
        *,
        accelerator: Accelerator,
        actor_critic: ActorCritic,
        reference: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reward_source: RewardSource,
        prompts: Sequence[str],
        folder: str | Path,
        seed: int,
        callbacks: Sequence[Callback],
        evaluate: Evaluate | None,
        environment: Environment | None = None,
        refresh: Refresh | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        if reference is actor_critic.policy:
            raise ConfigError("the reference is the policy itself, so every KL would be 0; pass a second copy of it")
        check_sizes(cfg.ppo, accelerator.num_processes)
        cfg = replace(cfg, rollout=resolved(cfg.rollout, actor_critic.policy))
        self.cfg, self.tokenizer, self.reward_source = cfg, tokenizer, reward_source
        self.folder, self.seed, self.accelerator = Path(folder), seed, accelerator
        for parameter in own_parameters(reference):
            parameter.requires_grad_(False)
        self.reference, self.actor_critic = reference.eval(), actor_critic.eval()
        self.sharding = plan(cfg.sharding)
        if self.sharding is None:
            self.reference.to(accelerator.device)
            self.actor_critic.to(accelerator.device)
        # a judge that is a role shares their layers
        shard_all([self.reference, self.actor_critic, *filter(role_of, models_of(reward_source))], self.sharding)
        self.packed = packs_rows(cfg.ppo.packing, self.actor_critic, self.reference)
        of_policy, of_values = _parameter_groups(self.actor_critic, cfg.ppo)
        self.optimizer = build_optimizer([*of_policy, *of_values])
        self.parallel = self.actor_critic if self.sharding else _data_parallel(self.actor_critic, accelerator)
        self.kl_controller = build_kl_controller(cfg.kl, cfg.ppo)
        self.centre = build_centre(cfg.reward, reduce=sum_over_processes)
        self.engine = build_engine(cfg.rollout, self.actor_critic.policy, self.folder / SERVER_WEIGHTS)
        self.correction = Correction(cfg.rollout)
        self._warned_of_length = False
        self.environment, self.ahead, self.refresh = environment, Ahead(), refresh
        self.best = BestPolicy(self.folder / BEST, max_kl=cfg.ppo.best_max_kl) if cfg.ppo.keep_best else None
        self.prompts = PromptStream(prompts, seed)
        self._identity = {
            **_identity(cfg, prompts, seed, None if self.sharding else accelerator.num_processes),
            **_identity_of_frozen(self.actor_critic, cfg),
            **({} if origin is None else {"origin": as_plain(origin)}),
            **({} if evaluate is None else {"evaluation": cfg.evaluation.judged_by}),
        }
        self.loop = TrainingLoop(
            self.folder,
            total_steps=cfg.ppo.updates,
            evaluate_every=cfg.ppo.evaluate_every,
            save_every=cfg.ppo.save_every,
            keep_checkpoints=cfg.ppo.keep_checkpoints,
            accelerator=accelerator,
            models={
                "actor_critic": trained_part(self.actor_critic),
                **({} if refresh is None else {"refreshed": refresh.model}),
            },
            optimizer=self.optimizer,
            masters={} if refresh is None else {"refreshed": refresh.optimizer},
            scheduler=build_scheduler(
                self.optimizer,
                schedule=cfg.ppo.schedule,
                total_steps=cfg.ppo.updates,
                warmup_steps=cfg.ppo.warmup_updates,
                first_step=cfg.ppo.value_warmup_updates,
                warming_groups=len(of_policy),
            ),
            identity=self._identity,
            config=cfg,
            evaluate=None if evaluate is None else lambda: self._evaluate(evaluate),
            callbacks=callbacks,
            own_state=self._own_state,
            save_in_background=cfg.ppo.save_in_background,
        )

    # ---- rounds

    @property
    def update(self) -> int:
        """Rounds done, over all sittings."""
        return self.loop.step

    def take_prompts(self) -> list[str]:
        """This process's share of the next round's prompts."""
        prompts = self.prompts.take(self.cfg.ppo.batch_size)
        return prompts[self.accelerator.process_index :: self.accelerator.num_processes]

    def next_rollout(self, sample: Callable[[Sequence[str], int], Rollout]) -> Rollout:
        """The answers of this round; with ``rollout.ahead`` those of the next one are begun.

        Args:
            sample: answers prompts for a round, by the weights that the engine has.

        Returns:
            The answers of this process.
        """
        # The answers of one process may fail alone, as by its environment: the others would wait for it in a round.
        rollout = on_all_processes(self.ahead.take)
        old = rollout is not None
        if rollout is None:
            prompts = self.take_prompts()
            self.engine.refresh()
            rollout = on_all_processes(lambda: sample(prompts, self.update))
        if self.cfg.rollout.ahead and self.update + 1 < self.cfg.ppo.updates:
            cursor, following, update = self.prompts.cursor, self.take_prompts(), self.update + 1
            if old:
                self.engine.refresh()
            self.ahead.begin(lambda: sample(following, update), cursor=cursor)
        return rollout

    def note_pay_for_length(self, metrics: Mapping[str, float]) -> None:
        """Warns, once in a sitting, where tokens earn on average what only length decides.

        A centred reward earns nothing on average; one that is paid for a whole answer, or shared out from it, is not
        earned by writing more.

        Args:
            metrics: those of the round.
        """
        reward = self.cfg.reward
        mean, size = metrics["reward/mean_token"], metrics["reward/mean_abs_token"]
        by_the_token = (
            reward.kind not in (*WHOLE_ANSWER_KINDS, *SHARED_SCORE_KINDS) and metrics["reward/share_dense"] > 0
        )
        if self._warned_of_length or reward.centre or not by_the_token or abs(mean) <= PAYS_FOR_LENGTH * size:
            return
        self._warned_of_length = True
        if self.accelerator.is_main_process:
            logger.warning(
                "update %d: a token earns %+.3f on average, KL included, and the mean size of a reward is %.3f: every "
                "further token %s, whatever it says, and answers may %s; set reward.centre: true, or watch length/mean",
                self.update + 1,
                mean,
                size,
                "pays" if mean > 0 else "costs",
                "grow to the length limit" if mean > 0 else "shrink to nothing",
            )

    def close(self) -> None:
        """Lets go of what is held outside of this process."""
        self.ahead.close()
        self.engine.close()

    def reward_signal(self, rollout: Rollout, kl_BT: Tensor | None) -> RewardSignal:
        """The source's signal for this process's answers, with a KL that can be subtracted from it.

        Every process calls it. An error that the answers of one process cause is raised on all: they save together.
        """
        subtracted_BT = kl_BT if self.kl_controller.coef != 0 else None
        return ask_source(self.reward_source, rollout, self.cfg.reward, kl_BT=subtracted_BT)

    @property
    def warms_up_values(self) -> bool:
        return self.update < self.cfg.ppo.value_warmup_updates

    def learning_rates(self) -> dict[str, float]:
        """The rates of the round that is being done."""
        rates = self.loop.scheduler.get_last_lr()
        return {"policy/learning_rate": float(rates[0]), "value/learning_rate": float(rates[-1])}

    def begin(self, resume: bool) -> bool:
        """Continues from the newest checkpoint, or evaluates the untrained policy and begins.

        Returns whether there is anything left to do: a finished run is loaded, not repeated.
        """
        if (self.folder / DONE).is_file():
            self._load_finished(resume)
            return False
        longest = note_cut_prompts(self.tokenizer, self.prompts.texts, self.cfg.data, stage="PPO")
        # The longest prompt may come last: the run would end there, after hours.
        check_answers_fit(self.actor_critic.policy, longest, self.cfg.rollout, self.environment)
        state = self.loop.start(resume=resume)
        if self.best is not None:
            self.best.begin(resumed=state is not None, state=(state or {}).get("best"))
        if state is not None:
            self._load_own_state(state)
        else:
            self.loop.evaluate()
            if self.loop.evaluation:
                self.loop.log.write(0, self.loop.evaluation_metrics)
        return True

    def train(self, take_round: Callable[[], dict[str, float]]) -> bool:
        """Does the rounds that are left; True where a callback ended them early.

        take_round: one round of the algorithm; returns its metrics. If it raises TrainingDiverged, the state at
        that moment is saved apart from the checkpoints from which a resumed run starts.
        """

        def take_step() -> dict[str, float]:
            try:
                return take_round()
            except TrainingDiverged as error:
                saved = self.loop.save_to(self.folder / "diverged", keep=1)
                raise TrainingDiverged(
                    f"update {self.update + 1}: {error}. The state is saved in {saved}; --resume continues from the "
                    "last checkpoint before it"
                ) from error

        return self.loop.run(take_step, label="ppo", shown=SHOWN)

    def end(self, *, stopped: bool) -> PPOResult:
        """Writes policy and value model for others to load, and marks the run as done."""
        self.actor_critic.save(self.tokenizer, self.folder / "policy", self.folder / "value")
        if self.refresh is not None:
            self.refresh.save(self.folder)
        if self.best is not None:
            logger.info("%s", self.best)
        self.loop.end()
        loop = self.loop
        ended = {"updates": loop.step, "evaluation": loop.evaluation}
        mark_done(self.folder, config=self._done_config, metrics=loop.metrics, seconds=loop.seconds, ended=ended)
        return self.result(stopped=stopped)

    def result(self, *, stopped: bool) -> PPOResult:
        loop = self.loop
        return PPOResult(
            self.folder / "policy",
            self.folder / "value",
            loop.step,
            loop.metrics,
            loop.evaluation,
            loop.seconds,
            stopped,
        )

    def _evaluate(self, evaluate: Evaluate) -> dict[str, float]:
        self.ahead.settle()  # an evaluation may give the servers weights of its own
        figures = dict(evaluate(self.actor_critic, self.update))
        if self.best is None or not self.update:  # the untrained policy is there already
            return figures
        policy = self.actor_critic.policy
        self.best.consider(
            self.update, figures, lambda folder: save_trained(policy, self.tokenizer, folder), per=self._paid_per
        )
        return figures | self.best.metrics()

    @property
    def _paid_per(self) -> Per:
        """What has one reward: a token, or an answer that is scored as a whole."""
        kind = self.cfg.reward.kind
        by_a_function = kind == "callable" and self.loop.metrics.get("reward/share_dense") == 0
        return "answer" if kind in SCORED_KINDS or by_a_function else "token"

    # ---- states

    def _own_state(self) -> dict[str, Any]:
        return {
            **self.ahead.state(self.prompts.cursor),
            "kl_controller": self.kl_controller.state_dict(),
            "centre": None if self.centre is None else self.centre.state_dict(),
            "reward_source": self.reward_source.state_dict(),
            **({} if self.best is None else {"best": self.best.state_dict()}),
        }

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        device = self.accelerator.device
        self.prompts.cursor = self.ahead.load(state, pad_id=self.tokenizer.pad_token_id, device=device)
        self.kl_controller.load_state_dict(state["kl_controller"])
        if self.centre is not None:
            self.centre.load_state_dict(state["centre"])
        self.reward_source.load_state_dict(state["reward_source"])

    def _load_finished(self, resume: bool) -> None:
        if not resume or not self._is_what_ended():
            found = " of other settings, prompts, seed or origin; restore them" if resume else "; pass --resume"
            raise CheckpointError(
                f"{self.folder} holds a finished run{found} to load what it trained, name another output_dir, or "
                "delete that folder to train again"
            )
        own = self.cfg.model.saved_in(self.folder / "policy")
        self.actor_critic.restore(own, self.folder / "value", sharding=self.sharding)
        if self.refresh is not None:
            self.refresh.restore(self.folder)
        with reading(self.folder / DONE, AGAIN):
            done = json.loads((self.folder / DONE).read_text(encoding="utf-8"))
            if "updates" not in done:  # earlier versions left them to the log
                last = read_metrics(self.loop.log.path)[-1]
                figures = {name.removeprefix("eval/"): x for name, x in last.items() if name.startswith("eval/")}
                done |= {"updates": last["step"], "evaluation": figures}
            self.loop.take_up(
                done["updates"], metrics=done["metrics"], evaluation=done["evaluation"], seconds=done["seconds"]
            )

    def _is_what_ended(self) -> bool:
        ended, now = _without_processes(done_config(self.folder, self._done_config)), as_plain(self._done_config)
        for record in (ended, now):  # what was trained may be evaluated by anything
            record.pop("evaluation", None)
        if "origin" not in ended or "origin" not in now:  # earlier versions did not record it
            ended.pop("origin", None)
            now.pop("origin", None)
        return ended == now

    @property
    def _done_config(self) -> dict[str, Any]:
        """What the trained models depend on: any number of processes may load them, whole or in shards. And what judged
        the evaluations of the training."""
        return {**_without_processes(self._identity), "updates": self.cfg.ppo.updates}


def _without_processes(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name != "processes"}


def _data_parallel(actor_critic: ActorCritic, accelerator: Accelerator) -> ActorCritic | DistributedDataParallel:
    with warnings.catch_warnings():
        # accelerate has no field for the name that newer versions of torch give to this option
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        parallel: ActorCritic | DistributedDataParallel = accelerator.prepare_model(actor_critic)
    return parallel


def ddp_options(ppo: PPOConfig) -> DistributedDataParallelKwargs:
    """DDP must look for unused parameters only where a network takes no part in some updates."""
    partial = ppo.value_warmup_updates > 0 or ppo.value_coef == 0
    return DistributedDataParallelKwargs(find_unused_parameters=partial, broadcast_buffers=False)


def check_sizes(ppo: PPOConfig, num_processes: int) -> None:
    """Raise ConfigError where batches cannot be cut and shared evenly."""
    if (problem := ppo.size_problem(num_processes)) is not None:
        raise ConfigError(problem)


def _parameter_groups(actor_critic: ActorCritic, ppo: PPOConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those of the policy, and those of the values."""
    policy, decay = own_part(actor_critic.policy), ppo.weight_decay
    return (
        parameter_groups(policy, learning_rate=ppo.learning_rate, weight_decay=decay),
        parameter_groups(actor_critic.critic, learning_rate=ppo.value_learning_rate, weight_decay=decay),
    )


def _identity(cfg: RunConfig, prompts: Sequence[str], seed: int, num_processes: int | None) -> dict[str, Any]:
    """What must be equal in a checkpoint and in this run to resume.

    num_processes: None where models are sharded, whose checkpoints any number of processes reads.
    """
    ppo = settings_without(cfg.ppo, FREE_TO_CHANGE)
    # Checkpoints of earlier versions name no engine: they sampled by generate. Nor do they name a correction, which
    # changes nothing where answers are drawn from the policy itself.
    without = [*undecisive(cfg.rollout)]
    if cfg.rollout.engine == "generate":
        without.append("engine")
    if cfg.rollout.environment is None:
        without += ["environment", "max_turns", "max_message_tokens"]
    if not cfg.rollout.ahead:
        without.append("ahead")
    if not cfg.rollout.off_policy:
        without += ["correction", "correction_max", "correction_min"]
    rollout = settings_without(cfg.rollout, without)
    kl = as_plain(cfg.kl)
    if cfg.kl.target is None:
        kl["horizon"] = 10_000  # what earlier versions wrote; without a target it has no effect
    unused = () if cfg.reward.overlong_buffer else ("overlong_buffer", "overlong_penalty")
    reward = settings_without(cfg.reward, unused if cfg.reward.refresh.every else (*unused, "refresh"))
    return {
        "settings": {"ppo": ppo, "reward": reward, "kl": kl, "rollout": rollout},
        "prompts": hashlib.sha256("\0".join(prompts).encode()).hexdigest(),
        "seed": seed,
        **({} if cfg.ppo.schedule == "constant" else {"updates": cfg.ppo.updates}),  # the rates fall towards the last
        **({} if num_processes is None else {"processes": num_processes}),
    }


def _identity_of_frozen(actor_critic: ActorCritic, cfg: RunConfig) -> dict[str, Any]:
    """The weights that the checkpoints leave out, and the adapters on them; nothing where all weights are trained."""
    frozen = list(base_parameters(actor_critic))
    lora = {} if adapter_of(actor_critic.policy) is None else {"lora": as_plain(cfg.lora)}
    return {"frozen": digest(frozen), **lora} if frozen else {}
