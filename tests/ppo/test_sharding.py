"""PPO with sharded models on several processes, which are started once: tests/ppo/sharded.py makes the checks."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from tests.launched import Outcomes, launch
from tests.ppo import sharded, sharded_hybrid


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
def four_processes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return launch("tests.ppo.sharded_hybrid", tmp_path_factory.mktemp("hybrid"), processes=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", sharded_hybrid.checks.names)
def test_four_processes_are_two_replicas_of_two_shards(four_processes: Outcomes, name: str) -> None:
    four_processes.assert_passed(name)
