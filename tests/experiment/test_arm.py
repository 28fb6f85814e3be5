"""One PPO run of a comparison: what it starts from, what training is given, and how it is evaluated."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.experiment.helpers import arm_run
from tests.ppo.helpers import ANSWER_IDS, known_rollout, known_update
from tlcr import ops
from tlcr.config.schema import RunConfig
from tlcr.errors import ConfigError
from tlcr.evaluation.evaluate import MEASURES, PolicyEvaluation, TokenDetail, evaluate_policy
from tlcr.experiment import arm
from tlcr.experiment.arm import _Evaluation, _start, _trained, evaluate_arm, train_arm
from tlcr.experiment.frozen_models import FrozenModels, load_reference
from tlcr.experiment.run_folder import RunFolder
from tlcr.models.actor_critic import ActorCritic
from tlcr.models.discriminator import token_logits
from tlcr.models.heads import classification_head
from tlcr.models.inspection import TWO_CLASSES
from tlcr.models.loading import load_sequence_classifier, load_token_classifier
from tlcr.models.saving import save_model
from tlcr.ppo.run import PPOResult
from tlcr.ppo.scores import score_rollout
from tlcr.rewards.sources.build import LoadedModel
from tlcr.rewards.sources.discriminator import DiscriminatorSource
from tlcr.training.done import mark_done
from tlcr.types import PolicyScores

LM = Callable[..., PreTrainedModel]
LETTERS = "tests.experiment.helpers:count_letters"


@pytest.fixture(scope="module")
def policy_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, tiny_causal_lm: LM
) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    save_model(tiny_causal_lm(seed=1), tiny_tokenizer, folder)
    return folder


def evaluation_of(
    run: RunFolder, frozen: FrozenModels | None = None, *, seed: int = 0, reference: PreTrainedModel | None = None
) -> _Evaluation:
    folder = Path(run.cfg.output_dir)
    return _Evaluation(run, run.cfg, frozen or FrozenModels(), reference or load_reference(run), seed, folder)


# ---- the detail of an evaluation


def detail_of(run: RunFolder, frozen: FrozenModels | None = None) -> tuple[TokenDetail, Tensor]:
    """What the run's reward says of the known answers, and the mask of their tokens."""
    rollout = known_rollout()
    scores, _ = known_update(rollout)
    return evaluation_of(run, frozen)._detail(rollout, scores), rollout.mask_BT


def low_ids(mask_BT: Tensor) -> Tensor:
    """1 where the reward of `arm_config` pays: 18 of the 23 tokens of the known answers have ids below 60."""
    paid_BT = torch.zeros(mask_BT.shape)
    for row, ids in enumerate(ANSWER_IDS):
        paid_BT[row, : len(ids)] = torch.tensor([float(token < 60) for token in ids])
    assert paid_BT.sum() == 18 and mask_BT.sum() == 23
    return paid_BT


def test_the_proxy_is_not_centred_though_what_ppo_gets_is(policy_folder: Path, tmp_path: Path) -> None:
    """Scaled by 2 the tokens earn 2 or 0, 36/23 on average. Neither the proxy nor the reward has the price of KL in it,
    which kl.coef 0.5 would make felt. With gamma = lambda = 1 an advantage is the sum of what is to come less V."""
    ppo = {"ppo.gamma": 1.0, "ppo.lam": 1.0, "ppo.whiten": False}
    run = arm_run(tmp_path, policy_folder, **{"reward.centre": True, "reward.scale": 2.0, **ppo})
    detail, mask_BT = detail_of(run)
    paid_BT = 2 * low_ids(mask_BT)
    torch.testing.assert_close(detail.proxy_BT, paid_BT)
    centred_BT = torch.where(mask_BT, paid_BT - 36 / 23, 0.0)
    torch.testing.assert_close(detail.rewards_BT, centred_BT)
    values_BT = known_update(known_rollout())[0].values_BT
    to_come_BT = centred_BT.flip(1).cumsum(1).flip(1)
    advantages_BT = torch.where(mask_BT, to_come_BT - values_BT.float(), 0.0)
    torch.testing.assert_close(detail.advantages_BT.float(), advantages_BT, rtol=1e-5, atol=1e-5)


