"""A run's folder: opened, reopened, what it wants done, what is done already, and whose data is whose."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.experiment.helpers import arm_config, arm_run, small_config
from tlcr.config.schema import Arm, RefreshConfig, RewardConfig, RunConfig
from tlcr.data import embedded
from tlcr.errors import CheckpointError, ConfigError
from tlcr.experiment.locks import sole_run
from tlcr.experiment.opening import open_run, reopen_run
from tlcr.experiment.pipeline import run
from tlcr.experiment.preflight import holds_a_run
from tlcr.experiment.run_folder import EMBEDDED_PROMPTS, RunFolder, Trained, raw_preferences, revision_cache
from tlcr.training.done import mark_done

STAGES = ("revisions", "sft", "reward_model", "dpo", "labels", "discriminator", "analysis")


def opened(cfg: RunConfig, *, resume: bool = False) -> RunFolder:
    """The run of `cfg`, with no folder written."""
    return RunFolder(cfg, resume, Path(cfg.output_dir), Path(cfg.output_dir))


# ---- models of seeds


def test_seeds_share_a_model_or_have_one_each(tmp_path: Path) -> None:
    shared = opened(replace(small_config(tmp_path), seed=7, seeds=(0, 3)))
    assert shared.per_seed == {0: shared, 3: shared} and shared.model_folders == [shared]
    own = opened(replace(small_config(tmp_path), seed=7, seeds=(0, 3), models_per_seed=True))
    assert [run.cfg.seed for run in own.model_folders] == [0, 3]
    assert [run.models for run in own.model_folders] == [tmp_path / "models" / f"seed-{seed}" for seed in (0, 3)]
    assert all(run.path == tmp_path and run.cfg.seeds == (0, 3) for run in own.model_folders)
    assert own.per_seed is own.per_seed  # data that a seed read is read once


# ---- what is wanted


def wanted(cfg: RunConfig) -> set[str]:
    run = opened(cfg)
    return {stage for stage in STAGES if run.wants(stage)}


def arms(*rewards: dict[str, Any]) -> tuple[Arm, ...]:
    return tuple(Arm(f"arm-{index}", RewardConfig(**reward)) for index, reward in enumerate(rewards))


LABELS = {"labels", "discriminator", "analysis"}


@pytest.mark.parametrize(
    ("rewards", "stages"),
    [
        ([{"kind": "continuous"}], {"sft"} | LABELS),
        ([{"kind": "sequence"}], {"sft", "reward_model"}),
        ([{"kind": "dpo"}], {"sft", "dpo"}),
        ([{"kind": "random"}], {"sft"}),
        ([{"kind": "continuous", "sequence_coef": 0.1}], {"sft", "reward_model"} | LABELS),
        ([{"kind": "random"}, {"kind": "dpo"}, {"kind": "discrete"}], {"sft", "dpo"} | LABELS),
    ],
    ids=lambda value: str(len(value)),
)
def test_a_model_is_trained_where_an_arm_needs_it(
    tmp_path: Path, rewards: list[dict[str, Any]], stages: set[str]
) -> None:
    cfg = replace(small_config(tmp_path), arms=arms(*rewards))
    assert wanted(cfg) == stages
    single = replace(cfg, arms=(), reward=cfg.arms[0].reward)
    assert wanted(single) == wanted(replace(cfg, arms=cfg.arms[:1]))
    assert wanted(replace(cfg, sft=replace(cfg.sft, enabled=False))) == stages - {"sft"}


def test_a_model_that_is_named_is_not_trained(tmp_path: Path) -> None:
    cfg = replace(small_config(tmp_path), arms=arms({"kind": "continuous"}, {"kind": "sequence"}, {"kind": "dpo"}))
    assert wanted(cfg) == {"sft", "reward_model", "dpo"} | LABELS
    for section, stages in (("discriminator", LABELS), ("reward_model", {"reward_model"}), ("dpo", {"dpo"})):
        changed = replace(cfg, **{section: replace(getattr(cfg, section), path="elsewhere")})
        assert wanted(changed) == wanted(cfg) - stages
    value = replace(small_config(tmp_path), arms=arms({"kind": "random"}))
    value = replace(value, ppo=replace(value.ppo, value_init="reward_model"))
    assert wanted(value) == {"sft", "reward_model"}


def test_a_reviser_works_where_labels_are_wanted(tmp_path: Path) -> None:
    cfg = small_config(tmp_path)
    revising = replace(cfg, reviser=replace(cfg.reviser, backend="openai"))
    assert wanted(revising) == wanted(cfg) | {"revisions"}
    assert "revisions" not in wanted(replace(revising, arms=arms({"kind": "sequence"})))
    named = replace(revising, discriminator=replace(cfg.discriminator, path="elsewhere"))
    assert "revisions" not in wanted(named)
    # a refresh mixes them in, though another trained the discriminator
    for refresh, by in (({"every": 1}, {"revisions"}), ({"every": 1, "share": 0.0}, set()), ({"every": 0}, set())):
        refreshing = arms({"kind": "continuous", "refresh": RefreshConfig(**refresh)})
        assert wanted(replace(named, arms=refreshing)) == {"sft"} | by
    shares = opened(replace(named, arms=arms({"kind": "continuous", "refresh": RefreshConfig(every=1)}))).data_wanted
    assert shares == ["sft", "reward", "ppo"]


def test_a_trial_depends_on_revisions_where_its_discriminator_learns_from_them(tmp_path: Path) -> None:
    """A trial that uses none needs none to be there, and one that an older version made with them counts."""
    cfg = replace(small_config(tmp_path), arms=arms({"kind": "sequence"}, {"kind": "continuous"}))
    run = opened(replace(cfg, reviser=replace(cfg.reviser, backend="openai")))
    sequence, continuous = run.trials
    settings = run.trial_settings(sequence)
    assert "revisions" not in settings and not run.is_trained(sequence)
    with pytest.raises(ConfigError, match="revisions holds no finished stage"):
        run.trial_settings(continuous)
    mark_done(tmp_path / "revisions", config={}, metrics={}, seconds=0.0)
    (tmp_path / "revisions" / "revisions.jsonl").write_text("a")
    assert "revisions" in run.trial_settings(continuous)
    older = {**settings, "revisions": run.trial_settings(continuous)["revisions"]}
    for trial, recorded, trained in ((sequence, older, True), (continuous, run.trial_settings(sequence), False)):
        mark_done(run.trial_folder(trial), config=recorded, metrics={}, seconds=0.0, record="arm.json")
        assert run.is_trained(trial) == trained


def test_the_stages_that_need_data(tmp_path: Path) -> None:
    cfg = small_config(tmp_path)
    assert opened(cfg).data_wanted == ["sft", "reward", "ppo"]
    for kind, stages in (("dpo", ["sft", "reward", "ppo"]), ("random", ["sft", "ppo"])):
        assert opened(replace(cfg, arms=arms({"kind": kind}))).data_wanted == stages
    off = replace(cfg, arms=arms({"kind": "random"}), sft=replace(cfg.sft, enabled=False))
    assert opened(off).data_wanted == ["ppo"]


# ---- what a result depends on


def test_a_stage_depends_on_its_sections_and_the_seed(tmp_path: Path) -> None:
    run = opened(replace(small_config(tmp_path), seed=5))
    assert run.settings("model", "sft") == {"seed": 5, "model": run.cfg.model, "sft": run.cfg.sft}


def test_where_labels_come_from_a_reviser_they_depend_on_what_it_wrote(tmp_path: Path) -> None:
    cfg = small_config(tmp_path)
    cfg = replace(cfg, reviser=replace(cfg.reviser, backend="openai"))
    digests = set()
    for text in ("a", "b", "a"):
        folder = tmp_path / "revisions"
        mark_done(folder, config={}, metrics={}, seconds=0.0)
        (folder / "revisions.jsonl").write_text(text)
        settings = opened(cfg).settings("data", "labels")
        digests.add(settings["revisions"])
        assert "revisions" not in opened(cfg).settings("data", "sft")
    assert len(digests) == 2


def test_the_origin_of_a_stage_names_the_weights_that_it_starts_from(tmp_path: Path) -> None:
    """By their checksums where SFT wrote them: one that was done again makes another training."""
    run = opened(small_config(tmp_path, **{"lora.rank": 4, "lora.roles": ["discriminator"]}))
    assert run.origin_of_stage("sft") == {"model": "embedded, seed 0", "dtype": "float32"}
    found = []
    for weights in (b"first", b"second"):
        (tmp_path / "sft").mkdir(exist_ok=True)
        (tmp_path / "sft" / "model.safetensors").write_bytes(weights)
        mark_done(tmp_path / "sft", config={}, metrics={}, seconds=0.0)
        found.append(run.origin_of_stage("discriminator"))
    assert found[0]["model"] != found[1]["model"]
    assert found[0].keys() == {"model", "dtype", "lora"} and found[0]["lora"]["rank"] == 4
    assert run.origin_of_stage("dpo").keys() == {"model", "dtype"}


TRIAL_CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("model", {"dtype": "bfloat16"}),
    ("data", {"held_out": 0.3}),
    ("sft", {"epochs": 9}),
    ("labels", {"end_of_sequence": "ignore"}),
    ("discriminator", {"epochs": 9}),
    ("rollout", {"temperature": 0.5}),
    ("ppo", {"updates": 9}),
    ("evaluation", {"prompts": 9}),
    ("kl", {"horizon": 9}),
]


@pytest.mark.parametrize(("section", "change"), TRIAL_CHANGES, ids=[section for section, _ in TRIAL_CHANGES])
def test_a_trial_depends_on_everything_before_it(tmp_path: Path, section: str, change: dict[str, Any]) -> None:
    cfg = small_config(tmp_path)
    changed = opened(replace(cfg, **{section: replace(getattr(cfg, section), **change)}))
    run = opened(cfg)
    first, second = (one.trial_settings(one.trials[0]) for one in (run, changed))
    assert {name for name in first if first[name] != second[name]} == {section}


def test_a_trial_depends_on_the_models_that_its_own_reward_asks(tmp_path: Path) -> None:
    cfg = replace(small_config(tmp_path), arms=arms({"kind": "continuous"}, {"kind": "sequence"}, {"kind": "dpo"}))
    run = opened(replace(cfg, seed=2, seeds=(6,)))
    for trial, asked in zip(run.trials, ("discriminator", "reward_model", "dpo"), strict=True):
        settings = run.trial_settings(trial)
        assert {name for name in ("discriminator", "reward_model", "dpo") if settings[name]} == {asked}
        assert settings["reward"] == trial.arm.reward
        assert (settings["seed"], settings["ppo_seed"]) == (2, 6)


def test_a_trial_is_trained_by_its_own_record_with_todays_settings(tmp_path: Path) -> None:
    run = opened(replace(small_config(tmp_path), kl_coefs=(0.1, 0.2)))
    first, other = run.trials[0], run.trials[1]
    folder = run.trial_folder(first)
    assert folder == tmp_path / "ppo" / "continuous" / "kl-0.1" / "seed-0"
    mark_done(folder, config=run.trial_settings(first), metrics={}, seconds=0.0)  # done.json is the recipe's
    assert not run.is_trained(first)
    mark_done(folder, config=run.trial_settings(first), metrics={}, seconds=0.0, record="arm.json")
    assert run.is_trained(first) and not run.is_trained(other)
    changed = opened(replace(run.cfg, rollout=replace(run.cfg.rollout, temperature=0.5)))
    assert not changed.is_trained(changed.trials[0])


def test_a_trained_trial_counts_whatever_does_not_decide_its_result(tmp_path: Path) -> None:
    """Where servers are, for one: a run goes on with other addresses."""
    cfg = small_config(tmp_path, **{"rollout.engine": "server", "rollout.server": ["http://a"]})
    run = opened(cfg)
    trial = run.trials[0]
    settings, folder = run.trial_settings(trial), run.trial_folder(trial)
    mark_done(folder, config=settings, metrics={}, seconds=0.0, record="arm.json")
    free: dict[str, dict[str, Any]] = {
        "rollout": {"server": ("http://b", "http://c"), "server_timeout": 5.0},
        "ppo": {"save_every": 7, "save_in_background": True, "keep_checkpoints": 9, "micro_batch_size": 2},
        "model": {"gradient_checkpointing": True},
        "sft": {"save_every": 7, "micro_batch_size": 2},
        "evaluation": {"per": "answer"},
    }
    other = opened(replace(cfg, **{name: replace(getattr(cfg, name), **values) for name, values in free.items()}))
    assert other.is_trained(other.trials[0])
    assert json.loads((folder / "arm.json").read_text())["config"]["rollout"]["server"] == ["http://a"]
    elsewhere = opened(replace(cfg, rollout=replace(cfg.rollout, server=("http://b",), top_k=3)))
    with pytest.raises(ConfigError, match=r"other settings \(rollout.top_k was 0, is 3\): restore them"):
        elsewhere.once(folder, elsewhere.trial_settings(trial), dict, record="arm.json")


# ---- where models lie


def test_a_model_is_where_its_stage_wrote_it_or_where_it_is_named(tmp_path: Path) -> None:
    run = replace(opened(small_config(tmp_path)), models=tmp_path / "models" / "seed-3")
    for stage in ("sft", "reward_model", "discriminator", "dpo"):
        with pytest.raises(ConfigError, match=f"run 'tlcr train {stage.replace('_', '-')}' with this config first"):
            _ = run.policy_source if stage == "sft" else getattr(run, f"{stage}_folder")
        mark_done(run.models / stage, config={}, metrics={}, seconds=0.0)
    assert run.policy_source == run.cfg.model.saved_in(run.models / "sft")
    for stage in ("reward_model", "discriminator", "dpo"):
        assert getattr(run, f"{stage}_folder") == run.models / stage
        named = {stage: replace(getattr(run.cfg, stage), path=str(tmp_path / "named"))}
        assert getattr(replace(run, cfg=replace(run.cfg, **named)), f"{stage}_folder") == tmp_path / "named"
    without = replace(run, cfg=replace(run.cfg, sft=replace(run.cfg.sft, enabled=False)))
    assert without.policy_source == run.cfg.model


def test_revisions_are_the_runs_and_not_a_seeds(tmp_path: Path) -> None:
    cfg = small_config(tmp_path)
    run = replace(opened(cfg), models=tmp_path / "models" / "seed-3")
    assert run.revisions_folder == tmp_path / "revisions"
    with pytest.raises(ConfigError, match=r"revisions holds no finished stage; run 'tlcr revise'"):
        run._written("revisions")
    assert revision_cache(cfg) == tmp_path / "revisions" / "answers.sqlite"
    elsewhere = replace(cfg, reviser=replace(cfg.reviser, cache=str(tmp_path / "shared.sqlite")))
    assert revision_cache(elsewhere) == tmp_path / "shared.sqlite"


# ---- data


def test_the_embedded_task_makes_its_own_data_by_the_models_seed(tmp_path: Path) -> None:
    run = opened(small_config(tmp_path, **{"data.embedded_pairs": 40, "seed": 4}))
    preferences, edits = embedded.generate_pairs(40, 4)
    split = run.preferences("sft")
    assert sorted(p.id for p in (*split.train, *split.held_out)) == sorted(p.id for p in preferences)
    assert sorted(e.id for e in (*run.edits.train, *run.edits.held_out)) == sorted(e.id for e in edits)
    assert {p.id for p in run.comparisons} == {p.id for p in run.preferences("reward").held_out}
    assert list(run.prompts.train) == list(embedded.prompts(EMBEDDED_PROMPTS, 4, "train"))
    assert list(run.prompts.held_out) == list(embedded.prompts(6, 4, "held_out"))
    other = opened(replace(run.cfg, seed=5))
    assert other.prompts.train != run.prompts.train
    assert [pair.chosen for pair in raw_preferences(run.cfg)] == [pair.chosen for pair in preferences]


def test_prompts_of_ones_own_are_those_of_the_preferences_and_at_most_so_many_held_out(tmp_path: Path) -> None:
    cfg = arm_config(tmp_path, tmp_path / "model", **{"evaluation.prompts": 3})

    def prompts(cfg: RunConfig) -> Any:
        run = opened(cfg)
        vars(run)["tokenizer"] = embedded.build_tokenizer(0)  # no model lies in the folder
        return run.prompts

    found = prompts(cfg)
    assert len(found.held_out) == 3 and not set(found.held_out) & set(found.train)
    more = prompts(replace(cfg, evaluation=replace(cfg.evaluation, prompts=100)))
    assert more.train == found.train and more.held_out[:3] == found.held_out and len(more.held_out) > 3
    texts = {json.loads(line)["prompt"] for line in (tmp_path / "pairs.jsonl").read_text().splitlines()}
    assert set(more.train) | set(more.held_out) == texts
    own = tmp_path / "prompts.jsonl"
    own.write_text("".join(json.dumps({"prompt": f"question {index}"}) + "\n" for index in range(30)))
    named = prompts(replace(cfg, data=replace(cfg.data, prompts=str(own))))
    assert all(prompt.startswith("question ") for prompt in (*named.train, *named.held_out))


DATED = (
    "Today: {{ strftime_now('%d %b %Y') }}\n{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def conversations(folder: Path, name: str, numbers: Iterable[int]) -> str:
    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = (
        {"prompt": said("user", f"Question {k}?"), "chosen": said("assistant", "a"), "rejected": said("assistant", "b")}
        for k in numbers
    )
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def asked(texts: Iterable[str]) -> list[str]:
    return [match[0] for text in texts if (match := re.search(r"Question \d+\?", text))]


def dated_run(cfg: RunConfig, started: str | None = None) -> RunFolder:
    run = open_run(cfg, resume=True)
    if started is not None:
        (run.path / "started.json").write_text(json.dumps({"started": started}))
    vars(run)["tokenizer"] = embedded.build_tokenizer(0)
    run.tokenizer.chat_template = DATED
    return run


def test_a_run_reads_the_date_on_which_it_began(tmp_path: Path) -> None:
    source = conversations(tmp_path, "chat.jsonl", range(40))
    changes = {"data.preferences": source, "evaluation.prompts": 100}
    cfg = arm_config(tmp_path, tmp_path / "model", **changes)
    began = dated_run(cfg, "2026-07-01T23:59:59")
    prompts = began.prompts
    assert all(text.startswith("Today: 01 Jul 2026\n") for text in (*prompts.train, *prompts.held_out))
    assert began.preferences("sft").train[0].prompt.startswith("Today: 01 Jul 2026\n")
    again = dated_run(cfg)
    assert again.prompts == prompts, "opened again, the run keeps its date"
    other = dated_run(replace(cfg, output_dir=str(tmp_path / "other")), "2026-07-02T00:00:01").prompts
    assert other != prompts and asked(other.held_out) == asked(prompts.held_out)
    assert asked(other.train) == asked(prompts.train)


def test_a_new_run_began_today_and_a_folder_that_does_not_say_begins_now(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = datetime.now().replace(microsecond=0)
    run = open_run(small_config(tmp_path / "run"), resume=False)
    assert before <= run.started <= datetime.now()
    (run.path / "started.json").unlink()
    (run.path / "sft").mkdir()
    (run.path / "sft" / "done.json").write_text("{}")
    assert before <= reopen_run(run.path).started <= datetime.now() and not caplog.text
    open_run(run.cfg, resume=True)
    assert "was begun by an earlier version, which held out other prompts" in caplog.text


def test_what_is_held_out_depends_on_the_prompt_alone(tmp_path: Path) -> None:
    """Not on the order, the file's name or what else is there; and it is held out from every stage."""

    def run(name: str, numbers: Iterable[int], **changes: object) -> RunFolder:
        source = conversations(tmp_path, name, numbers)
        given = {"data.preferences": source, "data.held_out": 0.2, "evaluation.prompts": 5, **changes}
        return dated_run(arm_config(tmp_path / name.split(".")[0], tmp_path / "model", **given))

    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    first, second = run("first.jsonl", range(60)), run("second.jsonl", reversed(range(60)))
    assert first.prompts == second.prompts, "the first few held-out prompts and the order of training too"
    every = run("third.jsonl", [*range(100, 160), *range(60)], **{"evaluation.prompts": 1000})
    for stage in ("sft", "reward"):
        held_out = {asked([pair.prompt])[0] for pair in first.preferences(stage).held_out}
        assert held_out == {asked([pair.prompt])[0] for pair in second.preferences(stage).held_out}
        assert set(asked(first.prompts.held_out)) <= held_out < set(asked(every.prompts.held_out))
        assert not held_out & set(asked(first.prompts.train))


