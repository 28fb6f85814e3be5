"""One PPO run of a comparison: its models, its reward, training, and evaluation before and after.

An arm is a reward and a KL coefficient; all other settings are the same in all arms of a run, so that
the results differ only because of the reward.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel

from tlcr import ops
from tlcr.config.functions import import_scorer
from tlcr.config.schema import RewardConfig, RunConfig
from tlcr.config.stages import DONE, TRAINED
from tlcr.config.trials import Trial
from tlcr.data import embedded
from tlcr.engines import build_engine
from tlcr.errors import DataError
from tlcr.evaluation.evaluate import EvaluatedAnswer, PolicyEvaluation, TokenDetail, evaluate_policy, write_evaluation
from tlcr.experiment.frozen_models import (
    FrozenModels,
    check_value_start,
    load_frozen_models,
    load_reference,
    load_roles,
)
from tlcr.experiment.refresh import refresh_of
from tlcr.experiment.run_folder import RunFolder, Trained
from tlcr.models.actor_critic import ActorCritic, build_value_model
from tlcr.models.loading import load_causal_lm
from tlcr.models.lora.roles import Roles
from tlcr.ppo.advantages import compute_advantages
from tlcr.ppo.rollout import generate, seeded_generator
from tlcr.ppo.run import SERVER_WEIGHTS
from tlcr.ppo.scores import score_rollout
from tlcr.recipes.train_ppo import train_ppo
from tlcr.rewards.asking import ask_source
from tlcr.rewards.centre import build_centre
from tlcr.rewards.composition import compose_rewards
from tlcr.text.files import parse_json
from tlcr.text.truncation import note_cut_prompts
from tlcr.training.checkpoint import reading
from tlcr.training.distributed import on_all_processes, on_main_process, process_count, process_index
from tlcr.training.done import AGAIN, amend_done, check_results
from tlcr.training.sharding import gathered, plan, reshard, shard_all
from tlcr.types import PolicyScores, Rewards, Rollout

logger = logging.getLogger(__name__)


def train_arm(run: RunFolder, trial: Trial) -> None:
    """Trains and evaluates one policy; writes policy/, value/, metrics.jsonl, evaluation.json and samples.jsonl."""
    folder = run.trial_folder(trial)
    if run.needs_evaluation_alone(trial):
        logger.info("%s was evaluated with other settings, and is evaluated again", folder)
        evaluate_arm(run, trial)
        return
    run.once(folder, run.trial_settings(trial), lambda: _train(run, trial, folder), record=TRAINED)


def evaluate_arm(run: RunFolder, trial: Trial) -> None:
    """Evaluates a trained policy again, with the current evaluation settings."""
    cfg, folder = trial.config(run.cfg), run.trial_folder(trial)
    if (folder / TRAINED).is_file():
        check_results(folder, TRAINED)
    roles, frozen, reference = _frozen(run, cfg, trial.seed)
    actor_critic = _start(run, cfg, frozen, roles)
    _shard(cfg, actor_critic, reference, *frozen.models)
    evaluation = _Evaluation(run, cfg, frozen, reference, trial.seed, folder)
    before = evaluation(actor_critic)
    if roles is None:
        actor_critic = _trained(run, cfg, folder)
        _shard(cfg, actor_critic)
    else:
        actor_critic.restore(cfg.model.saved_in(folder / "policy"), folder / "value", sharding=plan(cfg.sharding))
    if (refresh := refresh_of(run, cfg, frozen, trial.seed, folder)) is not None:
        refresh.restore(folder)
    after = evaluation(actor_critic)
    _write_evaluation(folder, before, after, cfg)
    if run.is_trained(trial) or run.needs_evaluation_alone(trial):
        metrics = {"before": before.to_json(), "after": after.to_json()}
        amend_done(folder, config={"evaluation": cfg.evaluation}, metrics=metrics, record=TRAINED)


def _write_evaluation(folder: Path, before: PolicyEvaluation, after: PolicyEvaluation, cfg: RunConfig) -> None:
    way = _on_the_way(folder)
    on_main_process(lambda: write_evaluation(folder, before, after, settings=cfg.evaluation.judged_by, on_the_way=way))


def _on_the_way(folder: Path) -> Mapping[str, Any] | None:
    """What judged the evaluations during training, by the record of the training. Where that is of an earlier version,
    by the evaluation at its end, or by the record of the whole; None where none says it."""

    def read(name: str, *keys: str) -> dict[str, Any] | None:
        if not (folder / name).is_file():
            return None
        with reading(folder / name, AGAIN):
            found = parse_json((folder / name).read_text(encoding="utf-8"))
            for key in keys:
                found = found.get(key) or {}
            return {key: found[key] for key in ("prompts", "scorer")} if found else None

    return (
        read(DONE, "config", "evaluation")
        or read("evaluation.json", "on_the_way")
        or read(TRAINED, "config", "evaluation")
    )


def _train(run: RunFolder, trial: Trial, folder: Path) -> Trained:
    cfg, seed = trial.config(run.cfg), trial.seed

    # 1. the frozen models that this arm's reward needs, and the reference
    roles, frozen, reference = _frozen(run, cfg, seed)

    # 2. the initial policy, its value model (which may be a copy of a frozen model), and its evaluation
    actor_critic = _start(run, cfg, frozen, roles)
    _shard(cfg, actor_critic, reference, *frozen.models)
    evaluation = _Evaluation(run, cfg, frozen, reference, seed, folder)
    before = evaluation(actor_critic)
    latest = {0: before}

    def evaluate(actor_critic: ActorCritic, update: int) -> Mapping[str, float]:
        if update not in latest:
            latest.clear()
            latest[update] = evaluation(actor_critic)
        return latest[update].metrics()

    # 3. PPO
    result = train_ppo(
        cfg,
        actor_critic=actor_critic,
        reference=reference,
        tokenizer=run.tokenizer,
        reward_source=frozen.source(run, cfg, reference, seed),
        reward_temperature=frozen.temperature,
        prompts=run.prompts.train,
        folder=folder,
        seed=seed,
        resume=run.resume,
        evaluate=evaluate,
        refresh=refresh_of(run, cfg, frozen, seed, folder),
        origin=run.origin(trial),
    )

    # 4. evaluation of the trained policy; a run that had already finished was not evaluated above
    after = latest.get(result.updates) or evaluation(actor_critic)
    _write_evaluation(folder, before, after, cfg)
    return Trained({"before": before.to_json(), "after": after.to_json()}, result.seconds)


def _shard(cfg: RunConfig, *roots: nn.Module) -> None:
    """Shards models where the run asks for it, and reads those that have no weights yet. None of them is copied
    afterwards: shards cannot be."""
    shard_all(roots, plan(cfg.sharding))


def _frozen(run: RunFolder, cfg: RunConfig, seed: int) -> tuple[Roles | None, FrozenModels, PreTrainedModel]:
    """The roles that share one copy of the weights, if any; the frozen models of the reward; and the reference. What
    ``_shard`` will cut is not read before."""
    sharding = plan(cfg.sharding)
    roles = load_roles(run, cfg, seed, sharding=sharding)
    reference = load_reference(run, sharding=sharding) if roles is None else roles.reference
    return roles, load_frozen_models(run, cfg, roles, sharding=sharding), reference


def _start(run: RunFolder, cfg: RunConfig, frozen: FrozenModels, roles: Roles | None = None) -> ActorCritic:
    """Policy and value model at the start of training; without weights where ``_shard`` will cut them."""

    def load() -> PreTrainedModel:
        return load_causal_lm(run.policy_source, device=run.device, sharding=plan(cfg.sharding))

    policy = load() if roles is None else roles.policy
    separate = cfg.ppo.value_model == "separate"
    value_model: PreTrainedModel | None
    if roles is not None and separate and cfg.lora.trains("value"):
        value_model = roles.classifier("value", {0: "value"})
    else:
        # a value model that is trained whole is a copy of weights without adapters
        own = separate and roles is not None
        starts = {"reward_model": frozen.reward_model, "discriminator": frozen.discriminator}
        if separate and (start := starts.get(cfg.ppo.value_init)) is not None:
            check_value_start(cfg, run.tokenizer, start.tokenizer)
        value_model = build_value_model(
            cfg.ppo,
            cfg.model,
            policy=load() if own else policy,
            reward_model=frozen.reward_model.model if frozen.reward_model else None,
            discriminator=frozen.discriminator.model if frozen.discriminator else None,
        )
    return ActorCritic(policy, value_model, chunk_tokens=cfg.ppo.chunk_tokens)


def _trained(run: RunFolder, cfg: RunConfig, folder: Path) -> ActorCritic:
    """Policy and value model after training."""
    own = cfg.model.saved_in(folder / "policy")
    return ActorCritic.load(
        own, folder / "value", chunk_tokens=cfg.ppo.chunk_tokens, device=run.device, sharding=plan(cfg.sharding)
    )


class _Evaluation:
    """Evaluates answers to the held-out prompts against the reference, with equal random numbers for every policy."""

    def __init__(
        self,
        run: RunFolder,
        cfg: RunConfig,
        frozen: FrozenModels,
        reference: PreTrainedModel,
        seed: int,
        folder: Path,
    ) -> None:
        self._run, self._cfg, self._frozen, self._reference, self._folder = run, cfg, frozen, reference, folder
        self._new_source = lambda: frozen.source(run, cfg, reference, seed)
        self._source = self._new_source()
        note_cut_prompts(run.tokenizer, run.prompts.held_out, cfg.data, stage="evaluation")
        self._scorer = None
        if cfg.evaluation.scorer is not None:
            self._scorer = import_scorer(cfg.evaluation.scorer)
        elif run.embedded:
            self._scorer = embedded.score
        # words have a gold in the embedded task alone
        self._word_gold = _words_of_the_embedded_task if run.embedded else None

    def __call__(self, actor_critic: ActorCritic) -> PolicyEvaluation:
        run, cfg = self._run, self._cfg
        generator = seeded_generator("evaluation", run.cfg.seed, process_index())

        def sample(prompts: Sequence[str]) -> Rollout:
            def answers() -> Rollout:
                return generate(
                    actor_critic.policy,
                    run.tokenizer,
                    prompts,
                    cfg.rollout,
                    max_prompt_tokens=cfg.data.max_prompt_tokens,
                    generator=generator,
                    engine=engine,
                )

            with gathered(actor_critic, only=actor_critic.policy):
                return on_all_processes(answers)

        def score(rollout: Rollout) -> PolicyScores:
            scores = score_rollout(
                actor_critic,
                self._reference,
                rollout,
                temperature=cfg.rollout.temperature,
                micro_batch_size=cfg.rollout.batch_size,
                micro_batch_tokens=cfg.ppo.micro_batch_tokens,
                exact_kl=True,
            )
            reshard(actor_critic, self._reference)
            return scores

        def gather(answers: list[EvaluatedAnswer]) -> list[EvaluatedAnswer]:
            return list(gather_object(answers)) if process_count() > 1 else answers

        self._source = self._new_source()  # one with a state, such as random numbers, gives all evaluations the same

        with closing(build_engine(cfg.rollout, actor_critic.policy, self._folder / SERVER_WEIGHTS)) as engine:
            with gathered(actor_critic, only=actor_critic.policy):
                engine.refresh()
            return evaluate_policy(
                run.prompts.held_out,
                tokenizer=run.tokenizer,
                generate=sample,
                score=score,
                scorer=self._scorer,
                word_gold=self._word_gold,
                batch_size=cfg.rollout.batch_size,
                samples=cfg.evaluation.samples,
                detail=self._detail,
                share=(process_index(), process_count()),
                gather=gather,
            )

    def _detail(self, rollout: Rollout, scores: PolicyScores) -> TokenDetail:
        """The arm's reward, once without KL and centring and once as PPO gets it, and the advantages."""
        signal = ask_source(self._source, rollout, self._cfg.reward)

        def composed(reward: RewardConfig) -> Rewards:
            return compose_rewards(
                signal,
                rollout.mask_BT,
                ended_B=rollout.ended_B,
                kl_BT=None,
                kl_coef=0.0,
                cfg=reward,
                temperature=self._frozen.temperature,
                centre=build_centre(reward),
                max_tokens=self._cfg.rollout.max_new_tokens,
            )

        ppo, reward = self._cfg.ppo, self._cfg.reward
        rewards = composed(reward)
        advantages = compute_advantages(
            rewards, scores, rollout.mask_BT, gamma=ppo.gamma, lam=ppo.lam, whiten=ppo.whiten, accelerator=None
        )
        proxy = composed(replace(reward, centre=False)) if reward.centre else rewards
        confidence_BT = None
        if signal.logits_BTC is not None:
            paid_BT = ops.fused_reward(signal.logits_BTC, rollout.mask_BT, temperature=self._frozen.temperature)
            confidence_BT = (paid_BT + 1) / 2
        return TokenDetail(proxy.rewards_BT, rewards.rewards_BT, advantages.advantages_BT, confidence_BT)


def _words_of_the_embedded_task(prompt: str, response: str) -> list[tuple[int, int, float]]:
    """The characters of each word, and the gold that it adds; none where a user's own prompt names no topic."""
    try:
        words = embedded.gold(prompt, response).words
    except DataError:
        return []
    return [(word.start, word.end, word.gold) for word in words]