def test_a_reward_that_no_discriminator_gives_has_no_confidence(policy_folder: Path, tmp_path: Path) -> None:
    detail, _ = detail_of(arm_run(tmp_path, policy_folder))
    assert detail.confidence_BT is None


def test_an_evaluation_starts_its_mean_afresh(policy_folder: Path, tmp_path: Path) -> None:
    """Two evaluations of one rollout say the same: no mean of an earlier one, nor of training, lives on in it."""
    run = arm_run(tmp_path, policy_folder, **{"reward.centre": True})
    evaluation, rollout = evaluation_of(run), known_rollout()
    scores = known_update(rollout)[0]
    first, second = evaluation._detail(rollout, scores), evaluation._detail(replace(rollout), scores)
    assert torch.equal(first.rewards_BT, second.rewards_BT)


def test_without_centring_the_proxy_is_the_reward_with_its_penalties(policy_folder: Path, tmp_path: Path) -> None:
    """0.25 off every token, 0.5 more off the last one of the two answers that were cut off."""
    options = {"reward.length_penalty": 0.25, "reward.missing_eos_penalty": 0.5}
    detail, mask_BT = detail_of(arm_run(tmp_path, policy_folder, **options))
    wanted_BT = torch.where(mask_BT, low_ids(mask_BT) - 0.25, 0.0)
    wanted_BT[6, 4] -= 0.5
    wanted_BT[7, 0] -= 0.5
    torch.testing.assert_close(detail.proxy_BT, wanted_BT)
    assert torch.equal(detail.rewards_BT, detail.proxy_BT)


@pytest.mark.parametrize(("gamma", "lam", "whiten"), [(0.5, 0.9, False), (1.0, 0.2, True)])
def test_advantages_are_those_of_the_configs_ppo(
    policy_folder: Path, tmp_path: Path, gamma: float, lam: float, whiten: bool
) -> None:
    options = {"ppo.gamma": gamma, "ppo.lam": lam, "ppo.whiten": whiten}
    detail, mask_BT = detail_of(arm_run(tmp_path, policy_folder, **options))
    values_BT = known_update(known_rollout())[0].values_BT
    wanted_BT, _ = ops.fused_gae(low_ids(mask_BT), values_BT, mask_BT, gamma=gamma, lam=lam, whiten=whiten)
    torch.testing.assert_close(detail.advantages_BT, wanted_BT)


def test_the_proxy_is_at_the_discriminators_calibrated_temperature(
    policy_folder: Path, tmp_path: Path, tiny_causal_lm: LM
) -> None:
    run = arm_run(tmp_path, policy_folder, **{"reward.kind": "continuous", "reward.callable": None})
    discriminator = load_token_classifier(tiny_causal_lm(seed=3), run.cfg.model, id2label=TWO_CLASSES)
    torch.nn.init.normal_(classification_head(discriminator).weight)
    discriminator.config.tlcr_temperature = 3.0
    detail, mask_BT = detail_of(run, FrozenModels(discriminator=LoadedModel(discriminator, run.tokenizer)))
    rollout = known_rollout()
    P, L = rollout.prompt_ids_BP.shape[1], rollout.ids_BL.shape[1]
    logits_BTC = token_logits(discriminator, rollout.ids_BL, rollout.attention_mask_BL, slice(P, L))
    p_BT = (logits_BTC / 3.0).softmax(-1)[..., 1]
    torch.testing.assert_close(detail.proxy_BT, torch.where(mask_BT, 2 * p_BT - 1, 0.0))
    assert detail.confidence_BT is not None
    torch.testing.assert_close(detail.confidence_BT[mask_BT], p_BT[mask_BT])


