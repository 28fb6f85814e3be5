"""slime: from a sample to the advantages, with the dictionaries that slime hands over.

slime is no package on an index. ``SLIME`` names a checkout of it; then its own classes and conversion run as well.
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import golden
import page
import pytest
import torch
from stubs import stub

from tlcr.errors import HostError
from tlcr.hosts import slime
from tlcr.hosts.remote import URL

GOLDEN = golden.load()
ITEMS, GROUP = GOLDEN["items"], GOLDEN["group"]
EXPECTED = GOLDEN["hosts"]["slime"]["rewards"]
REWARDS = [item["rewards"] for item in ITEMS]
MASKS = [item["mask"] for item in ITEMS]


@dataclass
class Sample:
    """The fields of ``slime.utils.types.Sample`` that matter here, with its defaults."""

    group_index: int | None = None
    index: int | None = None
    tokens: list[int] = field(default_factory=list)
    response_length: int = 0
    reward: Any = None
    loss_mask: list[int] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    custom_rm_path: str | None = None


def arguments(**changes: Any) -> Any:
    settings = {
        "advantage_estimator": "ppo",
        "reward_key": "score",
        "rm_type": None,
        "gamma": 1.0,
        "lambd": 1.0,
        "kl_coef": 0.0,
        "rewards_normalization": False,
        "grpo_std_normalization": False,
        "context_parallel_size": 1,
        "megatron_config_path": None,
    }
    return SimpleNamespace(**{**settings, **changes})


def samples() -> list[Any]:
    return [
        Sample(
            group_index=group,
            index=number,
            tokens=item["prompt_ids"] + item["response_ids"],
            response_length=len(item["response_ids"]),
            loss_mask=item["mask"] if 0 in item["mask"] else None,
        )
        for number, (group, item) in enumerate(zip(GROUP, ITEMS, strict=True))
    ]


pytestmark = pytest.mark.usefixtures("address")


def scored(args: Any) -> list[Any]:
    batch = samples()
    for sample in batch:
        sample.reward = asyncio.run(slime.reward(args, sample))
    return batch


def data_of(rewards: list[Any]) -> dict[str, Any]:
    """What slime's trainer has of these answers when it asks for advantages."""
    lengths = [len(item["response_ids"]) for item in ITEMS]
    zeros = [torch.zeros(length) for length in lengths]
    return {
        "rewards": rewards,
        "response_lengths": lengths,
        "kl": zeros,
        "values": [value.clone() for value in zeros],
        "loss_masks": [torch.tensor(mask, dtype=torch.float) for mask in MASKS],
    }


def test_rewards_that_travel_are_the_golden_ones() -> None:
    args = arguments()
    scores, rewards = slime.post_process(args, scored(args))
    for found, expected in zip(rewards, EXPECTED, strict=True):
        assert found == pytest.approx(expected)
    assert scores[0] == pytest.approx(sum(REWARDS[0]) / 5)


@pytest.mark.parametrize("shift", [1, -1])
def test_a_shift_by_one_token_is_caught(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slime, "scorer_at", lambda: golden.GoldenScorer(shift=shift))
    _, rewards = slime.post_process(arguments(), scored(arguments()))
    for found, expected in zip(rewards, EXPECTED, strict=True):
        assert not expected or found != pytest.approx(expected, abs=1e-3)


def test_with_a_critic_gae_reads_dense_rewards() -> None:
    args = arguments()
    data = data_of(slime.post_process(args, scored(args))[1])
    slime.advantages(args, data)
    for found, item in zip(data["advantages"], ITEMS, strict=True):
        expected = [value * counts for value, counts in zip(golden.to_go(item["rewards"]), item["mask"], strict=True)]
        assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_kl_is_paid_per_token() -> None:
    args = arguments(kl_coef=0.5)
    data = data_of(slime.post_process(args, scored(args))[1])
    data["kl"] = [torch.full_like(row, 0.2) for row in data["kl"]]
    slime.advantages(args, data)
    paid = [value - 0.1 for value in REWARDS[0]]
    assert data["advantages"][0].tolist() == pytest.approx(golden.to_go(paid), abs=1e-6)


