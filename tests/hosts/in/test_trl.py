"""The real TRL: the tensor that reaches its loss is the golden one, every loss takes steps, and a toy task is learned.

It runs in an environment of TRL's own: `make hosts HOST=trl`.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL has an environment of its own: make hosts HOST=trl")

import torch
from datasets import Dataset
from golden import GoldenScorer, load
from transformers import LlamaForTokenClassification
from trl import GRPOTrainer, RLOOConfig, RLOOTrainer
from trl_models import (
    EOS,
    GoldenTrainer,
    config,
    golden_trainer,
    misplaced,
    policy,
    prompts,
    text,
    tokenizer,
)

from tlcr.errors import HostError, HostWarning
from tlcr.hosts import trl as adaptor
from tlcr.hosts.contract import Item
from tlcr.hosts.trl import TokenReward, TokenRewardMixin

ROOT = Path(__file__).parents[3]
GOLDEN = load()["hosts"]["trl"]
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]


class Trainer(TokenRewardMixin, GRPOTrainer):
    """What a user writes."""


class Even:
    """A Scorer that pays 1 for an even id and -1 for an odd one, and keeps what it was asked."""

    def __init__(self) -> None:
        self.items: list[Item] = []

    def token_rewards(self, items: Sequence[Item]) -> list[list[float]]:
        self.items.extend(items)
        return [[1.0 if token % 2 == 0 else -1.0 for token in item.response_ids] for item in items]


class Silent(Even):
    def token_rewards(self, items: Sequence[Item]) -> list[list[float]]:
        return [row[:-1] for row in super().token_rewards(items)]


def trainer(folder: Path, reward: Any, kind: type = Trainer, **changes: Any) -> Any:
    rewards = reward if isinstance(reward, list) else [reward]
    options = {name: changes.pop(name) for name in ("normalise", "gamma", "rollout_func") if name in changes}
    dataset = changes.pop("train_dataset", None) or prompts(*[[5 + i, 6, 7][: 1 + i % 3] for i in range(8)])
    return kind(
        model=saved_policy(folder),
        processing_class=tokenizer(),
        reward_funcs=rewards,
        args=config(folder, **changes),
        train_dataset=dataset,
        **options,
    )


def saved_policy(folder: Path) -> str:
    """The policy by its folder, from which TRL also loads the reference of a KL."""
    policy().save_pretrained(folder / "policy")
    return str(folder / "policy")


def logged(run: Any, name: str) -> list[float]:
    return [row[name] for row in run.state.log_history if name in row]


# ---- the golden tensor


@pytest.mark.parametrize("rows", [6, 3, 2, 1])
def test_the_golden_advantages_reach_the_loss(tmp_path: Path, rows: int) -> None:
    """Also where TRL shuffles the answers and splits them into the parts of a step."""
    run = golden_trainer(
        tmp_path,
        TokenReward(GoldenScorer(), tokenizer()),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=6 // rows,
    )
    run.train()
    assert len(run.given) == 6 // rows and all(batch["advantages"].dim() == 2 for batch in run.given)
    assert misplaced(run.given, GOLDEN["advantages_BT"]) == []


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shift_by_one_token_is_caught(tmp_path: Path, shift: int) -> None:
    run = golden_trainer(tmp_path, TokenReward(GoldenScorer(shift), tokenizer()))
    run.train()
    assert misplaced(run.given, GOLDEN["advantages_BT"]) == [0, 1, 2, 4, 5]  # answer 3 has no token


def test_a_group_on_two_processes_is_one_group(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(ROOT / "tests" / "hosts"), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [*command, str(ROOT / "tests" / "hosts" / "trl_processes.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as launcher:
        try:
            said, complaints = launcher.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(launcher.pid, signal.SIGKILL)  # the workers too
            raise
    assert launcher.returncode == 0, complaints[-3000:]
    for shift, wrong in {0: [[], []], 1: [[0, 1, 2], [4, 5]]}.items():
        for process, numbers in enumerate(wrong):
            assert f"process {process} with a shift of {shift} misplaced {numbers}" in said


def test_the_scorer_is_given_the_sampled_ids_and_the_metrics_are_ours(tmp_path: Path) -> None:
    run = golden_trainer(tmp_path, TokenReward(GoldenScorer(), tokenizer()))
    run.train()  # GoldenScorer knows no other ids
    items = load()["items"]
    counted = [r for item in items for r, counts in zip(item["rewards"], item["mask"], strict=True) if counts]
    assert logged(run, "reward/mean_token") == [pytest.approx(sum(counted) / len(counted), abs=1e-6)]
    assert logged(run, "reward/masked_paid") == [0]
    assert logged(run, "length/mean") == [pytest.approx(len(counted) / len(items))]
    assert logged(run, "reward") == [0]  # nothing is paid twice


# ---- the other rewards


def test_the_weight_of_the_token_reward_is_its_coefficient(tmp_path: Path) -> None:
    """0.5 of the golden advantages, on top of what a second function gives a whole answer."""

    def long(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    run = golden_trainer(tmp_path, TokenReward(GoldenScorer(), tokenizer()))
    both = GoldenTrainer(
        model=policy(),
        processing_class=tokenizer(),
        reward_funcs=[long, TokenReward(GoldenScorer(), tokenizer())],
        args=config(
            tmp_path,
            per_device_train_batch_size=6,
            num_generations=2,
            max_steps=1,
            shuffle_dataset=False,
            reward_weights=[2.0, 0.5],
            scale_rewards="none",
        ),
        train_dataset=run.train_dataset,
        normalise="none",
    )
    both.train()
    items, wanted = load()["items"], []
    for number, (item, row) in enumerate(zip(items, GOLDEN["advantages_BT"], strict=True)):
        lengths = [2.0 * len(mate["response_ids"]) for mate in items[number // 2 * 2 : number // 2 * 2 + 2]]
        scalar = lengths[number % 2] - sum(lengths) / 2
        counts = [*item["mask"], *[0] * (len(row) - len(item["mask"]))]
        wanted.append([(scalar + 0.5 * value) * mask for value, mask in zip(row, counts, strict=True)])
    assert misplaced(both.given, wanted) == []


# ---- real answers


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_takes_steps(tmp_path: Path, loss: str) -> None:
    run = trainer(tmp_path, TokenReward(Even(), tokenizer()), loss_type=loss)
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.train()
    assert len(logged(run, "loss")) == 2 and all(torch.isfinite(torch.tensor(logged(run, "grad_norm"))))
    assert any((value != before[name]).any() for name, value in run.model.named_parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.04, "gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 4},
        {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"mask_truncated_completions": True, "max_completion_length": 3},
        {"top_entropy_quantile": 0.5, "scale_rewards": "batch", "num_generations": 8},
        {"delta": 2.0, "off_policy_mask_threshold": 0.5, "gamma": 0.9, "normalise": "group"},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_trl_and_ours(tmp_path: Path, options: dict[str, Any]) -> None:
    run = trainer(tmp_path, TokenReward(Even(), tokenizer()), **options)
    run.train()
    assert all(torch.isfinite(torch.tensor(logged(run, "grad_norm")))) and logged(run, "reward/masked_paid")[-1] == 0


def test_evaluation(tmp_path: Path) -> None:
    run = trainer(tmp_path, TokenReward(Even(), tokenizer()), num_generations_eval=2, per_device_eval_batch_size=4)
    figures = run.evaluate(prompts([5], [6, 7]))
    assert -1 <= figures["eval_reward/mean_token"] <= 1


def test_a_prompt_of_messages_is_read_as_the_policy_read_it(tmp_path: Path) -> None:
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": text([9, 10])}]] * 8})
    asked = []
    for kind in (Trainer, GRPOTrainer):
        scorer = Even()
        trainer(tmp_path, TokenReward(scorer, tokenizer()), kind=kind, train_dataset=dataset, max_steps=1).train()
        asked.append(scorer.items)
    for item in (*asked[0], *asked[1]):
        assert item.prompt_ids == [3, 9, 10, 4, 3]
        assert 0 < len(item.response_ids) <= 8 and EOS not in item.response_ids[:-1]


def test_an_environment_s_tokens_are_not_paid(tmp_path: Path) -> None:
    """A rollout of the user's own says which tokens are the policy's; TRL calls that env_mask."""

    def rollout(prompts: list[str], run: Any) -> dict[str, Any]:
        ids = [[20 + 2 * i, 31, 33, EOS] for i in range(len(prompts))]
        mask = [[1, 0, 0, 1]] * len(prompts)
        prompt_ids = run.processing_class(text=prompts)["input_ids"]
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": None, "env_mask": mask}

    reward = TokenReward(Even(), tokenizer())
    run = trainer(tmp_path, reward, rollout_func=rollout, max_steps=1)
    run.train()
    assert reward.scored is not None
    assert {tuple(rewards) for _, rewards in reward.scored} == {(1.0, 0.0, 0.0, 1.0)}
    assert logged(run, "reward/mean_token") == [1] and logged(run, "reward/masked_paid") == [0]


def test_a_discriminator_in_the_same_process_pays_what_it_says(tmp_path: Path) -> None:
    """Where tlcr's own dependencies fit beside TRL: no server."""
    local = pytest.importorskip("tlcr.hosts.local")
    labels = {0: "negative", 1: "positive"}
    model = policy(seed=1)
    model.config.id2label, model.config.label2id = labels, {name: i for i, name in labels.items()}
    LlamaForTokenClassification(model.config).save_pretrained(tmp_path / "discriminator")
    tokenizer().save_pretrained(tmp_path / "discriminator")
    scorer = local.LocalScorer(tmp_path / "discriminator")
    reward = TokenReward(scorer, tokenizer())
    run = trainer(tmp_path, reward, max_steps=1)
    run.train()
    assert reward.scored is not None and any(any(rewards) for _, rewards in reward.scored)
    for item, rewards in reward.scored:
        logits = scorer.model(torch.tensor([[*item.prompt_ids, *item.response_ids]])).logits[0].detach()
        p = logits.softmax(-1)[len(item.prompt_ids) :]
        assert rewards == pytest.approx((p[:, 1] - p[:, 0]).tolist(), abs=1e-5)