# ---- an evaluation


def actor_critic_of(run: RunFolder) -> ActorCritic:
    return _start(run, run.cfg, FrozenModels())


def test_an_evaluation_asks_the_held_out_prompts_and_scores_the_answers(policy_folder: Path, tmp_path: Path) -> None:
    run = arm_run(tmp_path, policy_folder, **{"evaluation.scorer": LETTERS, "evaluation.samples": 3})
    found = evaluation_of(run)(actor_critic_of(run))
    held_out = run.prompts.held_out
    assert found.answers == len(held_out) == 6 and not set(held_out) & set(run.prompts.train)
    assert [sample.prompt for sample in found.samples] == held_out[:3]
    for sample in found.samples:
        assert sample.gold == len(sample.response)
        assert len(sample.tokens) == sample.length == len(sample.reward) == len(sample.advantage) == len(sample.value)
        assert sum(sample.reward) == pytest.approx(sample.proxy)
    assert found.exact_kl_per_token == pytest.approx(0.0, abs=1e-6)  # of a policy that has not moved, and computed
    taken = {measure for measure in MEASURES if getattr(found, measure) is not None}
    assert taken == set(MEASURES) - {"discriminator_auc", "discriminator_ece"}  # of a task whose words have a gold


def test_there_is_no_gold_without_a_scorer(policy_folder: Path, tmp_path: Path) -> None:
    run = arm_run(tmp_path, policy_folder)
    found = evaluation_of(run)(actor_critic_of(run))
    assert found.gold_per_token is None and found.gold_per_answer is None and found.proxy_per_token is not None


def answers(found: PolicyEvaluation) -> list[tuple[str, str]]:
    return [(sample.prompt, sample.response) for sample in found.samples]


def test_every_policy_and_every_seed_meets_the_same_luck(policy_folder: Path, tmp_path: Path) -> None:
    """The order in which numbers were drawn before does not matter, nor does the trial's seed; the run's does."""
    run = arm_run(tmp_path, policy_folder, **{"evaluation.samples": 6})
    first = answers(evaluation_of(run, seed=0)(actor_critic_of(run)))
    torch.rand(7)
    evaluation = evaluation_of(run, seed=5)
    assert answers(evaluation(actor_critic_of(run))) == first
    assert answers(evaluation(actor_critic_of(run))) == first
    other = replace(run, cfg=replace(run.cfg, seed=1))
    assert answers(evaluation_of(other)(actor_critic_of(run))) != first


