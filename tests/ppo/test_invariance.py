"""The same answers give the same update however they are cut, padded, ordered or shared between processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.ppo.helpers import (
    GradientRecorder,
    double_actor_critic,
    double_roles,
    known_rollout,
    known_update,
    small_config,
)
from tlcr.config.schema import KLConfig, PPOConfig
from tlcr.ppo.advantages import compute_advantages
from tlcr.ppo.rollout import seeded_generator
from tlcr.ppo.update import UpdateStatistics, ppo_update
from tlcr.training.metrics import read_metrics
from tlcr.types import Rewards

LM = Callable[..., PreTrainedModel]
ROOT = Path(__file__).parents[2]


def update(
    make_lm: LM,
    *,
    rows: list[int] | None = None,
    extra_left: int = 0,
    extra_right: int = 0,
    chunk_tokens: int | None = None,
    double: bool = True,
    packed: bool = False,
    **ppo: Any,
) -> tuple[UpdateStatistics, list[Tensor]]:
    """The statistics and the gradients of one update over the known rollout."""
    rollout = known_rollout(rows, extra_left=extra_left, extra_right=extra_right)
    scores, advantages = known_update(rollout, rows)
    actor_critic = double_actor_critic(make_lm, chunk_tokens=chunk_tokens)
    if not double:
        actor_critic = actor_critic.float()
    recorder = GradientRecorder(actor_critic)
    statistics = ppo_update(
        actor_critic,
        recorder,
        rollout,
        scores,
        advantages,
        PPOConfig(**({"minibatch_size": 8, "max_grad_norm": 1e9, "entropy_coef": 0.1} | ppo)),
        KLConfig(placement="loss", estimator="k3"),
        kl_coef=0.3,
        temperature=0.7,
        reference=actor_critic.policy,
        accelerator=Accelerator(),
        generator=seeded_generator("test", 0),
        packed=packed,
    )
    (gradients,) = recorder.steps
    return statistics, [g for g in gradients if g is not None]


def assert_same(one: tuple[UpdateStatistics, list[Tensor]], other: tuple[UpdateStatistics, list[Tensor]]) -> None:
    figures = [torch.tensor(list(vars(statistics).values()), dtype=torch.float64) for statistics, _ in (one, other)]
    torch.testing.assert_close(figures[1], figures[0], rtol=1e-9, atol=1e-12)
    for expected, found in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


WAYS: dict[str, dict[str, Any]] = {
    "1 x 8": {"micro_batch_size": 1},
    "3 + 3 + 2": {"micro_batch_size": 3},
    "wider": {"extra_left": 4, "extra_right": 3},
    "permuted": {"rows": [6, 3, 0, 7, 1, 5, 2, 4]},
    "permuted, wider, 2 x 4": {"rows": [1, 0, 3, 2, 5, 4, 7, 6], "extra_left": 1, "micro_batch_size": 2},
    "at most 16 tokens": {"micro_batch_tokens": 16},
    "a row at a time, by tokens": {"micro_batch_tokens": 1},
    "packed": {"packed": True},
    "packed, 3 + 3 + 2": {"packed": True, "micro_batch_size": 3},
    "packed, at most 16 tokens, permuted, wider": {
        "packed": True,
        "micro_batch_tokens": 16,
        "rows": [6, 3, 0, 7, 1, 5, 2, 4],
        "extra_left": 4,
        "extra_right": 3,
    },
    "packed, logits in chunks": {"packed": True, "chunk_tokens": 5, "micro_batch_tokens": 30},
    "logits in chunks": {"chunk_tokens": 5, "micro_batch_size": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_how_a_batch_is_cut_padded_and_ordered_changes_nothing(tiny_gpt2: LM, way: str, aggregate: str) -> None:
    assert_same(update(tiny_gpt2, aggregate=aggregate), update(tiny_gpt2, aggregate=aggregate, **WAYS[way]))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_in_float32_only_rounding_differs(tiny_causal_lm: LM, packed: bool) -> None:
    at_once = update(tiny_causal_lm, double=False)
    in_pieces = update(tiny_causal_lm, double=False, micro_batch_size=1 + packed, extra_left=3, packed=packed)
    assert in_pieces[0].loss == pytest.approx(at_once[0].loss, rel=1e-5)
    for expected, found in zip(at_once[1], in_pieces[1], strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-9


def test_the_comparison_can_fail(tiny_gpt2: LM) -> None:
    seven = {"rows": [0, 1, 2, 3, 4, 5, 6]}
    with pytest.raises(AssertionError):
        assert_same(update(tiny_gpt2), update(tiny_gpt2, **seven))
    with pytest.raises(AssertionError):
        assert_same(update(tiny_gpt2, aggregate="token"), update(tiny_gpt2, aggregate="sequence"))


# ---- two gloo processes, started once


@pytest.fixture(scope="module")
def two_processes(
    tiny_gpt2: LM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder in which tests/two_processes.py, launched by accelerate, left its results."""
    folder = tmp_path_factory.mktemp("two")
    for seed in (1, 2):
        tiny_gpt2(seed=seed).save_pretrained(folder / f"lm-{seed}")
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Without MPI `accelerate launch --cpu` starts one process of the several it is told of, so each is started here.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launcher, *options, "--main_process_port", str(port), "--module", "tests.ppo.two_processes"]
    common = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TLCR_PROGRESS": "0"}
    workers = [
        subprocess.Popen(
            [*command, str(folder), str(folder)],
            cwd=ROOT,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(text[-3000:] for text in said)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_two_processes_take_the_step_of_one(two_processes: Path, aggregate: str) -> None:
    def saved(seed: int) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(two_processes / f"lm-{seed}")

    statistics, gradients = update(saved, aggregate=aggregate)
    for rank in (0, 1):
        tensors = load_file(two_processes / f"update-{aggregate}-{rank}.safetensors")
        figures = torch.tensor(list(vars(statistics).values()), dtype=torch.float64)
        torch.testing.assert_close(tensors.pop("statistics"), figures, rtol=1e-9, atol=1e-12)
        # 12 tokens at a time: the long rows of one process need four passes, and the short ones of the other two.
        assert tensors.pop("passes").tolist() == [1, 1, 1, 1]
        assert len(tensors) == len(gradients)
        for index, expected in enumerate(gradients):
            torch.testing.assert_close(tensors[str(index)], expected, rtol=1e-8, atol=1e-11)


@pytest.mark.slow
def test_two_processes_take_the_step_of_one_with_roles(two_processes: Path) -> None:
    actor_critic, reference = double_roles(
        lambda seed: AutoModelForCausalLM.from_pretrained(two_processes / f"lm-{seed}")
    )
    rollout, recorder = known_rollout(), GradientRecorder(actor_critic)
    scores, advantages = known_update(rollout)
    ppo_update(
        actor_critic,
        recorder,
        rollout,
        scores,
        advantages,
        PPOConfig(minibatch_size=8, max_grad_norm=1e9),
        KLConfig(placement="loss", estimator="full"),
        kl_coef=0.3,
        temperature=0.7,
        reference=reference,
        accelerator=Accelerator(),
        generator=seeded_generator("test", 0),
    )
    (gradients,) = recorder.steps
    wanted = {str(index): gradient for index, gradient in enumerate(gradients) if gradient is not None}
    assert len(wanted) == len(actor_critic.policy_parameters()) + len(actor_critic.value_parameters())
    for rank in (0, 1):
        found = load_file(two_processes / f"update-roles-{rank}.safetensors")
        assert found.keys() == wanted.keys()
        for index, expected in wanted.items():
            torch.testing.assert_close(found[index], expected, rtol=1e-8, atol=1e-11)


@pytest.mark.slow
def test_two_processes_share_every_minibatch(two_processes: Path) -> None:
    """Minibatches of 4 answers are 2 of each process: two steps, whose gradients are those of all 8 on average."""

    def saved(seed: int) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(two_processes / f"lm-{seed}")

    _, whole = update(saved, aggregate="sequence")
    for rank in (0, 1):
        tensors = load_file(two_processes / f"minibatches-{rank}.safetensors")
        assert {name.split(".")[0] for name in tensors} == {"0", "1"} and len(tensors) == 2 * len(whole)
        for index, expected in enumerate(whole):
            mean = (tensors[f"0.{index}"] + tensors[f"1.{index}"]) / 2
            torch.testing.assert_close(mean, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.slow
def test_two_processes_whiten_as_one(two_processes: Path) -> None:
    rollout = known_rollout()
    scores, advantages = known_update(rollout)
    together = compute_advantages(
        Rewards(advantages.advantages_BT), scores, rollout.mask_BT, gamma=0.9, lam=0.5, whiten=True
    )
    for rank in (0, 1):
        share = load_file(two_processes / f"advantages-{rank}.safetensors")
        mask_BT = known_rollout(list(range(8))[rank::2]).mask_BT
        for name, expected_BT in (("advantages", together.advantages_BT), ("returns", together.returns_BT)):
            expected_BT = expected_BT[rank::2, : mask_BT.shape[1]]
            torch.testing.assert_close(share[name][mask_BT], expected_BT[mask_BT])


@pytest.mark.slow
def test_a_run_on_two_processes_ends_with_one_policy(two_processes: Path, tiny_gpt2: LM) -> None:
    first, second = (load_file(two_processes / f"ppo-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    start = dict(tiny_gpt2(seed=1).named_parameters())
    assert any(not torch.equal(first[f"policy.{name}"], p) for name, p in start.items())
    rows = read_metrics(two_processes / "ppo" / "metrics.jsonl")
    cfg = small_config()
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["policy/grad_norm"] == 0 and rows[1]["policy/grad_norm"] > 0
    assert all(row["length/tokens"] > cfg.ppo.batch_size * cfg.rollout.max_new_tokens / 2 for row in rows)
    assert AutoModelForCausalLM.from_pretrained(two_processes / "ppo" / "policy") is not None
