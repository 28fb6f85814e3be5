"""``tlcr run CONFIG --check``: the recipes for large models pass it, and mistakes that are planted in them do not."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedTokenizerFast

from tlcr.cli import check as check_module
from tlcr.cli.check import Small
from tlcr.cli.main import main
from tlcr.cli.rehearse import plan
from tlcr.config.loading import load_config
from tlcr.errors import TlcrError
from tlcr.experiment.rehearsal import in_small, processes_in_small
from tlcr.models.miniature import LAYERS, WIDTH, miniature

RECIPES = Path(__file__).parents[2] / "examples" / "hh_rlhf"
SHAPES = RECIPES / "llama-3.1-8b"


def command(recipe: str, gpus: int | None, *flags: str) -> list[str]:
    of_gpus = [] if gpus is None else ["--gpus", str(gpus)]
    path = str(RECIPES / f"llama_8b_{recipe}.yaml")
    return ["run", path, "--model.path", str(SHAPES), "--check", *of_gpus, *flags]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "gpus", "said"),
    [
        ("one_gpu", 1, ["3. adapters: 41.9M parameters each", "64 wide, on 1 CPU process:"]),
        ("one_node", 8, ["3. shards: 33 units among 8 processes, 0.125 of the", "on 2 CPU processes:"]),
        ("two_nodes", 16, ["3. shards: 33 units among 16 processes in 2 groups, 0.125", "on 4 CPU processes:"]),
    ],
)
def test_the_recipes_pass(recipe: str, gpus: int, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(recipe, gpus)) == 0
    text = capsys.readouterr().out
    for sentence in ("LlamaForCausalLM, 8.03B parameters in 32 layers", *said):
        assert sentence in text
    trained = ["sft", "discriminator", "ppo/continuous/seed-1235"]
    trained += [] if recipe == "one_gpu" else ["reward_model"]
    for stage in trained:
        assert f"\n   {stage}: " in text
    assert text.splitlines()[-1].startswith("The check passed in ")


@pytest.mark.parametrize(
    ("recipe", "gpus", "flags", "sentence"),
    [
        ("one_node", None, [], "add --gpus, such as --gpus 8"),
        ("one_node", 7, [], "ppo.minibatch_size 240, on 7 process(es); make the batch a multiple of the minibatch"),
        ("one_node", 1, [], "set sharding.kind: none"),
        ("two_nodes", 16, ["--sharding.replicas", "3"], "set sharding.replicas to the number of groups"),
        ("one_gpu", 0, [], "--gpus is 0; it must be at least 1"),
    ],
)
def test_a_planted_mistake_is_named_with_its_remedy(
    recipe: str, gpus: int | None, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(recipe, gpus, *flags)) == 2
    said = capsys.readouterr()
    assert said.err.startswith("tlcr: error: ") and said.err.count("\n") == 1
    assert sentence in said.err
    assert "The check passed" not in said.out


@pytest.mark.parametrize(
    ("gpus", "flags", "sentence"),
    [
        (1, ["--data.held_out", "0"], "data.held_out is 0"),
        (2, ["--parallel", "2", "--seeds", "[0, 1]"], "set parallel: 1 to share each policy among the processes"),
        (2, ["--reward.refresh.every", "10"], "reward.refresh trains the discriminator in one process"),
        (None, ["--sft.enabled", "false"], "a model of random weights that only SFT trains; set sft.enabled: true"),
    ],
)
def test_what_a_run_refuses_at_once_a_check_refuses(
    gpus: int | None, flags: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the user's own config: the small run has data held out, one policy, no refresh, and a model that is saved."""
    of_gpus = [] if gpus is None else ["--gpus", str(gpus)]
    assert main(["run", "--output_dir", str(tmp_path / "run"), "--check", *of_gpus, *flags]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("tlcr: error: ") and sentence in said.err


def test_a_check_warns_of_what_a_run_warns_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "_plan", lambda *_: Small(1, 1, WIDTH))
    monkeypatch.setattr(check_module, "_rehearse", lambda folder, *_: folder.rmdir() or iter(()))
    cfg = load_config(None, {"output_dir": str(tmp_path), "ppo.value_warmup_updates": 5, "ppo.updates": 5})
    lines: list[str] = []
    check_module.check(cfg, gpus=None, say=lines.append)
    assert lines[1].startswith("   warning: ppo.value_warmup_updates")


MISTAKES = [
    ({"lora.targets": ["q_prj"]}, "lora.targets"),
    ({"discriminator.bidirectional_layers": 40}, "discriminator.bidirectional_layers"),
    ({"rollout.max_new_tokens": 131072}, "rollout.max_new_tokens"),
    ({"model.path": "there/is/none"}, "give a folder that transformers can load"),
]


@pytest.mark.parametrize(("changes", "sentence"), MISTAKES)
def test_a_mistake_that_the_architecture_shows_is_named(
    changes: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    cfg = load_config(RECIPES / "llama_8b_one_gpu.yaml", {"model.path": str(SHAPES), **changes})
    with pytest.raises(TlcrError, match=re.escape(sentence)):
        plan(cfg, ["sft", "discriminator", "ppo"], 1, tmp_path, lambda line: None)


@pytest.mark.slow
def test_a_mistake_that_the_architecture_shows_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("one_gpu", 1, "--lora.targets", "[q_prj]")) == 2
    said = capsys.readouterr()
    assert said.err.startswith("tlcr: error: ") and said.err.count("\n") == 1 and "lora.targets" in said.err
    assert "The check passed" not in said.out