def test_kl_is_measured_against_the_reference(policy_folder: Path, tmp_path: Path, tiny_causal_lm: LM) -> None:
    """Of answers of one token, in one state: the sum over the vocabulary, at the sampling temperature."""
    options = {"rollout.temperature": 0.5, "rollout.max_new_tokens": 1, "data.max_prompt_tokens": 200}
    run = arm_run(tmp_path, policy_folder, **options)
    reference, own = tiny_causal_lm(seed=2), actor_critic_of(run)
    found = evaluation_of(run, reference=reference)(own)
    for sample in found.samples:
        prompt = run.tokenizer(sample.prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        logp_V, logq_V = (
            (model(prompt).logits[0, -1] / 0.5).log_softmax(-1).detach() for model in (own.policy, reference)
        )
        assert sample.exact_kl == pytest.approx(float((logp_V.exp() * (logp_V - logq_V)).sum()), rel=1e-4)
    assert len(found.samples) == 2 and found.exact_kl_per_token > 0.01


# ---- what it starts from


def test_the_policy_starts_from_the_runs_and_the_value_model_from_what_value_init_names(
    policy_folder: Path, tmp_path: Path, tiny_causal_lm: LM
) -> None:
    run = arm_run(tmp_path, policy_folder, **{"ppo.chunk_tokens": 5})
    discriminator = load_token_classifier(tiny_causal_lm(seed=3), run.cfg.model, id2label=TWO_CLASSES)
    reward_model = load_sequence_classifier(tiny_causal_lm(seed=4), run.cfg.model)
    torch.nn.init.normal_(classification_head(reward_model).weight)
    frozen = FrozenModels(
        discriminator=LoadedModel(discriminator, run.tokenizer), reward_model=LoadedModel(reward_model, run.tokenizer)
    )
    for init, seed in (("policy", 1), ("discriminator", 3), ("reward_model", 4)):
        cfg = replace(run.cfg, ppo=replace(run.cfg.ppo, value_init=init))
        actor_critic = _start(run, cfg, frozen)
        value_model = actor_critic.value_model
        assert value_model is not None
        for model, wanted in ((actor_critic.policy, 1), (value_model, seed)):
            weight = tiny_causal_lm(seed=wanted).model.layers[0].mlp.up_proj.weight
            assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)
        assert classification_head(value_model).weight.any() == (init == "reward_model")
        assert actor_critic._chunk_tokens == 5
    other = copy.deepcopy(run.tokenizer)
    other.add_tokens(["<one more>"])
    frozen = replace(frozen, reward_model=LoadedModel(reward_model, other))
    with pytest.raises(ConfigError, match=r"the model in reward_model\.path .* has another tokenizer"):
        _start(run, cfg, frozen)
    shared = _start(run, replace(cfg, ppo=replace(cfg.ppo, value_model="shared")), frozen)
    assert shared.value_model is None and shared.value_head is not None


# ---- training