def test_one_prompt_alone_is_trained_and_evaluated_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Text without a prompt: every rollout starts from the beginning-of-sequence token."""
    source = tmp_path / "texts.jsonl"
    rows = [{"prompt": "", "chosen": f"Text {k}.", "rejected": f"Test {k}."} for k in range(40)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = dated_run(arm_config(tmp_path, tmp_path / "model", **{"data.preferences": str(source)}))
    tokenizer = run.tokenizer
    start = tokenizer.bos_token or tokenizer.eos_token
    assert run.prompts.train == [start] and run.prompts.held_out == [start] * 6
    assert "PPO has one prompt" in caplog.text and "40 of 40 prompts are empty" in caplog.text
    pairs = run.preferences("sft")
    assert {pair.prompt for pair in pairs.train} == {start} and 5 < len(pairs.held_out) < 30


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda run: run.prompts, r"neither data\.prompts nor data\.preferences is set, and PPO needs one of them"),
        (lambda run: run.preferences("sft"), r"data\.preferences is not set, and training on preferences needs it"),
        (lambda run: run.edits, r"data\.edits is not set, and the discriminator needs it"),
    ],
    ids=["prompts", "preferences", "edits"],
)
def test_data_that_is_not_named_is_said_with_who_needs_it(
    tmp_path: Path, read: Callable[[RunFolder], object], said: str
) -> None:
    cfg = arm_config(tmp_path, tmp_path / "model")
    run = opened(replace(cfg, data=replace(cfg.data, preferences=None)))
    assert not run.has_preferences and run.comparisons == []
    with pytest.raises(ConfigError, match=said):
        read(run)


def test_a_share_that_leaves_nothing_to_train_on_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    run = arm_run(tmp_path, tiny_folder, **{"data.shares": [1e-9, 0.5, 0.5]})
    with pytest.raises(ConfigError, match=r"leave sft nothing to train on in .*pairs\.jsonl"):
        run.preferences("sft")
    assert run.preferences("reward").train and run.prompts.train
    prompts = {pair.prompt for pair in (*run.preferences("reward").train, *run.preferences("reward").held_out)}
    assert not prompts & {*run.prompts.train, *run.prompts.held_out}


def test_edits_are_for_reward_learning_and_their_prompts_for_no_other_stage(tmp_path: Path, tiny_folder: Path) -> None:
    edits, pairs = tmp_path / "edits.jsonl", [*embedded.generate_pairs(40, seed=0)[1]][:12]
    lines = [json.dumps({"prompt": p.prompt, "rejected": p.rejected, "revised": p.revised}) for p in pairs]
    edits.write_text("\n".join(lines))
    run = arm_run(tmp_path, tiny_folder, **{"data.shares": [1.0, 1.0, 1.0], "data.edits": str(edits)})
    prompts = {edit.prompt for edit in (*run.edits.train, *run.edits.held_out)}
    assert prompts == {pair.prompt for pair in pairs}
    sft = run.preferences("sft")
    assert not prompts & {pair.prompt for pair in (*sft.train, *sft.held_out)}


def test_all_that_a_reviser_wrote_is_read_whatever_the_limit_on_preferences(tmp_path: Path) -> None:
    cfg = small_config(tmp_path, **{"data.limit": 5})
    run = opened(replace(cfg, reviser=replace(cfg.reviser, backend="openai")))
    record = {"rejected": " It was bad.", "revised": " It was good."}
    lines = [json.dumps({"prompt": f"How was number {index}?", **record}) for index in range(30)]
    mark_done(run.revisions_folder, config={}, metrics={}, seconds=0.0)
    (run.revisions_folder / "revisions.jsonl").write_text("\n".join(lines))
    assert len(run.edits.train) + len(run.edits.held_out) == 30


# ---- done once


def test_work_is_done_once_and_its_metrics_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, done = opened(small_config(tmp_path)), []

    def work() -> dict[str, float]:
        done.append(1)
        return {"loss": 0.5}

    for _ in range(2):
        with caplog.at_level(logging.INFO):
            run.once(tmp_path / "stage", {"seed": 1}, work)
    assert done == [1] and "stage is done; skipped" in caplog.text
    record = json.loads((tmp_path / "stage" / "done.json").read_text())
    assert record["metrics"] == {"loss": 0.5} and record["config"] == {"seed": 1} and record["seconds"] >= 0


def test_work_that_failed_is_not_done(tmp_path: Path) -> None:
    run = opened(small_config(tmp_path))
    with pytest.raises(ZeroDivisionError):
        run.once(tmp_path / "stage", {"seed": 1}, lambda: {"loss": 1 / 0})
    assert not (tmp_path / "stage" / "done.json").exists()
    run.once(tmp_path / "stage", {"seed": 1}, lambda: {"loss": 1.0})
    assert (tmp_path / "stage" / "done.json").exists()


def test_other_settings_are_refused_or_done_again(tmp_path: Path) -> None:
    run, folder = opened(small_config(tmp_path)), tmp_path / "stage"
    run.once(folder, {"a": 1, "b": 1, "c": 1, "d": 1}, dict)
    with pytest.raises(ConfigError, match=r"other settings \(a was 1, is 2; b was 1, is 2; c was 1, is 2\): restore"):
        run.once(folder, {"a": 2, "b": 2, "c": 2, "d": 2}, dict)
    there = []

    def work() -> dict[str, Any]:
        there.append((folder / "done.json").exists())  # a stage that breaks off here must not look done
        return {"again": True}

    run.once(folder, {"a": 2}, work, again=True)
    assert there == [False]
    assert json.loads((folder / "done.json").read_text())["metrics"] == {"again": True}
    run.once(folder, {"a": 2}, work, again=True)
    assert there == [False]


@pytest.mark.parametrize(("trained", "recorded"), [(5000.04, 5000.0), (-1.0, 0.0)])
def test_a_training_that_began_in_an_earlier_sitting_took_all_of_its_seconds(
    tmp_path: Path, trained: float, recorded: float
) -> None:
    """At least those of this one, which loads and saves too."""
    opened(small_config(tmp_path)).once(tmp_path / "stage", {}, lambda: Trained({"loss": 1.0}, trained))
    done = json.loads((tmp_path / "stage" / "done.json").read_text())
    assert done["metrics"] == {"loss": 1.0} and done["seconds"] == pytest.approx(recorded, abs=0.5)


def test_records_of_two_names_do_not_meet(tmp_path: Path) -> None:
    """train_ppo writes done.json where the trial's own record is not written before the evaluation."""
    run = opened(small_config(tmp_path))
    run.once(tmp_path, {"a": 1}, lambda: {"one": 1})
    for _ in range(2):
        run.once(tmp_path, {"a": 1}, lambda: {"two": 2}, record="arm.json")
    assert json.loads((tmp_path / "arm.json").read_text())["metrics"] == {"two": 2}
    (tmp_path / "done.json").unlink()
    run.once(tmp_path, {"a": 1}, lambda: pytest.fail("it is done"), record="arm.json")
    run.once(tmp_path, {"a": 1}, lambda: {"one": 1})
    assert json.loads((tmp_path / "done.json").read_text())["metrics"] == {"one": 1}
    assert json.loads((tmp_path / "arm.json").read_text())["metrics"] == {"two": 2}