def test_without_a_critic_reward_to_go_is_centred_in_its_group() -> None:
    args = arguments(advantage_estimator="grpo")
    data = data_of(slime.post_process(args, scored(args))[1])
    del data["values"]
    slime.advantages(args, data)
    for found, expected in zip(data["advantages"], golden.centred_to_go(REWARDS, MASKS, GROUP), strict=True):
        assert found.tolist() == pytest.approx(expected[: len(found)], abs=1e-6)
        assert not any(expected[len(found) :])


def test_normalisation_is_slimes_flag() -> None:
    args = arguments(advantage_estimator="grpo", rewards_normalization=True, grpo_std_normalization=True)
    rewards = slime.post_process(args, scored(args))[1]
    counted = [
        value
        for row, mask in zip(rewards[:2], MASKS[:2], strict=True)
        for value, counts in zip(row, mask, strict=False)
        if counts
    ]
    assert sum(value * value for value in counted) / len(counted) == pytest.approx(1)


def test_an_answer_without_tokens_is_paid_nothing() -> None:
    sample = samples()[3]
    found = asyncio.run(slime.reward(arguments(), sample))
    assert found["score"] == 0 and found["token_rewards"] == []


def test_slimes_own_reward_is_paid_at_the_last_token_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an answer that ends in what a tool put out, the last token is in no advantage."""

    async def outcome(args: Any, sample: Any) -> float:
        return 2.0

    monkeypatch.setattr(slime, "_outcome", outcome)
    for mask, paid_at in ((None, 6), ([1, 1, 1, 1, 1, 0, 0], 4), ([0] * 7, None)):
        sample = samples()[1]
        sample.loss_mask = mask
        found = asyncio.run(slime.reward(arguments(), sample))
        more = [a - b for a, b in zip(found["token_rewards"], REWARDS[1], strict=True)]
        counted = [place for place in range(7) if mask is None or mask[place]]
        assert [round(more[place], 6) for place in counted] == [2.0 * (place == paid_at) for place in counted]
        assert found["outcome"] == 2


def slimes_own(monkeypatch: pytest.MonkeyPatch, gives: Any) -> None:
    """A ``slime.rollout.rm_hub`` whose reward is ``gives``."""

    async def async_rm(args: Any, sample: Any) -> Any:
        assert args.custom_rm_path is None and sample.custom_rm_path is None
        return gives

    hub = ModuleType("slime.rollout.rm_hub")
    hub.async_rm = async_rm  # type: ignore[attr-defined]
    for name, module in (("slime", ModuleType("slime")), ("slime.rollout", ModuleType("slime.rollout"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, hub.__name__, hub)


@pytest.mark.parametrize("gives", [2, 2.0, {"score": 2.0, "acc": True, "pred": "4"}])
def test_slimes_own_reward_is_a_number_or_has_a_score(gives: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--rm-type math`` gives a number, ``dapo`` a dictionary, ``remote_rm`` what a server says, ours among them."""
    slimes_own(monkeypatch, gives)
    found = asyncio.run(slime.reward(arguments(rm_type="any", custom_rm_path="ours"), samples()[1]))
    assert found["outcome"] == 2
    assert found["score"] == pytest.approx(sum(REWARDS[1]) / len(REWARDS[1]) + 2)


@pytest.mark.parametrize("gives", [{"acc": 1.0}, {"score": None}, "2", None])
def test_a_reward_of_slimes_that_is_no_number_is_named(gives: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slimes_own(monkeypatch, gives)
    with pytest.raises(HostError, match=r"slime's own reward, by --rm-type, is .*wanted a number"):
        asyncio.run(slime.reward(arguments(rm_type="any", custom_rm_path="ours"), samples()[1]))


def test_a_group_is_scored_as_its_answers_are() -> None:
    """slime gives a list with ``--group-rm``, and where one prompt became several samples."""
    one_by_one = [asyncio.run(slime.reward(arguments(), sample)) for sample in samples()]
    assert asyncio.run(slime.reward(arguments(), samples())) == one_by_one


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reward_key": None}, "set --reward-key score"),
        ({"context_parallel_size": 2}, "set it to 1"),
        ({"megatron_config_path": "x.yaml"}, "slime's critic ignores"),
    ],
)
def test_settings_that_would_misplace_rewards(changes: dict[str, Any], says: str) -> None:
    args = arguments(**changes)
    with pytest.raises(HostError, match=says):
        slime.post_process(args, scored(args))