class Recorded:
    """Stands for the recipe: keeps what it was given, evaluates where it is told to, and trains nothing."""

    def __init__(self, updates: int, evaluates: tuple[int, ...]) -> None:
        self.updates, self.evaluates, self.given = updates, evaluates, {}

    def __call__(self, cfg: RunConfig, *, folder: Path, **given: Any) -> PPOResult:
        self.given = {**given, "cfg": cfg, "folder": folder}
        self.logged = [given["evaluate"](given["actor_critic"], update) for update in self.evaluates]
        return PPOResult(folder / "policy", folder / "value", self.updates, {}, {}, 5000.0, stopped=False)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one number, that of the prompts, with each evaluation."""
    counted: list[int] = []

    def evaluate(prompts: Sequence[str], **arguments: Any) -> PolicyEvaluation:
        counted.append(len(prompts))
        return evaluate_policy(prompts, **arguments)

    monkeypatch.setattr(arm, "evaluate_policy", evaluate)
    return counted


def test_training_is_given_what_the_trial_says(
    policy_folder: Path, tmp_path: Path, tiny_causal_lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"reward.kind": "continuous", "reward.callable": None, "discriminator.path": str(tmp_path / "d")}
    run = arm_run(tmp_path, policy_folder, **{**options, "seeds": [8], "kl_coefs": [0.3, 0.7], "seed": 2})
    discriminator = load_token_classifier(tiny_causal_lm(seed=3), run.cfg.model, id2label=TWO_CLASSES)
    discriminator.config.tlcr_temperature = 3.0
    save_model(discriminator, run.tokenizer, tmp_path / "d")
    recorded = Recorded(updates=0, evaluates=())
    monkeypatch.setattr(arm, "train_ppo", recorded)
    trial = run.trials[1]
    train_arm(run, trial)
    given = recorded.given
    assert (given["cfg"].kl.coef, given["cfg"].reward, given["seed"]) == (0.7, trial.arm.reward, 8)
    assert given["folder"] == run.path / "ppo" / "continuous" / "kl-0.7" / "seed-8"
    assert given["prompts"] == run.prompts.train and not set(given["prompts"]) & set(run.prompts.held_out)
    assert given["reward_temperature"] == 3.0 and given["resume"] is False
    assert isinstance(given["reward_source"], DiscriminatorSource) and given["tokenizer"] is run.tokenizer
    assert given["origin"] == run.origin(trial)
    policy, reference = given["actor_critic"].policy, given["reference"]
    assert policy is not reference
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), reference.parameters(), strict=True))
    resumed = replace(run, resume=True)
    train_arm(resumed, run.trials[0])
    assert recorded.given["resume"] is True and recorded.given["cfg"].kl.coef == 0.3


def test_a_random_reward_follows_the_trials_seed(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = arm_run(tmp_path, policy_folder, **{"reward.kind": "random", "reward.callable": None, "seeds": [8]})
    recorded = Recorded(updates=0, evaluates=())
    monkeypatch.setattr(arm, "train_ppo", recorded)
    train_arm(run, run.trials[0])
    assert recorded.given["reward_source"].seed == 8
    # the evaluation has a source of its own: asking it moves no number of the training's
    assert recorded.given["reward_source"].rollouts == 0


def test_the_origin_of_a_run_names_the_weights_that_its_checkpoints_lack(policy_folder: Path, tmp_path: Path) -> None:
    """By their checksums where a stage wrote them: a judge that was trained again makes another run."""
    options = {"reward.kind": "continuous", "reward.callable": None}
    run = arm_run(tmp_path, policy_folder, **options)
    discriminator = run.models / "discriminator"
    origins = []
    for weights in (b"first", b"second"):
        discriminator.mkdir(exist_ok=True)
        (discriminator / "model.safetensors").write_bytes(weights)
        mark_done(discriminator, config={}, metrics={}, seconds=1.0)
        origins.append(replace(run).origin(run.trials[0]))
    first, second = origins
    assert first["discriminator"] != second["discriminator"]
    assert {**first, "discriminator": ""} == {**second, "discriminator": ""}
    assert (first["policy"], first["max_prompt_tokens"], first["dtype"]) == (str(policy_folder), 32, "float32")
    assert first.keys() == {"policy", "discriminator", "dtype", "max_prompt_tokens"}
    elsewhere = arm_run(
        tmp_path, policy_folder, output_dir=str(tmp_path / "b"), **{**options, "discriminator.path": "d"}
    )
    assert elsewhere.origin(elsewhere.trials[0])["discriminator"] == "d"


def test_random_rewards_are_the_same_in_every_evaluation(policy_folder: Path, tmp_path: Path) -> None:
    """However many there were before, as a resumed run has made fewer of them."""
    run = arm_run(tmp_path, policy_folder, **{"reward.kind": "random", "reward.callable": None})
    evaluation, actor_critic = evaluation_of(run), actor_critic_of(run)
    first, second = evaluation(actor_critic), evaluation(actor_critic)
    assert first.proxy_per_token == second.proxy_per_token
    assert [sample.reward for sample in first.samples] == [sample.reward for sample in second.samples]


def test_an_evaluation_scores_no_more_tokens_at_a_time_than_ppo_does(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = arm_run(tmp_path, policy_folder, **{"ppo.micro_batch_tokens": 40})
    given = {}

    def score(*arguments: Any, **options: Any) -> PolicyScores:
        given.update(options)
        return score_rollout(*arguments, **options)

    monkeypatch.setattr(arm, "score_rollout", score)
    evaluation_of(run)(actor_critic_of(run))
    assert (given["micro_batch_tokens"], given["micro_batch_size"]) == (40, run.cfg.rollout.batch_size)


def test_the_last_evaluation_of_training_is_the_one_after(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, and once for each update that training asks about, though it asks twice about the start and update 2."""
    counted, recorded = counting(monkeypatch), Recorded(updates=2, evaluates=(0, 1, 2, 2))
    run = arm_run(tmp_path, policy_folder)
    monkeypatch.setattr(arm, "train_ppo", recorded)
    train_arm(run, run.trials[0])
    assert counted == [6, 6, 6]
    record = json.loads((run.trial_folder(run.trials[0]) / "arm.json").read_text())
    assert record["seconds"] == 5000.0  # over all sittings
    assert recorded.logged[0].keys() <= set(MEASURES) and recorded.logged[2] == recorded.logged[3]
    # a run that was found finished is evaluated here, once, whatever was before
    again = arm_run(tmp_path, policy_folder, output_dir=str(tmp_path / "again"))
    monkeypatch.setattr(arm, "train_ppo", Recorded(updates=2, evaluates=()))
    counted.clear()
    train_arm(again, again.trials[0])
    assert counted == [6, 6]