# ---- it learns


def rewards_of_training(kind: type, folder: Path, seed: int) -> list[float]:
    """The mean reward of each batch; 0 is a policy that does not care, 1 one that has learned the task."""
    changes = {"max_steps": 16, "per_device_train_batch_size": 16, "num_generations": 8, "seed": seed}
    run = trainer(folder, TokenReward(Even(), tokenizer()), kind=kind, max_completion_length=12, **changes)
    run.train()
    return logged(run, "reward/mean_token")


@pytest.mark.parametrize("seed", [0, 1])
def test_a_toy_task_is_learned_and_by_the_scalar_slower(tmp_path: Path, seed: int) -> None:
    dense = rewards_of_training(Trainer, tmp_path, seed)
    scalar = rewards_of_training(GRPOTrainer, tmp_path, seed)
    begun, ended = slice(0, 3), slice(-6, None)
    for rewards in (dense, scalar):
        assert abs(statistics.mean(rewards[begun])) < 0.3
        assert statistics.mean(rewards[ended]) > statistics.mean(rewards[begun]) + 0.3  # both learn
    assert statistics.mean(dense[ended]) > 0.8
    assert statistics.mean(scalar[ended]) < statistics.mean(dense[ended]) - 0.1


# ---- stock trainers take the scalar


def test_stock_trainers_take_the_mean(tmp_path: Path) -> None:
    reward = TokenReward(Even(), tokenizer())
    run = trainer(tmp_path, reward, kind=GRPOTrainer)
    run.train()
    assert logged(run, "rewards/token_reward/mean") == pytest.approx(logged(run, "reward/mean_answer"), abs=1e-6)
    assert logged(run, "reward") == logged(run, "rewards/token_reward/mean")
    args = config(tmp_path).to_dict()
    shared = {
        name: args[name] for name in ("output_dir", "per_device_train_batch_size", "num_generations", "max_steps")
    }
    rloo = RLOOTrainer(
        model=saved_policy(tmp_path),
        processing_class=tokenizer(),
        reward_funcs=[TokenReward(Even(), tokenizer())],
        args=RLOOConfig(**shared, max_completion_length=8, use_cpu=True, bf16=False, report_to=[], logging_steps=1),
        train_dataset=run.train_dataset,
    )
    rloo.train()
    assert len(logged(rloo, "loss")) == 2


