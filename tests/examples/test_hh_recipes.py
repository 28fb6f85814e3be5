"""The recipes for models of 8B parameters: their numbers, the doctor's tables beside them, and the SLURM script."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from examples.hh_rlhf import memory
from tests.project.test_docs import check_command
from tlcr.cli.doctor import GPU_MEMORY, USABLE_SHARE
from tlcr.config.loading import knobs, load_config
from tlcr.config.schema import RunConfig
from tlcr.experiment.architecture import Machine
from tlcr.experiment.memory import roles_of_a_process
from tlcr.training.disk import in_words

RECIPES = Path(memory.__file__).parent
FILES = {name: f"memory_{name}.txt" for name in memory.GPUS}


def text(name: str) -> str:
    return (RECIPES / name).read_text(encoding="utf-8")


def values(cfg: RunConfig) -> dict[str, Any]:
    found = {}
    for knob in knobs(RunConfig):
        value: Any = cfg
        for part in knob.path.split("."):
            value = getattr(value, part)
        found[knob.path] = value
    return found


FIRST_CHANGES = {"reward.centre", "labels.end_of_sequence", "rollout.top_p", "discriminator.calibrate"}
"""What README.md says we would change of the paper's settings."""
OF_A_MACHINE = {"output_dir", "model.path", "model.pad_token", "arms"}
BY_ADAPTERS = {"ppo.value_init", "lora.rank", "lora.roles"} | {
    f"{section}.{knob}"
    for section in ("sft", "discriminator", "ppo")
    for knob in ("learning_rate", "value_learning_rate", "weight_decay")
}


@pytest.mark.parametrize("name", memory.GPUS)
def test_the_method_is_that_of_the_paper(name: str) -> None:
    """What is not named here has the value of config.yaml, sizes of pieces and defaults aside."""
    paper, recipe = (values(load_config(RECIPES / file)) for file in ("config.yaml", f"llama_8b_{name}.yaml"))
    other = {path for path in paper if paper[path] != recipe[path]} - FIRST_CHANGES - OF_A_MACHINE
    other -= BY_ADAPTERS if name == "one_gpu" else {"sharding.kind", "sharding.replicas"}
    unset = {path for path in other if recipe[path] == values(RunConfig())[path]}
    assert {path for path in other - unset if not path.endswith("batch_size")} == set()
    # A stage or reward that the recipe does not have, and what the paper's value is a default of.
    assert {path.partition(".")[0] for path in unset} <= {"dpo", "reward", "ppo", "reward_model"}, unset


@pytest.mark.slow
@pytest.mark.parametrize("name", memory.GPUS)
def test_the_tables_are_those_of_today(name: str) -> None:
    """Made anew by ``python -m examples.hh_rlhf.memory``: those of two layers wholly, which takes seconds."""
    assert text(FILES[name]).endswith(memory.recipe(name, memory.LAYERS))


@pytest.mark.parametrize("name", memory.GPUS)
def test_what_the_models_take_is_counted(name: str, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(memory.SHAPES)
    cfg, architecture = memory.load(RECIPES / f"llama_8b_{name}.yaml", config, tmp_path, None)
    machine = Machine(gpu=True, processes=memory.GPUS[name])
    table, _, of_two_layers = text(FILES[name]).partition("The same with 2 layers")
    assert of_two_layers
    ppo = table.partition("\n ppo ")[2]
    for role in roles_of_a_process(cfg, architecture, machine):
        parts = [in_words(part) for part in (role.weights, role.gradients, role.optimizer, role.total) if part]
        assert re.search(rf"^ +{role.name} +{role.parameters:,} +{' +'.join(parts)}$", ppo, re.MULTILINE), role
    for total in re.findall(r"^ (?:sft|reward model|discriminator|ppo) +([\d.]+) GiB$", table, re.MULTILINE):
        assert float(total) * 2**30 < USABLE_SHARE * GPU_MEMORY


@pytest.mark.slow
def test_the_table_of_whole_models_is_that_of_today() -> None:
    large, small = text("memory_models.txt").split("\n\n")
    assert large in text("README.md")
    *_, row = memory.models(memory.LAYERS, ["TinyLlama-1.1B"]).splitlines()
    assert row in small.splitlines()
    assert len(large.splitlines()) == len(small.splitlines()) == 2 + len(memory.MODELS)


def test_the_slurm_script_starts_what_is_there() -> None:
    script = RECIPES / "two_nodes.slurm"
    subprocess.run(["bash", "-n", str(script)], check=True)
    written = script.read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = (line for line in written.splitlines() if line.startswith("srun "))
    words = shlex.split(line)[1:]
    check_command(words)
    assert words[-3:] == ["run", "examples/hh_rlhf/llama_8b_two_nodes.yaml", "--resume"]
    assert "#SBATCH --nodes=2\n" in written and "--nproc_per_node 8" in line