def test_bad_input_says_what_is_wrong(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    args, batch = arguments(), scored(arguments())
    batch[1].response_length -= 1
    with pytest.raises(HostError, match="6 tokens and 7 rewards"):
        slime.post_process(args, batch)
    batch[1].reward = 0.5
    with pytest.raises(HostError, match="set --custom-rm-path"):
        slime.post_process(args, batch)
    with pytest.raises(HostError, match="set --custom-reward-post-process-path"):
        slime.advantages(args, data_of([0.5] * len(ITEMS)))
    with pytest.raises(HostError, match="set --kl-coef 0"):
        slime.advantages(arguments(advantage_estimator="grpo", kl_coef=0.1), data_of(REWARDS))
    whole = samples()[0]
    whole.response_length = len(whole.tokens)
    with pytest.raises(HostError, match="wanted a prompt before it"):
        asyncio.run(slime.reward(args, whole))
    for wrong, says in (("nan", "nan"), ("short", "5 tokens and 4 rewards")):
        monkeypatch.setattr(server, "wrong", wrong)
        with pytest.raises(HostError, match=says):
            asyncio.run(slime.reward(args, samples()[0]))
    monkeypatch.setenv(URL, "http://127.0.0.1:9")
    with pytest.raises(HostError, match="cannot be reached"):
        asyncio.run(slime.reward(args, samples()[0]))


def test_a_slime_without_the_names_is_refused() -> None:
    with pytest.raises(HostError, match="has no 'response_length'"):
        asyncio.run(slime.reward(arguments(), SimpleNamespace(tokens=[1, 2])))
    with pytest.raises(HostError, match="has no 'kl'"):
        slime.advantages(arguments(), {"rewards": []})


needs_slime = pytest.mark.skipif("SLIME" not in os.environ, reason="SLIME names no checkout of slime")


@needs_slime
def test_the_flags_of_the_page_are_slimes() -> None:
    source = Path(os.environ["SLIME"], "slime", "utils", "arguments.py").read_text(encoding="utf-8")
    flags = page.flags("slime") - {"context-parallel-size"}  # Megatron's
    assert len(flags) > 10 and [flag for flag in flags if f'"--{flag}"' not in source] == []


@needs_slime
def test_slimes_own_code_carries_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Sample, its conversion for the trainer, and the step that asks for advantages."""
    monkeypatch.syspath_prepend(os.environ["SLIME"])
    stub("megatron", "sglang", "sglang_router", "httpx", "wandb", "tensorboard", "pylatexenc", "qwen_vl_utils")
    from slime.backends.megatron_utils import loss
    from slime.ray import rollout
    from slime.utils.types import Sample as Theirs

    monkeypatch.setattr(loss.mpu, "is_pipeline_last_stage", lambda: True, raising=False)
    path = "tlcr.hosts.slime."
    more = {
        "custom_reward_post_process_path": path + "post_process",
        "custom_advantage_function_path": path + "advantages",
        "use_rollout_logprobs": False,
        "use_opd": False,
        "normalize_advantages": False,
    }
    args = arguments(**more)
    batch = []
    for ours in samples():
        sample = Theirs(index=ours.index, group_index=ours.group_index, tokens=ours.tokens, loss_mask=ours.loss_mask)
        sample.response_length = ours.response_length
        sample.reward = asyncio.run(slime.reward(args, sample))
        batch.append(sample)
    manager = SimpleNamespace(
        args=args,
        custom_convert_samples_to_train_data_func=None,
        custom_reward_post_process_func=slime.post_process,
    )
    theirs = rollout.RolloutManager.__ray_metadata__.modified_class
    manager._post_process_rewards = lambda rows: theirs._post_process_rewards(manager, rows)
    data = theirs._convert_samples_to_train_data(manager, batch)
    for found, expected in zip(data["rewards"], EXPECTED, strict=True):
        assert found == pytest.approx(expected)
    data["loss_masks"] = [torch.tensor(mask) for mask in data["loss_masks"]]
    data["log_probs"] = [torch.zeros(length) for length in data["response_lengths"]]
    data["values"] = [torch.zeros(length) for length in data["response_lengths"]]
    loss.compute_advantages_and_returns(args, data)
    for found, item in zip(data["advantages"], ITEMS, strict=True):
        expected = [value * counts for value, counts in zip(golden.to_go(item["rewards"]), item["mask"], strict=True)]
        assert found.tolist() == pytest.approx(expected, abs=1e-6)