def test_a_sum_is_length_biased_and_says_so() -> None:
    with pytest.warns(HostWarning, match="pays for length"):
        reward = TokenReward(Even(), tokenizer(), reduce="sum")
    ids = [[4, 6, 8], [4, 5]]
    assert reward(prompts=["w5", "w5"], completions=["", ""], completion_ids=ids) == [3.0, 0.0]
    mean = TokenReward(Even(), tokenizer())
    assert mean(prompts=["w5", "w5"], completions=["", ""], completion_ids=ids) == [1.0, 0.0]


def test_a_stock_trainer_with_tools_is_refused() -> None:
    reward = TokenReward(Even(), tokenizer())
    spoken = [[{"role": "assistant", "content": "w4"}, {"role": "tool", "content": "w5"}]]
    with pytest.raises(HostError, match="which tokens are theirs"):
        reward(prompts=["w5"], completions=spoken, completion_ids=[[4, 5]])
    with pytest.raises(HostError, match="images"):
        reward(prompts=["w5"], completions=["w4"], completion_ids=[[4]], images=[object()])


# ---- what is refused


def test_rloo_is_refused_in_a_sentence() -> None:
    with pytest.raises(HostError) as raised:

        class Refused(TokenRewardMixin, RLOOTrainer):
            pass

    said = str(raised.value)
    assert said.startswith("RLOOTrainer takes one advantage for an answer, not one for a token;")
    assert "class Trainer(TokenRewardMixin, GRPOTrainer)" in said and "\n" not in said


