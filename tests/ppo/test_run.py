"""The state that a PPO run keeps between rounds. The rounds here are cheap and change the same state as real ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.ppo.helpers import PROMPTS, run_ppo, small_config, without_times
from tlcr.config.schema import ModelConfig, RewardConfig, RunConfig
from tlcr.errors import CheckpointError, ConfigError, DataError, TrainingDiverged
from tlcr.models.actor_critic import ActorCritic, build_value_model
from tlcr.ppo.run import PPORun, check_sizes
from tlcr.rewards.sources import RandomSource
from tlcr.training.callbacks import Callback
from tlcr.training.checkpoint import latest_checkpoint
from tlcr.training.metrics import read_metrics

Make = Callable[..., PPORun]


class Saves(Callback):
    def __init__(self) -> None:
        self.heard: list[tuple[int, str]] = []

    def on_save(self, step: int, path: Path) -> None:
        self.heard.append((step, path.parent.name))


@pytest.fixture
def make(
    tiny_causal_lm: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Make:
    """A run in the same folder each time, as a new process would make it."""

    def make_run(
        cfg: RunConfig | None = None,
        *,
        prompts: Sequence[str] = PROMPTS,
        seed: int = 3,
        weights: int = 1,
        callbacks: Sequence[Callback] = (),
        evaluate: Callable[[ActorCritic, int], Mapping[str, float]] | None = lambda _, update: {"gold": 0.25 + update},
    ) -> PPORun:
        cfg = cfg or small_config(reward={"centre": True})
        policy = tiny_causal_lm(seed=weights)
        return PPORun(
            cfg,
            accelerator=Accelerator(),
            actor_critic=ActorCritic(policy, build_value_model(cfg.ppo, ModelConfig(), policy=policy)),
            reference=tiny_causal_lm(seed=1),
            tokenizer=tiny_tokenizer,
            reward_source=RandomSource(seed=5),
            prompts=prompts,
            folder=tmp_path,
            seed=seed,
            callbacks=callbacks,
            evaluate=evaluate,
        )

    return make_run


def a_round(run: PPORun) -> dict[str, float]:
    """Changes everything that a round changes, by an amount that tells the rounds apart."""
    run.take_prompts()
    run.kl_controller.update(1.0 + run.update, run.cfg.ppo.batch_size)
    if run.centre is not None:
        run.centre.sums = {"total": 2.0 * run.update, "count": 4.0}
    run.reward_source.load_state_dict({"rollouts": run.update + 1})
    for parameter in run.actor_critic.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    run.optimizer.step()
    return {"round": float(run.update), **run.learning_rates()}


def train(run: PPORun, rounds: int | None = None) -> bool:
    """Rounds until the end, or until the power goes out after some."""

    def take_round() -> dict[str, float]:
        if run.update == rounds:
            raise OSError("the power went out")
        return a_round(run)

    return run.train(take_round)


def state_of(run: PPORun) -> dict[str, Any]:
    assert run.centre is not None
    return {
        "update": run.update,
        "cursor": run.prompts.cursor,
        "kl": run.kl_controller.state_dict(),
        "centre": run.centre.state_dict(),
        "source": run.reward_source.state_dict(),
        "metrics": run.loop.metrics,
        "evaluation": run.loop.evaluation,
        "rates": run.learning_rates(),
    }


def assert_same_weights(one: ActorCritic, other: ActorCritic) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


# ---- saving and resuming


def test_a_checkpoint_is_written_after_each_round_that_is_due_and_none_for_the_end(make: Make, tmp_path: Path) -> None:
    saves = Saves()
    run = make(small_config(updates=5, save_every=2, keep_checkpoints=2), callbacks=[saves])
    assert run.begin(resume=False)
    assert train(run) is False
    assert saves.heard == [(2, "checkpoints"), (4, "checkpoints")]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert run.end(stopped=False).updates == 5  # the models; no optimiser state is left, or was written for this
    assert not (tmp_path / "checkpoints").exists() and not list(tmp_path.rglob("*optimizer*"))


def test_a_run_resumes_with_all_that_a_round_changed(make: Make, tmp_path: Path) -> None:
    cfg = small_config(reward={"centre": True}, schedule="linear", evaluate_every=2, save_every=2)
    first = make(cfg)
    first.begin(resume=False)
    with pytest.raises(OSError, match="power"):
        train(first, rounds=2)
    resumed = make(cfg, weights=9)
    assert resumed.begin(resume=True)
    assert state_of(resumed) == state_of(first)
    assert state_of(first)["cursor"] == 16 and state_of(first)["source"] == {"rollouts": 2}
    assert state_of(first)["centre"] == {"total": 2.0, "count": 4.0}
    assert_same_weights(first.actor_critic, resumed.actor_critic)
    assert (
        resumed.loop.seconds
        >= json.loads((tmp_path / "checkpoints" / "step-000002" / "checkpoint.json").read_text())["state"]["seconds"]
    )
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]  # not evaluated again


STATE_OF_AN_EARLIER_VERSION = {
    "identity": {
        "settings": {
            "ppo": {
                "batch_size": 8,
                "minibatch_size": 4,
                "epochs": 2,
                "learning_rate": 0.001,
                "value_learning_rate": 0.001,
                "weight_decay": 0.0,
                "schedule": "constant",
                "warmup_updates": 0,
                "max_grad_norm": 1.0,
                "gamma": 1.0,
                "lam": 0.95,
                "whiten": True,
                "clip": 0.2,
                "clip_high": None,
                "dual_clip": None,
                "value_clip": 0.2,
                "value_coef": 0.5,
                "entropy_coef": 0.0,
                "aggregate": "token",
                "target_kl": None,
                "max_ratio": 10000.0,
                "value_model": "separate",
                "value_init": "policy",
                "value_warmup_updates": 0,
            },
            "reward": {
                "kind": "callable",
                "band": 0.2,
                "scale": 1.0,
                "clip": 5.0,
                "centre": True,
                "length_penalty": 0.0,
                "missing_eos_penalty": 0.0,
                "sequence_coef": 0.0,
                "terminal_clip": None,
                "span_end": "[.,;:!?\\n]+",
                "compat": None,
                "callable": "tests.ppo.helpers:reward_low_ids",
            },
            "kl": {"coef": 0.05, "placement": "reward", "estimator": "k1", "target": 0.05, "horizon": 100},
            "rollout": {"max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "batch_size": 5},
        },
        "prompts": "7586abbd4cd4c147d7d563972a89e722f325bbd6c45acbd1ed5adbbb1f971e62",
        "seed": 3,
        "processes": 1,
    },
    "cursor": 16,
    "kl_controller": {"coef": 0.0484128},
    "centre": {"total": 0.14094370743259788, "count": 71.5},
    "reward_source": {"rollouts": 2},
    "metrics": {"policy/loss": -0.03, "eval/gold": 2.25},
    "evaluation": {"gold": 2.25},
    "seconds": 1000.5,
}
"""What version 0.1.0 wrote after two updates of `small_config(reward={"centre": True})`, seed 3, on `PROMPTS`."""


FROM_ONE_NUMBER = {"coef": 0.0484128, "reached": True, "kl": None, "growth": 0.0, "horizon": 100.0}
"""The KL controller of that state: it adapts from the start, as then."""


def test_a_checkpoint_of_an_earlier_version_is_resumed(make: Make, tmp_path: Path) -> None:
    first = make()
    first.begin(resume=False)
    with pytest.raises(OSError, match="power"):
        train(first, rounds=2)
    manifest = tmp_path / "checkpoints" / "step-000002" / "checkpoint.json"
    written = json.loads(manifest.read_text())
    assert written["state"].keys() == {*STATE_OF_AN_EARLIER_VERSION, "evaluated"}
    assert written["state"]["identity"].pop("evaluation") == {"prompts": 256, "scorer": None}
    assert written["state"]["identity"] == STATE_OF_AN_EARLIER_VERSION["identity"]
    del written["checksum"], written["checksums"]  # which it did not write
    manifest.write_text(json.dumps(written | {"state": STATE_OF_AN_EARLIER_VERSION}))

    run = make()
    assert run.begin(resume=True)
    found = state_of(run)
    assert (found["update"], found["cursor"], found["kl"]) == (2, 16, FROM_ONE_NUMBER)
    assert (found["centre"], found["source"]) == ({"total": 0.14094370743259788, "count": 71.5}, {"rollouts": 2})
    assert found["metrics"] == {"policy/loss": -0.03, "eval/gold": 2.25} and found["evaluation"] == {"gold": 2.25}
    assert 1000.5 <= run.loop.seconds < 1100


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"gamma": 0.5}, {}, r"other settings \(ppo.gamma was 1.0 and is 0.5\)"),
        ({}, {"seed": 8}, r"other seed \(seed was 3 and is 8\)"),
        ({}, {"prompts": PROMPTS[:3]}, r"other prompts \(prompts was 7586abbd\.\.\. and is [0-9a-f]{8}\.\.\.\)"),
        ({"lam": 0.5}, {"seed": 8}, r"other settings and seed \(ppo.lam was 0.95 and is 0.5; seed was 3 and is 8\)"),
    ],
    ids=["gamma", "seed", "prompts", "both"],
)
def test_a_checkpoint_of_another_run_is_not_loaded(
    make: Make, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    first = make()
    first.begin(resume=False)
    with pytest.raises(OSError, match="power"):
        train(first, rounds=2)
    other = make(small_config(reward={"centre": True}, **changes), weights=9, **options)
    untouched = make(small_config(reward={"centre": True}, **changes), weights=9, **options)
    with pytest.raises(CheckpointError, match=f"step-000002 belongs to a run with {message}: restore them"):
        other.begin(resume=True)
    assert_same_weights(other.actor_critic, untouched.actor_critic)


def test_what_is_free_to_change_is(make: Make) -> None:
    first = make()
    first.begin(resume=False)
    with pytest.raises(OSError, match="power"):
        train(first, rounds=2)
    free: dict[str, Any] = {
        "updates": 7,
        "save_every": 1,
        "keep_checkpoints": 9,
        "evaluate_every": 3,
        "micro_batch_size": 1,
    }
    assert make(small_config(reward={"centre": True}, chunk_tokens=7, **free)).begin(resume=True)


def test_the_number_of_updates_is_not_free_where_the_rates_fall_towards_the_last(make: Make, tmp_path: Path) -> None:
    cfg = small_config(reward={"centre": True}, schedule="linear")
    first = make(cfg)
    first.begin(resume=False)
    with pytest.raises(OSError, match="power"):
        train(first, rounds=2)
    longer = replace(cfg, ppo=replace(cfg.ppo, updates=7))
    with pytest.raises(CheckpointError, match=r"with other updates \(updates was 4 and is 7\): restore them"):
        make(longer).begin(resume=True)
    assert make(cfg).begin(resume=True)
    manifest = tmp_path / "checkpoints" / "step-000002" / "checkpoint.json"
    written = json.loads(manifest.read_text())
    del written["state"]["identity"]["updates"], written["checksum"]  # as earlier versions wrote it
    manifest.write_text(json.dumps(written))
    assert make(longer).begin(resume=True)


def judged_by(**changes: Any) -> RunConfig:
    cfg = small_config(reward={"centre": True})
    return replace(cfg, evaluation=replace(cfg.evaluation, **changes))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"scorer": "mine.py:score"}, "evaluation.scorer was None and is mine.py:score"),
        ({"prompts": 7}, "evaluation.prompts was 256 and is 7"),
    ],
)
def test_the_evaluations_along_a_training_are_by_one_scorer_on_the_same_prompts(
    make: Make, changes: dict[str, Any], difference: str
) -> None:
    """Else the curve of gold over KL would change its measure where the run went on."""
    first = make()
    first.begin(resume=False)
    with pytest.raises(OSError, match="power"):
        train(first, rounds=2)
    with pytest.raises(CheckpointError, match=rf"with other evaluation \({difference}\): restore them"):
        make(judged_by(**changes)).begin(resume=True)
    assert make(judged_by(samples=1, per="token")).begin(resume=True)
    # of a training without evaluations nothing is compared
    assert make(judged_by(**changes), evaluate=None).begin(resume=True)


# ---- the end


def test_a_finished_run_is_loaded_and_no_round_is_done_again(make: Make, tmp_path: Path) -> None:
    first = make()
    first.begin(resume=False)
    train(first)
    ended = first.end(stopped=False)
    assert not (tmp_path / "checkpoints").exists()
    rows = read_metrics(tmp_path / "metrics.jsonl")

    again = make(weights=9)
    assert again.begin(resume=True) is False
    loaded = again.result(stopped=False)
    assert_same_weights(first.actor_critic, again.actor_critic)
    assert (loaded.updates, loaded.metrics, loaded.evaluation) == (4, ended.metrics, {"gold": 4.25})
    assert json.loads((tmp_path / "done.json").read_text())["seconds"] <= loaded.seconds
    assert read_metrics(tmp_path / "metrics.jsonl") == rows  # nor evaluated
    assert make(judged_by(scorer="mine.py:score")).begin(resume=True) is False  # others may evaluate it
    for cfg, resume, message in (
        (None, False, r"holds a finished run; pass --resume to load what it trained"),
        (
            small_config(reward={"centre": True}, updates=5),
            True,
            "finished run of other settings, prompts, seed or origin",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            make(cfg).begin(resume=resume)
    # the record says how it ended, whatever became of the log; that of an earlier version did not
    done = json.loads((tmp_path / "done.json").read_text())
    assert (done.pop("updates"), done.pop("evaluation")) == (4, {"gold": 4.25})
    log = (tmp_path / "metrics.jsonl").rename(tmp_path / "log")
    without = make(weights=9)
    assert without.begin(resume=True) is False
    assert without.result(stopped=False).evaluation == {"gold": 4.25}
    (tmp_path / "done.json").write_text(json.dumps(done))
    log.rename(tmp_path / "metrics.jsonl")
    older = make(weights=9)
    assert older.begin(resume=True) is False
    found = older.result(stopped=False)
    assert (found.updates, found.metrics, found.evaluation) == (4, ended.metrics, {"gold": 4.25})


@pytest.mark.parametrize("then", [None, 2])
def test_how_many_processes_trained_a_finished_run_does_not_matter(
    make: Make, tmp_path: Path, then: int | None
) -> None:
    """Sharded runs name no number of processes, and earlier versions named it in the record of a finished run."""
    first = make()
    first.begin(resume=False)
    train(first)
    first.end(stopped=False)
    record = tmp_path / "done.json"
    done = json.loads(record.read_text())
    assert "processes" not in done["config"] and done["config"]["seed"] == 3
    if then is not None:
        done["config"]["processes"] = then
        record.write_text(json.dumps(done))

    again = make(weights=9)
    assert again.begin(resume=True) is False
    assert_same_weights(first.actor_critic, again.actor_critic)


def test_the_end_is_told_after_the_models_are_there(make: Make, tmp_path: Path) -> None:
    class End(Callback):
        def on_end(self, step: int, metrics: Mapping[str, float]) -> None:
            heard.append((step, (tmp_path / "policy" / "config.json").is_file(), (tmp_path / "done.json").is_file()))

    heard: list[tuple[int, bool, bool]] = []
    run = make(small_config(updates=1), callbacks=[End()])
    run.begin(resume=False)
    train(run)
    assert run.end(stopped=True).stopped
    assert heard == [(1, True, False)]


# ---- a round


def test_the_rates_follow_the_schedule_round_by_round(make: Make, tmp_path: Path) -> None:
    cfg = small_config(updates=4, schedule="linear", warmup_updates=2, learning_rate=0.5, value_learning_rate=0.25)
    run = make(cfg)
    run.begin(resume=False)
    train(run)
    rows = read_metrics(tmp_path / "metrics.jsonl")[1:]
    assert [row["policy/learning_rate"] for row in rows] == pytest.approx([0.5 / 3, 1 / 3, 0.5, 0.25])
    assert [row["value/learning_rate"] for row in rows] == pytest.approx([0.25, 0.1875, 0.125, 0.0625])


def test_the_policy_warms_up_from_its_own_first_round(make: Make, tmp_path: Path) -> None:
    cfg = small_config(
        updates=6, warmup_updates=2, value_warmup_updates=2, learning_rate=0.3, value_learning_rate=0.25, save_every=3
    )
    run = make(cfg)
    run.begin(resume=False)
    with pytest.raises(OSError, match="power"):
        train(run, rounds=3)
    resumed = make(cfg)
    assert resumed.begin(resume=True)
    train(resumed)
    rows = read_metrics(tmp_path / "metrics.jsonl")[1:]
    assert [row["policy/learning_rate"] for row in rows] == pytest.approx([0.1, 0.1, 0.1, 0.2, 0.3, 0.3])
    assert [row["value/learning_rate"] for row in rows] == pytest.approx([0.25] * 6)


def test_the_policy_is_evaluated_as_it_comes_and_when_due(make: Make, tmp_path: Path) -> None:
    run = make(small_config(updates=3, evaluate_every=2))
    run.begin(resume=False)
    train(run)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert {row["step"]: row.get("eval/gold") for row in rows} == {0: 0.25, 1: None, 2: 2.25, 3: 3.25}
    assert without_times(rows[0]) == {"step": 0, "eval/gold": 0.25}


def test_without_an_evaluation_the_log_begins_with_the_first_round(make: Make, tmp_path: Path) -> None:
    run = make(small_config(updates=1), evaluate=None)
    run.begin(resume=False)
    train(run)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["step"] == 1 and not any(key.startswith("eval/") for key in row)


def test_the_value_model_warms_up_for_as_many_rounds_as_asked(make: Make) -> None:
    run = make(small_config(updates=3, value_warmup_updates=2))
    run.begin(resume=False)
    warm: list[bool] = []

    def take_round() -> dict[str, float]:
        warm.append(run.warms_up_values)
        return a_round(run)

    run.train(take_round)
    assert warm == [True, True, False]


def test_the_best_policy_is_kept_and_the_log_says_of_which_update(make: Make, tmp_path: Path) -> None:
    """Own rewards of 0, 3, 2 and 9 after 0, 2, 4 and 5 updates; the last is beyond the ceiling. A run that is stopped
    after the fourth and goes on keeps the second's."""
    figures = {0: (0.0, 0.0), 2: (3.0, 0.2), 4: (2.0, 0.3), 5: (9.0, 0.9)}

    def evaluate(_: ActorCritic, update: int) -> dict[str, float]:
        own_reward, kl = figures[update]
        return {"proxy_per_token": own_reward, "kl_per_token": kl}

    cfg = small_config(updates=5, evaluate_every=2, save_every=2, keep_best=True, best_max_kl=0.5)
    first = make(cfg, evaluate=evaluate)
    first.begin(resume=False)
    with pytest.raises(OSError, match="power"):
        train(first, rounds=2)
    state = json.loads((tmp_path / "checkpoints" / "step-000002" / "checkpoint.json").read_text())["state"]
    assert state["best"] == {"reached": {"update": 2, "own_reward": 3.0, "kl": 0.2, "per": "token"}}
    kept = {name: p.clone() for name, p in first.actor_critic.policy.named_parameters()}
    run = make(cfg, evaluate=evaluate)
    assert run.begin(resume=True)
    train(run)
    run.end(stopped=False)
    rows = {row["step"]: row.get("eval/best_update") for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert rows == {0: None, 1: None, 2: 2.0, 3: None, 4: 2.0, 5: 2.0}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "best" / "policy")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, kept[name]), name
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert any(not torch.equal(p, kept[name]) for name, p in last.named_parameters())


