"""The recipe for HH-RLHF: its numbers are the paper's, and it runs end to end, small, on real transcripts."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.project.test_docs import check_command, commands, unknown_knobs
from tlcr.config.loading import load_config
from tlcr.config.schema import RunConfig
from tlcr.data.formats import hh_preference
from tlcr.data.records import prompt_key
from tlcr.experiment.pipeline import run, stage
from tlcr.models.saving import save_model
from tlcr.text.tokenization import render_answer, render_prompt
from tlcr.training.metrics import read_metrics

RECIPE = Path(__file__).parents[2] / "examples" / "hh_rlhf"
REAL = Path(__file__).parents[3] / "shared" / "data"

# The authors' scripts for Llama-2-7B, batch sizes times 8 devices.
PUBLISHED: dict[str, Any] = {
    "seed": 1234,
    "seeds": (1235,),
    "data.shares": (2, 4, 4),
    "data.max_prompt_tokens": 256,
    "data.max_answer_tokens": 256,
    "labels.end_of_sequence": "ignore",
    "sft.epochs": 2,
    "sft.batch_size": 16 * 8,
    "sft.learning_rate": 1e-5,
    "sft.weight_decay": 0.0,
    "sft.schedule": "cosine",
    **{
        f"{stage}.{name}": value
        for stage in ("reward_model", "discriminator")
        for name, value in {
            "epochs": 2,
            "batch_size": 32 * 8,
            "learning_rate": 1e-5,
            "weight_decay": 0.1,
            "schedule": "cosine",
        }.items()
    },
    "discriminator.targets": "soft",
    "discriminator.calibrate": False,
    "discriminator.bidirectional_layers": 0,
    "reward.kind": "continuous",
    "reward.scale": 1.0,
    "reward.clip": 5.0,
    "reward.terminal_clip": 5.0,
    "reward.centre": False,
    "kl.coef": 0.1,
    "kl.placement": "reward",
    "rollout.max_new_tokens": 256,
    "rollout.temperature": 1.0,
    "rollout.top_p": 0.9,
    "ppo.batch_size": 30 * 8,
    "ppo.minibatch_size": 30 * 8,
    "ppo.epochs": 1,
    "ppo.learning_rate": 1e-6,
    "ppo.value_learning_rate": 1e-6,
    "ppo.weight_decay": 0.1,
    "ppo.gamma": 1.0,
    "ppo.lam": 0.95,
    "ppo.whiten": False,
    "ppo.clip": 0.2,
    "ppo.value_clip": 0.2,
    "ppo.entropy_coef": 0.0,
    "ppo.value_model": "separate",
    "ppo.value_init": "reward_model",
}


def knob_of(cfg: RunConfig, path: str) -> Any:
    value: Any = cfg
    for name in path.split("."):
        value = getattr(value, name)
    return value


def test_the_numbers_are_the_published_ones() -> None:
    cfg = load_config(RECIPE / "config.yaml")
    assert {path: knob_of(cfg, path) for path in PUBLISHED} == PUBLISHED
    pass_over_prompts = 112_052 * 0.4 * (1 - cfg.data.held_out) / cfg.ppo.batch_size
    assert cfg.ppo.updates == round(pass_over_prompts)
    official = next(arm.reward for arm in cfg.arms if arm.name == "released-code")
    assert official.compat == "tlcr-official"


def test_every_value_names_its_source() -> None:
    lines = (RECIPE / "config.yaml").read_text(encoding="utf-8").partition("arms:")[0].splitlines()
    values = [line for line in lines if re.match(r"\s*\w+: *[^\s#]", line)]
    assert len(values) > 60
    unsourced = [line for line in values if not re.search(r"# \[(code|paper|ours)\] ?", line)]
    assert unsourced == ["output_dir: runs/hh_rlhf", "  split: train"]


def test_the_template_writes_conversations_as_transcripts(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", load_config(RECIPE / "config.yaml").model.chat_template)
    turns = ("user", "How do I bake bread?"), ("assistant", "Mix flour."), ("user", "And then?")
    messages = [{"role": role, "content": text} for role, text in turns]
    transcript = "\n\nHuman: How do I bake bread?\n\nAssistant: Mix flour.\n\nHuman: And then?\n\nAssistant: Wait."
    pair = hh_preference("1", {"chosen": transcript, "rejected": transcript + " Or not."})
    assert render_prompt(tiny_tokenizer, messages) == f"<bos>{pair.prompt}"
    assert render_answer(tiny_tokenizer, messages, "Wait.") == pair.chosen


# ---- a small run of everything


def small(folder: Path, model: Path) -> dict[str, Any]:
    """Overrides of the recipe: what one would type to try it small."""
    return {
        "output_dir": str(folder / "run"),
        "model.path": str(model),
        "model.dtype": "float32",
        "model.pad_token": None,
        "model.gradient_checkpointing": False,
        "data.preferences": str(folder / "hh.jsonl"),
        "data.held_out": 0.1,
        "data.max_prompt_tokens": 64,
        "data.max_answer_tokens": 48,
        "reviser.backend": "files",
        "reviser.files": str(REAL / "hh_revised_150.jsonl"),
        **{f"{name}.batch_size": 16 for name in ("sft", "reward_model", "discriminator", "dpo")},
        **{f"{name}.epochs": 1 for name in ("sft", "reward_model", "discriminator", "dpo")},
        "rollout.max_new_tokens": 16,
        "ppo.updates": 1,
        "ppo.batch_size": 8,
        "ppo.minibatch_size": 8,
        "ppo.learning_rate": 1e-3,
        "evaluation.prompts": 4,
        "evaluation.samples": 1,
    }


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, tiny_causal_lm: Any
) -> RunConfig:
    if not REAL.is_dir():
        pytest.skip(f"needs the real transcripts, which lie at {REAL} where they are")
    folder = tmp_path_factory.mktemp("hh")
    model: PreTrainedModel = tiny_causal_lm()
    save_model(model, tiny_tokenizer, folder / "model")
    # the transcripts that have a revision, and as many others
    with (REAL / "hh_revised_150.jsonl").open(encoding="utf-8") as file:
        revised = {json.loads(line)["row"] for line in file}
    with gzip.open(REAL / "hh_harmless_1600.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [line for row, line in enumerate(file) if row in revised or row < 150]
    (folder / "hh.jsonl").write_text("".join(lines), encoding="utf-8")
    cfg = load_config(RECIPE / "config.yaml", small(folder, folder / "model"))
    run(cfg)
    stage(cfg, "dpo", resume=True)
    return cfg


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_every_arm_trains_and_is_compared(finished: RunConfig) -> None:
    folder = Path(finished.output_dir)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in results["arms"]] == [arm.name for arm in finished.arms]
    for arm in finished.arms:
        last = read_metrics(folder / "ppo" / arm.name / "seed-1235" / "metrics.jsonl")[-1]
        assert last["step"] == 1 and last["policy/grad_norm"] > 0
        assert (last["reward/share_terminal"] > 0) == (arm.name == "sequence")
        # after four steps the discriminator says 0.5 of everything, for which 'discrete' pays nothing
        assert (last["reward/share_dense"] > 0) == (arm.name not in ("sequence", "discrete"))
        assert last["eval/kl_per_token"] != 0
    for model in ("sft", "reward_model", "discriminator", "dpo"):
        assert (folder / model / "model.safetensors").is_file()


def test_the_shares_of_real_transcripts_do_not_meet(finished: RunConfig) -> None:
    folder = Path(finished.output_dir)
    counted = json.loads((folder / "shares" / "statistics.json").read_text(encoding="utf-8"))
    parts = [next(iter(sources.values()))["prompts"] for sources in counted["stages"].values()]
    assert sum(parts) == counted["prompts"] and min(parts) > 0.15 * counted["prompts"]
    revised = {prompt_key(pair["prompt"]) for pair in json_lines(folder / "revisions" / "revisions.jsonl")}
    asked = {
        prompt_key(answer["prompt"])
        for arm in finished.arms
        for answer in json_lines(folder / "ppo" / arm.name / "seed-1235" / "samples.jsonl")
    }
    assert revised and asked and not revised & asked


def test_transcripts_are_cut_where_the_paper_cuts_them(finished: RunConfig) -> None:
    """The prompt is everything through the last "Assistant:" and keeps its end; the answer begins with its space."""
    for pair in json_lines(Path(finished.output_dir) / "labels" / "labels.jsonl"):
        assert pair["prompt"].endswith("\n\nAssistant:")
        for side in ("rejected", "revised"):
            text = "".join(pair[side]["tokens"])
            assert text.startswith(" ") and len(pair[side]["ids"]) <= 48
            # the end of sequence is never labelled, as in the authors' data
            assert (
                pair[side]["counted"]
                == [True] * (len(pair[side]["ids"]) - pair[side]["complete"]) + [False] * pair[side]["complete"]
            )


@pytest.mark.slow
def test_the_commands_and_knobs_of_the_recipe_exist() -> None:
    text = (RECIPE / "README.md").read_text(encoding="utf-8")
    found = [words for words in commands(text) if words[0] not in ("cp", "git")]
    for words in found:
        check_command(words[: words.index(">")] if ">" in words else words)
    assert {words[1] for words in found if words[0] == "tlcr"} >= {"doctor", "revise", "label", "run"}
    assert unknown_knobs(text) == set()