def test_a_loss_of_whole_answers_is_refused() -> None:
    gmpo = pytest.importorskip("trl.experimental.gmpo")
    with pytest.raises(HostError, match="GMPOTrainer computes its loss from one advantage"):
        type("Refused", (TokenRewardMixin, gmpo.GMPOTrainer), {})


def test_the_order_of_the_bases_matters() -> None:
    with pytest.raises(HostError, match="behind GRPOTrainer among the bases of Refused"):
        type("Refused", (GRPOTrainer, TokenRewardMixin), {})


def test_a_lost_seat_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def _compute_loss(self: Any, model: Any, inputs: Any) -> None:
        """A loss of a TRL to come."""

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", _compute_loss)
    with pytest.raises(HostError, match="does not say any more"):
        type("Refused", (TokenRewardMixin, GRPOTrainer), {})
    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    with pytest.raises(HostError, match="_calculate_rewards is not there"):
        type("Refused", (TokenRewardMixin, GRPOTrainer), {})


@pytest.mark.parametrize("number", [0, 2])
def test_one_token_reward_is_wanted(tmp_path: Path, number: int) -> None:
    others = [lambda completions, **columns: [0.0] * len(completions)]
    with pytest.raises(HostError, match=f"reward_funcs has {number} TokenReward"):
        trainer(tmp_path, [*others, *[TokenReward(Even(), tokenizer()) for _ in range(number)]])


def test_importance_of_whole_answers_warns(tmp_path: Path) -> None:
    with pytest.warns(HostWarning, match="undoes token rewards"):
        trainer(tmp_path, TokenReward(Even(), tokenizer()), importance_sampling_level="sequence", loss_type="grpo")


def test_a_wrong_number_of_rewards_stops_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, TokenReward(Silent(), tokenizer()))
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    with pytest.raises(HostError, match=r"answer 0 has (\d+) tokens and \d+ rewards"):
        run.train()
    assert all((value == before[name]).all() for name, value in run.model.named_parameters())


def test_answers_that_were_not_scored_stop_training(tmp_path: Path) -> None:
    class Reordered(TokenReward):
        def __call__(self, *args: Any, **columns: Any) -> list[float]:
            numbers = super().__call__(*args, **columns)
            assert self.scored is not None
            self.scored = self.scored[::-1]
            return numbers

    with pytest.raises(HostError, match="other ids than the"):
        trainer(tmp_path, Reordered(Even(), tokenizer())).train()

    class Forgetful(TokenReward):
        def __call__(self, *args: Any, **columns: Any) -> list[float]:
            numbers = super().__call__(*args, **columns)
            self.scored = None
            return numbers

    with pytest.raises(HostError, match="did not call its TokenReward"):
        trainer(tmp_path, Forgetful(Even(), tokenizer())).train()


def test_the_versions_are_those_of_the_pages() -> None:
    assert f"`{adaptor.TESTED}`" in (ROOT / "docs" / "hosts" / "trl.md").read_text(encoding="utf-8")
