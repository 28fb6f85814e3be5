"""Recipe: a policy trained by PPO on a reward for every token (paper, 3.3 and 3.4). Start reading here.

prompts -> [ answers -> scores -> rewards -> advantages -> update ]*
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import RunConfig
from tlcr.models.actor_critic import ActorCritic
from tlcr.ppo.advantages import compute_advantages
from tlcr.ppo.conversation import Environment
from tlcr.ppo.kl import kl_of
from tlcr.ppo.metrics import Stopwatch, rollout_metrics, update_metrics
from tlcr.ppo.rollout import generate, seeded_generator
from tlcr.ppo.run import Evaluate, PPOResult, PPORun, Refresh, ddp_options
from tlcr.ppo.scores import score_rollout
from tlcr.ppo.update import ppo_update
from tlcr.rewards.composition import compose_rewards
from tlcr.rewards.sources import RewardSource
from tlcr.training.accelerator import open_accelerator
from tlcr.training.callbacks import Callback
from tlcr.training.sharding import gathered, reshard
from tlcr.types import Rollout

__all__ = ["PPOResult", "train_ppo"]


def train_ppo(
    cfg: RunConfig,
    *,
    actor_critic: ActorCritic,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward_source: RewardSource,
    reward_temperature: float = 1.0,
    prompts: Sequence[str],
    folder: str | Path,
    seed: int,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    evaluate: Evaluate | None = None,
    environment: Environment | None = None,
    refresh: Refresh | None = None,
    origin: Mapping[str, Any] | None = None,
) -> PPOResult:
    """Trains a policy and its value model by PPO on a reward for every token.

    Source: the paper, sections 3.3 and 3.4; PPO by Schulman et al. 2017 (arXiv 1707.06347), advantages by Schulman et
    al. 2016 (arXiv 1506.02438), the adaptive KL coefficient by Ziegler et al. 2019 (arXiv 1909.08593). The formulas are
    in the docstrings of ``tlcr.fused_reward``, ``tlcr.fused_gae`` and ``tlcr.ppo_loss``.

    Args:
        cfg: its sections ``ppo``, ``rollout``, ``reward`` and ``kl`` say how; ``data`` how prompts are cut;
            ``sharding`` whether each process holds whole models or a part of them.
        actor_critic: policy and value model, trained in place (and sharded in place).
        reference: a frozen copy of the initial policy; KL is measured against it. It is sharded too.
        tokenizer: the policy's.
        reward_source: gives the rewards of a rollout.
        reward_temperature: the calibrated temperature, which divides the source's logits.
        prompts: texts to answer, complete with template and beginning-of-sequence token.
        folder: gets ``metrics.jsonl`` (its keys: docs/metrics.md) and ``checkpoints/`` while training, then
            ``policy/``, ``value/`` and ``done.json``.
        seed: decides the order of the prompts and every sampled token.
        resume: continue from the newest checkpoint in ``folder``; bit for bit on one process on the CPU. A finished
            run is loaded into ``actor_critic``.
        callbacks: told of every update, evaluation and checkpoint.
        evaluate: called with ``actor_critic`` and the number of updates done, before the first update, every
            ``cfg.ppo.evaluate_every`` updates and after the last one; its figures are logged as eval/<name>.
        environment: turns answers into messages, so that each prompt begins a conversation; None: the one that
            ``cfg.rollout.environment`` names, if any.
        refresh: trains the model of the reward source on the policy's own answers every so many updates; its weights
            are a part of the checkpoints. None: the model stays frozen.
        origin: names what the run stands on and its checkpoints do not hold, such as the weights of the models that
            are passed here: a checkpoint of another origin is refused. None: it is not compared.

    Returns:
        How the run ended: folders of policy and value model, updates, last metrics, last evaluation, seconds.

    Raises:
        ConfigError: settings contradict each other, the reference is the policy itself, the tracker is not installed,
            or the launcher asks for another kind of parallelism.
        DataError: the reward source gave invalid rewards, or a prompt with an answer of full length is longer than
            the model can read.
        CheckpointError: there is a checkpoint or a finished run but ``resume`` is False, or it belongs to another run;
            the disk is full.
        TrainingDiverged: numbers are not finite or the ratio exploded; the state is saved apart, in ``diverged/``.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, with the state saved.
    """
    with open_accelerator(cfg, folder, ddp=ddp_options(cfg.ppo)) as accelerator:
        run = PPORun(
            cfg,
            accelerator=accelerator,
            actor_critic=actor_critic,
            reference=reference,
            tokenizer=tokenizer,
            reward_source=reward_source,
            prompts=prompts,
            folder=folder,
            seed=seed,
            callbacks=callbacks,
            evaluate=evaluate,
            environment=environment,
            refresh=refresh,
            origin=origin,
        )
        with closing(run):
            if not run.begin(resume):
                return run.result(stopped=False)
            stopped = run.train(lambda: _round(run, reward_temperature))
            return run.end(stopped=stopped)


def _round(run: PPORun, reward_temperature: float) -> dict[str, float]:
    """One round of the algorithm; returns its metrics."""
    cfg, accelerator = run.cfg, run.accelerator
    temperature = cfg.rollout.temperature
    watch = Stopwatch(accelerator.device)

    # 1. Prompts x from the data, in an order that the seed decides.
    # 2. Answers a_1 .. a_T from the policy; the end of sequence is an action too. With rollout.ahead they were sampled
    #    while the round before trained.
    def answers(prompts: Sequence[str], update: int) -> Rollout:
        return generate(
            run.actor_critic.policy,
            tokenizer=run.tokenizer,
            prompts=prompts,
            cfg=cfg.rollout,
            max_prompt_tokens=cfg.data.max_prompt_tokens,
            generator=seeded_generator("answers", run.seed, update, accelerator.process_index),
            logprobs=cfg.rollout.off_policy,
            engine=run.engine,
            environment=run.environment,
        )

    with watch.phase("rollout"), gathered(run.actor_critic, only=run.actor_critic.policy):
        rollout = run.next_rollout(answers)

    # 3. Log-probs of every action under policy and reference, and values V(s_t).
    with watch.phase("score"):
        scores = score_rollout(
            run.actor_critic,
            run.reference,
            rollout,
            temperature=temperature,
            micro_batch_size=cfg.rollout.batch_size,
            micro_batch_tokens=cfg.ppo.micro_batch_tokens,
            packed=run.packed,
            exact_kl=cfg.kl_estimator == "full",
        )
        reshard(run.actor_critic, run.reference)

    # 4. A reward for every token, r_t = 2 D(a_t | x, a_<t) - 1, minus the KL penalty.
    with watch.phase("reward"):
        kl_coef = run.kl_controller.coef
        kl_BT = kl_of(scores, cfg.kl_estimator) if cfg.kl.placement == "reward" else None
        rewards = compose_rewards(
            run.reward_signal(rollout, kl_BT),
            rollout.mask_BT,
            ended_B=rollout.ended_B,
            kl_BT=kl_BT,
            kl_coef=kl_coef,
            cfg=cfg.reward,
            temperature=reward_temperature,
            centre=run.centre,
            max_tokens=cfg.rollout.max_new_tokens,
        )

    # 5. Advantages of each action over V, by generalised advantage estimation; those of answers that were drawn from
    #    another distribution than the policy's are weighted.
    with watch.phase("advantages"):
        advantages = compute_advantages(
            rewards,
            scores,
            rollout.mask_BT,
            gamma=cfg.ppo.gamma,
            lam=cfg.ppo.lam,
            whiten=cfg.ppo.whiten,
            accelerator=accelerator,
        )
        advantages, mismatch = run.correction(rollout, scores, advantages)

    # 6. The clipped updates of policy and value model.
    with watch.phase("update"):
        statistics = ppo_update(
            run.parallel,
            run.optimizer,
            rollout,
            scores,
            advantages,
            cfg.ppo,
            cfg.kl,
            kl_coef=kl_coef,
            temperature=temperature,
            reference=run.reference,
            accelerator=accelerator,
            generator=seeded_generator("minibatches", run.seed, run.update, accelerator.process_index),
            value_only=run.warms_up_values,
            packed=run.packed,
        )
        reshard(run.reference)

    # 7. With reward.refresh.every, the discriminator learns from these answers, which are revised and labelled.
    refreshed: dict[str, float] = {}
    if run.refresh is not None and run.refresh.due(run.update + 1):
        with watch.phase("refresh"):
            refreshed = run.refresh(rollout, run.update + 1)

    # 8. Metrics; the KL coefficient adapts to the measured KL.
    metrics = rollout_metrics(rollout, scores, rewards, advantages, cfg.kl_estimator, gamma=cfg.ppo.gamma)
    run.note_pay_for_length(metrics)
    run.kl_controller.update(metrics["kl/per_token"], cfg.ppo.batch_size)
    return {
        **metrics,
        **mismatch,
        **update_metrics(statistics),
        **refreshed,
        **run.learning_rates(),
        "kl/coef": kl_coef,
        **watch.metrics(metrics["length/tokens"]),
    }