@pytest.mark.parametrize(
    ("kind", "share_dense", "per"),
    [
        ("continuous", 1.0, "token"),
        ("sum_at_end", 0.0, "token"),
        ("sequence", 0.0, "answer"),
        ("uniform", 1.0, "answer"),
        ("callable", 0.0, "answer"),
        ("callable", 1.0, "token"),
    ],
)
def test_the_best_is_chosen_by_what_has_one_reward(
    make: Make, tmp_path: Path, kind: str, share_dense: float, per: str
) -> None:
    cfg = small_config(updates=1, evaluate_every=1, keep_best=True)
    function = {"callable": "tests.experiment.helpers:count_letters"} if kind == "callable" else {}
    run = make(
        replace(cfg, reward=RewardConfig(kind=kind, **function)),
        evaluate=lambda *_: {"proxy_per_token": 1.0, "proxy_per_answer": 2.0, "kl_per_token": 0.1},
    )
    run.begin(resume=False)
    run.train(lambda: {**a_round(run), "reward/share_dense": share_dense})
    record = json.loads((tmp_path / "best" / "best.json").read_text())
    assert {name for name in record if name.startswith("own_reward")} == {f"own_reward_per_{per}"}


def test_a_run_that_starts_anew_forgets_the_best_of_the_one_before(make: Make, tmp_path: Path) -> None:
    (tmp_path / "best" / "policy").mkdir(parents=True)
    (tmp_path / "best" / "best.json").write_text('{"update": 9, "own_reward_per_token": 9, "kl_per_token": 0}')
    run = make(small_config(updates=4, evaluate_every=2, keep_best=True), evaluate=None)
    run.begin(resume=True)  # there is no checkpoint to go on from
    assert run.best is not None and run.best.kept is None and not (tmp_path / "best").exists()