def test_two_runs_do_not_work_in_one_folder(tmp_path: Path) -> None:
    cfg = small_config(tmp_path / "run")
    with sole_run(tmp_path / "run"):
        who = rf"process {os.getpid()} on \S+ since \d"
        with pytest.raises(ConfigError, match=rf"another run is at work in output_dir .*run' \({who}.*\); wait for it"):
            run(cfg)
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", ".lock-holder"}
    assert not holds_a_run(tmp_path / "run")
    with sole_run(tmp_path / "run"):  # the first has let go of it
        pass


def test_two_commands_do_not_do_the_same_stage_and_may_do_two(tmp_path: Path) -> None:
    opened = open_run(small_config(tmp_path / "run"), resume=False)

    def work() -> dict[str, int]:
        with pytest.raises(ConfigError, match=rf"at work in \S+/sft \(process {os.getpid()} "):
            opened.once(tmp_path / "run" / "sft", {}, lambda: pytest.fail("another one does it"))
        opened.once(tmp_path / "run" / "labels", {}, dict)
        return {}

    opened.once(tmp_path / "run" / "sft", {}, work)
    assert sorted(path.name for path in (tmp_path / "run" / "sft").iterdir()) == [".lock", "done.json"]


def test_what_a_kill_left_beside_the_record_of_a_stage_is_deleted(tmp_path: Path) -> None:
    opened = open_run(small_config(tmp_path / "run"), resume=False)
    opened.once(tmp_path / "sft", {}, dict)
    (tmp_path / "sft" / "checkpoints" / "step-000001").mkdir(parents=True)
    opened.once(tmp_path / "sft", {}, lambda: pytest.fail("it is done"))
    assert not (tmp_path / "sft" / "checkpoints").exists()


@pytest.mark.parametrize("record", ['{"checksums": null}', '{"checksums": [1]}', "[]", "null", "1" * 5000, "[" * 10**5])
def test_a_record_of_another_form_is_named(record: str, tmp_path: Path) -> None:
    opened = open_run(small_config(tmp_path / "run"), resume=False)
    folder = tmp_path / "run" / "sft"
    folder.mkdir()
    (folder / "done.json").write_text(record, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"sft/done.json cannot be read into this run .*: it is damaged"):
        _ = opened.policy_source


def test_a_model_that_was_damaged_after_its_stage_is_not_trained_from(tmp_path: Path) -> None:
    opened = open_run(small_config(tmp_path / "run"), resume=False)
    folder = tmp_path / "run" / "sft"

    def work() -> dict[str, int]:
        (folder / "model.safetensors").write_bytes(b"weights")
        return {}

    opened.once(folder, {}, work)
    (folder / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(CheckpointError, match=r"sft/model.safetensors is not as its stage wrote it: it is damaged"):
        _ = opened.policy_source
    (folder / "model.safetensors").write_bytes(b"weights")
    assert Path(opened.policy_source.path) == folder
