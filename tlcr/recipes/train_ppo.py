"""Recipe: a policy trained by PPO on a reward for every token (paper, 3.3 and 3.4). Start reading here.

prompts -> [ answers -> scores -> rewards -> advantages -> update ]*
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tlcr.config.schema import RunConfig
from tlcr.errors import TrainingDiverged
from tlcr.models.actor_critic import ActorCritic
from tlcr.ppo.advantages import compute_advantages
from tlcr.ppo.kl import kl_of
from tlcr.ppo.metrics import Stopwatch, rollout_metrics, update_metrics
from tlcr.ppo.rollout import generate, seeded_generator
from tlcr.ppo.run import Evaluate, PPOResult, PPORun
from tlcr.ppo.scores import score_rollout
from tlcr.ppo.update import ppo_update
from tlcr.rewards.composition import compose_rewards
from tlcr.rewards.sources import RewardSource
from tlcr.training.callbacks import Callback, asks_to_stop
from tlcr.training.distributed import any_process
from tlcr.training.interrupt import StopSignals
from tlcr.training.progress import Progress

__all__ = ["PPOResult", "train_ppo"]

SHOWN = ("reward/mean_score", "kl/per_token", "policy/entropy", "length/mean")


def train_ppo(
    cfg: RunConfig,
    *,
    actor_critic: ActorCritic,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward_source: RewardSource,
    prompts: Sequence[str],
    folder: Path,
    seed: int,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    evaluate: Evaluate | None = None,
    reward_temperature: float = 1.0,
) -> PPOResult:
    """Trains `actor_critic` in place, by cfg.ppo, cfg.rollout, cfg.reward and cfg.kl; returns how it ended.

    reference: a frozen copy of the policy as it was. reward_source: what a rollout earns; reward_temperature: the
    calibrated temperature of its logits. folder: gets metrics.jsonl (its keys: docs/metrics.md) and checkpoints/ while
    training, then policy/, value/ and done.json. resume: continue from the newest checkpoint; bit for bit on one
    process on the CPU. evaluate: called with `actor_critic` and the number of updates done, before the first update,
    every cfg.ppo.evaluate_every updates and after the last one; its figures are logged as eval/<name>.

    Raises ConfigError for settings that contradict each other; CheckpointError where there is a checkpoint that nobody
    asked to resume, or one of another run; TrainingDiverged, with the state saved apart, where numbers are lost;
    KeyboardInterrupt, with the state saved, on Ctrl-C or SIGTERM.
    """
    run = PPORun(
        cfg,
        actor_critic=actor_critic,
        reference=reference,
        tokenizer=tokenizer,
        reward_source=reward_source,
        prompts=prompts,
        folder=folder,
        seed=seed,
        callbacks=callbacks,
        evaluate=evaluate,
    )
    if not run.begin(resume):
        return run.result(stopped=False)
    stopped = False
    with StopSignals() as signals, Progress("ppo", cfg.ppo.updates, run.update, keys=SHOWN) as progress:
        while run.update < cfg.ppo.updates and not stopped:
            try:
                metrics = _round(run, reward_temperature)
            except TrainingDiverged as error:
                raise TrainingDiverged(
                    f"update {run.update + 1}: {error}. The state is saved in {run.save_diverged()}; --resume "
                    "continues from the last checkpoint before it"
                ) from error
            answers = run.finish_round(metrics)
            progress.on_step(run.update, run.metrics)
            stopped = any_process(asks_to_stop(answers))
            if signals.received():
                raise signals.stopped(run.update, run.save())
            if run.save_is_due:
                run.save()
        run.save()
    return run.end(stopped=stopped)


def _round(run: PPORun, reward_temperature: float) -> dict[str, float]:
    """One round of the algorithm; returns its metrics."""
    cfg, accelerator = run.cfg, run.accelerator
    temperature = cfg.rollout.temperature
    watch = Stopwatch(accelerator.device)

    # 1. Prompts x from the data, in an order that the seed decides.
    prompts = run.take_prompts()

    # 2. Answers a_1 .. a_T from the policy, the end of sequence being an action like any other.
    with watch.phase("rollout"):
        rollout = generate(
            run.actor_critic.policy,
            tokenizer=run.tokenizer,
            prompts=prompts,
            cfg=cfg.rollout,
            max_prompt_tokens=cfg.data.max_prompt_tokens,
            generator=seeded_generator("answers", run.seed, run.update, accelerator.process_index),
        )

    # 3. What policy, reference and value model say of every action: log-probs, and V(s_t).
    with watch.phase("score"):
        scores = score_rollout(
            run.actor_critic,
            run.reference,
            rollout,
            temperature=temperature,
            micro_batch_size=cfg.rollout.batch_size,
            exact_kl=cfg.kl_estimator == "full",
        )

    # 4. A reward for every token, r_t = 2 D(a_t | x, a_<t) - 1, less what its distance from the reference costs.
    with watch.phase("reward"):
        kl_coef = run.kl_controller.coef
        rewards = compose_rewards(
            run.reward_source(rollout),
            rollout.mask_BT,
            ended_B=rollout.ended_B,
            kl_BT=kl_of(scores, cfg.kl_estimator) if cfg.kl.placement == "reward" else None,
            kl_coef=kl_coef,
            cfg=cfg.reward,
            temperature=reward_temperature,
            centre=run.centre,
        )

    # 5. Advantages: what each action brought beyond V, by generalised advantage estimation.
    advantages = compute_advantages(
        rewards,
        scores,
        rollout.mask_BT,
        gamma=cfg.ppo.gamma,
        lam=cfg.ppo.lam,
        whiten=cfg.ppo.whiten,
        accelerator=accelerator,
    )

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
        )

    # 7. Figures; the price of a nat of KL follows the distance that was measured.
    metrics = rollout_metrics(rollout, scores, rewards, advantages, cfg.kl_estimator)
    run.kl_controller.update(metrics["kl/per_token"], cfg.ppo.batch_size)
    return {
        **metrics,
        **update_metrics(statistics),
        **run.learning_rates(),
        "kl/coef": kl_coef,
        **watch.metrics(metrics["length/tokens"]),
    }