@pytest.mark.parametrize(
    ("mean", "reward", "said"),
    [
        (0.3, {}, "every further token pays"),
        (-0.3, {}, "every further token costs"),
        (0.19, {}, None),
        (0.3, {"centre": True}, None),
    ],
)
def test_a_reward_that_pays_for_length_is_told_once(
    make: Make, caplog: pytest.LogCaptureFixture, mean: float, reward: dict[str, Any], said: str | None
) -> None:
    run = make(small_config(reward=reward))
    metrics = {"reward/mean_token": mean, "reward/mean_abs_token": 1.0, "reward/share_dense": 0.9}
    for _ in range(2):
        run.note_pay_for_length(metrics)
    assert caplog.text.count("on average, KL included") == (said is not None)
    assert said is None or (said in caplog.text and "set reward.centre: true" in caplog.text)


def test_a_score_of_whole_answers_pays_for_no_length(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    run = make()
    for reward, dense in ((RewardConfig(), 0.0), (RewardConfig(kind="uniform"), 1.0)):
        run.cfg = replace(run.cfg, reward=reward)
        run.note_pay_for_length({"reward/mean_token": 1.0, "reward/mean_abs_token": 1.0, "reward/share_dense": dense})
    assert not caplog.text


def test_the_processes_share_each_round_of_prompts(make: Make) -> None:
    shares: list[list[str]] = []
    for index in (0, 1):
        run = make()
        run.accelerator = SimpleNamespace(process_index=index, num_processes=2)
        shares.append(run.take_prompts())
    assert [prompt for pair in zip(*shares, strict=True) for prompt in pair] == make().take_prompts()


# ---- what goes wrong


def ends_at_once(*, prompts: Sequence[str], turns: Sequence[Any]) -> list[None]:
    return [None] * len(prompts)


@pytest.mark.parametrize("by", [None, "argument", "config"])
def test_a_prompt_that_fits_with_no_answer_is_known_before_the_first_update(
    by: str | None,
    tiny_causal_lm: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """The order of the prompts would let it come after hours. With one answer it would fit, where an environment is."""
    cfg = small_config()
    read = tiny_causal_lm().config.max_position_embeddings
    cfg = replace(cfg, data=replace(cfg.data, max_prompt_tokens=read - (cfg.rollout.max_new_tokens if by else 1)))
    named = f"{__name__}:ends_at_once" if by == "config" else None
    cfg = replace(cfg, rollout=replace(cfg.rollout, max_turns=2, max_message_tokens=2, environment=named))
    steps: list[int] = []

    class Heard(Callback):
        def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
            steps.append(step)

    prompts = [*PROMPTS * 9, "not bad at all. " * read]
    options: dict[str, Any] = {"prompts": prompts, "callbacks": [Heard()]}
    if by == "argument":
        options["environment"] = ends_at_once
    with pytest.raises(DataError, match=rf"reads at most {read} .*; lower data.max_prompt_tokens.* rollout") as caught:
        run_ppo(cfg, tiny_causal_lm, tiny_tokenizer, tmp_path, **options)
    assert not steps and not (tmp_path / "metrics.jsonl").exists()
    assert "max_answer_tokens" not in str(caught.value)


def test_a_state_in_which_training_broke_off_is_saved_apart(make: Make, tmp_path: Path) -> None:
    def take_round() -> dict[str, float]:
        if run.update < 2:
            return a_round(run)
        with torch.no_grad():
            next(iter(run.actor_critic.parameters())).fill_(7.0)
        raise TrainingDiverged("the ratio is 1e9; lower ppo.learning_rate")

    saves = Saves()
    run = make(small_config(save_every=1), callbacks=[saves])
    run.begin(resume=False)
    with pytest.raises(
        TrainingDiverged, match=r"update 3: the ratio is 1e9; .*saved in .*diverged/step-000002; --resume continues"
    ):
        run.train(take_round)
    broken, before = (latest_checkpoint(tmp_path / name) for name in ("diverged", "checkpoints"))
    assert broken is not None and before is not None
    name = next(name for name, _ in run.actor_critic.named_parameters())
    assert torch.all(load_file(broken / "model-actor_critic.safetensors")[name] == 7.0)
    assert not torch.any(load_file(before / "model-actor_critic.safetensors")[name] == 7.0)
    assert saves.heard == [(1, "checkpoints"), (2, "checkpoints")]
    assert [path.name for path in (tmp_path / "diverged").iterdir()] == ["step-000002"]


@pytest.mark.parametrize(
    ("sizes", "processes"), [((8, 3), 1), ((8, 4), 3), ((6, 4), 1)], ids=["minibatch", "processes", "batch"]
)
def test_sizes_that_do_not_divide_are_refused(sizes: tuple[int, int], processes: int) -> None:
    batch, minibatch = sizes
    ppo = small_config(batch_size=batch, minibatch_size=minibatch).ppo
    with pytest.raises(ConfigError, match=f"ppo.batch_size is {batch} .* {minibatch}, on {processes} process"):
        check_sizes(ppo, processes)
    check_sizes(small_config(batch_size=8, minibatch_size=4).ppo, 2)


def test_a_real_run_stops_and_goes_on_in_the_same_folder_as_these(
    make: Make,
    tiny_causal_lm: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """The rounds above stand for those of the recipe: it resumes what they saved."""
    cfg = small_config(reward={"centre": True}, updates=3)
    run = make(cfg)
    run.begin(resume=False)
    with pytest.raises(OSError, match="power"):
        train(run, rounds=2)
    _, result = run_ppo(cfg, tiny_causal_lm, tiny_tokenizer, tmp_path, reward_source=RandomSource(seed=5), resume=True)
    assert result.updates == 3
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
