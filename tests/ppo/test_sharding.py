"""PPO with sharded models on several processes, which are started once: tests/ppo/sharded.py makes the checks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.launched import Outcomes, launch
from tests.ppo import sharded, sharded_hybrid, sharded_killed, sharded_lora, sharded_server
from tests.ppo.helpers import run_ppo
from tlcr.config.schema import ShardingConfig


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Outcomes:
    folder = tmp_path_factory.mktemp("sharded")
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    return launch("tests.ppo.sharded", folder, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", sharded.checks.names)
def test_two_processes(two_processes: Outcomes, name: str) -> None:
    two_processes.assert_passed(name)


@pytest.fixture(scope="module")
def two_with_roles(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Outcomes:
    folder = tmp_path_factory.mktemp("roles")
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    return launch("tests.ppo.sharded_lora", folder, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", sharded_lora.checks.names)
def test_two_processes_with_roles_over_one_backbone(two_with_roles: Outcomes, name: str) -> None:
    two_with_roles.assert_passed(name)


@pytest.mark.slow
def test_a_server_answers_for_two_processes(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (name,) = sharded_server.checks.names
    launch("tests.ppo.sharded_server", tmp_path, processes=2).assert_passed(name)


@pytest.mark.slow
def test_a_run_that_lost_a_process_ends_goes_on_and_is_loaded_by_one_process(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (name,) = sharded_killed.checks.names
    killed = launch("tests.ppo.sharded_killed", tmp_path, processes=2)
    with pytest.raises(AssertionError, match="process 0: "):  # it ends with an error, and does not wait
        killed.assert_passed(name)
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()] == ["step-000002"]
    launch("tests.ppo.sharded_killed", tmp_path, processes=2).assert_passed(name)

    cfg = replace(sharded.run_config(), sharding=ShardingConfig())
    loaded, result = run_ppo(
        cfg, lambda seed: sharded.run_lm(seed + 8), tiny_tokenizer, tmp_path / "killed", resume=True
    )
    assert result.updates == 5
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "straight" / "policy").state_dict()
    found = loaded.policy.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return launch("tests.ppo.sharded_hybrid", tmp_path_factory.mktemp("hybrid"), processes=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", sharded_hybrid.checks.names)
def test_four_processes_are_two_replicas_of_two_shards(four_processes: Outcomes, name: str) -> None:
    four_processes.assert_passed(name)