def test_adapters_in_shards_are_counted_and_cut(tmp_path: Path) -> None:
    changes = {"model.path": str(SHAPES), "lora.rank": 16, "ppo.value_init": "policy"}
    cfg = load_config(RECIPES / "llama_8b_one_node.yaml", changes)
    lines: list[str] = []
    assert plan(cfg, ["sft", "discriminator", "ppo"], 8, tmp_path, lines.append) == (2, 2, WIDTH)
    said = "\n".join(lines)
    assert "3. adapters: 41.9M parameters each" in said
    assert "3. shards: 33 units among 8 processes, 0.125 of the model in each" in said


def test_what_takes_long_to_import_is_imported_by_the_server_alone() -> None:
    code = "import sys; import tlcr.cli.check; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_mistake_that_only_a_step_shows_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Both processes meet it, and one of them says it."""
    reward = ["--reward.kind", "callable", "--reward.callable", "tests.ppo.helpers:no_such_function"]
    flags = [*reward, "--ppo.value_init", "policy", "--sft.enabled", "false"]
    assert main(command("one_node", 8, *flags)) == 2
    said = capsys.readouterr().err
    assert said.startswith("tlcr: error: the check failed, with a model of width 64: ")
    assert said.count("\n") == 1 and "no_such_function" in said
    logs = Path(said.strip().removesuffix(")").rpartition("(its log: ")[2])
    assert (logs / "process-0.txt").is_file()
    shutil.rmtree(logs.parent)


def test_gpus_are_those_of_a_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--gpus", "2"]) == 2
    assert "add --check, or drop it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"num_attention_heads": 32, "num_key_value_heads": 8}),
        ("qwen3", {"num_attention_heads": 32, "num_key_value_heads": 8}),
        ("gemma3_text", {"num_hidden_layers": 12}),
        ("mixtral", {"num_hidden_layers": 3}),
        ("gpt2", {}),
        ("opt", {}),
    ],
)
def test_a_miniature_has_the_architecture(
    kind: str, changes: dict[str, int], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    large = AutoConfig.for_model(kind, **changes)
    small = miniature(large, tiny_tokenizer, seed=0)
    assert small.config.model_type == large.model_type
    assert (small.config.hidden_size, small.config.num_hidden_layers) == (WIDTH, LAYERS)
    if kind in ("llama", "qwen3"):
        assert small.config.num_attention_heads == 4 * small.config.num_key_value_heads
    if kind == "gemma3_text":
        assert set(small.config.layer_types) == set(large.layer_types)
    assert small(input_ids=torch.ones(1, 5, dtype=torch.long)).logits.shape == (1, 5, len(tiny_tokenizer))
    assert sum(parameter.numel() for parameter in small.parameters()) < 10**6


@pytest.mark.parametrize(
    "changes",
    [
        {"ppo.keep_best": True, "ppo.evaluate_every": 10},
        {"reward.overlong_buffer": 50, "reward.overlong_penalty": 1.0},
        {"arms": [{"name": "one", "reward": {"overlong_buffer": 50, "overlong_penalty": 1.0}}]},
        {"reward.refresh.every": 5},
    ],
)
def test_what_holds_for_long_answers_and_many_updates_is_cut_to_size(
    changes: dict[str, object], tmp_path: Path
) -> None:
    cfg = load_config(None, {"rollout.max_new_tokens": 64, **changes})
    small = in_small(cfg, AutoConfig.from_pretrained(SHAPES), tmp_path, processes=1)
    rewards = [small.reward, *(arm.reward for arm in small.arms)]
    assert {reward.overlong_buffer for reward in rewards} <= {None, small.rollout.max_new_tokens}
    assert not any(reward.refresh.every for reward in rewards)
    assert small.ppo.keep_best == cfg.ppo.keep_best


def test_what_decides_the_code_stays(tmp_path: Path) -> None:
    cfg = load_config(RECIPES / "llama_8b_two_nodes.yaml", {"model.path": str(SHAPES), "ppo.packing": "always"})
    assert processes_in_small(cfg, 16) == (4, 2)
    small = in_small(cfg, AutoConfig.from_pretrained(SHAPES), tmp_path, processes=4)
    for path in (
        "model.dtype",
        "model.gradient_checkpointing",
        "sharding.kind",
        "ppo.packing",
        "ppo.value_init",
        "reward.centre",
        "kl.coef",
        "discriminator.targets",
        "labels.end_of_sequence",
    ):
        section, name = path.split(".")
        assert getattr(getattr(small, section), name) == getattr(getattr(cfg, section), name), path
    assert small.ppo.size_problem(4) is None
    assert small.ppo.updates == small.ppo.epochs == small.sft.epochs == 1
    assert None not in (small.ppo.micro_batch_size, small.ppo.chunk_tokens, small.sft.micro_batch_size)
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