def test_an_arm_is_trained_once_and_evaluated_again_by_todays_settings(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = arm_run(tmp_path, policy_folder)
    trial = run.trials[0]
    assert not run.is_trained(trial)
    train_arm(run, trial)
    folder = run.trial_folder(trial)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    record = json.loads((folder / "arm.json").read_text())
    assert record["metrics"] == {when: evaluation[when] for when in ("before", "after")}
    assert evaluation["before"] != evaluation["after"]
    assert evaluation["settings"] == evaluation["on_the_way"] == {"prompts": run.cfg.evaluation.prompts, "scorer": None}
    assert evaluation["before"]["kl_per_token"] == pytest.approx(0.0, abs=1e-6)
    assert run.is_trained(trial)
    monkeypatch.setattr(arm, "train_ppo", lambda *_, **__: pytest.fail("it is done"))
    train_arm(run, trial)

    lines = (folder / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["when"] for line in lines] == ["before"] * 2 + ["after"] * 2
    today = replace(run, cfg=replace(run.cfg, evaluation=replace(run.cfg.evaluation, samples=1, scorer=LETTERS)))
    evaluate_arm(today, trial)
    again = json.loads((folder / "evaluation.json").read_text())
    assert again["before"]["gold_per_answer"] > 0 and len((folder / "samples.jsonl").read_text().splitlines()) == 2
    # the record is of today's evaluation, so that the whole run goes on with it
    assert json.loads((folder / "arm.json").read_text())["metrics"] == {w: again[w] for w in ("before", "after")}
    # the evaluations during training were not by this scorer, and it says so
    assert again["settings"]["scorer"] == LETTERS and again["on_the_way"] == evaluation["settings"]
    assert today.is_trained(trial) and not run.is_trained(trial)
    # and with the settings of before the policy is evaluated again, not trained
    train_arm(run, trial)
    assert run.is_trained(trial) and not today.is_trained(trial)
    before = json.loads((folder / "evaluation.json").read_text())
    assert before["after"]["gold_per_answer"] is None
    assert before["settings"] == before["on_the_way"]
    for when in ("settings", "on_the_way"):  # files of an older version: what was trained with is in arm.json
        del before[when]
    (folder / "evaluation.json").write_text(json.dumps(before))
    done = json.loads((folder / "done.json").read_text())
    assert done["config"].pop("evaluation") == evaluation["settings"]
    (folder / "done.json").write_text(json.dumps(done))
    train_arm(today, trial)
    assert json.loads((folder / "evaluation.json").read_text())["on_the_way"] == evaluation["settings"]
    # other settings of training are refused still
    other = replace(today, cfg=replace(today.cfg, ppo=replace(today.cfg.ppo, gamma=0.5)))
    with pytest.raises(ConfigError, match="was made with other settings"):
        train_arm(other, trial)
    evaluate_arm(other, trial)
    assert today.is_trained(trial)  # an evaluation by others leaves the record
    for when in ("before", "after"):
        for measure in ("kl_per_token", "proxy_per_token", "length"):
            assert again[when][measure] == pytest.approx(evaluation[when][measure], rel=1e-6, abs=1e-9)

    trained = _trained(run, run.cfg, folder)
    weights = load_file(folder / "value" / "model.safetensors")
    assert trained.value_model is not None
    assert torch.equal(trained.value_model.state_dict()["score.weight"], weights["score.weight"])


def test_a_training_that_was_not_evaluated_yet_tells_what_judged_it(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended, and the command before it was evaluated; the next one evaluates it by another scorer."""
    run = arm_run(tmp_path, policy_folder)
    (trial,) = run.trials

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(arm, "write_evaluation", stop)
        train_arm(run, trial)
    other = replace(run, cfg=replace(run.cfg, evaluation=replace(run.cfg.evaluation, scorer=LETTERS)), resume=True)
    train_arm(other, trial)
    written = json.loads((run.trial_folder(trial) / "evaluation.json").read_text())
    assert (written["settings"]["scorer"], written["on_the_way"]["scorer"]) == (LETTERS, None)


def test_what_was_trained_at_a_single_coefficient_is_kept_when_there_are_more(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = arm_run(tmp_path, policy_folder)  # at 0.5
    train_arm(once, once.trials[0])
    more = replace(once, cfg=replace(once.cfg, kl_coefs=(0.5, 0.9)))
    assert [more.is_trained(trial) for trial in more.trials] == [False, False]
    more.name_by_coefficient()
    assert [more.is_trained(trial) for trial in more.trials] == [True, False]
    assert not once.trial_folder(once.trials[0]).exists()
    # what this run could not use stays where it is
    other = arm_run(tmp_path, policy_folder, **{"output_dir": str(tmp_path / "other"), "ppo.gamma": 0.9})
    train_arm(other, other.trials[0])
    replace(other, cfg=replace(other.cfg, kl_coefs=(0.4, 0.9))).name_by_coefficient()
    replace(other, cfg=replace(other.cfg, kl_coefs=(0.5, 0.9), ppo=once.cfg.ppo)).name_by_coefficient()
    assert other.trial_folder(other.trials[0]).exists()
    monkeypatch.setattr(arm, "train_ppo", lambda *_, **__: pytest.fail("it is done"))
    train_arm(more, more.trials[0])
    more.name_by_coefficient()  # a second time there is nothing to do


def test_what_was_trained_at_several_coefficients_is_kept_when_there_is_one(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = arm_run(tmp_path, policy_folder, kl_coefs=[0.5, 0.9])
    for trial in several.trials:
        several.trial_folder(trial).mkdir(parents=True)
        mark_done(several.trial_folder(trial), config=several.trial_settings(trial), metrics={}, seconds=1.0)
    first, second = map(several.trial_folder, several.trials)
    one = replace(several, cfg=replace(several.cfg, kl_coefs=(0.5,)))
    (trial,) = one.trials
    one.name_by_coefficient()  # a training that was not evaluated is none yet
    assert first.exists() and not one.trial_folder(trial).exists()
    for trial in several.trials:
        settings = several.trial_settings(trial)
        mark_done(several.trial_folder(trial), config=settings, metrics={}, seconds=1.0, record="arm.json")
    other = replace(one, cfg=replace(one.cfg, ppo=replace(one.cfg.ppo, gamma=0.5)))
    other.name_by_coefficient()  # nor can this one use it
    assert first.exists()
    (trial,) = one.trials
    judged_anew = replace(one, cfg=replace(one.cfg, evaluation=replace(one.cfg.evaluation, prompts=1)))
    judged_anew.name_by_coefficient()
    assert judged_anew.needs_evaluation_alone(trial) and not first.exists()
    several.name_by_coefficient()
    assert first.exists()
    one.name_by_coefficient()
    assert one.is_trained(trial) and second.exists() and not first.parent.exists()
    monkeypatch.setattr(arm, "train_ppo", lambda *_, **__: pytest.fail("it is done"))
    train_arm(one, trial)
    one.name_by_coefficient()  # a second time there is nothing to do
    several.name_by_coefficient()  # and there is a way back
    assert [several.is_trained(trial) for trial in several.trials] == [True, True]
